//! Backfill: the rows that a table has already, read as changes of the operation `read`.
//!
//! ```text
//!  plan() ─► parts (ranges of blocks) ─► Worker ─► chunk ─┐
//!                                                         ▼ offer
//!  stream ─► capture() ──────────────────────────────► Fences ─► journal
//! ```
//!
//! A table is read in the order in which its rows lie, not in that of its key: any key will do, a
//! range of blocks costs what it is long, and ranges are read side by side. A row that an update
//! moves to another block is in the stream by that update.

mod chunk;
mod copies;
mod fence;
mod mark;
mod place;
mod plan;
mod snapshot;
mod spool;
mod table;
mod worker;

use std::{path::PathBuf, sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

pub use self::{
    fence::Fences,
    mark::Mark,
    place::Place,
    plan::{Plan, PlannedTable, plan, rehearse},
    worker::{Ended, Progress, Worker},
};
use super::settings::Settings;
use crate::{config, error::Result};

/// A range of blocks of one table that is read from its beginning to its end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// The backfill.
    pub backfill: u64,
    /// Its number within the backfill, from 1.
    pub number: u32,
    /// The table under whose name the rows are published, as `schema.name`.
    pub table: String,
    /// Its oid.
    pub published: u32,
    /// The oid of the table in which the rows lie: itself, or a partition of it.
    pub leaf: u32,
    /// The file in which they lie: another one means that the table was rewritten.
    pub filenode: u32,
    /// The first block.
    pub from: u32,
    /// The block after the last.
    pub until: u32,
    /// Up to where it is in the journal.
    pub next: Place,
    /// Rows that were read.
    pub rows: u64,
    /// Bytes of those rows.
    pub bytes: u64,
    /// Nothing of it is left.
    pub done: bool,
    /// It is read in one transaction: the table has no key, or lacks part of its changes.
    #[serde(default)]
    pub whole: bool,
    /// No mark of its later chunks lies below this offset of the journal.
    pub offset: u64,
}

impl Part {
    /// Blocks, and how many of them are done.
    pub fn blocks(&self) -> (u32, u32) {
        let all = self.until.saturating_sub(self.from);
        let done = if self.done { all } else { self.next.block.saturating_sub(self.from) };
        (all, done.min(all))
    }

    /// Takes in what a mark of the journal says.
    pub fn follow(&mut self, mark: &Mark, offset: u64) {
        let Some(closes) = &mark.closes else { return };
        let ours = (mark.backfill, mark.part) == (self.backfill, self.number);
        if ours && (closes.to > self.next || closes.done && !self.done) {
            (self.next, self.done) = (closes.to, closes.done);
            self.rows += closes.rows;
            self.bytes += closes.bytes;
            self.offset = offset;
        }
    }
}

/// How parts are read.
#[derive(Clone, Debug)]
pub struct Reading {
    /// Bytes of rows that a chunk should have.
    pub chunk_bytes: usize,
    /// How long a chunk should take.
    pub chunk_time: Duration,
    /// The only sink that wants the rows; 0: every one.
    pub audience: u32,
    /// An SQL condition that rows must fulfil.
    pub filter: Option<String>,
    /// The columns that are read; the others are null. `None`: all.
    pub columns: Option<Vec<String>>,
    /// Where the rows wait of a table that can only be read as a whole.
    pub spool: PathBuf,
}

/// Connects a reader of backfills of the source `name`. Blocks.
pub fn connect(
    (name, config): (&str, &config::Postgres),
    fences: &Arc<Fences>,
    reading: Reading,
    stop: &CancellationToken,
) -> Result<Worker> {
    let settings = Settings::new(name, config)?;
    Worker::connect(&settings, Arc::clone(fences), reading, stop.clone())
}
