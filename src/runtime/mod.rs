//! The parts of a running Walrace: what starts them, keeps them apart and tries again.
//!
//! Each source has a task that runs `pipeline::capture`, each sink one that runs
//! `pipeline::deliver`. A part that fails harms no other: it waits or stops on its own
//! (see `part`), and the journal between them holds what is not delivered.

mod backfilling;
mod capturing;
mod control;
mod delivering;
mod history;
mod part;
mod retention;
mod status;
mod workers;

use std::{collections::BTreeMap, path::PathBuf, sync::Arc, time::Duration};

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use self::{
    backfilling::Backfilling, capturing::Capturing, delivering::Delivering, history::History,
    workers::Workers,
};
pub use self::{
    backfilling::status_of as backfill_status,
    capturing::{known, known_to},
    delivering::{Moved, To},
    part::{Backoff, Next, Part, State},
    status::{BackfillStatus, SinkStatus, SourceStatus, Status},
};
use crate::{
    catalog::Catalog,
    change::Timestamp,
    config::{self, Config, SinkKind},
    disk::RealDisk,
    error::{Class, Classify, Error, Result, ResultExt},
    format::Names,
    journal::{self, Journal, Token},
    parking::Parking,
    pipeline::Terms,
    sink,
    source::SpoolOptions,
    transform::{Filter, Transform},
};

/// How long a stop waits for writes in flight.
const GRACE: Duration = Duration::from_secs(10);

/// Rows that all sinks together hold in memory, at most; each sink has a fair part of it.
const DELIVERY_BYTES_MAX: usize = 48 << 20;

/// The smallest part of it that a sink gets.
const DELIVERY_BYTES_MIN: usize = 256 << 10;

/// A running Walrace: sources, journals, sinks and what joins them.
#[derive(Debug)]
pub struct Walrace {
    started_at: Timestamp,
    catalog: Catalog,
    parking: Parking,
    sources: BTreeMap<String, Arc<Capturing>>,
    sinks: BTreeMap<String, Arc<Delivering>>,
    backfills: BTreeMap<String, Arc<Backfilling>>,
    queues: sink::Queues,
    pulls: sink::Pulls,
    config: Config,
    stop: CancellationToken,
    tasks: tokio::sync::Mutex<JoinSet<()>>,
    workers: Workers,
}

impl Walrace {
    /// Opens data_dir, with recovery, and starts every source and sink. Returns once the tasks run;
    /// what they meet later shows in `status`.
    pub async fn start(config: Config) -> Result<Arc<Self>> {
        config.create_directories()?;
        let catalog = Catalog::open(&config.data_dir).await?;
        let parking = Parking::open(&config.dead_letters()).await?;
        let stop = CancellationToken::new();
        let queues = sink::Queues::default();
        let pulls = sink::Pulls::until(stop.clone());
        let mut sources = BTreeMap::new();
        for (name, source) in &config.source {
            let journal = open_journal(&config, name).await?;
            let capturing = Capturing::new(name, source.clone(), journal, &config);
            sources.insert(name.clone(), Arc::new(capturing));
        }
        let mut sinks = BTreeMap::new();
        for name in config.sink.keys() {
            let shared = (&queues, &pulls);
            let sink = delivering(&config, name, &sources, (&catalog, &parking, shared))?;
            sink.register().await.context(|| format!("while placing sink {name}"))?;
            sinks.insert(name.clone(), Arc::new(sink));
        }
        let backfills = sources.iter().map(|(name, capturing)| {
            let backfilling = Backfilling::new(
                Arc::clone(capturing),
                catalog.clone(),
                config.data_dir.join("spool"),
            );
            (name.clone(), Arc::new(backfilling))
        });
        let walrace = Arc::new(Self {
            backfills: backfills.collect(),
            started_at: Timestamp::now(),
            catalog,
            parking,
            sources,
            sinks,
            queues,
            pulls,
            config: config.clone(),
            stop,
            tasks: tokio::sync::Mutex::default(),
            workers: Workers::start()?,
        });
        walrace.spawn(&config).await;
        Ok(walrace)
    }

    async fn spawn(self: &Arc<Self>, config: &Config) {
        let mut tasks = self.tasks.lock().await;
        for source in self.sources.values() {
            tasks.spawn(Arc::clone(source).run(self.stop.clone()));
            tasks.spawn(Arc::clone(source).watch(self.stop.clone()));
            let terms = self.sinks.values().filter(|sink| sink.source() == source.name());
            let terms = terms.map(|sink| sink.terms().clone()).collect();
            let history = History::new(source.config(), &source.journal, &self.catalog, terms);
            tasks.spawn(history.keep(self.stop.clone()));
        }
        for backfills in self.backfills.values() {
            let walrace = Arc::downgrade(self);
            tasks.spawn(Arc::clone(backfills).run(walrace, self.stop.clone()));
        }
        for sink in self.sinks.values() {
            tasks.spawn_on(Arc::clone(sink).run(self.stop.clone()), self.workers.handle());
        }
        let (walrace, limits) = (Arc::clone(self), config.journal.clone());
        tasks.spawn(async move { retention::keep(&walrace, &limits).await });
    }

    /// The consumer's end of the `queue` sink `name`; there is one for each queue.
    pub fn subscribe(&self, name: &str) -> Result<sink::Subscription> {
        self.queues.subscribe(name)
    }

    /// The token that resumes right after `delivery`, for a consumer that keeps its own place.
    pub fn token(&self, delivery: &sink::Delivery) -> Result<Token> {
        let mut journals = self.sources.values().map(|source| &source.journal);
        let journal = journals.find(|journal| journal.lineage() == delivery.lineage);
        let last = delivery.changes.last();
        let (journal, last) = journal.zip(last).ok_or_else(|| {
            Error::config(format!("no source has the history {}", delivery.lineage))
        })?;
        Ok(journal.token_after(last))
    }

    /// The journal of a source.
    pub fn journal(&self, source: &str) -> Result<&Journal> {
        Ok(&source_of(&self.sources, source)?.journal)
    }

    /// What the sink `name` wants to see, and what it makes of it.
    pub fn rules_of(&self, name: &str) -> Result<(Filter, Transform)> {
        let sink = self.sink(name)?;
        Ok((sink.filter(), sink.transform()?))
    }

    fn sink(&self, name: &str) -> Result<&Arc<Delivering>> {
        self.sinks.get(name).ok_or_else(|| Error::config(format!("there is no sink {name}")))
    }

    /// The consumers' end of the `http_pull` sink `name`; `None` where there is no such sink.
    pub fn stream(&self, name: &str) -> Option<sink::Stream> {
        match &self.config.sink.get(name)?.kind {
            SinkKind::HttpPull(options) => Some(self.pulls.stream(name, options)),
            _ => None,
        }
    }

    /// What it was started with.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// What the sink `name` is doing.
    pub fn state_of(&self, name: &str) -> Option<State> {
        Some(self.sinks.get(name)?.state())
    }

    /// What every part is doing.
    pub fn status(&self) -> Status {
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            started_at: self.started_at,
            sources: self.sources.values().map(|source| source.status()).collect(),
            sinks: self.sinks.values().map(|sink| sink.status()).collect(),
            backfills: Vec::new(),
        }
    }

    /// The token that stops it; cancelled by `stop`.
    pub fn stopping(&self) -> &CancellationToken {
        &self.stop
    }

    /// Stops every part: writes in flight end, progress is recorded, nothing is lost. What takes
    /// longer than the grace time is dropped and delivered again after the next start.
    pub async fn stop(&self) {
        self.stop.cancel();
        let mut tasks = self.tasks.lock().await;
        let ended = async { while tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(GRACE, ended).await.is_err() {
            warn!(
                "a part did not stop within {} s; its last batch will come again",
                GRACE.as_secs()
            );
            tasks.shutdown().await;
        }
        for sink in self.sinks.values() {
            sink.close().await;
        }
        self.parking.close().await;
        self.catalog.close().await;
    }
}

fn delivering(
    config: &Config,
    name: &str,
    sources: &BTreeMap<String, Arc<Capturing>>,
    (catalog, parking, (queues, pulls)): (&Catalog, &Parking, (&sink::Queues, &sink::Pulls)),
) -> Result<Delivering> {
    let sink = config.sink.get(name).ok_or_else(|| Error::bug("a sink without a table"))?;
    let fair = (DELIVERY_BYTES_MAX / config.sink.len().max(1)).max(DELIVERY_BYTES_MIN);
    let mut sink = sink.clone();
    sink.batch_bytes_max = sink.batch_bytes_max.min(fair);
    Transform::new(name, &sink)?; // a rule that cannot be read is told before anything starts
    let source = config.source_of(&sink).to_owned();
    let capturing = source_of(sources, &source)?;
    let names = capturing.names(name);
    let mut context = sink::Context::new(&config.data_dir, names, capturing.journal.lineage());
    context.queues = queues.clone();
    context.pulls = pulls.clone();
    let stores = (catalog.clone(), parking.clone(), context);
    Ok(Delivering::new((name, &source), sink, capturing, stores))
}

/// The names that the messages of `sink` may carry, which reads `source`.
pub fn names_of(config: &Config, source: &str, sink: &str) -> Names {
    config.source.get(source).map_or_else(Names::default, |s| capturing::names(source, s, sink))
}

/// What the sink `name` and its source say about schemas.
pub fn terms_of(config: &Config, name: &str, sink: &config::Sink) -> Terms {
    let source = config.source_of(sink);
    let found = config.source.get(source);
    found.map_or_else(Terms::default, |found| capturing::terms(source, found, (name, sink)))
}

/// Where the journal of `source` lives.
pub fn journal_options(config: &Config, source: &str) -> journal::Options {
    journal::Options {
        directory: journal_directory(config, source),
        disk: RealDisk::shared(),
        segment_bytes_max: config.journal.segment_bytes_max,
        ring_bytes_max: config.journal.ring_bytes_max,
        reserve_bytes: config.journal.reserve_bytes,
    }
}

/// The directory of `source`'s journal.
pub fn journal_directory(config: &Config, source: &str) -> PathBuf {
    config.data_dir.join("journal").join(source)
}

/// Where the source `name` keeps transactions that are still open.
fn spool_options(config: &Config, name: &str) -> SpoolOptions {
    SpoolOptions {
        directory: config.data_dir.join("spool").join(name),
        disk: RealDisk::shared(),
        reserve_bytes: config.journal.reserve_bytes,
    }
}

async fn open_journal(config: &Config, source: &str) -> Result<Journal> {
    let options = journal_options(config, source);
    tokio::task::spawn_blocking(move || Journal::open(options))
        .await
        .class(Class::Bug, || "the recovery of a journal panicked")?
        .context(|| format!("while opening the journal of source {source}"))
}

fn source_of<'a>(
    sources: &'a BTreeMap<String, Arc<Capturing>>,
    name: &str,
) -> Result<&'a Arc<Capturing>> {
    sources.get(name).ok_or_else(|| Error::config(format!("there is no source {name}")))
}
