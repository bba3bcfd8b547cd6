//! Sequin's message, `{record, changes, action, metadata}`, so that its consumers need no change.
//! `docs/schema/sequin.schema.json` is its schema, `docs/formats.md` names the differences.

use uuid::Uuid;

use super::{
    Names,
    json::{self, Dialect},
    native::complete,
    table::{Shapes, TableShape, close_object},
};
use crate::{
    change::{Before, Change, Op, Value},
    error::{Error, Result},
    schema::Table,
};

/// Writes Sequin's messages.
#[derive(Debug)]
pub(super) struct Sequin {
    shapes: Shapes,
    /// The end of `metadata`, the same for every change.
    names: Vec<u8>,
    unchanged: Vec<usize>,
}

impl Sequin {
    pub(super) fn new(names: &Names) -> Self {
        let shapes = Shapes::new(Dialect::Sequin, head);
        Self { shapes, names: names_text(names), unchanged: Vec::new() }
    }

    /// Appends one message, without a line end; nothing for what Sequin has no message for.
    pub(super) fn encode(&mut self, change: &Change, out: &mut Vec<u8>) -> Result<bool> {
        let Some(table) = &change.table else { return Ok(false) };
        let action = match change.op {
            Op::Insert | Op::Update | Op::Delete | Op::Read => change.op.word(),
            Op::Truncate | Op::Message => return Ok(false),
        };
        out.reserve(change.bytes() * 2 + 1024);
        self.unchanged.clear();
        let shape = self.shapes.of(table);
        out.extend_from_slice(b"{\"record\":");
        write_record(out, shape, change, &mut self.unchanged)?;
        out.extend_from_slice(b",\"changes\":");
        write_changes(out, shape, change)?;
        out.extend_from_slice(b",\"action\":\"");
        out.extend_from_slice(action.as_bytes());
        out.extend_from_slice(b"\",\"metadata\":");
        out.extend_from_slice(&shape.head);
        write_metadata(out, shape, change)?;
        if !self.unchanged.is_empty() {
            write_unchanged(out, shape, &self.unchanged);
        }
        out.extend_from_slice(&self.names);
        Ok(true)
    }

    /// Appends `record` alone; gives back the columns that were not sent.
    pub(super) fn encode_record(
        &mut self,
        change: &Change,
        out: &mut Vec<u8>,
    ) -> Result<Vec<usize>> {
        let (Some(table), Some(_)) = (&change.table, &change.after) else {
            return Err(Error::bug(format!("a {} has no new row", change.op.word())));
        };
        let mut unchanged = Vec::new();
        write_record(out, self.shapes.of(table), change, &mut unchanged)?;
        Ok(unchanged)
    }

    /// Appends Sequin's group id: the values of the key, joined by `:`.
    pub(super) fn encode_key(&mut self, change: &Change, out: &mut Vec<u8>) -> Result<bool> {
        let Some(table) = &change.table else { return Ok(false) };
        let shape = self.shapes.of(table);
        let Some(row) = change.key_row() else { return Ok(false) };
        for (count, &index) in shape.key.iter().enumerate() {
            if count > 0 {
                out.push(b':');
            }
            let value = match row.value(index) {
                Some(Value::Unchanged) => complete(shape, &change.before, index),
                value => value,
            };
            if let Some(Value::Text(text)) = value {
                out.extend_from_slice(text);
            }
        }
        Ok(!shape.key.is_empty())
    }
}

fn head(table: &Table) -> Vec<u8> {
    let mut text = b"{\"table_schema\":".to_vec();
    json::write_str(&mut text, &table.schema);
    text.extend_from_slice(b",\"table_name\":");
    json::write_str(&mut text, &table.name);
    text
}

/// The new row; of a delete the old one, with nulls where it was not sent.
fn write_record(
    out: &mut Vec<u8>,
    shape: &TableShape,
    change: &Change,
    unchanged: &mut Vec<usize>,
) -> Result<()> {
    let Some(row) = change.key_row() else {
        return Err(Error::bug(format!("a change of {} without a row", shape.table)));
    };
    shape.check(row)?;
    let start = out.len();
    for (index, column, value) in shape.zip(row) {
        let value = match value {
            Value::Unchanged => complete(shape, &change.before, index),
            value => Some(value),
        };
        let Some(value) = value else {
            unchanged.push(index);
            continue;
        };
        out.extend_from_slice(&column.fragment);
        write_or_null(out, shape, index, value)?;
    }
    close_object(out, start);
    Ok(())
}

/// The OLD values of the columns that an update changed, as far as the old row is known.
fn write_changes(out: &mut Vec<u8>, shape: &TableShape, change: &Change) -> Result<()> {
    let (Op::Update, Some(after)) = (change.op, &change.after) else {
        out.extend_from_slice(b"null");
        return Ok(());
    };
    let partial = matches!(change.before, Before::Key(_));
    let start = out.len();
    if let Some(before) = change.before.row() {
        shape.check(before)?;
        for ((index, column, old), new) in shape.zip(before).zip(after.values()) {
            let known = column.identity || !partial;
            if !known || old == new || new == Value::Unchanged || old == Value::Unchanged {
                continue;
            }
            out.extend_from_slice(&column.fragment);
            write_or_null(out, shape, index, old)?;
        }
    }
    close_object(out, start);
    Ok(())
}

fn write_or_null(out: &mut Vec<u8>, shape: &TableShape, index: usize, value: Value) -> Result<()> {
    match value {
        Value::Text(text) => shape.write_value(out, index, text),
        Value::Null | Value::Unchanged => {
            out.extend_from_slice(b"null");
            Ok(())
        }
    }
}

/// From `commit_timestamp` to `record_pks`.
fn write_metadata(out: &mut Vec<u8>, shape: &TableShape, change: &Change) -> Result<()> {
    use std::io::Write;

    let transaction = &change.transaction;
    // Writing into a Vec cannot fail.
    let _ = write!(
        out,
        ",\"commit_timestamp\":\"{}\",\"commit_lsn\":{},\
         \"commit_idx\":{},\"idempotency_key\":\"{}\"",
        transaction.commit_time,
        transaction.commit_lsn.0,
        change.index,
        change.idempotency_key(),
    );
    out.extend_from_slice(b",\"record_pks\":[");
    let row = change.key_row();
    for (count, &index) in shape.key.iter().enumerate() {
        let value = match row.and_then(|row| row.value(index)) {
            Some(Value::Unchanged) => complete(shape, &change.before, index),
            value => value,
        };
        if count > 0 {
            out.push(b',');
        }
        match value {
            Some(Value::Text(text)) => {
                json::write_string(out, text).map_err(|json::NotUtf8| shape.not_utf8(index))?;
            }
            _ => out.extend_from_slice(b"null"),
        }
    }
    out.push(b']');
    Ok(())
}

/// Sequin sends a marker text in the record here; a marker could be taken for a value.
fn write_unchanged(out: &mut Vec<u8>, shape: &TableShape, unchanged: &[usize]) {
    out.extend_from_slice(b",\"unchanged\":");
    let start = out.len();
    for &index in unchanged {
        out.push(b',');
        json::write_str(out, shape.name(index));
    }
    if let Some(comma) = out.get_mut(start) {
        *comma = b'[';
    }
    out.push(b']');
}

/// The id of a `sink` or `source`, made from its name, so that it is the same on every start.
pub fn id(kind: &str, name: &str) -> Uuid {
    Uuid::new_v5(&Uuid::NAMESPACE_OID, format!("walrace:{kind}:{name}").as_bytes())
}

/// From `database_name` to the end of the message.
fn names_text(names: &Names) -> Vec<u8> {
    let text = serde_json::json!({
        "database_name": names.source,
        "transaction_annotations": null,
        "enrichment": null,
        "consumer": {
            "id": id("sink", &names.sink),
            "name": names.sink,
            "annotations": {},
        },
        "database": {
            "id": id("source", &names.source),
            "name": names.source,
            "annotations": {},
            "database": names.database,
            "hostname": names.hostname,
        },
    })
    .to_string();
    let members = text.strip_prefix('{').unwrap_or_default();
    format!(",{members}}}").into_bytes()
}
