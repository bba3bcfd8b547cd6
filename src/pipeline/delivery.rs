//! One sink's loop between the journal and the target: reading, the sink's rules, and progress.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::{
    breach::Judge,
    lanes::Lanes,
    run::{self, Run},
};
use crate::{
    catalog::Catalog,
    change::{Batch, Change, Keys, Timestamp},
    error::{Class, Result},
    failpoint,
    journal::{Journal, Limits, Reader},
    parking::{Lot, Why, within},
    sink::{Progress, SinkStats, Written},
    transform::{Filter, Transform},
};

/// How a sink's batches are cut.
#[derive(Clone, Copy, Debug)]
pub struct Cut {
    /// Changes and bytes at most.
    pub limits: Limits,
    /// A batch that is not full waits this long for more.
    pub linger: Duration,
}

/// One sink with all that its loop needs.
pub struct Delivery<'a> {
    /// The sink's name.
    pub name: String,
    /// Where the changes come from; stands at the progress' cursor.
    pub reader: Reader,
    /// What it reads, for a change that the target gives back.
    pub journal: Journal,
    /// What the target has done beyond the progress with which the loop began: from an offset to
    /// the one after the last, in order.
    pub done: Vec<(u64, u64)>,
    /// What this sink wants to see.
    pub filter: Filter,
    /// What it makes of it.
    pub transform: Transform,
    /// Whether the schemas are such as its readers need.
    pub judge: Judge,
    /// The target, open.
    pub sink: Lanes<'a>,
    /// Where progress is kept for those targets that cannot.
    pub catalog: Catalog,
    /// What was refused, and what waits behind it.
    pub lot: Lot,
    /// Changes that somebody skipped, each with who and why: they become dead letters.
    pub skips: BTreeMap<u64, String>,
    /// What the sink has; runs ahead of what is recorded only over filtered changes and over
    /// targets that keep their progress themselves.
    pub progress: Progress,
    /// How batches are cut.
    pub cut: Cut,
    /// Counters for people.
    pub stats: Arc<SinkStats>,
    /// When progress was last recorded in the catalog.
    pub recorded_at: Instant,
    /// The cursor that the target holds or, where it holds none, the catalog.
    pub written: u64,
    /// Changes were handed to the target that become durable with a later write, up to here.
    pub taken: Option<u64>,
    /// Something was parked by the write that is under way.
    pub parked_now: bool,
    /// Refused changes that are tried again in one write.
    pub together: usize,
    /// Whether the last change that was read leaves its transaction open.
    pub inside_transaction: bool,
}

/// Progress that no write carries (filtered changes, targets that keep their own) is recorded this
/// often.
const RECORD_EVERY: Duration = Duration::from_secs(1);

/// What a target that keeps no progress was given is recorded this often. Each record waits for the
/// disk, as long as a batch takes; after a crash what was delivered within this time comes again.
const RECORD_DELIVERED_EVERY: Duration = Duration::from_millis(50);

impl Delivery<'_> {
    /// Waits for changes, and tries parked ones when their time has come; `None` at a stop.
    pub(super) async fn read(&mut self, stop: &CancellationToken) -> Result<Option<Batch>> {
        loop {
            self.retry(stop).await?;
            let asked = self.sink.not_before();
            let due = asked.unwrap_or_else(Instant::now);
            let record = self.is_unrecorded().then(|| self.record_at());
            let parked = self.lot.wake().map(|at| due.max(until(at)));
            let batch = tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(None),
                batch = read_after(asked, &mut self.reader, self.cut.limits) => batch?,
                () = sleep_until(record.unwrap_or(due)), if record.is_some() => {
                    self.record().await?;
                    continue;
                }
                () = sleep_until(parked.unwrap_or(due)), if parked.is_some() => continue,
                () = self.sink.told() => continue,
            };
            let batch = self.linger(batch, stop).await?;
            if let Some(last) = batch.changes.last() {
                self.inside_transaction = !last.closes_transaction;
            }
            return Ok(Some(batch));
        }
    }

    /// Fills up a batch that is not full, for as long as this sink likes to wait and nobody stops.
    async fn linger(&mut self, mut batch: Batch, stop: &CancellationToken) -> Result<Batch> {
        if self.cut.linger.is_zero() {
            return Ok(batch);
        }
        let deadline = Instant::now() + self.cut.linger;
        loop {
            let Limits { changes_max, bytes_max } = self.cut.limits;
            let left = Limits {
                changes_max: changes_max.saturating_sub(batch.changes.len()),
                bytes_max: bytes_max.saturating_sub(batch.bytes()),
            };
            if left.changes_max == 0 || left.bytes_max == 0 {
                return Ok(batch);
            }
            tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(batch),
                () = sleep_until(deadline) => return Ok(batch),
                more = self.reader.next(left) => batch.changes.extend(more?.changes),
            }
        }
    }

    /// Leaves to the sink what it wants to see as it wants to see it, parks what must wait behind
    /// another change, and makes dead letters of what a rule fails on.
    pub(super) async fn transform(&mut self, batch: Batch) -> Result<Run> {
        let batch = self.without_done(batch);
        let read = batch.changes.len();
        self.judge.see(&batch);
        let mut batch = self.filter.apply(batch);
        self.judge.order(&mut batch.changes);
        self.judge.prepare(&batch.changes).await?;
        self.stats.filter(read - batch.changes.len());
        let mut run = Run::default();
        run.batch.position = batch.position;
        for change in batch.changes {
            self.shape(change, &mut run)?;
        }
        self.show_unmatched();
        self.lot.save().await?;
        self.show_lot();
        Ok(run)
    }

    /// Leaves out what the target has done, or the lot holds, beyond the progress.
    fn without_done(&self, mut batch: Batch) -> Batch {
        if self.done.last().is_some_and(|last| batch.changes.iter().any(|c| c.offset < last.1)) {
            batch.changes.retain(|change| !within(&self.done, change.offset));
        }
        batch
    }

    /// Tells people of columns that rules name and tables do not have: a mask may hide nothing.
    fn show_unmatched(&mut self) {
        for unmatched in self.transform.take_news() {
            warn!("sink {}: {unmatched}", self.name);
        }
        self.stats.set_unmatched(self.transform.count_unmatched());
    }

    fn shape(&mut self, change: Change, run: &mut Run) -> Result<()> {
        if let Some(by) = self.skips.get(&change.offset) {
            let why = Why::Skipped(format!("skipped by {by}"));
            let keys = self.transform.keys_despite(&change);
            run.close_transaction_of(&change);
            return self.lot.park(change, keys, why);
        }
        let Some(change) = self.withhold(change, run)? else { return Ok(()) };
        if self.transform.is_plain() {
            if self.waits(&change, std::slice::from_ref(&change), run)? {
                return Ok(());
            }
            run.push(change);
            return Ok(());
        }
        match self.transform.shape(change.clone()) {
            Ok(parts) if parts.is_empty() => {
                self.stats.filter(1);
                run.close_transaction_of(&change);
            }
            Ok(parts) => {
                if !self.waits(&change, &parts, run)? {
                    run.push_parts(change, parts);
                }
            }
            Err(error) if error.class() != Class::Data => return Err(error),
            Err(error) => {
                let keys = self.transform.keys_despite(&change);
                let behind = self.lot.blocks(&keys);
                let why = if behind { Why::Behind } else { Why::Failed(error.to_string()) };
                run.close_transaction_of(&change);
                self.lot.park(change, keys, why)?;
                if !behind {
                    self.stats.park();
                }
            }
        }
        Ok(())
    }

    /// Parks a change that must wait behind another by its own keys, or by those of its parts.
    fn waits(&mut self, change: &Change, parts: &[Change], run: &mut Run) -> Result<bool> {
        if self.lot.is_idle() {
            return Ok(false);
        }
        let Some(keys) = run::keys(parts) else { return Ok(false) };
        if self.lot.blocks(&keys) {
            run.close_transaction_of(change);
            self.lot.park(change.clone(), keys, Why::Behind)?;
            return Ok(true);
        }
        self.lot.passes(&self.state_keys(keys), change.offset);
        Ok(false)
    }

    /// The keys that a delivered change supersedes older ones by: the state of a row is not
    /// replaced by that of another row whose message has the same key.
    fn state_keys(&self, mut keys: Keys) -> Keys {
        let target = self.sink.capabilities();
        if target.state_target && !target.supersedes {
            keys.named.clear();
        }
        keys
    }

    pub(super) fn is_record_due(&self) -> bool {
        self.recorded_at.elapsed() >= self.record_every() || self.stats.is_record_wanted()
    }

    fn record_every(&self) -> Duration {
        if self.is_delivery_unrecorded() { RECORD_DELIVERED_EVERY } else { RECORD_EVERY }
    }

    /// Whether something that was delivered would be delivered again by who begins anew.
    pub(super) fn is_delivery_unrecorded(&self) -> bool {
        !self.sink.capabilities().transactional_progress && self.written > self.stats.recorded()
    }

    /// When the progress is written down next: what a sink only has taken waits for its time.
    fn record_at(&self) -> Instant {
        let regular = self.recorded_at + self.record_every();
        let only_taken = self.stats.recorded() >= self.progress.cursor;
        self.sink.flush_at().filter(|_| only_taken).map_or(regular, |at| at.max(regular))
    }

    /// Whether something was passed that is not written down; within an open transaction of a
    /// target that takes whole ones there is nothing to write yet.
    fn is_unrecorded(&self) -> bool {
        let waits = self.inside_transaction && self.sink.capabilities().atomic;
        !waits && (self.stats.recorded() < self.progress.cursor || self.taken.is_some())
    }

    /// Makes the progress durable in the catalog, and before that at a target that keeps its own.
    /// What the target only has taken is flushed when its time has come; what was parked is durable
    /// before.
    pub(super) async fn record(&mut self) -> Result<()> {
        let flush = self.sink.flush_at().is_none_or(|at| at <= Instant::now());
        self.record_and(flush).await
    }

    /// As `record`; with `flush` whatever the target has taken becomes durable now.
    pub(super) async fn record_and(&mut self, flush: bool) -> Result<()> {
        self.save_parked().await?;
        if !self.is_unrecorded() {
            return Ok(());
        }
        let ahead = self.written < self.progress.cursor;
        if self.taken.is_some() && flush
            || ahead && self.taken.is_none() && self.sink.capabilities().transactional_progress
        {
            let cursor = self.taken.unwrap_or(self.progress.cursor);
            match self.sink.write_nothing(&Progress { cursor, ..self.progress }).await? {
                Written::Until(durable) => {
                    self.progress.cursor = self.progress.cursor.max(durable);
                    self.taken = Some(cursor).filter(|taken| *taken > durable);
                }
                Written::All | Written::Each(_) => {
                    self.progress.cursor = cursor;
                    self.taken = None;
                }
            }
        }
        self.recorded_at = Instant::now();
        self.written = self.progress.cursor;
        if self.stats.recorded() >= self.progress.cursor {
            return Ok(());
        }
        failpoint::reach("deliver::before_advance");
        self.catalog.advance(&self.name, &self.progress).await?;
        self.stats.record(self.progress.cursor);
        Ok(())
    }

    /// Moves past changes that no write carries.
    pub(super) fn skip_to(&mut self, cursor: u64) {
        match &mut self.taken {
            Some(taken) => *taken = cursor.max(*taken),
            None => self.progress.cursor = cursor.max(self.progress.cursor),
        }
    }

    /// Lets go of the target, with all progress written down.
    pub(super) async fn close(&mut self) -> Result<()> {
        self.record_and(true).await?;
        self.sink.close().await
    }

    /// Makes durable what was parked.
    pub(super) async fn save_parked(&mut self) -> Result<()> {
        if self.lot.is_saved() {
            return Ok(());
        }
        failpoint::reach("deliver::before_park");
        self.lot.save().await?;
        failpoint::reach("deliver::after_park");
        self.show_lot();
        Ok(())
    }

    /// Tells people how full the lot is.
    pub(super) fn show_lot(&self) {
        let (parked, dead, bytes) = self.lot.counts();
        if self.stats.show_parked((parked, dead, bytes), self.lot.alarms()) {
            warn!(
                "sink {}: {parked} changes are parked, {dead} of them dead letters, and the limit \
                 is near; at it the sink stops (see `walrace dlq list --sink {}`)",
                self.name, self.name
            );
        }
    }
}

/// A time of the wall clock by the clock that sleeps; what is past is now.
fn until(at: Timestamp) -> Instant {
    let left = u64::try_from(at.0.saturating_sub(Timestamp::now().0)).unwrap_or(0);
    Instant::now() + Duration::from_micros(left)
}

async fn read_after(due: Option<Instant>, reader: &mut Reader, limits: Limits) -> Result<Batch> {
    // A sleep lasts to the next millisecond, also one until now.
    if let Some(due) = due.filter(|due| *due > Instant::now()) {
        sleep_until(due).await;
    }
    reader.next(limits).await
}
