//! HTTP pull: consumers fetch messages, and acknowledge them. Sequin calls it a Sequin Stream; the
//! routes are in `api::sequin`.
//!
//! ```text
//!   write ──► feed (look-ahead, in memory) ──► receive ──► consumer
//!       ▲       │ low-water mark, leases            ack, nack │
//!       │       ▼                                             │
//!  verdicts   store (durable, of this sink) ◄─────────────────┘
//!  (parking)
//! ```
//!
//! The store is the target: it holds the low-water mark, below which everything is acknowledged,
//! what is acknowledged beyond it, and the leases. What waits is not in it: after a restart the
//! loop brings it again from the low-water mark on.

mod ack_id;
mod feed;
mod leases;
mod ranges;
mod shared;
mod store;
mod stream;
mod verdicts;

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use tokio_util::sync::CancellationToken;

pub use self::stream::{Pulled, Stream};
use self::{
    feed::{Message, Place},
    shared::Shared,
    store::Store,
};
use super::{Beyond, Capabilities, Carries, Context, Progress, Sink, Verdict, With, Written};
use crate::{
    change::{Batch, Change},
    config::{self, Format},
    error::{Class, Classify, Error, Result},
    failpoint,
    format::Encoder,
};

/// The streams of a process, by the name of their sink. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Pulls {
    streams: Arc<Mutex<HashMap<String, Arc<Shared>>>>,
    stop: CancellationToken,
}

impl Pulls {
    /// Streams whose waits end with `stop`.
    pub fn until(stop: CancellationToken) -> Self {
        Self { stop, ..Self::default() }
    }

    /// The consumers' end of the sink `name`, now or once it is open.
    pub fn stream(&self, name: &str, options: &config::HttpPull) -> Stream {
        Stream::new(self.shared(name, options))
    }

    fn shared(&self, name: &str, options: &config::HttpPull) -> Arc<Shared> {
        let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || Arc::new(Shared::new(name, options, self.stop.clone()));
        Arc::clone(streams.entry(name.to_owned()).or_insert_with(new))
    }
}

/// So much memory is taken at once. The last of the messages in it frees it, so that one that
/// nobody acknowledges holds no more.
const CHUNK_BYTES: usize = 8 << 10;

/// The `http_pull` sink.
pub(super) struct HttpPull {
    path: PathBuf,
    encoder: Encoder,
    /// One message at a time.
    text: Vec<u8>,
    /// Where messages are put together.
    chunk: BytesMut,
    grouping: bool,
    shared: Arc<Shared>,
    context: Context,
}

impl HttpPull {
    pub(super) fn new(options: &config::HttpPull, with: With) -> Result<Self> {
        let With { name, format, context, .. } = with;
        check(name, options)?;
        let format = if format == Format::Native { options.message } else { format };
        let encoder = with.encoder(format)?;
        if encoder.content_type() != "application/json" {
            return Err(Error::config(format!(
                "sink {name} answers in JSON, which its format is not"
            ))
            .remedy(format!("remove `format` from sink.{name}")));
        }
        Ok(Self {
            path: context.data_dir.join("pull").join(format!("{name}.sqlite")),
            encoder,
            text: Vec::new(),
            chunk: BytesMut::new(),
            grouping: options.message_grouping,
            shared: context.pulls.shared(name, options),
            context: context.clone(),
        })
    }

    /// The messages of a batch; all of them or, for a change that no message can carry, none.
    fn messages(&mut self, changes: &[Change]) -> Result<Vec<Message>> {
        let mut messages = Vec::with_capacity(changes.len());
        for change in changes {
            self.text.clear();
            if !self.encoder.encode(change, &mut self.text)? {
                continue;
            }
            let shaped = change.shaped.as_ref();
            let body = match shaped.is_some_and(|shaped| shaped.payload.is_some()) {
                true => as_json(&self.text)?,
                false => self.body(),
            };
            messages.push(Message {
                place: Place { offset: change.offset, part: shaped.map_or(0, |s| s.part) },
                keys: self.grouping.then(|| change.keys()),
                body,
                kept: false,
            });
        }
        Ok(messages)
    }

    /// The message in `text`, in memory that it shares with its neighbours.
    fn body(&mut self) -> Bytes {
        if self.chunk.capacity() < self.text.len() {
            self.chunk = BytesMut::with_capacity(CHUNK_BYTES.max(self.text.len()));
        }
        self.chunk.extend_from_slice(&self.text);
        self.chunk.split().freeze()
    }
}

fn check(name: &str, options: &config::HttpPull) -> Result<()> {
    let too_small = [
        ("max_deliver", options.max_deliver == Some(0), 1),
        ("ack_wait_ms", options.ack_wait_ms < 500, 500),
        ("max_ack_pending", options.max_ack_pending == 0, 1),
        ("pending_bytes_max", options.pending_bytes_max == 0, 1),
        ("max_waiting", options.max_waiting == 0, 1),
    ];
    match too_small.into_iter().find(|(_, wrong, _)| *wrong) {
        None => Ok(()),
        Some((key, _, min)) => {
            Err(Error::config(format!("`sink.{name}.{key}` must be at least {min}")))
        }
    }
}

/// A body that the sink's rules made is JSON already, or a text.
fn as_json(body: &[u8]) -> Result<Bytes> {
    if serde_json::from_slice::<&serde_json::value::RawValue>(body).is_ok() {
        return Ok(Bytes::copy_from_slice(body));
    }
    let text = std::str::from_utf8(body)
        .class(Class::Data, || "the message's body is neither JSON nor UTF-8 text")?;
    let text = serde_json::to_vec(text).class(Class::Bug, || "a text is no JSON")?;
    Ok(text.into())
}

#[async_trait]
impl Sink for HttpPull {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            transactional_progress: true,
            answers_later: true,
            carries: Carries::Text,
            ..Capabilities::default()
        }
    }

    async fn open(&mut self) -> Result<Option<Progress>> {
        self.shared.open(&self.path).await
    }

    async fn write(&mut self, batch: &Batch, progress: &Progress) -> Result<Written> {
        let messages = self.messages(&batch.changes)?;
        let count = messages.len();
        let offsets: Vec<u64> = batch.changes.iter().map(|change| change.offset).collect();
        let low = self.shared.write(&offsets, messages, progress).await?;
        failpoint::reach("pull::after_write");
        self.shared.arrived.notify_waiters();
        self.context.count_filtered((batch.changes.len() - count) as u64);
        Ok(if low >= progress.cursor { Written::All } else { Written::Until(low) })
    }

    async fn peek(&mut self) -> Result<Option<Progress>> {
        match self.shared.progress() {
            Some(progress) => Ok(progress),
            None => Store::peek(&self.path).await,
        }
    }

    async fn beyond(&mut self, progress: &Progress) -> Result<Beyond> {
        self.shared.beyond(progress).await
    }

    async fn told(&mut self) {
        self.shared.told().await;
    }

    async fn verdicts(&mut self, hold: bool) -> Result<Vec<(u64, Verdict)>> {
        Ok(self.shared.verdicts(hold))
    }

    async fn settle(&mut self, told: &[(u64, Verdict)]) -> Result<()> {
        self.shared.settle(told).await
    }

    async fn close(&mut self) -> Result<()> {
        self.shared.save().await.map(drop)
    }
}
