//! One sink at run time: opens its target, delivers, and opens it again.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

use super::{
    capturing::Capturing,
    part::{Backoff, Next, Part, State},
    status::SinkStatus,
};
use crate::{
    catalog::{self, Catalog, LostRange, Registered},
    change::{Change, Timestamp},
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
    /// Held by the loop while it delivers. It outlives a failed attempt, with what it knows: a
    /// time that the target asked for, or the place in a queue.
    sink: tokio::sync::Mutex<Option<Box<dyn Sink>>>,
    /// Cancelled to cut an attempt off, so that the sink can be released.
    restart: Mutex<CancellationToken>,
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
            sink: tokio::sync::Mutex::default(),
            restart: Mutex::default(),
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
            From::Offset(offset) => self.check_offset(*offset)?,
            From::Time(time) => self.journal.offset_at(*time)?,
            From::Token(token) => self.journal.resume(&token.parse()?)?,
        };
        let lineage = self.journal.lineage();
        let progress = Progress { lineage, epoch: 1, cursor, retry_seq: 0 };
        self.catalog.register(&self.name, &self.source, &progress).await?;
        self.stats.begin(cursor, cursor);
        Ok(Registered { source: self.source.clone(), progress, started: false })
    }

    /// Before it is registered: afterwards only another name would free the sink of a slip.
    fn check_offset(&self, offset: u64) -> Result<u64> {
        let (start, end) = (self.journal.start(), self.journal.end());
        if (start..=end).contains(&offset) {
            return Ok(offset);
        }
        Err(Error::config(format!(
            "sink {} cannot begin at offset {offset}: the journal holds {start} to {end}",
            self.name
        ))
        .remedy("set `from` to an offset within it, or to \"start\" or \"now\""))
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
        self.repeat(&stop).await;
        self.close().await;
    }

    /// Lets go of the sink: whoever reads a queue learns by it that nothing more comes.
    pub(super) async fn close(&self) {
        *self.sink.lock().await = None;
    }

    async fn repeat(&self, stop: &CancellationToken) {
        let (min, max) = (self.config.retry_ms_min, self.config.retry_ms_max);
        let mut backoff = Backoff::new(Duration::from_millis(min), Duration::from_millis(max));
        loop {
            let before = self.stats.cursor();
            let restart = CancellationToken::new();
            *self.restart.lock().unwrap_or_else(PoisonError::into_inner) = restart.clone();
            let outcome = tokio::select! {
                biased;
                () = restart.cancelled() => continue, // it begins anew behind the lost range
                outcome = self.attempt(stop) => outcome,
            };
            if stop.is_cancelled() {
                return;
            }
            let Err(error) = outcome else { continue };
            self.stats.fail();
            if self.stats.cursor() > before {
                backoff.reset();
            }
            if self.part.failed(&error, &mut backoff, stop).await == Next::Stop {
                return;
            }
        }
    }

    async fn attempt(&self, stop: &CancellationToken) -> Result<()> {
        let mut held = self.sink.lock().await;
        let registered = self.register().await?;
        let sink = self.opened(&mut held)?;
        let target = sink.open().await?;
        let keeps = sink.capabilities().transactional_progress;
        let progress = catalog::reconcile(&self.name, &registered, target, keeps)?;
        let mut delivery = self.delivery(sink, progress, registered.progress.cursor)?;
        if progress.epoch == registered.progress.epoch
            && progress.cursor < registered.progress.cursor
        {
            delivery.progress.epoch = self.rewind(progress.cursor, &registered).await?;
        }
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

    /// A target that was put back in its epoch begins another, because progress never falls within
    /// one.
    async fn rewind(&self, cursor: u64, registered: &Registered) -> Result<u64> {
        let had = registered.progress.cursor;
        let why = format!("the target was put back: it has offset {cursor}, and had {had}");
        warn!("sink {} is rewound: {why}", self.name);
        self.catalog.begin_epoch(&self.name, cursor, "walrace", &why).await
    }

    fn opened<'a>(&self, held: &'a mut Option<Box<dyn Sink>>) -> Result<&'a mut dyn Sink> {
        Ok(match held {
            Some(sink) => sink.as_mut(),
            None => held.insert(sink::open(&self.name, &self.config, &self.context)?).as_mut(),
        })
    }

    fn delivery<'a>(
        &self,
        sink: &'a mut dyn Sink,
        progress: Progress,
        recorded: u64,
    ) -> Result<Delivery<'a>> {
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

    /// A file has no batches for its readers, and larger ones cost fewer syncs; what changes take
    /// beside their rows stays within the same bytes.
    fn batch_changes_max(&self) -> usize {
        match self.config.kind {
            config::SinkKind::File(_) => (self.config.batch_bytes_max / size_of::<Change>()).max(1),
            _ => self.config.batch_changes_max,
        }
    }

    /// Gives up what the journal must drop for want of disk: the range stays on record, and the
    /// loop goes on behind it in a new epoch. A sink that has more than the catalog knew loses only
    /// what it really lacks.
    pub(super) async fn release(&self, to: u64, reason: &str) -> Result<()> {
        // The sink is asked for before the loop is cut off, so that it is had before the loop
        // begins anew: nothing moves the old epoch while the new one begins.
        let cut_off = async {
            self.restart.lock().unwrap_or_else(PoisonError::into_inner).cancel();
        };
        let (mut held, ()) = tokio::join!(biased; self.sink.lock(), cut_off);
        let progress = self.progress(&mut held).await?;
        let from = progress.cursor;
        if from >= to {
            self.catalog.advance(&self.name, &progress).await?;
            self.stats.begin(from, from);
            return Ok(());
        }
        let name = &self.name;
        error!("sink {name} loses offsets {from} to {to}: {reason}; a backfill repairs it");
        let lost = LostRange { from, to, reason: reason.to_owned() };
        self.catalog.release(name, &lost).await?;
        self.lost_changes.fetch_add(to - from, Relaxed);
        self.stats.begin(to, to);
        Ok(())
    }

    /// What the sink has: by its target where that keeps progress and can be asked.
    async fn progress(&self, held: &mut Option<Box<dyn Sink>>) -> Result<Progress> {
        let registered = self.register().await?;
        let sink = self.opened(held)?;
        let keeps = sink.capabilities().transactional_progress;
        let target = sink.peek().await.ok().flatten();
        Ok(catalog::reconcile(&self.name, &registered, target, keeps)
            .unwrap_or(registered.progress))
    }

    pub(super) fn filter(&self) -> Filter {
        Filter::new(&self.config).reads(self.config.reads)
    }

    /// Has its progress written down with the next batch, or within a second.
    pub(super) fn hurry(&self) {
        self.stats.want_record();
    }

    /// Whether it would miss something if the journal began at `to`. A sink at work that has it has
    /// no more to do than to write that down.
    pub(super) fn lacks(&self, to: u64) -> bool {
        let running = self.part.state().0.is_running();
        let has = if running { self.stats.cursor() } else { self.stats.recorded() };
        has < to
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

    pub(super) fn state(&self) -> State {
        self.part.state().0
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
