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
    store::Store,
};
use crate::{
    config,
    error::{Error, Result},
    failpoint,
    sink::Progress,
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
    /// Told when something was acknowledged.
    acked: Notify,
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
}

impl Shared {
    pub(super) fn new(name: &str, options: &config::HttpPull, stop: CancellationToken) -> Self {
        Self {
            name: name.to_owned(),
            options: options.clone(),
            stop,
            state: Mutex::default(),
            arrived: Notify::new(),
            acked: Notify::new(),
            waiting: Semaphore::new(options.max_waiting.min(Semaphore::MAX_PERMITS)),
        }
    }

    pub(super) fn begin(&self, store: Store) -> Open {
        let (name, feed) = (self.name.clone(), Feed::default());
        let lease = Duration::from_millis(self.options.ack_wait_ms);
        Open { name, store, feed, progress: None, lease }
    }

    /// Waits until more may be looked ahead.
    pub(super) async fn with_room(&self, needed: bool) -> Result<MutexGuard<'_, Option<Open>>> {
        let (count, bytes) = (self.options.max_ack_pending, self.options.pending_bytes_max);
        let has_room = |open: &Open| open.feed.len() < count && open.feed.bytes() < bytes;
        loop {
            let acked = self.acked.notified();
            let state = self.state.lock().await;
            if !needed || state.as_ref().is_none_or(has_room) {
                return Ok(state);
            }
            drop(state);
            tokio::select! {
                () = acked => {}
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
            self.feed = Feed::default();
            return Ok(());
        };
        let held = self.store.held().await?;
        let mut feed = Feed::new(cursor, held.done);
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

    /// Adds what the loop brings; the low-water mark, durable.
    pub(super) async fn write(
        &mut self,
        mut messages: Vec<Message>,
        progress: &Progress,
    ) -> Result<u64> {
        let had = self.progress.map_or(0, |own| own.retry_seq);
        let retried = progress.retry_seq > had && !messages.is_empty();
        let first = messages.first().filter(|_| !retried).map(|message| message.place.offset);
        let start = first.unwrap_or(progress.cursor).min(progress.cursor);
        let begin = Progress { cursor: start, retry_seq: had, ..*progress };
        let own = self.follow(&begin).await?;
        if retried {
            messages.iter_mut().for_each(|message| message.kept = true);
            let own = Progress { retry_seq: progress.retry_seq, ..own };
            self.store.keep(&messages, &own).await?;
            self.progress = Some(own);
        }
        for message in messages {
            self.feed.push(message, self.lease);
        }
        if retried {
            return Ok(progress.cursor); // the store has them, whatever else waits
        }
        self.feed.written(progress.cursor);
        self.save_as(Progress { retry_seq: progress.retry_seq, ..own }).await?;
        Ok(self.feed.low())
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
        self.store.save(&self.feed.unsaved, &progress).await?;
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
        let (messages, release) = {
            let mut state = self.0.state.lock().await;
            let Some(open) = state.as_mut() else { return Ok((Vec::new(), None)) };
            (open.feed.take(max, open.lease), open.feed.next_release())
        };
        if !messages.is_empty() {
            failpoint::reach("pull::before_lease");
            let mut state = self.0.state.lock().await;
            if let Some(open) = state.as_mut()
                && let Err(error) = open.save().await
            {
                messages.iter().for_each(|(id, _)| open.feed.nack(id));
                return Err(error);
            }
            failpoint::reach("pull::after_lease");
        }
        let pulled = |(ack_id, body)| Pulled { ack_id, body };
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
        if let Some(open) = self.open().await?.as_mut() {
            ids.iter().for_each(|id| of_one(&mut open.feed, id));
        }
        failpoint::reach("pull::before_ack");
        if let Some(open) = self.0.state.lock().await.as_mut() {
            open.save().await?;
        }
        failpoint::reach("pull::after_ack");
        self.0.arrived.notify_waiters();
        self.0.acked.notify_waiters();
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
