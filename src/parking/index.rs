//! Which keys of one sink wait, and which parked change may be tried again. In memory; the rows on
//! disk are what it is made from.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    hash::Hash,
};

use crate::{
    change::{Key, Keys, Room, Timestamp},
    journal::Limits,
};

/// Whether a parked change is still tried by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It is, in its turn.
    Parked,
    /// Its attempts are used up, or a rule failed: a person decides.
    Dead,
}

/// What is known of a parked change without reading it.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) keys: Keys,
    pub(super) state: State,
    pub(super) attempts: u32,
    pub(super) next_at: Timestamp,
    pub(super) bytes: u64,
    /// Whether it keeps later changes of its keys back.
    pub(super) holds: bool,
    pub(super) superseded: bool,
}

/// The parked changes of one sink, by offset.
#[derive(Debug, Default)]
pub(super) struct Index {
    entries: BTreeMap<u64, Entry>,
    held: HashMap<Room, Held>,
    /// How many entries hold each key that rules gave a message.
    held_named: HashMap<Key, usize>,
    /// Dead letters that keep nothing back and that no later change has passed yet: by table, and
    /// by the keys that rules gave their messages.
    released: HashMap<Room, Vec<u64>>,
    released_named: HashMap<Key, Vec<u64>>,
    dead: usize,
    bytes: u64,
}

/// The changes whose turn it is, each list in their order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Due {
    /// Those that were never tried: what they waited behind is gone, or goes with them.
    pub fresh: Vec<u64>,
    /// Those that were refused before; no two of them share a key, nor one with a fresh one.
    pub refused: Vec<u64>,
    /// Whether there are more than fit.
    pub more: bool,
}

impl Due {
    fn len(&self) -> usize {
        self.fresh.len() + self.refused.len()
    }

    /// Leaves out what comes at or after `offset`.
    pub fn keep_before(&mut self, offset: u64) {
        self.fresh.retain(|one| *one < offset);
        self.refused.retain(|one| *one < offset);
    }

    /// Whether it is nobody's turn.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// How many entries hold each key of one table.
#[derive(Debug, Default)]
struct Held {
    all: usize,
    whole: usize,
    rows: HashMap<Key, usize>,
}

impl Index {
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn dead(&self) -> usize {
        self.dead
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn get(&self, offset: u64) -> Option<&Entry> {
        self.entries.get(&offset)
    }

    pub(super) fn offsets(&self) -> impl Iterator<Item = u64> {
        self.entries.keys().copied()
    }

    pub(super) fn is_idle(&self) -> bool {
        self.held.is_empty() && self.released.is_empty()
    }

    pub(super) fn insert(&mut self, offset: u64, entry: Entry) {
        self.remove(offset);
        self.bytes += entry.bytes;
        self.dead += usize::from(entry.state == State::Dead);
        if entry.holds {
            let held = self.held.entry(entry.keys.room).or_default();
            held.all += 1;
            held.whole += usize::from(entry.keys.is_whole());
            for key in &entry.keys.rows {
                *held.rows.entry(*key).or_default() += 1;
            }
            for key in &entry.keys.named {
                *self.held_named.entry(*key).or_default() += 1;
            }
        } else if !entry.superseded {
            self.released.entry(entry.keys.room).or_default().push(offset);
            for key in &entry.keys.named {
                self.released_named.entry(*key).or_default().push(offset);
            }
        }
        self.entries.insert(offset, entry);
    }

    pub(super) fn remove(&mut self, offset: u64) {
        let Some(entry) = self.entries.remove(&offset) else { return };
        self.bytes -= entry.bytes;
        self.dead -= usize::from(entry.state == State::Dead);
        if !entry.holds {
            self.forget_released(&entry.keys, offset);
            return;
        }
        entry.keys.named.iter().for_each(|key| take_one(&mut self.held_named, *key));
        let Some(held) = self.held.get_mut(&entry.keys.room) else { return };
        held.all -= 1;
        held.whole -= usize::from(entry.keys.is_whole());
        entry.keys.rows.iter().for_each(|key| take_one(&mut held.rows, *key));
        if held.all == 0 {
            self.held.remove(&entry.keys.room);
        }
    }

    fn forget_released(&mut self, keys: &Keys, offset: u64) {
        forget(&mut self.released, &keys.room, offset);
        for key in &keys.named {
            forget(&mut self.released_named, key, offset);
        }
    }

    /// Whether a change with these keys must wait.
    pub(super) fn blocks(&self, keys: &Keys) -> bool {
        let row = self.held.get(&keys.room).is_some_and(|held| {
            keys.is_whole()
                || held.whole > 0
                || keys.rows.iter().any(|key| held.rows.contains_key(key))
        });
        row || keys.named.iter().any(|key| self.held_named.contains_key(key))
    }

    /// The released dead letters that a change with these keys leaves behind.
    pub(super) fn passed_by(&self, keys: &Keys) -> Vec<u64> {
        let meets =
            |offset: &&u64| self.entries.get(offset).is_some_and(|entry| entry.keys.meets(keys));
        let of_room = self.released.get(&keys.room).into_iter().flatten().filter(meets);
        let of_key = keys.named.iter().filter_map(|key| self.released_named.get(key)).flatten();
        let all: BTreeSet<u64> = of_room.chain(of_key).copied().collect();
        all.into_iter().collect()
    }

    pub(super) fn supersede(&mut self, offset: u64) {
        let Some(entry) = self.entries.get_mut(&offset) else { return };
        entry.superseded = true;
        let keys = entry.keys.clone();
        self.forget_released(&keys, offset);
    }

    /// The changes that may be tried now, in their order, `limits` at most, and when to look again.
    /// The first of a key is tried when its time has come, and alone where it was refused before:
    /// most likely it is again. Those that were never tried go together, behind each other.
    pub(super) fn due(&self, now: Timestamp, limits: Limits) -> (Due, Option<Timestamp>) {
        let (mut due, mut next) = (Due::default(), None);
        let (mut waiting, mut taken, mut bytes) = (Waiting::default(), Waiting::default(), 0);
        for (&offset, entry) in &self.entries {
            let behind = waiting.meets(&entry.keys);
            let alive = entry.state == State::Parked;
            if !behind && alive && entry.next_at <= now {
                let own = usize::try_from(entry.bytes).unwrap_or(usize::MAX);
                bytes = own.saturating_add(bytes);
                if due.len() == limits.changes_max || !due.is_empty() && bytes > limits.bytes_max {
                    due.more = true;
                    return (due, Some(now));
                }
                if entry.attempts == 0 {
                    due.fresh.push(offset);
                    taken.insert(&entry.keys);
                    continue;
                }
                if !taken.meets(&entry.keys) {
                    due.refused.push(offset);
                }
            } else if !behind && alive && entry.next_at.0 < i64::MAX {
                next = Some(next.map_or(entry.next_at, |at: Timestamp| at.min(entry.next_at)));
            }
            if alive || entry.holds {
                waiting.insert(&entry.keys);
            }
        }
        (due, next)
    }
}

fn take_one(counts: &mut HashMap<Key, usize>, key: Key) {
    if let Some(count) = counts.get_mut(&key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(&key);
        }
    }
}

fn forget<K: Eq + Hash>(released: &mut HashMap<K, Vec<u64>>, key: &K, offset: u64) {
    if let Some(offsets) = released.get_mut(key) {
        offsets.retain(|other| *other != offset);
        if offsets.is_empty() {
            released.remove(key);
        }
    }
}

/// Keys behind which a change waits.
#[derive(Debug, Default)]
struct Waiting {
    rooms: HashMap<Room, bool>,
    rows: HashSet<Key>,
    named: HashSet<Key>,
}

impl Waiting {
    fn meets(&self, keys: &Keys) -> bool {
        let row = self.rooms.get(&keys.room).is_some_and(|whole| {
            *whole || keys.is_whole() || keys.rows.iter().any(|key| self.rows.contains(key))
        });
        row || keys.named.iter().any(|key| self.named.contains(key))
    }

    fn insert(&mut self, keys: &Keys) {
        *self.rooms.entry(keys.room).or_default() |= keys.is_whole();
        self.rows.extend(&keys.rows);
        self.named.extend(&keys.named);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(rows: &[Key], state: State, next_at: i64) -> Entry {
        Entry {
            keys: keys(rows),
            state,
            attempts: 1,
            next_at: Timestamp(next_at),
            bytes: 10,
            holds: true,
            superseded: false,
        }
    }

    fn keys(rows: &[Key]) -> Keys {
        Keys { room: 1, rows: rows.to_vec(), named: vec![] }
    }

    /// Of another table for each row.
    fn named(row: Key, named: &[Key]) -> Keys {
        Keys { room: Room::try_from(row).unwrap(), rows: vec![row], named: named.to_vec() }
    }

    /// The fresh and the refused ones that are due, `max` at most, and when to look again.
    fn due(index: &Index, now: i64, max: usize) -> (Vec<u64>, Vec<u64>, Option<i64>) {
        let limits = Limits { changes_max: max, bytes_max: usize::MAX };
        let (due, next) = index.due(Timestamp(now), limits);
        (due.fresh, due.refused, next.map(|at| at.0))
    }

    #[test]
    fn what_shares_a_key_waits_and_what_does_not_passes() {
        let mut index = Index::default();
        index.insert(5, entry(&[1, 2], State::Parked, 0));
        assert!(index.blocks(&keys(&[2])) && index.blocks(&keys(&[])));
        assert!(!index.blocks(&keys(&[3])));
        assert!(!index.blocks(&Keys { room: 2, ..keys(&[]) }));
        index.insert(6, entry(&[], State::Parked, 0));
        assert!(index.blocks(&keys(&[3])));
        index.remove(6);
        index.remove(5);
        assert!(index.is_idle() && !index.blocks(&keys(&[2])));
        assert_eq!((index.len(), index.bytes()), (0, 0));
    }

    #[test]
    fn what_was_refused_is_tried_alone_at_its_time_and_what_waits_behind_it_once_it_is_gone() {
        let fresh = |rows: &[Key]| Entry { attempts: 0, ..entry(rows, State::Parked, 0) };
        let mut index = Index::default();
        index.insert(1, entry(&[1], State::Parked, 10));
        index.insert(2, fresh(&[1])); // waits behind 1
        index.insert(3, entry(&[2], State::Dead, 0));
        index.insert(4, fresh(&[2, 3])); // behind a dead letter
        index.insert(5, fresh(&[3])); // behind 4
        index.insert(6, entry(&[4], State::Parked, 7));
        index.insert(7, fresh(&[1]));
        assert_eq!(due(&index, 5, 9), (vec![], vec![], Some(7)));
        assert_eq!(due(&index, 9, 9), (vec![], vec![6], Some(10)));
        assert_eq!(due(&index, 10, 9), (vec![], vec![1, 6], None));
        index.remove(1);
        assert_eq!(due(&index, 10, 9), (vec![2, 7], vec![6], None));
        assert_eq!(due(&index, 10, 2), (vec![2], vec![6], Some(10)));
        index.insert(8, entry(&[1], State::Parked, 0));
        assert_eq!(due(&index, 10, 9), (vec![2, 7], vec![6], None), "8 is behind what goes now");
        index.remove(2);
        index.remove(7);
        assert_eq!(due(&index, 10, 9), (vec![], vec![6, 8], None));
    }

    #[test]
    fn what_shares_the_key_of_a_message_waits_whatever_its_table() {
        let mut index = Index::default();
        let parked = |keys: Keys| Entry { keys, ..entry(&[], State::Parked, 10) };
        index.insert(1, parked(named(11, &[7, 8])));
        index.insert(2, Entry { next_at: Timestamp(0), ..parked(named(12, &[8])) });
        assert!(index.blocks(&named(13, &[7])) && !index.blocks(&named(13, &[9])));
        assert!(!index.blocks(&named(13, &[])), "a row's key is no message's key");
        assert_eq!(due(&index, 5, 9), (vec![], vec![], Some(10)));
        assert_eq!(due(&index, 10, 9), (vec![], vec![1], None));
        index.remove(1);
        assert!(!index.blocks(&named(13, &[7])) && index.blocks(&named(13, &[8])));
        index.remove(2);
        assert!(index.is_idle() && !index.blocks(&named(13, &[8])));
        let dead = Entry { state: State::Dead, holds: false, ..parked(named(11, &[7])) };
        index.insert(3, dead);
        assert_eq!(index.passed_by(&named(13, &[7])), [3]);
        assert_eq!(index.passed_by(&named(11, &[7])), [3], "told once");
        index.supersede(3);
        assert!(index.passed_by(&named(13, &[7])).is_empty() && index.is_idle());
    }

    #[test]
    fn a_released_dead_letter_holds_nothing_and_learns_what_passed_it() {
        let mut index = Index::default();
        index.insert(3, Entry { holds: false, ..entry(&[2], State::Dead, 0) });
        assert!(!index.blocks(&keys(&[2])) && !index.is_idle());
        assert_eq!(index.passed_by(&keys(&[2])), [3]);
        assert!(index.passed_by(&keys(&[1])).is_empty());
        index.supersede(3);
        assert!(index.passed_by(&keys(&[2])).is_empty() && index.is_idle());
        index.remove(3);
        assert_eq!(index.dead(), 0);
    }
}
