//! What a reader needs of a table, and whether the table has it.

use std::{collections::BTreeMap, fmt};

use serde::Serialize;

use super::{Table, Type, TypeKind};

/// A column that is not as a reader needs it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Unmet {
    /// The column.
    pub column: String,
    /// The type that is needed, as it was written.
    pub wanted: String,
    /// The type that it has; `None` where there is no such column.
    pub found: Option<String>,
}

impl fmt::Display for Unmet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Unmet { column, wanted, .. } = self;
        match &self.found {
            Some(found) => write!(f, "{column} must be {wanted}, and is {found}"),
            None => write!(f, "{column} {wanted} is not there"),
        }
    }
}

/// The columns of which `table` has not what is `wanted`: names and types as SQL has them.
pub fn unmet(wanted: &BTreeMap<String, String>, table: &Table) -> Vec<Unmet> {
    let mut found = Vec::new();
    for (column, wanted) in wanted {
        let ty = table.column(column).map(|column| &column.ty);
        if ty.is_some_and(|ty| satisfies(ty, wanted)) {
            continue;
        }
        let (column, wanted) = (column.clone(), wanted.clone());
        found.push(Unmet { column, wanted, found: ty.map(Type::sql) });
    }
    found
}

/// Whether values of `ty` are such as `wanted` says: the same type by whichever of its names; its
/// length or precision too, where one is wanted; a domain is of the type below it too.
fn satisfies(ty: &Type, wanted: &str) -> bool {
    let (own, wanted_parts) = (Parts::of(&ty.sql()), Parts::of(wanted));
    let modifier = wanted_parts.modifier.is_none() || wanted_parts.modifier == own.modifier;
    let same = own.name == wanted_parts.name
        || own.name.strip_prefix("public.") == Some(wanted_parts.name.as_str());
    if same && own.array == wanted_parts.array && modifier {
        return true;
    }
    match &ty.kind {
        TypeKind::Domain { base } => satisfies(base, wanted),
        _ => false,
    }
}

/// A type as it is written, taken apart.
#[derive(Debug, PartialEq, Eq)]
struct Parts {
    name: String,
    modifier: Option<String>,
    array: bool,
}

impl Parts {
    fn of(text: &str) -> Self {
        let mut text = text.trim().to_lowercase();
        let array = text.contains("[]");
        text = text.replace("[]", "");
        let mut modifier = None;
        if let Some((before, rest)) = text.clone().split_once('(')
            && let Some((inside, after)) = rest.split_once(')')
        {
            modifier = Some(inside.replace(' ', ""));
            text = format!("{before} {after}");
        }
        let words: Vec<&str> = text.split_whitespace().collect();
        let name = words.join(" ");
        Self { name: full_name(&name).to_owned(), modifier, array }
    }
}

/// The name by which `format_type` calls a type
/// (<https://www.postgresql.org/docs/current/datatype.html>).
fn full_name(name: &str) -> &str {
    match name {
        "int" | "int4" | "serial" | "serial4" => "integer",
        "int2" | "smallserial" | "serial2" => "smallint",
        "int8" | "bigserial" | "serial8" => "bigint",
        "float4" => "real",
        "float8" | "float" => "double precision",
        "bool" => "boolean",
        "decimal" => "numeric",
        "varchar" => "character varying",
        "char" | "bpchar" => "character",
        "varbit" => "bit varying",
        "time" => "time without time zone",
        "timetz" => "time with time zone",
        "timestamp" => "timestamp without time zone",
        "timestamptz" => "timestamp with time zone",
        name => name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::{Column, Identity};

    fn base(oid: u32, modifier: i32, name: &str) -> Type {
        Type { oid, modifier, name: name.into(), kind: TypeKind::Base }
    }

    #[test]
    fn a_type_is_known_by_each_of_its_names() {
        let varchar = base(1043, 24, "character varying");
        for wanted in ["varchar", "character varying", "VARCHAR(20)", "character  varying ( 20 )"] {
            assert!(satisfies(&varchar, wanted), "{wanted}");
        }
        for wanted in ["text", "varchar(30)", "varchar[]", "varchar(20)[]"] {
            assert!(!satisfies(&varchar, wanted), "{wanted}");
        }
        let time = base(1184, 3, "timestamp with time zone");
        assert!(satisfies(&time, "timestamptz") && satisfies(&time, "timestamp(3) with time zone"));
        assert!(!satisfies(&time, "timestamp"));
        let array = Type {
            oid: 1016,
            modifier: -1,
            name: "bigint[]".into(),
            kind: TypeKind::Array { element: Box::new(base(20, -1, "bigint")), delimiter: ',' },
        };
        assert!(satisfies(&array, "int8[]") && !satisfies(&array, "int8"));
        let domain = Type {
            oid: 99_000,
            modifier: -1,
            name: "cents".into(),
            kind: TypeKind::Domain { base: Box::new(base(20, -1, "bigint")) },
        };
        assert!(satisfies(&domain, "cents") && satisfies(&domain, "bigint"));
        let mood = base(99_001, -1, "public.mood");
        assert!(satisfies(&mood, "mood") && satisfies(&mood, "public.mood"));
        assert!(!satisfies(&mood, "other.mood"));
    }

    #[test]
    fn what_is_missing_or_of_another_type_is_named() {
        let column = |name: &str, ty| Column {
            name: name.into(),
            ty,
            primary_key: false,
            identity: false,
            nullable: None,
        };
        let table = Table {
            oid: 1,
            schema: "public".into(),
            name: "orders".into(),
            identity: Identity::Full,
            columns: vec![
                column("id", base(20, -1, "bigint")),
                column("total", base(25, -1, "text")),
            ],
        };
        let wanted = [("id", "bigint"), ("total", "numeric"), ("at", "timestamptz")];
        let wanted = wanted.map(|(column, ty)| (column.to_owned(), ty.to_owned())).into();
        let told: Vec<_> = unmet(&wanted, &table).iter().map(ToString::to_string).collect();
        assert_eq!(told, ["at timestamptz is not there", "total must be numeric, and is text"]);
    }
}
