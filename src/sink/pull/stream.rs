//! What the loop and the consumers share, and the consumers' end of it.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::{
    sync::{Mutex, MutexGuard, Notify, Semaphore},
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{
    ack_id,
    feed::{Feed, Message, Unsaved},
    ranges::Ranges,
    store::Store,
};
use crate::{
    config,
    error::{Error, Result},
    failpoint,
    sink::{Beyond, Progress, Verdict},
};

/// So long an acknowledgement waits for a sink that is just opening.
const OPENING: Duration = Duration::from_secs(5);

/// One sink's stream.
#[derive(Debug)]
pub(super) struct Shared {
    name: String,
    options: config::HttpPull,
    stop: CancellationToken,
    /// `None` until the loop has opened it.
    pub(super) state: Mutex<Option<Open>>,
    /// Told when there may be something to receive.
    pub(super) arrived: Notify,
    /// Told when the loop may go on: something was acknowledged, or came back.
    moved: Notify,
    waiting: Semaphore,
}

/// The feed and the store behind it.
#[derive(Debug)]
pub(super) struct Open {
    name: String,
    store: Store,
    feed: Feed,
    /// As the store has it.
    progress: Option<Progress>,
    lease: Duration,
    deliveries_max: Option<u32>,
}

impl Shared {
    pub(super) fn new(name: &str, options: &config::HttpPull, stop: CancellationToken) -> Self {
        Self {
            name: name.to_owned(),
            options: options.clone(),
            stop,
            state: Mutex::default(),
            arrived: Notify::new(),
            moved: Notify::new(),
            waiting: Semaphore::new(options.max_waiting.min(Semaphore::MAX_PERMITS)),
        }
    }

    pub(super) fn begin(&self, store: Store) -> Open {
        let (name, feed) = (self.name.clone(), Feed::default());
        let lease = Duration::from_millis(self.options.ack_wait_ms);
        let deliveries_max = self.options.max_deliver;
        Open { name, store, feed, progress: None, lease, deliveries_max }
    }

    /// Whether no more is looked ahead; what was there before a restart is brought again first.
    fn is_crowded(&self, feed: &Feed) -> bool {
        if feed.catches_up() {
            return false;
        }
        let (count, bytes) = (self.options.max_ack_pending, self.options.pending_bytes_max);
        feed.len() >= count || feed.bytes() >= bytes
    }

    /// Whether the loop has something to hear, once leases are ended whose time is over, and when
    /// the next one ends.
    fn look(&self, state: &mut Option<Open>) -> (bool, Option<Instant>) {
        let Some(Open { feed, .. }) = state else { return (false, None) };
        feed.expire();
        (feed.has_verdicts(self.is_crowded(feed)), feed.next_release())
    }

    /// Waits until there are verdicts.
    pub(super) async fn told(&self) {
        loop {
            let moved = self.moved.notified();
            let mut state = self.state.lock().await;
            let (told, release) = self.look(&mut state);
            drop(state);
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
    pub(super) async fn verdicts(&self, hold: bool) -> Vec<(u64, Verdict)> {
        let mut state = self.state.lock().await;
        let Some(open) = state.as_mut() else { return Vec::new() };
        let crowded = self.is_crowded(&open.feed);
        open.feed.verdicts(hold, crowded)
    }

    /// Waits until more may be looked ahead, or the loop has something to hear that makes room.
    pub(super) async fn with_room(&self, needed: bool) -> Result<MutexGuard<'_, Option<Open>>> {
        loop {
            let moved = self.moved.notified();
            let mut state = self.state.lock().await;
            let (told, release) = self.look(&mut state);
            if !needed || told || state.as_ref().is_none_or(|open| !self.is_crowded(&open.feed)) {
                return Ok(state);
            }
            drop(state);
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

impl Open {
    pub(super) fn progress(&self) -> Option<Progress> {
        self.progress
    }

    /// Makes memory what the store says.
    pub(super) async fn reload(&mut self) -> Result<()> {
        self.progress = self.store.progress().await?;
        let Some(Progress { epoch, cursor, .. }) = self.progress else {
            self.feed = Feed::new(0, Ranges::default(), self.deliveries_max);
            return Ok(());
        };
        let held = self.store.held().await?;
        let mut feed = Feed::new(cursor, held.done, self.deliveries_max);
        for (place, lease) in held.leases {
            feed.remember(place, ack_id(&self.name, epoch, place), lease);
        }
        for (place, keys, body) in held.kept {
            let ack_id = ack_id(&self.name, epoch, place);
            feed.push(Message { place, ack_id, keys, body, kept: true }, self.lease);
        }
        self.feed = feed;
        Ok(())
    }

    /// Adds what the loop brings of the changes at `offsets`; the low-water mark, durable.
    pub(super) async fn write(
        &mut self,
        offsets: &[u64],
        messages: Vec<Message>,
        progress: &Progress,
    ) -> Result<u64> {
        let had = self.progress.map_or(0, |own| own.retry_seq);
        let retried = progress.retry_seq > had && !offsets.is_empty();
        let first = messages.first().filter(|_| !retried).map(|message| message.place.offset);
        let start = first.unwrap_or(progress.cursor).min(progress.cursor);
        let begin = Progress { cursor: start, retry_seq: had, ..*progress };
        let own = self.follow(&begin).await?;
        let own = Progress { retry_seq: progress.retry_seq, ..own };
        for message in messages {
            self.feed.push(Message { kept: retried, ..message }, self.lease);
        }
        self.feed.written(progress.cursor);
        if retried {
            self.feed.keep(offsets);
            self.save_as(own).await?;
            return Ok(progress.cursor); // the store has them, whatever else waits
        }
        self.save_as(own).await?;
        Ok(self.feed.low())
    }

    /// What is done beyond the low-water mark, and what is kept. Follows a rewind at once: what
    /// came of the epoch before says nothing of this one.
    pub(super) async fn beyond(&mut self, progress: &Progress) -> Result<Beyond> {
        if let Some(own) = self.progress.filter(|own| own.epoch < progress.epoch) {
            self.follow(&Progress { retry_seq: own.retry_seq, ..*progress }).await?;
        }
        let entries = self.feed.pending.values().filter(|entry| entry.message.kept);
        let mut out: Vec<u64> = entries.map(|entry| entry.message.place.offset).collect();
        out.dedup();
        Ok(Beyond { done: self.feed.done.iter().collect(), out })
    }

    /// The loop has written these verdicts down.
    pub(super) async fn settle(&mut self, told: &[(u64, Verdict)]) -> Result<()> {
        self.feed.settle(told);
        failpoint::reach("pull::before_settle");
        self.save().await
    }

    /// Follows the loop into its epoch.
    async fn follow(&mut self, begin: &Progress) -> Result<Progress> {
        if let Some(own) = self.progress
            && (own.lineage, own.epoch) == (begin.lineage, begin.epoch)
        {
            return Ok(own);
        }
        let newer = |own: Progress| own.lineage == begin.lineage && own.epoch < begin.epoch;
        if !self.progress.is_none_or(newer) {
            return Err(Error::retry(format!(
                "the store of sink {} is not where its loop left it: another walrace writes to it",
                self.name
            )));
        }
        self.store.begin(begin).await?;
        failpoint::reach("pull::after_begin");
        self.reload().await?;
        self.progress.ok_or_else(|| Error::bug("an epoch that was begun is not there"))
    }

    /// Makes what memory has ahead of the store durable. What a caller who went away left unsaved
    /// is saved with the next.
    pub(super) async fn save(&mut self) -> Result<()> {
        match self.progress {
            Some(own) => self.save_as(own).await,
            None => Ok(()),
        }
    }

    async fn save_as(&mut self, own: Progress) -> Result<()> {
        let progress = Progress { cursor: self.feed.low().max(own.cursor), ..own };
        if self.feed.unsaved.is_empty() && self.progress == Some(progress) {
            return Ok(());
        }
        let entries =
            self.feed.unsaved.keep.iter().filter_map(|place| self.feed.pending.get(place));
        let keep: Vec<&Message> = entries.map(|entry| &entry.message).collect();
        self.store.save(&self.feed.unsaved, &keep, &progress).await?;
        self.feed.unsaved = Unsaved::default();
        self.feed.forget(progress.cursor);
        self.progress = Some(progress);
        Ok(())
    }
}

/// One message as a consumer gets it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pulled {
    /// What acknowledges it; the same on every delivery.
    pub ack_id: Uuid,
    /// JSON.
    pub body: Bytes,
}

/// The consumers' end of an `http_pull` sink. Cheap to clone.
///
/// What a request changes in memory it saves in a second turn of the lock. Requests that wait
/// meanwhile have their first turn before it, so that one write to the disk serves them all: whose
/// turn comes later finds nothing unsaved, unless that write failed.
#[derive(Clone, Debug)]
pub struct Stream(Arc<Shared>);

impl Stream {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self(shared)
    }

    /// Leases up to `max` messages in the order of their offsets, at most one of each key. Waits
    /// up to `wait` for the first; `None` where too many wait already. What it returns is durably
    /// leased.
    pub async fn receive(&self, max: usize, wait: Duration) -> Result<Option<Vec<Pulled>>> {
        let deadline = Instant::now() + wait;
        let mut permit = None;
        loop {
            let arrived = self.0.arrived.notified();
            let (messages, release) = self.take(max).await?;
            let over = Instant::now() >= deadline || self.0.stop.is_cancelled();
            if !messages.is_empty() || over {
                return Ok(Some(messages));
            }
            if permit.is_none() {
                permit = self.0.waiting.try_acquire().ok();
            }
            if permit.is_none() {
                return Ok(None);
            }
            let until = release.map_or(deadline, |release| release.min(deadline));
            tokio::select! {
                () = arrived => {}
                () = tokio::time::sleep_until(until) => {}
                () = self.0.stop.cancelled() => {}
            }
        }
    }

    /// What can be had now, and when more may be because a lease ends.
    async fn take(&self, max: usize) -> Result<(Vec<Pulled>, Option<Instant>)> {
        let (made, messages, release) = {
            let mut state = self.0.state.lock().await;
            let Some(open) = state.as_mut() else { return Ok((Vec::new(), None)) };
            (open.feed.made, open.feed.take(max, open.lease), open.feed.next_release())
        };
        if !messages.is_empty() {
            failpoint::reach("pull::before_lease");
            let mut state = self.0.state.lock().await;
            let Some(open) = state.as_mut().filter(|open| open.feed.made == made) else {
                return Ok((Vec::new(), None)); // opened anew: nobody has them
            };
            if let Err(error) = open.save().await {
                messages.iter().for_each(|(id, _)| open.feed.nack(id));
                return Err(error);
            }
            failpoint::reach("pull::after_lease");
        }
        let pulled = |(ack_id, body)| Pulled { ack_id, body };
        self.0.moved.notify_waiters();
        Ok((messages.into_iter().map(pulled).collect(), release))
    }

    /// Is done with these messages for good. Unknown ids, and those that are done, are nothing new.
    pub async fn ack(&self, ids: &[Uuid]) -> Result<()> {
        self.settle(ids, Feed::ack).await
    }

    /// Gives these messages back: anybody may have them at once.
    pub async fn nack(&self, ids: &[Uuid]) -> Result<()> {
        self.settle(ids, Feed::nack).await
    }

    async fn settle(&self, ids: &[Uuid], of_one: fn(&mut Feed, &Uuid)) -> Result<()> {
        loop {
            let made = self.open().await?.as_mut().map(|open| {
                ids.iter().for_each(|id| of_one(&mut open.feed, id));
                open.feed.made
            });
            failpoint::reach("pull::before_ack");
            let mut state = self.0.state.lock().await;
            // Opened anew meanwhile, it knows nothing of this.
            if let Some(open) = state.as_mut().filter(|open| Some(open.feed.made) == made) {
                open.save().await?;
                break;
            }
        }
        failpoint::reach("pull::after_ack");
        self.0.arrived.notify_waiters();
        self.0.moved.notify_waiters();
        Ok(())
    }

    async fn open(&self) -> Result<MutexGuard<'_, Option<Open>>> {
        let deadline = Instant::now() + OPENING;
        loop {
            let arrived = self.0.arrived.notified();
            let state = self.0.state.lock().await;
            if state.is_some() {
                return Ok(state);
            }
            drop(state);
            if tokio::time::timeout_at(deadline, arrived).await.is_err() {
                return Err(Error::retry(format!("sink {} is not open yet", self.0.name)));
            }
        }
    }
}

/// Waits until then; for ever where it says nothing.
async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
