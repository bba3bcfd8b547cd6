//! Texts with fields of a change in them, such as `cdc:project:{record.project_id}:{table}`: the
//! names of topics, channels, subjects, paths and indexes.

use std::{fmt, str::FromStr};

use super::Names;
use crate::{
    change::{Change, Row, Value},
    error::{Error, Result},
};

/// A template, parsed. `{{` and `}}` are plain braces. A logical message has no table: its
/// `{schema}` is `message` and its `{table}` the prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    text: String,
    parts: Vec<Part>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Text(String),
    Field(Field),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Field {
    Source,
    Database,
    Schema,
    Table,
    Op,
    Key,
    Prefix,
    /// A column of the new row, of a delete the old one.
    Record(String),
    /// A column of the old row.
    Before(String),
}

const FIELDS: &str = "source, database, schema, table, op, key, prefix, record.COLUMN and \
                      before.COLUMN";

impl Template {
    /// The text for one change. A field that the change does not have, or whose value is null or
    /// was not sent, is an error of class `Data`.
    pub fn render(&self, change: &Change, names: &Names) -> Result<String> {
        let mut out = String::with_capacity(self.text.len() + 32);
        for part in &self.parts {
            match part {
                Part::Text(text) => out.push_str(text),
                Part::Field(field) => self.write(field, change, names, &mut out)?,
            }
        }
        Ok(out)
    }

    /// The text as it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether it is the same text for every change.
    pub fn is_constant(&self) -> bool {
        self.parts.iter().all(|part| matches!(part, Part::Text(_)))
    }

    fn write(&self, field: &Field, change: &Change, names: &Names, out: &mut String) -> Result<()> {
        let table = change.table.as_deref();
        let of_table = || table.ok_or_else(|| self.lacks("a logical message has no table"));
        match field {
            Field::Source => out.push_str(&names.source),
            Field::Database => out.push_str(&names.database),
            Field::Schema => out.push_str(table.map_or("message", |table| &table.schema)),
            Field::Table => match (table, &change.message) {
                (None, Some(message)) => out.push_str(&message.prefix),
                _ => out.push_str(&of_table()?.name),
            },
            Field::Op => out.push_str(change.op.word()),
            Field::Prefix => match &change.message {
                Some(message) => out.push_str(&message.prefix),
                None => return Err(self.lacks("only a logical message has a prefix")),
            },
            Field::Key => {
                let columns = of_table()?.key_columns();
                if columns.is_empty() {
                    return Err(self.lacks(&format!("{} has no key", of_table()?)));
                }
                for (count, index) in columns.into_iter().enumerate() {
                    if count > 0 {
                        out.push('-');
                    }
                    out.push_str(self.value(change, change.key_row(), index)?);
                }
            }
            Field::Record(column) => {
                let index = self.column(of_table()?, column)?;
                out.push_str(self.value(change, change.key_row(), index)?);
            }
            Field::Before(column) => {
                let index = self.column(of_table()?, column)?;
                out.push_str(self.value(change, change.before.row(), index)?);
            }
        }
        Ok(())
    }

    fn column(&self, table: &crate::schema::Table, name: &str) -> Result<usize> {
        let index = table.columns.iter().position(|column| column.name == name);
        index.ok_or_else(|| self.lacks(&format!("{table} has no column {name}")))
    }

    /// A value of `row`; one that was not sent is taken from the old row.
    fn value<'a>(&self, change: &'a Change, row: Option<&'a Row>, index: usize) -> Result<&'a str> {
        let mut value = row.and_then(|row| row.value(index));
        if value == Some(Value::Unchanged) {
            value = change.before.row().and_then(|row| row.value(index));
        }
        let name = || {
            let column = change.table.as_ref().and_then(|table| table.columns.get(index));
            column.map_or("a column", |column| column.name.as_str()).to_owned()
        };
        match value {
            Some(Value::Text(text)) => std::str::from_utf8(text)
                .map_err(|_| self.lacks(&format!("the value of {} is not UTF-8", name()))),
            Some(Value::Null) => Err(self.lacks(&format!("{} is null", name()))),
            Some(Value::Unchanged) | None => {
                Err(self.lacks(&format!("the change does not carry {}", name())))
            }
        }
    }

    fn lacks(&self, why: &str) -> Error {
        Error::data(format!("`{}` cannot be filled in: {why}", self.text))
    }
}

impl fmt::Display for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for Template {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut parts = Vec::new();
        let mut plain = String::new();
        let mut rest = text;
        while let Some(at) = rest.find(['{', '}']) {
            let (before, brace) = rest.split_at(at);
            plain.push_str(before);
            if let Some(after) = brace.strip_prefix("{{") {
                plain.push('{');
                rest = after;
            } else if let Some(after) = brace.strip_prefix("}}") {
                plain.push('}');
                rest = after;
            } else {
                let name = brace.strip_prefix('{').and_then(|field| field.split_once('}'));
                let (name, after) = name.ok_or_else(|| {
                    Error::config(format!("`{text}` has a brace without its other half"))
                        .remedy("write `{{` and `}}` for plain braces")
                })?;
                if !plain.is_empty() {
                    parts.push(Part::Text(std::mem::take(&mut plain)));
                }
                parts.push(Part::Field(field(name, text)?));
                rest = after;
            }
        }
        plain.push_str(rest);
        if !plain.is_empty() {
            parts.push(Part::Text(plain));
        }
        Ok(Self { text: text.to_owned(), parts })
    }
}

fn field(name: &str, text: &str) -> Result<Field> {
    Ok(match name {
        "source" => Field::Source,
        "database" => Field::Database,
        "schema" => Field::Schema,
        "table" => Field::Table,
        "op" | "action" => Field::Op,
        "key" => Field::Key,
        "prefix" => Field::Prefix,
        _ => match name.split_once('.') {
            Some(("record" | "after", column)) if !column.is_empty() => {
                Field::Record(column.to_owned())
            }
            Some(("before", column)) if !column.is_empty() => Field::Before(column.to_owned()),
            _ => {
                return Err(Error::config(format!("`{text}` names `{name}`, which is no field"))
                    .remedy(format!("the fields are {FIELDS}")));
            }
        },
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        change::{Before, Message, Op, Transaction},
        error::Class,
        schema::{Column, Identity, Table, Type},
    };

    fn change() -> Change {
        let column = |name: &str, key| Column {
            name: name.into(),
            ty: Type::base(25, -1),
            primary_key: key,
            identity: true,
            nullable: None,
        };
        let columns = vec![column("id", true), column("line", true), column("project_id", false)];
        let (schema, name) = ("public".to_owned(), "runs".to_owned());
        let row = |id: &'static [u8], project| {
            Row::from_values([Value::Text(id), Value::Text(b"2"), project])
        };
        Change {
            offset: 1,
            op: Op::Update,
            index: 0,
            closes_transaction: true,
            transaction: Transaction::default(),
            table: Some(Arc::new(Table {
                oid: 1,
                schema,
                name,
                identity: Identity::Full,
                columns,
            })),
            before: Before::Full(row(b"6", Value::Text(b"p-1"))),
            after: Some(row(b"7", Value::Unchanged)),
            message: None,
            shaped: None,
            backfill: None,
        }
    }

    fn render(text: &str, change: &Change) -> Result<String> {
        let names = Names { source: "app".into(), ..Names::default() };
        text.parse::<Template>().unwrap().render(change, &names)
    }

    #[test]
    fn fields_are_filled_in() {
        let render = |text| render(text, &change()).unwrap();
        assert_eq!(render("cdc:project:{record.project_id}:{table}"), "cdc:project:p-1:runs");
        assert_eq!(render("{source}.{schema}.{table}.{op}"), "app.public.runs.update");
        assert_eq!(render("{before.id}->{after.id} {key}"), "6->7 7-2");
        assert_eq!(render("{{{table}}} plain"), "{runs} plain");
    }

    #[test]
    fn what_a_change_lacks_is_said_by_name() {
        let mut change = change();
        let fails = |text, change: &Change| render(text, change).unwrap_err();
        let error = fails("x:{record.nothing}", &change);
        assert_eq!(error.class(), Class::Data);
        assert!(error.to_string().contains("public.runs has no column nothing"), "{error}");
        change.before = Before::Nothing;
        assert!(fails("{record.project_id}", &change).to_string().contains("not carry project_id"));
        change.after = Some(Row::from_values([Value::Null, Value::Null, Value::Null]));
        assert!(fails("{key}", &change).to_string().contains("id is null"));
        change.table = None;
        assert!(fails("{key}", &change).to_string().contains("has no table"));
        let (prefix, content) = ("audit".to_owned(), bytes::Bytes::new());
        change.message = Some(Arc::new(Message { prefix, content, transactional: true }));
        assert_eq!(render("{source}.{schema}.{table}", &change).unwrap(), "app.message.audit");
    }

    #[test]
    fn a_template_that_cannot_be_read_teaches_how() {
        for (text, told) in [("a{tabel}", "`tabel`"), ("a{table", "half"), ("a}", "half")] {
            let error = text.parse::<Template>().unwrap_err();
            assert_eq!(error.class(), Class::Config);
            assert!(error.to_string().contains(told), "{error}");
        }
    }
}
