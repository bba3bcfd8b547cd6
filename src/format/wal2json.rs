//! The objects of the output plugin wal2json 2.5 with `format-version = 2`
//! (<https://github.com/eulerto/wal2json>), one for each change.
//! `docs/schema/wal2json.schema.json` is its schema, `docs/formats.md` names the differences.

use std::sync::Arc;

use base64::{Engine, engine::general_purpose::STANDARD};

use super::{
    json::{self, Dialect},
    native::{Native, complete},
    table::{ByTable, TableShape},
};
use crate::{
    change::{Before, Change, Op, Row, Timestamp, Transaction, Value},
    config::Types,
    error::{Error, Result},
    schema::{Table, Type, TypeKind},
};

/// Writes wal2json's objects.
#[derive(Debug)]
pub(super) struct Wal2json {
    layouts: ByTable<Layout>,
    transaction: Option<Transaction>,
    /// `,"xid":…,"timestamp":"…","lsn":"…"`, the same for every change of a transaction.
    transaction_text: Vec<u8>,
    /// The message key is that of the native envelope.
    keys: Native,
}

#[derive(Debug)]
struct Layout {
    shape: TableShape,
    /// For each column `{"name":"…","type":"…","value":`, and how the value is written.
    columns: Vec<(Vec<u8>, Literal)>,
}

/// How a value is written; whatever is not one of the first three is a string.
#[derive(Clone, Copy, Debug)]
enum Literal {
    Number,
    Bool,
    /// Hex digits without `\x`.
    Bytes,
    Text,
}

impl Wal2json {
    pub(super) fn new() -> Self {
        Self {
            layouts: ByTable::new(),
            transaction: None,
            transaction_text: Vec::new(),
            keys: Native::new(Types::default()),
        }
    }

    /// Appends one object, without a line end.
    pub(super) fn encode(&mut self, change: &Change, out: &mut Vec<u8>) -> Result<()> {
        out.reserve(change.bytes() * 2 + 512);
        if self.transaction != Some(change.transaction) {
            self.render(&change.transaction);
        }
        out.extend_from_slice(b"{\"action\":\"");
        out.push(action(change.op));
        out.push(b'"');
        out.extend_from_slice(&self.transaction_text);
        match (&change.table, &change.message) {
            (Some(table), _) => {
                let layout = self.layouts.of(table, || Layout::new(table));
                out.extend_from_slice(&layout.shape.head);
                layout.write_rows(out, change)?;
            }
            (None, Some(message)) => {
                out.extend_from_slice(b",\"transactional\":");
                out.extend_from_slice(if message.transactional { b"true" } else { b"false" });
                out.extend_from_slice(b",\"prefix\":");
                json::write_str(out, &message.prefix);
                out.extend_from_slice(b",\"content\":");
                if json::write_string(out, &message.content).is_err() {
                    json::write_str(out, &STANDARD.encode(&message.content));
                    out.extend_from_slice(b",\"content_encoding\":\"base64\"");
                }
            }
            (None, None) => {
                let word = change.op.word();
                return Err(Error::bug(format!("a change of kind {word} without a table")));
            }
        }
        out.push(b'}');
        Ok(())
    }

    /// Appends the key as a JSON object of its columns.
    pub(super) fn encode_key(&mut self, change: &Change, out: &mut Vec<u8>) -> Result<bool> {
        self.keys.encode_key(change, out)
    }

    fn render(&mut self, transaction: &Transaction) {
        use std::io::Write;

        let Transaction { xid, commit_lsn, commit_time } = transaction;
        let text = &mut self.transaction_text;
        text.clear();
        // Writing into a Vec cannot fail.
        let _ = match xid {
            // A message outside a transaction.
            0 => write!(text, ",\"xid\":null,\"timestamp\":null"),
            _ => write!(text, ",\"xid\":{xid},\"timestamp\":\"{}\"", timestamp(*commit_time)),
        };
        let _ = write!(text, ",\"lsn\":\"{commit_lsn}\"");
        self.transaction = Some(*transaction);
    }
}

/// A row that a backfill read is an insert to consumers that know no other word for it.
fn action(op: Op) -> u8 {
    match op {
        Op::Insert | Op::Read => b'I',
        Op::Update => b'U',
        Op::Delete => b'D',
        Op::Truncate => b'T',
        Op::Message => b'M',
    }
}

/// As PostgreSQL prints a `timestamptz`: `2026-11-21 00:17:32.36146+00`.
fn timestamp(time: Timestamp) -> String {
    let text = time.to_string();
    let Some(text) = text.strip_suffix('Z') else { return text };
    let text = text.trim_end_matches('0').trim_end_matches('.').replace('T', " ");
    format!("{text}+00")
}

fn head(table: &Table) -> Vec<u8> {
    let mut text = b",\"schema\":".to_vec();
    json::write_str(&mut text, &table.schema);
    text.extend_from_slice(b",\"table\":");
    json::write_str(&mut text, &table.name);
    text
}

impl Layout {
    fn new(table: &Arc<Table>) -> Self {
        let column = |column: &crate::schema::Column| {
            let mut text = b"{\"name\":".to_vec();
            json::write_str(&mut text, &column.name);
            text.extend_from_slice(b",\"type\":");
            let name = type_name(&column.ty);
            json::write_str(&mut text, unquoted(&name));
            text.extend_from_slice(b",\"value\":");
            (text, Literal::of(&column.ty))
        };
        let columns = table.columns.iter().map(column).collect();
        Self { shape: TableShape::new(table, Dialect::Postgres, head), columns }
    }

    fn write_rows(&self, out: &mut Vec<u8>, change: &Change) -> Result<()> {
        if let Some(row) = &change.after {
            out.extend_from_slice(b",\"columns\":[");
            self.write_columns(out, row, (&change.before, false))?;
            out.push(b']');
        }
        // An update without an old row left its key alone: the new row has it.
        let identity = match (&change.before, change.op, &change.after) {
            (Before::Full(row), _, _) => (row, false),
            (Before::Key(row), _, _) | (Before::Nothing, Op::Update, Some(row)) => (row, true),
            _ => return Ok(()),
        };
        if identity.1 && !self.shape.columns.iter().any(|column| column.identity) {
            return Ok(());
        }
        out.extend_from_slice(b",\"identity\":[");
        self.write_columns(out, identity.0, (&Before::Nothing, identity.1))?;
        out.push(b']');
        Ok(())
    }

    /// Every column whose value was sent; of a `partial` row those of the identity.
    fn write_columns(
        &self,
        out: &mut Vec<u8>,
        row: &Row,
        (before, partial): (&Before, bool),
    ) -> Result<()> {
        self.shape.check(row)?;
        let mut first = true;
        for ((index, column, value), (head, literal)) in self.shape.zip(row).zip(&self.columns) {
            let value = match value {
                Value::Unchanged => complete(&self.shape, before, index).unwrap_or(value),
                value => value,
            };
            if value == Value::Unchanged || (partial && !column.identity) {
                continue;
            }
            if !first {
                out.push(b',');
            }
            first = false;
            out.extend_from_slice(head);
            match value {
                Value::Text(text) => {
                    literal.write(out, text).map_err(|json::NotUtf8| self.shape.not_utf8(index))?;
                }
                _ => out.extend_from_slice(b"null"),
            }
            out.push(b'}');
        }
        Ok(())
    }
}

impl Literal {
    /// wal2json looks at the type itself, so a domain's value is a string.
    fn of(ty: &Type) -> Self {
        match (&ty.kind, ty.oid) {
            (TypeKind::Base, 20 | 21 | 23 | 26 | 700 | 701 | 1700) => Self::Number,
            (TypeKind::Base, 16) => Self::Bool,
            (TypeKind::Base, 17) => Self::Bytes,
            _ => Self::Text,
        }
    }

    fn write(self, out: &mut Vec<u8>, text: &[u8]) -> Result<(), json::NotUtf8> {
        match (self, text) {
            (Self::Number, _) if json::is_number(text) => out.extend_from_slice(text),
            (Self::Bool, b"t") => out.extend_from_slice(b"true"),
            (Self::Bool, b"f") => out.extend_from_slice(b"false"),
            (Self::Bytes, [b'\\', b'x', hex @ ..]) => return json::write_string(out, hex),
            _ => return json::write_string(out, text),
        }
        Ok(())
    }
}

/// The name with the modifier in it, as `format_type` prints it.
fn type_name(ty: &Type) -> String {
    if let TypeKind::Array { element, .. } = &ty.kind {
        let modifier = if ty.modifier >= 0 { ty.modifier } else { element.modifier };
        return format!("{}[]", type_name(&Type { modifier, ..(**element).clone() }));
    }
    let name = match ty.name.as_str() {
        "" => builtin_name(ty.oid),
        // The plugin's session has `public` in its search path.
        name => name.strip_prefix("public.").unwrap_or(name),
    };
    let length = match (ty.modifier, ty.oid) {
        (..0, _) => return name.to_owned(),
        (modifier, 1042 | 1043) => (modifier - 4).to_string(),
        (modifier, 1560 | 1562 | 1083 | 1266 | 1114 | 1184) => modifier.to_string(),
        (modifier, 1700) => {
            let packed = modifier - 4;
            format!("{},{}", packed >> 16 & 0xFFFF, ((packed & 0x7FF) ^ 1024) - 1024)
        }
        _ => return name.to_owned(),
    };
    // The length stands before `with time zone`.
    match name.split_once(" with") {
        Some((head, tail)) => format!("{head}({length}) with{tail}"),
        None => format!("{name}({length})"),
    }
}

/// A name that PostgreSQL quotes is written as it is within its quotes.
fn unquoted(name: &str) -> &str {
    name.strip_prefix('"').and_then(|name| name.strip_suffix('"')).unwrap_or(name)
}

/// For columns of which only the oid is known.
fn builtin_name(oid: u32) -> &'static str {
    match oid {
        16 => "boolean",
        17 => "bytea",
        20 => "bigint",
        21 => "smallint",
        23 => "integer",
        25 => "text",
        26 => "oid",
        114 => "json",
        700 => "real",
        701 => "double precision",
        1042 => "character",
        1043 => "character varying",
        1082 => "date",
        1083 => "time without time zone",
        1114 => "timestamp without time zone",
        1184 => "timestamp with time zone",
        1186 => "interval",
        1266 => "time with time zone",
        1700 => "numeric",
        2950 => "uuid",
        3802 => "jsonb",
        _ => "unknown",
    }
}
