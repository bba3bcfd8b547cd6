//! What lies between the reader thread and the source: a queue of batches, and what is confirmed.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::sync::Notify;

use super::stats::Stats;
use crate::{
    change::{Batch, Change, Lsn},
    error::{Error, Result},
};

/// Changes that were read and not yet taken: beyond this the reader stops reading.
const QUEUE_BYTES_MAX: usize = 16 << 20;
/// `next` merges what waits up to this size.
const BATCH_BYTES_MAX: usize = 4 << 20;

/// What the reader thread and the source share.
pub(super) struct Shared {
    queue: Mutex<Queue>,
    room: Condvar,
    arrived: Notify,
    /// All below it is durable with us.
    pub(super) confirmed: AtomicU64,
    stop: AtomicBool,
    pub(super) stats: Arc<Stats>,
}

#[derive(Default)]
struct Queue {
    batches: VecDeque<(Batch, usize)>,
    bytes: usize,
    ended: bool,
    error: Option<Error>,
}

impl Shared {
    /// An empty queue, confirmed up to `start`.
    pub(super) fn new(start: Lsn, stats: Arc<Stats>) -> Self {
        Self {
            queue: Mutex::default(),
            room: Condvar::new(),
            arrived: Notify::new(),
            confirmed: AtomicU64::new(start.0),
            stop: AtomicBool::new(false),
            stats,
        }
    }

    /// The next batch, merged from what waits; the reader's error once all is taken.
    pub(super) async fn next(&self) -> Result<Batch> {
        loop {
            if let Some(outcome) = self.take() {
                return outcome;
            }
            self.arrived.notified().await;
        }
    }

    /// Raises what is confirmed; it never falls.
    pub(super) fn confirm(&self, lsn: Lsn) {
        self.confirmed.fetch_max(lsn.0, Ordering::AcqRel);
    }

    /// Asks the reader to end.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.room.notify_all();
    }

    /// Whether the reader should end.
    pub(super) fn stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    fn take(&self) -> Option<Result<Batch>> {
        let mut queue = self.lock();
        let Some((mut batch, mut size)) = queue.batches.pop_front() else {
            let ended = || Error::retry("the replication stream has ended");
            return queue.ended.then(|| Err(queue.error.take().unwrap_or_else(ended)));
        };
        // A batch that leaves a transaction open would take away the position of one before it.
        while let Some((next, more)) = queue.batches.front()
            && size + more <= BATCH_BYTES_MAX
            && (batch.position.is_none() || next.position.is_some())
        {
            size += more;
            let Some((next, _)) = queue.batches.pop_front() else { break };
            batch.changes.extend(next.changes);
            batch.position = next.position;
        }
        queue.bytes -= size;
        self.room.notify_all();
        Some(Ok(batch))
    }

    /// Waits until there is room for more, or nobody wants more; false where that takes longer than
    /// `limit`.
    pub(super) fn wait_for_room(&self, limit: Duration) -> bool {
        let full = |queue: &mut Queue| queue.bytes >= QUEUE_BYTES_MAX && !self.stopped();
        let waited = self.room.wait_timeout_while(self.lock(), limit, full);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// Adds a batch behind what waits.
    pub(super) fn put(&self, batch: Batch) {
        let size = batch.bytes() + batch.changes.len() * size_of::<Change>();
        let mut queue = self.lock();
        queue.bytes += size;
        queue.batches.push_back((batch, size));
        drop(queue);
        self.arrived.notify_one();
    }

    /// Ends the queue behind what is in it.
    pub(super) fn end(&self, error: Option<Error>) {
        let mut queue = self.lock();
        queue.ended = true;
        // The first one is the cause.
        queue.error = queue.error.take().or(error);
        drop(queue);
        self.arrived.notify_one();
        self.room.notify_all();
    }

    /// Ends the stream with `error`, which another thread has found.
    pub(super) fn fail(&self, error: Error) {
        self.end(Some(error));
        self.stop();
    }

    /// Waits until the reader has ended, but not longer than `limit`.
    pub(super) fn wait_for_end(&self, limit: Duration) {
        let waited = self.room.wait_timeout_while(self.lock(), limit, |queue| !queue.ended);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        // A queue of whole batches is sound whatever thread died with it.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::Position;

    fn batch(position: Option<u64>, count: usize) -> Batch {
        let change = Change {
            offset: 0,
            op: crate::change::Op::Message,
            index: 0,
            closes_transaction: false,
            transaction: crate::change::Transaction::default(),
            table: None,
            before: crate::change::Before::Nothing,
            after: None,
            message: None,
            shaped: None,
            backfill: None,
        };
        let at = |lsn| Position { timeline: 1, lsn: Lsn(lsn), index: 0 };
        Batch { changes: vec![change; count], position: position.map(at) }
    }

    #[test]
    fn what_waits_is_merged_but_never_behind_an_open_end() {
        let shared = Shared::new(Lsn(0), Arc::default());
        for (position, count) in [(Some(1), 1), (Some(2), 2), (None, 1), (None, 1), (Some(3), 1)] {
            shared.put(batch(position, count));
        }
        let sizes = |batch: Batch| (batch.changes.len(), batch.position.map(|at| at.lsn.0));
        assert_eq!(sizes(shared.take().unwrap().unwrap()), (3, Some(2)));
        assert_eq!(sizes(shared.take().unwrap().unwrap()), (3, Some(3)));
        assert!(shared.take().is_none());
        assert_eq!(shared.lock().bytes, 0);
    }

    #[test]
    fn an_error_comes_after_all_that_was_read_before_it() {
        let shared = Shared::new(Lsn(0), Arc::default());
        shared.put(batch(Some(1), 1));
        shared.end(Some(Error::config("gone")));
        assert!(shared.take().unwrap().is_ok());
        assert_eq!(shared.take().unwrap().unwrap_err().summary(), "gone");
        assert!(shared.take().unwrap().is_err());
    }

    #[test]
    fn what_is_confirmed_never_falls() {
        let shared = Shared::new(Lsn(10), Arc::default());
        shared.confirm(Lsn(30));
        shared.confirm(Lsn(20));
        assert_eq!(shared.confirmed.load(Ordering::Acquire), 30);
    }
}
