//! One sink at run time: opens its target, delivers, and opens it again.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    capturing::Capturing,
    part::{Backoff, Next, Part},
    status::SinkStatus,
};
use crate::{
    catalog::{self, Catalog, LostRange, Registered},
    change::Timestamp,
    config::{self, From},
    error::{Error, Result},
    journal::{Journal, Lag, Limits},
    pipeline::{self, Cut, Delivery},
    sink::{self, Progress, Sink, SinkStats},
    transform::Filter,
};

/// How often a sink that failed is looked at for its first success.
const RECOVERY_LOOK: Duration = Duration::from_millis(50);

/// One sink and the journal that it reads.
#[derive(Debug)]
pub(super) struct Delivering {
    name: String,
    source: String,
    config: config::Sink,
    context: sink::Context,
    pub(super) journal: Journal,
    catalog: Catalog,
    part: Part,
    stats: Arc<SinkStats>,
    lost_changes: AtomicU64,
    /// Cancelled when the sink was released, so that its loop begins anew behind the lost range.
    restart: std::sync::Mutex<CancellationToken>,
}

impl Delivering {
    pub(super) fn new(
        (name, source): (&str, &str),
        config: config::Sink,
        capturing: &Capturing,
        (catalog, context): (Catalog, sink::Context),
    ) -> Self {
        Self {
            name: name.to_owned(),
            source: source.to_owned(),
            config,
            context,
            journal: capturing.journal.clone(),
            catalog,
            part: Part::new("sink", name),
            stats: Arc::default(),
            lost_changes: AtomicU64::new(0),
            restart: std::sync::Mutex::default(),
        }
    }

    /// Gives a sink that the catalog does not know its first progress, so that retention holds for
    /// it from the start.
    pub(super) async fn register(&self) -> Result<Registered> {
        if let Some(registered) = self.catalog.sink(&self.name).await? {
            self.check_lineage(&registered)?;
            let cursor = registered.progress.cursor;
            self.stats.begin(cursor, cursor);
            let lost = self.catalog.lost_ranges(&self.name).await?;
            self.lost_changes.store(lost.iter().map(|range| range.to - range.from).sum(), Relaxed);
            return Ok(registered);
        }
        let cursor = match &self.config.from {
            From::Start => self.journal.start(),
            From::Now => self.journal.end(),
            From::Offset(offset) => *offset,
            From::Time(time) => self.journal.offset_at(*time)?,
            From::Token(token) => self.journal.resume(&token.parse()?)?,
        };
        let lineage = self.journal.lineage();
        let progress = Progress { lineage, epoch: 1, cursor, retry_seq: 0 };
        self.catalog.register(&self.name, &self.source, &progress).await?;
        self.stats.begin(cursor, cursor);
        Ok(Registered { source: self.source.clone(), progress, started: false })
    }

    fn check_lineage(&self, registered: &Registered) -> Result<()> {
        let lineage = self.journal.lineage();
        if registered.progress.lineage == lineage {
            return Ok(());
        }
        Err(Error::config(format!(
            "sink {} has read the history {} of source {}, and the journal holds {lineage}",
            self.name, registered.progress.lineage, registered.source
        ))
        .remedy("put the journal back, or give the sink a new name so that it starts over"))
    }

    /// Delivers until `stop`, or until a person must act.
    pub(super) async fn run(self: Arc<Self>, stop: CancellationToken) {
        let (min, max) = (self.config.retry_ms_min, self.config.retry_ms_max);
        let mut backoff = Backoff::new(Duration::from_millis(min), Duration::from_millis(max));
        loop {
            let before = self.stats.cursor();
            let restart = stop.child_token();
            *self.restart.lock().unwrap_or_else(std::sync::PoisonError::into_inner) =
                restart.clone();
            let outcome = self.attempt(&restart).await;
            if stop.is_cancelled() {
                return;
            }
            let error = match outcome {
                Err(error) if !restart.is_cancelled() => error,
                _ => continue, // released: it begins anew behind the lost range
            };
            self.stats.fail();
            if self.stats.cursor() > before {
                backoff.reset();
            }
            if self.part.failed(&error, &mut backoff, &stop).await == Next::Stop {
                return;
            }
        }
    }

    async fn attempt(&self, stop: &CancellationToken) -> Result<()> {
        let registered = self.register().await?;
        let mut sink = sink::open(&self.name, &self.config, &self.context)?;
        let keeps = sink.capabilities().transactional_progress;
        let target = sink.open().await?;
        let progress = catalog::reconcile(&self.name, &registered, target, keeps)?;
        let mut delivery = self.delivery(sink, progress, registered.progress.cursor)?;
        tokio::select! {
            outcome = pipeline::deliver(&mut delivery, stop) => outcome,
            never = self.show_running() => never,
        }
    }

    /// Says that the sink is running: at once, or after a failure once something was delivered,
    /// because many a target is not asked before the first write.
    async fn show_running(&self) -> Result<()> {
        let before = self.stats.cursor();
        while self.part.state().0.is_waiting()
            && self.stats.cursor() == before
            && before < self.journal.end()
        {
            tokio::time::sleep(RECOVERY_LOOK).await;
        }
        self.part.running();
        std::future::pending().await
    }

    fn delivery(&self, sink: Box<dyn Sink>, progress: Progress, recorded: u64) -> Result<Delivery> {
        let end = self.journal.end();
        if progress.cursor > end {
            return Err(Error::damaged(format!(
                "sink {} has offset {}, and the journal ends at {end}: the journal is older \
                 than the sink's progress",
                self.name, progress.cursor
            ))
            .remedy("put back the newer data_dir"));
        }
        self.stats.begin(progress.cursor, recorded.min(progress.cursor));
        Ok(Delivery {
            name: self.name.clone(),
            reader: self.journal.reader(progress.cursor)?,
            filter: self.filter(),
            sink,
            catalog: self.catalog.clone(),
            progress,
            cut: Cut {
                limits: Limits {
                    changes_max: self.batch_changes_max(),
                    bytes_max: self.config.batch_bytes_max,
                },
                linger: Duration::from_millis(self.config.batch_ms_max),
            },
            stats: Arc::clone(&self.stats),
            recorded_at: Instant::now(),
            written: progress.cursor,
        })
    }

    /// A file has no batches for its readers, and larger ones cost fewer syncs.
    fn batch_changes_max(&self) -> usize {
        match self.config.kind {
            config::SinkKind::File(_) => usize::MAX,
            _ => self.config.batch_changes_max,
        }
    }

    /// Gives up what the journal must drop for want of disk: the range stays on record, and the
    /// loop goes on behind it in a new epoch.
    pub(super) async fn release(&self, to: u64, reason: &str) -> Result<()> {
        let lost = LostRange { from: self.stats.recorded(), to, reason: reason.to_owned() };
        self.catalog.release(&self.name, &lost).await?;
        self.lost_changes.fetch_add(lost.to - lost.from, Relaxed);
        self.stats.begin(to, to);
        self.restart.lock().unwrap_or_else(std::sync::PoisonError::into_inner).cancel();
        Ok(())
    }

    pub(super) fn filter(&self) -> Filter {
        Filter::new(&self.config).reads(self.config.reads)
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn source(&self) -> &str {
        &self.source
    }

    pub(super) fn retain(&self) -> config::Retain {
        self.config.retain
    }

    /// The first offset that the sink may still ask for.
    pub(super) fn needs(&self) -> u64 {
        self.stats.recorded()
    }

    pub(super) fn status(&self) -> SinkStatus {
        let (state, since) = self.part.state();
        let (cursor, end) = (self.stats.cursor(), self.journal.end());
        // A segment that is trimmed meanwhile makes this round blind, no more.
        let lag = self.journal.lag(cursor).ok().flatten();
        let age = |lag: Lag| Timestamp::now().0.saturating_sub(lag.appended.0);
        SinkStatus {
            name: self.name.clone(),
            source: self.source.clone(),
            state,
            since,
            cursor,
            recorded: self.stats.recorded(),
            behind_changes: end.saturating_sub(cursor),
            behind_bytes: lag.map_or(0, |lag| lag.bytes),
            behind_ms: lag.map_or(0, |lag| u64::try_from(age(lag) / 1000).unwrap_or(0)),
            lost_changes: self.lost_changes.load(Relaxed),
            filtered_changes: self.context.filtered.load(Relaxed) + self.stats.filtered(),
            totals: self.stats.totals(),
        }
    }
}
