//! The backfills of one source at run time: the oldest is read first, by several workers.

use std::{
    collections::{BTreeMap, VecDeque},
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use tokio::{runtime::Handle, sync::Notify, task::JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::{Walrace, capturing::Capturing, part::Backoff, status::BackfillStatus};
use crate::{
    catalog::{BackfillRow, BackfillState, By, Catalog, NewBackfill},
    change::Backfill,
    error::{Class, Classify, Error, Result},
    journal::Limits,
    source::postgres::backfill::{self, Ended, Mark, Part, Plan, PlannedTable, Progress, Reading},
};

const RETRY_MIN: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(15);
/// How far parts are is written down this often; what is missing is found in the journal.
const SAVE_EVERY: Duration = Duration::from_secs(1);
/// How long somebody who pauses or cancels waits for the chunks that are on their way.
const PATIENCE: Duration = Duration::from_secs(30);

/// The backfills of one source.
#[derive(Debug)]
pub(super) struct Backfilling {
    capturing: Arc<Capturing>,
    catalog: Catalog,
    /// Where rows wait of a table that can only be read as a whole.
    spool: PathBuf,
    live: Mutex<Option<Arc<Live>>>,
    /// Told when there is something new to do, or when what was live has ended.
    changed: Notify,
}

/// The backfill that is being read.
#[derive(Debug)]
struct Live {
    id: u64,
    begun: Instant,
    blocks_before: u64,
    rows_before: u64,
    parts: Mutex<BTreeMap<u32, Part>>,
    /// Parts that nobody reads yet.
    queue: Mutex<VecDeque<u32>>,
    /// Why each worker waits.
    waiting: Mutex<BTreeMap<u32, String>>,
    again: AtomicU64,
    stop: CancellationToken,
    saved: Mutex<Instant>,
}

/// How a backfill left off.
enum Left {
    Done,
    Stopped,
    /// A table has other blocks now: it is planned anew.
    Rewritten,
}

impl Backfilling {
    pub(super) fn new(capturing: Arc<Capturing>, catalog: Catalog, spool: PathBuf) -> Self {
        Self { capturing, catalog, spool, live: Mutex::default(), changed: Notify::new() }
    }

    /// Reads what is asked for until `stop`.
    pub(super) async fn run(self: Arc<Self>, walrace: Weak<Walrace>, stop: CancellationToken) {
        let mut backoff = Backoff::new(RETRY_MIN, RETRY_MAX);
        while !stop.is_cancelled() {
            let outcome = self.next(&walrace, &stop).await;
            let wait = match outcome {
                Ok(true) => {
                    backoff.reset();
                    continue;
                }
                Ok(false) => Duration::MAX,
                Err(error) => {
                    warn!("a backfill of source {} waits: {error}", self.capturing.name());
                    backoff.next_wait()
                }
            };
            tokio::select! {
                () = stop.cancelled() => {}
                () = self.changed.notified() => {}
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// Reads the oldest backfill that is not at rest; whether there was one.
    async fn next(&self, walrace: &Weak<Walrace>, stop: &CancellationToken) -> Result<bool> {
        let all = self.catalog.backfills().await?;
        let of_mine = all.into_iter().filter(|row| row.asked.source == self.capturing.name());
        let active =
            |row: &BackfillRow| matches!(row.state, BackfillState::Queued | BackfillState::Running);
        let Some(row) = of_mine.into_iter().find(active) else { return Ok(false) };
        match self.work(&row, walrace, stop).await {
            Ok(()) => Ok(true),
            Err(error) if error.class() == Class::Retry => {
                let why = error.to_string();
                let state = (row.state, Some(why.as_str()));
                self.catalog.set_backfill(row.id, state, None).await?;
                Err(error)
            }
            Err(error) => {
                error!("backfill {} has stopped: {error}", row.id);
                let why = match error.remedy_text() {
                    Some(remedy) => format!("{error} ({remedy})"),
                    None => error.to_string(),
                };
                let failed = (BackfillState::Failed, Some(why.as_str()));
                self.catalog.set_backfill(row.id, failed, None).await?;
                Ok(true)
            }
        }
    }

    async fn work(
        &self,
        row: &BackfillRow,
        walrace: &Weak<Walrace>,
        stop: &CancellationToken,
    ) -> Result<()> {
        let mut parts: Vec<Part> = self.catalog.backfill_parts(row.id).await?;
        if row.plan.is_none() {
            parts = self.plan(row).await?;
        }
        self.recover(&mut parts).await?;
        let live = Arc::new(Live::new(row.id, parts, stop.child_token()));
        *self.lock() = Some(Arc::clone(&live));
        let running = (BackfillState::Running, None);
        let outcome = match self.catalog.set_backfill(row.id, running, None).await {
            Ok(true) => self.read(row, &live, walrace).await,
            Ok(false) => Ok(Left::Stopped), // somebody put it to rest meanwhile
            Err(error) => Err(error),
        };
        self.capturing.fences.forget();
        let outcome = self.leave(row, &live, outcome).await;
        *self.lock() = None;
        self.changed.notify_waiters();
        outcome
    }

    /// Writes down how the work on a backfill ended.
    async fn leave(&self, row: &BackfillRow, live: &Live, outcome: Result<Left>) -> Result<()> {
        self.save(live).await?;
        match outcome? {
            Left::Done => {
                info!("backfill {} of source {} is done", row.id, row.asked.source);
                self.catalog.set_backfill(row.id, (BackfillState::Done, None), None).await?;
                Ok(())
            }
            Left::Stopped => Ok(()),
            Left::Rewritten => self.plan_again(row, live).await,
        }
    }

    async fn plan(&self, row: &BackfillRow) -> Result<Vec<Part>> {
        let planned = self.planned(&row.asked).await?;
        let parts = planned.parts.into_iter();
        let parts: Vec<_> = parts.map(|part| self.own(part, row.id)).collect();
        self.store(row.id, &planned.tables, &parts).await?;
        Ok(parts)
    }

    /// What a backfill would read.
    pub(super) async fn planned(&self, asked: &NewBackfill) -> Result<Plan> {
        let config = self.capturing.postgres();
        let source = (self.capturing.name(), config);
        backfill::plan(source, &asked.tables, config.backfill.workers).await
    }

    /// As `planned`, with the time that it would take.
    pub(super) async fn rehearsed(&self, asked: &NewBackfill) -> Result<Vec<PlannedTable>> {
        let source = (self.capturing.name(), self.capturing.postgres());
        Ok(backfill::rehearse(source, &asked.tables).await?.tables)
    }

    fn own(&self, part: Part, backfill: u64) -> Part {
        Part { backfill, offset: self.capturing.journal.end(), ..part }
    }

    async fn store(&self, id: u64, tables: &[PlannedTable], parts: &[Part]) -> Result<()> {
        let numbered: Vec<_> = parts.iter().map(|part| (part.number, part)).collect();
        self.catalog.plan_backfill(id, &tables, &numbered).await
    }

    /// Plans the tables anew whose rows lie elsewhere now; the others keep what they have.
    async fn plan_again(&self, row: &BackfillRow, live: &Live) -> Result<()> {
        let planned = self.planned(&row.asked).await?;
        let kept: Vec<_> = live.parts().values().cloned().collect();
        let same = |part: &Part| {
            planned.parts.iter().any(|now| (now.leaf, now.filenode) == (part.leaf, part.filenode))
        };
        let (mut parts, gone): (Vec<_>, Vec<_>) = kept.into_iter().partition(same);
        for part in &gone {
            warn!("backfill {}: {} was rewritten, and is read anew", row.id, part.table);
        }
        let first = live.parts().keys().next_back().copied().unwrap_or(0);
        let known = |part: &Part| parts.iter().any(|known| known.leaf == part.leaf);
        let new: Vec<_> = planned.parts.iter().filter(|part| !known(part)).cloned().collect();
        for (number, part) in (first + 1..).zip(new) {
            parts.push(Part { number, ..self.own(part, row.id) });
        }
        self.store(row.id, &planned.tables, &parts).await
    }

    /// Finds in the journal what came into it after the parts were last written down.
    async fn recover(&self, parts: &mut [Part]) -> Result<()> {
        let journal = &self.capturing.journal;
        let open = parts.iter().filter(|part| !part.done);
        let Some(from) = open.map(|part| part.offset).min() else { return Ok(()) };
        let mut reader = journal.reader(from.max(journal.start()))?;
        while reader.offset() < journal.end() {
            let limits = Limits { changes_max: 10_000, bytes_max: 4 << 20 };
            for change in reader.try_next(limits).await?.changes {
                let Some(mark) = Mark::of(&change) else { continue };
                if mark.lineage == journal.lineage() {
                    parts.iter_mut().for_each(|part| part.follow(&mark, change.offset + 1));
                }
            }
        }
        Ok(())
    }

    async fn read(
        &self,
        row: &BackfillRow,
        live: &Arc<Live>,
        walrace: &Weak<Walrace>,
    ) -> Result<Left> {
        let config = self.capturing.postgres();
        let mut workers = JoinSet::new();
        for number in 0..config.backfill.workers.max(1) {
            let worker = Reader {
                number,
                live: Arc::clone(live),
                capturing: Arc::clone(&self.capturing),
                catalog: self.catalog.clone(),
                asked: row.asked.clone(),
                walrace: Weak::clone(walrace),
                spool: self.spool.clone(),
                handle: Handle::current(),
            };
            workers.spawn_blocking(move || worker.run());
        }
        let mut outcome = Ok(Left::Done);
        while let Some(ended) = workers.join_next().await {
            let ended = ended.class(Class::Bug, || "a worker of a backfill died")?;
            match ended {
                Ok(Left::Done) => {}
                Ok(Left::Stopped) if matches!(outcome, Ok(Left::Done)) => {
                    outcome = Ok(Left::Stopped);
                }
                Ok(Left::Stopped) => {}
                Ok(Left::Rewritten) => {
                    live.stop.cancel();
                    outcome = outcome.map(|_| Left::Rewritten);
                }
                Err(error) => {
                    live.stop.cancel();
                    outcome = Err(error);
                }
            }
        }
        outcome
    }

    async fn save(&self, live: &Live) -> Result<()> {
        let parts: Vec<_> = live.parts().values().cloned().collect();
        let end = self.capturing.journal.end();
        let parts: Vec<_> =
            parts.into_iter().map(|part| (part.number, Part { offset: end, ..part })).collect();
        self.catalog.save_parts(live.id, &parts).await
    }

    /// Says that there is a new backfill, or an old one that may go on.
    pub(super) fn look(&self) {
        self.changed.notify_one();
    }

    /// Puts a backfill to rest, and waits until the work on it has ended.
    pub(super) async fn rest(&self, id: u64, (state, by): (BackfillState, &By)) -> Result<()> {
        let reason = by.to_string();
        // First: what begins only now looks at it, and what is at work does not change it.
        self.catalog.set_backfill(id, (state, Some(&reason)), Some(by)).await?;
        let live = self.lock().clone().filter(|live| live.id == id);
        let Some(live) = live else { return Ok(()) };
        live.stop.cancel();
        let ended = async {
            while self.lock().as_ref().is_some_and(|live| live.id == id) {
                let _ = tokio::time::timeout(RETRY_MIN, self.changed.notified()).await;
            }
        };
        let ended = tokio::time::timeout(PATIENCE, ended).await;
        ended.map_err(|_| Error::retry(format!("backfill {id} has not let go yet")))
    }

    /// What a backfill is doing.
    pub(super) async fn status(&self, row: BackfillRow) -> Result<BackfillStatus> {
        let live = self.lock().clone().filter(|live| live.id == row.id);
        let parts = match &live {
            Some(live) => live.parts().values().cloned().collect(),
            None => self.catalog.backfill_parts::<Part>(row.id).await?,
        };
        Ok(status(row, &parts, live.as_deref()))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<Live>>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The status of a backfill whose parts are as given.
pub fn status_of(row: BackfillRow, parts: &[Part]) -> BackfillStatus {
    status(row, parts, None)
}

fn status(row: BackfillRow, parts: &[Part], live: Option<&Live>) -> BackfillStatus {
    let sum = |of: &dyn Fn(&Part) -> u64| parts.iter().map(of).sum::<u64>();
    let (blocks, blocks_done) =
        (sum(&|part| part.blocks().0.into()), sum(&|part| part.blocks().1.into()));
    let (rows, bytes) = (sum(&|part| part.rows), sum(&|part| part.bytes));
    let tables: Vec<serde_json::Value> =
        row.plan.as_deref().and_then(|plan| serde_json::from_str(plan).ok()).unwrap_or_default();
    let estimate = |table: &serde_json::Value| table.get("rows").and_then(|rows| rows.as_u64());
    let rate = live.map(|live| live.rate(blocks_done, rows));
    let left = blocks.saturating_sub(blocks_done);
    let waiting = live.and_then(Live::waits_for);
    BackfillStatus {
        id: row.id,
        asked: row.asked,
        state: row.state,
        reason: waiting.or(row.reason),
        blocks,
        blocks_done,
        rows_estimated: tables.iter().filter_map(estimate).sum(),
        rows,
        bytes,
        rows_per_second: rate.map(|(rows, _)| rows),
        seconds_left: rate.and_then(|(_, blocks)| left.checked_div(blocks)),
        chunks_again: live.map_or(0, |live| live.again.load(Relaxed)),
        created_at: row.created_at,
        ended_at: row.ended_at,
    }
}

impl Live {
    fn new(id: u64, parts: Vec<Part>, stop: CancellationToken) -> Self {
        let rows_before = parts.iter().map(|part| part.rows).sum();
        let blocks_before = parts.iter().map(|part| u64::from(part.blocks().1)).sum();
        let open = parts.iter().filter(|part| !part.done).map(|part| part.number).collect();
        let parts = parts.into_iter().map(|part| (part.number, part)).collect();
        Self {
            id,
            begun: Instant::now(),
            blocks_before,
            rows_before,
            parts: Mutex::new(parts),
            queue: Mutex::new(open),
            waiting: Mutex::default(),
            again: AtomicU64::new(0),
            stop,
            saved: Mutex::new(Instant::now()),
        }
    }

    fn parts(&self) -> MutexGuard<'_, BTreeMap<u32, Part>> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> Option<Part> {
        let number = self.queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front()?;
        self.parts().get(&number).cloned()
    }

    /// Rows and blocks a second.
    fn rate(&self, blocks: u64, rows: u64) -> (u64, u64) {
        let ms = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX).max(1);
        let a_second = |count: u64| count.saturating_mul(1000) / ms;
        let rows = rows.saturating_sub(self.rows_before);
        (a_second(rows), a_second(blocks.saturating_sub(self.blocks_before)))
    }

    fn waits_for(&self) -> Option<String> {
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.values().next().cloned()
    }
}

/// One worker.
struct Reader {
    number: u32,
    live: Arc<Live>,
    capturing: Arc<Capturing>,
    catalog: Catalog,
    asked: NewBackfill,
    walrace: Weak<Walrace>,
    spool: PathBuf,
    handle: Handle,
}

impl Reader {
    fn run(mut self) -> Result<Left> {
        let config = self.capturing.postgres();
        let reading = Reading {
            // Two are on their way at most.
            chunk_bytes: config.backfill.chunk_bytes_max / 2,
            chunk_time: Duration::from_millis(config.backfill.chunk_ms),
            audience: self.asked.sink.as_deref().map_or(0, Backfill::number_of),
            filter: self.asked.filter.clone(),
            columns: self.asked.columns.clone(),
            spool: self.spool.clone(),
        };
        let mut worker = None;
        let live = Arc::clone(&self.live);
        while let Some(mut part) = live.take() {
            if live.stop.is_cancelled() {
                return Ok(Left::Stopped);
            }
            let worker = match &mut worker {
                Some(worker) => worker,
                none => {
                    let source = (self.capturing.name(), self.capturing.postgres());
                    let fences = &self.capturing.fences;
                    none.insert(backfill::connect(source, fences, reading.clone(), &live.stop)?)
                }
            };
            let ended = worker.read(&mut part, &mut self);
            live.parts().insert(part.number, part);
            match ended? {
                Ended::Done => {}
                Ended::Stopped => return Ok(Left::Stopped),
                Ended::Rewritten => return Ok(Left::Rewritten),
            }
        }
        Ok(Left::Done)
    }
}

impl Progress for Reader {
    fn advanced(&mut self, part: &Part) -> Result<()> {
        let mut part = part.clone();
        part.offset = self.capturing.journal.end();
        self.live.parts().insert(part.number, part);
        {
            let mut saved = self.live.saved.lock().unwrap_or_else(PoisonError::into_inner);
            if saved.elapsed() < SAVE_EVERY {
                return Ok(());
            }
            *saved = Instant::now();
        }
        let parts: Vec<_> =
            self.live.parts().values().map(|part| (part.number, part.clone())).collect();
        self.handle.block_on(self.catalog.save_parts(self.live.id, &parts))
    }

    fn waiting(&mut self, why: Option<&str>) {
        let mut waiting = self.live.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        match why {
            Some(why) => waiting.insert(self.number, why.to_owned()),
            None => waiting.remove(&self.number),
        };
    }

    fn again(&mut self, why: &str) {
        self.live.again.fetch_add(1, Relaxed);
        self.waiting(Some(&format!("a chunk is read again: {why}")));
        tracing::debug!("backfill {} reads a chunk again: {why}", self.live.id);
    }

    fn hold(&mut self) -> Option<String> {
        if let Some(why) = self.capturing.is_short() {
            return Some(why);
        }
        let limit = self.capturing.postgres().backfill.sink_behind_bytes_max;
        let (sink, walrace) = (self.asked.sink.as_ref()?, self.walrace.upgrade()?);
        let behind = walrace.sinks.get(sink)?.status().behind_bytes;
        (limit > 0 && behind > limit)
            .then(|| format!("sink {sink} is {behind} bytes behind, more than {limit}"))
    }
}
