//! What the stream does not say of a table: its primary key, nullability, and the structure of its
//! types. Read over a plain connection beside the stream.

use std::collections::{BTreeSet, HashMap};

use super::{
    failure::Failure,
    pgoutput::{Relation, RelationColumn},
    url::Target,
    wire::{Client, Purpose, TextRow},
};
use crate::{
    error::{Error, Result, ResultExt},
    schema::{Column, Identity, Table, Type, TypeKind},
};

/// Types below this oid are built in and never change.
const FIRST_USER_OID: u32 = 16_384;
/// PostgreSQL refuses types that hold themselves, so real ones end long before.
const TYPE_DEPTH_MAX: usize = 32;

/// Resolves relations into tables.
pub(super) struct Catalog {
    target: Target,
    client: Option<Client>,
    types: HashMap<u32, TypeRow>,
    /// Keeps to its connection: another one would not see what was done in it.
    steady: bool,
}

/// A row of `pg_type`, as far as it shapes text.
#[derive(Clone, Debug)]
struct TypeRow {
    name: String,
    shape: Shape,
}

#[derive(Clone, Debug)]
enum Shape {
    Base,
    Enum,
    Range,
    Array { element: u32, delimiter: char },
    Domain { base: u32, modifier: i32 },
    Composite { fields: Vec<(String, u32, i32)> },
}

impl Shape {
    fn refers_to(&self) -> Vec<u32> {
        match self {
            Shape::Base | Shape::Enum | Shape::Range => Vec::new(),
            Shape::Array { element, .. } => vec![*element],
            Shape::Domain { base, .. } => vec![*base],
            Shape::Composite { fields } => fields.iter().map(|(_, oid, _)| *oid).collect(),
        }
    }
}

/// A column as the catalog has it now.
struct CatalogColumn {
    type_oid: u32,
    nullable: bool,
    primary_key: bool,
}

impl Catalog {
    /// Connects with the first question.
    pub(super) fn new(target: Target) -> Self {
        Self { target, client: None, types: HashMap::new(), steady: false }
    }

    /// Asks over a connection of the caller, and never over another.
    pub(super) fn over(target: Target, client: Client) -> Self {
        Self { target, client: Some(client), types: HashMap::new(), steady: true }
    }

    /// The connection that it was given.
    pub(super) fn client(&mut self) -> Result<&mut Client> {
        self.client.as_mut().ok_or_else(|| Error::bug("a catalog without its connection"))
    }

    /// The table that `relation` describes. The catalog shows the present and the stream the past:
    /// where they disagree, the stream is right, and the catalog only explains its types.
    pub(super) fn resolve(&mut self, relation: &Relation) -> Result<Table> {
        let context = || format!("while describing {}.{}", relation.schema, relation.name);
        let known = self.columns(relation.oid).context(context)?;
        self.types.retain(|oid, _| *oid < FIRST_USER_OID);
        self.load_types(relation.columns.iter().map(|column| column.type_oid)).context(context)?;
        let same = |column: &RelationColumn| {
            known.get(&column.name).filter(|found| found.type_oid == column.type_oid)
        };
        let columns = relation.columns.iter().map(|column| Column {
            name: column.name.clone(),
            ty: self.build(column.type_oid, column.modifier, 0),
            primary_key: match relation.identity {
                // the identity is the primary key, so the stream itself says which columns it has
                Identity::Default => column.key,
                _ => same(column).is_some_and(|found| found.primary_key),
            },
            identity: column.key,
            nullable: same(column).map(|found| found.nullable),
        });
        Ok(Table {
            oid: relation.oid,
            schema: relation.schema.clone(),
            name: relation.name.clone(),
            identity: relation.identity,
            columns: columns.collect(),
        })
    }

    fn columns(&mut self, table: u32) -> Result<HashMap<String, CatalogColumn>> {
        let rows = self.query(&format!(
            "select a.attname, a.atttypid, a.attnotnull, coalesce(a.attnum = any(i.indkey), false)
             from pg_attribute a
             left join pg_index i on i.indrelid = a.attrelid and i.indisprimary
             where a.attrelid = {table} and a.attnum > 0 and not a.attisdropped"
        ))?;
        rows.into_iter()
            .map(|row| {
                let mut row = Cells(row.into_iter());
                let name = row.text()?;
                let type_oid = row.number()?;
                let nullable = !row.flag()?;
                Ok((name, CatalogColumn { type_oid, nullable, primary_key: row.flag()? }))
            })
            .collect()
    }

    /// Loads types and all that they are made of.
    fn load_types(&mut self, wanted: impl Iterator<Item = u32>) -> Result<()> {
        let mut wanted: BTreeSet<u32> = wanted.collect();
        loop {
            wanted.retain(|oid| !self.types.contains_key(oid));
            if wanted.is_empty() {
                return Ok(());
            }
            let mut next = BTreeSet::new();
            for (oid, row) in self.read_types(&wanted)? {
                next.extend(row.shape.refers_to());
                self.types.insert(oid, row);
            }
            for gone in wanted {
                // dropped meanwhile: its values are kept as text
                let unknown = TypeRow { name: String::new(), shape: Shape::Base };
                self.types.entry(gone).or_insert(unknown);
            }
            wanted = next;
        }
    }

    fn read_types(&mut self, wanted: &BTreeSet<u32>) -> Result<Vec<(u32, TypeRow)>> {
        let list = wanted.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
        // A type is a true array by its subscripting; the vectors have another text form.
        let rows = self.query(&format!(
            "select t.oid, format_type(t.oid, null), t.typtype,
                    case when t.typsubscript = 'array_subscript_handler'::regproc
                          and t.oid not in (22, 30) then t.typelem end,
                    e.typdelim, t.typbasetype, t.typtypmod, t.typrelid
             from pg_type t left join pg_type e on e.oid = t.typelem
             where t.oid in ({list})"
        ))?;
        let mut types = Vec::with_capacity(rows.len());
        for row in rows {
            let mut row = Cells(row.into_iter());
            let (oid, name, kind) = (row.number()?, row.text()?, row.text()?);
            let (element, delimiter) = (row.maybe(), row.maybe());
            let (base, modifier, relation) = (row.number()?, row.number()?, row.number()?);
            let shape = match (kind.as_str(), element) {
                ("e", _) => Shape::Enum,
                ("r" | "m", _) => Shape::Range,
                ("d", _) => Shape::Domain { base, modifier },
                ("c", _) => Shape::Composite { fields: self.read_fields(relation)? },
                (_, Some(element)) => Shape::Array {
                    element: element.parse().map_err(|_| unreadable())?,
                    delimiter: delimiter.and_then(|d| d.chars().next()).unwrap_or(','),
                },
                _ => Shape::Base,
            };
            types.push((oid, TypeRow { name, shape }));
        }
        Ok(types)
    }

    fn read_fields(&mut self, relation: u32) -> Result<Vec<(String, u32, i32)>> {
        let rows = self.query(&format!(
            "select attname, atttypid, atttypmod from pg_attribute
             where attrelid = {relation} and attnum > 0 and not attisdropped order by attnum"
        ))?;
        rows.into_iter()
            .map(|row| {
                let mut row = Cells(row.into_iter());
                Ok((row.text()?, row.number()?, row.number()?))
            })
            .collect()
    }

    fn build(&self, oid: u32, modifier: i32, depth: usize) -> Type {
        let Some(row) = self.types.get(&oid).filter(|_| depth < TYPE_DEPTH_MAX) else {
            return Type::base(oid, modifier);
        };
        let kind = match &row.shape {
            Shape::Base => TypeKind::Base,
            Shape::Enum => TypeKind::Enum,
            Shape::Range => TypeKind::Range,
            Shape::Array { element, delimiter } => TypeKind::Array {
                element: Box::new(self.build(*element, modifier, depth + 1)),
                delimiter: *delimiter,
            },
            Shape::Domain { base, modifier } => {
                TypeKind::Domain { base: Box::new(self.build(*base, *modifier, depth + 1)) }
            }
            Shape::Composite { fields } => TypeKind::Composite {
                fields: fields
                    .iter()
                    .map(|(name, oid, modifier)| {
                        (name.clone(), self.build(*oid, *modifier, depth + 1))
                    })
                    .collect(),
            },
        };
        Type { oid, modifier, name: row.name.clone(), kind }
    }

    /// Asks once more over a new connection where the old one has broken meanwhile.
    pub(super) fn query(&mut self, sql: &str) -> Result<Vec<TextRow>> {
        if let Some(client) = &mut self.client {
            match client.query(sql) {
                Ok(rows) => return Ok(rows),
                Err(failure @ Failure::Server(_)) if !failure.code().starts_with("57") => {
                    return Err(failure.into());
                }
                Err(failure) if self.steady => return Err(failure.into()),
                Err(_) => self.client = None,
            }
        }
        let mut client = Client::connect(&self.target, Purpose::Sql)?;
        let rows = client.query(sql)?;
        self.client = Some(client);
        Ok(rows)
    }
}

/// Reads the cells of a row one after the other.
pub(super) struct Cells(pub(super) std::vec::IntoIter<Option<String>>);

impl Cells {
    /// The next cell, which may be NULL.
    pub(super) fn maybe(&mut self) -> Option<String> {
        self.0.next().flatten()
    }

    /// The next cell.
    pub(super) fn text(&mut self) -> Result<String> {
        self.maybe().ok_or_else(unreadable)
    }

    /// The next cell as a number.
    pub(super) fn number<T: std::str::FromStr>(&mut self) -> Result<T> {
        self.text()?.parse().map_err(|_| unreadable())
    }

    /// The next cell as a boolean; NULL is false.
    pub(super) fn flag(&mut self) -> Result<bool> {
        Ok(self.maybe().is_some_and(|text| text == "t"))
    }
}

fn unreadable() -> Error {
    Error::retry("the server's catalog has a row that Walrace cannot read")
}

/// `name` as an identifier in SQL.
pub(super) fn quote_name(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// `text` as a literal in SQL.
pub(super) fn quote_text(text: &str) -> String {
    match text.contains('\\') {
        true => format!(" E'{}'", text.replace('\\', "\\\\").replace('\'', "''")),
        false => format!("'{}'", text.replace('\'', "''")),
    }
}
