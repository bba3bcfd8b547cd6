//! Environment variables that set keys: `WALRACE_` and the key's path, in capitals, joined by `_`;
//! `DATABASE_URL` and `TABLES_FILTER` for the simple case.

use std::collections::BTreeMap;

use super::{
    document::{Content, Node, Place, Table},
    read::nearest,
    shape::{Field, Record, Shape},
};
use crate::error::{Error, Result};

const PREFIX: &str = "WALRACE_";
/// The source that `DATABASE_URL` makes.
const SOURCE: &str = "app";

/// The environment variables of a process, or of a test.
#[derive(Clone, Debug, Default)]
pub struct Environment(BTreeMap<String, String>);

impl Environment {
    /// Those of this process; names and values that are not UTF-8 are left out.
    pub fn process() -> Self {
        let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        };
        Self(std::env::vars_os().filter_map(text).collect())
    }

    /// These, and no others.
    pub fn of<N: Into<String>, V: Into<String>>(
        variables: impl IntoIterator<Item = (N, V)>,
    ) -> Self {
        Self(variables.into_iter().map(|(name, value)| (name.into(), value.into())).collect())
    }

    /// The value of one.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// Whether it describes a source or `[cdc]` by itself, so that no file is needed.
    pub(super) fn stands_alone(&self) -> bool {
        let ours = |name: &String| {
            let key = name.strip_prefix(PREFIX).unwrap_or_default();
            key.starts_with("SOURCE_") && key.ends_with("_URL")
        };
        self.0.contains_key("DATABASE_URL") || self.0.keys().any(ours)
    }
}

/// Sets in `document` what the environment says.
pub(super) fn apply(document: &mut Table, shape: &Record, environment: &Environment) -> Result<()> {
    for (name, value) in &environment.0 {
        let Some(key) = name.strip_prefix(PREFIX).filter(|key| *key != "CONFIG") else { continue };
        match find(shape, Some(document), key) {
            Some(path) => set(document, &path, name, value)?,
            None => refuse_typo(shape, document, name, key)?,
        }
    }
    if let Some(url) = environment.get("DATABASE_URL").filter(|_| sources(document).is_empty()) {
        let path = |key: &str| ["source", SOURCE, key].map(str::to_owned);
        set(document, &path("kind"), "DATABASE_URL", "postgres")?;
        set(document, &path("url"), "DATABASE_URL", url)?;
    }
    if let Some(filter) = environment.get("TABLES_FILTER") {
        let names = sources(document);
        if let [only] = names.as_slice() {
            let path = ["source".into(), only.clone(), "tables".into()];
            set(document, &path, "TABLES_FILTER", filter)?;
        } else if !names.is_empty() {
            let what = "`TABLES_FILTER` is set, but there are several sources";
            let first = names.first().map_or("", String::as_str);
            return Err(Error::config(what)
                .remedy(format!("set {} instead", variable(&["source", first, "tables"]))));
        }
    }
    Ok(())
}

/// The variable that sets the key of this path.
pub(super) fn variable(path: &[&str]) -> String {
    path.iter().fold("WALRACE".to_owned(), |name, part| name + "_" + &capitals(part))
}

fn capitals(name: &str) -> String {
    name.to_uppercase().replace(['-', '.'], "_")
}

fn sources(document: &Table) -> Vec<String> {
    match document.get("source") {
        Some((_, Node { content: Content::Table(sources), .. })) => {
            sources.keys().cloned().collect()
        }
        _ => Vec::new(),
    }
}

/// The path of the key that `key` (`HTTP_LISTEN`) names. Names that the document has win over new
/// ones, longer over shorter.
fn find(record: &Record, table: Option<&Table>, key: &str) -> Option<Vec<String>> {
    if !record.kinds.is_empty() && key == "KIND" {
        return Some(vec!["kind".into()]);
    }
    record.all_fields().find_map(|field| {
        let rest = key.strip_prefix(&capitals(&field.name))?;
        let inside = table.and_then(|table| subtable(table, &field.name));
        let path = match (&field.shape, rest.strip_prefix('_')) {
            (Shape::Record(record), Some(rest)) => find(record, inside, rest),
            (Shape::Map(shape), Some(rest)) => match shape.as_ref() {
                Shape::Record(record) => find_named(record, inside, rest),
                _ => None,
            },
            (Shape::Record(_), None) => None,
            _ => rest.is_empty().then(Vec::new),
        }?;
        Some(std::iter::once(field.name.clone()).chain(path).collect())
    })
}

/// The path of a key of a named table: `LAKE_PATH` is `lake.path`.
fn find_named(record: &Record, tables: Option<&Table>, key: &str) -> Option<Vec<String>> {
    let mut names: Vec<&String> = tables.into_iter().flat_map(Table::keys).collect();
    names.sort_by_key(|name| std::cmp::Reverse(name.len()));
    let known = names.into_iter().find_map(|name| {
        let rest = key.strip_prefix(&capitals(name))?.strip_prefix('_')?;
        let path = find(record, tables.and_then(|tables| subtable(tables, name)), rest)?;
        Some(std::iter::once(name.clone()).chain(path).collect())
    });
    known.or_else(|| {
        let fields = record.all_fields().map(|field| field.name.as_str()).chain(["kind"]);
        let (name, field) = fields
            .filter_map(|field| {
                let name = key.strip_suffix(&capitals(field))?.strip_suffix('_')?;
                (!name.is_empty()).then_some((name, field))
            })
            .min_by_key(|(name, _)| name.len())?;
        Some(vec![name.to_lowercase(), field.to_owned()])
    })
}

fn subtable<'a>(table: &'a Table, name: &str) -> Option<&'a Table> {
    match table.get(name) {
        Some((_, Node { content: Content::Table(table), .. })) => Some(table),
        _ => None,
    }
}

fn set(table: &mut Table, path: &[String], variable: &str, value: &str) -> Result<()> {
    let place = Place::Variable(variable.to_owned());
    let Some((key, rest)) = path.split_first() else { return Ok(()) };
    if rest.is_empty() {
        let node = Node { place: place.clone(), content: Content::Foreign(value.to_owned()) };
        table.insert(key.clone(), (place, node));
        return Ok(());
    }
    let empty = || Node { place: place.clone(), content: Content::Table(Table::new()) };
    let (written, node) = table.entry(key.clone()).or_insert_with(|| (place.clone(), empty()));
    match &mut node.content {
        Content::Table(table) => set(table, rest, variable, value),
        other => Err(written.error(&format!("`{key}` wants a table, not {}", other.noun()))),
    }
}

/// Other programs may use the prefix too (an orchestrator sets `WALRACE_PORT` for a service of that
/// name), so only what is nearly a setting is refused.
fn refuse_typo(shape: &Record, document: &Table, name: &str, key: &str) -> Result<()> {
    let mut known = Vec::new();
    list(&mut known, shape, Some(document), "");
    let Some(right) = nearest(key, known.iter().map(String::as_str), 2) else { return Ok(()) };
    Err(Error::config(format!("environment variable {name} sets nothing"))
        .remedy(format!("did you mean {PREFIX}{right}?")))
}

fn list(known: &mut Vec<String>, record: &Record, table: Option<&Table>, prefix: &str) {
    let fields: Vec<&Field> = record.all_fields().collect();
    for field in fields {
        let name = format!("{prefix}{}", capitals(&field.name));
        let inside = table.and_then(|table| subtable(table, &field.name));
        match &field.shape {
            Shape::Record(record) => list(known, record, inside, &format!("{name}_")),
            Shape::Map(shape) => {
                let Shape::Record(record) = shape.as_ref() else { continue };
                for key in inside.into_iter().flat_map(Table::keys) {
                    list(known, record, None, &format!("{name}_{}_", capitals(key)));
                }
            }
            _ => known.push(name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, document, shape};

    fn path(document: &str, key: &str) -> Option<String> {
        let table = document::parse(document, "t").unwrap();
        find(&shape::record_of::<Config>(), Some(&table), key).map(|path| path.join("."))
    }

    #[test]
    fn a_name_finds_its_key() {
        let file = "[sink.lake]\n[sink.lake-url]\n[source.my-app]\n";
        let check = |key: &str, want: &str| {
            assert_eq!(path(file, key).as_deref(), Some(want), "{key}");
        };
        check("DATA_DIR", "data_dir");
        check("HTTP_LISTEN", "http.listen");
        check("CDC_BATCH_SIZE", "cdc.batch_size");
        check("SINK_LAKE_PATH", "sink.lake.path");
        check("SINK_LAKE_URL_URL", "sink.lake-url.url");
        check("SOURCE_MY_APP_URL", "source.my-app.url");
        check("SOURCE_OTHER_ONE_WAL_RETAINED_BYTES_MAX", "source.other_one.wal_retained_bytes_max");
        check("SINK_NEW_KIND", "sink.new.kind");
        assert_eq!(path(file, "PORT_7376_TCP"), None);
        assert_eq!(path(file, "HTTP"), None);
        assert_eq!(path(file, "SINK_LAKE"), None);
    }
}
