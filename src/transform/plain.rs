//! Steps that only choose, rename and hide columns. Adjacent ones become one projection, made once
//! for each version of a table: a row is copied once, whatever the number of steps.

use std::{collections::BTreeMap, sync::Arc};

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use super::{
    scope::Scope,
    unmatched::{Name, Unmatched},
    view::ByTable,
};
use crate::{
    change::{Before, Change, Op, Row, Value},
    config::{self, Mask, glob_matches},
    error::{Error, Result},
    schema::{Column, Identity, Table, Type},
};

const REDACTED: &[u8] = b"***";
/// The oid of `text`.
pub(super) const TEXT: u32 = 25;

/// The place of the column that a value comes from, and whether it is hidden.
pub(super) type Origin = (usize, bool);

/// A run of such steps.
#[derive(Debug)]
pub(super) struct Plain {
    steps: Vec<Stage>,
    projections: ByTable<Op, Arc<Projection>>,
    key: Option<Hmac<Sha256>>,
    /// Steps before these ones add and remove columns change by change.
    wavers: bool,
    /// What nobody was told yet.
    news: Vec<Unmatched>,
}

#[derive(Debug)]
struct Stage {
    scope: Scope,
    action: Action,
    names: Vec<Name>,
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
    /// A run of no steps; hashes are made with `key`. `wavers`: a step before it may add and remove
    /// columns.
    pub(super) fn new(key: Option<&config::Secret>, wavers: bool) -> Self {
        let key = key.and_then(|key| Hmac::new_from_slice(key.expose().as_bytes()).ok());
        let (steps, news) = (Vec::new(), Vec::new());
        Self { steps, projections: ByTable::default(), key, wavers, news }
    }

    /// Adds the step `rule`; `false` where it is of another sort.
    pub(super) fn add(&mut self, rule: &str, step: &config::Step) -> Result<bool> {
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
        let names = action.names(rule);
        self.steps.push(Stage { scope: Scope::new(step), action, names });
        Ok(true)
    }

    /// What is to be told of columns that steps name and tables do not have, since it was last
    /// told.
    pub(super) fn take_news(&mut self) -> Vec<Unmatched> {
        std::mem::take(&mut self.news)
    }

    /// Tables come to these steps whose columns nobody knows before the changes.
    pub(super) fn doubt(&mut self) {
        self.steps.iter_mut().flat_map(|stage| &mut stage.names).for_each(Name::doubt);
    }

    /// The names of columns that the steps give.
    pub(super) fn names(&self) -> impl Iterator<Item = &Name> {
        self.steps.iter().flat_map(|stage| &stage.names)
    }

    /// Whether there is no step at all.
    pub(super) fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// Projects the rows of a change; one without a table is as it was.
    pub(super) fn apply(&mut self, change: &mut Change) -> Result<()> {
        let Some(table) = &change.table else { return Ok(()) };
        let projection = self.projection(table, change.op)?;
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

    /// The table as the steps leave it for changes of this operation.
    pub(super) fn table(&mut self, table: &Arc<Table>, op: Op) -> Result<Arc<Table>> {
        Ok(Arc::clone(&self.projection(table, op)?.table))
    }

    /// The table as the steps leave it, and for each of its columns the place that its value comes
    /// from and whether it is hidden.
    pub(super) fn origins(
        &mut self,
        table: &Arc<Table>,
        op: Op,
    ) -> Result<(Arc<Table>, Vec<Origin>)> {
        let projection = self.projection(table, op)?;
        let origins = match &projection.cells {
            Some(cells) => cells.iter().map(|cell| (cell.from, !cell.masks.is_empty())).collect(),
            None => (0..table.columns.len()).map(|column| (column, false)).collect(),
        };
        Ok((Arc::clone(&projection.table), origins))
    }

    fn projection(&mut self, table: &Arc<Table>, op: Op) -> Result<Arc<Projection>> {
        let Self { steps, projections, wavers, news, .. } = self;
        projections.get(table, op, || {
            let chosen = steps.iter_mut().filter(|stage| stage.scope.covers_table(table, op));
            project(table, chosen, |stage, columns| {
                let met = stage.names.iter_mut();
                news.extend(met.filter_map(|name| {
                    name.meet(table, columns.iter().map(|(column, _)| column), *wavers)
                }));
            })
            .map(Arc::new)
        })
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

impl Action {
    /// The names of columns that it gives, as a step of `rule`.
    fn names(&self, rule: &str) -> Vec<Name> {
        let name = |word: &str, column: &str, takes_away: bool| {
            Name::new(format!("{rule}.{word}"), column, takes_away)
        };
        match self {
            Self::Keep(globs) => globs.iter().map(|glob| name("columns", glob, false)).collect(),
            Self::Drop(globs) => globs.iter().map(|glob| name("drop", glob, true)).collect(),
            Self::Rename(names) => names.keys().map(|old| name("rename", old, false)).collect(),
            Self::Mask(masks) => masks.iter().map(|(glob, _)| name("mask", glob, true)).collect(),
        }
    }
}

fn project<'a>(
    table: &Arc<Table>,
    stages: impl Iterator<Item = &'a mut Stage>,
    mut meet: impl FnMut(&mut Stage, &[(Column, Cell)]),
) -> Result<Projection> {
    let plain = |from| Cell { from, masks: Vec::new() };
    let columns = table.columns.iter().enumerate();
    let mut projected: Vec<(Column, Cell)> =
        columns.map(|(index, column)| (column.clone(), plain(index))).collect();
    let mut keyed = true;
    let key: Vec<usize> = table.key_columns();
    for stage in stages {
        meet(stage, &projected);
        match &stage.action {
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
