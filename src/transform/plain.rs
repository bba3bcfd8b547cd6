//! Steps that only choose, rename and hide columns. Adjacent ones become one projection, made once
//! for each version of a table: a row is copied once, whatever the number of steps.

use std::{collections::BTreeMap, sync::Arc};

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use super::{scope::Scope, view::ByTable};
use crate::{
    change::{Before, Change, Op, Row, Value},
    config::{self, Mask, glob_matches},
    error::{Error, Result},
    schema::{Column, Identity, Table, Type},
};

const REDACTED: &[u8] = b"***";
/// The oid of `text`.
pub(super) const TEXT: u32 = 25;

/// A run of such steps.
#[derive(Debug)]
pub(super) struct Plain {
    steps: Vec<(Scope, Action)>,
    projections: ByTable<Op, Arc<Projection>>,
    key: Option<Hmac<Sha256>>,
}

#[derive(Debug)]
enum Action {
    Keep(Vec<String>),
    Drop(Vec<String>),
    Rename(BTreeMap<String, String>),
    Mask(Vec<(String, Mask)>),
}

/// What becomes of a version of a table.
#[derive(Debug)]
struct Projection {
    table: Arc<Table>,
    /// `None`: everything stays as it is.
    cells: Option<Vec<Cell>>,
}

/// A column of the new table: where its value comes from, and what hides it.
#[derive(Clone, Debug)]
struct Cell {
    from: usize,
    masks: Vec<Mask>,
}

impl Plain {
    /// A run of no steps; hashes are made with `key`.
    pub(super) fn new(key: Option<&config::Secret>) -> Self {
        let key = key.and_then(|key| Hmac::new_from_slice(key.expose().as_bytes()).ok());
        Self { steps: Vec::new(), projections: ByTable::default(), key }
    }

    /// Adds a step; `false` where it is of another sort.
    pub(super) fn add(&mut self, step: &config::Step) -> Result<bool> {
        let action = match step.actions().as_slice() {
            ["columns"] => Action::Keep(step.columns.clone()),
            ["drop"] => Action::Drop(step.drop.clone()),
            ["rename"] => Action::Rename(step.rename.clone()),
            ["mask"] => {
                let mask = |(glob, word): (&String, &String)| Ok((glob.clone(), word.parse()?));
                Action::Mask(step.mask.iter().map(mask).collect::<Result<_>>()?)
            }
            _ => return Ok(false),
        };
        let hashes = |masks: &[(String, Mask)]| masks.iter().any(|(_, mask)| *mask == Mask::Hash);
        if matches!(&action, Action::Mask(masks) if hashes(masks)) && self.key.is_none() {
            return Err(Error::config("a mask hashes, but the sink has no `mask_key`"));
        }
        self.steps.push((Scope::new(step), action));
        Ok(true)
    }

    /// Whether there is no step at all.
    pub(super) fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// Projects the rows of a change; one without a table is as it was.
    pub(super) fn apply(&mut self, change: &mut Change) -> Result<()> {
        let Some(table) = &change.table else { return Ok(()) };
        let steps = &self.steps;
        let projection = self.projections.get(table, change.op, || {
            let chosen = steps.iter().filter(|(scope, _)| scope.covers_table(table, change.op));
            project(table, chosen.map(|(_, action)| action)).map(Arc::new)
        })?;
        let Some(cells) = &projection.cells else { return Ok(()) };
        let row = |row: &Row| self.row(row, cells);
        change.after = change.after.as_ref().map(row);
        change.before = match &change.before {
            Before::Nothing => Before::Nothing,
            Before::Key(old) => Before::Key(row(old)),
            Before::Full(old) => Before::Full(row(old)),
        };
        change.table = Some(Arc::clone(&projection.table));
        Ok(())
    }

    fn row(&self, row: &Row, cells: &[Cell]) -> Row {
        let values: Vec<Value<'_>> = row.values().collect();
        let value = |cell: &Cell| values.get(cell.from).copied().unwrap_or(Value::Null);
        let masked = |cell: &Cell| match value(cell) {
            Value::Text(text) if !cell.masks.is_empty() => Some(self.mask(text, &cell.masks)),
            _ => None,
        };
        if cells.iter().all(|cell| cell.masks.is_empty()) {
            return Row::from_values(cells.iter().map(value));
        }
        let hidden: Vec<Option<Vec<u8>>> = cells.iter().map(masked).collect();
        Row::from_values(cells.iter().zip(&hidden).map(|(cell, hidden)| match hidden {
            Some(text) => Value::Text(text),
            None => value(cell),
        }))
    }

    fn mask(&self, text: &[u8], masks: &[Mask]) -> Vec<u8> {
        let mut text = text.to_vec();
        for mask in masks {
            text = match (mask, &self.key) {
                (Mask::Hash, Some(key)) => {
                    let mut hmac = key.clone();
                    hmac.update(&text);
                    hex::encode(hmac.finalize().into_bytes()).into_bytes()
                }
                (Mask::Truncate(chars), _) => first(&text, *chars).to_vec(),
                _ => REDACTED.to_vec(),
            };
        }
        text
    }
}

/// The first characters of a UTF-8 text; bytes of any other text.
fn first(text: &[u8], chars: usize) -> &[u8] {
    let end = match std::str::from_utf8(text) {
        Ok(text) => text.char_indices().nth(chars).map_or(text.len(), |(at, _)| at),
        Err(_) => chars.min(text.len()),
    };
    text.get(..end).unwrap_or(text)
}

fn project<'a>(
    table: &Arc<Table>,
    actions: impl Iterator<Item = &'a Action>,
) -> Result<Projection> {
    let plain = |from| Cell { from, masks: Vec::new() };
    let columns = table.columns.iter().enumerate();
    let mut projected: Vec<(Column, Cell)> =
        columns.map(|(index, column)| (column.clone(), plain(index))).collect();
    let mut keyed = true;
    let key: Vec<usize> = table.key_columns();
    for action in actions {
        match action {
            Action::Keep(globs) => {
                projected
                    .retain(|(column, cell)| key.contains(&cell.from) || any(globs, &column.name));
            }
            Action::Drop(globs) => {
                keyed &= remove(&mut projected, &key, |name| any(globs, name));
            }
            Action::Rename(names) => {
                for (column, _) in &mut projected {
                    if let Some(name) = names.get(&column.name) {
                        column.name.clone_from(name);
                    }
                }
            }
            Action::Mask(masks) => {
                let dropped = |name: &str| mask_of(masks, name) == Some(Mask::Drop);
                keyed &= remove(&mut projected, &key, dropped);
                for (column, cell) in &mut projected {
                    if let Some(mask) = mask_of(masks, &column.name) {
                        column.ty = text_type(TEXT);
                        cell.masks.push(mask);
                    }
                }
            }
        }
    }
    finish(table, projected, keyed)
}

fn finish(table: &Arc<Table>, projected: Vec<(Column, Cell)>, keyed: bool) -> Result<Projection> {
    let (mut columns, cells): (Vec<Column>, Vec<Cell>) = projected.into_iter().unzip();
    if columns == table.columns && cells.iter().all(|cell| cell.masks.is_empty()) {
        return Ok(Projection { table: Arc::clone(table), cells: None });
    }
    check_names(table, &columns)?;
    let mut identity = table.identity;
    if !keyed {
        // What is left of a key would name several rows as one.
        columns.iter_mut().for_each(|column| column.primary_key = false);
        identity = Identity::Nothing;
    }
    let table = Table { columns, identity, ..Table::clone(table) };
    Ok(Projection { table: Arc::new(table), cells: Some(cells) })
}

/// Takes columns away; whether the key is still whole.
fn remove(columns: &mut Vec<(Column, Cell)>, key: &[usize], gone: impl Fn(&str) -> bool) -> bool {
    let mut whole = true;
    columns.retain(|(column, cell)| {
        let goes = gone(&column.name);
        whole &= !(goes && key.contains(&cell.from));
        !goes
    });
    whole
}

/// Two columns of one name would be one in JSON.
pub(super) fn check_names(table: &Table, columns: &[Column]) -> Result<()> {
    for (index, column) in columns.iter().enumerate() {
        if columns.iter().skip(index + 1).any(|other| other.name == column.name) {
            let name = &column.name;
            return Err(Error::data(format!("{table} would have two columns named {name}"))
                .remedy("choose another name, or drop the other column first"));
        }
    }
    Ok(())
}

fn any(globs: &[String], name: &str) -> bool {
    globs.iter().any(|glob| glob_matches(glob, name))
}

/// The mask of a column: its own name's before a glob's.
fn mask_of(masks: &[(String, Mask)], name: &str) -> Option<Mask> {
    let exact = masks.iter().find(|(glob, _)| glob == name);
    let found = exact.or_else(|| masks.iter().find(|(glob, _)| glob_matches(glob, name)));
    found.map(|(_, mask)| *mask)
}

/// A built-in scalar type by its oid.
pub(super) fn text_type(oid: u32) -> Type {
    let name = match oid {
        16 => "boolean",
        20 => "bigint",
        701 => "double precision",
        1700 => "numeric",
        3802 => "jsonb",
        _ => "text",
    };
    Type { name: name.to_owned(), ..Type::base(oid, -1) }
}
