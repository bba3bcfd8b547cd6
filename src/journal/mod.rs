//! The journal: a durable, append-only store of every committed change of one source.
//!
//! ```text
//!   append ──► writer (own thread) ──► active segment ──► fdatasync ─┬─► ring ──► readers that
//!                                           │ full                   │            are caught up
//!                                           ▼                        └─► end
//!   trim ◄── oldest  segment ─ segment ─ segment ──────────────────────► readers that are behind
//! ```
//!
//! A segment is a file of blocks, a block is a compressed run of records; `docs/journal-format.md`
//! has every byte. Readers see what is durable and committed, and nothing else. Opening recovers
//! first; reading never repairs.

mod active;
mod block;
mod cut;
mod described;
mod identity;
mod index;
mod past;
mod reader;
mod record;
mod recovery;
mod retention;
mod ring;
mod scan;
mod segment;
mod store;
mod token;
mod verify;
mod writer;

use std::{path::PathBuf, sync::Arc, thread};

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot, watch};
use uuid::Uuid;

use self::{
    identity::Identity,
    store::Store,
    writer::{Command, Reply, Writer},
};
pub use self::{
    reader::Reader,
    token::Token,
    verify::{Dump, Inspection, read_segment},
};
pub use crate::change::{Gap, Origin};
use crate::{
    change::{Batch, Change, Position, Timestamp},
    disk::Disk,
    error::{Class, Classify, Error, Result},
};

/// Commands that wait for the writer at most; then callers wait.
const COMMANDS_MAX: usize = 16;

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
#[derive(Clone, Debug, Serialize, Deserialize)]
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

/// What [`Journal::verify`] found; that it returns at all means that nothing is wrong.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Segments that were read.
    pub segments: usize,
    /// Blocks that were read.
    pub blocks: u64,
    /// Changes that were read.
    pub changes: u64,
    /// Bytes that were read.
    pub bytes: u64,
    /// The oldest offset.
    pub start: u64,
    /// The offset after the last commit.
    pub end: u64,
    /// The hash of the whole chain, in hex. Whoever can rewrite the directory can rewrite the chain
    /// too: an auditor keeps this hash elsewhere and compares.
    pub head: String,
}

/// How far something is behind the end of a journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Lag {
    /// Changes that it has not read.
    pub changes: u64,
    /// Bytes on disk that hold them, rounded up to whole blocks.
    pub bytes: u64,
    /// When the first of them was appended.
    pub appended: Timestamp,
}

/// The part of a lineage that a new incarnation continues.
#[derive(Clone, Copy, Debug)]
pub struct Succession {
    /// The source's history as a whole.
    pub lineage: Uuid,
    /// Higher than that of every journal the lineage had.
    pub incarnation: u32,
    /// Above every offset that was ever issued in the lineage.
    pub first_offset: u64,
}

/// One source's journal. Cheap to clone; all clones are the same journal.
#[derive(Clone, Debug)]
pub struct Journal {
    store: Arc<Store>,
    thread: Arc<Thread>,
}

/// The writer's thread; it ends, and lets the directory go, when the last journal is dropped.
#[derive(Debug)]
struct Thread {
    commands: Option<mpsc::Sender<Command>>,
    handle: Option<thread::JoinHandle<()>>,
}

impl Drop for Thread {
    fn drop(&mut self) {
        self.commands = None;
        if let Some(handle) = self.handle.take() {
            let _ = handle.join();
        }
    }
}

impl Journal {
    /// Opens or creates, recovering first. Blocks. Fails with `Config` where another process has it
    /// open, with `Damaged` where it was changed behind our back.
    pub fn open(options: Options) -> Result<Self> {
        let lineage = Uuid::new_v4();
        Self::open_or_succeed(options, Succession { lineage, incarnation: 1, first_offset: 0 })
    }

    /// As `open`, but a journal that has to be created continues a lineage whose last journal is
    /// lost. One that exists must be of that lineage.
    pub fn open_as(options: Options, succession: Succession) -> Result<Self> {
        let (expected, directory) = (succession.lineage, options.directory.clone());
        let journal = Self::open_or_succeed(options, succession)?;
        let lineage = journal.lineage();
        if lineage == expected {
            return Ok(journal);
        }
        let directory = directory.display();
        Err(Error::config(format!("{directory} holds lineage {lineage} instead of {expected}"))
            .remedy("point data_dir at the directory of this source, or move the other away"))
    }

    fn open_or_succeed(options: Options, succession: Succession) -> Result<Self> {
        let (disk, directory) = (&*options.disk, &*options.directory);
        disk.create_dir_all(directory)
            .class(Class::Config, || format!("cannot create {}", directory.display()))?;
        let lock = disk.lock(&directory.join("lock")).map_err(|error| {
            let what = format!("the journal in {} is in use", directory.display());
            Error::config(what).caused_by(error).remedy("stop the other walrace first")
        })?;
        let identity = match Identity::load(disk, directory)? {
            Some(identity) => identity,
            None => recovery::create(disk, directory, succession)?,
        };
        let recovered = recovery::recover(disk, directory, &identity)?;
        let store = Arc::new(Store::new(options, identity, &recovered, Some(lock))?);
        let writer = Writer::new(Arc::clone(&store), &recovered)?;
        let (commands, mut receiver) = mpsc::channel(COMMANDS_MAX);
        let handle = thread::Builder::new()
            .name("journal".into())
            .spawn(move || writer.run(&mut receiver))
            .class(Class::Retry, || "cannot start the journal's thread")?;
        let thread = Thread { commands: Some(commands), handle: Some(handle) };
        Ok(Self { store, thread: Arc::new(thread) })
    }

    /// Gives the changes their offsets and makes them durable: `Ok` means that they survive a power
    /// loss. A batch without a position leaves a transaction open; readers see it once it closes.
    /// A full disk is `Retry` and leaves the journal as it was; a failed fsync poisons it.
    pub async fn append(&self, batch: Batch) -> Result<()> {
        self.ask(|reply| Command::Append(batch, reply)).await
    }

    /// Removes the changes of a transaction that was left open, because the source begins it anew.
    pub async fn abandon(&self) -> Result<()> {
        self.ask(Command::Abandon).await
    }

    /// Records, durably, that a range of the source's history may be missing. Afterwards positions
    /// may be lower than before: a server that was put back begins again there.
    pub async fn record_gap(&self, gap: Gap) -> Result<()> {
        self.ask(|reply| Command::Gap(gap, reply)).await
    }

    /// Remembers, durably, the database that fills it.
    pub async fn set_origin(&self, origin: Origin) -> Result<()> {
        self.ask(|reply| Command::Origin(origin, reply)).await
    }

    /// The database that filled it.
    pub fn origin(&self) -> Option<Origin> {
        self.store.view().identity.origin.clone()
    }

    /// Where the source is, durably.
    pub fn progress(&self) -> Option<Position> {
        self.store.view().progress
    }

    /// The source's history as a whole.
    pub fn lineage(&self) -> Uuid {
        self.store.view().identity.lineage
    }

    /// The oldest offset that can be read.
    pub fn start(&self) -> u64 {
        self.store.start()
    }

    /// The offset after the last durable commit.
    pub fn end(&self) -> u64 {
        self.store.end()
    }

    /// Tells when `end` moves.
    pub fn watch_end(&self) -> watch::Receiver<u64> {
        self.store.end.subscribe()
    }

    /// A reader whose first change is the one at `from`. An offset below `start` is refused with
    /// the oldest that is left, one above `end` is `Damaged`.
    pub fn reader(&self, from: u64) -> Result<Reader> {
        let end = self.end();
        if from < self.start() {
            return Err(self.store.gone(from));
        }
        if from > end {
            let directory = self.store.options.directory.display();
            let what = format!("offset {from} lies beyond the end {end} of the journal");
            return Err(Error::damaged(format!("{what} in {directory}")).remedy(
                "the journal was put back or replaced: restore it, or rewind the sink by name",
            ));
        }
        Ok(Reader::new(self.clone(), from))
    }

    /// The offset to resume at: that of the token, or the oldest that is left where it has expired.
    /// A token of another lineage is refused (`Config`), one from beyond the end is `Damaged`.
    pub fn resolve(&self, token: &Token) -> Result<u64> {
        let lineage = self.lineage();
        if token.lineage != lineage {
            return Err(Error::config(format!(
                "the resume token is of lineage {}, this journal is of {lineage}",
                token.lineage
            ))
            .remedy("use it with the source that issued it, or start without a token"));
        }
        let offset = token.offset.max(self.start());
        self.reader(offset).map(|_| offset)
    }

    /// As `resolve`, but where the changes after the token are gone it is refused with the oldest
    /// offset that is left: nothing is passed over unless the caller says so.
    pub fn resume(&self, token: &Token) -> Result<u64> {
        let offset = self.resolve(token)?;
        if offset == token.offset {
            return Ok(offset);
        }
        Err(Error::config(format!(
            "the resume token has expired: it is for offset {}, and the oldest that is left is \
             {offset}",
            token.offset
        ))
        .remedy(format!("resume from {offset}, and backfill what lies before it")))
    }

    /// The token that resumes right after `change`, which must be of this journal.
    pub fn token_after(&self, change: &Change) -> Token {
        let timeline = self.progress().map_or(0, |at| at.timeline);
        Token::new(self.lineage(), change.position(timeline), change.offset + 1)
    }

    /// The token that resumes with whatever comes next.
    pub fn token_at_end(&self) -> Token {
        Token::new(self.lineage(), self.progress().unwrap_or_default(), self.end())
    }

    /// The first offset that a replay from `time` has to look at: no change below it was committed
    /// at or after `time`. Blocks for a look at one segment's block headers.
    pub fn offset_at(&self, time: Timestamp) -> Result<u64> {
        self.store.offset_at(time)
    }

    /// The first offset of the second segment: what could be read after the oldest is removed.
    /// `None` where that must stay, because all that follows it is an open transaction.
    pub fn second_segment_start(&self) -> Option<u64> {
        let view = self.store.view();
        let (oldest, next) = (view.segments.front()?, view.segments.get(1)?);
        (oldest.base < view.commit_base).then_some(next.base)
    }

    /// How far a reader whose next change is the one at `offset` is behind; `None` where it is
    /// caught up. Blocks for a look at a few block headers.
    pub fn lag(&self, offset: u64) -> Result<Option<Lag>> {
        reader::lag(&self.store, offset)
    }

    /// Removes whole segments, the oldest first, and returns the bytes that were freed.
    pub async fn trim(&self, retention: Retention) -> Result<u64> {
        let mut freed = 0;
        // One command for each, so that an append never waits for more than one removal.
        loop {
            match self.ask(|reply| Command::Trim(retention, reply)).await? {
                0 => return Ok(freed),
                bytes => freed += bytes,
            }
        }
    }

    /// `Retry` where nothing may be appended for want of disk.
    pub async fn check_room(&self) -> Result<()> {
        self.ask(Command::CheckRoom).await
    }

    /// Bytes that are free on its volume. Blocks.
    pub fn free_bytes(&self) -> Result<u64> {
        let directory = &self.store.options.directory;
        self.store
            .options
            .disk
            .free_bytes(directory)
            .class(Class::Retry, || format!("cannot look at the disk of {}", directory.display()))
    }

    /// What it holds.
    pub fn info(&self) -> Info {
        self.store.info()
    }

    /// Reads everything up to the last commit and checks every byte. Blocks.
    pub fn verify(&self) -> Result<Report> {
        self.store.verify()
    }

    async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T> {
        let gone = || Error::bug("the journal's thread is gone");
        let (reply, answer) = oneshot::channel();
        let commands = self.thread.commands.as_ref().ok_or_else(gone)?;
        commands.send(command(reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

/// How much a [`Reader`] takes at once.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Changes at most.
    pub changes_max: usize,
    /// Bytes of rows at most, or one change.
    pub bytes_max: usize,
}
