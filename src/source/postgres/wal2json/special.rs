//! Values that JSON has no numbers for: NaN and the infinities.
//!
//! wal2json before 2.6 writes them as `null`. It says what they are in a notice before the line,
//! `special value: NaN`, to a client that asks for debugging messages; so they are asked for, and
//! put back in their order.

use std::borrow::Cow;

use super::line::{Cell, RowChange};
use crate::error::{Error, Result};

/// The types whose values the plugin writes as numbers, and that have such values.
const TYPES: [u32; 3] = [700, 701, 1700];
const NOTICE: &[u8] = b"special value: ";
/// More than two rows of as many columns as a table can have.
const COUNT_MAX: usize = 4_096;

/// The notices since the last line.
#[derive(Debug, Default)]
pub(super) struct Specials(Vec<String>);

impl Specials {
    /// Takes the body of a NoticeResponse
    /// (<https://www.postgresql.org/docs/current/protocol-error-fields.html>).
    pub(super) fn notice(&mut self, body: &[u8]) -> Result<()> {
        let mut fields = body.split(|byte| *byte == 0);
        let text = fields.find_map(|field| field.strip_prefix(b"M")?.strip_prefix(NOTICE));
        let Some(text) = text else { return Ok(()) };
        if self.0.len() >= COUNT_MAX {
            return Err(Error::retry("the server announced more special values than a row has"));
        }
        self.0.push(String::from_utf8_lossy(text).into_owned());
        Ok(())
    }

    /// Forgets what was announced for a line that has been read.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// Puts what was announced into the row, or says that it cannot be told where it belongs.
    pub(super) fn restore(&mut self, line: &mut RowChange<'_>) -> Result<()> {
        let announced = std::mem::take(&mut self.0);
        let (table, required) = (format!("{}.{}", line.schema, line.table), required(line));
        let identity = line.identity.as_mut().into_iter().flatten();
        let mut empty: Vec<&mut Cell<'_>> =
            line.columns.iter_mut().chain(identity).filter(|cell| may_be_special(cell)).collect();
        let must = empty.iter().filter(|cell| required.contains(&cell.name)).count();
        if must > announced.len() {
            return Err(Error::retry(format!(
                "{table} has a column that is NOT NULL and null: the server did not announce the \
                 value"
            )));
        }
        if announced.len() == must {
            empty.retain(|cell| required.contains(&cell.name));
        } else if announced.len() != empty.len() {
            return Err(ambiguous(&table, &empty));
        }
        for (cell, text) in empty.into_iter().zip(announced) {
            cell.value = Some(Cow::Owned(text.into_bytes()));
        }
        Ok(())
    }
}

fn may_be_special(cell: &Cell<'_>) -> bool {
    cell.value.is_none() && cell.type_oid.is_some_and(|oid| TYPES.contains(&oid))
}

/// The columns that cannot be null.
fn required<'a>(line: &RowChange<'a>) -> Vec<Cow<'a, str>> {
    let all = line.columns.iter().filter(|cell| cell.optional == Some(false));
    all.filter(|cell| cell.type_oid.is_some_and(|oid| TYPES.contains(&oid)))
        .map(|cell| cell.name.clone())
        .collect()
}

fn ambiguous(table: &str, empty: &[&mut Cell<'_>]) -> Error {
    let mut names: Vec<&str> = empty.iter().map(|cell| cell.name.as_ref()).collect();
    names.dedup();
    Error::config(format!(
        "a row of {table} has NaN or an infinity beside null in the columns {}, and this version \
         of the plugin wal2json writes both as null, so that it cannot be told which is which",
        names.join(", ")
    ))
    .remedy(
        "install wal2json 2.6 or newer at the server (it has the option \
         numeric-data-types-as-string); the change waits in the server's log until then",
    )
}

#[cfg(test)]
mod tests {
    use super::{super::line, *};

    fn row(columns: &str, identity: &str) -> RowChange<'static> {
        let line = format!(
            r#"{{"action":"U","schema":"s","table":"t","columns":[{columns}],
               "identity":[{identity}]}}"#
        );
        let line: &'static str = Box::leak(line.into_boxed_str());
        match line::parse(line.as_bytes()).unwrap().pop() {
            Some(line::Event::Row(row)) => row,
            other => panic!("{other:?}"),
        }
    }

    fn announced(values: &[&str]) -> Specials {
        let mut specials = Specials::default();
        for value in values {
            let body = format!("SDEBUG\0VDEBUG1\0C00000\0Mspecial value: {value}\0Fx.c\0L1\0\0");
            specials.notice(body.as_bytes()).unwrap();
        }
        specials.notice(b"SDEBUG\0Mold tuple is null\0\0").unwrap();
        specials
    }

    const A: &str = r#"{"name":"a","typeoid":701,"value":null,"optional":true}"#;
    const B: &str = r#"{"name":"b","typeoid":1700,"value":null,"optional":true}"#;
    const NEVER: &str = r#"{"name":"c","typeoid":700,"value":null,"optional":false}"#;
    const TEXT: &str = r#"{"name":"d","typeoid":25,"value":null,"optional":true}"#;

    fn values(row: &RowChange<'_>) -> Vec<Option<String>> {
        let all = row.columns.iter().chain(row.identity.iter().flatten());
        let text = |cell: &Cell<'_>| {
            cell.value.as_ref().map(|value| String::from_utf8_lossy(value).into_owned())
        };
        all.map(text).collect()
    }

    #[test]
    fn announced_values_take_the_places_of_nulls_in_their_order() {
        let mut line = row(&format!("{A},{TEXT},{B}"), A);
        announced(&["NaN", "-Infinity", "NaN"]).restore(&mut line).unwrap();
        let text = |text: &str| Some(text.to_owned());
        assert_eq!(values(&line), [text("NaN"), None, text("-Infinity"), text("NaN")]);
        let mut line = row(&format!("{A},{NEVER}"), "");
        announced(&["Infinity"]).restore(&mut line).unwrap();
        assert_eq!(values(&line), [None, text("Infinity")]);
        let mut line = row(&format!("{A},{B},{TEXT}"), "");
        announced(&[]).restore(&mut line).unwrap();
        assert_eq!(values(&line), [None, None, None]);
    }

    #[test]
    fn what_cannot_be_told_apart_is_refused_and_never_null() {
        let mut line = row(&format!("{A},{B}"), "");
        let error = announced(&["NaN"]).restore(&mut line).unwrap_err();
        assert!(error.to_string().contains("columns a, b"), "{error}");
        let mut line = row(&format!("{A},{NEVER}"), "");
        assert!(announced(&[]).restore(&mut line).is_err(), "a value that was not announced");
    }
}
