//! The change event of Debezium's PostgreSQL connector 3, so that its consumers need no change.
//! `docs/schema/debezium.schema.json` is its schema, `docs/formats.md` names the differences.

use std::sync::Arc;

use self::{
    form::{Form, Unfit, write_integer},
    schema::{Blocks, Described},
};
use super::{
    Names,
    json::{self, Dialect},
    native::complete,
    table::{ByTable, TableShape, close_object},
};
use crate::{
    change::{Before, Change, Message, Op, Row, Value},
    error::{Error, Result},
    schema::{Identity, Table},
};

mod form;
mod number;
mod schema;
#[cfg(test)]
mod tests;

/// Bytes of an event without its rows and its schema, about.
const EVENT_BYTES: usize = 768;

/// Writes Debezium's change events.
#[derive(Debug)]
pub(super) struct Debezium {
    layouts: ByTable<Layout>,
    /// Whether each message carries its schema, as with `schemas.enable = true`.
    with_schema: bool,
    prefix: String,
    /// `"source":{"version":…,"name":…,"ts_ms":`, the same for every change.
    source: Vec<u8>,
    /// `,"db":…`.
    database: Vec<u8>,
    message_block: Vec<u8>,
}

/// A version of a table, ready to be written.
#[derive(Debug)]
struct Layout {
    shape: TableShape,
    forms: Vec<Form>,
    /// Empty where messages carry no schema.
    blocks: Blocks,
    with_schema: bool,
}

impl Debezium {
    pub(super) fn new(names: &Names, with_schema: bool) -> Self {
        let mut source = b"\"source\":{\"version\":\"walrace-".to_vec();
        source.extend_from_slice(env!("CARGO_PKG_VERSION").as_bytes());
        source.extend_from_slice(b"\",\"connector\":\"postgresql\",\"name\":");
        json::write_str(&mut source, &names.source);
        source.extend_from_slice(b",\"ts_ms\":");
        let mut database = b",\"db\":".to_vec();
        json::write_str(&mut database, &names.database);
        Self {
            layouts: ByTable::new(),
            with_schema,
            prefix: names.source.clone(),
            source,
            database,
            message_block: if with_schema { schema::of_message() } else { Vec::new() },
        }
    }

    /// Appends one event, without a line end.
    pub(super) fn encode(&mut self, change: &Change, out: &mut Vec<u8>) -> Result<()> {
        let Some(table) = &change.table else {
            let Some(message) = &change.message else {
                let word = change.op.word();
                return Err(Error::bug(format!("a change of kind {word} without a table")));
            };
            self.encode_message(change, message, out);
            return Ok(());
        };
        let layout = self.layouts.of(table, || Layout::new(table, &self.prefix, self.with_schema));
        out.reserve(change.bytes() * 2 + EVENT_BYTES + layout.blocks.value.len());
        out.extend_from_slice(&layout.blocks.value);
        out.extend_from_slice(b"{\"before\":");
        match &change.before {
            Before::Nothing => out.extend_from_slice(b"null"),
            Before::Key(row) => layout.write_row(out, row, (&Before::Nothing, true))?,
            Before::Full(row) => layout.write_row(out, row, (&Before::Nothing, false))?,
        }
        out.extend_from_slice(b",\"after\":");
        match &change.after {
            None => out.extend_from_slice(b"null"),
            Some(row) => layout.write_row(out, row, (&change.before, false))?,
        }
        out.push(b',');
        let names = &layout.shape.head;
        write_source(out, (&self.source, &self.database, names), change);
        out.extend_from_slice(b",\"transaction\":null,\"op\":\"");
        out.push(u8::try_from(change.op.letter()).unwrap_or(b'?'));
        out.extend_from_slice(b"\",\"ts_ms\":");
        let micros = change.transaction.commit_time.0;
        write_integer(out, micros.div_euclid(1000));
        out.extend_from_slice(b",\"ts_us\":");
        write_integer(out, micros);
        out.extend_from_slice(b",\"ts_ns\":");
        write_integer(out, micros.saturating_mul(1000));
        out.extend_from_slice(if self.with_schema { b"}}" } else { b"}" });
        Ok(())
    }

    fn encode_message(&self, change: &Change, message: &Message, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.message_block);
        out.extend_from_slice(b"{\"op\":\"m\",\"ts_ms\":");
        write_integer(out, change.transaction.commit_time.0.div_euclid(1000));
        out.push(b',');
        write_source(out, (&self.source, &self.database, NO_TABLE), change);
        out.extend_from_slice(b",\"transaction\":null,\"message\":{\"prefix\":");
        json::write_str(out, &message.prefix);
        out.extend_from_slice(b",\"content\":");
        // It fails for lengths beyond the address space only.
        let _ = json::write_base64(out, &message.content);
        out.extend_from_slice(if self.with_schema { b"}}}" } else { b"}}" });
    }

    /// Appends the key: a struct of the key's columns, or of a message's prefix.
    pub(super) fn encode_key(&mut self, change: &Change, out: &mut Vec<u8>) -> Result<bool> {
        let start = out.len();
        match (&change.table, &change.message) {
            (Some(table), _) => {
                let with_schema = self.with_schema;
                let layout =
                    self.layouts.of(table, || Layout::new(table, &self.prefix, with_schema));
                layout.write_key(out, change)?;
            }
            (None, Some(message)) => {
                if self.with_schema {
                    out.extend_from_slice(schema::MESSAGE_KEY.as_bytes());
                }
                out.extend_from_slice(b"{\"prefix\":");
                json::write_str(out, &message.prefix);
                out.push(b'}');
            }
            (None, None) => {}
        }
        let written = out.len() > start;
        if written && self.with_schema {
            out.push(b'}');
        }
        Ok(written)
    }
}

/// Whether a record with the change's key and without a value follows it, so that a compacted
/// topic forgets the row.
pub(super) fn tombstone(change: &Change) -> bool {
    let keyed = || change.table.as_ref().is_some_and(|table| !table.key_columns().is_empty());
    change.op == Op::Delete && keyed()
}

const NO_TABLE: &[u8] = b",\"schema\":\"\",\"table\":\"\",\"txId\":";

fn head(table: &Table) -> Vec<u8> {
    let mut text = b",\"schema\":".to_vec();
    json::write_str(&mut text, &table.schema);
    text.extend_from_slice(b",\"table\":");
    json::write_str(&mut text, &table.name);
    text.extend_from_slice(b",\"txId\":");
    text
}

/// `sequence` is the commit's LSN and the change's index: pairs that grow, and name a change.
fn write_source(
    out: &mut Vec<u8>,
    (source, database, table): (&[u8], &[u8], &[u8]),
    change: &Change,
) {
    let transaction = &change.transaction;
    let micros = transaction.commit_time.0;
    let mut digits = itoa::Buffer::new();
    out.extend_from_slice(source);
    write_integer(out, micros.div_euclid(1000));
    out.extend_from_slice(match change.op {
        Op::Read => b",\"snapshot\":\"incremental\"",
        _ => b",\"snapshot\":\"false\"",
    });
    out.extend_from_slice(database);
    out.extend_from_slice(b",\"sequence\":\"[\\\"");
    out.extend_from_slice(digits.format(transaction.commit_lsn.0).as_bytes());
    out.extend_from_slice(b"\\\",\\\"");
    out.extend_from_slice(digits.format(change.index).as_bytes());
    out.extend_from_slice(b"\\\"]\",\"ts_us\":");
    write_integer(out, micros);
    out.extend_from_slice(b",\"ts_ns\":");
    write_integer(out, micros.saturating_mul(1000));
    out.extend_from_slice(table);
    match transaction.xid {
        0 => out.extend_from_slice(b"null"),
        xid => write_integer(out, xid.into()),
    }
    out.extend_from_slice(b",\"lsn\":");
    out.extend_from_slice(digits.format(transaction.commit_lsn.0).as_bytes());
    out.extend_from_slice(b",\"xmin\":null,\"origin\":null,\"origin_lsn\":null}");
}

impl Layout {
    fn new(table: &Arc<Table>, prefix: &str, with_schema: bool) -> Self {
        let shape = TableShape::new(table, Dialect::Postgres, head);
        let forms: Vec<_> = table.columns.iter().map(|column| Form::of(&column.ty)).collect();
        let required: Vec<_> = table
            .columns
            .iter()
            .zip(&shape.columns)
            .map(|(column, shape)| match table.identity {
                Identity::Full => column.primary_key || column.nullable == Some(false),
                _ => shape.identity,
            })
            .collect();
        let described = Described {
            prefix,
            table,
            forms: &forms,
            required: &required,
            key: &shape.key,
            partial_key: &shape.partial_key,
        };
        let blocks = if with_schema { described.blocks() } else { Blocks::default() };
        Self { shape, forms, blocks, with_schema }
    }

    /// A row with every column: of a `partial` one those that were not sent are null, and a value
    /// that an update left alone is the old one, else Debezium's placeholder.
    fn write_row(
        &self,
        out: &mut Vec<u8>,
        row: &Row,
        (before, partial): (&Before, bool),
    ) -> Result<()> {
        self.shape.check(row)?;
        let start = out.len();
        for ((index, column, value), form) in self.shape.zip(row).zip(&self.forms) {
            out.extend_from_slice(&column.fragment);
            let value = match value {
                Value::Unchanged => complete(&self.shape, before, index).unwrap_or(value),
                value => value,
            };
            match value {
                Value::Text(text) if column.identity || !partial => form
                    .write(out, text, !self.with_schema)
                    .map_err(|unfit| self.refuse(unfit, index, text))?,
                Value::Unchanged if !partial => {
                    form.write_unavailable(out).map_err(|unfit| self.refuse(unfit, index, b""))?;
                }
                _ => out.extend_from_slice(b"null"),
            }
        }
        close_object(out, start);
        Ok(())
    }

    fn write_key(&self, out: &mut Vec<u8>, change: &Change) -> Result<()> {
        let Some(row) = change.key_row() else { return Ok(()) };
        self.shape.check(row)?;
        let partial = change.after.is_none() && matches!(change.before, Before::Key(_));
        let (key, block) = match partial {
            true => (&self.shape.partial_key, &self.blocks.partial_key),
            false => (&self.shape.key, &self.blocks.key),
        };
        if key.is_empty() {
            return Ok(());
        }
        out.extend_from_slice(block);
        let start = out.len();
        for &index in key {
            let (Some(column), Some(form)) = (self.shape.columns.get(index), self.forms.get(index))
            else {
                continue;
            };
            let value = match row.value(index) {
                Some(Value::Unchanged) | None => complete(&self.shape, &change.before, index),
                value => value,
            };
            out.extend_from_slice(&column.fragment);
            match value {
                Some(Value::Text(text)) => form
                    .write(out, text, !self.with_schema)
                    .map_err(|unfit| self.refuse(unfit, index, text))?,
                Some(Value::Null) => out.extend_from_slice(b"null"),
                // A placeholder would make one key of many rows.
                _ => return Err(self.refuse(Unfit::Unavailable, index, b"")),
            }
        }
        close_object(out, start);
        Ok(())
    }

    #[cold]
    fn refuse(&self, unfit: Unfit, index: usize, text: &[u8]) -> Error {
        let (table, column) = (&self.shape.table, self.shape.name(index));
        match unfit {
            Unfit::Value if std::str::from_utf8(text).is_err() => self.shape.not_utf8(index),
            Unfit::Value => Error::data(format!(
                "column `{column}` of {table} holds a value that Debezium's type for it cannot"
            ))
            .remedy("leave the column out, or choose the format native, which holds every value"),
            Unfit::Unavailable => Error::data(format!(
                "column `{column}` of {table} was not sent, as its large value is unchanged, and \
                 its type has no placeholder in Debezium's format"
            ))
            .remedy(format!("ALTER TABLE {table} REPLICA IDENTITY FULL, or the format native")),
        }
    }
}
