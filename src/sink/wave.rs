//! Which changes of a batch may be on their way to a target at the same time: no two of them share
//! a key, so that one which the target does not take cannot be overtaken by a later one of its key.

use std::collections::{HashMap, HashSet};

use super::{Outcome, Written};
use crate::{
    change::{Change, Key, Room},
    error::{Class, Error, Result},
};

/// The keys of one table that are on their way.
enum Taken {
    Whole,
    Rows(HashSet<Key>),
}

/// The first changes of `changes` that share no key, at most `most`; one at least.
pub(super) fn first(changes: &[Change], most: usize) -> &[Change] {
    let mut taken: HashMap<Room, Taken> = HashMap::new();
    let mut named: HashSet<Key> = HashSet::new();
    let mut free = |change: &Change| {
        let keys = change.keys();
        if keys.named.iter().any(|key| named.contains(key)) {
            return false;
        }
        named.extend(&keys.named);
        let fresh = if keys.is_whole() { Taken::Whole } else { Taken::Rows(HashSet::new()) };
        let known = taken.contains_key(&keys.room);
        match taken.entry(keys.room).or_insert(fresh) {
            Taken::Whole => !known,
            Taken::Rows(_) if keys.is_whole() => false,
            Taken::Rows(rows) => {
                let free = keys.rows.iter().all(|key| !rows.contains(key));
                rows.extend(keys.rows);
                free
            }
        }
    };
    let count = changes.iter().take(most).take_while(|change| free(change)).count();
    changes.get(..count.max(1)).unwrap_or(changes)
}

/// Why the changes of a run did not all arrive.
pub(super) struct Failure {
    /// So many did, before the first that did not.
    pub(super) durable: usize,
    pub(super) error: Error,
}

/// What a write of `count` changes achieved that ended in a failure.
pub(super) fn cut_short(failure: Failure, count: usize) -> Result<Written> {
    let Failure { durable, error } = failure;
    let refused = error.class() == Class::Data;
    if !refused && (durable == 0 || !matches!(error.class(), Class::Retry | Class::Config)) {
        return Err(error);
    }
    let mut outcomes = Vec::with_capacity(count);
    outcomes.resize_with(durable, || Outcome::Durable);
    // An outage or a wrong setting shows again, with its reason, when a write meets it first.
    outcomes.push(if refused { Outcome::Refused(error) } else { Outcome::Unknown });
    outcomes.resize_with(count, || Outcome::Unknown);
    Ok(Written::Each(outcomes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{change::Op, sink::testing::batch};

    #[test]
    fn a_key_is_on_its_way_once() {
        let mut changes = batch(0..4).changes;
        assert_eq!(first(&changes, 9).len(), 4);
        assert_eq!(first(&changes, 3).len(), 3);
        changes.extend(batch(2..3).changes);
        changes.extend(batch(9..10).changes);
        assert_eq!(first(&changes, 9).len(), 4);
        assert_eq!(first(&changes[4..], 9).len(), 2);
        assert!(first(&[], 9).is_empty());
    }

    #[test]
    fn a_truncate_goes_alone() {
        let mut changes = batch(0..4).changes;
        changes[2].op = Op::Truncate;
        changes[2].after = None;
        let lengths = [0, 2, 3].map(|start| first(&changes[start..], 9).len());
        assert_eq!(lengths, [2, 1, 1]);
    }

    #[test]
    fn what_arrived_counts_although_the_rest_did_not() {
        let letters = |written: Result<Written>| match written.unwrap() {
            Written::Each(outcomes) => outcomes
                .iter()
                .map(|outcome| match outcome {
                    Outcome::Durable => 'd',
                    Outcome::Refused(_) => 'r',
                    Outcome::Unknown => 'u',
                })
                .collect::<String>(),
            written => panic!("{written:?}"),
        };
        let cut = |durable, count, error| cut_short(Failure { durable, error }, count);
        assert_eq!(letters(cut(2, 4, Error::data("no"))), "ddru");
        assert_eq!(letters(cut(0, 2, Error::data("no"))), "ru");
        assert_eq!(letters(cut(1, 3, Error::retry("down"))), "duu");
        assert_eq!(cut(0, 3, Error::retry("down")).unwrap_err().class(), Class::Retry);
        assert_eq!(cut(2, 3, Error::bug("ours")).unwrap_err().class(), Class::Bug);
    }
}
