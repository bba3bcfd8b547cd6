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

mod feed;
mod ranges;
mod store;
mod stream;
mod verdicts;

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use async_trait::async_trait;
use bytes::Bytes;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

pub use self::stream::{Pulled, Stream};
use self::{
    feed::{Message, Place},
    store::Store,
    stream::Shared,
};
use super::{Beyond, Capabilities, Context, Progress, Sink, Verdict, With, Written};
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

/// The `http_pull` sink.
pub(super) struct HttpPull {
    name: String,
    path: PathBuf,
    encoder: Encoder,
    grouping: bool,
    shared: Arc<Shared>,
    context: Context,
}

impl HttpPull {
    pub(super) fn new(options: &config::HttpPull, with: With) -> Result<Self> {
        let With { name, format, context } = with;
        check(name, options)?;
        let format = if format == Format::Native { options.message } else { format };
        let encoder = Encoder::new(format, &context.names);
        if encoder.content_type() != "application/json" {
            return Err(Error::config(format!(
                "sink {name} answers in JSON, which its format is not"
            ))
            .remedy(format!("remove `format` from sink.{name}")));
        }
        Ok(Self {
            name: name.to_owned(),
            path: context.data_dir.join("pull").join(format!("{name}.sqlite")),
            encoder,
            grouping: options.message_grouping,
            shared: context.pulls.shared(name, options),
            context: context.clone(),
        })
    }

    /// The messages of a batch; all of them or, for a change that no message can carry, none.
    fn messages(&mut self, changes: &[Change], epoch: u64) -> Result<Vec<Message>> {
        let mut messages = Vec::with_capacity(changes.len());
        for change in changes {
            let mut body = Vec::new();
            if !self.encoder.encode(change, &mut body)? {
                continue;
            }
            let shaped = change.shaped.as_ref();
            if shaped.is_some_and(|shaped| shaped.payload.is_some()) {
                body = as_json(body)?;
            }
            let place = Place { offset: change.offset, part: shaped.map_or(0, |s| s.part) };
            messages.push(Message {
                place,
                ack_id: ack_id(&self.name, epoch, place),
                keys: self.grouping.then(|| change.keys()),
                body: Bytes::from(body),
                kept: false,
            });
        }
        Ok(messages)
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
fn as_json(body: Vec<u8>) -> Result<Vec<u8>> {
    if serde_json::from_slice::<&serde_json::value::RawValue>(&body).is_ok() {
        return Ok(body);
    }
    let text = std::str::from_utf8(&body)
        .class(Class::Data, || "the message's body is neither JSON nor UTF-8 text")?;
    serde_json::to_vec(text).class(Class::Bug, || "a text is no JSON")
}

/// The same on every delivery of the same change in the same epoch.
fn ack_id(sink: &str, epoch: u64, place: Place) -> Uuid {
    let mut name = format!("walrace:ack:{sink}:{epoch}:{}", place.offset);
    if place.part > 0 {
        name.push_str(&format!(":{}", place.part));
    }
    Uuid::new_v5(&Uuid::NAMESPACE_OID, name.as_bytes())
}

#[async_trait]
impl Sink for HttpPull {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            transactional_progress: true,
            answers_later: true,
            ..Capabilities::default()
        }
    }

    async fn open(&mut self) -> Result<Option<Progress>> {
        let mut state = self.shared.state.lock().await;
        let open = match &mut *state {
            Some(open) => {
                open.save().await?;
                open
            }
            None => state.insert(self.shared.begin(Store::open(&self.path).await?)),
        };
        open.reload().await?;
        let progress = open.progress();
        drop(state);
        self.shared.arrived.notify_waiters();
        Ok(progress)
    }

    async fn write(&mut self, batch: &Batch, progress: &Progress) -> Result<Written> {
        let messages = self.messages(&batch.changes, progress.epoch)?;
        let count = messages.len();
        let mut state = self.shared.with_room(count > 0).await?;
        let Some(open) = state.as_mut() else {
            return Err(Error::retry(format!("sink {} is not open", self.name)));
        };
        let offsets: Vec<u64> = batch.changes.iter().map(|change| change.offset).collect();
        let low = open.write(&offsets, messages, progress).await?;
        drop(state);
        failpoint::reach("pull::after_write");
        self.shared.arrived.notify_waiters();
        self.context.count_filtered((batch.changes.len() - count) as u64);
        Ok(if low >= progress.cursor { Written::All } else { Written::Until(low) })
    }

    async fn peek(&mut self) -> Result<Option<Progress>> {
        match &*self.shared.state.lock().await {
            Some(open) => Ok(open.progress()),
            None => Store::peek(&self.path).await,
        }
    }

    async fn beyond(&mut self, progress: &Progress) -> Result<Beyond> {
        match self.shared.state.lock().await.as_mut() {
            Some(open) => open.beyond(progress).await,
            None => Ok(Beyond::default()),
        }
    }

    async fn told(&mut self) {
        self.shared.told().await;
    }

    async fn verdicts(&mut self, hold: bool) -> Result<Vec<(u64, Verdict)>> {
        Ok(self.shared.verdicts(hold).await)
    }

    async fn settle(&mut self, told: &[(u64, Verdict)]) -> Result<()> {
        if let Some(open) = self.shared.state.lock().await.as_mut() {
            open.settle(told).await?;
        }
        self.shared.arrived.notify_waiters();
        Ok(())
    }

    async fn close(&mut self) -> Result<()> {
        match self.shared.state.lock().await.as_mut() {
            Some(open) => open.save().await,
            None => Ok(()),
        }
    }
}
