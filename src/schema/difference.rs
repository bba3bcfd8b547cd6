//! What differs between two versions of a table.

use std::fmt;

use serde::Serialize;
use sha2::{Digest, Sha256};

use super::{Column, Identity, Table};

/// One thing in which the later of two versions differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "what", rename_all = "snake_case")]
pub enum Difference {
    /// A column is there that was not.
    Added {
        /// Its name.
        column: String,
        /// Its type, as SQL has it.
        r#type: String,
        /// Whether it may be NULL; `None` where that is not known.
        nullable: Option<bool>,
        /// The dropped column that it may have been: of the same type, at the same place. The
        /// stream tells a rename and a drop with an add in the same words.
        #[serde(skip_serializing_if = "Option::is_none")]
        maybe_was: Option<String>,
    },
    /// A column is gone.
    Dropped {
        /// Its name.
        column: String,
        /// Its type, as SQL has it.
        r#type: String,
        /// Whether it might be NULL; `None` where that is not known.
        nullable: Option<bool>,
    },
    /// A column has another type.
    Retyped {
        /// Its name.
        column: String,
        /// The type before.
        from: String,
        /// The type after.
        to: String,
    },
    /// A column may be NULL that might not, or the other way round.
    Nullable {
        /// Its name.
        column: String,
        /// Whether it may be now.
        nullable: bool,
    },
    /// Rows are told apart by other columns.
    Key {
        /// The columns before; empty: the whole row.
        from: Vec<String>,
        /// The columns after.
        to: Vec<String>,
    },
    /// Updates and deletes carry other columns of the old row.
    Identity {
        /// The replica identity before.
        from: Identity,
        /// The replica identity after.
        to: Identity,
    },
    /// It is another table of the same name.
    Recreated,
}

/// What `after` differs in from `before`; empty where both are the same version. What is not known
/// of one of them is no difference: the stream does not tell nullability, and the catalog of a
/// later moment may not know the column any more.
pub fn differences(before: &Table, after: &Table) -> Vec<Difference> {
    let mut found = Vec::new();
    if before.oid != after.oid {
        found.push(Difference::Recreated);
    }
    let gone: Vec<(usize, &Column)> = missing(before, after);
    let come: Vec<(usize, &Column)> = missing(after, before);
    for (_, column) in &gone {
        let (column, r#type) = (column.name.clone(), column.ty.sql());
        let nullable = before.column(&column).and_then(|column| column.nullable);
        found.push(Difference::Dropped { column, r#type, nullable });
    }
    for (place, column) in &come {
        let was = |(at, gone): &&(usize, &Column)| at == place && gone.ty == column.ty;
        found.push(Difference::Added {
            column: column.name.clone(),
            r#type: column.ty.sql(),
            nullable: column.nullable,
            maybe_was: gone.iter().find(was).map(|(_, column)| column.name.clone()),
        });
    }
    for old in &before.columns {
        if let Some(new) = after.column(&old.name) {
            of_column(old, new, &mut found);
        }
    }
    let keys = (before.key_names(), after.key_names());
    if keys.0 != keys.1 {
        found.push(Difference::Key { from: keys.0, to: keys.1 });
    }
    if before.identity != after.identity {
        found.push(Difference::Identity { from: before.identity, to: after.identity });
    }
    found
}

/// The columns of `table` that `other` does not have, with their places.
fn missing<'a>(table: &'a Table, other: &Table) -> Vec<(usize, &'a Column)> {
    let columns = table.columns.iter().enumerate();
    columns.filter(|(_, column)| other.column(&column.name).is_none()).collect()
}

fn of_column(old: &Column, new: &Column, found: &mut Vec<Difference>) {
    let column = || old.name.clone();
    // A type that was dropped when it was asked for has no name and no structure.
    let unknown = old.ty.name.is_empty() || new.ty.name.is_empty();
    if old.ty != new.ty && !(unknown && old.ty.oid == new.ty.oid) {
        let (mut from, mut to) = (old.ty.sql(), new.ty.sql());
        if from == to {
            // the same name for another type, or for one of another structure
            (from, to) = (format!("{from} as it was"), format!("{to} as it is"));
        }
        found.push(Difference::Retyped { column: column(), from, to });
    }
    if let (Some(before), Some(nullable)) = (old.nullable, new.nullable)
        && before != nullable
    {
        found.push(Difference::Nullable { column: column(), nullable });
    }
}

impl Table {
    /// The column of this name.
    pub fn column(&self, name: &str) -> Option<&Column> {
        self.columns.iter().find(|column| column.name == name)
    }

    /// A digest of what readers see: the columns with their types, nullability and key. Equal for
    /// descriptors of which a reader would not notice that they are two.
    pub fn digest(&self) -> String {
        let mut hash = Sha256::new();
        for column in &self.columns {
            let null = if column.nullable == Some(false) { "not null" } else { "" };
            let line = format!("{}\0{}\0{null}\n", column.name, column.ty.sql());
            hash.update(line);
        }
        hash.update(self.key_names().join("\0"));
        hash.finalize().iter().fold(String::new(), |text, byte| format!("{text}{byte:02x}"))
    }

    /// The names of the columns of the key; empty: the whole row is one.
    pub fn key_names(&self) -> Vec<String> {
        let columns = self.key_columns().into_iter().filter_map(|index| self.columns.get(index));
        columns.map(|column| column.name.clone()).collect()
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let null = |nullable: &Option<bool>| match nullable {
            Some(false) => " not null",
            _ => "",
        };
        match self {
            Difference::Added { column, r#type, nullable, maybe_was } => {
                write!(f, "added {column} {type}{}", null(nullable))?;
                match maybe_was {
                    Some(was) => write!(f, " (may be {was} under a new name)"),
                    None => Ok(()),
                }
            }
            Difference::Dropped { column, r#type, .. } => write!(f, "dropped {column} {type}"),
            Difference::Retyped { column, from, to } => {
                write!(f, "retyped {column}: {from} to {to}")
            }
            Difference::Nullable { column, nullable: true } => write!(f, "{column} may be null"),
            Difference::Nullable { column, .. } => write!(f, "{column} is never null"),
            Difference::Key { from, to } => write!(f, "key: {} to {}", key(from), key(to)),
            Difference::Identity { from, to } => {
                write!(f, "replica identity: {} to {}", from.word(), to.word())
            }
            Difference::Recreated => f.write_str("another table of the same name"),
        }
    }
}

fn key(columns: &[String]) -> String {
    if columns.is_empty() { "the whole row".to_owned() } else { columns.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::{Type, TypeKind};

    fn column(name: &str, ty: &str, nullable: Option<bool>) -> Column {
        let oid = if ty == "integer" { 23 } else { 25 };
        let ty = Type { oid, modifier: -1, name: ty.into(), kind: TypeKind::Base };
        let key = name == "id";
        Column { name: name.into(), ty, primary_key: key, identity: key, nullable }
    }

    fn table(columns: Vec<Column>) -> Table {
        let (schema, name) = ("public".into(), "t".into());
        Table { oid: 1, schema, name, identity: Identity::Default, columns }
    }

    fn told(before: Vec<Column>, after: Vec<Column>) -> Vec<String> {
        let found = differences(&table(before), &table(after));
        found.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_rename_looks_like_a_drop_and_an_add_and_is_said_to_be_possible() {
        let told = told(
            vec![column("id", "integer", Some(false)), column("a", "text", Some(true))],
            vec![column("id", "integer", Some(false)), column("b", "text", Some(true))],
        );
        assert_eq!(told, ["dropped a text", "added b text (may be a under a new name)"]);
    }

    #[test]
    fn types_keys_and_nullability_are_compared_where_they_are_known() {
        let told = told(
            vec![column("id", "integer", Some(false)), column("a", "text", None)],
            vec![column("no", "integer", None), column("a", "integer", Some(true))],
        );
        assert_eq!(
            told,
            [
                "dropped id integer",
                "added no integer (may be id under a new name)",
                "retyped a: text to integer",
                "key: id to the whole row"
            ]
        );
        let same = || vec![column("id", "integer", Some(false)), column("a", "text", None)];
        assert!(differences(&table(same()), &table(same())).is_empty());
    }
}
