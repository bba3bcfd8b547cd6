//! The parameters of statements: a `text[]` for each value of their rows.

use bytes::{BufMut, BytesMut};
use tokio_postgres::types::{IsNull, ToSql, Type, to_sql_checked};

use super::table::Plan;
use crate::{
    change::{Row, Value},
    error::{Error, Result},
};

type Cause = Box<dyn std::error::Error + Sync + Send>;

/// The oid of `text`.
const TEXT: u32 = 25;

/// One column of the rows of a statement, in the binary form of a `text[]`
/// (`array_send` in the server's `arrayfuncs.c`).
#[derive(Debug, Default)]
pub(super) struct Texts {
    count: i32,
    has_null: bool,
    /// For each value a big-endian length and its bytes; the length of a null is -1.
    values: Vec<u8>,
}

impl Texts {
    pub(super) fn push(&mut self, value: Option<&[u8]>) {
        self.count += 1;
        match value {
            Some(text) => {
                // No value of PostgreSQL is larger than 1 GiB.
                let length = i32::try_from(text.len()).unwrap_or(i32::MAX);
                self.values.put_i32(length);
                self.values.put_slice(text);
            }
            None => {
                self.has_null = true;
                self.values.put_i32(-1);
            }
        }
    }
}

impl ToSql for Texts {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Cause> {
        out.reserve(20 + self.values.len());
        out.put_i32(1); // dimensions
        out.put_i32(self.has_null.into());
        out.put_u32(TEXT);
        out.put_i32(self.count);
        out.put_i32(1); // the first index
        out.put_slice(&self.values);
        Ok(IsNull::No)
    }

    fn accepts(ty: &Type) -> bool {
        *ty == Type::TEXT_ARRAY
    }

    to_sql_checked!();
}

/// The values of a statement's rows, column by column.
#[derive(Debug)]
pub(super) struct Rows {
    pub(super) columns: Vec<Texts>,
}

impl Rows {
    pub(super) fn new(columns: usize) -> Self {
        let mut empty = Vec::with_capacity(columns);
        empty.resize_with(columns, Texts::default);
        Self { columns: empty }
    }

    /// One row of the statement; each of `rows` gives an equal part of the parameters.
    pub(super) fn push(&mut self, plan: &Plan, parameters: &[usize], rows: &[&Row]) -> Result<()> {
        let part = (parameters.len() / rows.len().max(1)).max(1);
        let parts = parameters.chunks(part).zip(self.columns.chunks_mut(part)).zip(rows);
        for ((parameters, columns), row) in parts {
            let values: Vec<_> = row.values().collect();
            for (&at, texts) in parameters.iter().zip(columns) {
                let column = plan.columns.get(at);
                match column.and_then(|column| values.get(column.source)) {
                    Some(Value::Text(text)) => texts.push(Some(text)),
                    Some(Value::Null) => texts.push(None),
                    Some(Value::Unchanged) | None => {
                        let name = column.map_or("a column", |column| &column.name);
                        return Err(Error::data(format!("the change does not carry {name}")));
                    }
                }
            }
        }
        Ok(())
    }
}
