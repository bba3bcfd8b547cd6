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
    collections::{BTreeMap, BTreeSet, HashMap},
    time::Duration,
};

use bytes::Bytes;
use tokio::time::Instant;
use uuid::Uuid;

use super::{
    ack_id::AckIds,
    leases::{Lease, Leases, Stored},
    ranges::Ranges,
};
use crate::change::{Key, Keys, Room, Timestamp};

/// Where a message comes from: an offset, and the part of an exploded change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Place {
    pub(super) offset: u64,
    pub(super) part: u32,
}

/// A message that nobody has acknowledged.
#[derive(Clone, Debug)]
pub(super) struct Message {
    pub(super) place: Place,
    /// What it must keep its order with; `None` where messages are independent.
    pub(super) keys: Option<Keys>,
    pub(super) body: Bytes,
    /// The store holds it, because the loop will not bring it again.
    pub(super) kept: bool,
}

/// What the store does not have yet.
#[derive(Debug, Default)]
pub(super) struct Unsaved {
    /// By number: leases that it does not have as they are, and those that it need not have.
    pub(super) leases: BTreeSet<u64>,
    pub(super) over: BTreeSet<u64>,
    /// Done, with what they touch of those that the store has.
    pub(super) ranges: Ranges,
    /// Messages to be kept, because the loop will not bring them again, and to be kept no longer.
    pub(super) keep: BTreeSet<Place>,
    pub(super) unkept: BTreeSet<Place>,
}

impl Unsaved {
    pub(super) fn is_empty(&self) -> bool {
        let Self { leases, over, ranges, keep, unkept } = self;
        let no_place = keep.is_empty() && unkept.is_empty();
        leases.is_empty() && over.is_empty() && ranges.is_empty() && no_place
    }

    /// What became unsaved later, and this.
    fn before(self, later: &mut Self) {
        later.leases.extend(self.leases);
        later.over.extend(self.over);
        for (from, to) in self.ranges.iter() {
            later.ranges.insert(from, to);
        }
        let keep = self.keep.difference(&later.unkept).copied().collect::<Vec<_>>();
        let unkept = self.unkept.difference(&later.keep).copied().collect::<Vec<_>>();
        later.keep.extend(keep);
        later.unkept.extend(unkept);
    }
}

/// What the sink's options say of leases.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Rules {
    /// So long a consumer has a message to itself.
    pub(super) lease: Duration,
    /// So often a message is delivered at most.
    pub(super) deliveries_max: Option<u32>,
}

/// All messages between the low-water mark and what the loop has written.
#[derive(Debug, Default)]
pub(super) struct Feed {
    /// Another one for each time that memory was made anew.
    pub(super) made: u64,
    pub(super) pending: BTreeMap<Place, Box<Entry>>,
    bytes: usize,
    /// The highest offset that was kept.
    kept_high: u64,
    ready: BTreeSet<Place>,
    /// Delivered as often as allowed, and not acknowledged.
    pub(super) spent: BTreeSet<Place>,
    /// Delivered more than once, and still there.
    pub(super) returned: BTreeSet<Place>,
    /// Retried changes that were acknowledged, of which the loop has not been told.
    pub(super) ended: BTreeSet<u64>,
    pub(super) rules: Rules,
    ids: AckIds,
    leases: Leases,
    rooms: HashMap<Room, Tails>,
    /// The last messages of each key that rules gave, whatever their tables.
    named: HashMap<Key, Place>,
    /// The leases of messages that the loop has not brought again, and of those that were
    /// acknowledged before other parts of their changes.
    before: BTreeMap<Place, u64>,
    pub(super) done: Ranges,
    high: u64,
    unsaved: Unsaved,
}

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) message: Message,
    /// Earlier messages that it waits for, and later ones that wait for it.
    pub(super) behind: usize,
    pub(super) holds: Vec<Place>,
    pub(super) deliveries: u32,
    /// The last lease that it was in.
    lease: Option<u64>,
    /// When it was delivered first.
    pub(super) since: Option<Instant>,
    /// A consumer has it.
    leased: bool,
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
    /// A feed that begins at `low`, with what is done beyond it.
    pub(super) fn new(low: u64, done: Ranges, ids: AckIds, rules: Rules) -> Self {
        Self { made: fastrand::u64(..), high: low, done, ids, rules, ..Self::default() }
    }

    /// Remembers what the store says of messages that were delivered, in the order of the leases.
    pub(super) fn remember(&mut self, lease: &Stored) {
        let left = lease.visible_at.saturating_sub(Timestamp::now().0);
        let left = Duration::from_micros(u64::try_from(left).unwrap_or(0)).min(self.rules.lease);
        let until = (!left.is_zero()).then(|| Instant::now() + left);
        let places: BTreeMap<Place, u32> = lease.places().collect();
        for place in places.keys() {
            if let Some(earlier) = self.before.insert(*place, lease.id) {
                self.leases.withdraw(earlier, *place);
            }
        }
        let Stored { id, visible_at, acked, .. } = *lease;
        self.leases.restore(id, Lease { visible_at, acked, places, until });
    }

    /// Adds a message behind those of its keys, unless it is there or done.
    pub(super) fn push(&mut self, message: Message) {
        let place = message.place;
        let done = !message.kept && self.done.contains(place.offset);
        if done || self.pending.contains_key(&place) {
            return;
        }
        let id = self.before.get(&place).copied();
        let lease = id.and_then(|id| self.leases.get(id));
        if lease.is_some_and(|lease| lease.acked) {
            return; // stays remembered until the low-water mark passes it
        }
        let leased = lease.is_some_and(|lease| lease.until.is_some());
        let deliveries = id.map_or(0, |id| self.deliveries_before(id, place));
        if id.is_some() {
            self.before.remove(&place);
        }
        let behind = self.queue_up(&message);
        self.bytes += message.body.len();
        if message.kept {
            self.kept_high = self.kept_high.max(place.offset);
        }
        let entry = Entry {
            message,
            behind,
            holds: Vec::new(),
            deliveries,
            lease: id,
            since: id.map(|_| Instant::now()),
            leased,
            leaves: false,
        };
        if deliveries > 1 {
            self.returned.insert(place);
        }
        self.pending.insert(place, Box::new(entry));
        self.put(place);
    }

    /// Puts a message that nobody has where it belongs.
    fn put(&mut self, place: Place) {
        let Some(entry) = self.pending.get(&place) else { return };
        // What was kept waits after a restart until the loop is where it was.
        let early = entry.message.kept && place.offset >= self.high;
        if entry.leased || entry.leaves || early {
            return;
        }
        if self.rules.deliveries_max.is_some_and(|max| entry.deliveries >= max) {
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
        self.leases.next_end()
    }

    /// Leases up to `max` messages, in order; those come first whose time is over.
    pub(super) fn take(&mut self, max: usize) -> Vec<(Uuid, Bytes)> {
        let now = self.expire();
        let visible_at = Timestamp::now().0.saturating_add_unsigned(micros(self.rules.lease));
        let (id, mut places, mut taken) = (self.leases.next(), BTreeMap::new(), Vec::new());
        while taken.len() < max {
            let Some(place) = self.ready.pop_first() else { break };
            let Some(entry) = self.pending.get_mut(&place) else { continue };
            if let Some(earlier) = entry.lease.replace(id) {
                self.leases.withdraw(earlier, place);
            }
            entry.deliveries = entry.deliveries.saturating_add(1);
            entry.leased = true;
            if entry.deliveries > 1 {
                self.returned.insert(place);
            }
            entry.since.get_or_insert(now);
            places.insert(place, entry.deliveries);
            taken.push((self.ids.of(place), entry.message.body.clone()));
        }
        let until = Some(now + self.rules.lease);
        self.leases.add(Lease { visible_at, acked: false, places, until });
        taken
    }

    /// Ends the leases whose time is over; what time it is.
    pub(super) fn expire(&mut self) -> Instant {
        let now = Instant::now();
        while let Some((id, places)) = self.leases.pop_ended(now) {
            for place in places {
                match self.pending.get_mut(&place) {
                    Some(entry) if entry.lease == Some(id) => entry.leased = false,
                    _ => continue,
                }
                self.put(place);
            }
        }
        now
    }

    /// Others may have these at once. Unknown ids are nothing new.
    pub(super) fn nack(&mut self, ids: &[Uuid]) {
        let (own, id, mut places) = (self.ids, self.leases.next(), BTreeMap::new());
        for place in ids.iter().filter_map(|id| own.place_of(id)) {
            if let Some(entry) = self.pending.get_mut(&place) {
                if let Some(earlier) = entry.lease.filter(|_| !entry.leaves) {
                    places.insert(place, entry.deliveries);
                    entry.leased = false;
                    entry.lease = Some(id);
                    self.leases.withdraw(earlier, place);
                    self.put(place);
                }
            } else if let Some(earlier) = self.early(place) {
                places.insert(place, self.deliveries_before(earlier, place));
                self.before.insert(place, id);
                self.leases.withdraw(earlier, place);
            }
        }
        self.leases.add(Lease { places, ..Lease::default() });
    }

    /// The lease of a message that the loop has not brought again and nobody has acknowledged.
    fn early(&self, place: Place) -> Option<u64> {
        let id = self.before.get(&place).copied();
        id.filter(|id| self.leases.get(*id).is_some_and(|lease| !lease.acked))
    }

    fn deliveries_before(&self, id: u64, place: Place) -> u32 {
        let lease = self.leases.get(id);
        lease.and_then(|lease| lease.places.get(&place)).copied().unwrap_or(0)
    }

    /// Done with these; what waited for them may go. Unknown ids are nothing new.
    pub(super) fn ack(&mut self, ids: &[Uuid]) {
        let (own, id, mut early) = (self.ids, self.leases.next(), BTreeMap::new());
        for place in ids.iter().filter_map(|id| own.place_of(id)) {
            early.extend(self.ack_one(place, id).map(|deliveries| (place, deliveries)));
        }
        self.leases.add(Lease { acked: true, places: early, ..Lease::default() });
    }

    /// How often it was delivered, where it is to be remembered as acknowledged in the lease `id`.
    fn ack_one(&mut self, place: Place, id: u64) -> Option<u32> {
        let Some(entry) = self.pending.get(&place) else {
            let earlier = self.early(place)?;
            let deliveries = self.deliveries_before(earlier, place);
            self.before.insert(place, id);
            self.leases.withdraw(earlier, place);
            return Some(deliveries);
        };
        // One that leaves is as good as in the lot, where a late acknowledgement does not reach it.
        if entry.lease.is_none() || entry.leaves {
            return None;
        }
        let entry = self.pending.remove(&place)?;
        self.leave(place, &entry);
        self.leave_queue(&entry.message);
        for next in entry.holds {
            let Some(entry) = self.pending.get_mut(&next) else { continue };
            entry.behind = entry.behind.saturating_sub(1);
            self.put(next);
        }
        let other_parts = self.parts(place.offset).next().is_some();
        if entry.message.kept {
            entry.lease.inspect(|earlier| self.leases.withdraw(*earlier, place));
            self.unsaved.unkept.insert(place);
            if !other_parts {
                self.ended.insert(place.offset);
            }
            return None;
        }
        if other_parts {
            entry.lease.inspect(|earlier| self.leases.withdraw(*earlier, place));
            self.before.insert(place, id);
            return Some(entry.deliveries);
        }
        entry.lease.inspect(|earlier| self.leases.finish(*earlier, place));
        self.mark_done(place.offset);
        None
    }

    /// An entry was taken out of `pending`; takes it out of everything but the order of its keys.
    pub(super) fn leave(&mut self, place: Place, entry: &Entry) {
        self.bytes = self.bytes.saturating_sub(entry.message.body.len());
        if !entry.leased {
            self.ready.remove(&place);
            self.spent.remove(&place);
        }
        if entry.message.kept {
            self.unsaved.keep.remove(&place);
        }
        if entry.deliveries > 1 {
            self.returned.remove(&place);
        }
    }

    /// The messages of a change that are there.
    pub(super) fn parts(&self, offset: u64) -> impl Iterator<Item = (&Place, &Box<Entry>)> {
        self.pending.range(Place { offset, part: 0 }..=Place { offset, part: u32::MAX })
    }

    /// A change that the loop brought is done, and with it what is between its neighbours: that was
    /// acknowledged, filtered or parked.
    pub(super) fn mark_done(&mut self, offset: u64) {
        let place = Place { offset, part: 0 };
        let mut before = self.pending.range(..place).rev();
        let previous = before.find(|(_, entry)| !entry.message.kept);
        let next = self.pending.range(place..).find(|(_, entry)| !entry.message.kept);
        let from = previous.map_or(offset, |(previous, _)| previous.offset + 1);
        let to = next.map_or(self.high, |(next, _)| next.offset).max(offset + 1);
        // Else the low-water mark passes it, unless the loop is still writing what is around it.
        if previous.is_some() || offset >= self.high {
            let (from, to) = self.done.insert(from, to);
            self.unsaved.ranges.insert(from, to);
        }
    }

    /// Forgets what the low-water mark has passed, once the store has it.
    pub(super) fn forget(&mut self, low: u64) {
        self.done.forget(low);
        let rest = self.before.split_off(&Place { offset: low, part: 0 });
        for (place, id) in std::mem::replace(&mut self.before, rest) {
            self.leases.withdraw(id, place);
        }
    }

    /// Forgets the leases of messages that nobody brings again, of which the store still tells.
    pub(super) fn forget_done(&mut self, low: u64) {
        self.forget(low);
        let done: Vec<Place> =
            self.before.keys().copied().filter(|place| self.done.contains(place.offset)).collect();
        for place in done {
            self.forget_early(place);
        }
    }

    /// Forgets that a message was ever delivered that is not there.
    pub(super) fn forget_early(&mut self, place: Place) {
        if let Some(id) = self.before.remove(&place) {
            self.leases.withdraw(id, place);
        }
    }

    /// Forgets that a message was ever delivered that was taken out of `pending`, and kept.
    pub(super) fn forget_entry(&mut self, place: Place, entry: &Entry) {
        entry.lease.inspect(|id| self.leases.withdraw(*id, place));
        if entry.message.kept {
            self.unsaved.unkept.insert(place);
        }
    }

    /// The parts of a change that were acknowledged while others were not.
    pub(super) fn acked_parts(&self, offset: u64) -> Vec<Place> {
        let parts = Place { offset, part: 0 }..=Place { offset, part: u32::MAX };
        self.before.range(parts).map(|(place, _)| *place).collect()
    }

    /// Has the store keep a message, because the loop will not bring it again.
    pub(super) fn keep_one(&mut self, place: Place) {
        self.unsaved.unkept.remove(&place);
        self.unsaved.keep.insert(place);
    }

    /// What the store does not have, and what was on the way to it when that failed.
    pub(super) fn take_unsaved(&mut self, failed: Unsaved) -> Unsaved {
        let mut unsaved = std::mem::take(&mut self.unsaved);
        unsaved.leases = std::mem::take(&mut self.leases.unsaved);
        unsaved.over = std::mem::take(&mut self.leases.over);
        failed.before(&mut unsaved);
        unsaved
    }

    /// The leases of these numbers, as the store is to have them.
    pub(super) fn stored(&self, ids: &BTreeSet<u64>) -> Vec<Stored> {
        self.leases.to_store(ids)
    }

    /// Has everything queue up anew, in order; first what is with a consumer.
    pub(super) fn queue_anew(&mut self) {
        self.rooms.clear();
        self.named.clear();
        self.ready.clear();
        let mut order: Vec<(bool, Place)> = Vec::with_capacity(self.pending.len());
        for (place, entry) in &mut self.pending {
            entry.holds.clear();
            order.push((!entry.leased, *place));
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

#[cfg(test)]
mod tests {
    use super::*;

    fn message(offset: u64) -> Message {
        let place = Place { offset, part: 0 };
        Message { place, keys: None, body: Bytes::from_static(b"{}"), kept: false }
    }

    #[test]
    fn what_is_acknowledged_while_its_batch_is_still_written_is_done() {
        let rules = Rules { lease: Duration::from_secs(30), deliveries_max: None };
        let mut feed = Feed::new(3, Ranges::default(), AckIds::default(), rules);
        feed.push(message(5));
        let (id, _) = feed.take(1).remove(0);
        feed.ack(&[id]);
        assert_eq!(feed.low(), 3, "the loop has not said what becomes of 3 and 4");
        let unsaved = feed.take_unsaved(Unsaved::default());
        assert_eq!(unsaved.ranges.iter().collect::<Vec<_>>(), [(5, 6)]);
        feed.push(message(5));
        assert!(feed.take(1).is_empty(), "it never comes again");
        feed.written(9);
        assert_eq!(feed.low(), 9);
    }
}
