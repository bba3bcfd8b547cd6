//! The records inside a block: changes, their transactions and tables, positions and gaps.
//!
//! `docs/journal-format.md` has the layout byte by byte.

use std::{collections::HashMap, mem, sync::Arc};

use bytes::Bytes;

use super::{
    Gap,
    cut::{Cut, Flaw},
};
use crate::{
    change::{Before, Change, Lsn, Message, Op, Position, Row, Timestamp, Transaction},
    error::{Class, Classify, Error, Result},
    schema::Table,
};

const TRANSACTION: u8 = 1;
const CHANGE: u8 = 2;
const PROGRESS: u8 = 3;
const DESCRIPTOR: u8 = 4;
const GAP: u8 = 5;
/// Reserved by format 1: a piece of a value that is too large for memory.
const LARGE_VALUE: u8 = 6;

const CLOSES: u8 = 1 << 3;
const BEFORE_SHIFT: u8 = 4;
const AFTER: u8 = 1 << 6;
/// The change's index and table follow; otherwise it has the next index and the same table.
const EXPLICIT: u8 = 1 << 7;

/// Pointers that are remembered before the cache begins anew; equal tables are found by content.
const POINTERS_MAX: usize = 4096;

/// The tables that a segment has described so far, in the order of their ids.
pub(super) type Tables = Vec<Arc<Table>>;

/// Writes records; its buffer and caches live as long as the segment.
#[derive(Debug, Default)]
pub(super) struct Encoder {
    raw: Vec<u8>,
    transaction: Option<Transaction>,
    /// The index that a change has unless it says otherwise.
    index: u32,
    /// Whether the block has had a change whose table a next one can share.
    sharing: bool,
    last: Option<Arc<Table>>,
    last_id: u32,
    tables: Tables,
    by_pointer: HashMap<usize, (Arc<Table>, u32)>,
    by_content: HashMap<Arc<Table>, u32>,
    described: bool,
}

impl Encoder {
    /// Goes on in a segment that has described `tables`.
    pub(super) fn resume(tables: Tables) -> Self {
        let mut encoder = Self::default();
        for table in tables {
            encoder.learn(table);
        }
        encoder
    }

    pub(super) fn raw(&self) -> &[u8] {
        &self.raw
    }

    pub(super) fn tables(&self) -> &Tables {
        &self.tables
    }

    /// Whether the block describes a table.
    pub(super) fn described(&self) -> bool {
        self.described
    }

    /// Forgets the block, keeping its memory unless one huge change made it large.
    pub(super) fn begin_block(&mut self) {
        self.raw.clear();
        self.raw.shrink_to(super::block::RAW_BYTES_MAX * 2);
        self.transaction = None;
        self.sharing = false;
        self.index = 0;
        self.described = false;
    }

    /// Forgets every table above the first `count`: what described them was cut off the file.
    pub(super) fn cut_back(&mut self, count: usize) {
        let mut tables = mem::take(&mut self.tables);
        tables.truncate(count);
        *self = Self::resume(tables);
    }

    pub(super) fn change(&mut self, change: &Change) -> Result<()> {
        if self.transaction != Some(change.transaction) {
            self.transaction(change.transaction);
        }
        let same = match (&self.last, &change.table) {
            (Some(last), Some(table)) => self.sharing && Arc::ptr_eq(last, table),
            (None, None) => self.sharing,
            _ => false,
        };
        if !same {
            self.switch(change.table.as_ref())?;
        }
        let explicit = !same || change.index != self.index;
        let (before, old) = match &change.before {
            Before::Nothing => (0, None),
            Before::Key(row) => (1, Some(row)),
            Before::Full(row) => (2, Some(row)),
        };
        let mut flags = op_code(change.op) | before << BEFORE_SHIFT;
        flags |= if change.closes_transaction { CLOSES } else { 0 };
        flags |= if change.after.is_some() { AFTER } else { 0 };
        flags |= if explicit { EXPLICIT } else { 0 };
        self.raw.extend_from_slice(&[CHANGE, flags]);
        if explicit {
            self.raw.extend_from_slice(&change.index.to_le_bytes());
            self.raw.extend_from_slice(&self.last_id.to_le_bytes());
        }
        self.index = change.index.wrapping_add(1);
        for row in [old, change.after.as_ref()].into_iter().flatten() {
            self.run(row.as_bytes())?;
        }
        match (change.op, &change.message) {
            (Op::Message, message) => self.message(message.as_deref()),
            (_, None) => Ok(()),
            (_, Some(_)) => Err(Error::bug(format!("an {} has a message", change.op.word()))),
        }
    }

    pub(super) fn progress(&mut self, position: Position) {
        self.raw.push(PROGRESS);
        self.raw.extend_from_slice(&position.timeline.to_le_bytes());
        self.raw.extend_from_slice(&position.lsn.0.to_le_bytes());
        self.raw.extend_from_slice(&position.index.to_le_bytes());
    }

    pub(super) fn gap(&mut self, gap: &Gap) -> Result<()> {
        let json = serde_json::to_vec(gap).class(Class::Bug, || "cannot write a gap as JSON")?;
        self.raw.push(GAP);
        self.run(&json)
    }

    fn transaction(&mut self, transaction: Transaction) {
        self.raw.push(TRANSACTION);
        self.raw.extend_from_slice(&transaction.xid.to_le_bytes());
        self.raw.extend_from_slice(&transaction.commit_lsn.0.to_le_bytes());
        self.raw.extend_from_slice(&transaction.commit_time.0.to_le_bytes());
        self.transaction = Some(transaction);
        self.index = 0;
    }

    /// Makes `table` the one that the next changes share, describing it where it is new.
    fn switch(&mut self, table: Option<&Arc<Table>>) -> Result<()> {
        self.sharing = true;
        self.last = table.map(Arc::clone);
        self.last_id = match table {
            Some(table) => self.id(table)?,
            None => 0,
        };
        Ok(())
    }

    /// The number of a table within the segment, from 1.
    fn id(&mut self, table: &Arc<Table>) -> Result<u32> {
        let pointer = Arc::as_ptr(table) as usize;
        if let Some((_, id)) = self.by_pointer.get(&pointer) {
            return Ok(*id);
        }
        if self.by_pointer.len() >= POINTERS_MAX {
            self.by_pointer.clear();
        }
        if let Some(id) = self.by_content.get(table) {
            self.by_pointer.insert(pointer, (Arc::clone(table), *id));
            return Ok(*id);
        }
        let json = serde_json::to_vec(&**table)
            .class(Class::Bug, || format!("cannot write the descriptor of {table} as JSON"))?;
        let id = self.learn(Arc::clone(table));
        self.described = true;
        self.raw.push(DESCRIPTOR);
        self.raw.extend_from_slice(&id.to_le_bytes());
        self.run(&json)?;
        Ok(id)
    }

    fn learn(&mut self, table: Arc<Table>) -> u32 {
        self.tables.push(Arc::clone(&table));
        let id = u32::try_from(self.tables.len()).unwrap_or(u32::MAX);
        self.by_pointer.insert(Arc::as_ptr(&table) as usize, (Arc::clone(&table), id));
        self.by_content.insert(table, id);
        id
    }

    fn message(&mut self, message: Option<&Message>) -> Result<()> {
        let Some(message) = message else {
            self.raw.push(0);
            return Ok(());
        };
        self.raw.push(if message.transactional { 2 } else { 1 });
        self.run(message.prefix.as_bytes())?;
        self.run(&message.content)
    }

    fn run(&mut self, bytes: &[u8]) -> Result<()> {
        let too_long = || Error::data(format!("a row of {} bytes is too large", bytes.len()));
        let length = u32::try_from(bytes.len()).ok().filter(|length| *length <= u32::MAX / 4);
        self.raw.extend_from_slice(&length.ok_or_else(too_long)?.to_le_bytes());
        self.raw.extend_from_slice(bytes);
        Ok(())
    }
}

/// What a block holds.
#[derive(Debug, Default)]
pub(super) struct Decoded {
    pub(super) changes: Vec<Change>,
    pub(super) gaps: Vec<Gap>,
    pub(super) progress: Option<Position>,
}

/// Reads the records of a block whose first change has the offset `first`; rows share `raw`, and
/// tables that it describes are added to `tables`.
pub(super) fn decode(raw: &Bytes, first: u64, tables: &mut Tables) -> Result<Decoded, Flaw> {
    let mut cut = Cut(raw);
    let mut decoder = Decoder { raw, tables, transaction: None, index: 0, table: 0, offset: first };
    let mut decoded = Decoded::default();
    while !cut.is_empty() {
        match cut.u8()? {
            TRANSACTION => decoder.transaction(&mut cut)?,
            CHANGE => decoded.changes.push(decoder.change(&mut cut)?),
            PROGRESS => decoded.progress = Some(position(&mut cut)?),
            DESCRIPTOR => decoder.descriptor(&mut cut)?,
            GAP => decoded.gaps.push(json(cut.run()?, "gap")?),
            LARGE_VALUE => return Err(Flaw::Newer("it holds a large value in pieces".into())),
            kind => return Err(Flaw::Newer(format!("its record kind {kind} is unknown"))),
        }
    }
    Ok(decoded)
}

struct Decoder<'a> {
    raw: &'a Bytes,
    tables: &'a mut Tables,
    transaction: Option<Transaction>,
    index: u32,
    table: u32,
    offset: u64,
}

impl Decoder<'_> {
    fn transaction(&mut self, cut: &mut Cut<'_>) -> Result<(), Flaw> {
        let xid = cut.u32()?;
        let (commit_lsn, commit_time) = (Lsn(cut.u64()?), Timestamp(cut.i64()?));
        self.transaction = Some(Transaction { xid, commit_lsn, commit_time });
        self.index = 0;
        Ok(())
    }

    fn descriptor(&mut self, cut: &mut Cut<'_>) -> Result<(), Flaw> {
        let id = cut.u32()? as usize;
        let table = cut.run()?;
        // A reader that came by the index knows the tables of the whole segment already.
        if id == self.tables.len() + 1 {
            self.tables.push(Arc::new(json(table, "table")?));
        } else if id == 0 || id > self.tables.len() {
            let known = self.tables.len();
            return Err(format!("table {id} is described after {known}").into());
        }
        Ok(())
    }

    fn change(&mut self, cut: &mut Cut<'_>) -> Result<Change, Flaw> {
        let flags = cut.u8()?;
        if flags & EXPLICIT != 0 {
            self.index = cut.u32()?;
            self.table = cut.u32()?;
        }
        let op = op_of(flags & 7)?;
        let before = match flags >> BEFORE_SHIFT & 3 {
            0 => Before::Nothing,
            1 => Before::Key(self.row(cut)?),
            2 => Before::Full(self.row(cut)?),
            kind => return Err(format!("unknown kind {kind} of old row").into()),
        };
        let after = if flags & AFTER != 0 { Some(self.row(cut)?) } else { None };
        let message = if op == Op::Message { self.message(cut)? } else { None };
        let change = Change {
            offset: self.offset,
            op,
            index: self.index,
            closes_transaction: flags & CLOSES != 0,
            transaction: self.transaction.ok_or("a change before its transaction")?,
            table: self.table()?,
            before,
            after,
            message,
            shaped: None,
            backfill: None,
        };
        self.offset += 1;
        self.index = self.index.wrapping_add(1);
        Ok(change)
    }

    fn table(&self) -> Result<Option<Arc<Table>>, Flaw> {
        let Some(index) = self.table.checked_sub(1) else { return Ok(None) };
        match self.tables.get(index as usize) {
            Some(table) => Ok(Some(Arc::clone(table))),
            None => Err(format!("table {} is not described", self.table).into()),
        }
    }

    fn row(&self, cut: &mut Cut<'_>) -> Result<Row, Flaw> {
        Row::new(self.raw.slice_ref(cut.run()?)).map_err(|error| error.to_string().into())
    }

    fn message(&self, cut: &mut Cut<'_>) -> Result<Option<Arc<Message>>, Flaw> {
        let transactional = match cut.u8()? {
            0 => return Ok(None),
            1 => false,
            2 => true,
            kind => return Err(format!("unknown kind {kind} of message").into()),
        };
        let prefix = std::str::from_utf8(cut.run()?).map_err(|error| error.to_string())?.to_owned();
        let content = self.raw.slice_ref(cut.run()?);
        Ok(Some(Arc::new(Message { prefix, content, transactional })))
    }
}

fn position(cut: &mut Cut<'_>) -> Result<Position, Flaw> {
    Ok(Position { timeline: cut.u32()?, lsn: Lsn(cut.u64()?), index: cut.u32()? })
}

fn json<T: serde::de::DeserializeOwned>(bytes: &[u8], what: &str) -> Result<T, Flaw> {
    serde_json::from_slice(bytes).map_err(|error| format!("cannot read a {what}: {error}").into())
}

fn op_code(op: Op) -> u8 {
    match op {
        Op::Insert => 0,
        Op::Update => 1,
        Op::Delete => 2,
        Op::Read => 3,
        Op::Truncate => 4,
        Op::Message => 5,
    }
}

fn op_of(code: u8) -> Result<Op, Flaw> {
    let find = |op: &Op| op_code(*op) == code;
    Op::ALL.into_iter().find(find).ok_or_else(|| format!("unknown operation {code}").into())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::schema::Identity;

    fn table(name: &str) -> Arc<Table> {
        let (schema, name) = ("public".into(), name.into());
        Arc::new(Table { oid: 1, schema, name, identity: Identity::Full, columns: Vec::new() })
    }

    fn change(index: u32, table: Option<Arc<Table>>) -> Change {
        Change {
            offset: 0,
            op: Op::Insert,
            index,
            closes_transaction: false,
            transaction: Transaction::default(),
            table,
            before: Before::Nothing,
            after: Some(Row::from_values([])),
            message: None,
            shaped: None,
            backfill: None,
        }
    }

    #[test]
    fn a_table_is_described_once_in_a_segment_and_found_by_content() {
        let mut encoder = Encoder::default();
        let (first, equal, other) = (table("a"), table("a"), table("b"));
        for (index, table) in [&first, &equal, &other, &first].into_iter().enumerate() {
            let index = u32::try_from(index).unwrap();
            encoder.change(&change(index, Some(Arc::clone(table)))).unwrap();
        }
        assert_eq!(encoder.tables(), &vec![Arc::clone(&first), Arc::clone(&other)]);
        let mut tables = Tables::new();
        let raw = Bytes::copy_from_slice(encoder.raw());
        let changes = decode(&raw, 0, &mut tables).unwrap().changes;
        let names: Vec<_> = changes.iter().map(|c| &c.table.as_ref().unwrap().name[..]).collect();
        assert_eq!(names, ["a", "a", "b", "a"]);
        assert!(Arc::ptr_eq(&tables[0], changes[3].table.as_ref().unwrap()));

        // In the next block of the segment nothing is described, until the second table is cut off.
        encoder.begin_block();
        encoder.change(&change(0, Some(Arc::clone(&other)))).unwrap();
        assert!(!encoder.described());
        encoder.cut_back(1);
        encoder.begin_block();
        encoder.change(&change(0, Some(other))).unwrap();
        assert!(encoder.described());
    }

    #[test]
    fn a_small_change_costs_its_row_and_six_bytes() {
        let (mut encoder, table) = (Encoder::default(), table("a"));
        encoder.change(&change(0, Some(Arc::clone(&table)))).unwrap();
        let before = encoder.raw().len();
        encoder.change(&change(1, Some(table))).unwrap();
        assert_eq!(encoder.raw().len() - before, 6 + 2);
    }

    #[test]
    fn what_a_newer_version_wrote_is_told_from_damage() {
        let read = |bytes: &'static [u8]| decode(&Bytes::from_static(bytes), 0, &mut Tables::new());
        assert!(matches!(read(&[LARGE_VALUE]), Err(Flaw::Newer(_))));
        assert!(matches!(read(&[99]), Err(Flaw::Newer(_))));
        assert!(matches!(read(&[CHANGE]), Err(Flaw::Bad(_))));
        assert!(matches!(read(&[CHANGE, 0]), Err(Flaw::Bad(_))));
    }

    proptest! {
        #[test]
        fn foreign_bytes_never_panic(
            begins in prop::collection::vec(0..8u8, 0..6),
            bytes in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let bytes: Vec<u8> = begins.into_iter().chain(bytes).collect();
            let _ = decode(&Bytes::from(bytes), 0, &mut vec![table("a")]);
        }

        #[test]
        fn altered_records_never_panic(place: prop::sample::Index, byte: u8) {
            let mut encoder = Encoder::default();
            for index in 0..4 {
                let mut change = change(index, Some(table("a")));
                change.before = Before::Key(Row::from_values([crate::change::Value::Null]));
                encoder.change(&change).unwrap();
            }
            encoder.progress(Position::default());
            let mut bytes = encoder.raw().to_vec();
            let place = place.index(bytes.len());
            bytes[place] = byte;
            let _ = decode(&Bytes::from(bytes), 0, &mut Tables::new());
        }
    }
}
