//! WalStream's `ChangeRecord`, protobuf of package `walstream.v1`; `docs/schema/walstream.proto`
//! describes it. Its own fields are as its readers know them; what Walrace adds has numbers above
//! 100, which an old reader passes over.

use std::collections::BTreeMap;

use prost::Message as _;

use super::{native::complete, table::TableShape};
use crate::{
    change::{Before, Change, Op, Row, Value},
    error::{Error, Result},
    schema::{Table, Type, TypeKind},
};

/// One change, as WalStream's `ChangeRecord` with Walrace's additions.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ChangeRecord {
    /// The LSN of the commit record as decimal digits.
    #[prost(string, tag = "1")]
    pub lsn: String,
    /// When it was committed, in milliseconds since 1970-01-01 UTC.
    #[prost(int64, tag = "2")]
    pub commit_time: i64,
    /// `schema.table`.
    #[prost(string, tag = "3")]
    pub table: String,
    /// `INSERT`, `UPDATE`, `DELETE` or `TRUNCATE`.
    #[prost(string, tag = "4")]
    pub operation: String,
    /// The old row, as far as it is known, or the identity's columns; without its NULLs.
    #[prost(btree_map = "string, string", tag = "5")]
    pub old: BTreeMap<String, String>,
    /// The new row, without its NULLs.
    #[prost(btree_map = "string, string", tag = "6")]
    pub new: BTreeMap<String, String>,
    /// Columns that are NULL in the old row.
    #[prost(string, repeated, tag = "101")]
    pub old_nulls: Vec<String>,
    /// Columns that are NULL in the new row.
    #[prost(string, repeated, tag = "102")]
    pub new_nulls: Vec<String>,
    /// Columns whose large value was not sent, as the update left it alone.
    #[prost(string, repeated, tag = "103")]
    pub unchanged: Vec<String>,
    /// The change's number within its transaction.
    #[prost(uint32, tag = "104")]
    pub index: u32,
    /// The same text whenever the same change is delivered again.
    #[prost(string, tag = "105")]
    pub idempotency_key: String,
    /// Whether a backfill read the row; its `operation` is `INSERT`.
    #[prost(bool, tag = "106")]
    pub read: bool,
}

/// The columns of one row: those with a value, those that are NULL, those that were not sent.
#[derive(Default)]
struct Columns {
    values: BTreeMap<String, String>,
    nulls: Vec<String>,
    unchanged: Vec<String>,
}

/// Appends one record; `false` for logical messages, which WalStream does not have.
pub(super) fn encode(change: &Change, shape: &TableShape, out: &mut Vec<u8>) -> Result<bool> {
    let operation = match change.op {
        Op::Insert | Op::Read => "INSERT",
        Op::Update => "UPDATE",
        Op::Delete => "DELETE",
        Op::Truncate => "TRUNCATE",
        Op::Message => return Ok(false),
    };
    let old = match (&change.before, change.op, &change.after) {
        (Before::Full(row), _, _) => columns(shape, row, (&Before::Nothing, false))?,
        // An update without an old row left its key alone: the new row has it.
        (Before::Key(row), _, _) | (Before::Nothing, Op::Update, Some(row)) => {
            columns(shape, row, (&Before::Nothing, true))?
        }
        _ => Columns::default(),
    };
    let new = match &change.after {
        Some(row) => columns(shape, row, (&change.before, false))?,
        None => Columns::default(),
    };
    let record = ChangeRecord {
        lsn: change.transaction.commit_lsn.0.to_string(),
        commit_time: change.transaction.commit_time.0.div_euclid(1000),
        table: shape.table.full_name(),
        operation: operation.to_owned(),
        old: old.values,
        new: new.values,
        old_nulls: old.nulls,
        new_nulls: new.nulls,
        unchanged: new.unchanged,
        index: change.index,
        idempotency_key: change.idempotency_key(),
        read: change.op == Op::Read,
    };
    let cause =
        |cause| Error::bug("a protobuf record does not fit a growing buffer").caused_by(cause);
    record.encode(out).map_err(cause)?;
    Ok(true)
}

/// Nothing is prepared for a table but its shape.
pub(super) fn head(_: &Table) -> Vec<u8> {
    Vec::new()
}

fn columns(shape: &TableShape, row: &Row, (before, partial): (&Before, bool)) -> Result<Columns> {
    shape.check(row)?;
    let mut columns = Columns::default();
    let described = shape.zip(row).zip(&shape.table.columns);
    for ((index, column, value), description) in described {
        if partial && !column.identity {
            continue;
        }
        let value = match value {
            Value::Unchanged => complete(shape, before, index).unwrap_or(value),
            value => value,
        };
        let name = description.name.clone();
        match value {
            Value::Null => columns.nulls.push(name),
            Value::Unchanged => columns.unchanged.push(name),
            Value::Text(text) => {
                let text = word(&description.ty, text).map_err(|_| shape.not_utf8(index))?;
                columns.values.insert(name, text);
            }
        }
    }
    Ok(columns)
}

/// PostgreSQL's text, but a boolean as Python prints it: what WalStream's readers know.
fn word(ty: &Type, text: &[u8]) -> Result<String, std::str::Utf8Error> {
    let boolean = ty.oid == 16 && ty.kind == TypeKind::Base;
    Ok(match (boolean, text) {
        (true, b"t") => "True".to_owned(),
        (true, b"f") => "False".to_owned(),
        _ => std::str::from_utf8(text)?.to_owned(),
    })
}
