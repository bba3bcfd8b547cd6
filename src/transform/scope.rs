//! Where a step applies.

use std::sync::Arc;

use super::view::ByTable;
use crate::{
    change::{Change, Op},
    config::{self, Globs},
    error::Result,
    schema::Table,
};

/// The tables and operations of a step.
#[derive(Debug)]
pub(super) struct Scope {
    tables: Globs,
    every_table: bool,
    operations: Vec<Op>,
    decided: ByTable<Op, bool>,
}

impl Scope {
    pub(super) fn new(step: &config::Step) -> Self {
        Self {
            tables: Globs::new(&step.tables),
            every_table: step.tables.is_empty(),
            operations: step.operations.clone(),
            decided: ByTable::default(),
        }
    }

    /// Whether the step applies to a change; the answer for a table is kept.
    pub(super) fn covers(&mut self, change: &Change) -> Result<bool> {
        let Some(table) = &change.table else {
            return Ok(self.every_table && self.covers_op(change.op));
        };
        if self.every_table {
            return Ok(self.covers_op(change.op));
        }
        let Self { tables, operations, decided, .. } = self;
        decided.get(table, change.op, || {
            Ok(covers_op(operations, change.op) && tables.choose(&table.schema, &table.name))
        })
    }

    /// The same, decided anew.
    pub(super) fn covers_table(&self, table: &Arc<Table>, op: Op) -> bool {
        self.covers_op(op) && (self.every_table || self.tables.choose(&table.schema, &table.name))
    }

    fn covers_op(&self, op: Op) -> bool {
        covers_op(&self.operations, op)
    }
}

/// A row of a backfill is new to the sink, as an insert is.
fn covers_op(operations: &[Op], op: Op) -> bool {
    let named = |op| operations.contains(&op);
    operations.is_empty() || named(op) || op == Op::Read && named(Op::Insert)
}
