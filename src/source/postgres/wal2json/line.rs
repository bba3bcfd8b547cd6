//! A line of wal2json, in each of the shapes that it has had: one object for a change
//! (`format-version` 2), one for a transaction (1), and a mixture of both that WalStream reads
//! (<https://github.com/eulerto/wal2json>).

use std::borrow::Cow;

use super::json::{Json, Scalar};
use crate::{
    change::{Lsn, Op, Timestamp},
    error::{Error, Result},
};

/// The oid of `bytea`, whose `\x` the plugin leaves away.
const BYTEA: u32 = 17;

/// What a line says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// A transaction begins.
    Begin(Marker),
    /// It ends.
    Commit(Marker),
    /// A row changed.
    Row(RowChange<'a>),
    /// A table was emptied.
    Truncate {
        /// The schema's name.
        schema: String,
        /// The table's name.
        table: String,
    },
    /// A logical message.
    Message {
        /// Whether it belongs to the transaction around it.
        transactional: bool,
        /// Where it is in the log.
        lsn: Option<Lsn>,
        /// The prefix that the writer gave.
        prefix: String,
        /// The content up to its first NUL byte, where the plugin ends it.
        content: Cow<'a, [u8]>,
    },
}

/// What a line says of a transaction, as far as it was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Marker {
    /// The transaction's id.
    pub xid: Option<u32>,
    /// When it was committed.
    pub time: Option<Timestamp>,
    /// The LSN of the commit record.
    pub lsn: Option<Lsn>,
    /// The LSN after the commit record.
    pub next: Option<Lsn>,
}

/// An insert, update or delete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowChange<'a> {
    /// Which of the three.
    pub op: Op,
    /// The schema's name.
    pub schema: String,
    /// The table's name.
    pub table: String,
    /// The new row, without large values that were left alone.
    pub columns: Vec<Cell<'a>>,
    /// The old row's identity; `None` where the line has none.
    pub identity: Option<Vec<Cell<'a>>>,
    /// The names of the primary key's columns, where the line has them.
    pub primary_key: Option<Vec<String>>,
}

/// One column of a row.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cell<'a> {
    /// The column's name.
    pub name: Cow<'a, str>,
    /// The type's oid, where it was asked for.
    pub type_oid: Option<u32>,
    /// `attnum`, where it was asked for.
    pub position: Option<u16>,
    /// Whether NULL is allowed, where it was asked for.
    pub optional: Option<bool>,
    /// PostgreSQL's text of the value; `None` is NULL.
    pub value: Option<Cow<'a, [u8]>>,
}

/// Decodes one line, which must be whole.
pub fn parse(bytes: &[u8]) -> Result<Vec<Event<'_>>> {
    let mut input = Json::new(bytes);
    let mut object = Object::default();
    object.read(&mut input)?;
    input.end()?;
    match object.changes.take() {
        Some(changes) => transaction(&object, changes),
        None => Ok(vec![object.event()?]),
    }
}

/// The events of a line that holds a transaction; a free message has a line to itself.
fn transaction<'a>(head: &Object<'a>, changes: Vec<Object<'a>>) -> Result<Vec<Event<'a>>> {
    let marker = head.marker();
    let events = changes.into_iter().map(Object::event).collect::<Result<Vec<_>>>()?;
    if let [Event::Message { transactional: false, .. }] = events.as_slice() {
        return Ok(events);
    }
    let mut all = vec![Event::Begin(marker)];
    all.extend(events);
    all.push(Event::Commit(marker));
    Ok(all)
}

/// Every member that an object of any shape may have.
#[derive(Debug, Default)]
struct Object<'a> {
    action: Option<String>,
    xid: Option<u32>,
    time: Option<Timestamp>,
    lsn: Option<Lsn>,
    next: Option<Lsn>,
    schema: Option<String>,
    table: Option<String>,
    columns: Vec<Cell<'a>>,
    identity: Option<Vec<Cell<'a>>>,
    primary_key: Option<Vec<String>>,
    transactional: bool,
    prefix: String,
    content: Cow<'a, [u8]>,
    changes: Option<Vec<Object<'a>>>,
}

impl<'a> Object<'a> {
    fn read(&mut self, input: &mut Json<'a>) -> Result<()> {
        let mut lists = Lists::default();
        input.object(|name, input| match name {
            "action" | "kind" => set(&mut self.action, Some(input.text()?.into_owned())),
            "xid" => set(&mut self.xid, number(input)?),
            "timestamp" => set(&mut self.time, time(input)?),
            "lsn" => set(&mut self.lsn, lsn(input)?),
            "nextlsn" => set(&mut self.next, lsn(input)?),
            "schema" => set(&mut self.schema, Some(input.text()?.into_owned())),
            "table" => set(&mut self.table, Some(input.text()?.into_owned())),
            "columns" => cells(input, &mut self.columns),
            "identity" => cells(input, self.identity.insert(Vec::new())),
            "pk" => self.read_primary_key(input),
            "transactional" => {
                self.transactional = input.scalar()? == Scalar::Bool(true);
                Ok(())
            }
            "prefix" => set(&mut self.prefix, input.text()?.into_owned()),
            "content" => set(&mut self.content, bytes(input.scalar()?)),
            "change" if self.changes.is_none() => self.read_changes(input),
            "oldkeys" => {
                let mut old = Lists::default();
                input.object(|name, input| old.read(name.strip_prefix("key"), input))?;
                self.identity = Some(old.into_cells()?);
                Ok(())
            }
            other => lists.read(other.strip_prefix("column"), input),
        })?;
        if !lists.is_empty() {
            self.columns = lists.into_cells()?;
        }
        Ok(())
    }

    fn read_changes(&mut self, input: &mut Json<'a>) -> Result<()> {
        let mut changes = Vec::new();
        input.array(|input| {
            let mut change = Object::default();
            change.read(input)?;
            changes.push(change);
            Ok(())
        })?;
        self.changes = Some(changes);
        Ok(())
    }

    fn read_primary_key(&mut self, input: &mut Json<'a>) -> Result<()> {
        // `format-version` 1 has an object of lists here, which nothing needs.
        if input.peek() != Some(b'[') {
            return input.skip();
        }
        let names = self.primary_key.insert(Vec::new());
        input.array(|input| {
            input.object(|name, input| match name {
                "name" => {
                    names.push(input.text()?.into_owned());
                    Ok(())
                }
                _ => input.skip(),
            })
        })
    }

    fn marker(&self) -> Marker {
        Marker { xid: self.xid, time: self.time, lsn: self.lsn, next: self.next }
    }

    fn event(self) -> Result<Event<'a>> {
        let action = self.action.as_deref().unwrap_or_default().to_ascii_lowercase();
        let op = match action.as_str() {
            "b" | "begin" => return Ok(Event::Begin(self.marker())),
            "c" | "commit" => return Ok(Event::Commit(self.marker())),
            "m" | "message" => {
                return Ok(Event::Message {
                    transactional: self.transactional,
                    lsn: self.lsn,
                    prefix: self.prefix,
                    content: self.content,
                });
            }
            "t" | "truncate" => {
                let (schema, table) = named(self.schema, self.table)?;
                return Ok(Event::Truncate { schema, table });
            }
            "i" | "insert" => Op::Insert,
            "u" | "update" => Op::Update,
            "d" | "delete" => Op::Delete,
            _ => return Err(Error::data("a line of wal2json has no action that is known")),
        };
        let (schema, table) = named(self.schema, self.table)?;
        if op == Op::Delete && self.identity.is_none() {
            return Err(Error::data(format!("a delete of {schema}.{table} has no old row")));
        }
        Ok(Event::Row(RowChange {
            op,
            schema,
            table,
            columns: self.columns,
            identity: self.identity,
            primary_key: self.primary_key,
        }))
    }
}

fn named(schema: Option<String>, table: Option<String>) -> Result<(String, String)> {
    match (schema, table) {
        (Some(schema), Some(table)) => Ok((schema, table)),
        _ => Err(Error::data("a line of wal2json names no schema and table")),
    }
}

/// The columns of `format-version` 1: a list of names, one of values, and so on.
#[derive(Debug, Default)]
struct Lists<'a> {
    names: Vec<Cow<'a, str>>,
    types: Vec<String>,
    oids: Vec<Option<u32>>,
    values: Vec<Scalar<'a>>,
}

impl<'a> Lists<'a> {
    /// Reads the list `what`, such as `names`; `None`, or what nothing needs, is passed over.
    fn read(&mut self, what: Option<&str>, input: &mut Json<'a>) -> Result<()> {
        match what {
            Some("names") => input.array(|input| {
                self.names.push(input.text()?);
                Ok(())
            }),
            Some("types") => input.array(|input| {
                self.types.push(input.text()?.into_owned());
                Ok(())
            }),
            Some("typeoids") => input.array(|input| {
                self.oids.push(number(input)?);
                Ok(())
            }),
            Some("values") => input.array(|input| {
                self.values.push(input.scalar()?);
                Ok(())
            }),
            _ => input.skip(),
        }
    }

    fn is_empty(&self) -> bool {
        self.names.is_empty() && self.values.is_empty()
    }

    fn into_cells(self) -> Result<Vec<Cell<'a>>> {
        if self.names.len() != self.values.len() {
            return Err(Error::data("a line of wal2json has not one value for each column"));
        }
        let mut types = self.types.into_iter();
        let mut oids = self.oids.into_iter();
        let cell = |(name, value)| {
            let ty = Type { oid: oids.next().flatten(), name: types.next() };
            Cell { name, type_oid: ty.oid, value: ty.text(value), ..Cell::default() }
        };
        Ok(self.names.into_iter().zip(self.values).map(cell).collect())
    }
}

/// Reads the columns of `format-version` 2.
fn cells<'a>(input: &mut Json<'a>, into: &mut Vec<Cell<'a>>) -> Result<()> {
    input.array(|input| {
        let mut cell = Cell::default();
        let mut ty = Type::default();
        let mut value = Scalar::Null;
        input.object(|name, input| match name {
            "name" => set(&mut cell.name, input.text()?),
            "type" => set(&mut ty.name, Some(input.text()?.into_owned())),
            "typeoid" => set(&mut ty.oid, number(input)?),
            "position" => set(&mut cell.position, number(input)?.and_then(|n| n.try_into().ok())),
            "optional" => set(&mut cell.optional, Some(input.scalar()? == Scalar::Bool(true))),
            "value" => set(&mut value, input.scalar()?),
            _ => input.skip(),
        })?;
        cell.type_oid = ty.oid;
        cell.value = ty.text(value);
        into.push(cell);
        Ok(())
    })
}

/// A column's type as far as a line tells it.
#[derive(Debug, Default)]
struct Type {
    oid: Option<u32>,
    name: Option<String>,
}

impl Type {
    /// PostgreSQL's own text of a value.
    fn text<'a>(&self, value: Scalar<'a>) -> Option<Cow<'a, [u8]>> {
        let bytea = match self.oid {
            Some(oid) => oid == BYTEA,
            None => self.name.as_deref() == Some("bytea"),
        };
        match value {
            Scalar::Null => None,
            Scalar::Bool(true) => Some(Cow::Borrowed(b"t")),
            Scalar::Bool(false) => Some(Cow::Borrowed(b"f")),
            Scalar::Number(digits) => Some(Cow::Borrowed(digits)),
            Scalar::Text(hex) if bytea => Some(Cow::Owned([b"\\x", hex.as_ref()].concat())),
            Scalar::Text(text) => Some(text),
        }
    }
}

fn set<T>(slot: &mut T, value: T) -> Result<()> {
    *slot = value;
    Ok(())
}

fn bytes(value: Scalar<'_>) -> Cow<'_, [u8]> {
    match value {
        Scalar::Text(text) => text,
        Scalar::Number(digits) => Cow::Borrowed(digits),
        Scalar::Null | Scalar::Bool(_) => Cow::Borrowed(b""),
    }
}

/// A number of 32 bits. The plugin writes oids with a sign, so that the upper half is negative.
fn number(input: &mut Json<'_>) -> Result<Option<u32>> {
    let digits = match input.scalar()? {
        Scalar::Null => return Ok(None),
        value => bytes(value),
    };
    let number = std::str::from_utf8(&digits).ok().and_then(|text| text.parse::<i64>().ok());
    let unsigned = number.and_then(|number| match i32::try_from(number) {
        Ok(signed) => Some(signed.cast_unsigned()),
        Err(_) => u32::try_from(number).ok(),
    });
    unsigned.map(Some).ok_or_else(|| Error::data("a number in a line of wal2json is none"))
}

fn lsn(input: &mut Json<'_>) -> Result<Option<Lsn>> {
    match input.scalar()? {
        Scalar::Null => Ok(None),
        value => String::from_utf8_lossy(&bytes(value)).parse().map(Some),
    }
}

/// `2026-11-21 00:17:32.36146+00`.
fn time(input: &mut Json<'_>) -> Result<Option<Timestamp>> {
    let text = match input.scalar()? {
        Scalar::Null => return Ok(None),
        value => bytes(value),
    };
    let time = std::str::from_utf8(&text).ok().and_then(|text| text.parse().ok());
    time.map(|time: jiff::Timestamp| Some(Timestamp(time.as_microsecond())))
        .ok_or_else(|| Error::data("a line of wal2json has a time of another form"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What the plugin itself wrote (2.5 on PostgreSQL 15.18), in the two orders of options.
    const RECORDED: &str = include_str!("../../../../tests/fixtures/wal2json/version2.jsonl");
    const VERSION1: &str = include_str!("../../../../tests/fixtures/wal2json/version1.jsonl");
    const MIXED: &str = include_str!("../../../../tests/fixtures/wal2json/mixed.jsonl");

    fn all(lines: &str) -> Vec<Event<'_>> {
        let parsed = lines.lines().flat_map(|line| {
            parse(line.as_bytes()).unwrap_or_else(|error| panic!("{error}: {line}"))
        });
        parsed.collect()
    }

    fn one(line: &str) -> Event<'_> {
        all(line).pop().unwrap()
    }

    fn pairs(cells: &[Cell<'_>]) -> Vec<String> {
        let text = |cell: &Cell<'_>| match &cell.value {
            Some(value) => format!("{}={}", cell.name, String::from_utf8_lossy(value)),
            None => format!("{} null", cell.name),
        };
        cells.iter().map(text).collect()
    }

    fn row<'a, 'b>(event: &'b Event<'a>) -> &'b RowChange<'a> {
        match event {
            Event::Row(row) => row,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_recorded_lines_of_version_2_decode() {
        let events = all(RECORDED);
        assert_eq!(events.len(), RECORDED.lines().count());
        let Event::Begin(begin) = &events[0] else { panic!("{:?}", events[0]) };
        assert_eq!((begin.xid, begin.lsn), (Some(728), None));
        assert_eq!(begin.time.unwrap().to_string(), "2026-11-21T00:17:32.361460Z");
        let insert = row(&events[1]);
        assert_eq!(
            (insert.op, insert.schema.as_str(), insert.table.as_str()),
            (Op::Insert, "public", "events")
        );
        assert_eq!(
            pairs(&insert.columns),
            ["id=1", "name=x", "payload={\"k\": 1}", "created_at=2026-11-21 00:17:32.359205+00"]
        );
        let full = row(&events[2]);
        assert_eq!(pairs(&full.columns), ["id=1", "a=q", "b null"]);
        assert_eq!(pairs(full.identity.as_ref().unwrap()), ["id=1", "a=p", "b null"]);
        assert_eq!(row(&events[4]).op, Op::Delete);
        let truncate = Event::Truncate { schema: "public".into(), table: "events".into() };
        assert_eq!(events[5], truncate);
        let Event::Begin(begin) = &events[7] else { panic!("{:?}", events[7]) };
        assert_eq!((begin.lsn, begin.next), (Some(Lsn(0x153_20A0)), Some(Lsn(0x153_20D0))));
        assert_eq!(row(&events[8]).primary_key, Some(vec!["id".to_owned()]));
        let Event::Message { transactional, prefix, content, .. } = &events[9] else {
            panic!("{:?}", events[9])
        };
        assert!(transactional);
        assert_eq!(prefix, "sequin:transaction_annotations.set");
        assert_eq!(content.as_ref(), b"{\"a\":1}");
    }

    #[test]
    fn a_transaction_of_version_1_is_taken_apart() {
        let events = all(VERSION1);
        let Event::Begin(begin) = &events[0] else { panic!("{:?}", events[0]) };
        assert_eq!((begin.xid, begin.next), (Some(769), Some(Lsn(0x15C_4050))));
        let ops: Vec<_> = events[1..4].iter().map(|event| row(event).op).collect();
        assert_eq!(ops, [Op::Insert, Op::Update, Op::Delete]);
        assert_eq!(pairs(&row(&events[1]).columns), ["id=1", "price=1.50", "raw=\\x00ff", "on=t"]);
        assert_eq!(pairs(&row(&events[2]).columns), ["id=2", "price null", "raw=\\x", "on=f"]);
        assert_eq!(pairs(row(&events[2]).identity.as_ref().unwrap()), ["id=1"]);
        assert_eq!(pairs(row(&events[3]).identity.as_ref().unwrap()), ["id=2"]);
        assert!(matches!(&events[4], Event::Message { transactional: true, .. }));
        assert!(matches!(&events[5], Event::Commit(_)));
        let free = &events[6..];
        assert!(matches!(free, [Event::Message { transactional: false, .. }]), "{free:?}");
    }

    #[test]
    fn the_mixture_of_both_versions_that_walstream_reads_is_read() {
        let events = all(MIXED);
        let rows: Vec<_> = events.iter().filter(|event| matches!(event, Event::Row(_))).collect();
        assert_eq!(rows.len(), 3);
        assert_eq!(pairs(&row(rows[0]).columns), ["id=1", "name=x"]);
        assert_eq!(pairs(row(rows[1]).identity.as_ref().unwrap()), ["id=1"]);
        assert_eq!(row(rows[2]).op, Op::Delete);
        assert!(events.iter().any(|event| matches!(event, Event::Truncate { .. })));
    }

    #[test]
    fn a_value_is_what_postgres_would_have_written() {
        let line = r#"{"action":"I","schema":"s","table":"t","columns":[
            {"name":"a","typeoid":1700,"value":1.500},{"name":"b","typeoid":17,"value":"00ff"},
            {"name":"c","typeoid":16,"value":true},{"name":"d","typeoid":701,"value":"NaN"},
            {"name":"e","value":"x","typeoid":-294967296,"position":7,"optional":false},
            {"name":"f","type":"bytea","value":""},{"name":"g","typeoid":16392,"value":"\\x41"}]}"#
            .replace('\n', " ");
        let event = one(&line);
        let cells = &row(&event).columns;
        let expected =
            ["a=1.500", "b=\\x00ff", "c=t", "d=NaN", "e=x", "f=\\x", "g=\\x41"].map(String::from);
        assert_eq!(pairs(cells), expected);
        assert_eq!(cells[4].type_oid, Some(4_000_000_000));
        assert_eq!((cells[4].position, cells[4].optional), (Some(7), Some(false)));
    }

    #[test]
    fn a_line_that_is_not_whole_or_names_nothing_is_refused() {
        for line in [
            "",
            "{}",
            "[]",
            r#"{"action":"I"}"#,
            r#"{"action":"X","schema":"s","table":"t"}"#,
            r#"{"action":"D","schema":"s","table":"t"}"#,
            r#"{"action":"B","lsn":"nonsense"}"#,
            r#"{"action":"B","timestamp":"yesterday"}"#,
            r#"{"action":"B"} {"action":"C"}"#,
            r#"{"action":"B""#,
            r#"{"change":[{"kind":"insert","schema":"s","table":"t","columnnames":["a"],
               "columnvalues":[]}]}"#,
        ] {
            assert!(parse(line.as_bytes()).is_err(), "{line}");
        }
    }

    proptest! {
        #[test]
        fn a_recorded_line_that_is_cut_or_altered_never_panics(
            line in prop::sample::select(
                RECORDED.lines().chain(VERSION1.lines()).chain(MIXED.lines()).collect::<Vec<_>>()),
            cut in any::<prop::sample::Index>(), byte in any::<u8>(),
        ) {
            let at = cut.index(line.len());
            prop_assert!(parse(&line.as_bytes()[..at]).is_err());
            let mut altered = line.as_bytes().to_vec();
            altered[at] = byte;
            let _ = parse(&altered);
        }

        #[test]
        fn foreign_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes);
        }
    }
}
