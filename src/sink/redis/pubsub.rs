//! Messages on channels, for whoever listens at that moment.

use std::cmp::Reverse;

use ::redis::{Pipeline, pipe};
use async_trait::async_trait;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::{Server, VALUE_BYTES_MAX, check_size};
use crate::{
    change::{Batch, Change},
    config::{self, Format, Globs, RedisPubsubPayload},
    error::{Class, Classify, Error, Result, ResultExt},
    failpoint,
    format::{Encoder, Template},
    sink::{Capabilities, Carries, Context, Progress, Sink, With, Written},
};

/// The `redis_pubsub` sink.
pub(in crate::sink) struct Pubsub {
    server: Server,
    encoder: Encoder,
    payload: RedisPubsubPayload,
    channel: Template,
    /// Tables with a channel of their own, the most particular first.
    channels: Vec<(Globs, Template)>,
    context: Context,
}

/// What Strait takes of Sequin's message.
#[derive(Deserialize)]
struct Message<'a> {
    #[serde(borrow)]
    record: &'a RawValue,
    #[serde(borrow)]
    changes: &'a RawValue,
    #[serde(borrow)]
    action: &'a RawValue,
    #[serde(borrow)]
    metadata: Metadata<'a>,
}

#[derive(Deserialize)]
struct Metadata<'a> {
    #[serde(borrow)]
    table_name: &'a RawValue,
    #[serde(borrow)]
    commit_timestamp: &'a RawValue,
}

impl Pubsub {
    pub(in crate::sink) fn new(options: &config::RedisPubsub, with: With) -> Result<Self> {
        let With { format, context, .. } = with;
        let format = match options.payload {
            RedisPubsubPayload::Message => format,
            RedisPubsubPayload::Strait => Format::Sequin,
        };
        let mut channels: Vec<_> = options.channels.iter().collect();
        channels.sort_by_key(|(glob, _)| (glob.contains(['*', '?']), Reverse(glob.len())));
        let parse = |(glob, template): (&String, &String)| {
            if glob.is_empty() || glob.starts_with('!') {
                return Err(Error::config(format!("`channels` names no table by `{glob}`"))
                    .remedy("such as \"orders\", \"public.orders\" or \"audit.*\""));
            }
            let qualified = if glob.contains('.') { glob.clone() } else { format!("*.{glob}") };
            let template = template.parse().context(|| format!("in `channels` of `{glob}`"))?;
            Ok((Globs::new(&[qualified]), template))
        };
        Ok(Self {
            server: Server::new(&options.url, options.tls_ca.as_ref(), options.timeout_ms)?,
            encoder: with.encoder(format)?,
            payload: options.payload,
            channel: options.channel.parse()?,
            channels: channels.into_iter().map(parse).collect::<Result<_>>()?,
            context: context.clone(),
        })
    }

    fn encode(&mut self, changes: &[Change]) -> Result<(Pipeline, u64)> {
        let mut publish = pipe();
        let mut filtered = 0;
        for change in changes {
            let mut message = Vec::new();
            if !self.encoder.encode(change, &mut message)? {
                filtered += 1;
                continue;
            }
            let shaped = change.shaped.as_ref().is_some_and(|shaped| shaped.payload.is_some());
            if self.payload == RedisPubsubPayload::Strait && !shaped {
                message = strait(&message)?;
            }
            check_size("a message", message.len(), VALUE_BYTES_MAX)?;
            publish.cmd("PUBLISH").arg(self.channel(change)?).arg(message);
        }
        Ok((publish, filtered))
    }

    fn channel(&self, change: &Change) -> Result<String> {
        if let Some(route) = change.route() {
            return Ok(route.to_owned());
        }
        let own = change.table.as_ref().and_then(|table| {
            let chosen = |(globs, _): &&(Globs, Template)| globs.choose(&table.schema, &table.name);
            self.channels.iter().find(chosen)
        });
        let template = own.map_or(&self.channel, |(_, template)| template);
        template.render(change, &self.context.names)
    }
}

#[async_trait]
impl Sink for Pubsub {
    fn capabilities(&self) -> Capabilities {
        let carries = match self.payload {
            RedisPubsubPayload::Message => Carries::Bytes,
            RedisPubsubPayload::Strait => Carries::Headers, // whatever the format, it is another
        };
        Capabilities { carries, routes: true, ..Capabilities::default() }
    }

    async fn open(&mut self) -> Result<Option<Progress>> {
        self.server.open().await?;
        Ok(None)
    }

    async fn write(&mut self, batch: &Batch, _progress: &Progress) -> Result<Written> {
        let (publish, filtered) = self.encode(&batch.changes)?;
        self.server.ask_all(&publish).await?;
        failpoint::reach("redis::after_write");
        self.context.count_filtered(filtered);
        Ok(Written::All)
    }

    async fn close(&mut self) -> Result<()> {
        self.server.close();
        Ok(())
    }
}

/// The payload of Strait's `cdc:` channels, of Sequin's message.
fn strait(message: &[u8]) -> Result<Vec<u8>> {
    let Message { record, changes, action, metadata } = serde_json::from_slice(message)
        .class(Class::Bug, || "a message of Sequin's that cannot be read back")?;
    let Metadata { table_name, commit_timestamp } = metadata;
    let text = format!(
        "{{\"table\":{table_name},\"action\":{action},\"record\":{record},\"changes\":{changes},\
         \"timestamp\":{commit_timestamp},\"source\":\"cdc\"}}"
    );
    Ok(text.into_bytes())
}
