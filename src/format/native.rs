//! The native envelope: one JSON object a change. `docs/schema/native.schema.json` is its schema.

use base64::{Engine, engine::general_purpose::STANDARD};

use super::{
    json::{self, Dialect},
    table::{Shapes, TableShape, close_object},
};
use crate::{
    change::{Before, Change, Message, Op, Row, Shaped, Transaction, Value},
    config::Types,
    error::{Error, Result},
    schema::Table,
};

/// Bytes of an envelope without its rows, about.
const ENVELOPE_BYTES: usize = 512;

/// Writes native envelopes; keeps what is the same for a table and for a transaction.
#[derive(Debug)]
pub(super) struct Native {
    shapes: Shapes,
    transaction: TransactionText,
    unchanged: Vec<usize>,
}

impl Native {
    pub(super) fn new(types: Types) -> Self {
        Self {
            shapes: Shapes::new(Dialect::Chosen(types), head),
            transaction: TransactionText::default(),
            unchanged: Vec::new(),
        }
    }

    /// Appends one envelope, without a line end.
    pub(super) fn encode(&mut self, change: &Change, out: &mut Vec<u8>) -> Result<()> {
        out.reserve(change.bytes() * 2 + ENVELOPE_BYTES);
        self.transaction.set(&change.transaction);
        self.unchanged.clear();
        match (&change.table, &change.message) {
            (Some(table), _) => {
                let shape = self.shapes.of(table);
                write_rows(out, shape, change, &mut self.unchanged)?;
                self.write_tail(out, change);
                let shape = self.shapes.of(table);
                write_unchanged(out, shape, &self.unchanged);
            }
            (None, Some(message)) => {
                out.extend_from_slice(
                    b"{\"source_table\":null,\"source_schema\":null,\"op\":\"m\",\"key\":null,\
                      \"before\":null,\"after\":null",
                );
                write_message(out, message);
                self.write_tail(out, change);
                out.push(b']');
            }
            (None, None) => {
                let word = change.op.word();
                return Err(Error::bug(format!("a change of kind {word} without a table")));
            }
        }
        let partial = matches!(change.before, Before::Key(_));
        out.extend_from_slice(b",\"before_partial\":");
        out.extend_from_slice(if partial { b"true" } else { b"false" });
        match &change.shaped {
            None => self.transaction.write_idempotency_key(out, change.index)?,
            Some(shaped) => write_shaped(out, change, shaped),
        }
        out.extend_from_slice(b"\"}");
        Ok(())
    }

    /// Appends the new row as a JSON object; gives back the columns that were not sent.
    pub(super) fn encode_record(
        &mut self,
        change: &Change,
        out: &mut Vec<u8>,
    ) -> Result<Vec<usize>> {
        let (Some(table), Some(row)) = (&change.table, &change.after) else {
            return Err(Error::bug(format!("a {} has no new row", change.op.word())));
        };
        let mut unchanged = Vec::new();
        write_after(out, self.shapes.of(table), (row, &change.before), &mut unchanged)?;
        Ok(unchanged)
    }

    /// Appends the key as a JSON object of its columns.
    pub(super) fn encode_key(&mut self, change: &Change, out: &mut Vec<u8>) -> Result<bool> {
        let Some(table) = &change.table else { return Ok(false) };
        let start = out.len();
        write_key(out, self.shapes.of(table), change)?;
        if out.get(start..) == Some(b"null") {
            out.truncate(start);
        }
        Ok(out.len() > start)
    }

    fn write_tail(&self, out: &mut Vec<u8>, change: &Change) {
        let mut digits = itoa::Buffer::new();
        out.extend_from_slice(&self.transaction.position);
        out.extend_from_slice(digits.format(change.index).as_bytes());
        out.extend_from_slice(b"},\"offset\":");
        out.extend_from_slice(digits.format(change.offset).as_bytes());
        out.extend_from_slice(&self.transaction.time);
    }
}

fn head(table: &Table) -> Vec<u8> {
    let mut text = b"{\"source_table\":".to_vec();
    json::write_str(&mut text, &table.name);
    text.extend_from_slice(b",\"source_schema\":");
    json::write_str(&mut text, &table.schema);
    text.extend_from_slice(b",\"op\":\"");
    text
}

/// From `op` to `after`; columns whose value was not sent are added to `unchanged`.
fn write_rows(
    out: &mut Vec<u8>,
    shape: &TableShape,
    change: &Change,
    unchanged: &mut Vec<usize>,
) -> Result<()> {
    out.extend_from_slice(&shape.head);
    out.push(op_letter(change.op));
    out.extend_from_slice(b"\",\"key\":");
    write_key(out, shape, change)?;
    out.extend_from_slice(b",\"before\":");
    match &change.before {
        Before::Nothing => out.extend_from_slice(b"null"),
        Before::Key(row) => write_before(out, shape, row, true)?,
        Before::Full(row) => write_before(out, shape, row, false)?,
    }
    out.extend_from_slice(b",\"after\":");
    match &change.after {
        None => out.extend_from_slice(b"null"),
        Some(row) => write_after(out, shape, (row, &change.before), unchanged)?,
    }
    Ok(())
}

fn op_letter(op: Op) -> u8 {
    u8::try_from(op.letter()).unwrap_or(b'?')
}

fn write_key(out: &mut Vec<u8>, shape: &TableShape, change: &Change) -> Result<()> {
    let Some(row) = change.key_row() else {
        out.extend_from_slice(b"null");
        return Ok(());
    };
    shape.check(row)?;
    let partial = change.after.is_none() && matches!(change.before, Before::Key(_));
    let key = if partial { &shape.partial_key } else { &shape.key };
    if key.is_empty() {
        out.extend_from_slice(b"null");
        return Ok(());
    }
    let start = out.len();
    for &index in key {
        let value = match row.value(index) {
            Some(Value::Unchanged) | None => complete(shape, &change.before, index),
            value => value,
        };
        match value {
            Some(value) => write_member(out, shape, index, value)?,
            None => continue,
        }
    }
    close_object(out, start);
    Ok(())
}

/// The old row; of a partial one only the columns that were sent.
fn write_before(out: &mut Vec<u8>, shape: &TableShape, row: &Row, partial: bool) -> Result<()> {
    shape.check(row)?;
    let start = out.len();
    for (index, column, value) in shape.zip(row) {
        if value != Value::Unchanged && (column.identity || !partial) {
            write_member(out, shape, index, value)?;
        }
    }
    close_object(out, start);
    Ok(())
}

/// The new row, with values that were not sent taken from the old one where it has them.
fn write_after(
    out: &mut Vec<u8>,
    shape: &TableShape,
    (row, before): (&Row, &Before),
    unchanged: &mut Vec<usize>,
) -> Result<()> {
    shape.check(row)?;
    let start = out.len();
    for (index, column, value) in shape.zip(row) {
        match value {
            Value::Text(text) => {
                out.extend_from_slice(&column.fragment);
                json::write_value(out, &column.shape, text)
                    .map_err(|json::NotUtf8| shape.not_utf8(index))?;
            }
            Value::Null => {
                out.extend_from_slice(&column.fragment);
                out.extend_from_slice(b"null");
            }
            Value::Unchanged => match complete(shape, before, index) {
                Some(value) => write_member(out, shape, index, value)?,
                None => unchanged.push(index),
            },
        }
    }
    close_object(out, start);
    Ok(())
}

fn write_member(out: &mut Vec<u8>, shape: &TableShape, index: usize, value: Value) -> Result<()> {
    if let Some(column) = shape.columns.get(index) {
        out.extend_from_slice(&column.fragment);
    }
    match value {
        Value::Text(text) => shape.write_value(out, index, text),
        _ => {
            out.extend_from_slice(b"null");
            Ok(())
        }
    }
}

/// The old row's value of a column that was not sent, where the old row has it.
pub(super) fn complete<'a>(
    shape: &TableShape,
    before: &'a Before,
    index: usize,
) -> Option<Value<'a>> {
    let known = match before {
        Before::Nothing => None,
        Before::Full(row) => row.value(index),
        Before::Key(row) => {
            shape.columns.get(index).filter(|column| column.identity)?;
            row.value(index)
        }
    };
    known.filter(|value| *value != Value::Unchanged)
}

/// The idempotency key up to its closing quote, and before it the mark of what comes late.
fn write_shaped(out: &mut Vec<u8>, change: &Change, shaped: &Shaped) {
    if shaped.late {
        out.extend_from_slice(b",\"late\":true");
    }
    out.extend_from_slice(b",\"idempotency_key\":\"");
    out.extend_from_slice(change.idempotency_key().as_bytes());
}

fn write_unchanged(out: &mut Vec<u8>, shape: &TableShape, unchanged: &[usize]) {
    for (count, &index) in unchanged.iter().enumerate() {
        if count > 0 {
            out.push(b',');
        }
        json::write_str(out, shape.name(index));
    }
    out.push(b']');
}

fn write_message(out: &mut Vec<u8>, message: &Message) {
    out.extend_from_slice(b",\"message\":{\"prefix\":");
    json::write_str(out, &message.prefix);
    out.extend_from_slice(b",\"content\":");
    if json::write_string(out, &message.content).is_err() {
        json::write_str(out, &STANDARD.encode(&message.content));
        out.extend_from_slice(b",\"content_encoding\":\"base64\"");
    }
    out.extend_from_slice(b",\"transactional\":");
    out.extend_from_slice(if message.transactional { b"true}" } else { b"false}" });
}

/// What is the same for every change of a transaction.
#[derive(Debug, Default)]
struct TransactionText {
    of: Option<Transaction>,
    /// `,"source_position":{"lsn":"…","tx_id":…,"index":`.
    position: Vec<u8>,
    /// `,"commit_time":"…","unchanged":[`.
    time: Vec<u8>,
    /// `<commit lsn>:`, the head of the plain idempotency key.
    key: Vec<u8>,
    key_head: usize,
}

impl TransactionText {
    #[inline]
    fn set(&mut self, transaction: &Transaction) {
        if self.of.as_ref() != Some(transaction) {
            self.render(transaction);
        }
    }

    fn render(&mut self, transaction: &Transaction) {
        use std::io::Write;

        let Transaction { xid, commit_lsn, commit_time } = transaction;
        self.position.clear();
        self.time.clear();
        self.key.clear();
        // Writing into a Vec cannot fail.
        let _ = write!(
            self.position,
            ",\"source_position\":{{\"lsn\":\"{commit_lsn}\",\"tx_id\":{xid},\"index\":"
        );
        let _ = write!(self.time, ",\"commit_time\":\"{commit_time}\",\"unchanged\":[");
        let _ = write!(self.key, "{}:", commit_lsn.0);
        self.key_head = self.key.len();
        self.of = Some(*transaction);
    }

    /// As [`Change::idempotency_key`], without an allocation.
    fn write_idempotency_key(&mut self, out: &mut Vec<u8>, index: u32) -> Result<()> {
        let mut digits = itoa::Buffer::new();
        self.key.truncate(self.key_head);
        self.key.extend_from_slice(digits.format(index).as_bytes());
        // 20 digits, a colon and 10 digits are 31 bytes: 44 in base64.
        let mut encoded = [0; 44];
        let length = STANDARD
            .encode_slice(&self.key, &mut encoded)
            .map_err(|cause| Error::bug("an idempotency key of over 44 bytes").caused_by(cause))?;
        out.extend_from_slice(b",\"idempotency_key\":\"");
        out.extend_from_slice(encoded.get(..length).unwrap_or_default());
        Ok(())
    }
}
