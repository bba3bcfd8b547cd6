//! The steps of a transform, one after the other.

use std::sync::Arc;

use serde_json::Value as Json;

use super::{
    columns_of,
    edit::{Cell, Edit, Layouts, RowEdit},
    expression::Expression,
    function::Function,
    plain::{Plain, TEXT, text_type},
    scope::Scope,
    view::{ByTable, Columns, Side, View},
};
use crate::{
    change::{Before, Change, Op},
    config,
    error::{Error, Result},
    schema::{Column, Table},
};

/// One step, or several that became one.
#[derive(Debug)]
pub(super) enum Step {
    /// Columns are chosen, renamed and hidden.
    Plain(Plain),
    /// Columns are computed.
    Set(Set),
    /// One change becomes several.
    Explode(Explode),
    /// A function decides.
    Function(Scope, Box<Function>),
}

/// Computed columns.
#[derive(Debug)]
pub(super) struct Set {
    scope: Scope,
    rule: String,
    columns: Vec<(String, Expression)>,
    layouts: Layouts,
}

/// A list that is taken apart.
#[derive(Debug)]
pub(super) struct Explode {
    scope: Scope,
    list: Expression,
    column: String,
    layouts: Layouts,
}

impl Step {
    /// Compiles a step that is not plain; `rule` is its name.
    pub(super) fn new(rule: &str, step: &config::Step) -> Result<Self> {
        let scope = Scope::new(step);
        let rule = rule.to_owned();
        match (step.actions().as_slice(), &step.explode, &step.element) {
            (["set"], ..) => {
                let column = |(name, text): (&String, &String)| {
                    Ok((name.clone(), Expression::compile(&format!("{rule}.set.{name}"), text)?))
                };
                let columns = step.set.iter().map(column).collect::<Result<_>>()?;
                Ok(Self::Set(Set { scope, rule, columns, layouts: Layouts::default() }))
            }
            (["explode"], Some(text), Some(column)) => {
                let list = Expression::compile(&format!("{rule}.explode"), text)?;
                let column = column.clone();
                Ok(Self::Explode(Explode { scope, list, column, layouts: Layouts::default() }))
            }
            (["function" | "function_file"], ..) => {
                Ok(Self::Function(scope, Box::new(Function::new(&rule, step)?)))
            }
            _ => Err(Error::config(format!("{rule} does not do just one thing"))),
        }
    }

    /// The rule that it stands for.
    pub(super) fn rule(&self) -> &str {
        match self {
            Self::Plain(_) => "transform",
            Self::Set(set) => &set.rule,
            Self::Explode(explode) => explode.list.rule(),
            Self::Function(_, function) => function.rule(),
        }
    }

    /// The columns that are chosen, renamed and hidden, where it is of that sort.
    pub(super) fn plain(&self) -> Option<&Plain> {
        if let Self::Plain(plain) = self { Some(plain) } else { None }
    }

    /// As [`Self::plain`].
    pub(super) fn plain_mut(&mut self) -> Option<&mut Plain> {
        if let Self::Plain(plain) = self { Some(plain) } else { None }
    }

    /// Whether it applies to changes of this operation of a table.
    pub(super) fn covers(&self, table: &Arc<Table>, op: Op) -> bool {
        match self {
            Self::Plain(_) => true,
            Self::Set(set) => set.scope.covers_table(table, op),
            Self::Explode(explode) => explode.scope.covers_table(table, op),
            Self::Function(scope, _) => scope.covers_table(table, op),
        }
    }

    /// The table as the step leaves it for changes of this operation; `None` where that depends on
    /// the change.
    pub(super) fn meet(&mut self, table: &Arc<Table>, op: Op) -> Result<Option<Arc<Table>>> {
        let (scope, added): (_, Vec<&String>) = match self {
            Self::Plain(plain) => return plain.table(table, op).map(Some),
            Self::Set(set) => (&set.scope, set.columns.iter().map(|(name, _)| name).collect()),
            Self::Explode(explode) => (&explode.scope, vec![&explode.column]),
            Self::Function(scope, _) => {
                return Ok(Some(Arc::clone(table)).filter(|_| !scope.covers_table(table, op)));
            }
        };
        if !scope.covers_table(table, op) {
            return Ok(Some(Arc::clone(table)));
        }
        let mut made = Table::clone(table);
        for name in added {
            if made.columns.iter().all(|column| column.name != *name) {
                let (name, ty) = (name.clone(), text_type(TEXT));
                let (primary_key, identity, nullable) = (false, false, None);
                made.columns.push(Column { name, ty, primary_key, identity, nullable });
            }
        }
        Ok(Some(Arc::new(made)))
    }

    /// What becomes of the parts that the step before made.
    pub(super) fn apply(
        &mut self,
        mut parts: Vec<Change>,
        columns: &mut ByTable<(), Arc<Columns>>,
    ) -> Result<Vec<Change>> {
        match self {
            Self::Plain(plain) => parts.iter_mut().try_for_each(|part| plain.apply(part))?,
            Self::Set(set) => {
                for part in &mut parts {
                    set.apply(part, columns)?;
                }
            }
            Self::Explode(explode) => {
                return each(parts, |part| explode.apply(part, columns));
            }
            Self::Function(scope, function) => {
                return each(parts, |part| match scope.covers(&part)? {
                    true => {
                        let columns = columns_of(columns, &part)?;
                        function.apply(&part, &columns)
                    }
                    false => Ok(vec![part]),
                });
            }
        }
        Ok(parts)
    }
}

fn each(
    parts: Vec<Change>,
    mut apply: impl FnMut(Change) -> Result<Vec<Change>>,
) -> Result<Vec<Change>> {
    let mut made = Vec::with_capacity(parts.len());
    for part in parts {
        made.extend(apply(part)?);
    }
    Ok(made)
}

impl Set {
    fn apply(
        &mut self,
        change: &mut Change,
        columns: &mut ByTable<(), Arc<Columns>>,
    ) -> Result<()> {
        if change.key_row().is_none() || !self.scope.covers(change)? {
            return Ok(());
        }
        let columns = columns_of(columns, change)?;
        let view = View::new(change, &columns);
        let places: Vec<Option<usize>> =
            self.columns.iter().map(|(name, _)| view.position(name)).collect();
        let added = self.columns.iter().zip(&places).filter(|(_, place)| place.is_none());
        let added: Vec<String> = added.map(|((name, _), _)| name.clone()).collect();
        let record = self.row(&view, Side::Record, &places)?;
        let before = match (&change.after, change.before.row()) {
            (Some(_), Some(_)) => Some(self.row(&view, Side::Before, &places)?),
            _ => None,
        };
        self.layouts.apply(change, &columns, &Edit { added, record, before })
    }

    /// The computed columns of one row. Of an old row that is not whole only the columns that it
    /// carries are computed.
    fn row(&self, view: &View<'_>, side: Side, places: &[Option<usize>]) -> Result<RowEdit> {
        let mut edit = RowEdit::same(view.width(), 0);
        let old = side == Side::Before || view.change().after.is_none();
        let partial = old && matches!(view.change().before, Before::Key(_));
        for ((_, expression), place) in self.columns.iter().zip(places) {
            let wanted = !partial || place.is_some_and(|index| view.is_identity(index));
            let value = if wanted { Some(expression.json(view, side)?) } else { None };
            match place.and_then(|index| edit.cells.get_mut(index)) {
                Some(cell) => *cell = value.map_or(Cell::Same, Cell::New),
                None => edit.added.push(value),
            }
        }
        Ok(edit)
    }
}

impl Explode {
    fn apply(
        &mut self,
        change: Change,
        columns: &mut ByTable<(), Arc<Columns>>,
    ) -> Result<Vec<Change>> {
        if change.key_row().is_none() || !self.scope.covers(&change)? {
            return Ok(vec![change]);
        }
        let columns = columns_of(columns, &change)?;
        let view = View::new(&change, &columns);
        let elements = match self.list.json(&view, Side::Record)? {
            Json::Null => Vec::new(),
            Json::Array(elements) => elements,
            _ => {
                let rule = self.list.rule();
                return Err(Error::data(format!("{rule} gives no list")));
            }
        };
        let place = view.position(&self.column);
        let added = if place.is_some() { Vec::new() } else { vec![self.column.clone()] };
        let two_rows = change.after.is_some() && change.before.row().is_some();
        let before = two_rows.then(|| RowEdit::same(view.width(), added.len()));
        let mut parts = Vec::with_capacity(elements.len());
        for element in elements {
            let mut record = RowEdit::same(view.width(), 0);
            match place.and_then(|index| record.cells.get_mut(index)) {
                Some(cell) => *cell = Cell::New(element),
                None => record.added.push(Some(element)),
            }
            let mut part = change.clone();
            let edit = Edit { added: added.clone(), record, before: before.clone() };
            self.layouts.apply(&mut part, &columns, &edit)?;
            parts.push(part);
        }
        Ok(parts)
    }
}
