//! What waits for consumers, in memory: the order of each key, the leases, and what is done.
//!
//! ```text
//! blocked (an earlier change of its key is there) ──► ready ──► leased ──► acknowledged, gone
//!                                                       ▲          │
//!                                                       └──────────┤ nack, or its time is over
//!                                                                  ▼
//!                                    spent: so often delivered that it goes to the parking lot
//! ```
//!
//! Memory runs ahead of the store by [`Unsaved`], which a reply waits for.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    time::Duration,
};

use bytes::Bytes;
use tokio::time::Instant;
use uuid::Uuid;

use super::ranges::Ranges;
use crate::change::{Key, Keys, Room, Timestamp};

/// Where a message comes from: an offset, and the part of an exploded change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Place {
    pub(super) offset: u64,
    pub(super) part: u32,
}

/// A message that nobody has acknowledged.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) place: Place,
    pub(super) ack_id: Uuid,
    /// What it must keep its order with; `None` where messages are independent.
    pub(super) keys: Option<Keys>,
    pub(super) body: Bytes,
    /// The store holds it, because the loop will not bring it again.
    pub(super) kept: bool,
}

/// What is written down of a message that was delivered at least once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Lease {
    pub(super) deliveries: u32,
    /// Others may have it from then on, in microseconds since 1970.
    pub(super) visible_at: i64,
    pub(super) acked: bool,
}

/// What the store does not have yet.
#[derive(Debug, Default)]
pub(super) struct Unsaved {
    /// `None`: nothing is to be remembered of it any more.
    pub(super) leases: BTreeMap<Place, Option<Lease>>,
    /// Done, with what they touch of those that the store has.
    pub(super) ranges: Ranges,
    /// Messages to be kept, because the loop will not bring them again.
    pub(super) keep: BTreeSet<Place>,
}

impl Unsaved {
    pub(super) fn is_empty(&self) -> bool {
        self.leases.is_empty() && self.ranges.is_empty() && self.keep.is_empty()
    }
}

/// All messages between the low-water mark and what the loop has written.
#[derive(Debug, Default)]
pub(super) struct Feed {
    /// Another one for each time that memory was made anew.
    pub(super) made: u64,
    pub(super) pending: BTreeMap<Place, Entry>,
    bytes: usize,
    /// The highest offset that was kept.
    kept_high: u64,
    ready: BTreeSet<Place>,
    /// Delivered as often as allowed, and not acknowledged.
    pub(super) spent: BTreeSet<Place>,
    /// Retried changes that were acknowledged, of which the loop has not been told.
    pub(super) ended: BTreeSet<u64>,
    /// So often a message is delivered at most.
    deliveries_max: Option<u32>,
    leased: BTreeSet<(Instant, Place)>,
    rooms: HashMap<Room, Tails>,
    /// The last messages of each key that rules gave, whatever their tables.
    named: HashMap<Key, Place>,
    delivered: HashMap<Uuid, Place>,
    /// Leases and early acknowledgements of messages that the loop has not brought again.
    before: HashMap<Place, Lease>,
    pub(super) done: Ranges,
    high: u64,
    pub(super) unsaved: Unsaved,
}

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) message: Message,
    /// Earlier messages that it waits for, and later ones that wait for it.
    pub(super) behind: usize,
    pub(super) holds: Vec<Place>,
    pub(super) lease: Lease,
    until: Option<Instant>,
    /// It goes to the parking lot, and to no consumer any more.
    pub(super) leaves: bool,
}

/// The last messages of each key of a table, and the last that concerned all of it.
#[derive(Debug, Default)]
struct Tails {
    rows: HashMap<Key, Place>,
    whole: Option<Place>,
}

impl Feed {
    /// A feed that begins at `low`, with what was remembered beyond it.
    pub(super) fn new(low: u64, done: Ranges, deliveries_max: Option<u32>) -> Self {
        Self { made: fastrand::u64(..), high: low, done, deliveries_max, ..Self::default() }
    }

    /// Remembers what the store says of a message that was delivered.
    pub(super) fn remember(&mut self, place: Place, ack_id: Uuid, lease: Lease) {
        self.delivered.insert(ack_id, place);
        self.before.insert(place, lease);
    }

    /// Adds a message behind those of its keys, unless it is there or done.
    pub(super) fn push(&mut self, message: Message, lease_max: Duration) {
        let place = message.place;
        let done = !message.kept && self.done.contains(place.offset);
        if done || self.pending.contains_key(&place) {
            return;
        }
        let lease = self.before.get(&place).copied().unwrap_or_default();
        if lease.acked {
            return; // stays remembered until the low-water mark passes it
        }
        self.before.remove(&place);
        let behind = self.queue_up(&message);
        self.bytes += message.body.len();
        if message.kept {
            self.kept_high = self.kept_high.max(place.offset);
        }
        let left = lease.visible_at.saturating_sub(Timestamp::now().0);
        let left = Duration::from_micros(u64::try_from(left).unwrap_or(0)).min(lease_max);
        let until = (!left.is_zero()).then(|| Instant::now() + left);
        let entry = Entry { message, behind, holds: Vec::new(), lease, until, leaves: false };
        self.pending.insert(place, entry);
        match until {
            Some(until) => drop(self.leased.insert((until, place))),
            None => self.put(place),
        }
    }

    /// Puts a message that nobody has where it belongs.
    fn put(&mut self, place: Place) {
        let Some(entry) = self.pending.get(&place) else { return };
        // What was kept waits after a restart until the loop is where it was.
        let early = entry.message.kept && place.offset >= self.high;
        if entry.until.is_some() || entry.leaves || early {
            return;
        }
        if self.deliveries_max.is_some_and(|max| entry.lease.deliveries >= max) {
            self.spent.insert(place);
        } else if entry.behind == 0 {
            self.ready.insert(place);
        }
    }

    /// Everything below `high` was written by the loop, filtered or parked. After a restart it
    /// brings messages that go before those that were kept.
    pub(super) fn written(&mut self, high: u64) {
        let before = self.high;
        self.high = self.high.max(high);
        if before < high && before <= self.kept_high {
            self.queue_anew();
        }
    }

    /// Whether something was kept that the loop must come to first, after a restart.
    pub(super) fn catches_up(&self) -> bool {
        self.pending.range(Place { offset: self.high, part: 0 }..).next().is_some()
    }

    /// Every change below it is done.
    pub(super) fn low(&self) -> u64 {
        let first = self.pending.values().find(|entry| !entry.message.kept);
        first.map_or(self.high, |entry| entry.message.place.offset)
    }

    pub(super) fn len(&self) -> usize {
        self.pending.len()
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// When the next lease ends.
    pub(super) fn next_release(&self) -> Option<Instant> {
        self.leased.first().map(|(until, _)| *until)
    }

    /// Leases up to `max` messages for `lease`, in order; those come first whose time is over.
    pub(super) fn take(&mut self, max: usize, lease: Duration) -> Vec<(Uuid, Bytes)> {
        let now = self.expire();
        let visible_at = Timestamp::now().0.saturating_add_unsigned(micros(lease));
        let mut taken = Vec::new();
        while taken.len() < max {
            let Some(place) = self.ready.pop_first() else { break };
            let Some(entry) = self.pending.get_mut(&place) else { continue };
            let deliveries = entry.lease.deliveries.saturating_add(1);
            entry.lease = Lease { deliveries, visible_at, acked: false };
            entry.until = Some(now + lease);
            self.leased.insert((now + lease, place));
            self.delivered.insert(entry.message.ack_id, place);
            self.unsaved.leases.insert(place, Some(entry.lease));
            taken.push((entry.message.ack_id, entry.message.body.clone()));
        }
        taken
    }

    /// Ends the leases whose time is over; what time it is.
    pub(super) fn expire(&mut self) -> Instant {
        let now = Instant::now();
        while self.leased.first().is_some_and(|(until, _)| *until <= now) {
            if let Some((_, place)) = self.leased.pop_first() {
                self.release(place);
            }
        }
        now
    }

    /// Others may have it at once. Unknown ids are nothing new.
    pub(super) fn nack(&mut self, id: &Uuid) {
        let Some(&place) = self.delivered.get(id) else { return };
        let lease = match self.pending.get_mut(&place) {
            Some(entry) if entry.leaves => return,
            Some(entry) => {
                if let Some(until) = entry.until {
                    self.leased.remove(&(until, place));
                }
                entry.lease.visible_at = 0;
                let lease = entry.lease;
                self.release(place);
                lease
            }
            None => match self.before.get_mut(&place) {
                Some(lease) if !lease.acked => {
                    lease.visible_at = 0;
                    *lease
                }
                _ => return,
            },
        };
        self.unsaved.leases.insert(place, Some(lease));
    }

    /// Done with it; what waited for it may go. Unknown ids are nothing new.
    pub(super) fn ack(&mut self, id: &Uuid) {
        let Some(place) = self.delivered.remove(id) else { return };
        if self.pending.get(&place).is_some_and(|entry| entry.leaves) {
            return; // it is as good as in the lot, where a late acknowledgement does not reach it
        }
        let Some(entry) = self.pending.remove(&place) else {
            if let Some(lease) = self.before.get_mut(&place) {
                lease.acked = true;
                self.unsaved.leases.insert(place, Some(*lease));
            }
            return;
        };
        self.leave(place, &entry);
        self.leave_queue(&entry.message);
        for next in entry.holds {
            let Some(entry) = self.pending.get_mut(&next) else { continue };
            entry.behind = entry.behind.saturating_sub(1);
            self.put(next);
        }
        self.record(&entry.message, entry.lease);
    }

    /// An entry was taken out of `pending`; takes it out of everything but the order of its keys.
    pub(super) fn leave(&mut self, place: Place, entry: &Entry) {
        self.bytes = self.bytes.saturating_sub(entry.message.body.len());
        self.ready.remove(&place);
        self.spent.remove(&place);
        self.unsaved.keep.remove(&place);
        if let Some(until) = entry.until {
            self.leased.remove(&(until, place));
        }
    }

    /// Writes down that a message is done: with the range around its offset, or by itself where
    /// another part of its change is not.
    fn record(&mut self, message: &Message, lease: Lease) {
        let place = message.place;
        let other_parts = self.parts(place.offset).next().is_some();
        if other_parts && !message.kept {
            let lease = Lease { acked: true, ..lease };
            self.before.insert(place, lease);
            self.unsaved.leases.insert(place, Some(lease));
            return;
        }
        self.unsaved.leases.insert(place, None);
        match (message.kept, other_parts) {
            (false, _) => self.mark_done(place.offset),
            (true, false) => drop(self.ended.insert(place.offset)),
            (true, true) => {}
        }
    }

    /// The messages of a change that are there.
    pub(super) fn parts(&self, offset: u64) -> impl Iterator<Item = (&Place, &Entry)> {
        self.pending.range(Place { offset, part: 0 }..=Place { offset, part: u32::MAX })
    }

    /// A change that the loop brought is done, and with it what is between its neighbours: that was
    /// acknowledged, filtered or parked.
    pub(super) fn mark_done(&mut self, offset: u64) {
        let place = Place { offset, part: 0 };
        let of_loop = |(_, entry): &(&Place, &Entry)| !entry.message.kept;
        let previous = self.pending.range(..place).rev().find(of_loop);
        let next = self.pending.range(place..).find(of_loop);
        let from = previous.map_or(offset, |(previous, _)| previous.offset + 1);
        let to = next.map_or(self.high, |(next, _)| next.offset).max(offset + 1);
        if previous.is_some() {
            let (from, to) = self.done.insert(from, to);
            self.unsaved.ranges.insert(from, to);
        }
    }

    /// Forgets what the low-water mark has passed, once the store has it.
    pub(super) fn forget(&mut self, low: u64) {
        self.done.forget(low);
        if self.before.keys().any(|place| place.offset < low) {
            let gone: HashSet<Place> =
                self.before.keys().copied().filter(|place| place.offset < low).collect();
            self.before.retain(|place, _| !gone.contains(place));
            self.delivered.retain(|_, place| !gone.contains(place));
        }
    }

    fn release(&mut self, place: Place) {
        if let Some(entry) = self.pending.get_mut(&place) {
            entry.until = None;
        }
        self.put(place);
    }

    /// Forgets that a message was ever delivered.
    pub(super) fn forget_lease(&mut self, place: Place, ack_id: &Uuid) {
        self.before.remove(&place);
        self.delivered.remove(ack_id);
        self.unsaved.leases.insert(place, None);
    }

    /// The parts of a change that were acknowledged while others were not.
    pub(super) fn acked_parts(&self, offset: u64) -> Vec<Place> {
        self.before.keys().copied().filter(|place| place.offset == offset).collect()
    }

    /// Has everything queue up anew, in order; first what is with a consumer.
    pub(super) fn queue_anew(&mut self) {
        self.rooms.clear();
        self.named.clear();
        self.ready.clear();
        let mut order: Vec<(bool, Place)> = Vec::with_capacity(self.pending.len());
        for (place, entry) in &mut self.pending {
            entry.holds.clear();
            order.push((entry.until.is_none(), *place));
        }
        order.sort_unstable();
        for (_, place) in order {
            // Out of the map while it queues up, so that it does not wait for itself.
            let Some(mut entry) = self.pending.remove(&place) else { continue };
            entry.behind = self.queue_up(&entry.message);
            self.pending.insert(place, entry);
            self.put(place);
        }
    }

    /// Has it wait for the last messages of its keys; for how many.
    fn queue_up(&mut self, message: &Message) -> usize {
        let Some(keys) = &message.keys else { return 0 };
        let tails = self.rooms.entry(keys.room).or_default();
        let mut ahead: Vec<Place> = tails.whole.into_iter().collect();
        if keys.is_whole() {
            ahead.extend(tails.rows.drain().map(|(_, place)| place));
            tails.whole = Some(message.place);
        }
        for key in &keys.rows {
            ahead.extend(tails.rows.insert(*key, message.place));
        }
        for key in &keys.named {
            ahead.extend(self.named.insert(*key, message.place));
        }
        ahead.sort_unstable();
        ahead.dedup();
        let mut behind = 0;
        for place in ahead {
            if let Some(entry) = self.pending.get_mut(&place) {
                entry.holds.push(message.place);
                behind += 1;
            }
        }
        behind
    }

    fn leave_queue(&mut self, message: &Message) {
        let Some(keys) = &message.keys else { return };
        for key in &keys.named {
            if self.named.get(key) == Some(&message.place) {
                self.named.remove(key);
            }
        }
        let Some(tails) = self.rooms.get_mut(&keys.room) else { return };
        if tails.whole == Some(message.place) {
            tails.whole = None;
        }
        for key in &keys.rows {
            if tails.rows.get(key) == Some(&message.place) {
                tails.rows.remove(key);
            }
        }
        if tails.rows.is_empty() && tails.whole.is_none() {
            self.rooms.remove(&keys.room);
        }
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
