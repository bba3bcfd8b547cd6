//! The journal's last transactions, which are compared with what the server has on connect.

use super::{Inspection, Journal, Limits, reader::Cursor, store::Store};
use crate::{
    change::{Change, Lsn, Op, Recent},
    error::Result,
};

/// Changes that are looked at first; each further look goes eight times as far back.
const WINDOW: u64 = 1 << 10;
/// Changes that are looked at in all, where there is a transaction among them.
const WINDOW_MAX: u64 = 1 << 17;

impl Journal {
    /// The last transactions, from `lsn` on as far as they can be had. Blocks.
    pub fn recent(&self, lsn: Lsn) -> Result<Recent> {
        recent(&self.store, lsn)
    }
}

impl Inspection {
    /// As [`Journal::recent`].
    pub fn recent(&self, lsn: Lsn) -> Result<Recent> {
        recent(&self.store, lsn)
    }
}

fn recent(store: &Store, lsn: Lsn) -> Result<Recent> {
    let mark = store.view().identity.origin.as_ref().and_then(|origin| origin.comparable);
    let floor = mark.map_or(0, |mark| mark.offset);
    let end = store.end();
    let mut window = WINDOW;
    loop {
        let start = store.start().max(floor);
        let from = end.saturating_sub(window).max(start);
        let (mut found, passed) = match collect(store, from, lsn) {
            Err(_) if store.start() > from => continue, // retention took it meanwhile
            collected => collected?,
        };
        // Rows of a backfill may fill any window: then it is widened until there is a transaction.
        let enough = window >= WINDOW_MAX && !found.transactions.is_empty();
        if passed || from == start || enough {
            found.complete_from = match mark {
                _ if passed => Some(lsn),
                Some(mark) if from == mark.offset => Some(lsn.max(mark.lsn)),
                _ => found.transactions.first().map(|first| first.commit_lsn),
            };
            return Ok(found);
        }
        window = window.saturating_mul(8);
    }
}

/// The transactions of the changes from `from` on that committed at `lsn` or later; whether one was
/// seen that committed before.
fn collect(store: &Store, mut from: u64, lsn: Lsn) -> Result<(Recent, bool)> {
    let limits = Limits { changes_max: 10_000, bytes_max: 4 << 20 };
    let (mut cursor, mut found, mut passed) = (Cursor::default(), Recent::default(), false);
    loop {
        let (batch, next) = cursor.read(store, from, limits)?;
        if next == from {
            return Ok((found, passed));
        }
        from = next;
        for change in batch.changes.iter().filter(|change| changes_a_row(change)) {
            let transaction = change.transaction;
            passed |= transaction.commit_lsn < lsn;
            let again = found.transactions.last() == Some(&transaction);
            if transaction.commit_lsn >= lsn && !again {
                found.transactions.push(transaction);
            }
        }
    }
}

/// Whether the stream has it too: rows that were read, and messages, are not compared.
fn changes_a_row(change: &Change) -> bool {
    !matches!(change.op, Op::Read | Op::Message)
}
