//! Where changes come from: one trait, one `match` that opens it.

use std::{fmt, path::PathBuf, sync::Arc};

use async_trait::async_trait;

use crate::{
    change::{Batch, Lsn, Origin, Position, Recent},
    config,
    disk::Disk,
    error::Result,
};

pub mod postgres;

/// A database that is captured.
///
/// `next` and `confirm` are called from one task, in turn. A source that has failed is dropped and
/// opened anew from the journal's progress; it never repairs itself behind the journal's back.
#[async_trait]
pub trait Source: Send {
    /// Waits for the next run of changes, in commit order, and takes all that has arrived up to the
    /// source's own limits of bytes and time. Cancel-safe: a dropped call loses nothing.
    ///
    /// An idle source returns an empty batch with a position now and then, so that it can be
    /// confirmed and a quiet database does not retain its log.
    async fn next(&mut self) -> Result<Batch>;

    /// Says that all below `position` is durable with us: the source may forget it. Never called
    /// with a position that the journal has not recorded.
    async fn confirm(&mut self, position: Position) -> Result<()>;
}

/// What the journal knows of the source: it is compared with the server on every connect.
#[derive(Clone, Debug, Default)]
pub struct Known {
    /// Where the source is, durably.
    pub progress: Option<Position>,
    /// The database that filled the journal.
    pub origin: Option<Origin>,
    /// Whether the journal holds, or ever held, a change.
    pub has_changes: bool,
    /// Its last transactions.
    pub past: Past,
}

/// Looks up the journal's last transactions, from an LSN on, once it is known from where they are
/// wanted. Without it nothing is compared.
#[derive(Clone, Default)]
pub struct Past(Option<Arc<Lookup>>);

type Lookup = dyn Fn(Lsn) -> Result<Recent> + Send + Sync;

impl Past {
    /// Asks `lookup`, which may block.
    pub fn new(lookup: impl Fn(Lsn) -> Result<Recent> + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(lookup)))
    }

    /// The transactions that committed at `lsn` or later.
    pub fn since(&self, lsn: Lsn) -> Result<Recent> {
        self.0.as_ref().map_or_else(|| Ok(Recent::default()), |lookup| lookup(lsn))
    }
}

impl fmt::Debug for Past {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Past")
    }
}

/// Where a source keeps transactions that are still open, as far as they are not for memory.
#[derive(Clone, Debug)]
pub struct SpoolOptions {
    /// The directory. It belongs to the source, which removes every file in it when it is opened.
    pub directory: PathBuf,
    /// The file layer.
    pub disk: Arc<dyn Disk>,
    /// This much of the volume stays free.
    pub reserve_bytes: u64,
}

/// A source that has begun to read.
pub struct Opened {
    /// The source itself.
    pub source: Box<dyn Source>,
    /// The database, for the journal to remember.
    pub origin: Origin,
    /// Where it begins: all below it is in the journal already, or was never asked for.
    pub start: Position,
    /// Its counters.
    pub stats: Arc<postgres::Stats>,
}

/// Opens the source `name` where the journal ends.
pub async fn open(
    name: &str,
    config: &config::Source,
    known: Known,
    spool: SpoolOptions,
) -> Result<Opened> {
    match config {
        config::Source::Postgres(postgres) => postgres::open(name, postgres, known, spool).await,
    }
}
