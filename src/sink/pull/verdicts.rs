//! What the feed gives back to the loop: messages that were delivered too often, and the groups
//! that keep the others from being read.

use std::collections::{BTreeMap, BTreeSet};

use tokio::time::Instant;

use super::feed::{Feed, Place};
use crate::sink::Verdict;

impl Feed {
    /// Whether there is something to tell, given whether the look-ahead is full.
    pub(super) fn has_verdicts(&self, crowded: bool) -> bool {
        !self.spent.is_empty() || !self.ended.is_empty() || crowded && !self.stuck().is_empty()
    }

    /// What became of messages since the last call. `hold`: what waits for a message that is given
    /// up goes with it. `crowded`: what waits for a message that came back again and again leaves
    /// room for others.
    pub(super) fn verdicts(&mut self, hold: bool, crowded: bool) -> Vec<(u64, Verdict)> {
        self.expire();
        let ended = std::mem::take(&mut self.ended);
        let mut verdicts: BTreeMap<u64, Verdict> =
            ended.into_iter().map(|offset| (offset, Verdict::Durable)).collect();
        let stuck = if crowded { self.stuck() } else { BTreeSet::new() };
        let spent: BTreeSet<u64> = self.spent.iter().map(|place| place.offset).collect();
        for offset in spent {
            let waiting = self.waiting_for(offset);
            let next = waiting.first().copied().filter(|_| !hold);
            verdicts.insert(offset, self.given_up(offset, next));
            self.set_leaving(offset);
            for behind in waiting.into_iter().filter(|_| hold) {
                verdicts.entry(behind).or_insert(Verdict::Behind);
                self.set_leaving(behind);
            }
        }
        for offset in stuck {
            if verdicts.contains_key(&offset) {
                continue;
            }
            if self.parts(offset).any(|(_, entry)| !entry.message.kept) {
                verdicts.insert(offset, Verdict::SetAside);
            }
            for behind in self.waiting_for(offset) {
                verdicts.entry(behind).or_insert(Verdict::Behind);
                self.set_leaving(behind);
            }
        }
        self.spent.clear();
        verdicts.into_iter().collect()
    }

    /// The loop has written these down.
    pub(super) fn settle(&mut self, told: &[(u64, Verdict)]) {
        for (offset, verdict) in told {
            match verdict {
                Verdict::Durable => {}
                Verdict::GivenUp { .. } | Verdict::Behind => self.remove(*offset),
                Verdict::SetAside => self.set_aside(*offset),
            }
        }
        self.queue_anew();
    }

    /// Keeps retried changes, which the loop will not bring again. One without a message is at its
    /// end.
    pub(super) fn keep(&mut self, offsets: &[u64]) {
        for &offset in offsets {
            let places: Vec<Place> = self.parts(offset).map(|(place, _)| *place).collect();
            if places.is_empty() {
                self.ended.insert(offset);
            }
            places.into_iter().for_each(|place| self.keep_one(place));
            if offset >= self.low() {
                self.mark_done(offset);
            }
        }
    }

    /// The first messages of groups that came back and have been with consumers for longer than
    /// one has them, and others wait for them.
    fn stuck(&self) -> BTreeSet<u64> {
        let is_old = |since: Instant| since.elapsed() >= self.rules.lease;
        let returned = self.returned.iter().filter_map(|place| self.pending.get(place));
        let stuck = returned.filter(|entry| {
            entry.behind == 0
                && !entry.leaves
                && entry.since.is_some_and(is_old)
                && entry.holds.iter().any(|place| self.stays(place, entry.message.place.offset))
        });
        stuck.map(|entry| entry.message.place.offset).collect()
    }

    /// Whether a message of another change is there for good.
    fn stays(&self, place: &Place, other: u64) -> bool {
        place.offset != other && self.pending.get(place).is_some_and(|entry| !entry.leaves)
    }

    /// The changes that wait for this one, and for those.
    fn waiting_for(&self, offset: u64) -> BTreeSet<u64> {
        let mut found = BTreeSet::new();
        let mut look: Vec<u64> = vec![offset];
        while let Some(from) = look.pop() {
            let holds = self.parts(from).flat_map(|(_, entry)| &entry.holds);
            for place in holds.filter(|place| self.stays(place, offset)) {
                if found.insert(place.offset) {
                    look.push(place.offset);
                }
            }
        }
        found
    }

    fn given_up(&self, offset: u64, next: Option<u64>) -> Verdict {
        let deliveries = self.parts(offset).map(|(_, entry)| entry.deliveries).max();
        let attempts = deliveries.unwrap_or(0);
        let why = format!("consumers had it {attempts} times and did not acknowledge it");
        Verdict::GivenUp { attempts, why, next }
    }

    fn set_leaving(&mut self, offset: u64) {
        for (_, entry) in self.of(offset) {
            entry.leaves = true;
        }
    }

    fn of(&mut self, offset: u64) -> impl Iterator<Item = (&Place, &mut Box<super::feed::Entry>)> {
        self.pending.range_mut(Place { offset, part: 0 }..=Place { offset, part: u32::MAX })
    }

    fn remove(&mut self, offset: u64) {
        let places: Vec<Place> = self.parts(offset).map(|(place, _)| *place).collect();
        let mut kept = true;
        for place in &places {
            let Some(entry) = self.pending.remove(place) else { continue };
            kept &= entry.message.kept;
            self.leave(*place, &entry);
            self.forget_entry(*place, &entry);
        }
        for place in self.acked_parts(offset) {
            self.forget_early(place);
        }
        if !places.is_empty() && !kept {
            self.mark_done(offset);
        }
    }

    fn set_aside(&mut self, offset: u64) {
        let places: Vec<Place> = self.parts(offset).map(|(place, _)| *place).collect();
        for (_, entry) in self.of(offset) {
            entry.message.kept = true;
        }
        if places.is_empty() {
            self.ended.insert(offset); // acknowledged meanwhile
            return;
        }
        places.into_iter().for_each(|place| self.keep_one(place));
        self.mark_done(offset);
    }
}
