//! A TOML document as a tree in which each value knows where it was written.

use std::{collections::BTreeMap, fmt, ops::Range, sync::Arc};

use toml::{
    Spanned,
    de::{DeInteger, DeTable, DeValue},
};

use crate::error::{Error, Result};

/// Where a value was written.
#[derive(Clone, Debug)]
pub(super) enum Place {
    /// In a file; line and column count from 1, in characters.
    File { origin: Arc<str>, line: usize, column: usize },
    /// In an environment variable.
    Variable(String),
    /// Somewhere in a file.
    Whole(Arc<str>),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::File { origin, line, column } => write!(f, "{origin}:{line}:{column}"),
            Place::Variable(name) => write!(f, "environment variable {name}"),
            Place::Whole(origin) => f.write_str(origin),
        }
    }
}

impl Place {
    /// An error of the configuration at this place.
    pub(super) fn error(&self, what: &str) -> Error {
        Error::config(format!("{self}: {what}"))
    }
}

/// A value and where it was written.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) place: Place,
    pub(super) content: Content,
}

/// A value as written.
#[derive(Clone, Debug)]
pub(super) enum Content {
    /// A text in the file, in which `${...}` is still to be replaced.
    Text(String),
    /// A text from outside the file: never shown, and read as whatever type is wanted.
    Foreign(String),
    Integer(i64),
    Boolean(bool),
    List(Vec<Node>),
    Table(Table),
    /// A float, or an integer beyond 64 bits: no key wants one.
    Other(&'static str),
}

/// Keys with where each was written, and their values.
pub(super) type Table = BTreeMap<String, (Place, Node)>;

impl Content {
    /// What it is, for "wants X, not ...".
    pub(super) fn noun(&self) -> &'static str {
        match self {
            Content::Text(_) | Content::Foreign(_) => "a text",
            Content::Integer(_) => "a number",
            Content::Boolean(_) => "true or false",
            Content::List(_) => "a list",
            Content::Table(_) => "a table",
            Content::Other(noun) => noun,
        }
    }
}

/// Where each key path was written, for checks that span several keys.
pub(super) struct Places {
    whole: Place,
    by_path: BTreeMap<String, Place>,
}

impl Places {
    pub(super) fn new(origin: &str) -> Self {
        Self { whole: Place::Whole(origin.into()), by_path: BTreeMap::new() }
    }

    pub(super) fn insert(&mut self, path: &str, place: Place) {
        self.by_path.insert(path.to_owned(), place);
    }

    pub(super) fn has(&self, path: &str) -> bool {
        self.by_path.contains_key(path)
    }

    /// An error at `path`, or at the nearest table around it that was written.
    pub(super) fn error(&self, path: &str, what: &str) -> Error {
        let mut path = path;
        loop {
            if let Some(place) = self.by_path.get(path) {
                return place.error(what);
            }
            match path.rsplit_once('.') {
                Some((around, _)) => path = around,
                None => return self.whole.error(what),
            }
        }
    }
}

/// Parses TOML; `origin` names the file in places.
pub(super) fn parse(text: &str, origin: &str) -> Result<Table> {
    let lines = Lines::new(text, origin);
    match DeTable::parse(text) {
        Ok(table) => Ok(lines.table(table.into_inner())),
        Err(error) => {
            let place = error.span().map_or(Place::Whole(origin.into()), |s| lines.place(&s));
            Err(place.error(error.message().lines().next().unwrap_or("not TOML")))
        }
    }
}

/// Turns byte offsets into places.
struct Lines<'a> {
    text: &'a str,
    origin: Arc<str>,
    starts: Vec<usize>,
}

impl<'a> Lines<'a> {
    fn new(text: &'a str, origin: &str) -> Self {
        let after_breaks = text.match_indices('\n').map(|(at, _)| at + 1);
        Self {
            text,
            origin: origin.into(),
            starts: std::iter::once(0).chain(after_breaks).collect(),
        }
    }

    fn place(&self, span: &Range<usize>) -> Place {
        let line = self.starts.partition_point(|start| *start <= span.start);
        let start = line.checked_sub(1).and_then(|at| self.starts.get(at)).copied().unwrap_or(0);
        let before = self.text.get(start..span.start).unwrap_or_default();
        Place::File { origin: Arc::clone(&self.origin), line, column: before.chars().count() + 1 }
    }

    fn table(&self, table: DeTable<'_>) -> Table {
        let entry = |(key, value): (Spanned<std::borrow::Cow<'_, str>>, Spanned<DeValue<'_>>)| {
            let place = self.place(&key.span());
            (key.into_inner().into_owned(), (place, self.node(value)))
        };
        table.into_iter().map(entry).collect()
    }

    fn node(&self, value: Spanned<DeValue<'_>>) -> Node {
        let place = self.place(&value.span());
        let content = match value.into_inner() {
            DeValue::String(text) => Content::Text(text.into_owned()),
            DeValue::Integer(number) => integer(&number),
            DeValue::Float(_) => Content::Other("a number with a fraction"),
            DeValue::Boolean(boolean) => Content::Boolean(boolean),
            DeValue::Datetime(time) => Content::Text(time.to_string()),
            DeValue::Array(items) => {
                Content::List(items.into_iter().map(|item| self.node(item)).collect())
            }
            DeValue::Table(table) => Content::Table(self.table(table)),
        };
        Node { place, content }
    }
}

fn integer(number: &DeInteger<'_>) -> Content {
    i64::from_str_radix(number.as_str(), number.radix())
        .map_or(Content::Other("a number beyond 64 bits"), Content::Integer)
}
