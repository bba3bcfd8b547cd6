//! What the loop and the consumers share: the feed in memory, and the store behind it.

use std::{
    path::Path,
    sync::{self, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{Mutex, Notify, Semaphore},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::{
    ack_id::AckIds,
    feed::{Feed, Message, Rules, Unsaved},
    ranges::Ranges,
    store::{Snapshot, Store},
};
use crate::{
    config,
    error::{Error, Result},
    failpoint,
    sink::{Beyond, Progress, Verdict},
};

/// So many messages enter the feed before consumers have a turn.
const TURN: usize = 1000;

/// One sink's stream.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) name: String,
    options: config::HttpPull,
    pub(super) stop: CancellationToken,
    /// `None` until the loop has opened it.
    store: Mutex<Option<Store>>,
    /// What is in memory, which goes on while it is written; `None` until the loop has opened it.
    state: sync::Mutex<Option<Open>>,
    /// Told when the store has what was in memory.
    saved: Notify,
    /// Told when there may be something to receive.
    pub(super) arrived: Notify,
    /// Told when the loop may go on: something was acknowledged, or came back.
    moved: Notify,
    pub(super) waiting: Semaphore,
}

/// What is in memory.
#[derive(Debug)]
pub(super) struct Open {
    pub(super) feed: Feed,
    /// As far as memory is.
    progress: Option<Progress>,
    /// As the store has it.
    stored: Option<Progress>,
    /// What is on the way to the store, or did not get there.
    saving: Unsaved,
    /// How often somebody asked for what memory had then to be saved, and the last of these that
    /// the store was given, and has.
    asked: u64,
    given: u64,
    covered: u64,
}

impl Shared {
    pub(super) fn new(name: &str, options: &config::HttpPull, stop: CancellationToken) -> Self {
        Self {
            name: name.to_owned(),
            options: options.clone(),
            stop,
            store: Mutex::default(),
            state: sync::Mutex::default(),
            saved: Notify::new(),
            arrived: Notify::new(),
            moved: Notify::new(),
            waiting: Semaphore::new(options.max_waiting.min(Semaphore::MAX_PERMITS)),
        }
    }

    /// Does something with what is in memory; `None` where that is not open.
    pub(super) fn with<T>(&self, what: impl FnOnce(&mut Open) -> T) -> Option<T> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).as_mut().map(what)
    }

    /// Whether no more is looked ahead; what was there before a restart is brought again first.
    fn is_crowded(&self, feed: &Feed) -> bool {
        if feed.catches_up() {
            return false;
        }
        let (count, bytes) = (self.options.max_ack_pending, self.options.pending_bytes_max);
        feed.len() >= count || feed.bytes() >= bytes
    }

    /// Does something for a consumer with the feed, and wakes the loop where that gave it something
    /// to hear, or room; which feed it was.
    pub(super) fn change<T>(&self, what: impl FnOnce(&mut Feed) -> T) -> Option<(u64, T)> {
        let change = |Open { feed, .. }: &mut Open| {
            let (was_crowded, had_lease) = (self.is_crowded(feed), feed.next_release().is_some());
            let done = what(feed);
            let crowded = self.is_crowded(feed);
            let has_lease = feed.next_release().is_some();
            let tell = was_crowded != crowded || had_lease != has_lease;
            (feed.made, done, tell || feed.has_verdicts(crowded))
        };
        let (made, done, tell) = self.with(change)?;
        if tell {
            self.moved.notify_waiters();
        }
        Some((made, done))
    }

    /// Whether the loop has something to hear, once leases are ended whose time is over; whether
    /// the look-ahead is full; and when the next lease ends.
    fn look(&self) -> (bool, bool, Option<Instant>) {
        let look = |Open { feed, .. }: &mut Open| {
            feed.expire();
            let crowded = self.is_crowded(feed);
            (feed.has_verdicts(crowded), crowded, feed.next_release())
        };
        self.with(look).unwrap_or_default()
    }

    /// Waits until there are verdicts.
    pub(super) async fn told(&self) {
        loop {
            let moved = self.moved.notified();
            let (told, _, release) = self.look();
            if told {
                return;
            }
            tokio::select! {
                () = moved => {}
                () = until(release) => {}
            }
        }
    }

    /// The verdicts since the last call.
    pub(super) fn verdicts(&self, hold: bool) -> Vec<(u64, Verdict)> {
        let verdicts = |open: &mut Open| {
            let crowded = self.is_crowded(&open.feed);
            open.feed.verdicts(hold, crowded)
        };
        self.with(verdicts).unwrap_or_default()
    }

    /// Waits until more may be looked ahead, or the loop has something to hear that makes room.
    async fn room(&self) -> Result<()> {
        loop {
            let moved = self.moved.notified();
            let (told, crowded, release) = self.look();
            if told || !crowded {
                return Ok(());
            }
            tokio::select! {
                () = moved => {}
                () = until(release) => {}
                () = self.stop.cancelled() => {
                    return Err(Error::retry(format!("sink {} is told to stop", self.name)));
                }
            }
        }
    }
}

/// The loop's end.
impl Shared {
    /// Opens the store, or saves what is not in it; the progress.
    pub(super) async fn open(&self, path: &Path) -> Result<Option<Progress>> {
        let mut store = self.store.lock().await;
        if let Some(store) = &mut *store {
            self.save_to(store).await?;
        }
        let store = match &mut *store {
            Some(store) => store,
            none => none.insert(Store::open(path).await?),
        };
        let progress = self.reload(store).await?;
        self.arrived.notify_waiters();
        Ok(progress)
    }

    /// The progress in the store, where it is open.
    pub(super) fn progress(&self) -> Option<Option<Progress>> {
        self.with(|open| open.stored)
    }

    fn own(&self) -> Option<Progress> {
        self.progress().flatten()
    }

    /// Makes memory what the store says.
    async fn reload(&self, store: &mut Store) -> Result<Option<Progress>> {
        let progress = store.progress().await?;
        let rules = Rules {
            lease: Duration::from_millis(self.options.ack_wait_ms),
            deliveries_max: self.options.max_deliver,
        };
        let feed = match &progress {
            None => Feed::new(0, Ranges::default(), AckIds::default(), rules),
            Some(progress) => {
                let held = store.held().await?;
                let ids = AckIds::new(&self.name, progress);
                let mut feed = Feed::new(progress.cursor, held.done, ids, rules);
                held.leases.iter().for_each(|lease| feed.remember(lease));
                held.kept.into_iter().for_each(|message| feed.push(message));
                feed.forget_done(progress.cursor);
                feed
            }
        };
        let open = Open {
            feed,
            progress,
            stored: progress,
            saving: Unsaved::default(),
            asked: 0,
            given: 0,
            covered: 0,
        };
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = Some(open);
        self.saved.notify_waiters();
        Ok(progress)
    }

    /// Adds what the loop brings of the changes at `offsets`, once there is room; how far
    /// everything is done and durable.
    pub(super) async fn write(
        &self,
        offsets: &[u64],
        messages: Vec<Message>,
        progress: &Progress,
    ) -> Result<u64> {
        if !messages.is_empty() {
            self.room().await?;
        }
        let had = self.own().map_or(0, |own| own.retry_seq);
        let retried = progress.retry_seq > had && !offsets.is_empty();
        let first = messages.first().filter(|_| !retried).map(|message| message.place.offset);
        let start = first.unwrap_or(progress.cursor).min(progress.cursor);
        self.follow(&Progress { cursor: start, retry_seq: had, ..*progress }).await?;
        let mut messages = messages.into_iter();
        while messages.len() > 0 && !retried {
            self.with(|open| messages.by_ref().take(TURN).for_each(|one| open.feed.push(one)))
                .ok_or_else(|| self.not_open())?;
            self.arrived.notify_waiters();
        }
        let finish = |open: &mut Open| {
            messages.for_each(|message| open.feed.push(Message { kept: true, ..message }));
            open.feed.written(progress.cursor);
            if retried {
                open.feed.keep(offsets);
            }
            if let Some(own) = &mut open.progress {
                own.retry_seq = progress.retry_seq;
            }
        };
        self.with(finish).ok_or_else(|| self.not_open())?;
        self.save().await?;
        match retried {
            true => Ok(progress.cursor), // the store has them, whatever else waits
            false => Ok(self.own().map_or(0, |own| own.cursor)),
        }
    }

    fn not_open(&self) -> Error {
        Error::retry(format!("sink {} is not open", self.name))
    }

    /// What is done beyond the low-water mark, and what is kept. Follows a rewind at once: what
    /// came of the epoch before says nothing of this one.
    pub(super) async fn beyond(&self, progress: &Progress) -> Result<Beyond> {
        if let Some(own) = self.own().filter(|own| own.epoch < progress.epoch) {
            self.follow(&Progress { retry_seq: own.retry_seq, ..*progress }).await?;
        }
        let beyond = |Open { feed, .. }: &mut Open| {
            let entries = feed.pending.values().filter(|entry| entry.message.kept);
            let mut out: Vec<u64> = entries.map(|entry| entry.message.place.offset).collect();
            out.dedup();
            Beyond { done: feed.done.iter().collect(), out }
        };
        Ok(self.with(beyond).unwrap_or_default())
    }

    /// The loop has written these verdicts down.
    pub(super) async fn settle(&self, told: &[(u64, Verdict)]) -> Result<()> {
        self.with(|open| open.feed.settle(told));
        failpoint::reach("pull::before_settle");
        self.save().await?;
        self.arrived.notify_waiters();
        Ok(())
    }

    /// Follows the loop into its epoch.
    async fn follow(&self, begin: &Progress) -> Result<()> {
        let own = self.own();
        if own.is_some_and(|own| (own.lineage, own.epoch) == (begin.lineage, begin.epoch)) {
            return Ok(());
        }
        let newer = |own: Progress| own.lineage == begin.lineage && own.epoch < begin.epoch;
        if !own.is_none_or(newer) {
            return Err(Error::retry(format!(
                "the store of sink {} is not where its loop left it: another walrace writes to it",
                self.name
            )));
        }
        let mut store = self.store.lock().await;
        let store = store.as_mut().ok_or_else(|| self.not_open())?;
        store.begin(begin).await?;
        failpoint::reach("pull::after_begin");
        let progress = self.reload(store).await?;
        progress.map(drop).ok_or_else(|| Error::bug("an epoch that was begun is not there"))
    }

    /// Makes durable what memory has ahead of the store; in which feed that was. One write serves
    /// all who wait for the one before. What fails, or is left by a caller who went away, is saved
    /// with the next.
    pub(super) async fn save(&self) -> Result<Option<u64>> {
        let ask = |open: &mut Open| {
            open.asked += 1;
            (open.feed.made, open.asked)
        };
        let Some((made, turn)) = self.with(ask) else { return Ok(None) };
        loop {
            let saved = self.saved.notified();
            let now = self.with(|open| (open.feed.made, open.covered));
            if let Some((now, covered)) = now
                && (now != made || covered >= turn)
            {
                return Ok(Some(now));
            }
            tokio::select! {
                () = saved => {}
                mut store = self.store.lock() => match &mut *store {
                    Some(store) => self.save_to(store).await?,
                    None => return Ok(None),
                },
            }
        }
    }

    async fn save_to(&self, store: &mut Store) -> Result<()> {
        if let Some(snapshot) = self.with(Open::snapshot).flatten() {
            store.save(&snapshot).await?;
            self.with(|open| open.saved(&snapshot.progress));
        }
        self.saved.notify_waiters();
        Ok(())
    }
}

/// Waits until then; for ever where it says nothing.
async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

impl Open {
    /// What the store lacks.
    fn snapshot(&mut self) -> Option<Snapshot> {
        self.given = self.asked;
        self.saving = self.feed.take_unsaved(std::mem::take(&mut self.saving));
        let cursor = self.progress.map(|own| self.feed.low().max(own.cursor));
        let own = self.progress.zip(cursor).map(|(own, cursor)| Progress { cursor, ..own });
        let Some(progress) = own.filter(|own| !self.saving.is_empty() || self.stored != Some(*own))
        else {
            self.covered = self.given;
            return None;
        };
        let Unsaved { leases, over, ranges, keep, unkept } = &self.saving;
        let kept = keep.iter().filter_map(|place| self.feed.pending.get(place));
        Some(Snapshot {
            leases: self.feed.stored(leases),
            over: over.clone(),
            done: ranges.iter().collect(),
            keep: kept.map(|entry| entry.message.clone()).collect(),
            unkept: unkept.clone(),
            progress,
        })
    }

    /// The store has the last snapshot.
    fn saved(&mut self, progress: &Progress) {
        self.saving = Unsaved::default();
        self.covered = self.given;
        self.stored = Some(*progress);
        if let Some(own) = &mut self.progress {
            own.cursor = progress.cursor;
        }
        self.feed.forget(progress.cursor);
    }
}
