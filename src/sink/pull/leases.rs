//! Leases: messages that were delivered in one reply, which nobody else gets until their time is
//! over, and how often each was delivered. In memory a message is in one lease at most.

use std::collections::{BTreeMap, BTreeSet};

use tokio::time::Instant;

use super::feed::Place;

/// Messages that were delivered together.
#[derive(Clone, Debug, Default)]
pub(super) struct Lease {
    /// Others may have them from then on, in microseconds since 1970.
    pub(super) visible_at: i64,
    /// They are acknowledged, and other parts of their changes are not.
    pub(super) acked: bool,
    /// How often each was delivered.
    pub(super) places: BTreeMap<Place, u32>,
    /// The same moment as `visible_at`, until it has come.
    pub(super) until: Option<Instant>,
}

/// A lease as the store has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stored {
    pub(super) id: u64,
    pub(super) visible_at: i64,
    pub(super) acked: bool,
    /// Messages whose offsets follow each other: the first offset, how many, their part, and how
    /// often each was delivered.
    pub(super) runs: Vec<(u64, u64, u32, u32)>,
}

impl Stored {
    /// Each message with how often it was delivered.
    pub(super) fn places(&self) -> impl Iterator<Item = (Place, u32)> {
        self.runs.iter().flat_map(|&(first, count, part, deliveries)| {
            (first..first.saturating_add(count))
                .map(move |offset| (Place { offset, part }, deliveries))
        })
    }
}

/// All leases.
#[derive(Debug, Default)]
pub(super) struct Leases {
    by_id: BTreeMap<u64, Lease>,
    ends: BTreeSet<(Instant, u64)>,
    next: u64,
    /// Those that the store does not have as they are.
    pub(super) unsaved: BTreeSet<u64>,
    /// Those that the store may have, and need not any more.
    pub(super) over: BTreeSet<u64>,
}

impl Leases {
    /// Takes one in that the store has.
    pub(super) fn restore(&mut self, id: u64, lease: Lease) {
        self.next = self.next.max(id + 1);
        self.ends.extend(lease.until.map(|until| (until, id)));
        self.by_id.insert(id, lease);
    }

    /// The number of the next one.
    pub(super) fn next(&self) -> u64 {
        self.next
    }

    /// Adds one under the next number, unless it is empty.
    pub(super) fn add(&mut self, lease: Lease) {
        if !lease.places.is_empty() {
            self.unsaved.insert(self.next);
            self.restore(self.next, lease);
        }
    }

    pub(super) fn get(&self, id: u64) -> Option<&Lease> {
        self.by_id.get(&id)
    }

    /// When the next lease ends.
    pub(super) fn next_end(&self) -> Option<Instant> {
        self.ends.first().map(|(until, _)| *until)
    }

    /// One whose time is over, with its messages.
    pub(super) fn pop_ended(&mut self, now: Instant) -> Option<(u64, Vec<Place>)> {
        let (_, id) = *self.ends.first().filter(|(until, _)| *until <= now)?;
        self.ends.pop_first();
        let Some(lease) = self.by_id.get_mut(&id) else { return Some((id, Vec::new())) };
        lease.until = None;
        Some((id, lease.places.keys().copied().collect()))
    }

    /// A message is done for good. What the store says of it no longer counts, and stays there
    /// until the whole lease goes.
    pub(super) fn finish(&mut self, id: u64, place: Place) {
        let Some(lease) = self.by_id.get_mut(&id) else { return };
        lease.places.remove(&place);
        if !lease.places.is_empty() {
            return;
        }
        if let Some(until) = lease.until {
            self.ends.remove(&(until, id));
        }
        self.by_id.remove(&id);
        self.unsaved.remove(&id);
        self.over.insert(id);
    }

    /// A message goes out of a lease; the store must not say that it is in it.
    pub(super) fn withdraw(&mut self, id: u64, place: Place) {
        self.finish(id, place);
        if self.by_id.contains_key(&id) {
            self.unsaved.insert(id);
        }
    }

    /// What of `ids` is there, as the store is to have it.
    pub(super) fn to_store(&self, ids: &BTreeSet<u64>) -> Vec<Stored> {
        let found = ids.iter().filter_map(|id| Some((*id, self.by_id.get(id)?)));
        found.map(|(id, lease)| lease.to_store(id)).collect()
    }
}

impl Lease {
    fn to_store(&self, id: u64) -> Stored {
        let mut runs: Vec<(u64, u64, u32, u32)> = Vec::new();
        for (place, &deliveries) in &self.places {
            match runs.last_mut() {
                Some((first, count, part, same))
                    if (*first + *count, *part, *same)
                        == (place.offset, place.part, deliveries) =>
                {
                    *count += 1;
                }
                _ => runs.push((place.offset, 1, place.part, deliveries)),
            }
        }
        Stored { id, visible_at: self.visible_at, acked: self.acked, runs }
    }
}
