//! What flows through Walrace: changes, their rows and positions, and batches of them. No I/O.
//!
//! A row keeps PostgreSQL's own text, in the layout of a pgoutput tuple, from the socket to the
//! sink; it is shaped into JSON only when a sink asks.

mod key;

use std::{fmt, str::FromStr, sync::Arc};

use bytes::Bytes;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use self::key::{Key, Keys, Room};
use crate::{
    error::{Error, Result},
    schema::Table,
};

/// A log sequence number: a byte position in PostgreSQL's write-ahead log, printed as
/// `16/B374D848`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Lsn(pub u64);

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

impl FromStr for Lsn {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let halves = text.split_once('/').and_then(|(high, low)| {
            let high = u32::from_str_radix(high, 16).ok()?;
            let low = u32::from_str_radix(low, 16).ok()?;
            Some(Self(u64::from(high) << 32 | u64::from(low)))
        });
        halves.ok_or_else(|| Error::data(format!("`{text}` is not an LSN such as 16/B374D848")))
    }
}

/// Microseconds since 1970-01-01 00:00:00 UTC.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Timestamp(pub i64);

impl Timestamp {
    /// The wall clock.
    pub fn now() -> Self {
        Self(jiff::Timestamp::now().as_microsecond())
    }
}

impl fmt::Display for Timestamp {
    /// RFC 3339 with microseconds: `2026-04-06T09:14:22.000123Z`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match jiff::Timestamp::from_microsecond(self.0) {
            Ok(time) => write!(f, "{time:.6}"),
            Err(_) => write!(f, "{} us", self.0),
        }
    }
}

/// Where a source is. Everything below a position is included in it, so the position of a whole
/// transaction is the LSN after its commit record with index 0, and positions compare as tuples
/// within one timeline.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Position {
    /// The timeline of the server.
    pub timeline: u32,
    /// The LSN of a commit record, or the LSN after one.
    pub lsn: Lsn,
    /// The index of a change within its transaction.
    pub index: u32,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.timeline, self.lsn, self.index)
    }
}

/// The database that a journal is filled from: it is compared on every connect.
///
/// What was added after the first release is absent in older journals, and then not compared.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// PostgreSQL's system identifier, as text.
    pub system: String,
    /// The database's name.
    pub database: String,
    /// The replication slot.
    pub slot: String,
    /// The database's oid: a renamed database keeps it, one that is made anew has another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub database_oid: Option<u32>,
    /// The publications that were read, each with its oid.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub publications: Vec<(String, u32)>,
    /// The tables that they named; empty where there are too many to remember.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub published: Vec<Member>,
    /// Where the part of the journal begins that can be compared with the server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub comparable: Option<Mark>,
}

/// A table of a publication.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// The table's oid.
    pub table: u32,
    /// The publication's oid.
    pub publication: u32,
    /// The oid of the membership: another one once the table was taken out and put back.
    pub oid: u32,
}

/// A place in a journal and in its source: all that was committed from `lsn` on has an offset from
/// `offset` on. A gap that was accepted begins a new one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// The offset of the first change behind it.
    pub offset: u64,
    /// Where the source was.
    pub lsn: Lsn,
}

/// The last transactions of a journal, to be compared with what the server sends again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recent {
    /// Those that changed rows, in commit order.
    pub transactions: Vec<Transaction>,
    /// None that committed from here on is lacking; `None`: nothing can be said.
    pub complete_from: Option<Lsn>,
}

/// Why a journal may lack a range of the source's history.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap {
    /// The last position that the journal has for certain.
    pub from: Position,
    /// Where it goes on.
    pub to: Position,
    /// What happened, for people.
    pub reason: String,
}

/// The transaction of a change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Transaction {
    /// The transaction id; 0 for a logical message that was emitted outside a transaction.
    pub xid: u32,
    /// The LSN of the commit record.
    pub commit_lsn: Lsn,
    /// When it was committed, by the server's clock. Not monotone in commit order.
    pub commit_time: Timestamp,
}

/// The prefix of the logical messages by which backfills are fenced; no sink sees them.
pub const WATERMARK_PREFIX: &str = "walrace.backfill";

/// What happened to the row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Op {
    /// A new row.
    Insert,
    /// A changed row.
    Update,
    /// A removed row.
    Delete,
    /// An existing row, read by a backfill.
    Read,
    /// All rows of one table were removed.
    Truncate,
    /// A logical message (`pg_logical_emit_message`).
    Message,
}

impl Op {
    /// Every operation.
    pub const ALL: [Op; 6] =
        [Op::Insert, Op::Update, Op::Delete, Op::Read, Op::Truncate, Op::Message];

    /// The letter of the native envelope.
    pub fn letter(self) -> char {
        match self {
            Op::Insert => 'c',
            Op::Update => 'u',
            Op::Delete => 'd',
            Op::Read => 'r',
            Op::Truncate => 't',
            Op::Message => 'm',
        }
    }

    /// The lower-case word, as filters and `tail` write it.
    pub fn word(self) -> &'static str {
        match self {
            Op::Insert => "insert",
            Op::Update => "update",
            Op::Delete => "delete",
            Op::Read => "read",
            Op::Truncate => "truncate",
            Op::Message => "message",
        }
    }
}

impl FromStr for Op {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|op| op.word() == text).ok_or_else(|| {
            let words = Self::ALL.map(Self::word).join(", ");
            Error::config(format!("`{text}` is no operation")).remedy(format!("one of: {words}"))
        })
    }
}

/// What is known of the row before the change.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Before {
    /// Nothing: an insert, or an update that left the key alone under the default identity.
    #[default]
    Nothing,
    /// The identity's columns; every other column is null because it was not sent.
    Key(Row),
    /// The whole row (`REPLICA IDENTITY FULL`).
    Full(Row),
}

impl Before {
    /// The row, whole or partial.
    pub fn row(&self) -> Option<&Row> {
        match self {
            Before::Nothing => None,
            Before::Key(row) | Before::Full(row) => Some(row),
        }
    }
}

/// A logical message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// The prefix that the writer gave.
    pub prefix: String,
    /// The content, any bytes.
    pub content: Bytes,
    /// Whether it belongs to a transaction, and vanishes with it.
    pub transactional: bool,
}

/// One row change, truncate, snapshot row or logical message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Its dense number in the journal; 0 until the journal has given it.
    pub offset: u64,
    /// What happened.
    pub op: Op,
    /// Its number within the transaction, from 0, in statement order.
    pub index: u32,
    /// The last change of its transaction.
    pub closes_transaction: bool,
    /// Its transaction.
    pub transaction: Transaction,
    /// The table; `None` only for a message.
    pub table: Option<Arc<Table>>,
    /// The old row, as far as it is known.
    pub before: Before,
    /// The new row of an insert, update or read.
    pub after: Option<Row>,
    /// The logical message, for [`Op::Message`].
    pub message: Option<Arc<Message>>,
    /// What the rules of one sink made of it; never part of a journal.
    pub shaped: Option<Box<Shaped>>,
    /// The backfill that read it, for [`Op::Read`].
    pub backfill: Option<Backfill>,
}

/// Which backfill read a row, and whom it is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Backfill {
    /// The backfill's number in the catalog.
    pub id: u64,
    /// The only sink that wants its rows, by [`Backfill::number_of`]; 0: every sink does.
    pub audience: u32,
}

impl Backfill {
    /// The number of a sink: the CRC-32C of its name, but never 0.
    pub fn number_of(sink: &str) -> u32 {
        crc32c::crc32c(sink.as_bytes()).max(1)
    }

    /// Whether the sink wants its rows.
    pub fn is_for(self, sink: u32) -> bool {
        self.audience == 0 || self.audience == sink
    }
}

/// What the rules of one sink decided about a change, beside its rows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shaped {
    /// Its number among the parts of an exploded change, from 0.
    pub part: u32,
    /// Topic, channel, subject, path or index, in place of the sink's own template.
    pub route: Option<String>,
    /// The message's key, in place of the row's.
    pub key: Option<String>,
    /// Further headers of the message, for targets that have headers.
    pub headers: Vec<(String, String)>,
    /// The message's body, in place of the sink's format.
    pub payload: Option<Bytes>,
    /// A dead letter that is delivered after later changes of its key.
    pub late: bool,
    /// The keys that it had before the rules, where they gave its row others.
    pub source_keys: Option<Box<Keys>>,
}

impl Change {
    /// Bytes of its rows or message: what counts against `batch_bytes_max`.
    pub fn bytes(&self) -> usize {
        let row = |row: Option<&Row>| row.map_or(0, |row| row.as_bytes().len());
        let message = self.message.as_ref().map_or(0, |m| m.content.len() + m.prefix.len());
        row(self.before.row()) + row(self.after.as_ref()) + message
    }

    /// Whether it is a watermark of a backfill, of whatever Walrace.
    pub fn is_watermark(&self) -> bool {
        self.message.as_ref().is_some_and(|message| message.prefix == WATERMARK_PREFIX)
    }

    /// Its position in `timeline`.
    pub fn position(&self, timeline: u32) -> Position {
        Position { timeline, lsn: self.transaction.commit_lsn, index: self.index }
    }

    /// The row that holds the key as it is after the change: the new row, else the old one.
    pub fn key_row(&self) -> Option<&Row> {
        self.after.as_ref().or_else(|| self.before.row())
    }

    /// The topic, channel, subject, path or index that the sink's rules chose.
    pub fn route(&self) -> Option<&str> {
        self.shaped.as_ref()?.route.as_deref()
    }

    /// Headers that the sink's rules added; `walrace-late` marks a dead letter that comes late.
    pub fn headers(&self) -> impl Iterator<Item = (&str, &str)> {
        let shaped = self.shaped.as_deref();
        let own = shaped.map_or(&[][..], |shaped| &shaped.headers);
        let late = shaped.is_some_and(|shaped| shaped.late).then_some(("walrace-late", "true"));
        own.iter().map(|(name, value)| (name.as_str(), value.as_str())).chain(late)
    }

    /// What the sink's rules decided, to be added to.
    pub fn shaped_mut(&mut self) -> &mut Shaped {
        self.shaped.get_or_insert_default()
    }

    /// A text that is the same whenever the same change is delivered again: base64 of
    /// `<commit lsn>:<index>`, and `:<part>` from the second part of an exploded change on; made
    /// from the position and never from the offset.
    pub fn idempotency_key(&self) -> String {
        use base64::Engine;
        let mut plain = format!("{}:{}", self.transaction.commit_lsn.0, self.index);
        if let Some(part) = self.shaped.as_ref().map(|shaped| shaped.part).filter(|part| *part > 0)
        {
            plain.push_str(&format!(":{part}"));
        }
        base64::engine::general_purpose::STANDARD.encode(plain)
    }
}

/// A bounded, ordered run of changes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// The changes, in commit order.
    pub changes: Vec<Change>,
    /// Where the source is once this batch is durable; `None` while a transaction is open at its
    /// end. A batch without changes may still carry one (an idle source moves on).
    pub position: Option<Position>,
}

impl Batch {
    /// Bytes of all rows and messages.
    pub fn bytes(&self) -> usize {
        self.changes.iter().map(Change::bytes).sum()
    }

    /// The offset after its last change.
    pub fn end(&self) -> Option<u64> {
        self.changes.last().map(|change| change.offset + 1)
    }
}

/// One value of a [`Row`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value<'a> {
    /// SQL NULL.
    Null,
    /// A TOASTed value that the change left alone and that was not sent.
    Unchanged,
    /// PostgreSQL's text of the value, in the client encoding UTF8.
    Text(&'a [u8]),
}

/// A row as pgoutput's `TupleData`: a big-endian u16 count of columns, then for each `n`, `u`, or
/// `t` with a big-endian u32 length and that many bytes
/// (<https://www.postgresql.org/docs/current/protocol-logicalrep-message-formats.html>).
///
/// The layout is checked once, when the row is made.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Row(Bytes);

impl Row {
    /// Takes bytes that are exactly one tuple.
    pub fn new(bytes: Bytes) -> Result<Self> {
        match Self::measure(&bytes)? {
            length if length == bytes.len() => Ok(Self(bytes)),
            length => Err(Error::data(format!("{} bytes after a tuple", bytes.len() - length))),
        }
    }

    /// Bytes that the tuple at the head of `bytes` takes.
    pub fn measure(bytes: &[u8]) -> Result<usize> {
        let short = || Error::data("a tuple ends before its last column");
        let count = bytes.first_chunk::<2>().ok_or_else(short)?;
        let mut at = 2;
        for _ in 0..u16::from_be_bytes(*count) {
            let rest = bytes.get(at..).ok_or_else(short)?;
            at += match rest.first().ok_or_else(short)? {
                b'n' | b'u' => 1,
                b't' => {
                    let length = rest.get(1..5).and_then(<[u8]>::first_chunk::<4>);
                    5 + u32::from_be_bytes(*length.ok_or_else(short)?) as usize
                }
                kind => return Err(Error::data(format!("unknown column kind {kind:#04x}"))),
            };
        }
        if at > bytes.len() { Err(short()) } else { Ok(at) }
    }

    /// A row made of values; `None` is NULL.
    pub fn from_values<'a>(values: impl IntoIterator<Item = Value<'a>>) -> Self {
        let mut bytes = vec![0, 0];
        let mut count = 0u16;
        for value in values {
            count += 1;
            match value {
                Value::Null => bytes.push(b'n'),
                Value::Unchanged => bytes.push(b'u'),
                Value::Text(text) => {
                    bytes.push(b't');
                    let length = u32::try_from(text.len()).unwrap_or(u32::MAX);
                    bytes.extend_from_slice(&length.to_be_bytes());
                    bytes.extend_from_slice(text);
                }
            }
        }
        if let Some(head) = bytes.first_chunk_mut::<2>() {
            *head = count.to_be_bytes();
        }
        Self(Bytes::from(bytes))
    }

    /// The encoded tuple.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Count of columns.
    pub fn len(&self) -> usize {
        self.0.first_chunk::<2>().map_or(0, |count| u16::from_be_bytes(*count).into())
    }

    /// Whether it has no column at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The values in the order of the table's columns.
    pub fn values(&self) -> Values<'_> {
        Values { rest: self.0.get(2..).unwrap_or_default() }
    }

    /// The value of column `index`.
    pub fn value(&self, index: usize) -> Option<Value<'_>> {
        self.values().nth(index)
    }
}

impl fmt::Debug for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = |value| match value {
            Value::Null => "null".into(),
            Value::Unchanged => "unchanged".into(),
            Value::Text(text) => format!("{:?}", String::from_utf8_lossy(text)),
        };
        f.debug_list().entries(self.values().map(text)).finish()
    }
}

/// Iterator over a [`Row`]'s values.
#[derive(Clone, Debug)]
pub struct Values<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Values<'a> {
    type Item = Value<'a>;

    fn next(&mut self) -> Option<Value<'a>> {
        let (kind, rest) = self.rest.split_first()?;
        let (value, rest) = match kind {
            b'n' => (Value::Null, rest),
            b'u' => (Value::Unchanged, rest),
            _ => {
                let (length, rest) = rest.split_first_chunk::<4>()?;
                let (text, rest) = rest.split_at_checked(u32::from_be_bytes(*length) as usize)?;
                (Value::Text(text), rest)
            }
        };
        self.rest = rest;
        Some(value)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_lsn_prints_as_postgres_prints_it() {
        assert_eq!(Lsn(0x16_B374_D848).to_string(), "16/B374D848");
        assert_eq!("0/16B6A90".parse::<Lsn>().unwrap(), Lsn(0x016B_6A90));
        assert!("16B6A90".parse::<Lsn>().is_err());
    }

    #[test]
    fn a_timestamp_prints_microseconds() {
        assert_eq!(Timestamp(1_775_466_862_000_123).to_string(), "2026-04-06T09:14:22.000123Z");
    }

    proptest! {
        #[test]
        fn a_row_gives_back_what_was_put_in(
            texts in prop::collection::vec(prop::option::of(prop::option::of(".*")), 0..20)
        ) {
            let values = || texts.iter().map(|text| match text {
                None => Value::Null,
                Some(None) => Value::Unchanged,
                Some(Some(text)) => Value::Text(text.as_bytes()),
            });
            let row = Row::from_values(values());
            prop_assert_eq!(row.len(), texts.len());
            prop_assert!(row.values().eq(values()));
            prop_assert_eq!(&Row::new(row.0.clone()).unwrap(), &row);
        }

        #[test]
        fn foreign_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            if let Ok(row) = Row::new(Bytes::from(bytes)) {
                prop_assert_eq!(row.values().count(), row.len());
            }
        }
    }
}
