//! Rows of a table without a key, which can only be counted.

use std::collections::HashMap;

use super::{snapshot::Snapshot, spool::whole_row};
use crate::change::{Before, Change, Key};

/// What changes inside a fence did with the copies of each row.
#[derive(Debug, Default)]
pub(super) struct Copies {
    rows: HashMap<Key, Count>,
    /// Changes that came before it was known which transactions the chunk shows.
    early: Vec<(u32, Option<Key>, Option<Key>)>,
    seen: Option<Snapshot>,
}

/// With `shown` copies in the chunk, `shown + unseen` are there in the end, and who reads the
/// changes knows `known` of them already: so many are left out that the rest comes to that.
#[derive(Debug, Default)]
struct Count {
    /// Those that a reader of the changes knows of; one that goes away unheard of was never known.
    known: u32,
    /// What transactions added, less what they took away, that the chunk does not show.
    unseen: i64,
}

impl Copies {
    /// Rows, and changes, that it remembers.
    pub(super) fn len(&self) -> usize {
        self.rows.len() + self.early.len()
    }

    /// Notes the rows of a change.
    pub(super) fn note(&mut self, change: &Change) {
        let old = match &change.before {
            Before::Full(row) => Some(whole_row(row)),
            Before::Key(_) | Before::Nothing => None,
        };
        let new = change.after.as_ref().map(whole_row);
        if let Some(old) = old {
            let count = self.rows.entry(old).or_default();
            count.known = count.known.saturating_sub(1);
        }
        if let Some(new) = new {
            self.rows.entry(new).or_default().known += 1;
        }
        match &self.seen {
            None => self.early.push((change.transaction.xid, old, new)),
            Some(_) => self.count(change.transaction.xid, old, new),
        }
    }

    /// Learns which transactions the chunk shows.
    pub(super) fn show(&mut self, snapshot: &Snapshot) {
        self.seen = Some(snapshot.clone());
        for (xid, old, new) in std::mem::take(&mut self.early) {
            self.count(xid, old, new);
        }
    }

    fn count(&mut self, xid: u32, old: Option<Key>, new: Option<Key>) {
        if self.seen.as_ref().is_some_and(|seen| seen.sees(xid)) {
            return;
        }
        if let Some(old) = old {
            self.rows.entry(old).or_default().unseen -= 1;
        }
        if let Some(new) = new {
            self.rows.entry(new).or_default().unseen += 1;
        }
    }

    /// How many copies of which rows are to be left out; `None` where there are too few of one.
    pub(super) fn left_out(&self) -> Option<HashMap<Key, u32>> {
        let left_out = |(row, count): (&Key, &Count)| {
            let copies = u32::try_from(i64::from(count.known) - count.unseen).ok()?;
            Some((*row, copies))
        };
        let all: Option<HashMap<Key, u32>> = self.rows.iter().map(left_out).collect();
        all.map(|all| all.into_iter().filter(|(_, copies)| *copies > 0).collect())
    }
}
