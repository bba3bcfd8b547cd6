//! Columns that a step names and a table does not have. One step may serve many tables, so that is
//! no error; but a mask with a slip of the pen hides nothing, and somebody should know.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use crate::{
    config::{glob_matches, nearest},
    schema::{Column, Table},
};

/// Tables that are remembered for each name at most.
const TABLES_MAX: usize = 4096;

/// A name of a step that fits no column.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unmatched {
    /// The rule, such as `transform[0].mask`.
    pub rule: String,
    /// The name, or a glob.
    pub column: String,
    /// Whether values come through that somebody wanted to hide or to take away: the name is
    /// written in full, in a `mask` or a `drop`. A glob may be there for columns to come.
    pub bares: bool,
    /// Tables that the step applies to and that do not have it.
    pub tables: Vec<String>,
    /// A table, and its column that was probably meant.
    pub near: Option<(String, String)>,
}

/// Tables that are named at most.
const SHOWN_MAX: usize = 5;

impl fmt::Display for Unmatched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rule, column, tables, near, .. } = self;
        write!(f, "{rule} names the column `{column}`, ")?;
        match tables.as_slice() {
            [] => return write!(f, "but applies to no table"),
            [table] => write!(f, "which {table} does not have")?,
            tables => {
                let shown = tables.get(..SHOWN_MAX).unwrap_or(tables);
                write!(f, "which none of its tables has ({}", shown.join(", "))?;
                match tables.len() - shown.len() {
                    0 => write!(f, ")")?,
                    more => write!(f, " and {more} more)")?,
                }
            }
        }
        match near {
            Some((table, column)) if tables.len() > 1 => write!(f, "; {table} has `{column}`"),
            Some((_, column)) => write!(f, "; it has `{column}`"),
            None => Ok(()),
        }
    }
}

/// A name of a step, and the tables that it met.
#[derive(Debug)]
pub(super) struct Name {
    rule: String,
    column: String,
    /// Written in full, not as a glob.
    exact: bool,
    bares: bool,
    /// Tables that had a column of the name.
    had: BTreeSet<String>,
    /// Tables that had none, with the nearest of their columns.
    lacked: BTreeMap<String, Option<String>>,
    /// Some table may have one that nobody knows of.
    doubtful: bool,
}

impl Name {
    /// The name `column` of a rule; `takes_away`: the rule hides what it names, or drops it.
    pub(super) fn new(rule: String, column: &str, takes_away: bool) -> Self {
        let exact = !column.contains(['*', '?']);
        let column = column.to_owned();
        let bares = takes_away && exact;
        let (had, lacked) = (BTreeSet::new(), BTreeMap::new());
        Self { rule, column, exact, bares, had, lacked, doubtful: false }
    }

    /// Looks for the name among the columns of a table; what is to be told of one in full, once for
    /// each table: no table so far has it, or this one had it before. With `wavers` the columns of
    /// a table differ from change to change, and only the first counts.
    pub(super) fn meet<'a>(
        &mut self,
        table: &Table,
        columns: impl Iterator<Item = &'a Column> + Clone,
        wavers: bool,
    ) -> Option<Unmatched> {
        let table = table.full_name();
        if columns.clone().any(|column| glob_matches(&self.column, &column.name)) {
            self.had.insert(table);
            return None;
        }
        if self.lacked.contains_key(&table) || self.lacked.len() >= TABLES_MAX {
            return None;
        }
        let names = columns.map(|column| column.name.as_str());
        let near = nearest(&self.column, names, (self.column.chars().count() / 3).max(1));
        self.lacked.insert(table.clone(), near.map(str::to_owned));
        let lost = !wavers && self.had.contains(&table);
        (self.exact && (self.had.is_empty() || lost)).then(|| self.of(&[&table]))
    }

    /// Takes it that some table may have it.
    pub(super) fn doubt(&mut self) {
        self.doubtful = true;
    }

    /// What is to be told of a name that none of the tables has which it met, if any.
    pub(super) fn unmatched(&self) -> Option<Unmatched> {
        let tables: Vec<&String> = self.lacked.keys().collect();
        (self.had.is_empty() && !self.doubtful).then(|| self.of(&tables))
    }

    /// Whether values come through that it was to hide or take away: none of its tables had it.
    pub(super) fn bares(&self) -> bool {
        self.bares && self.had.is_empty() && !self.lacked.is_empty()
    }

    fn of(&self, tables: &[&String]) -> Unmatched {
        let near = tables.iter().find_map(|&table| {
            let column = self.lacked.get(table)?.clone()?;
            Some((table.clone(), column))
        });
        Unmatched {
            rule: self.rule.clone(),
            column: self.column.clone(),
            bares: self.bares,
            tables: tables.iter().map(|&table| table.clone()).collect(),
            near,
        }
    }
}
