//! Where changes go: one trait, one file for each kind of target, one `match` that opens them.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use uuid::Uuid;

use crate::{
    change::Batch,
    config::{self, SinkKind},
    disk::Disk,
    error::{Error, Result},
    format::Names,
};

pub use queue::{Delivery, Queues, Subscription};
pub use stats::{SinkStats, Totals};

mod custom;
mod file;
mod http;
mod queue;
mod signature;
mod stats;
mod stdout;
#[cfg(test)]
mod testing;
mod webhook;

/// What a sink needs from its surroundings.
#[derive(Clone, Debug)]
pub struct Context {
    /// The file layer of the `file` sink.
    pub disk: Arc<dyn Disk>,
    /// The names that a message may carry.
    pub names: Names,
    /// The history that the source's offsets count in.
    pub lineage: Uuid,
    /// The queues of the program that embeds Walrace.
    pub queues: Queues,
    /// Changes for which the sink's format has no message.
    pub filtered: Arc<AtomicU64>,
}

impl Context {
    fn count_filtered(&self, changes: u64) {
        self.filtered.fetch_add(changes, Ordering::Relaxed);
    }
}

/// Makes the sink that the configuration describes; it connects in [`Sink::open`].
pub fn open(name: &str, sink: &config::Sink, context: &Context) -> Result<Box<dyn Sink>> {
    let format = sink.format;
    Ok(match &sink.kind {
        SinkKind::Stdout(options) => Box::new(stdout::Stdout::new(options, format, context)),
        SinkKind::File(options) => Box::new(file::File::new(options, format, context)),
        SinkKind::Webhook(options) => Box::new(webhook::Webhook::new(options, format, context)?),
        SinkKind::Queue(options) => Box::new(queue::Queue::new(name, options, context)?),
        SinkKind::Custom(options) => Box::new(custom::Custom::new(options, format, context)?),
    })
}

/// What a sink has, durably. It grows, except by a named rewind, which begins a new epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// The history of the source that the cursor counts in.
    pub lineage: Uuid,
    /// Begun anew by a rewind or when the sink is created again; owned by the catalog.
    pub epoch: u64,
    /// Every change below this offset is delivered, filtered or parked.
    pub cursor: u64,
    /// The last retry of a parked change that was sent.
    pub retry_seq: u64,
}

/// What happened to one change of a batch.
#[derive(Debug)]
pub enum Outcome {
    /// It is durable at the target.
    Durable,
    /// The target refuses this very change, and would again: an error of class `Data`.
    Refused(Error),
    /// It was not tried, or nobody can say: deliver it again.
    Unknown,
}

/// What a write achieved.
#[derive(Debug)]
pub enum Written {
    /// Every change is durable, and the target holds the progress if it keeps one.
    All,
    /// One outcome for each change of the batch, in order.
    Each(Vec<Outcome>),
}

/// What a sink declares about itself; the conformance suite reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// The target keeps [`Progress`] together with the data, so nothing is delivered twice.
    pub transactional_progress: bool,
    /// Several lanes may write at the same time.
    pub lanes: bool,
    /// The target keeps the last state of a key rather than every event.
    pub state_target: bool,
}

/// A destination. Called from one task; each call may be cancelled at a stop.
///
/// A write that fails as a whole returns an error whose class decides: `Retry` is an outage (the
/// loop waits and writes the same batch again, no attempt is counted), `Config` stops this sink
/// until a person mends it, `Data` is a refusal of the batch (it is split until the bad change
/// stands alone), `Damaged` stops it.
#[async_trait]
pub trait Sink: Send {
    /// What it guarantees and allows.
    fn capabilities(&self) -> Capabilities;

    /// When it wants the next batch: a target asked for time, or each write costs the machine more
    /// than its bytes do. The loop waits, and hears a stop meanwhile; `None` is now.
    fn not_before(&self) -> Option<Instant> {
        None
    }

    /// Connects, undoes what an unfinished write left behind, and returns the target's own progress
    /// where it keeps one and has one. Called again after each error of class `Retry`.
    async fn open(&mut self) -> Result<Option<Progress>>;

    /// Delivers the changes in their order; once they are durable the target, where it keeps
    /// progress, holds `progress`, in the same atomic step. The batch may be empty, when only
    /// filtered changes were passed.
    async fn write(&mut self, batch: &Batch, progress: &Progress) -> Result<Written>;

    /// The progress that the target keeps, read without changing anything, for when nobody runs. Of
    /// every sink whose progress is transactional.
    async fn peek(&mut self) -> Result<Option<Progress>> {
        Ok(None)
    }

    /// Flushes and lets go. Nothing is lost when it is never called.
    async fn close(&mut self) -> Result<()>;
}

impl fmt::Debug for dyn Sink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sink")
    }
}
