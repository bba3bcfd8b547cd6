//! Rows of one table that are written together: several changes of one key become the last of them,
//! and rows that ask for the same become one statement.
//!
//! All of it lies within one transaction of the target, whose readers see the outcome alone. What
//! could tell the order apart, a trigger or a foreign key, keeps a run to changes of one sort of
//! different keys, and to one table.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use super::{
    sql::Shape,
    step::{self, Step},
    table::Plan,
    texts::Rows,
};
use crate::{
    change::{Row, Value},
    error::{Error, Result},
};

/// From this many new rows on, COPY costs less than a statement.
const COPY_ROWS_MIN: usize = 64;

/// Runs that wait to be written, at most one a table.
#[derive(Debug, Default)]
pub(super) struct Runs {
    runs: Vec<Run>,
    /// Tables are not mixed: something made their order show.
    pub(super) in_order: bool,
}

/// What becomes of a run.
#[derive(Debug)]
pub(super) enum Write {
    /// New rows, by COPY.
    Copy(Vec<Row>),
    /// A statement, and how many rows it must find.
    Statement { shape: Shape, rows: Rows, expected: Option<u64> },
}

/// Rows of one table.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) plan: Arc<Plan>,
    entries: Vec<Entry>,
    by_key: HashMap<Vec<u8>, usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sort {
    Put,
    Patch,
    Remove,
}

#[derive(Debug)]
struct Entry {
    sort: Sort,
    row: Row,
    is_new: bool,
}

impl Runs {
    /// Takes a step in, or gives it back: what waits must be written before it.
    pub(super) fn add(&mut self, plan: &Arc<Plan>, step: Step) -> Result<(), Step> {
        if let Some(last) = self.runs.last()
            && last.plan.number != plan.number
            && (self.in_order || plan.is_watched || last.plan.is_watched)
        {
            return Err(step);
        }
        let run = match self.runs.iter().position(|run| run.plan.number == plan.number) {
            Some(at) => self.runs.get_mut(at),
            // Another version of the table, or another table that goes to the same.
            None if self.runs.iter().any(|run| run.plan.name == plan.name) => return Err(step),
            None => {
                self.runs.push(Run {
                    plan: Arc::clone(plan),
                    entries: Vec::new(),
                    by_key: HashMap::new(),
                });
                self.runs.last_mut()
            }
        };
        match run {
            Some(run) => run.add(step),
            None => Err(step),
        }
    }

    /// What waits, in the order in which it began.
    pub(super) fn take(&mut self) -> Vec<Run> {
        std::mem::take(&mut self.runs)
    }
}

impl Run {
    fn add(&mut self, step: Step) -> Result<(), Step> {
        let (sort, row, is_new) = match step {
            Step::Put { row, is_new } => (Sort::Put, row, is_new),
            Step::Append { row } => (Sort::Put, row, true),
            Step::Patch { row } => (Sort::Patch, row, false),
            Step::Remove { row } => (Sort::Remove, row, false),
            other => return Err(other),
        };
        let entry = Entry { sort, row, is_new };
        let other_sort = self.entries.last().is_some_and(|last| last.sort != sort);
        if self.plan.is_watched && other_sort {
            return Err(entry.step());
        }
        if self.plan.key.is_empty() {
            self.entries.push(entry);
            return Ok(());
        }
        let key = bytes_of(&step::key(&entry.row, &self.plan));
        let Some(had) = self.by_key.get(&key).and_then(|&at| self.entries.get_mut(at)) else {
            self.by_key.insert(key, self.entries.len());
            self.entries.push(entry);
            return Ok(());
        };
        // A row that comes after its removal is another: what the target has in further columns
        // must not outlive it.
        if self.plan.is_watched || had.sort == Sort::Remove && sort != Sort::Remove {
            return Err(entry.step());
        }
        had.follow(entry);
        Ok(())
    }

    /// The run as COPY and statements.
    pub(super) fn writes(self, may_copy: bool) -> Result<Vec<Write>> {
        let plan = &self.plan;
        let (mut removed, mut patched, mut put) = (Vec::new(), BTreeMap::new(), Vec::new());
        let only_new = self.entries.iter().all(|entry| entry.sort == Sort::Put && entry.is_new);
        for entry in self.entries {
            match entry.sort {
                Sort::Remove => removed.push(entry.row),
                Sort::Put => put.push(entry.row),
                Sort::Patch => {
                    let set = sent(&entry.row, plan);
                    patched.entry(set).or_insert_with(Vec::new).push(entry.row);
                }
            }
        }
        let mut writes = Vec::new();
        if !removed.is_empty() {
            writes.push(Write::new(plan, Shape::Delete, &removed)?);
        }
        for (set, rows) in patched {
            if !set.is_empty() {
                let mut write = Write::new(plan, Shape::Patch(set), &rows)?;
                if let Write::Statement { expected, .. } = &mut write {
                    *expected = Some(rows.len() as u64);
                }
                writes.push(write);
            }
        }
        if may_copy && plan.may_copy && only_new && put.len() >= COPY_ROWS_MIN {
            writes.push(Write::Copy(put));
        } else if !put.is_empty() {
            let shape = if plan.key.is_empty() { Shape::Insert } else { Shape::Upsert };
            writes.push(Write::new(plan, shape, &put)?);
        }
        Ok(writes)
    }
}

impl Write {
    /// One statement for these rows.
    pub(super) fn new(plan: &Plan, shape: Shape, rows: &[Row]) -> Result<Self> {
        let parameters = shape.parameters(plan);
        let mut filled = Rows::new(parameters.len());
        for row in rows {
            filled.push(plan, &parameters, &[row])?;
        }
        Ok(Write::Statement { shape, rows: filled, expected: None })
    }

    /// One statement for an old row and what it becomes; each has half of the values.
    pub(super) fn pair(plan: &Plan, shape: Shape, old: &Row, row: &Row) -> Result<Self> {
        let parameters = shape.parameters(plan);
        let mut filled = Rows::new(parameters.len());
        filled.push(plan, &parameters, &[old, row])?;
        Ok(Write::Statement { shape, rows: filled, expected: None })
    }
}

impl Entry {
    fn step(self) -> Step {
        let (row, is_new) = (self.row, self.is_new);
        match self.sort {
            Sort::Put => Step::Put { row, is_new },
            Sort::Patch => Step::Patch { row },
            Sort::Remove => Step::Remove { row },
        }
    }

    /// Becomes what a later change of its key makes of it.
    fn follow(&mut self, later: Entry) {
        match (self.sort, later.sort) {
            (_, Sort::Patch) => {
                let values = self.row.values().zip(later.row.values());
                let values =
                    values.map(|(had, new)| if new == Value::Unchanged { had } else { new });
                self.row = Row::from_values(values);
            }
            (_, Sort::Put) => {
                self.row = later.row;
                self.is_new &= self.sort == Sort::Put;
                self.sort = Sort::Put;
            }
            (_, Sort::Remove) => *self = later,
        }
    }
}

/// The columns that an update sets: those whose values were sent, but for the key's.
fn sent(row: &Row, plan: &Plan) -> Vec<usize> {
    let values: Vec<_> = row.values().collect();
    let columns = plan.columns.iter().enumerate().filter(|(at, column)| {
        let sent = values.get(column.source).is_some_and(|value| *value != Value::Unchanged);
        sent && plan.is_settable(*at) && !plan.key.contains(at)
    });
    columns.map(|(at, _)| at).collect()
}

fn bytes_of(key: &[Value]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(16);
    for value in key {
        let text = match value {
            Value::Text(text) => *text,
            Value::Null | Value::Unchanged => b"",
        };
        bytes.extend_from_slice(&text.len().to_be_bytes());
        bytes.extend_from_slice(text);
    }
    bytes
}

/// A row in the text format of COPY
/// (<https://www.postgresql.org/docs/current/sql-copy.html>).
pub(super) fn copy_line(row: &Row, plan: &Plan, out: &mut Vec<u8>) -> Result<()> {
    let values: Vec<_> = row.values().collect();
    for (at, column) in plan.columns.iter().enumerate() {
        if at > 0 {
            out.push(b'\t');
        }
        match values.get(column.source) {
            Some(Value::Text(text)) => escape(text, out),
            Some(Value::Null) => out.extend_from_slice(b"\\N"),
            Some(Value::Unchanged) | None => {
                return Err(Error::data(format!("a new row lacks {}", column.name)));
            }
        }
    }
    out.push(b'\n');
    Ok(())
}

fn escape(text: &[u8], out: &mut Vec<u8>) {
    let mut rest = text;
    let special = |byte: &u8| matches!(byte, b'\\' | b'\n' | b'\r' | b'\t');
    while let Some(at) = rest.iter().position(special) {
        let (plain, tail) = rest.split_at(at);
        out.extend_from_slice(plain);
        let Some((byte, tail)) = tail.split_first() else { return };
        out.push(b'\\');
        out.push(match byte {
            b'\n' => b'n',
            b'\r' => b'r',
            b'\t' => b't',
            other => *other,
        });
        rest = tail;
    }
    out.extend_from_slice(rest);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_escaped_for_copy() {
        let mut out = Vec::new();
        escape(b"a\tb\\N\r\n\xc3\xbc", &mut out);
        assert_eq!(out, b"a\\tb\\\\N\\r\\n\xc3\xbc");
    }
}
