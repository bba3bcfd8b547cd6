//! What an encoder prepares once for each version of a table, and how it writes a row with it.

use std::{collections::HashMap, sync::Arc};

use super::json::{self, Dialect, NotUtf8, Shape};
use crate::{
    change::{Row, Value},
    error::{Error, Result},
    schema::{Column, Table},
};

/// Tables kept at most; beyond it all are made anew.
const TABLES_MAX: usize = 1024;

/// A column, ready to be written.
#[derive(Debug)]
pub(super) struct ColumnShape {
    /// `,"name":`.
    pub(super) fragment: Box<[u8]>,
    /// How its text becomes JSON.
    pub(super) shape: Shape,
    /// Part of the replica identity: sent with a partial old row.
    pub(super) identity: bool,
}

/// A version of a table, ready to be written.
#[derive(Debug)]
pub(super) struct TableShape {
    pub(super) table: Arc<Table>,
    pub(super) columns: Vec<ColumnShape>,
    /// Indexes of the key's columns.
    pub(super) key: Vec<usize>,
    /// The key, where only the identity's columns are known: the key itself if they hold it, else
    /// the identity.
    pub(super) partial_key: Vec<usize>,
    /// `{"source_table":"…","source_schema":"…"` or its like, made by the format.
    pub(super) head: Box<[u8]>,
}

impl TableShape {
    pub(super) fn new(table: &Arc<Table>, dialect: Dialect, head: fn(&Table) -> Vec<u8>) -> Self {
        let marked = table.columns.iter().any(|column| column.identity);
        let shape = |column: &Column| ColumnShape {
            fragment: json::fragment(&column.name),
            shape: Shape::of(&column.ty, dialect),
            identity: if marked { column.identity } else { column.primary_key },
        };
        let columns: Vec<_> = table.columns.iter().map(shape).collect();
        let key = table.key_columns();
        let sent = |index: &usize| columns.get(*index).is_some_and(|column| column.identity);
        let partial_key = if key.iter().all(sent) {
            key.clone()
        } else {
            (0..columns.len()).filter(sent).collect()
        };
        let head = head(table).into_boxed_slice();
        Self { table: Arc::clone(table), columns, key, partial_key, head }
    }

    /// Appends the value of column `index`.
    #[inline]
    pub(super) fn write_value(&self, out: &mut Vec<u8>, index: usize, text: &[u8]) -> Result<()> {
        let Some(column) = self.columns.get(index) else { return Err(self.ragged(index + 1)) };
        json::write_value(out, &column.shape, text).map_err(|NotUtf8| self.not_utf8(index))
    }

    /// Whether `row` has one value for each column: asserted before it is written.
    #[inline]
    pub(super) fn check(&self, row: &Row) -> Result<()> {
        if row.len() == self.columns.len() { Ok(()) } else { Err(self.ragged(row.len())) }
    }

    /// The columns with their index and value.
    #[inline]
    pub(super) fn zip<'a>(
        &'a self,
        row: &'a Row,
    ) -> impl Iterator<Item = (usize, &'a ColumnShape, Value<'a>)> {
        self.columns
            .iter()
            .zip(row.values())
            .enumerate()
            .map(|(i, (column, value))| (i, column, value))
    }

    /// The column's name.
    pub(super) fn name(&self, index: usize) -> &str {
        self.table.columns.get(index).map_or("", |column| &column.name)
    }

    #[cold]
    pub(super) fn not_utf8(&self, index: usize) -> Error {
        let (table, column) = (&self.table, self.name(index));
        Error::data(format!("column `{column}` of {table} holds bytes that are not UTF-8"))
            .remedy("JSON cannot carry them: use a UTF8 database, or leave the column out")
    }

    #[cold]
    fn ragged(&self, values: usize) -> Error {
        let (table, columns) = (&self.table, self.columns.len());
        Error::bug(format!("a row of {values} values for {table}, which has {columns} columns"))
    }
}

/// What was made for each table that an encoder has met, found by the table's address.
#[derive(Debug)]
pub(super) struct ByTable<T> {
    last: Option<Met<T>>,
    met: HashMap<usize, Met<T>>,
}

#[derive(Debug)]
struct Met<T> {
    /// Kept alive, so that its address names it.
    table: Arc<Table>,
    made: Arc<T>,
}

impl<T> ByTable<T> {
    pub(super) fn new() -> Self {
        Self { last: None, met: HashMap::new() }
    }

    /// What belongs to `table`. Runs of changes of one table take the short way.
    #[inline]
    pub(super) fn of(&mut self, table: &Arc<Table>, make: impl FnOnce() -> T) -> &T {
        let hit = matches!(&self.last, Some(last) if Arc::ptr_eq(&last.table, table));
        let met = if hit { self.last.take() } else { None };
        let met = met.unwrap_or_else(|| self.find(table, make));
        &self.last.insert(met).made
    }

    fn find(&mut self, table: &Arc<Table>, make: impl FnOnce() -> T) -> Met<T> {
        if self.met.len() >= TABLES_MAX {
            self.met.clear();
        }
        let met = self
            .met
            .entry(Arc::as_ptr(table).addr())
            .or_insert_with(|| Met { table: Arc::clone(table), made: Arc::new(make()) });
        Met { table: Arc::clone(&met.table), made: Arc::clone(&met.made) }
    }
}

/// The shapes of the tables that an encoder has met.
#[derive(Debug)]
pub(super) struct Shapes {
    dialect: Dialect,
    head: fn(&Table) -> Vec<u8>,
    tables: ByTable<TableShape>,
}

impl Shapes {
    pub(super) fn new(dialect: Dialect, head: fn(&Table) -> Vec<u8>) -> Self {
        Self { dialect, head, tables: ByTable::new() }
    }

    /// The shape of `table`.
    #[inline]
    pub(super) fn of(&mut self, table: &Arc<Table>) -> &TableShape {
        self.tables.of(table, || TableShape::new(table, self.dialect, self.head))
    }
}

/// Turns the comma before the first member into the opening brace, and closes the object.
#[inline]
pub(super) fn close_object(out: &mut Vec<u8>, start: usize) {
    match out.get_mut(start) {
        Some(comma) => *comma = b'{',
        None => out.push(b'{'),
    }
    out.push(b'}');
}
