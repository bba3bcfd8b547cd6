//! Which changes a sink gets: by table, schema and operation.

use std::{collections::HashMap, sync::Arc};

use crate::{
    change::{Batch, Change, Op},
    config::{self, Globs},
    schema::Table,
};

/// Decisions kept at most; beyond it all are made anew.
const TABLES_MAX: usize = 4096;

/// A sink's rules. A change passes where all of them let it: table, schema and operation.
/// Rules over tables and schemas say nothing about logical messages, which have neither; the
/// operations say nothing about the rows of backfills, which have a rule of their own.
#[derive(Debug)]
pub struct Filter {
    tables: Globs,
    schemas: Vec<String>,
    operations: Vec<Op>,
    reads: bool,
    watermarks: bool,
    filtered: u64,
    last: Option<(Arc<Table>, bool)>,
    /// By address; the table is kept alive, so that its address names it.
    decided: HashMap<usize, (Arc<Table>, bool)>,
}

impl Filter {
    /// The rules of `sink`.
    pub fn new(sink: &config::Sink) -> Self {
        Self {
            tables: Globs::new(&sink.tables),
            schemas: sink.schemas.clone(),
            operations: sink.operations.clone(),
            reads: true,
            watermarks: false,
            filtered: 0,
            last: None,
            decided: HashMap::new(),
        }
    }

    /// Whether the rows of backfills (`read`) pass; by default they do.
    #[must_use]
    pub fn reads(mut self, reads: bool) -> Self {
        self.reads = reads;
        self
    }

    /// Lets the watermarks of backfills pass, which no sink gets.
    #[must_use]
    pub fn with_watermarks(mut self) -> Self {
        self.watermarks = true;
        self
    }

    /// The changes that pass, in their order. The end of a transaction whose last change is
    /// filtered moves to the last one that is left of it. The batch may become empty: progress
    /// passes what was filtered.
    pub fn apply(&mut self, batch: Batch) -> Batch {
        let before = batch.changes.len();
        let mut passed: Vec<Change> = Vec::with_capacity(before);
        for change in batch.changes {
            if self.passes(&change) {
                passed.push(change);
            } else if change.closes_transaction
                && let Some(last) = passed.last_mut()
                && last.transaction == change.transaction
            {
                last.closes_transaction = true;
            }
        }
        self.filtered += (before - passed.len()) as u64;
        Batch { changes: passed, position: batch.position }
    }

    /// The operations of a table's changes that pass.
    pub fn operations_of(&mut self, table: &Arc<Table>) -> Vec<Op> {
        let rows = [Op::Insert, Op::Update, Op::Delete].into_iter();
        let read = Some(Op::Read).filter(|_| self.reads);
        let passing = rows.filter(|op| self.passes_operation(*op)).chain(read).collect();
        if self.passes_table(table) { passing } else { Vec::new() }
    }

    /// Changes that did not pass, since the start.
    pub fn filtered(&self) -> u64 {
        self.filtered
    }

    /// The rule that leaves a change out, if one does: the key under which it is written.
    pub fn reason(&mut self, change: &Change) -> Option<&'static str> {
        let named = |table: &Arc<Table>| {
            let schema = self.schemas.is_empty() || self.schemas.contains(&table.schema);
            if schema { "tables" } else { "schemas" }
        };
        let of_table = change.table.as_ref().map_or("tables", named);
        match (change.op, self.passes(change)) {
            (_, true) => None,
            (Op::Read, _) if !self.reads => Some("reads"),
            (op, _) if op != Op::Read && !self.passes_operation(op) => Some("operations"),
            _ => Some(of_table),
        }
    }

    fn passes_operation(&self, op: Op) -> bool {
        self.operations.is_empty() || self.operations.contains(&op)
    }

    fn passes(&mut self, change: &Change) -> bool {
        let operation = match change.op {
            Op::Read => self.reads,
            op => self.passes_operation(op),
        };
        let watermark = self.watermarks || !change.is_watermark();
        operation && watermark && change.table.as_ref().is_none_or(|table| self.passes_table(table))
    }

    fn passes_table(&mut self, table: &Arc<Table>) -> bool {
        match &self.last {
            Some((last, passes)) if Arc::ptr_eq(last, table) => *passes,
            _ => {
                let passes = self.look_up(table);
                self.last = Some((Arc::clone(table), passes));
                passes
            }
        }
    }

    fn look_up(&mut self, table: &Arc<Table>) -> bool {
        let address = Arc::as_ptr(table).addr();
        if let Some((_, passes)) = self.decided.get(&address) {
            return *passes;
        }
        let schema = self.schemas.is_empty() || self.schemas.contains(&table.schema);
        let passes = schema && self.tables.choose(&table.schema, &table.name);
        if self.decided.len() >= TABLES_MAX {
            self.decided.clear();
        }
        self.decided.insert(address, (Arc::clone(table), passes));
        passes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        change::{Before, Lsn, Transaction},
        schema::Identity,
    };

    fn filter(tables: &[&str], schemas: &[&str], operations: &[Op]) -> Filter {
        let mut sink: config::Sink =
            serde_json::from_value(serde_json::json!({"kind": "stdout"})).unwrap();
        sink.tables = tables.iter().map(|&text| text.into()).collect();
        sink.schemas = schemas.iter().map(|&text| text.into()).collect();
        sink.operations = operations.to_vec();
        Filter::new(&sink)
    }

    fn change(offset: u64, op: Op, name: Option<(&str, &str)>) -> Change {
        let table = name.map(|(schema, name)| {
            let (schema, name) = (schema.into(), name.into());
            let columns = Vec::new();
            Arc::new(Table { oid: 1, schema, name, identity: Identity::Default, columns })
        });
        let transaction = Transaction { commit_lsn: Lsn(offset / 10), ..Transaction::default() };
        Change {
            offset,
            op,
            index: 0,
            closes_transaction: offset % 10 == 9,
            transaction,
            table,
            before: Before::Nothing,
            after: None,
            message: None,
            shaped: None,
            backfill: None,
        }
    }

    fn offsets(batch: &Batch) -> Vec<u64> {
        batch.changes.iter().map(|change| change.offset).collect()
    }

    fn mixed() -> Batch {
        let orders = Some(("public", "orders"));
        let changes = vec![
            change(0, Op::Insert, orders),
            change(1, Op::Update, orders),
            change(2, Op::Delete, Some(("public", "audit_log"))),
            change(3, Op::Read, orders),
            change(4, Op::Truncate, Some(("shop", "orders"))),
            change(5, Op::Message, None),
            change(6, Op::Delete, orders),
        ];
        Batch { changes, position: None }
    }

    #[test]
    fn no_rule_lets_everything_pass() {
        let mut filter = filter(&[], &[], &[]);
        assert_eq!(offsets(&filter.apply(mixed())), [0, 1, 2, 3, 4, 5, 6]);
        assert_eq!(filter.filtered(), 0);
    }

    #[test]
    fn rules_combine_and_what_they_take_is_counted() {
        let mut tables = filter(&["*.orders"], &[], &[]);
        assert_eq!(offsets(&tables.apply(mixed())), [0, 1, 3, 4, 5, 6]);
        let mut schemas = filter(&[], &["public"], &[]);
        assert_eq!(offsets(&schemas.apply(mixed())), [0, 1, 2, 3, 5, 6]);
        let mut operations = filter(&[], &[], &[Op::Delete]);
        assert_eq!(offsets(&operations.apply(mixed())), [2, 3, 6]);
        let mut no_reads = filter(&[], &[], &[]).reads(false);
        assert_eq!(offsets(&no_reads.apply(mixed())), [0, 1, 2, 4, 5, 6]);
        let mut all = filter(&["public.*", "!*.audit_*"], &["public"], &[Op::Delete]);
        assert_eq!(offsets(&all.apply(mixed())), [3, 6]);
        assert_eq!(all.filtered(), 5);
        assert_eq!(offsets(&all.apply(mixed())), [3, 6]);
        assert_eq!(all.filtered(), 10);
    }

    #[test]
    fn the_end_of_a_transaction_moves_to_what_is_left_of_it() {
        let mut filter = filter(&["public.orders"], &[], &[]);
        let other = Some(("public", "other"));
        let changes = vec![
            change(8, Op::Insert, Some(("public", "orders"))),
            change(9, Op::Insert, other),
            change(19, Op::Insert, other),
        ];
        let passed = filter.apply(Batch { changes, position: None });
        assert_eq!(offsets(&passed), [8]);
        assert!(passed.changes[0].closes_transaction);
        let changes =
            vec![change(8, Op::Insert, Some(("public", "orders"))), change(19, Op::Insert, other)];
        let passed = filter.apply(Batch { changes, position: None });
        assert!(!passed.changes[0].closes_transaction, "the end of another transaction");
    }

    #[test]
    fn more_tables_than_are_remembered_are_still_decided_rightly() {
        let mut filter = filter(&["public.orders"], &[], &[]);
        for round in 0..TABLES_MAX as u64 + 10 {
            let name = if round % 2 == 0 { "orders" } else { "other" };
            let changes = vec![change(round, Op::Insert, Some(("public", name)))];
            let passed = filter.apply(Batch { changes, position: None });
            assert_eq!(passed.changes.len() as u64, (round + 1) % 2);
        }
        assert!(filter.decided.len() <= TABLES_MAX);
    }
}
