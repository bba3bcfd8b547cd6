//! Where the document of a change is: its index and its id.

use crate::{
    change::{Before, Change, Op, Row, Value},
    config::Opensearch,
    error::{Error, Result},
    format::{Names, Template},
    schema::Table,
};

/// The longest id that a server takes, in bytes.
const ID_BYTES_MAX: usize = 512;
/// The longest name of an index, in bytes.
const INDEX_BYTES_MAX: usize = 255;
/// Types whose text needs no escape between the dashes of an id: whole numbers, oid and uuid.
const PLAIN_TYPES: [u32; 5] = [20, 21, 23, 26, 2950];

const IDENTITY: &str =
    "ALTER TABLE … REPLICA IDENTITY FULL makes PostgreSQL send the whole old row";

/// Where one document is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) index: String,
    pub(super) id: String,
}

/// What fills in indexes and ids.
#[derive(Debug)]
pub(super) struct Places {
    template: Template,
    names: Names,
}

impl Places {
    pub(super) fn new(options: &Opensearch, names: &Names) -> Result<Self> {
        Ok(Self { template: options.index.parse()?, names: names.clone() })
    }

    /// Where the row is after the change.
    pub(super) fn new_of(&self, change: &Change) -> Result<Place> {
        Ok(Place { index: self.index(change)?, id: id(change)? })
    }

    /// Where the row was before the change, as far as the old row tells; `None`: where it is now.
    pub(super) fn old_of(&self, change: &Change) -> Result<Option<Place>> {
        if !knows_key(change) {
            return Ok(None);
        }
        let old = Change { after: None, op: Op::Delete, ..change.clone() };
        self.removed_of(&old).map(Some)
    }

    /// Where the row of a delete was.
    pub(super) fn removed_of(&self, change: &Change) -> Result<Place> {
        self.new_of(change).map_err(|error| match error.remedy_text() {
            None => error.remedy(IDENTITY),
            Some(_) => error,
        })
    }

    /// The index of a change: what the sink's rules chose, else the template, in lower case.
    pub(super) fn index(&self, change: &Change) -> Result<String> {
        let name = match change.route() {
            Some(route) => route.to_lowercase(),
            None => self.template.render(change, &self.names)?.to_lowercase(),
        };
        if is_index(&name) {
            return Ok(name);
        }
        Err(Error::data(format!("`{name}` cannot be the name of an index")).remedy(
            "it has at most 255 bytes, begins with none of - _ + and has no blank nor any of \
             \\ / * ? \" < > | , # :",
        ))
    }
}

fn is_index(name: &str) -> bool {
    let forbidden = |c: char| c.is_whitespace() || "\\/*?\"<>|,#:".contains(c);
    !name.is_empty()
        && name.len() <= INDEX_BYTES_MAX
        && !name.starts_with(['-', '_', '+'])
        && !matches!(name, "." | "..")
        && !name.contains(forbidden)
}

/// Whether the old row of an update has every column of the key.
fn knows_key(change: &Change) -> bool {
    let Some(table) = &change.table else { return false };
    let key = table.key_columns();
    match &change.before {
        Before::Nothing => false,
        Before::Full(_) => !key.is_empty(),
        Before::Key(_) => !key.is_empty() && key.iter().all(|&index| is_identity(table, index)),
    }
}

fn is_identity(table: &Table, index: usize) -> bool {
    table.columns.get(index).is_some_and(|column| column.identity)
}

/// The key's values joined by dashes. A row without a key is a document of its own, which nobody
/// can find again.
fn id(change: &Change) -> Result<String> {
    let id = match (change.shaped.as_ref().and_then(|shaped| shaped.key.clone()), &change.table) {
        (Some(key), _) => key,
        (None, None) => change.idempotency_key(),
        (None, Some(table)) => key_id(change, table)?,
    };
    if id.is_empty() || id.len() > ID_BYTES_MAX {
        let bytes = id.len();
        return Err(Error::data(format!("a key of {bytes} bytes cannot be the id of a document"))
            .remedy("an id has 1 to 512 bytes"));
    }
    Ok(id)
}

fn key_id(change: &Change, table: &Table) -> Result<String> {
    let columns = table.key_columns();
    if columns.is_empty() {
        return match change.op {
            Op::Insert | Op::Read => Ok(change.idempotency_key()),
            _ => Err(Error::data(format!(
                "{table} has no key, so nobody can say which document an {} is about",
                change.op.word()
            ))
            .remedy(format!("give {table} a primary key, or leave its updates and deletes out"))),
        };
    }
    let row = change.key_row().ok_or_else(|| Error::data("the change has no row"))?;
    let mut id = String::new();
    for (count, &index) in columns.iter().enumerate() {
        if count > 0 {
            id.push('-');
        }
        let text = key_value(change, (table, row), index)?;
        let ty = table.columns.get(index).map_or(0, |column| column.ty.oid);
        if columns.len() == 1 || PLAIN_TYPES.contains(&ty) {
            id.push_str(text);
        } else {
            // Else ("a-b", "c") and ("a", "b-c") were one document.
            id.push_str(&text.replace('%', "%25").replace('-', "%2D"));
        }
    }
    Ok(id)
}

fn key_value<'a>(
    change: &'a Change,
    (table, row): (&Table, &'a Row),
    index: usize,
) -> Result<&'a str> {
    let mut value = row.value(index);
    if value == Some(Value::Unchanged) {
        value = change.before.row().and_then(|row| row.value(index));
    }
    let partial = change.after.is_none() && matches!(change.before, Before::Key(_));
    let lost = partial && !is_identity(table, index);
    let name = table.columns.get(index).map_or("", |column| column.name.as_str());
    match value {
        Some(Value::Text(text)) if !lost => std::str::from_utf8(text)
            .map_err(|_| Error::data(format!("the key {name} of {table} is not UTF-8"))),
        _ => Err(Error::data(format!("the change does not carry the key {name} of {table}"))),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        error::Class,
        schema::{Column, Identity, Type},
        sink::testing::batch,
    };

    fn places(index: &str) -> Places {
        Places { template: index.parse().unwrap(), names: Names::default() }
    }

    fn keyed(types: [u32; 2], values: [&str; 2]) -> Change {
        let mut change = batch(1..2).changes.remove(0);
        let column = |(name, oid): (&str, u32)| Column {
            name: name.into(),
            ty: Type::base(oid, -1),
            primary_key: true,
            identity: true,
            nullable: None,
        };
        change.table = Some(Arc::new(Table {
            oid: 1,
            schema: "Public".into(),
            name: "Lines".into(),
            identity: Identity::Default,
            columns: [("a", types[0]), ("b", types[1])].into_iter().map(column).collect(),
        }));
        change.after = Some(Row::from_values(values.map(|text| Value::Text(text.as_bytes()))));
        change
    }

    #[test]
    fn keys_that_differ_have_ids_that_differ() {
        let id = |types, values| places("x").new_of(&keyed(types, values)).unwrap().id;
        assert_eq!(id([23, 20], ["7", "-2"]), "7--2");
        assert_eq!(id([25, 25], ["a", "b"]), "a-b");
        assert_ne!(id([25, 25], ["a-b", "c"]), id([25, 25], ["a", "b-c"]));
        assert_eq!(id([25, 25], ["a%2Db", "c"]), "a%252Db-c");
    }

    #[test]
    fn an_index_is_in_lower_case_and_a_name_that_no_server_takes_is_refused() {
        let change = keyed([23, 23], ["1", "2"]);
        assert_eq!(places("{schema}.{table}").new_of(&change).unwrap().index, "public.lines");
        for bad in ["_{table}", "a b", "a,{table}", "a*", ".."] {
            let error = places(bad).new_of(&change).unwrap_err();
            assert_eq!(error.class(), Class::Data, "{bad}: {error}");
        }
    }

    #[test]
    fn a_row_without_a_key_can_only_be_added() {
        let mut change = keyed([23, 23], ["1", "2"]);
        let mut table = (**change.table.as_ref().unwrap()).clone();
        table.identity = Identity::Full;
        table.columns.iter_mut().for_each(|column| column.primary_key = false);
        change.table = Some(Arc::new(table));
        assert_eq!(places("x").new_of(&change).unwrap().id, change.idempotency_key());
        change.before = Before::Full(change.after.take().unwrap());
        change.op = Op::Delete;
        let error = places("x").removed_of(&change).unwrap_err();
        assert_eq!(error.class(), Class::Data);
        assert!(error.to_string().contains("Public.Lines has no key"), "{error}");
    }
}
