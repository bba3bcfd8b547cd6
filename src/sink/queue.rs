//! A bounded queue inside a Rust program that embeds Walrace: any number of sinks write, one
//! subscription reads.
//!
//! A change stays in the queue until the subscriber comes back for more: only then does the sink's
//! progress pass it. A subscriber that is dropped in between leaves its changes to the next one.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use tokio::{sync::Notify, time::Instant};
use uuid::Uuid;

use super::{Capabilities, Progress, Sink, With, Written};
use crate::{
    change::{Batch, Change},
    config,
    error::{Error, Result},
};

/// The queues of a program, by the name of their sink. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Queues(Arc<Mutex<HashMap<String, Arc<Shared>>>>);

impl Queues {
    /// Reads what the sink `name` delivers, now or once there is such a sink. A queue has one
    /// subscription at a time; a second is refused.
    pub fn subscribe(&self, name: &str) -> Result<Subscription> {
        let shared = self.shared(name);
        if std::mem::replace(&mut shared.lock().subscribed, true) {
            return Err(Error::config(format!("the queue `{name}` has a subscription already"))
                .remedy("drop the other one first"));
        }
        Ok(Subscription { shared, linger: Duration::ZERO })
    }

    fn shared(&self, name: &str) -> Arc<Shared> {
        let mut queues = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(queues.entry(name.to_owned()).or_default())
    }
}

/// One run of changes of one source, in order.
#[derive(Debug)]
pub struct Delivery {
    /// The changes: at least one, at most as many as were asked for.
    pub changes: Vec<Change>,
    /// The history that `cursor` counts in.
    pub lineage: Uuid,
    /// The offset after the last of them: with the lineage, where to go on.
    pub cursor: u64,
}

/// The reading end of a queue.
#[derive(Debug)]
pub struct Subscription {
    shared: Arc<Shared>,
    linger: Duration,
}

impl Subscription {
    /// Lets a delivery that is not full wait this long for more. By default none waits.
    #[must_use]
    pub fn linger(mut self, linger: Duration) -> Self {
        self.linger = linger;
        self
    }

    /// Says that the delivery before this one is dealt with, and waits for at most `max` changes
    /// (at least 1). `None` once every sink that wrote to the queue has ended and it is empty.
    /// Cancel-safe.
    pub async fn next(&mut self, max: usize) -> Option<Delivery> {
        self.done();
        let max = max.max(1);
        let mut deadline = None;
        loop {
            let arrived = self.shared.arrived.notified();
            {
                let mut state = self.shared.lock();
                let ready = state.run(max);
                if ready == 0 && state.ended {
                    return None;
                }
                if ready > 0 {
                    let until = *deadline.get_or_insert_with(|| Instant::now() + self.linger);
                    let more = ready < max && ready == state.items.len() && !state.ended;
                    // A full queue cannot bring more, however long we wait.
                    if !more || state.is_full() || Instant::now() >= until {
                        return state.hand_out(ready);
                    }
                }
            }
            match deadline {
                None => arrived.await,
                Some(until) => {
                    let _ = tokio::time::timeout_at(until, arrived).await;
                }
            }
        }
    }

    /// Says that the last delivery is dealt with, without asking for the next.
    pub fn done(&mut self) {
        let mut state = self.shared.lock();
        for _ in 0..std::mem::take(&mut state.handed) {
            if let Some(item) = state.items.pop_front() {
                item.pending.fetch_sub(1, Ordering::Relaxed);
            }
        }
        drop(state);
        self.shared.taken.notify_waiters();
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.handed = 0;
        state.subscribed = false;
    }
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    arrived: Notify,
    taken: Notify,
}

#[derive(Debug, Default)]
struct State {
    items: VecDeque<Item>,
    /// So many at the front are with the subscriber, who is not done with them.
    handed: usize,
    subscribed: bool,
    /// Sinks that write now, and whether there were some and all have ended.
    sinks: usize,
    ended: bool,
    capacity: usize,
}

#[derive(Debug)]
struct Item {
    change: Change,
    lineage: Uuid,
    /// Changes of the same sink that the subscriber is not done with.
    pending: Arc<AtomicUsize>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change of the state is complete before anything in it could panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn is_full(&self) -> bool {
        self.items.len() >= self.capacity
    }

    /// Length of the run of one lineage at the front, up to `max`.
    fn run(&self, max: usize) -> usize {
        let Some(first) = self.items.front() else { return 0 };
        self.items.iter().take(max).take_while(|item| item.lineage == first.lineage).count()
    }

    fn hand_out(&mut self, count: usize) -> Option<Delivery> {
        self.handed = count;
        let items = self.items.iter().take(count);
        let changes: Vec<Change> = items.map(|item| item.change.clone()).collect();
        let cursor = changes.last()?.offset + 1;
        Some(Delivery { changes, lineage: self.items.front()?.lineage, cursor })
    }

    /// Takes back what a cancelled write left and nobody has seen.
    fn withdraw(&mut self, pending: &Arc<AtomicUsize>) {
        let mut at = 0;
        let handed = self.handed;
        self.items.retain(|item| {
            at += 1;
            at <= handed || !Arc::ptr_eq(&item.pending, pending)
        });
    }
}

/// The `queue` sink.
pub(super) struct Queue {
    shared: Arc<Shared>,
    lineage: Uuid,
    pending: Arc<AtomicUsize>,
}

impl Queue {
    pub(super) fn new(options: &config::Queue, with: With) -> Result<Self> {
        let With { name, context, .. } = with;
        with.refuse_types()?;
        if options.capacity == 0 {
            return Err(Error::config(format!("`sink.{name}.capacity` must be at least 1")));
        }
        let shared = context.queues.shared(name);
        {
            let mut state = shared.lock();
            state.capacity = state.capacity.max(options.capacity);
            state.sinks += 1;
            state.ended = false;
        }
        Ok(Self { shared, lineage: context.lineage, pending: Arc::default() })
    }

    /// Waits for room, then adds as many changes as there is room for.
    async fn push(&self, changes: &[Change]) -> usize {
        loop {
            let taken = self.shared.taken.notified();
            {
                let mut state = self.shared.lock();
                let room = state.capacity.saturating_sub(state.items.len());
                let count = room.min(changes.len());
                for change in changes.iter().take(count) {
                    let (change, lineage) = (change.clone(), self.lineage);
                    let pending = Arc::clone(&self.pending);
                    state.items.push_back(Item { change, lineage, pending });
                }
                self.pending.fetch_add(count, Ordering::Relaxed);
                if count > 0 {
                    drop(state);
                    self.shared.arrived.notify_waiters();
                    return count;
                }
            }
            taken.await;
        }
    }
}

#[async_trait]
impl Sink for Queue {
    fn capabilities(&self) -> Capabilities {
        // The program that embeds Walrace sees the change as the rules left it.
        Capabilities { routes: true, headers: true, ..Capabilities::default() }
    }

    async fn open(&mut self) -> Result<Option<Progress>> {
        self.shared.lock().withdraw(&self.pending);
        self.pending = Arc::default();
        self.shared.taken.notify_waiters();
        Ok(None)
    }

    async fn write(&mut self, batch: &Batch, _progress: &Progress) -> Result<Written> {
        let mut rest = batch.changes.as_slice();
        while !rest.is_empty() {
            let pushed = self.push(rest).await;
            rest = rest.get(pushed..).unwrap_or_default();
        }
        loop {
            let taken = self.shared.taken.notified();
            if self.pending.load(Ordering::Relaxed) == 0 {
                return Ok(Written::All);
            }
            taken.await;
        }
    }

    async fn close(&mut self) -> Result<()> {
        Ok(())
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.withdraw(&self.pending);
        state.sinks -= 1;
        state.ended = state.sinks == 0;
        drop(state);
        self.shared.arrived.notify_waiters();
        self.shared.taken.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use tokio::task::JoinHandle;

    use super::*;
    use crate::{
        error::Class,
        sink::{
            Context,
            testing::{batch, context, progress, with},
        },
    };

    fn queue(context: &Context, capacity: usize) -> Queue {
        Queue::new(&config::Queue { capacity }, With { name: "q", ..with(context) }).unwrap()
    }

    #[expect(clippy::disallowed_methods, reason = "the tests await what they spawn")]
    fn write(mut queue: Queue, range: std::ops::Range<u64>) -> JoinHandle<Queue> {
        tokio::spawn(async move {
            let written = queue.write(&batch(range.clone()), &progress(range.end)).await;
            assert!(matches!(written, Ok(Written::All)));
            queue
        })
    }

    fn offsets(delivery: &Delivery) -> Vec<u64> {
        delivery.changes.iter().map(|change| change.offset).collect()
    }

    /// Lets every task that can run do so: the runtime of these tests has one thread.
    async fn settle() {
        for _ in 0..20 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn a_write_returns_once_the_subscriber_is_done_with_it() {
        let context = context();
        let mut subscription = context.queues.subscribe("q").unwrap();
        let writer = write(queue(&context, 100), 0..5);
        let first = subscription.next(3).await.unwrap();
        assert_eq!((offsets(&first), first.cursor), (vec![0, 1, 2], 3));
        assert_eq!(first.lineage, context.lineage);
        let second = subscription.next(3).await.unwrap();
        assert_eq!(offsets(&second), [3, 4]);
        settle().await;
        assert!(!writer.is_finished(), "progress must wait for the subscriber");
        subscription.done();
        drop(writer.await.unwrap());
        assert!(subscription.next(3).await.is_none());
    }

    #[tokio::test]
    async fn a_full_queue_blocks_its_writer_and_keeps_the_order() {
        let context = context();
        let mut subscription = context.queues.subscribe("q").unwrap();
        let writer = write(queue(&context, 4), 0..50);
        let mut seen = Vec::new();
        while seen.len() < 50 {
            settle().await;
            assert!(context.queues.shared("q").lock().items.len() <= 4);
            let delivery = subscription.next(3).await.unwrap();
            assert!(delivery.changes.len() <= 3);
            seen.extend(offsets(&delivery));
        }
        subscription.done();
        writer.await.unwrap();
        assert_eq!(seen, (0..50).collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn what_a_dropped_subscriber_had_comes_again() {
        let context = context();
        let mut subscription = context.queues.subscribe("q").unwrap();
        assert_eq!(context.queues.subscribe("q").unwrap_err().class(), Class::Config);
        let writer = write(queue(&context, 10), 0..4);
        assert_eq!(offsets(&subscription.next(2).await.unwrap()), [0, 1]);
        drop(subscription);
        let mut subscription = context.queues.subscribe("q").unwrap();
        assert_eq!(offsets(&subscription.next(9).await.unwrap()), [0, 1, 2, 3]);
        subscription.done();
        writer.await.unwrap();
    }

    #[tokio::test]
    async fn a_delivery_that_is_not_full_waits_for_more_but_not_for_ever() {
        let context = context();
        let linger = Duration::from_millis(20);
        let mut subscription = context.queues.subscribe("q").unwrap().linger(linger);
        let first = write(queue(&context, 10), 0..2);
        let start = Instant::now();
        assert_eq!(offsets(&subscription.next(5).await.unwrap()), [0, 1]);
        assert!(start.elapsed() >= linger);
        subscription.done();
        let keep = first.await.unwrap();
        let mut subscription = subscription.linger(Duration::from_secs(3600));
        let second = write(queue(&context, 10), 2..7);
        let full = tokio::time::timeout(Duration::from_secs(60), subscription.next(5));
        assert_eq!(offsets(&full.await.unwrap().unwrap()), [2, 3, 4, 5, 6]);
        subscription.done();
        drop((keep, second.await.unwrap()));
    }

    #[tokio::test]
    async fn several_sinks_write_and_a_delivery_never_mixes_two_histories() {
        let one = context();
        let two = Context { lineage: Uuid::from_u128(8), ..one.clone() };
        let mut subscription = one.queues.subscribe("q").unwrap();
        let writers = [write(queue(&one, 100), 0..10), write(queue(&two, 100), 0..10)];
        let mut seen: HashMap<Uuid, Vec<u64>> = HashMap::new();
        while seen.values().map(Vec::len).sum::<usize>() < 20 {
            let delivery = subscription.next(7).await.unwrap();
            seen.entry(delivery.lineage).or_default().extend(offsets(&delivery));
        }
        subscription.done();
        for writer in writers {
            writer.await.unwrap();
        }
        assert!(seen.values().all(|seen| *seen == (0..10).collect::<Vec<_>>()), "{seen:?}");
        assert_eq!(seen.len(), 2);
    }

    #[tokio::test]
    async fn a_cancelled_write_leaves_nothing_that_nobody_has_seen() {
        let context = context();
        let mut queue = queue(&context, 100);
        let (changes, at) = (batch(0..5), progress(5));
        let cancelled = tokio::time::timeout(Duration::from_millis(5), queue.write(&changes, &at));
        assert!(cancelled.await.is_err());
        assert_eq!(queue.open().await.unwrap(), None);
        let mut subscription = context.queues.subscribe("q").unwrap();
        let writer = write(queue, 0..5);
        assert_eq!(offsets(&subscription.next(100).await.unwrap()), [0, 1, 2, 3, 4]);
        subscription.done();
        drop(writer.await.unwrap());
        assert!(subscription.next(1).await.is_none());
    }
}
