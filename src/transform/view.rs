//! A change as expressions and functions see it: its rows by column name, value by value.

use std::{collections::HashMap, sync::Arc};

use cel::Value as Cel;
use serde_json::Value as Json;

use super::expression::{from_json, from_numeric};
use crate::{
    change::{Before, Change, Row, Value},
    error::Result,
    format::Reading,
    schema::Table,
};

/// Versions of tables that are kept at most; beyond it all are made anew.
const TABLES_MAX: usize = 4096;

/// What is made once for each version of a table, found by its address; the table is kept alive,
/// so that its address names it.
#[derive(Debug)]
pub(super) struct ByTable<K, T> {
    met: HashMap<(usize, K), (Arc<Table>, T)>,
}

impl<K, T> Default for ByTable<K, T> {
    fn default() -> Self {
        Self { met: HashMap::new() }
    }
}

impl<K: Eq + std::hash::Hash, T: Clone> ByTable<K, T> {
    /// What `make` made, now or before. A failure is not kept.
    pub(super) fn get(
        &mut self,
        table: &Arc<Table>,
        key: K,
        make: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let key = (Arc::as_ptr(table).addr(), key);
        if let Some((_, made)) = self.met.get(&key) {
            return Ok(made.clone());
        }
        if self.met.len() >= TABLES_MAX {
            self.met.clear();
        }
        let made = make()?;
        self.met.insert(key, (Arc::clone(table), made.clone()));
        Ok(made)
    }
}

/// The columns of a table, ready to be read.
#[derive(Debug, Default)]
pub(super) struct Columns {
    pub(super) names: Vec<Arc<String>>,
    pub(super) readings: Vec<Reading>,
    /// Sent with an old row that is not whole.
    pub(super) identity: Vec<bool>,
}

impl Columns {
    pub(super) fn of(table: &Table) -> Self {
        let marked = table.columns.iter().any(|column| column.identity);
        let columns = table.columns.iter();
        let sent = |c: &crate::schema::Column| if marked { c.identity } else { c.primary_key };
        Self {
            names: columns.clone().map(|column| Arc::new(column.name.clone())).collect(),
            readings: columns.clone().map(|column| Reading::of(&column.ty)).collect(),
            identity: columns.map(sent).collect(),
        }
    }
}

/// Which row is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// The new row, of a delete the old one.
    Record,
    /// The old row, as far as it is known.
    Before,
    /// The old row's values that an update changed.
    Changed,
}

/// A change and how its columns are read.
#[derive(Clone, Copy, Debug)]
pub(super) struct View<'a> {
    change: &'a Change,
    columns: &'a Columns,
}

impl<'a> View<'a> {
    pub(super) fn new(change: &'a Change, columns: &'a Columns) -> Self {
        Self { change, columns }
    }

    pub(super) fn change(&self) -> &'a Change {
        self.change
    }

    /// Whether there is any row: messages and truncates have none.
    pub(super) fn has_row(&self) -> bool {
        self.change.key_row().is_some()
    }

    /// Count of columns.
    pub(super) fn width(&self) -> usize {
        self.columns.names.len()
    }

    /// The name of a column.
    pub(super) fn name(&self, index: usize) -> &'a str {
        self.columns.names.get(index).map_or("", |name| name.as_str())
    }

    /// The index of a column.
    pub(super) fn position(&self, name: &str) -> Option<usize> {
        self.columns.names.iter().position(|column| column.as_str() == name)
    }

    /// Whether the column is sent with an old row that is not whole.
    pub(super) fn is_identity(&self, index: usize) -> bool {
        self.columns.identity.get(index).copied().unwrap_or(false)
    }

    pub(super) fn has_column(&self, name: &str) -> bool {
        self.position(name).is_some()
    }

    /// Whether the column's value is one that PostgreSQL did not send and nobody knows.
    pub(super) fn is_unchanged(&self, side: Side, name: &str) -> bool {
        let index = self.position(name);
        let row = self.row(side);
        index.is_some_and(|at| row.and_then(|row| row.value(at)) == Some(Value::Unchanged))
    }

    fn row(&self, side: Side) -> Option<&'a Row> {
        match side {
            Side::Record => self.change.key_row(),
            Side::Before | Side::Changed => self.change.before.row(),
        }
    }

    /// Calls `visit` with each column whose value is known, and a way to read it.
    pub(super) fn each(&self, side: Side, mut visit: impl FnMut(&Arc<String>, &dyn Fn() -> Cel)) {
        self.values(side, |index, value| {
            let Some(name) = self.columns.names.get(index) else { return };
            visit(name, &|| self.cel(index, value));
        });
    }

    /// Calls `visit` with the index and value of each column whose value is known.
    pub(super) fn values(&self, side: Side, mut visit: impl FnMut(usize, Value<'a>)) {
        let Some(row) = self.row(side) else { return };
        let old = self.change.before.row();
        let from_old = side != Side::Record || self.change.after.is_none();
        let partial = from_old && matches!(self.change.before, Before::Key(_));
        let new = self.change.after.as_ref();
        for (index, value) in row.values().enumerate() {
            let sent = |at: usize| self.columns.identity.get(at).copied().unwrap_or(false);
            if partial && !sent(index) {
                continue;
            }
            let value = match value {
                Value::Unchanged if !from_old => {
                    let whole = matches!(self.change.before, Before::Full(_)) || sent(index);
                    let known = old.filter(|_| whole).and_then(|row| row.value(index));
                    known.unwrap_or(Value::Unchanged)
                }
                value => value,
            };
            if value == Value::Unchanged {
                continue;
            }
            if side == Side::Changed {
                let now = new.and_then(|row| row.value(index));
                if now == Some(value) || matches!(now, None | Some(Value::Unchanged)) {
                    continue;
                }
            }
            visit(index, value);
        }
    }

    /// How a column is read.
    pub(super) fn reading(&self, index: usize) -> Option<&'a Reading> {
        self.columns.readings.get(index)
    }

    /// The values of a column in both rows, as far as they are texts.
    pub(super) fn known(&self, index: usize) -> impl Iterator<Item = Json> {
        let rows = [self.change.after.as_ref(), self.change.before.row()];
        let values = rows.into_iter().flatten().filter_map(move |row| row.value(index));
        values.filter_map(move |value| match value {
            Value::Text(_) => self.json(index, value),
            _ => None,
        })
    }

    /// The value of a column as JSON; `None` for bytes that are not UTF-8.
    pub(super) fn json(&self, index: usize, value: Value<'_>) -> Option<Json> {
        match value {
            Value::Text(text) => self.columns.readings.get(index)?.read(text),
            Value::Null | Value::Unchanged => Some(Json::Null),
        }
    }

    fn cel(&self, index: usize, value: Value<'_>) -> Cel {
        match (self.columns.readings.get(index), value) {
            (Some(Reading::Numeric), Value::Text(text)) => {
                std::str::from_utf8(text).map_or(Cel::Null, from_numeric)
            }
            (_, Value::Text(text)) => match self.json(index, value) {
                Some(json) => from_json(json),
                None => Cel::Bytes(Arc::new(text.to_vec())),
            },
            _ => Cel::Null,
        }
    }
}
