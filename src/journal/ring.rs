//! The last durable batches, in memory, for readers that are caught up.

use std::{collections::VecDeque, mem, sync::Arc};

use super::Limits;
use crate::change::{Batch, Change};

/// Bounded by bytes: a reader that falls out of it reads the disk.
#[derive(Debug)]
pub(super) struct Ring {
    batches: VecDeque<(Arc<Batch>, usize)>,
    bytes: usize,
    bytes_max: usize,
    /// Batches of a transaction that is still open.
    open: Vec<(Arc<Batch>, usize)>,
    open_bytes: usize,
    /// The open transaction is too large to wait here: it is read from the disk.
    too_large: bool,
}

impl Ring {
    pub(super) fn new(bytes_max: usize) -> Self {
        Self {
            batches: VecDeque::new(),
            bytes: 0,
            bytes_max,
            open: Vec::new(),
            open_bytes: 0,
            too_large: false,
        }
    }

    /// Adds a durable batch; without a position it is not visible yet.
    pub(super) fn push(&mut self, batch: Batch) {
        let commits = batch.position.is_some();
        if !batch.changes.is_empty() {
            let bytes = memory_bytes(&batch);
            self.open_bytes += bytes;
            self.too_large |= self.open_bytes > self.bytes_max;
            if self.too_large {
                self.open.clear();
            } else {
                self.open.push((Arc::new(batch), bytes));
            }
        }
        if commits {
            self.commit();
        }
    }

    /// Forgets the open transaction.
    pub(super) fn abandon(&mut self) {
        self.open.clear();
        self.open_bytes = 0;
        self.too_large = false;
    }

    /// The batches that hold the change at `from` and what follows, as far as the limits ask for;
    /// `None` where the ring does not reach back to it.
    pub(super) fn read(&self, from: u64, limits: Limits) -> Option<Vec<Arc<Batch>>> {
        let at = self.batches.partition_point(|(batch, _)| batch.end() <= Some(from));
        let first = self.batches.get(at)?.0.changes.first()?;
        if first.offset > from {
            return None;
        }
        let (mut changes, mut bytes, mut taken) = (0, 0, Vec::new());
        for (batch, size) in self.batches.range(at..) {
            let skipped = from.saturating_sub(batch.changes.first().map_or(0, |c| c.offset));
            changes += batch.changes.len() - usize::try_from(skipped).unwrap_or(0);
            taken.push(Arc::clone(batch));
            bytes += size;
            if changes >= limits.changes_max || bytes >= limits.bytes_max {
                break;
            }
        }
        Some(taken)
    }

    fn commit(&mut self) {
        let open = mem::take(&mut self.open);
        if self.too_large {
            // What follows is no longer joined to what is here.
            self.batches.clear();
            self.bytes = 0;
        }
        for (batch, bytes) in open {
            self.bytes += bytes;
            self.batches.push_back((batch, bytes));
        }
        self.abandon();
        while self.bytes > self.bytes_max {
            let Some((_, bytes)) = self.batches.pop_front() else { break };
            self.bytes -= bytes;
        }
    }
}

fn memory_bytes(batch: &Batch) -> usize {
    batch.bytes() + batch.changes.len() * size_of::<Change>()
}
