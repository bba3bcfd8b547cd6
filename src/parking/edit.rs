//! Another value for a column of a parked change.

use serde_json::{Map, Value as Json};

use crate::{
    change::{Before, Change, Row, Value},
    error::{Error, Result},
    schema::{Table, TypeKind},
};

/// The oids of `json` and `jsonb`.
const JSON: [u32; 2] = [114, 3802];

/// The change with `values` in its new row, of a delete in its old one.
pub(super) fn apply(mut change: Change, values: &Map<String, Json>) -> Result<Change> {
    let Some(table) = change.table.clone() else {
        return Err(Error::config("a logical message has no columns to edit"));
    };
    if let Some(after) = &change.after {
        change.after = Some(replaced(after, &table, values)?);
        return Ok(change);
    }
    change.before = match &change.before {
        Before::Key(row) => Before::Key(replaced(row, &table, values)?),
        Before::Full(row) => Before::Full(replaced(row, &table, values)?),
        Before::Nothing => {
            return Err(Error::config(format!("this change of {table} has no row to edit")));
        }
    };
    Ok(change)
}

fn replaced(row: &Row, table: &Table, values: &Map<String, Json>) -> Result<Row> {
    let unknown = values.keys().find(|name| table.columns.iter().all(|c| c.name != **name));
    if let Some(name) = unknown {
        let names: Vec<_> = table.columns.iter().map(|column| column.name.as_str()).collect();
        return Err(Error::config(format!("{table} has no column {name}"))
            .remedy(format!("its columns are {}", names.join(", "))));
    }
    let mut texts = Vec::with_capacity(table.columns.len());
    for column in &table.columns {
        texts.push(match values.get(&column.name) {
            None => None,
            Some(value) => Some(text(value, is_json(&column.ty)).ok_or_else(|| {
                Error::config(format!(
                    "column {} of {table} takes no JSON object or array",
                    column.name
                ))
                .remedy("give its PostgreSQL text as a string, such as \"{1,2}\" for an array")
            })?),
        });
    }
    Ok(Row::from_values(row.values().zip(&texts).map(|(old, new)| match new {
        None => old,
        Some(None) => Value::Null,
        Some(Some(text)) => Value::Text(text.as_bytes()),
    })))
}

fn is_json(ty: &crate::schema::Type) -> bool {
    match &ty.kind {
        TypeKind::Domain { base } => is_json(base),
        _ => JSON.contains(&ty.oid),
    }
}

/// PostgreSQL's text of a JSON value; `None` where only a type of JSON could take it.
fn text(value: &Json, json: bool) -> Option<Option<String>> {
    Some(match value {
        Json::Null => None,
        value if json => Some(value.to_string()),
        Json::Bool(value) => Some(if *value { "t" } else { "f" }.to_owned()),
        Json::Number(number) => Some(number.to_string()),
        Json::String(text) => Some(text.clone()),
        Json::Array(_) | Json::Object(_) => return None,
    })
}
