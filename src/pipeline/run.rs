//! A run of changes on its way to a sink: what the rules made of each, and the change itself, which
//! is what is parked.

use crate::change::{Batch, Change, Keys};

/// Units in their order; the parts of one change stay together.
#[derive(Debug, Default)]
pub(super) struct Run {
    /// The parts of all units, one after the other: what the sink sees.
    pub(super) batch: Batch,
    units: Vec<Unit>,
}

/// One change of the journal.
#[derive(Debug)]
struct Unit {
    /// As it is in the journal; `None` where its only part is the same.
    whole: Option<Change>,
    parts: usize,
}

impl Run {
    /// Adds a change that passes as it is.
    pub(super) fn push(&mut self, change: Change) {
        self.batch.changes.push(change);
        self.units.push(Unit { whole: None, parts: 1 });
    }

    /// Adds what became of a change: at least one part.
    pub(super) fn push_parts(&mut self, whole: Change, parts: Vec<Change>) {
        self.units.push(Unit { whole: Some(whole), parts: parts.len() });
        self.batch.changes.extend(parts);
    }

    /// The last change of `transaction` that is left closes it, where the one that did is not.
    pub(super) fn close_transaction_of(&mut self, gone: &Change) {
        if gone.closes_transaction
            && let Some(last) = self.batch.changes.last_mut()
            && last.transaction == gone.transaction
        {
            last.closes_transaction = true;
        }
    }

    pub(super) fn len(&self) -> usize {
        self.units.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.units.is_empty()
    }

    /// The parts of each unit, in order.
    pub(super) fn lengths(&self) -> impl Iterator<Item = usize> {
        self.units.iter().map(|unit| unit.parts)
    }

    /// Cuts off the second half of the units.
    pub(super) fn split(&mut self) -> Self {
        let units = self.units.split_off(self.units.len() / 2);
        let parts: usize = self.lengths().sum();
        let changes = self.batch.changes.split_off(parts.min(self.batch.changes.len()));
        Self { batch: Batch { changes, position: self.batch.position.take() }, units }
    }

    /// Takes the units apart, each with its parts.
    pub(super) fn into_units(self) -> Vec<(Option<Change>, Vec<Change>)> {
        let mut parts = self.batch.changes.into_iter();
        let unit = |unit: Unit| {
            let own = parts.by_ref().take(unit.parts).collect();
            (unit.whole, own)
        };
        self.units.into_iter().map(unit).collect()
    }

    /// Adds a unit as `into_units` gave it.
    pub(super) fn push_unit(&mut self, (whole, parts): (Option<Change>, Vec<Change>)) {
        self.units.push(Unit { whole, parts: parts.len() });
        self.batch.changes.extend(parts);
    }
}

/// The keys of what became of a change, those of the change itself among them.
pub(super) fn keys(parts: &[Change]) -> Option<Keys> {
    let mut parts = parts.iter();
    let mut keys = parts.next()?.keys();
    parts.for_each(|part| keys.join(part.keys()));
    Some(keys)
}

/// The change of a unit as it is in the journal.
pub(super) fn whole((whole, parts): (Option<Change>, Vec<Change>)) -> Option<Change> {
    whole.or_else(|| parts.into_iter().next())
}
