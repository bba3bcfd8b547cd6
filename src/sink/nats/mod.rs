//! NATS. With JetStream each message waits for the acknowledgement of a stream: at least once,
//! deduplicated by the idempotency key within the stream's window. With core NATS a batch is done
//! once the server has it: at most once for each subscriber, none where nobody listens.

use async_nats::{
    HeaderMap, HeaderName, HeaderValue, header,
    jetstream::{ErrorCode, context::PublishErrorKind, message::PublishMessage},
};
use async_trait::async_trait;
use bytes::Bytes;

use self::connect::{Connection, Dial};
use super::{
    Capabilities, Context, Progress, Sink, With, Written,
    wave::{self, Failure},
};
use crate::{
    change::{Batch, Change},
    config,
    error::{Class, Error, Result},
    failpoint,
    format::{Encoder, Template},
};

mod connect;
mod subject;

/// Messages on their way at most; the client's own queue is half as long.
const IN_FLIGHT_MAX: usize = 4_096;
/// The name of the header that carries the offset.
const OFFSET: &str = "walrace-offset";

/// The `nats` sink.
pub(super) struct Nats {
    encoder: Encoder,
    subject: Template,
    /// The server refuses a message that would land in another stream.
    stream: Option<HeaderValue>,
    dial: Dial,
    connection: Option<Connection>,
    context: Context,
}

struct Message {
    subject: String,
    headers: HeaderMap,
    payload: Bytes,
}

impl Nats {
    pub(super) fn new(options: &config::Nats, with: With) -> Result<Self> {
        let With { format, context, .. } = with;
        let template: Template = options.subject.parse()?;
        subject::check_template(&template)?;
        if options.stream.is_none() && options.create_stream {
            return Err(Error::config("`create_stream` needs the name of the stream")
                .remedy("set `stream`, such as stream = \"CHANGES\""));
        }
        if options.stream.is_some() && !options.jetstream {
            return Err(Error::config("`stream` is set, but `jetstream` is false")
                .remedy("core NATS has no streams: leave one of the two out"));
        }
        let stream = options.stream.as_deref().map(str::parse).transpose();
        let stream = stream.map_err(|_| Error::config("`stream` is not the name of a stream"))?;
        Ok(Self {
            encoder: with.encoder(format)?,
            dial: Dial::new(options, &template, &context.names)?,
            subject: template,
            stream,
            connection: None,
            context: context.clone(),
        })
    }

    /// The message of a change; `None` where the format has none.
    fn message(&mut self, change: &Change, bytes_max: usize) -> Result<Option<Message>> {
        let mut payload = Vec::new();
        if !self.encoder.encode(change, &mut payload)? {
            return Ok(None);
        }
        let subject = match change.route() {
            Some(route) => route.to_owned(),
            None => self.subject.render(change, &self.context.names)?,
        };
        subject::check(&subject)?;
        let headers = self.headers(change)?;
        let size = payload.len() + header_bytes(&headers);
        if size > bytes_max {
            let text = format!("a message for {subject} has {size} bytes, of {bytes_max} allowed");
            return Err(Error::data(text).remedy(
                "raise max_payload of the server, or max_msg_size of the stream, or send less",
            ));
        }
        Ok(Some(Message { subject, headers, payload: payload.into() }))
    }

    fn headers(&mut self, change: &Change) -> Result<HeaderMap> {
        let mut headers = HeaderMap::new();
        let of_format = self.encoder.headers(change)?;
        let of_format = of_format.iter().map(|(name, value)| (*name, value.as_str()));
        for (name, value) in of_format.chain(change.headers()) {
            let refused = || Error::data(format!("the header `{name}` is not one that NATS takes"));
            let key: HeaderName = name.parse().map_err(|_| refused())?;
            let value: HeaderValue = value.parse().map_err(|_| refused())?;
            headers.append(key, value);
        }
        // Last, so that no rule can replace what deduplication goes by.
        let id = change.idempotency_key();
        let id = id.parse().map_err(|_| Error::bug("an idempotency key is no header's value"))?;
        headers.insert(header::NATS_MESSAGE_ID, HeaderValue::clone(&id));
        headers.insert(OFFSET, HeaderValue::from(change.offset));
        if let Some(stream) = &self.stream {
            headers.insert(header::NATS_EXPECTED_STREAM, stream.clone());
        }
        Ok(headers)
    }

    /// Sends changes that share no key, in their order, and waits until all of them arrived.
    async fn send(
        connection: &mut Connection,
        wave: &mut [Option<Message>],
    ) -> Result<(), Failure> {
        let timeout = connection.timeout();
        let sent = async {
            match &connection.stream {
                Some(_) => Self::send_to_stream(connection, wave).await,
                None => {
                    let sent = Self::send_to_subscribers(connection, wave).await;
                    sent.map_err(|error| Failure { durable: 0, error })
                }
            }
        };
        let late = || connection.silent(timeout);
        match tokio::time::timeout(timeout, sent).await {
            Ok(sent) => sent,
            Err(_) => Err(Failure { durable: 0, error: late() }),
        }
    }

    async fn send_to_stream(
        connection: &Connection,
        wave: &mut [Option<Message>],
    ) -> Result<(), Failure> {
        let Some(stream) = &connection.stream else { return Ok(()) };
        let mut acks = Vec::with_capacity(wave.len());
        for (place, message) in wave.iter_mut().enumerate() {
            let Some(Message { subject, headers, payload }) = message.take() else { continue };
            let publish = PublishMessage::build().payload(payload).headers(headers);
            let sent = stream.send_publish(subject.clone(), publish).await;
            let ack = sent.map_err(|cause| {
                let error = connection.lost(&format!("cannot publish on {subject}"));
                Failure { durable: 0, error: error.caused_by(cause) }
            })?;
            acks.push((place, subject, ack));
        }
        failpoint::reach("nats::after_publish");
        for (durable, subject, ack) in acks {
            let outcome = tokio::select! {
                ack = ack.into_future() => ack,
                denied = connection.denied() => return Err(Failure { durable, error: denied }),
            };
            // A duplicate is one that an earlier delivery has brought there.
            if let Err(cause) = outcome {
                return Err(Failure { durable, error: connection.refusal(&subject, cause).await });
            }
        }
        failpoint::reach("nats::after_acks");
        Ok(())
    }

    async fn send_to_subscribers(
        connection: &Connection,
        wave: &mut [Option<Message>],
    ) -> Result<()> {
        for Message { subject, headers, payload } in wave.iter_mut().filter_map(Option::take) {
            let published =
                connection.client.publish_with_headers(subject.clone(), headers, payload).await;
            published.map_err(|cause| {
                connection.lost(&format!("cannot publish on {subject}")).caused_by(cause)
            })?;
        }
        connection.round_trip().await
    }
}

#[async_trait]
impl Sink for Nats {
    fn capabilities(&self) -> Capabilities {
        Capabilities { lanes: true, routes: true, headers: true, ..Capabilities::default() }
    }

    async fn open(&mut self) -> Result<Option<Progress>> {
        // A client of its own each time: nothing that the last one still holds may come later.
        self.connection = None;
        self.connection = Some(self.dial.connect().await?);
        Ok(None)
    }

    async fn write(&mut self, batch: &Batch, _progress: &Progress) -> Result<Written> {
        // Taken out, and put back when all went well: it is not used after an error or a stop.
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => self.dial.connect().await?,
        };
        let bytes_max = connection.message_bytes_max;
        let mut messages = Vec::with_capacity(batch.changes.len());
        let mut refused = None;
        for change in &batch.changes {
            match self.message(change, bytes_max) {
                Ok(message) => messages.push(message),
                Err(error) => {
                    refused = Some(error);
                    break;
                }
            }
        }
        let (count, sendable) = (batch.changes.len(), messages.len());
        let filtered = messages.iter().filter(|message| message.is_none()).count();
        let mut durable = 0;
        while let Some(changes) = batch.changes.get(durable..sendable).filter(|c| !c.is_empty()) {
            let end = durable + wave::first(changes, IN_FLIGHT_MAX).len();
            let wave = messages.get_mut(durable..end).unwrap_or_default();
            if let Err(failure) = Self::send(&mut connection, wave).await {
                if failure.error.class() == Class::Data {
                    self.connection = Some(connection);
                }
                let durable = durable + failure.durable;
                return wave::cut_short(Failure { durable, ..failure }, count);
            }
            durable = end;
        }
        self.connection = Some(connection);
        self.context.count_filtered(filtered as u64);
        match refused {
            None => Ok(Written::All),
            Some(error) => wave::cut_short(Failure { durable, error }, count),
        }
    }

    async fn close(&mut self) -> Result<()> {
        self.connection = None;
        Ok(())
    }
}

/// Bytes of the headers as they are sent (<https://docs.nats.io/reference/reference-protocols>).
fn header_bytes(headers: &HeaderMap) -> usize {
    let lines = headers.iter().flat_map(|(name, values)| {
        let name: &str = name.as_ref();
        values.iter().map(move |value| name.len() + value.as_str().len() + ": \r\n".len())
    });
    "NATS/1.0\r\n\r\n".len() + lines.sum::<usize>()
}

/// Whether no stream has the subject, as far as the server that was asked knows.
fn is_without_stream(kind: PublishErrorKind) -> bool {
    kind == PublishErrorKind::StreamNotFound
}

/// What an answer of JetStream means for the change, or for everything.
fn class_of(code: ErrorCode) -> Class {
    match code {
        ErrorCode::STREAM_MESSAGE_EXCEEDS_MAXIMUM | ErrorCode::STREAM_HEADER_EXCEEDS_MAXIMUM => {
            Class::Data
        }
        ErrorCode::JETSTREAM_NOT_ENABLED
        | ErrorCode::JETSTREAM_NOT_ENABLED_FOR_ACCOUNT
        | ErrorCode::STREAM_NOT_MATCH
        | ErrorCode::STREAM_SEALED => Class::Config,
        // Full, without a leader, short of resources: time or a consumer may heal it.
        _ => Class::Retry,
    }
}
