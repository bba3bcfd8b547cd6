//! From messages to changes: transactions, their indexes and ends, and the position they lead to.
//!
//! States: *between* transactions; *inside* one that is new to us; *inside* one that the journal
//! has already (the server may send it again), whose changes are dropped. A transaction that was
//! sent while it was open is read back from the spool at its commit, and is then like any other.

use std::{collections::HashMap, sync::Arc};

use bytes::Bytes;

use super::{
    pgoutput::{Message, Relation, StreamCommit},
    spool::Record,
};
use crate::{
    change::{self, Batch, Before, Change, Lsn, Op, Position, Row, Transaction, Value},
    error::{Error, Result},
    schema::Table,
};

/// Turns a relation into the table that changes carry.
pub(super) type Resolve<'a> = &'a mut dyn FnMut(&Relation) -> Result<Table>;

/// Collects changes until they are taken as a batch.
#[derive(Debug)]
pub(super) struct Assembler {
    timeline: u32,
    /// All below it is in the journal.
    progress: Lsn,
    tables: Tables,
    /// How many relations the server has sent.
    pub(super) arrivals: u64,
    /// The table of the last change: most changes are of the same one.
    recent: Option<(u32, Arc<Table>)>,
    open: Option<Open>,
    pending: Vec<Change>,
    /// How many of the pending changes belong to transactions that have ended.
    closed: usize,
    /// Wire bytes of the pending changes.
    bytes: usize,
    /// Where the source is after the closed changes.
    position: Option<Lsn>,
}

/// Tables by oid.
type Tables = HashMap<u32, Described>;

/// A table as the server last described it.
#[derive(Debug)]
struct Described {
    table: Arc<Table>,
    /// Its number among the relations that the server has sent.
    arrival: u64,
}

/// The transaction whose messages arrive.
#[derive(Debug)]
struct Open {
    transaction: Transaction,
    index: u32,
    known: bool,
    /// The tables as a transaction from the spool was told of them, and it alone until its end: the
    /// server describes each table anew in each such transaction.
    overlay: Option<Tables>,
}

impl Assembler {
    /// Begins between two transactions.
    pub(super) fn new(start: Position) -> Self {
        Self {
            timeline: start.timeline,
            progress: start.lsn,
            tables: Tables::new(),
            arrivals: 0,
            recent: None,
            open: None,
            pending: Vec::new(),
            closed: 0,
            bytes: 0,
            position: None,
        }
    }

    /// Takes one message of `size` wire bytes.
    pub(super) fn accept(
        &mut self,
        message: Message,
        size: usize,
        resolve: Resolve<'_>,
    ) -> Result<()> {
        match message {
            Message::Begin { commit_lsn, commit_time, xid } => {
                self.begin(Transaction { xid, commit_lsn, commit_time }, None)?;
            }
            Message::Commit { end_lsn, .. } => self.commit(end_lsn)?,
            Message::Relation(relation) => {
                self.arrivals += 1;
                self.describe(resolve(&relation)?, self.arrivals);
            }
            Message::Insert { relation, after } => {
                let rows = (Before::Nothing, Some(after));
                self.push(size, Op::Insert, relation, rows)?;
            }
            Message::Update { relation, before, after } => {
                let after = complete(&before, after);
                self.push(size, Op::Update, relation, (before, Some(after)))?;
            }
            Message::Delete { relation, before } => {
                self.push(size, Op::Delete, relation, (before, None))?;
            }
            Message::Truncate { relations } => {
                for relation in relations {
                    self.push(size, Op::Truncate, relation, (Before::Nothing, None))?;
                }
            }
            Message::Logical { transactional, lsn, prefix, content } => {
                let message = change::Message { prefix, content, transactional };
                self.message(size, lsn, message)?;
            }
            Message::Ignored => {}
        }
        Ok(())
    }

    /// Begins to take a transaction from the spool; `end_streamed` ends it.
    pub(super) fn begin_streamed(&mut self, commit: &StreamCommit) -> Result<()> {
        let StreamCommit { xid, commit_lsn, commit_time, .. } = *commit;
        self.begin(Transaction { xid, commit_lsn, commit_time }, Some(Tables::new()))
    }

    /// Takes one message of a transaction from the spool.
    pub(super) fn accept_spooled(&mut self, record: Record, resolve: Resolve<'_>) -> Result<()> {
        let size = record.message.len();
        match super::pgoutput::decode(record.message)? {
            Message::Relation(relation) => self.describe(resolve(&relation)?, record.arrival),
            message => self.accept(message, size, resolve)?,
        }
        Ok(())
    }

    /// Ends a transaction from the spool. What it was told of tables now holds for all, unless they
    /// were told something else since.
    pub(super) fn end_streamed(&mut self, commit: &StreamCommit) -> Result<()> {
        let overlay = self.open.as_mut().and_then(|open| open.overlay.take());
        for (oid, described) in overlay.unwrap_or_default() {
            if self.tables.get(&oid).is_none_or(|known| known.arrival < described.arrival) {
                self.tables.insert(oid, described);
            }
        }
        self.recent = None;
        self.commit(commit.end_lsn)
    }

    /// The server has nothing for us below `lsn`.
    pub(super) fn nothing_below(&mut self, lsn: Lsn) {
        if self.open.is_none() {
            self.advance(lsn);
        }
    }

    /// The name of a table that the server has described.
    pub(super) fn table_name(&self, oid: u32) -> Option<String> {
        self.tables.get(&oid).map(|described| described.table.full_name())
    }

    /// Wire bytes that wait to be taken.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether whole transactions wait to be taken.
    pub(super) fn has_closed(&self) -> bool {
        self.closed > 0
    }

    /// Whether the position has moved, with or without changes.
    pub(super) fn has_moved(&self) -> bool {
        self.position.is_some()
    }

    /// Takes the whole transactions and their position.
    pub(super) fn take_closed(&mut self) -> Option<Batch> {
        let lsn = self.position.take()?;
        let rest = self.pending.split_off(self.closed);
        let changes = std::mem::replace(&mut self.pending, rest);
        self.closed = 0;
        self.bytes = self.pending.iter().map(Change::bytes).sum();
        Some(Batch { changes, position: Some(self.at(lsn)) })
    }

    /// Takes what there is of an open transaction, but for its last change: the next message says
    /// whether that one ends it.
    pub(super) fn take_open(&mut self) -> Option<Batch> {
        let last = self.pending.pop()?;
        let changes = std::mem::take(&mut self.pending);
        self.bytes = last.bytes();
        self.pending.push(last);
        // A position from before the transaction, behind a part of it, would commit that part. The
        // transaction's own end passes it.
        (self.closed, self.position) = (0, None);
        (!changes.is_empty()).then_some(Batch { changes, position: None })
    }

    fn at(&self, lsn: Lsn) -> Position {
        Position { timeline: self.timeline, lsn, index: 0 }
    }

    fn advance(&mut self, lsn: Lsn) {
        if lsn > self.progress {
            self.progress = lsn;
            self.position = Some(lsn);
        }
    }

    fn begin(&mut self, transaction: Transaction, overlay: Option<Tables>) -> Result<()> {
        if self.open.is_some() {
            return Err(Error::retry("a transaction began inside another one"));
        }
        let known = transaction.commit_lsn < self.progress;
        self.open = Some(Open { transaction, index: 0, known, overlay });
        self.recent = None;
        Ok(())
    }

    /// The same content keeps its Arc, so that the journal sees one version.
    fn describe(&mut self, table: Table, arrival: u64) {
        self.recent = None;
        let oid = table.oid;
        let overlay = self.open.as_mut().and_then(|open| open.overlay.as_mut());
        let known = overlay.as_ref().and_then(|overlay| overlay.get(&oid));
        let known = known.or_else(|| self.tables.get(&oid)).map(|known| &known.table);
        let table = match known.filter(|known| ***known == table) {
            Some(known) => Arc::clone(known),
            None => Arc::new(table),
        };
        overlay.unwrap_or(&mut self.tables).insert(oid, Described { table, arrival });
    }

    fn commit(&mut self, end_lsn: Lsn) -> Result<()> {
        let open = self.open.take().ok_or_else(outside)?;
        if !open.known {
            if open.index > 0
                && let Some(last) = self.pending.last_mut()
            {
                last.closes_transaction = true;
            }
            self.closed = self.pending.len();
            self.advance(end_lsn);
        }
        Ok(())
    }

    fn push(
        &mut self,
        size: usize,
        op: Op,
        relation: u32,
        (before, after): (Before, Option<Row>),
    ) -> Result<()> {
        let table = self.table(relation)?;
        let columns = table.columns.len();
        let fits = |row: Option<&Row>| row.is_none_or(|row| row.len() == columns);
        if !fits(before.row()) || !fits(after.as_ref()) {
            return Err(Error::retry(format!("a row of {table} has not its {columns} columns")));
        }
        let open = self.open.as_mut().ok_or_else(outside)?;
        if open.known {
            return Ok(());
        }
        self.pending.push(Change {
            offset: 0,
            op,
            index: open.index,
            closes_transaction: false,
            transaction: open.transaction,
            table: Some(table),
            before,
            after,
            message: None,
            shaped: None,
            backfill: None,
        });
        open.index += 1;
        self.bytes += size;
        Ok(())
    }

    fn message(&mut self, size: usize, lsn: Lsn, message: change::Message) -> Result<()> {
        let (transaction, index) = match (message.transactional, &mut self.open) {
            (true, None) => return Err(outside()),
            (true, Some(open)) if open.known => return Ok(()),
            (true, Some(open)) => {
                open.index += 1;
                (open.transaction, open.index - 1)
            }
            // Its own position: the stream has no commit for it, and it is sent between two
            // transactions only.
            (false, Some(_)) => {
                return Err(Error::retry("a free message came inside a transaction"));
            }
            (false, None) if lsn <= self.progress => return Ok(()),
            (false, None) => {
                let commit_time = change::Timestamp::now();
                // Inside its record, which ends at `lsn`: where the record behind it is a commit,
                // that is the place, and the idempotency key, of another change.
                let commit_lsn = Lsn(lsn.0.saturating_sub(1));
                (Transaction { xid: 0, commit_lsn, commit_time }, 0)
            }
        };
        let free = !message.transactional;
        self.pending.push(Change {
            offset: 0,
            op: Op::Message,
            index,
            closes_transaction: free,
            transaction,
            table: None,
            before: Before::Nothing,
            after: None,
            message: Some(Arc::new(message)),
            shaped: None,
            backfill: None,
        });
        self.bytes += size;
        if free {
            self.closed = self.pending.len();
            self.advance(lsn);
        }
        Ok(())
    }

    fn table(&mut self, oid: u32) -> Result<Arc<Table>> {
        match &self.recent {
            Some((recent, table)) if *recent == oid => Ok(Arc::clone(table)),
            _ => {
                let overlay = self.open.as_ref().and_then(|open| open.overlay.as_ref());
                let described = overlay.unwrap_or(&self.tables).get(&oid).ok_or_else(|| {
                    Error::retry(format!("a change of table {oid} came before its relation"))
                })?;
                self.recent = Some((oid, Arc::clone(&described.table)));
                Ok(Arc::clone(&described.table))
            }
        }
    }
}

/// Fills what was not sent of the new row from the old one, where that has it.
fn complete(before: &Before, after: Row) -> Row {
    let Some(old) = before.row() else { return after };
    if !after.values().any(|value| value == Value::Unchanged) {
        return after;
    }
    Row::from_values(after.values().zip(old.values()).map(|pair| match pair {
        (Value::Unchanged, Value::Text(text)) => Value::Text(text),
        (value, _) => value,
    }))
}

fn outside() -> Error {
    Error::retry("a change came outside a transaction")
}

/// Decodes and assembles one message of the stream.
pub(super) fn feed(assembler: &mut Assembler, bytes: Bytes, resolve: Resolve<'_>) -> Result<()> {
    let size = bytes.len();
    assembler.accept(super::pgoutput::decode(bytes)?, size, resolve)
}

#[cfg(test)]
mod tests {
    use super::{
        super::pgoutput::{RelationColumn, tests::encode},
        *,
    };
    use crate::schema::{Column, Identity, Type};

    fn relation(oid: u32) -> Relation {
        let column = |name: &str| RelationColumn {
            key: name == "id",
            name: name.into(),
            type_oid: 25,
            modifier: -1,
        };
        Relation {
            oid,
            schema: "public".into(),
            name: format!("t{oid}"),
            identity: Identity::Default,
            columns: vec![column("id"), column("body")],
        }
    }

    fn resolve(relation: &Relation) -> Result<Table> {
        let columns = relation.columns.iter().map(|column| Column {
            name: column.name.clone(),
            ty: Type::base(column.type_oid, column.modifier),
            primary_key: column.key,
            identity: column.key,
            nullable: None,
        });
        Ok(Table {
            oid: relation.oid,
            schema: relation.schema.clone(),
            name: relation.name.clone(),
            identity: relation.identity,
            columns: columns.collect(),
        })
    }

    fn row(id: &str, body: Value<'_>) -> Row {
        Row::from_values([Value::Text(id.as_bytes()), body])
    }

    fn assembler(progress: u64, messages: &[Bytes]) -> Assembler {
        let start = Position { timeline: 1, lsn: Lsn(progress), index: 0 };
        let mut assembler = Assembler::new(start);
        for bytes in messages {
            feed(&mut assembler, bytes.clone(), &mut resolve).unwrap();
        }
        assembler
    }

    fn insert(id: &str) -> Bytes {
        encode::row(b'I', 1, &[(b'N', &row(id, Value::Null))])
    }

    fn relation_bytes() -> Bytes {
        encode::relation(&relation(1))
    }

    #[test]
    fn only_the_last_change_of_a_transaction_closes_it() {
        let mut assembler = assembler(
            0,
            &[
                encode::begin(100, 9),
                relation_bytes(),
                insert("1"),
                insert("2"),
                encode::commit(100, 120),
            ],
        );
        let batch = assembler.take_closed().unwrap();
        let ends: Vec<_> = batch.changes.iter().map(|c| (c.index, c.closes_transaction)).collect();
        assert_eq!(ends, [(0, false), (1, true)]);
        assert_eq!(batch.position, Some(Position { timeline: 1, lsn: Lsn(120), index: 0 }));
        assert!(assembler.take_closed().is_none());
    }

    #[test]
    fn a_large_transaction_is_cut_and_still_ends_once() {
        let mut cut = assembler(
            0,
            &[encode::begin(100, 9), relation_bytes(), insert("1"), insert("2"), insert("3")],
        );
        assert!(cut.take_closed().is_none());
        let first = cut.take_open().unwrap();
        assert_eq!((first.changes.len(), first.position), (2, None));
        assert!(cut.take_open().is_none(), "the last change waits for what follows it");
        feed(&mut cut, encode::commit(100, 120), &mut resolve).unwrap();
        let second = cut.take_closed().unwrap();
        assert_eq!(second.changes.len(), 1);
        assert!(second.changes[0].closes_transaction);
        assert_eq!(second.changes[0].index, 2);
    }

    #[test]
    fn a_keepalive_before_a_large_transaction_never_commits_a_part_of_it() {
        let mut cut = assembler(0, &[]);
        cut.nothing_below(Lsn(50));
        for bytes in [encode::begin(100, 9), relation_bytes(), insert("1"), insert("2")] {
            feed(&mut cut, bytes, &mut resolve).unwrap();
        }
        assert_eq!(cut.take_open().unwrap().position, None);
        assert!(!cut.has_moved());
        assert!(cut.take_closed().is_none(), "a position inside an open transaction");
        feed(&mut cut, encode::commit(100, 120), &mut resolve).unwrap();
        assert_eq!(cut.take_closed().unwrap().position.unwrap().lsn, Lsn(120));
    }

    #[test]
    fn what_the_journal_has_already_is_dropped() {
        let again =
            [encode::begin(100, 9), relation_bytes(), insert("1"), encode::commit(100, 120)];
        let mut assembler = assembler(120, &again);
        assert!(assembler.take_closed().is_none());
        for bytes in [encode::begin(120, 10), insert("2"), encode::commit(120, 140)] {
            feed(&mut assembler, bytes, &mut resolve).unwrap();
        }
        assert_eq!(assembler.take_closed().unwrap().changes.len(), 1);
    }

    fn stream_commit(xid: u32, commit_lsn: u64) -> StreamCommit {
        let commit_time = change::Timestamp(5);
        StreamCommit {
            xid,
            commit_lsn: Lsn(commit_lsn),
            end_lsn: Lsn(commit_lsn + 20),
            commit_time,
        }
    }

    /// A table whose second column has a name of its own.
    fn described(column: &str) -> Bytes {
        let mut relation = relation(1);
        relation.columns[1].name = column.into();
        encode::relation(&relation)
    }

    fn spooled(assembler: &mut Assembler, (arrival, message): (u64, Bytes)) -> Result<()> {
        assembler.accept_spooled(Record { xid: 7, arrival, message }, &mut resolve)
    }

    /// The name of the second column of each change's table.
    fn columns(batch: &Batch) -> Vec<&str> {
        batch.changes.iter().map(|c| c.table.as_ref().unwrap().columns[1].name.as_str()).collect()
    }

    #[test]
    fn a_transaction_from_the_spool_is_like_any_other() {
        let mut assembler = assembler(0, &[]);
        let commit = stream_commit(7, 100);
        assembler.begin_streamed(&commit).unwrap();
        for message in [relation_bytes(), insert("1"), insert("2"), insert("3")] {
            spooled(&mut assembler, (1, message)).unwrap();
        }
        assert_eq!(assembler.take_open().unwrap().changes.len(), 2);
        assembler.end_streamed(&commit).unwrap();
        let batch = assembler.take_closed().unwrap();
        assert_eq!((batch.changes[0].index, batch.changes[0].closes_transaction), (2, true));
        assert_eq!(batch.changes[0].transaction.xid, 7);
        assert_eq!(batch.position.unwrap().lsn, Lsn(120));
    }

    #[test]
    fn what_a_transaction_from_the_spool_was_told_of_tables_is_its_own_until_it_ends() {
        let mut assembler = assembler(
            0,
            &[encode::begin(50, 3), described("old"), insert("1"), encode::commit(50, 60)],
        );
        let commit = stream_commit(7, 100);
        assembler.begin_streamed(&commit).unwrap();
        let error = spooled(&mut assembler, (0, insert("2"))).unwrap_err();
        assert!(error.to_string().contains("before its relation"), "{error}");
        spooled(&mut assembler, (2, described("new"))).unwrap();
        spooled(&mut assembler, (0, insert("2"))).unwrap();
        assembler.end_streamed(&commit).unwrap();
        for bytes in [encode::begin(130, 8), insert("3"), encode::commit(130, 140)] {
            feed(&mut assembler, bytes, &mut resolve).unwrap();
        }
        assert_eq!(columns(&assembler.take_closed().unwrap()), ["old", "new", "new"]);
    }

    #[test]
    fn what_others_were_told_later_outlives_the_end_of_a_transaction_from_the_spool() {
        let mut assembler = assembler(0, &[]);
        assembler.arrivals += 1; // the relation that goes to the spool
        for bytes in [encode::begin(50, 3), described("later"), insert("1"), encode::commit(50, 60)]
        {
            feed(&mut assembler, bytes, &mut resolve).unwrap();
        }
        let commit = stream_commit(7, 100);
        assembler.begin_streamed(&commit).unwrap();
        spooled(&mut assembler, (1, described("earlier"))).unwrap();
        spooled(&mut assembler, (0, insert("2"))).unwrap();
        assembler.end_streamed(&commit).unwrap();
        for bytes in [encode::begin(130, 8), insert("3"), encode::commit(130, 140)] {
            feed(&mut assembler, bytes, &mut resolve).unwrap();
        }
        assert_eq!(columns(&assembler.take_closed().unwrap()), ["later", "earlier", "later"]);
    }

    #[test]
    fn a_transaction_from_the_spool_that_the_journal_has_is_dropped_but_for_its_tables() {
        let mut assembler = assembler(110, &[]);
        let commit = stream_commit(7, 100);
        assembler.begin_streamed(&commit).unwrap();
        for message in [relation_bytes(), insert("1")] {
            spooled(&mut assembler, (1, message)).unwrap();
        }
        assembler.end_streamed(&commit).unwrap();
        assert!(assembler.take_closed().is_none());
        for bytes in [encode::begin(130, 8), insert("3"), encode::commit(130, 140)] {
            feed(&mut assembler, bytes, &mut resolve).unwrap();
        }
        assert_eq!(assembler.take_closed().unwrap().changes.len(), 1);
    }

    #[test]
    fn an_unchanged_value_is_completed_from_a_full_old_row_and_kept_otherwise() {
        let (old, new) = (row("1", Value::Text(b"long")), row("1", Value::Unchanged));
        let full = complete(&Before::Full(old), new.clone());
        assert_eq!(full.value(1), Some(Value::Text(b"long")));
        assert_eq!(complete(&Before::Nothing, new.clone()).value(1), Some(Value::Unchanged));
        let key = Before::Key(row("0", Value::Null));
        assert_eq!(complete(&key, new).value(1), Some(Value::Unchanged));
    }

    #[test]
    fn a_truncate_of_two_tables_is_two_changes() {
        let mut bytes = vec![b'T', 0, 0, 0, 2, 0];
        bytes.extend([0, 0, 0, 1, 0, 0, 0, 2]);
        let second = encode::relation(&relation(2));
        let mut assembler = assembler(
            0,
            &[
                encode::begin(100, 9),
                relation_bytes(),
                second,
                bytes.into(),
                encode::commit(100, 120),
            ],
        );
        let batch = assembler.take_closed().unwrap();
        let names: Vec<_> =
            batch.changes.iter().map(|c| c.table.as_ref().unwrap().name.as_str()).collect();
        assert_eq!(names, ["t1", "t2"]);
    }

    #[test]
    fn a_free_message_is_a_transaction_of_its_own() {
        let mut assembler = assembler(0, &[encode::message(false, 77, "note", b"\0\xff")]);
        let batch = assembler.take_closed().unwrap();
        let change = &batch.changes[0];
        assert_eq!((change.transaction.xid, change.index, change.closes_transaction), (0, 0, true));
        assert_eq!(change.transaction.commit_lsn, Lsn(76));
        assert_eq!(batch.position.unwrap().lsn, Lsn(77));
        feed(&mut assembler, encode::message(false, 77, "note", b""), &mut resolve).unwrap();
        assert!(assembler.take_closed().is_none(), "it was sent again");
    }

    #[test]
    fn a_free_message_right_before_a_commit_has_a_place_of_its_own() {
        let mut assembler = assembler(
            0,
            &[
                encode::message(false, 100, "note", b""),
                encode::begin(100, 9),
                relation_bytes(),
                insert("1"),
                encode::commit(100, 120),
            ],
        );
        let changes = assembler.take_closed().unwrap().changes;
        assert!(changes[0].position(1) < changes[1].position(1));
        assert_ne!(changes[0].idempotency_key(), changes[1].idempotency_key());
    }

    #[test]
    fn an_empty_transaction_moves_the_position() {
        let mut assembler = assembler(0, &[encode::begin(100, 9), encode::commit(100, 120)]);
        let batch = assembler.take_closed().unwrap();
        assert!(batch.changes.is_empty());
        assert_eq!(batch.position.unwrap().lsn, Lsn(120));
    }

    #[test]
    fn a_keepalive_inside_a_transaction_moves_nothing() {
        let mut assembler = assembler(0, &[encode::begin(100, 9)]);
        assembler.nothing_below(Lsn(90));
        assert!(assembler.take_closed().is_none());
    }
}
