//! RabbitMQ: persistent messages to an exchange, each confirmed by the server. At least once: a
//! consumer tells a second delivery by the message id, which is the idempotency key.

use std::collections::HashSet;

use async_trait::async_trait;
use lapin::{
    BasicProperties, Confirmation, PublisherConfirm,
    options::BasicPublishOptions,
    types::{AMQPValue, FieldTable, LongString, ShortString},
};

use self::connect::{Connection, Dial};
use super::{
    Capabilities, Context, Progress, Sink, With, Written,
    wave::{self, Failure},
};
use crate::{
    change::{Batch, Change},
    config::{self, Unroutable},
    error::{Class, Error, Result},
    failpoint,
    format::{Encoder, Template},
};

mod connect;

/// Messages on their way at most.
const IN_FLIGHT_MAX: usize = 4_096;
/// The delivery mode of a message that a durable queue keeps on disk.
const PERSISTENT: u8 = 2;
/// All headers of a message are in one frame, of 128 KiB by default.
const HEADER_BYTES_MAX: usize = 64 << 10;

/// The `rabbitmq` sink.
pub(super) struct Rabbitmq {
    encoder: Encoder,
    routing_key: Template,
    unroutable: Unroutable,
    dial: Dial,
    connection: Option<Connection>,
    /// The server's limit, once it has refused a message for it: it tells it in no other way.
    message_bytes_max: usize,
    context: Context,
}

struct Message {
    routing_key: ShortString,
    id: ShortString,
    properties: BasicProperties,
    payload: Vec<u8>,
}

impl Rabbitmq {
    pub(super) fn new(options: &config::Rabbitmq, with: With) -> Result<Self> {
        let With { format, context, .. } = with;
        Ok(Self {
            encoder: with.encoder(format)?,
            routing_key: options.routing_key.parse()?,
            unroutable: options.unroutable,
            dial: Dial::new(options)?,
            connection: None,
            message_bytes_max: usize::MAX,
            context: context.clone(),
        })
    }

    /// The message of a change; `None` where the format has none.
    fn message(&mut self, change: &Change) -> Result<Option<Message>> {
        let mut payload = Vec::new();
        if !self.encoder.encode(change, &mut payload)? {
            return Ok(None);
        }
        let routing_key = match change.route() {
            Some(route) => route.to_owned(),
            None => self.routing_key.render(change, &self.context.names)?,
        };
        let routing_key = short(&routing_key, "the routing key")?;
        if payload.len() > self.message_bytes_max {
            let (size, max) = (payload.len(), self.message_bytes_max);
            let text = format!("a message for {routing_key} has {size} bytes, of {max} allowed");
            return Err(Error::data(text).remedy("raise max_message_size of RabbitMQ"));
        }
        let id = short(&change.idempotency_key(), "the idempotency key")?;
        let seconds = change.transaction.commit_time.0.div_euclid(1_000_000);
        let properties = BasicProperties::default()
            .with_delivery_mode(PERSISTENT)
            .with_message_id(id.clone())
            .with_timestamp(seconds.try_into().unwrap_or(0))
            .with_content_type(short(self.encoder.content_type(), "the media type")?)
            .with_headers(headers(change, &self.encoder.headers(change)?)?);
        Ok(Some(Message { routing_key, id, properties, payload }))
    }

    /// Delivers the changes in waves, each of which waits for the one before it.
    async fn deliver(&mut self, changes: &[Change]) -> Result<(), Failure> {
        let nothing = |error| Failure { durable: 0, error };
        // Taken out, and put back when all went well: it is not used after an error or a stop.
        let connection = match self.connection.take() {
            Some(connection) => connection,
            None => self.dial.connect().await.map_err(nothing)?,
        };
        let mut messages = Vec::with_capacity(changes.len());
        let mut refused = None;
        for change in changes {
            match self.message(change) {
                Ok(message) => messages.push(message),
                Err(error) => {
                    refused = Some(error);
                    break;
                }
            }
        }
        let mut durable = 0;
        while let Some(rest) = changes.get(durable..messages.len()).filter(|c| !c.is_empty()) {
            let end = durable + wave::first(rest, IN_FLIGHT_MAX).len();
            let wave = messages.get(durable..end).unwrap_or_default();
            let mandatory = self.unroutable == Unroutable::Stop;
            if let Err(failure) = send_in_time(&connection, wave, mandatory).await {
                self.learn(&failure.error);
                self.dial.keep_blocked(connection);
                return Err(Failure { durable: durable + failure.durable, ..failure });
            }
            durable = end;
        }
        self.connection = Some(connection);
        let filtered = messages.iter().filter(|message| message.is_none()).count();
        self.context.count_filtered(filtered as u64);
        refused.map_or(Ok(()), |error| Err(Failure { durable, error }))
    }

    /// Keeps the limit that the server told as it refused a message.
    fn learn(&mut self, error: &Error) {
        if error.class() == Class::Data
            && let Some(limit) = connect::last_number(&error.summary())
        {
            self.message_bytes_max = self.message_bytes_max.min(limit);
        }
    }
}

/// Sends changes that share no key, in their order, and waits until all of them are confirmed.
async fn send_in_time(
    connection: &Connection,
    wave: &[Option<Message>],
    mandatory: bool,
) -> Result<(), Failure> {
    let sent = send(connection, wave, mandatory);
    match tokio::time::timeout(connection.timeout, sent).await {
        Ok(sent) => sent,
        Err(_) => Err(Failure { durable: 0, error: connection.silent() }),
    }
}

async fn send(
    connection: &Connection,
    wave: &[Option<Message>],
    mandatory: bool,
) -> Result<(), Failure> {
    let options = BasicPublishOptions { mandatory, ..BasicPublishOptions::default() };
    let mut waiting: Vec<PublisherConfirm> = Vec::with_capacity(wave.len());
    let mut failed = None;
    for Message { routing_key, properties, payload, .. } in wave.iter().flatten() {
        let exchange = connection.exchange.clone();
        let (key, properties) = (routing_key.clone(), properties.clone());
        let published =
            connection.channel.basic_publish(exchange, key, options, payload, properties).await;
        match published {
            Ok(confirm) => waiting.push(confirm),
            Err(cause) => {
                failed = Some(cause);
                break;
            }
        }
    }
    failpoint::reach("rabbitmq::after_publish");
    let mut confirms = Vec::with_capacity(waiting.len());
    for confirm in waiting {
        match confirm.await {
            Ok(confirm) => confirms.push(confirm),
            // It has the server's reason, where a publish that failed has only what followed of it.
            Err(cause) => {
                failed = Some(cause);
                break;
            }
        }
    }
    match failed {
        // Which of the others were returned is not certain then.
        Some(cause) => Err(Failure { durable: 0, error: connection.failure(cause) }),
        None => judge(connection, wave, &confirms),
    }
}

/// Finds the first message that was confirmed and yet did not arrive.
fn judge(
    connection: &Connection,
    wave: &[Option<Message>],
    confirms: &[Confirmation],
) -> Result<(), Failure> {
    failpoint::reach("rabbitmq::after_confirms");
    let mut returned = HashSet::new();
    for confirm in confirms {
        // The client hands a returned message out with the next confirm, whosever that is.
        if let Confirmation::Ack(Some(back)) | Confirmation::Nack(Some(back)) = confirm {
            returned.extend(back.delivery.properties.message_id().as_ref());
        }
    }
    let mut confirms = confirms.iter();
    for (durable, message) in wave.iter().enumerate() {
        let Some(Message { routing_key, id, .. }) = message else { continue };
        let taken = confirms.next().is_some_and(Confirmation::is_ack);
        let error = match (returned.contains(id), taken) {
            (true, _) => connection.unroutable(routing_key.as_str()),
            (false, false) => connection.rejected(routing_key.as_str()),
            (false, true) => continue,
        };
        return Err(Failure { durable, error });
    }
    Ok(())
}

#[async_trait]
impl Sink for Rabbitmq {
    fn capabilities(&self) -> Capabilities {
        Capabilities { lanes: true, routes: true, headers: true, ..Capabilities::default() }
    }

    async fn open(&mut self) -> Result<Option<Progress>> {
        self.connection = None;
        self.connection = Some(self.dial.connect().await?);
        Ok(None)
    }

    async fn write(&mut self, batch: &Batch, _progress: &Progress) -> Result<Written> {
        let mut start = 0;
        loop {
            let limit = self.message_bytes_max;
            let rest = batch.changes.get(start..).unwrap_or_default();
            match self.deliver(rest).await {
                Ok(()) => return Ok(Written::All),
                // The limit is known only now: all that is below it goes again, over a new channel.
                Err(failure) if self.message_bytes_max < limit => start += failure.durable,
                Err(failure) => {
                    let durable = start + failure.durable;
                    let failure = Failure { durable, ..failure };
                    return wave::cut_short(failure, batch.changes.len());
                }
            }
        }
    }

    async fn close(&mut self) -> Result<()> {
        if let Some(connection) = self.connection.take() {
            connection.close().await;
        }
        Ok(())
    }
}

fn headers(change: &Change, of_format: &[(&str, String)]) -> Result<FieldTable> {
    let mut headers = FieldTable::default();
    let mut bytes = 0;
    let of_format = of_format.iter().map(|(name, value)| (*name, value.as_str()));
    for (name, value) in of_format.chain(change.headers()) {
        bytes += name.len() + value.len();
        let name = short(name, "the name of a header")?;
        headers.insert(name, AMQPValue::LongString(LongString::from(value)));
    }
    if bytes > HEADER_BYTES_MAX {
        return Err(Error::data(format!("the headers of a message have {bytes} bytes")));
    }
    let offset = i64::try_from(change.offset).unwrap_or(i64::MAX);
    headers.insert("walrace-offset".into(), AMQPValue::LongLongInt(offset));
    Ok(headers)
}

/// A text that AMQP limits to 255 bytes.
fn short(text: &str, what: &str) -> Result<ShortString> {
    ShortString::try_new(text).map_err(|_| {
        let bytes = text.len();
        Error::data(format!("{what} has {bytes} bytes, of 255 that AMQP allows: {text:.40}…"))
    })
}
