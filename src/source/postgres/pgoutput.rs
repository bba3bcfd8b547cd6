//! The messages of the `pgoutput` plugin, decoded in place
//! (<https://www.postgresql.org/docs/current/protocol-logicalrep-message-formats.html>).

use bytes::{Buf, Bytes};

use crate::{
    change::{Before, Lsn, Row, Timestamp},
    error::{Error, Result},
    schema::Identity,
};

/// Microseconds from 1970-01-01 to 2000-01-01, where PostgreSQL's clock begins.
const POSTGRES_EPOCH_US: i64 = 946_684_800_000_000;

/// One message of the stream. Rows are slices of the bytes that it was decoded from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// A transaction begins; it is sent only once it has committed.
    Begin {
        /// The LSN of its commit record.
        commit_lsn: Lsn,
        /// When it was committed.
        commit_time: Timestamp,
        /// Its id.
        xid: u32,
    },
    /// The transaction ends.
    Commit {
        /// The LSN of the commit record.
        commit_lsn: Lsn,
        /// The LSN after the commit record.
        end_lsn: Lsn,
    },
    /// A table's columns, before its first change and whenever they may have changed.
    Relation(Relation),
    /// A new row.
    Insert {
        /// The table's oid.
        relation: u32,
        /// The row.
        after: Row,
    },
    /// A changed row.
    Update {
        /// The table's oid.
        relation: u32,
        /// What was sent of the old row.
        before: Before,
        /// The new row.
        after: Row,
    },
    /// A removed row.
    Delete {
        /// The table's oid.
        relation: u32,
        /// What was sent of the old row.
        before: Before,
    },
    /// Several tables were emptied by one statement.
    Truncate {
        /// The tables' oids.
        relations: Vec<u32>,
    },
    /// A logical message.
    Logical {
        /// Whether it belongs to the transaction around it.
        transactional: bool,
        /// Where it is in the log.
        lsn: Lsn,
        /// The prefix that the writer gave.
        prefix: String,
        /// The content, any bytes.
        content: Bytes,
    },
    /// A message that Walrace has no use for: `Type` and `Origin`.
    Ignored,
}

/// A table as the stream describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relation {
    /// The oid of `pg_class`.
    pub oid: u32,
    /// The schema's name.
    pub schema: String,
    /// The table's name.
    pub name: String,
    /// Its replica identity.
    pub identity: Identity,
    /// The columns in the order of the tuple.
    pub columns: Vec<RelationColumn>,
}

/// A column of a [`Relation`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RelationColumn {
    /// Part of the replica identity.
    pub key: bool,
    /// The column's name.
    pub name: String,
    /// The type's oid.
    pub type_oid: u32,
    /// `atttypmod`, or -1.
    pub modifier: i32,
}

/// What brackets the blocks of a transaction that is sent while it is still open (protocol 2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Control {
    /// A block of the transaction begins.
    Start {
        /// The id of the transaction itself.
        xid: u32,
        /// Whether nothing of it was sent before.
        first: bool,
    },
    /// The block ends; the transaction stays open.
    Stop,
    /// The transaction has committed.
    Commit(StreamCommit),
    /// The transaction, or a part of it, was rolled back.
    Abort {
        /// The id of the transaction itself.
        xid: u32,
        /// The id of the subtransaction, or of the transaction where all of it was rolled back.
        subxid: u32,
    },
}

/// The end of a transaction that was sent in blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamCommit {
    /// Its id.
    pub xid: u32,
    /// The LSN of the commit record.
    pub commit_lsn: Lsn,
    /// The LSN after the commit record.
    pub end_lsn: Lsn,
    /// When it was committed.
    pub commit_time: Timestamp,
}

/// A message inside a block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// The transaction or subtransaction that it belongs to, and vanishes with.
    pub xid: u32,
    /// The message's kind.
    pub kind: u8,
    /// What follows the id; with the kind before it, it is what [`decode`] takes.
    pub body: Bytes,
}

/// Decodes what brackets blocks; `None` where `bytes` is any other message.
pub fn decode_control(bytes: &Bytes) -> Result<Option<Control>> {
    let Some(kind @ (b'S' | b'E' | b'c' | b'A')) = bytes.first() else { return Ok(None) };
    let mut input = Input(bytes.slice(1..));
    let control = match kind {
        b'S' => Control::Start { xid: input.u32()?, first: input.u8()? == 1 },
        b'E' => Control::Stop,
        b'c' => {
            let xid = input.u32()?;
            input.skip(1)?; // flags, unused
            Control::Commit(StreamCommit {
                xid,
                commit_lsn: Lsn(input.u64()?),
                end_lsn: Lsn(input.u64()?),
                commit_time: input.time()?,
            })
        }
        _ => Control::Abort { xid: input.u32()?, subxid: input.u32()? },
    };
    input.end()?;
    Ok(Some(control))
}

/// Takes the id out of a message inside a block; `None` for a message that Walrace has no use for.
pub fn decode_part(bytes: Bytes) -> Result<Option<Part>> {
    let mut input = Input(bytes);
    match input.u8()? {
        b'Y' | b'O' => Ok(None),
        kind @ (b'R' | b'I' | b'U' | b'D' | b'T' | b'M') => {
            Ok(Some(Part { xid: input.u32()?, kind, body: input.0 }))
        }
        other => {
            let name = other.escape_ascii();
            Err(Error::data(format!("pgoutput sent `{name}` inside a block of a transaction")))
        }
    }
}

/// Decodes one message, which must be all of `bytes`.
pub fn decode(bytes: Bytes) -> Result<Message> {
    let mut input = Input(bytes);
    let kind = input.u8()?;
    let message = match kind {
        b'B' => Message::Begin {
            commit_lsn: Lsn(input.u64()?),
            commit_time: input.time()?,
            xid: input.u32()?,
        },
        b'C' => {
            input.skip(1)?; // flags, unused
            let commit_lsn = Lsn(input.u64()?);
            let end_lsn = Lsn(input.u64()?);
            input.skip(8)?; // the commit time, known since Begin
            Message::Commit { commit_lsn, end_lsn }
        }
        b'R' => Message::Relation(input.relation()?),
        b'I' => {
            let relation = input.u32()?;
            input.expect(b'N')?;
            Message::Insert { relation, after: input.row()? }
        }
        b'U' => {
            let relation = input.u32()?;
            let before = input.before()?;
            if before != Before::Nothing {
                input.expect(b'N')?;
            }
            Message::Update { relation, before, after: input.row()? }
        }
        b'D' => {
            let relation = input.u32()?;
            match input.before()? {
                Before::Nothing => return Err(Error::data("a delete has no old row")),
                before => Message::Delete { relation, before },
            }
        }
        b'T' => input.truncate()?,
        b'M' => input.logical()?,
        b'Y' | b'O' => return Ok(Message::Ignored),
        other => {
            let name = other.escape_ascii();
            return Err(Error::data(format!("pgoutput sent a message of unknown kind `{name}`")));
        }
    };
    input.end()?;
    Ok(message)
}

/// What is left of a message.
struct Input(Bytes);

impl Input {
    fn u8(&mut self) -> Result<u8> {
        self.0.try_get_u8().map_err(|_| short())
    }

    fn u16(&mut self) -> Result<u16> {
        self.0.try_get_u16().map_err(|_| short())
    }

    fn u32(&mut self) -> Result<u32> {
        self.0.try_get_u32().map_err(|_| short())
    }

    fn u64(&mut self) -> Result<u64> {
        self.0.try_get_u64().map_err(|_| short())
    }

    fn time(&mut self) -> Result<Timestamp> {
        let microseconds = self.0.try_get_i64().map_err(|_| short())?;
        Ok(Timestamp(microseconds.saturating_add(POSTGRES_EPOCH_US)))
    }

    fn end(&self) -> Result<()> {
        match self.0.is_empty() {
            true => Ok(()),
            false => Err(Error::data(format!("{} bytes after a pgoutput message", self.0.len()))),
        }
    }

    fn skip(&mut self, count: usize) -> Result<()> {
        self.take(count).map(|_| ())
    }

    fn take(&mut self, count: usize) -> Result<Bytes> {
        match count <= self.0.len() {
            true => Ok(self.0.split_to(count)),
            false => Err(short()),
        }
    }

    fn text(&mut self) -> Result<String> {
        let length = memchr::memchr(0, &self.0).ok_or_else(short)?;
        let text = self.take(length)?;
        self.skip(1)?;
        String::from_utf8(text.into()).map_err(|_| Error::data("a name is not UTF-8"))
    }

    fn expect(&mut self, kind: u8) -> Result<()> {
        match self.u8()? {
            found if found == kind => Ok(()),
            found => Err(Error::data(format!(
                "a tuple of kind `{}` where `{}` is due",
                found.escape_ascii(),
                kind.escape_ascii()
            ))),
        }
    }

    fn row(&mut self) -> Result<Row> {
        let length = Row::measure(&self.0)?;
        Row::new(self.take(length)?)
    }

    /// The old row with the byte that says how much of it there is; an `N` instead is taken too.
    fn before(&mut self) -> Result<Before> {
        match self.u8()? {
            b'N' => Ok(Before::Nothing),
            b'K' => Ok(Before::Key(self.row()?)),
            b'O' => Ok(Before::Full(self.row()?)),
            other => {
                let name = other.escape_ascii();
                Err(Error::data(format!("a tuple of unknown kind `{name}`")))
            }
        }
    }

    fn relation(&mut self) -> Result<Relation> {
        let oid = self.u32()?;
        let schema = match self.text()? {
            empty if empty.is_empty() => "pg_catalog".to_owned(),
            schema => schema,
        };
        let name = self.text()?;
        let identity = match self.u8()? {
            b'd' => Identity::Default,
            b'n' => Identity::Nothing,
            b'f' => Identity::Full,
            b'i' => Identity::Index,
            other => {
                let other = other.escape_ascii();
                return Err(Error::data(format!("unknown replica identity `{other}`")));
            }
        };
        let count = self.u16()?;
        let mut columns = Vec::with_capacity(usize::from(count).min(self.0.len() / 10));
        for _ in 0..count {
            columns.push(RelationColumn {
                key: self.u8()? & 1 == 1,
                name: self.text()?,
                type_oid: self.u32()?,
                modifier: self.u32()?.cast_signed(),
            });
        }
        Ok(Relation { oid, schema, name, identity, columns })
    }

    fn truncate(&mut self) -> Result<Message> {
        let count = self.u32()?;
        self.skip(1)?; // CASCADE and RESTART IDENTITY: the tables that it reached are all listed
        let mut relations = Vec::with_capacity((count as usize).min(self.0.len() / 4));
        for _ in 0..count {
            relations.push(self.u32()?);
        }
        Ok(Message::Truncate { relations })
    }

    fn logical(&mut self) -> Result<Message> {
        let transactional = self.u8()? & 1 == 1;
        let lsn = Lsn(self.u64()?);
        let prefix = self.text()?;
        let length = self.u32()? as usize;
        Ok(Message::Logical { transactional, lsn, prefix, content: self.take(length)? })
    }
}

fn short() -> Error {
    Error::data("a pgoutput message ends early")
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::change::Value;

    /// Writes messages as PostgreSQL does.
    pub(crate) mod encode {
        use super::super::*;

        pub(crate) fn begin(commit_lsn: u64, xid: u32) -> Bytes {
            let mut out = vec![b'B'];
            out.extend(commit_lsn.to_be_bytes());
            out.extend(5i64.to_be_bytes());
            out.extend(xid.to_be_bytes());
            out.into()
        }

        pub(crate) fn commit(commit_lsn: u64, end_lsn: u64) -> Bytes {
            let mut out = vec![b'C', 0];
            out.extend(commit_lsn.to_be_bytes());
            out.extend(end_lsn.to_be_bytes());
            out.extend(5i64.to_be_bytes());
            out.into()
        }

        pub(crate) fn relation(relation: &Relation) -> Bytes {
            let mut out = vec![b'R'];
            out.extend(relation.oid.to_be_bytes());
            for text in [&relation.schema, &relation.name] {
                out.extend(text.as_bytes());
                out.push(0);
            }
            out.push(match relation.identity {
                Identity::Default => b'd',
                Identity::Nothing => b'n',
                Identity::Full => b'f',
                Identity::Index => b'i',
            });
            out.extend(u16::try_from(relation.columns.len()).unwrap().to_be_bytes());
            for column in &relation.columns {
                out.push(column.key.into());
                out.extend(column.name.as_bytes());
                out.push(0);
                out.extend(column.type_oid.to_be_bytes());
                out.extend(column.modifier.to_be_bytes());
            }
            out.into()
        }

        pub(crate) fn row(kind: u8, oid: u32, tuples: &[(u8, &Row)]) -> Bytes {
            let mut out = vec![kind];
            out.extend(oid.to_be_bytes());
            for (tag, row) in tuples {
                out.push(*tag);
                out.extend(row.as_bytes());
            }
            out.into()
        }

        /// `message` as it is inside a block, where it belongs to `xid`.
        pub(crate) fn part(xid: u32, message: &Bytes) -> Bytes {
            let (kind, body) = message.split_at(1);
            [kind, &xid.to_be_bytes(), body].concat().into()
        }

        pub(crate) fn start(xid: u32, first: bool) -> Bytes {
            let mut out = vec![b'S'];
            out.extend(xid.to_be_bytes());
            out.push(first.into());
            out.into()
        }

        pub(crate) fn stop() -> Bytes {
            Bytes::from_static(b"E")
        }

        pub(crate) fn stream_commit(commit: &StreamCommit) -> Bytes {
            let mut out = vec![b'c'];
            out.extend(commit.xid.to_be_bytes());
            out.push(0);
            out.extend(commit.commit_lsn.0.to_be_bytes());
            out.extend(commit.end_lsn.0.to_be_bytes());
            let time = commit.commit_time.0.saturating_sub(POSTGRES_EPOCH_US);
            out.extend(time.to_be_bytes());
            out.into()
        }

        pub(crate) fn abort(xid: u32, subxid: u32) -> Bytes {
            let mut out = vec![b'A'];
            out.extend(xid.to_be_bytes());
            out.extend(subxid.to_be_bytes());
            out.into()
        }

        pub(crate) fn message(
            transactional: bool,
            lsn: u64,
            prefix: &str,
            content: &[u8],
        ) -> Bytes {
            let mut out = vec![b'M', transactional.into()];
            out.extend(lsn.to_be_bytes());
            out.extend(prefix.as_bytes());
            out.push(0);
            out.extend(u32::try_from(content.len()).unwrap().to_be_bytes());
            out.extend(content);
            out.into()
        }
    }

    #[test]
    fn an_update_tells_its_old_row_by_the_kind_of_tuple() {
        let (old, new) =
            (Row::from_values([Value::Text(b"1")]), Row::from_values([Value::Unchanged]));
        let full = decode(encode::row(b'U', 7, &[(b'O', &old), (b'N', &new)])).unwrap();
        let before = Before::Full(old.clone());
        assert_eq!(full, Message::Update { relation: 7, before, after: new.clone() });
        let key = decode(encode::row(b'U', 7, &[(b'K', &old), (b'N', &new)])).unwrap();
        assert_eq!(key, Message::Update { relation: 7, before: Before::Key(old), after: new });
    }

    #[test]
    fn a_delete_without_an_old_row_is_refused() {
        let row = Row::from_values([]);
        assert!(decode(encode::row(b'D', 7, &[(b'N', &row)])).is_err());
    }

    fn names() -> impl Strategy<Value = String> {
        "[^\0]{1,12}"
    }

    prop_compose! {
        fn relations()(
            oid in any::<u32>(), schema in names(), name in names(),
            identity in prop::sample::select(vec![
                Identity::Default, Identity::Nothing, Identity::Full, Identity::Index]),
            columns in prop::collection::vec(
                (any::<bool>(), names(), any::<u32>(), any::<i32>()), 0..9),
        ) -> Relation {
            let column = |(key, name, type_oid, modifier)| {
                RelationColumn { key, name, type_oid, modifier }
            };
            let columns = columns.into_iter().map(column).collect();
            Relation { oid, schema, name, identity, columns }
        }
    }

    #[test]
    fn what_brackets_a_block_gives_back_what_was_put_in() {
        let commit = StreamCommit {
            xid: 9,
            commit_lsn: Lsn(100),
            end_lsn: Lsn(120),
            commit_time: Timestamp(POSTGRES_EPOCH_US + 5),
        };
        for (bytes, control) in [
            (encode::start(9, true), Control::Start { xid: 9, first: true }),
            (encode::start(9, false), Control::Start { xid: 9, first: false }),
            (encode::stop(), Control::Stop),
            (encode::stream_commit(&commit), Control::Commit(commit)),
            (encode::abort(9, 11), Control::Abort { xid: 9, subxid: 11 }),
        ] {
            assert_eq!(decode_control(&bytes).unwrap(), Some(control));
            assert!(decode_control(&[&bytes[..], b"\0"].concat().into()).is_err());
            for length in 1..bytes.len() {
                assert!(decode_control(&bytes.slice(..length)).is_err(), "{control:?}");
            }
        }
        assert_eq!(decode_control(&encode::begin(100, 9)).unwrap(), None);
        assert_eq!(decode_control(&Bytes::new()).unwrap(), None);
    }

    proptest! {
        #[test]
        fn a_part_of_a_block_is_its_message_with_the_id_taken_out(
            relation in relations(), xid in any::<u32>(),
        ) {
            let bytes = encode::part(xid, &encode::relation(&relation));
            let part = decode_part(bytes).unwrap().unwrap();
            prop_assert_eq!(part.xid, xid);
            let whole = [&[part.kind], &part.body[..]].concat();
            prop_assert_eq!(decode(whole.into()).unwrap(), Message::Relation(relation));
        }

        #[test]
        fn a_relation_gives_back_what_was_put_in(relation in relations()) {
            let bytes = encode::relation(&relation);
            prop_assert_eq!(decode(bytes).unwrap(), Message::Relation(relation));
        }

        #[test]
        fn a_message_that_is_cut_short_is_refused(
            relation in relations(), cut in any::<prop::sample::Index>(),
        ) {
            let bytes = encode::relation(&relation);
            let length = cut.index(bytes.len());
            prop_assert!(decode(bytes.slice(..length)).is_err());
        }

        #[test]
        fn foreign_bytes_never_panic(
            kind in prop::sample::select(b"BCRIUDTMYOSEcA?".to_vec()),
            rest in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let mut bytes = vec![kind];
            bytes.extend(rest);
            let bytes = Bytes::from(bytes);
            let _ = decode_control(&bytes);
            let _ = decode_part(bytes.clone());
            let _ = decode(bytes);
        }
    }
}
