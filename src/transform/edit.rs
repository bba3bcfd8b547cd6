//! A row with new values in it: which type each column then has, and the table that says so.

use std::{collections::HashMap, sync::Arc};

use serde_json::Value as Json;

use super::{
    plain::{TEXT, check_names, text_type},
    view::{Columns, View},
};
use crate::{
    change::{Before, Change, Row, Value},
    error::Result,
    format::Reading,
    schema::{Column, Identity, Table},
};

const BOOLEAN: u32 = 16;
const BIGINT: u32 = 20;
const DOUBLE: u32 = 701;
const NUMERIC: u32 = 1700;
const JSONB: u32 = 3802;
/// In a [`Signature`]: the column keeps its type.
const KEPT: u32 = 0;
/// In a [`Signature`]: the column is taken away.
const GONE: u32 = u32::MAX;
/// Tables that are kept at most; beyond it all are made anew.
const TABLES_MAX: usize = 4096;
/// Whole numbers up to this are exact as doubles.
const EXACT_MAX: f64 = 9_007_199_254_740_992.0;

/// What becomes of one value.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Cell {
    /// It stays, byte for byte.
    Same,
    /// Its column is taken away.
    Gone,
    /// It is replaced.
    New(Json),
}

/// What becomes of one row.
#[derive(Clone, Debug, Default)]
pub(super) struct RowEdit {
    /// One for each column.
    pub(super) cells: Vec<Cell>,
    /// One for each added column; `None`: not known for this row.
    pub(super) added: Vec<Option<Json>>,
}

/// What becomes of the rows of a change.
#[derive(Clone, Debug, Default)]
pub(super) struct Edit {
    /// Names of the columns that are added.
    pub(super) added: Vec<String>,
    /// The new row, of a delete the old one. It decides which columns go.
    pub(super) record: RowEdit,
    /// The old row beside a new one.
    pub(super) before: Option<RowEdit>,
}

/// The columns of an edited table, as far as they differ.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Signature {
    columns: Vec<u32>,
    added: Vec<(String, u32)>,
}

/// The tables that edits made, so that the same edit of the same table gives the same one.
#[derive(Debug, Default)]
pub(super) struct Layouts {
    met: HashMap<(usize, Signature), (Arc<Table>, Arc<Table>)>,
}

impl RowEdit {
    /// Everything stays.
    pub(super) fn same(columns: usize, added: usize) -> Self {
        Self { cells: vec![Cell::Same; columns], added: vec![None; added] }
    }
}

impl Edit {
    /// Whether every row stays as it is.
    pub(super) fn is_nothing(&self) -> bool {
        let same = |row: &RowEdit| row.cells.iter().all(|cell| *cell == Cell::Same);
        self.added.is_empty() && same(&self.record) && self.before.as_ref().is_none_or(same)
    }
}

impl Layouts {
    /// Rewrites the rows of `change`, which has a table and a row.
    pub(super) fn apply(
        &mut self,
        change: &mut Change,
        columns: &Columns,
        edit: &Edit,
    ) -> Result<()> {
        let (Some(table), true) = (change.table.clone(), change.key_row().is_some()) else {
            return Ok(());
        };
        let signature = signature(&View::new(change, columns), edit);
        let write =
            |row: &Row, edit: &RowEdit, missing| write(row, edit, (columns, &signature), missing);
        if let Some(after) = &change.after {
            let after = write(after, &edit.record, Value::Null);
            let before = edit.before.as_ref();
            change.before = match (&change.before, before) {
                (Before::Key(row), Some(edit)) => Before::Key(write(row, edit, Value::Null)),
                (Before::Full(row), Some(edit)) => Before::Full(write(row, edit, Value::Unchanged)),
                _ => Before::Nothing,
            };
            change.after = Some(after);
        } else {
            change.before = match &change.before {
                Before::Nothing => Before::Nothing,
                Before::Key(row) => Before::Key(write(row, &edit.record, Value::Null)),
                Before::Full(row) => Before::Full(write(row, &edit.record, Value::Null)),
            };
        }
        change.table = Some(self.table(&table, signature)?);
        Ok(())
    }

    fn table(&mut self, table: &Arc<Table>, signature: Signature) -> Result<Arc<Table>> {
        let key = (Arc::as_ptr(table).addr(), signature);
        if let Some((_, made)) = self.met.get(&key) {
            return Ok(Arc::clone(made));
        }
        if self.met.len() >= TABLES_MAX {
            self.met.clear();
        }
        let made = Arc::new(edited(table, &key.1)?);
        self.met.insert(key, (Arc::clone(table), Arc::clone(&made)));
        Ok(made)
    }
}

fn edited(table: &Table, signature: &Signature) -> Result<Table> {
    let mut columns = Vec::with_capacity(table.columns.len() + signature.added.len());
    let mut keyed = true;
    let key = table.key_columns();
    for (index, (column, ty)) in table.columns.iter().zip(&signature.columns).enumerate() {
        match *ty {
            KEPT => columns.push(column.clone()),
            GONE => keyed &= !key.contains(&index),
            oid => columns.push(Column { ty: text_type(oid), ..column.clone() }),
        }
    }
    columns.extend(signature.added.iter().map(|(name, oid)| Column {
        name: name.clone(),
        ty: text_type(*oid),
        primary_key: false,
        identity: table.identity == Identity::Full,
        nullable: Some(true),
    }));
    check_names(table, &columns)?;
    let mut identity = table.identity;
    if !keyed {
        columns.iter_mut().for_each(|column| column.primary_key = false);
        identity = Identity::Nothing;
    }
    Ok(Table { columns, identity, ..table.clone() })
}

/// The type of each column, such that it holds the values of both rows.
fn signature(view: &View<'_>, edit: &Edit) -> Signature {
    let rows = || std::iter::once(&edit.record).chain(&edit.before);
    let decide = |(index, cell): (usize, &Cell)| {
        if *cell == Cell::Gone {
            return GONE;
        }
        let cells = || rows().filter_map(|row| row.cells.get(index));
        let news =
            || cells().filter_map(|cell| if let Cell::New(j) = cell { Some(j) } else { None });
        let Some(reading) = view.reading(index) else { return KEPT };
        if news().all(|json| fit(reading, json).is_some()) {
            return KEPT;
        }
        let mut seen: Vec<Json> = news().cloned().collect();
        if cells().any(|cell| *cell == Cell::Same) {
            seen.extend(view.known(index));
        }
        class(&seen)
    };
    let columns = edit.record.cells.iter().enumerate().map(decide).collect();
    let added = edit.added.iter().enumerate().map(|(index, name)| {
        let values = rows().filter_map(|row| row.added.get(index)?.clone());
        (name.clone(), class(&values.collect::<Vec<_>>()))
    });
    Signature { columns, added: added.collect() }
}

/// The type that holds all of these.
fn class(values: &[Json]) -> u32 {
    let all = |is: fn(&Json) -> bool| values.iter().all(|json| json.is_null() || is(json));
    match () {
        () if all(Json::is_string) => TEXT,
        () if all(Json::is_boolean) => BOOLEAN,
        () if all(Json::is_i64) => BIGINT,
        () if all(|json| json.is_i64() || json.is_u64()) => NUMERIC,
        () if all(Json::is_number) => DOUBLE,
        () => JSONB,
    }
}

/// The text of a value of a column that keeps its type; `None` where that does not hold it.
fn fit(reading: &Reading, json: &Json) -> Option<String> {
    match (reading, json) {
        (_, Json::Null) => Some(String::new()),
        (Reading::Integer, Json::Number(number)) => {
            let whole = |n: &f64| n.fract() == 0.0 && n.abs() <= EXACT_MAX;
            match number.as_i64() {
                Some(number) => Some(number.to_string()),
                None => number.as_f64().filter(whole).map(|number| format!("{number:.0}")),
            }
        }
        (Reading::Integer, Json::String(text)) => {
            text.parse::<i64>().ok().map(|number| number.to_string())
        }
        (Reading::Double | Reading::Numeric, Json::Number(number)) => Some(number.to_string()),
        (Reading::Numeric, Json::String(text)) => text.parse::<f64>().ok().map(|_| text.clone()),
        (Reading::Boolean, Json::Bool(is)) => Some(if *is { "t" } else { "f" }.to_owned()),
        (Reading::Document, json) => Some(json.to_string()),
        (Reading::Text, Json::String(text)) => Some(text.clone()),
        (Reading::Structured(shape), Json::String(text)) if shape.is_time() => Some(text.clone()),
        _ => None,
    }
}

/// The text of a value of a column that has a type of ours.
fn text_of(oid: u32, json: &Json) -> String {
    match json {
        Json::String(text) if oid == TEXT => text.clone(),
        Json::Bool(is) if oid == BOOLEAN => if *is { "t" } else { "f" }.to_owned(),
        json => json.to_string(),
    }
}

fn write(
    row: &Row,
    edit: &RowEdit,
    (columns, signature): (&Columns, &Signature),
    missing: Value<'static>,
) -> Row {
    let mut texts: Vec<Option<String>> = Vec::with_capacity(row.len() + edit.added.len());
    for (index, value) in row.values().enumerate() {
        let oid = signature.columns.get(index).copied().unwrap_or(KEPT);
        let reading = columns.readings.get(index);
        let text = match (edit.cells.get(index), oid, value) {
            (_, GONE, _) => None,
            (Some(Cell::New(Json::Null)), ..) => None,
            (Some(Cell::New(json)), KEPT, _) => reading.and_then(|reading| fit(reading, json)),
            (Some(Cell::New(json)), oid, _) => Some(text_of(oid, json)),
            (_, KEPT, _) => None,
            (_, oid, Value::Text(text)) => {
                reading.and_then(|reading| reading.read(text)).map(|json| text_of(oid, &json))
            }
            _ => None,
        };
        texts.push(text);
    }
    let kept = row.values().zip(&texts).enumerate().filter_map(|(index, (value, text))| {
        let oid = signature.columns.get(index).copied().unwrap_or(KEPT);
        Some(match (edit.cells.get(index), text) {
            _ if oid == GONE => return None,
            (_, Some(text)) => Value::Text(text.as_bytes()),
            (Some(Cell::New(_)), None) => Value::Null,
            (Some(Cell::Gone), None) => missing,
            (_, None) => value,
        })
    });
    let added: Vec<Option<String>> = (edit.added.iter().zip(&signature.added))
        .map(|(json, (_, oid))| Some(text_of(*oid, json.as_ref().filter(|j| !j.is_null())?)))
        .collect();
    let added = edit.added.iter().zip(&added).map(|(json, text)| match (json, text) {
        (None, _) => missing,
        (Some(_), None) => Value::Null,
        (Some(_), Some(text)) => Value::Text(text.as_bytes()),
    });
    Row::from_values(kept.chain(added))
}
