//! Tables as a change sees them: columns, types, keys and versions; what differs between two
//! versions, and whom that breaks. No I/O.

mod compatibility;
mod contract;
mod difference;

use std::fmt;

use serde::{Deserialize, Serialize};

pub use self::{
    compatibility::{Mode, breaks},
    contract::{Unmet, unmet},
    difference::{Difference, differences},
};

/// One version of a table's descriptor, as it was when the changes that carry it were made.
///
/// It is stored in the journal as JSON before its first use, so every field added later needs a
/// serde default.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Table {
    /// The oid of `pg_class`; a table that was dropped and created again has a new one.
    pub oid: u32,
    /// The schema's name, unquoted.
    pub schema: String,
    /// The table's name, unquoted.
    pub name: String,
    /// Which columns of the old row an update or delete carries.
    pub identity: Identity,
    /// The columns in the order of the tuple.
    pub columns: Vec<Column>,
}

/// `REPLICA IDENTITY` of a table
/// (<https://www.postgresql.org/docs/current/sql-altertable.html>).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Identity {
    /// The primary key, if there is one.
    Default,
    /// No column: updates and deletes cannot be published.
    Nothing,
    /// Every column.
    Full,
    /// The columns of a unique index.
    Index,
}

/// One column of a [`Table`].
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Column {
    /// The column's name, unquoted.
    pub name: String,
    /// Its type.
    #[serde(rename = "type")]
    pub ty: Type,
    /// Part of the primary key.
    #[serde(default)]
    pub primary_key: bool,
    /// Part of the replica identity.
    #[serde(default)]
    pub identity: bool,
    /// Whether NULL is allowed; `None` where only the relation message was seen.
    #[serde(default)]
    pub nullable: Option<bool>,
}

/// A column's type: enough to shape PostgreSQL's text as JSON.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Type {
    /// The oid of `pg_type`.
    pub oid: u32,
    /// `atttypmod`, or -1.
    pub modifier: i32,
    /// The name as `format_type` prints it without the modifier; empty where it is not known.
    pub name: String,
    /// Its structure.
    pub kind: TypeKind,
}

/// The structure of a [`Type`].
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TypeKind {
    /// A scalar, built in or of an extension, told apart by its oid.
    Base,
    /// An enum.
    Enum,
    /// An array with the type of its elements and the delimiter of its text form.
    Array {
        /// The element's type.
        element: Box<Type>,
        /// `typdelim` of the element: `,` for all but `box`.
        delimiter: char,
    },
    /// A domain over another type.
    Domain {
        /// The type below it.
        base: Box<Type>,
    },
    /// A composite type with its fields in order.
    Composite {
        /// The fields' names and types.
        fields: Vec<(String, Type)>,
    },
    /// A range or multirange, kept as text.
    Range,
}

impl Table {
    /// `schema.name`, for messages and routes.
    pub fn full_name(&self) -> String {
        format!("{}.{}", self.schema, self.name)
    }

    /// Indexes of the columns of the key: the primary key, else the replica identity's index, else
    /// none (then the whole table is one key).
    pub fn key_columns(&self) -> Vec<usize> {
        let pick = |chosen: fn(&Column) -> bool| {
            let of = self.columns.iter().enumerate().filter(|(_, column)| chosen(column));
            of.map(|(index, _)| index).collect::<Vec<_>>()
        };
        let primary = pick(|column| column.primary_key);
        match self.identity {
            _ if !primary.is_empty() => primary,
            Identity::Full | Identity::Nothing => Vec::new(),
            Identity::Default | Identity::Index => pick(|column| column.identity),
        }
    }
}

impl Identity {
    /// As `ALTER TABLE ... REPLICA IDENTITY` has it, in lower case.
    pub fn word(self) -> &'static str {
        match self {
            Identity::Default => "default",
            Identity::Nothing => "nothing",
            Identity::Full => "full",
            Identity::Index => "index",
        }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.schema, self.name)
    }
}

impl Type {
    /// A scalar of which only the oid is known.
    pub fn base(oid: u32, modifier: i32) -> Self {
        Self { oid, modifier, name: String::new(), kind: TypeKind::Base }
    }

    /// As SQL has it, with the modifier: `numeric(12,3)`, `character varying(20)[]`.
    pub fn sql(&self) -> String {
        if let TypeKind::Array { element, .. } = &self.kind {
            return format!("{}[]", element.sql());
        }
        if self.name.is_empty() {
            return format!("type {}", self.oid);
        }
        match self.modifier_text() {
            None => self.name.clone(),
            Some(text) => match self.name.split_once(' ').filter(|_| self.oid != VARCHAR) {
                Some((first, rest)) => format!("{first}({text}) {rest}"),
                None => format!("{}({text})", self.name),
            },
        }
    }

    /// What stands in the brackets, for the built-in types that have such
    /// (`typmodout` of each; <https://www.postgresql.org/docs/current/catalog-pg-type.html>).
    fn modifier_text(&self) -> Option<String> {
        let modifier = Some(self.modifier).filter(|modifier| *modifier >= 0)?;
        match self.oid {
            BPCHAR | VARCHAR => Some((modifier - 4).to_string()),
            NUMERIC => {
                let packed = modifier - 4;
                // eleven bits, of which the first is the sign
                let scale = ((packed & 0x7ff) ^ 1024) - 1024;
                Some(format!("{},{scale}", packed >> 16 & 0xffff))
            }
            1083 | 1114 | 1184 | 1266 | 1560 | 1562 => Some(modifier.to_string()),
            _ => None,
        }
    }
}

/// Oids of PostgreSQL's `pg_type.dat`; they never change.
const BPCHAR: u32 = 1042;
const VARCHAR: u32 = 1043;
const NUMERIC: u32 = 1700;

#[cfg(test)]
mod tests {
    use super::*;

    fn column(name: &str, primary_key: bool, identity: bool) -> Column {
        let ty = Type::base(23, -1);
        Column { name: name.into(), ty, primary_key, identity, nullable: None }
    }

    fn table(identity: Identity, columns: Vec<Column>) -> Table {
        Table { oid: 1, schema: "public".into(), name: "t".into(), identity, columns }
    }

    #[test]
    fn a_type_prints_as_sql_has_it() {
        let of = |oid, modifier, name: &str| {
            Type { oid, modifier, name: name.into(), kind: TypeKind::Base }.sql()
        };
        assert_eq!(of(23, -1, "integer"), "integer");
        assert_eq!(of(1043, 24, "character varying"), "character varying(20)");
        assert_eq!(of(1700, (12 << 16 | 3) + 4, "numeric"), "numeric(12,3)");
        assert_eq!(of(1700, (3 << 16 | 0x7fe) + 4, "numeric"), "numeric(3,-2)");
        assert_eq!(of(1184, 3, "timestamp with time zone"), "timestamp(3) with time zone");
        assert_eq!(of(99_999, -1, ""), "type 99999");
    }

    #[test]
    fn the_key_is_the_primary_key_then_the_identity_index_then_nothing() {
        let primary =
            table(Identity::Full, vec![column("a", false, true), column("b", true, true)]);
        assert_eq!(primary.key_columns(), [1]);
        let index =
            table(Identity::Index, vec![column("a", false, true), column("b", false, false)]);
        assert_eq!(index.key_columns(), [0]);
        let whole = table(Identity::Full, vec![column("a", false, true)]);
        assert!(whole.key_columns().is_empty());
    }
}
