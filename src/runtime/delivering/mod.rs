//! One sink at run time: opens its target, delivers, and opens it again; and what people do to it.

mod control;

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

pub use self::control::{Moved, To};
use super::{
    capturing::Capturing,
    part::{Backoff, Next, Part, State},
    status::SinkStatus,
};
use crate::{
    catalog::{self, Catalog, LostRange, NewBackfill, Registered},
    change::{Backfill, Change, Timestamp},
    config::{self, AfterDeadLetter, From},
    error::{Error, Result},
    journal::{Journal, Lag, Limits},
    parking::{Lot, Parking, Policy, Stand},
    pipeline::{self, Cut, Delivery, Judge, Lanes, Terms},
    sink::{self, Beyond, Capabilities, Progress, Sink, SinkStats, Verdict},
    transform::{Filter, Transform},
};

/// How often a sink that failed is looked at for its first success.
const RECOVERY_LOOK: Duration = Duration::from_millis(50);

/// How long somebody who interrupts the loop waits for a write in flight.
const INTERRUPT_GRACE: Duration = Duration::from_secs(5);

/// One sink and the journal that it reads.
#[derive(Debug)]
pub(super) struct Delivering {
    name: String,
    source: String,
    config: config::Sink,
    terms: Terms,
    context: sink::Context,
    pub(super) journal: Journal,
    catalog: Catalog,
    parking: Parking,
    part: Part,
    stats: Arc<SinkStats>,
    lost_changes: AtomicU64,
    /// What is parked has the keys that the rules of today give it.
    keyed: AtomicBool,
    /// Held by the loop while it delivers, one for each lane. They outlive a failed attempt, with
    /// what they know: a time that the target asked for, or the place in a queue.
    sinks: tokio::sync::Mutex<Vec<Box<dyn Sink>>>,
    attempt: Mutex<Attempt>,
    /// Told when a person changed something, so that what waits or has stopped looks again.
    changed: Notify,
}

/// How the current attempt is ended.
#[derive(Debug, Default)]
struct Attempt {
    /// After the write in flight.
    leave: CancellationToken,
    /// At once.
    cut: CancellationToken,
}

impl Delivering {
    pub(super) fn new(
        (name, source): (&str, &str),
        config: config::Sink,
        capturing: &Capturing,
        (catalog, parking, context): (Catalog, Parking, sink::Context),
    ) -> Self {
        Self {
            name: name.to_owned(),
            source: source.to_owned(),
            terms: capturing.terms(name, &config),
            config,
            context,
            journal: capturing.journal.clone(),
            catalog,
            parking,
            part: Part::new("sink", name),
            stats: Arc::default(),
            lost_changes: AtomicU64::new(0),
            keyed: AtomicBool::new(false),
            sinks: tokio::sync::Mutex::default(),
            attempt: Mutex::default(),
            changed: Notify::new(),
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
            let (parked, dead) = self.parking.count(&self.name).await?;
            self.stats.set_parked((parked, dead, 0));
            return Ok(registered);
        }
        let cursor = self.offset_of(&self.config.from)?;
        let lineage = self.journal.lineage();
        let progress = Progress { lineage, epoch: 1, cursor, retry_seq: 0 };
        let backfill = self.config.backfill.then(|| self.first_backfill());
        let names = (self.name.as_str(), self.source.as_str());
        self.catalog.register(names, &progress, backfill.as_ref()).await?;
        self.stats.begin(cursor, cursor);
        Ok(Registered { source: self.source.clone(), progress, started: false, paused: None })
    }

    /// The rows that a new sink begins with.
    fn first_backfill(&self) -> NewBackfill {
        let tables = match self.config.tables.is_empty() {
            true => self.config.schemas.iter().map(|schema| format!("{schema}.*")).collect(),
            false => self.config.tables.clone(),
        };
        let (source, sink) = (self.source.clone(), Some(self.name.clone()));
        NewBackfill { source, sink, tables, ..NewBackfill::default() }
    }

    fn offset_of(&self, from: &From) -> Result<u64> {
        match from {
            From::Start => Ok(self.journal.start()),
            From::Now => Ok(self.journal.end()),
            From::Offset(offset) => self.check_offset(*offset),
            From::Time(time) => self.journal.offset_at(*time),
            From::Token(token) => self.journal.resume(&token.parse()?),
        }
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

    /// Delivers until `stop`. Where a person must act it waits until somebody has.
    pub(super) async fn run(self: Arc<Self>, stop: CancellationToken) {
        while !stop.is_cancelled() {
            self.repeat(&stop).await;
            self.close().await;
            tokio::select! {
                () = stop.cancelled() => {}
                () = self.changed.notified() => {}
            }
        }
    }

    /// Lets go of the sink: whoever reads a queue learns by it that nothing more comes.
    pub(super) async fn close(&self) {
        self.sinks.lock().await.clear();
    }

    async fn repeat(&self, stop: &CancellationToken) {
        let (min, max) = (self.config.retry_ms_min, self.config.retry_ms_max);
        let mut backoff = Backoff::new(Duration::from_millis(min), Duration::from_millis(max));
        loop {
            let before = self.stats.cursor();
            let (leave, cut) = (stop.child_token(), CancellationToken::new());
            *self.attempt.lock().unwrap_or_else(PoisonError::into_inner) =
                Attempt { leave: leave.clone(), cut: cut.clone() };
            let outcome = tokio::select! {
                biased;
                () = cut.cancelled() => continue, // it begins anew where somebody put it
                outcome = self.attempt(&leave, stop) => outcome,
            };
            if stop.is_cancelled() {
                return;
            }
            let Err(error) = outcome else { continue };
            self.stats.fail();
            if self.stats.cursor() > before {
                backoff.reset();
            }
            let next = tokio::select! {
                next = self.part.failed(&error, &mut backoff, stop) => next,
                () = self.changed.notified() => Next::Again,
            };
            if next == Next::Stop {
                return;
            }
        }
    }

    async fn attempt(&self, leave: &CancellationToken, stop: &CancellationToken) -> Result<()> {
        let mut held = self.sinks.lock().await;
        let registered = self.register().await?;
        if let Some(by) = &registered.paused {
            drop(held);
            self.part.paused(by);
            tokio::select! {
                () = stop.cancelled() => {}
                () = self.changed.notified() => {}
            }
            return Ok(());
        }
        let target = self.open_lanes(&mut held).await?;
        let keeps = held.first().is_some_and(|sink| sink.capabilities().transactional_progress);
        let progress = catalog::reconcile(&self.name, &registered, target, keeps)?;
        let mut delivery = self.delivery(&mut held, progress, &registered).await?;
        if progress.epoch == registered.progress.epoch
            && progress.cursor < registered.progress.cursor
        {
            delivery.progress.epoch = self.put_back(progress.cursor, &registered).await?;
        } else if target.is_some() && progress != registered.progress {
            // Were the target to lose its progress now, nobody would take it for a new one.
            self.catalog.advance(&self.name, &progress).await?;
            self.stats.record(progress.cursor);
        }
        tokio::select! {
            outcome = pipeline::deliver(&mut delivery, leave) => outcome,
            never = self.show_running() => never,
        }
    }

    /// Opens every lane; the progress that the target keeps.
    async fn open_lanes(&self, held: &mut Vec<Box<dyn Sink>>) -> Result<Option<Progress>> {
        self.opened(held)?;
        let mut target = None;
        for (index, sink) in held.iter_mut().enumerate() {
            let own = sink.open().await?;
            if index == 0 {
                target = own;
            }
        }
        Ok(target)
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
    async fn put_back(&self, cursor: u64, registered: &Registered) -> Result<u64> {
        let had = registered.progress.cursor;
        let why = format!("the target was put back: it has offset {cursor}, and had {had}");
        warn!("sink {} is rewound: {why}", self.name);
        self.catalog.begin_epoch(&self.name, cursor, "walrace", &why).await
    }

    /// The sink, once for each lane.
    fn opened<'a>(&self, held: &'a mut Vec<Box<dyn Sink>>) -> Result<&'a mut Box<dyn Sink>> {
        let open = || sink::open(&self.name, &self.config, &self.context);
        if held.is_empty() {
            held.push(open()?);
        }
        let lanes = held.first().is_some_and(|sink| sink.capabilities().lanes);
        if self.config.lanes > 1 && !lanes {
            let name = &self.name;
            return Err(Error::config(format!("sink {name} takes one connection at a time"))
                .remedy(format!("remove `lanes` from sink.{name}: it gains nothing here")));
        }
        while held.len() < self.config.lanes {
            held.push(open()?);
        }
        held.first_mut().ok_or_else(|| Error::bug("a sink without a lane"))
    }

    async fn delivery<'a>(
        &self,
        sinks: &'a mut [Box<dyn Sink>],
        progress: Progress,
        registered: &Registered,
    ) -> Result<Delivery<'a>> {
        let (end, recorded) = (self.journal.end(), registered.progress.cursor);
        if progress.cursor > end {
            return Err(Error::damaged(format!(
                "sink {} has offset {}, and the journal ends at {end}: the journal is older \
                 than the sink's progress",
                self.name, progress.cursor
            ))
            .remedy("put back the newer data_dir"));
        }
        self.stats.begin(progress.cursor, recorded.min(progress.cursor));
        let mut transform = self.transform()?;
        let (mut lot, done) = self.lot(sinks, &progress).await?;
        if !transform.is_plain() && !self.keyed.load(Relaxed) {
            // The rules are read at the start, and may be others than those it was parked under.
            lot.add_keys(|change| transform.keys_despite(change)).await?;
            self.keyed.store(true, Relaxed);
        }
        let sink = Lanes::new(sinks);
        Ok(Delivery {
            name: self.name.clone(),
            reader: self.journal.reader(progress.cursor)?.for_sink(Backfill::number_of(&self.name)),
            journal: self.journal.clone(),
            done,
            filter: self.filter(),
            transform,
            judge: Judge::open(self.terms.clone(), &self.catalog, &self.journal, progress.cursor)
                .await?,
            catalog: self.catalog.clone(),
            lot,
            skips: self.catalog.skips(&self.name).await?,
            progress,
            cut: self.cut(sink.capabilities()),
            sink,
            stats: Arc::clone(&self.stats),
            recorded_at: Instant::now(),
            written: progress.cursor,
            taken: None,
            parked_now: false,
            together: 1,
            inside_transaction: false,
        })
    }

    /// The sink's lot, and what its target has done beyond its progress. The target lets go of
    /// retried changes that somebody dropped or edited meanwhile.
    async fn lot(
        &self,
        sinks: &mut [Box<dyn Sink>],
        progress: &Progress,
    ) -> Result<(Lot, Vec<(u64, u64)>)> {
        let mut beyond = Beyond::default();
        if let Some(sink) = sinks.first_mut() {
            beyond = sink.beyond(progress).await?;
        }
        let stand = Stand {
            cursor: progress.cursor,
            retry_seq: progress.retry_seq,
            done: &beyond.done,
            out: &beyond.out,
        };
        let lot = Lot::open(&self.parking, &self.name, self.policy(), stand).await?;
        let unknown = lot.unknown(&beyond.out).into_iter();
        let unknown: Vec<_> = unknown.map(|offset| (offset, Verdict::Behind)).collect();
        if let Some(sink) = sinks.first_mut().filter(|_| !unknown.is_empty()) {
            sink.settle(&unknown).await?;
        }
        Ok((lot, beyond.done))
    }

    fn policy(&self) -> Policy {
        let config = &self.config;
        let groups = match &config.kind {
            config::SinkKind::HttpPull(pull) => pull.message_grouping,
            _ => true,
        };
        Policy {
            attempts_max: config.attempts_max,
            hold: groups && config.after_dead_letter == AfterDeadLetter::Hold,
            wait_min: Duration::from_millis(config.retry_ms_min),
            wait_max: Duration::from_millis(config.retry_ms_max),
            changes_max: config.parked_changes_max,
            bytes_max: config.parked_bytes_max,
        }
    }

    /// Where nobody sees batches, larger ones cost less; what changes take beside their rows stays
    /// within the same bytes.
    fn cut(&self, capabilities: Capabilities) -> Cut {
        let bytes_max = self.config.batch_bytes_max;
        let changes_max = if capabilities.batches_by_bytes {
            (bytes_max / size_of::<Change>()).max(1)
        } else {
            self.config.batch_changes_max
        };
        let linger = Duration::from_millis(self.config.batch_ms_max);
        Cut { limits: Limits { changes_max, bytes_max }, linger }
    }

    /// Gives up what the journal must drop for want of disk: the range stays on record, and the
    /// loop goes on behind it in a new epoch. A sink that has more than the catalog knew loses only
    /// what it really lacks.
    pub(super) async fn release(&self, to: u64, reason: &str) -> Result<()> {
        // The sink is asked for before the loop is cut off, so that it is had before the loop
        // begins anew: nothing moves the old epoch while the new one begins.
        let cut_off = async { self.cut_off() };
        let (mut held, ()) = tokio::join!(biased; self.sinks.lock(), cut_off);
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
        self.changed.notify_one();
        Ok(())
    }

    fn cut_off(&self) {
        self.attempt.lock().unwrap_or_else(PoisonError::into_inner).cut.cancel();
    }

    /// What the sink has: by its target where that keeps progress and can be asked.
    async fn progress(&self, held: &mut Vec<Box<dyn Sink>>) -> Result<Progress> {
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

    pub(super) fn transform(&self) -> Result<Transform> {
        Transform::new(&self.name, &self.config)
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

    /// Whether it is at work, and got something to its target not longer ago than `time`.
    pub(super) fn moved_within(&self, time: Duration) -> bool {
        self.part.state().0.is_running() && self.stats.moved_within(time)
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn source(&self) -> &str {
        &self.source
    }

    pub(super) fn terms(&self) -> &Terms {
        &self.terms
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
        let (parked_changes, dead_letters, parked_bytes) = self.stats.parked();
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
            parked_changes,
            dead_letters,
            parked_bytes,
            parked_changes_max: self.config.parked_changes_max,
            unmatched_columns: self.stats.unmatched(),
            totals: self.stats.totals(),
        }
    }
}
