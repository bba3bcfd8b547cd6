//! The journal: a durable, append-only store of every committed change of one source.

use std::{path::PathBuf, sync::Arc};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    change::{Batch, Position, Timestamp},
    disk::Disk,
    error::Result,
};

/// Where a journal lives and how it writes.
#[derive(Clone, Debug)]
pub struct Options {
    /// Its directory; created where it does not exist.
    pub directory: PathBuf,
    /// The file layer.
    pub disk: Arc<dyn Disk>,
    /// A segment is closed at this size.
    pub segment_bytes_max: u64,
    /// Recent batches kept in memory.
    pub ring_bytes_max: usize,
    /// This much of the volume stays free.
    pub reserve_bytes: u64,
}

/// The database that a journal was filled from: it is compared on every connect.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// PostgreSQL's system identifier, as text.
    pub system: String,
    /// The database's name.
    pub database: String,
    /// The replication slot.
    pub slot: String,
}

/// Why the journal may lack a range of the source's history.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap {
    /// The last position that the journal has for certain.
    pub from: Position,
    /// Where it goes on.
    pub to: Position,
    /// What happened, for people.
    pub reason: String,
}

/// What may be removed.
#[derive(Clone, Copy, Debug)]
pub struct Retention {
    /// No change at or above this offset is removed.
    pub keep_from: u64,
    /// Changes appended before this may go.
    pub appended_before: Timestamp,
    /// Beyond this many bytes the oldest changes may go although they are young. 0: no limit.
    pub bytes_max: u64,
}

/// What a journal holds.
#[derive(Clone, Debug, Serialize)]
pub struct Info {
    /// The source's history as a whole.
    pub lineage: Uuid,
    /// Which journal of the lineage it is, from 1.
    pub incarnation: u32,
    /// The oldest offset that can be read.
    pub start: u64,
    /// The offset after the last durable commit.
    pub end: u64,
    /// Where the source is, durably.
    pub progress: Option<Position>,
    /// The database that it was filled from.
    pub origin: Option<Origin>,
    /// Segments on disk.
    pub segments: usize,
    /// Bytes on disk.
    pub bytes: u64,
    /// Every gap that was recorded and is still within the journal.
    pub gaps: Vec<Gap>,
}

/// One source's journal. Cheap to clone; all clones are the same journal.
#[derive(Clone, Debug)]
pub struct Journal {}

impl Journal {
    /// Opens or creates, recovering first. Blocks. Fails with `Config` where another process has it
    /// open, with `Damaged` where it was changed behind our back.
    pub fn open(_options: Options) -> Result<Self> {
        todo!()
    }

    /// Gives the changes their offsets and makes them durable: `Ok` means that they survive a power
    /// loss. A batch without a position leaves a transaction open; readers see it once it closes.
    /// A full disk is `Retry` and leaves the journal as it was; a failed fsync poisons it.
    pub async fn append(&self, _batch: Batch) -> Result<()> {
        todo!()
    }

    /// Removes the changes of a transaction that was left open, because the source begins it anew.
    pub async fn abandon(&self) -> Result<()> {
        todo!()
    }

    /// Records, durably, that a range of the source's history may be missing.
    pub async fn record_gap(&self, _gap: Gap) -> Result<()> {
        todo!()
    }

    /// Remembers, durably, the database that fills it.
    pub async fn set_origin(&self, _origin: Origin) -> Result<()> {
        todo!()
    }

    /// The database that filled it.
    pub fn origin(&self) -> Option<Origin> {
        todo!()
    }

    /// Where the source is, durably.
    pub fn progress(&self) -> Option<Position> {
        todo!()
    }

    /// The source's history as a whole.
    pub fn lineage(&self) -> Uuid {
        todo!()
    }

    /// The oldest offset that can be read.
    pub fn start(&self) -> u64 {
        todo!()
    }

    /// The offset after the last durable commit.
    pub fn end(&self) -> u64 {
        todo!()
    }

    /// A reader whose first change is the one at `from`. An offset below `start` is refused with the
    /// oldest that is left, one above `end` is `Damaged`.
    pub fn reader(&self, _from: u64) -> Result<Reader> {
        todo!()
    }

    /// The first offset that a replay from `time` has to look at: no change below it was committed
    /// at or after `time`.
    pub fn offset_at(&self, _time: Timestamp) -> Result<u64> {
        todo!()
    }

    /// Removes whole segments, the oldest first, and returns the bytes that were freed.
    pub async fn trim(&self, _retention: Retention) -> Result<u64> {
        todo!()
    }

    /// What it holds.
    pub fn info(&self) -> Info {
        todo!()
    }
}

/// Reads the durable changes of a [`Journal`] in order, from memory or disk.
#[derive(Debug)]
pub struct Reader {}

/// How much a [`Reader`] takes at once.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Changes at most.
    pub changes_max: usize,
    /// Bytes of rows at most, or one change.
    pub bytes_max: usize,
}

impl Reader {
    /// Waits until there is at least one durable change, and returns as many as there are, up to the
    /// limits. Cancel-safe.
    pub async fn next(&mut self, _limits: Limits) -> Result<Batch> {
        todo!()
    }

    /// As `next`, but an empty batch at the end instead of waiting.
    pub async fn try_next(&mut self, _limits: Limits) -> Result<Batch> {
        todo!()
    }

    /// The offset of the change that comes next.
    pub fn offset(&self) -> u64 {
        todo!()
    }
}
