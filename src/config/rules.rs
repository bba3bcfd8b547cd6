//! What a sink makes of changes before they are delivered.

use std::{collections::BTreeMap, path::PathBuf, str::FromStr};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Secret, validate::glob_problem};
use crate::{change::Op, error::Error};

/// The rules of a sink beyond its choice of tables and operations: docs/transforms.md.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Rules {
    /// Only changes for which this CEL expression is true. It reads `record`, `before`, `changes`,
    /// `op`, `table`, `schema`, `metadata` and `message`.
    #[serde(rename = "where")]
    #[schemars(example = "op == \"delete\" || record.status == \"paid\"")]
    pub condition: Option<String>,
    /// Steps that reshape each change, one after the other; each does one thing.
    pub transform: Vec<Step>,
    /// The key of the masks that hash (HMAC-SHA-256): the same key gives the same hashes.
    #[schemars(example = "${MASK_KEY}")]
    pub mask_key: Option<Secret>,
    /// A CEL expression over the reshaped change that gives topic, channel, subject, path or index,
    /// in place of the sink's own; null leaves the sink's own.
    #[schemars(example = "\"orders.\" + record.region")]
    pub route: Option<String>,
    /// A CEL expression over the reshaped change that gives the message's key; null leaves the key
    /// of the row.
    #[schemars(example = "record.customer_id")]
    pub message_key: Option<String>,
    /// Headers of each message, by name: CEL expressions over the reshaped change; null leaves one
    /// out.
    pub message_headers: BTreeMap<String, String>,
    /// Rows of an outbox table, and logical messages, that are delivered as events of their own:
    /// docs/outbox.md.
    pub outbox: Option<Outbox>,
}

/// One step of `transform`: where it applies, and the one thing that it does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Step {
    /// Only on these tables: globs over `schema.table`; a leading `!` takes away. Empty: on all.
    pub tables: Vec<String>,
    /// Only on these operations; the rows of backfills (`read`) count as inserts too. Empty: on
    /// all.
    pub operations: Vec<Op>,
    /// Keeps these columns (globs) and the key's, and takes away every other.
    pub columns: Vec<String>,
    /// Takes these columns away (globs). A table that loses a column of its key has none.
    pub drop: Vec<String>,
    /// Renames columns: the old name and the new one.
    pub rename: BTreeMap<String, String>,
    /// Hides values, by column (globs): `hash`, `redact`, `truncate:N` (the first N characters) or
    /// `drop`. It holds for the old row and the key too; NULL stays NULL.
    pub mask: BTreeMap<String, String>,
    /// Adds columns or replaces their values: names and CEL expressions.
    pub set: BTreeMap<String, String>,
    /// Makes one change of each element of a list: a CEL expression. The element is in the column
    /// that `as` names.
    #[schemars(example = "record.items")]
    pub explode: Option<String>,
    /// The column that holds the element of `explode`.
    #[serde(rename = "as")]
    #[schemars(example = &"item")]
    pub element: Option<String>,
    /// Luau source that defines `function transform(change)`.
    #[schemars(example = "function transform(change) return change end")]
    pub function: Option<String>,
    /// The same, in a file.
    #[schemars(example = "transform.luau")]
    pub function_file: Option<PathBuf>,
    /// A function that takes longer for one change fails, in milliseconds.
    #[schemars(range(min = 1))]
    pub function_ms_max: u64,
    /// A function that takes more memory fails.
    #[schemars(range(min = 1_048_576))]
    pub function_bytes_max: usize,
}

impl Default for Step {
    fn default() -> Self {
        Self {
            tables: Vec::new(),
            operations: Vec::new(),
            columns: Vec::new(),
            drop: Vec::new(),
            rename: BTreeMap::new(),
            mask: BTreeMap::new(),
            set: BTreeMap::new(),
            explode: None,
            element: None,
            function: None,
            function_file: None,
            function_ms_max: 100,
            function_bytes_max: 64 << 20,
        }
    }
}

/// Which rows and messages are events, and where their parts are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Outbox {
    /// The outbox table, `schema.table`: its inserts are events; its updates, deletes and truncates
    /// are nothing.
    #[schemars(example = "public.outbox")]
    pub table: Option<String>,
    /// The column with the message's body: `json`, `jsonb`, `text`, or `bytea` for raw bytes.
    pub payload_column: String,
    /// The column with the topic, channel, subject, path or index. Without it, or where it is
    /// NULL, the sink's own.
    #[schemars(example = &"topic")]
    pub route_column: Option<String>,
    /// The column with the id of the aggregate: the message's key.
    #[schemars(example = &"aggregate_id")]
    pub key_column: Option<String>,
    /// The column with headers: a JSON object.
    #[schemars(example = &"headers")]
    pub headers_column: Option<String>,
    /// The column with the event's type, sent as the header `type`.
    #[schemars(example = &"type")]
    pub type_column: Option<String>,
    /// The column with the event's id, sent as the header `id`.
    #[schemars(example = &"id")]
    pub id_column: Option<String>,
    /// Logical messages (`pg_logical_emit_message`) whose prefix begins with this are events too:
    /// the rest of the prefix is the route and, after a `#`, the key; the content is the body.
    #[schemars(example = "outbox.")]
    pub message_prefix: Option<String>,
}

impl Default for Outbox {
    fn default() -> Self {
        Self {
            table: None,
            payload_column: "payload".into(),
            route_column: None,
            key_column: None,
            headers_column: None,
            type_column: None,
            id_column: None,
            message_prefix: None,
        }
    }
}

/// How a value is hidden.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mask {
    /// Lower-case hex of its HMAC-SHA-256.
    Hash,
    /// `***`.
    Redact,
    /// Its first characters.
    Truncate(usize),
    /// No column at all.
    Drop,
}

impl FromStr for Mask {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text.split_once(':') {
            None if text == "hash" => Ok(Self::Hash),
            None if text == "redact" => Ok(Self::Redact),
            None if text == "drop" => Ok(Self::Drop),
            Some(("truncate", count)) if count.parse::<usize>().is_ok() => {
                Ok(Self::Truncate(count.parse().unwrap_or_default()))
            }
            _ => Err(Error::config(format!("`{text}` is no mask"))
                .remedy("one of: hash, redact, drop, or truncate:4")),
        }
    }
}

/// A key that cannot stand as it does.
#[derive(Debug)]
pub(super) struct Problem {
    /// Below the sink: `transform[0].mask.email`.
    pub(super) path: String,
    pub(super) what: String,
    pub(super) remedy: String,
}

fn problem(path: &str, what: &str, remedy: &str) -> Option<Problem> {
    Some(Problem { path: path.into(), what: what.into(), remedy: remedy.into() })
}

impl Step {
    /// The things that it does, by their keys.
    pub fn actions(&self) -> Vec<&'static str> {
        let written = [
            ("columns", !self.columns.is_empty()),
            ("drop", !self.drop.is_empty()),
            ("rename", !self.rename.is_empty()),
            ("mask", !self.mask.is_empty()),
            ("set", !self.set.is_empty()),
            ("explode", self.explode.is_some()),
            ("function", self.function.is_some()),
            ("function_file", self.function_file.is_some()),
        ];
        written.into_iter().filter(|(_, is)| *is).map(|(name, _)| name).collect()
    }

    fn problem(&self, path: &str, keyed: bool) -> Option<Problem> {
        match self.actions().as_slice() {
            [] => {
                return problem(
                    path,
                    "does nothing",
                    "add one of: columns, drop, rename, mask, \
                                 set, explode, function",
                );
            }
            [_] => {}
            [first, second, ..] => {
                let what = format!("has both `{first}` and `{second}`, whose order is not told");
                return problem(path, &what, "write one [[...transform]] for each");
            }
        }
        if self.explode.is_some() != self.element.is_some() {
            return problem(
                path,
                "has one of `explode` and `as` without the other",
                "explode = \"record.items\" and as = \"item\"",
            );
        }
        for (column, word) in &self.mask {
            let path = format!("{path}.mask.{column}");
            match word.parse::<Mask>() {
                Err(error) => {
                    let remedy = error.remedy_text().unwrap_or_default();
                    return problem(&path, &format!("is {word:?}, which is no mask"), remedy);
                }
                Ok(Mask::Hash) if !keyed => {
                    return problem(
                        &path,
                        "hashes, but the sink has no `mask_key`",
                        "add mask_key = \"${MASK_KEY}\", at least 16 random characters",
                    );
                }
                Ok(_) => {}
            }
        }
        let globs = self.tables.iter().enumerate();
        globs.filter_map(|(index, glob)| Some((index, glob_problem(glob)?))).find_map(
            |(at, why)| {
                problem(
                    &format!("{path}.tables[{at}]"),
                    why,
                    "such as \"public.*\" or \"*.orders\"",
                )
            },
        )
    }
}

impl Rules {
    /// The first key that cannot stand as it does, as far as that is seen without compiling.
    pub(super) fn problem(&self) -> Option<Problem> {
        let keyed = self.mask_key.is_some();
        let steps = self.transform.iter().enumerate();
        let in_steps =
            steps.filter_map(|(at, step)| step.problem(&format!("transform[{at}]"), keyed)).next();
        in_steps.or_else(|| self.outbox.as_ref()?.problem())
    }
}

impl Outbox {
    fn problem(&self) -> Option<Problem> {
        match (&self.table, &self.message_prefix) {
            (None, None) => problem(
                "outbox",
                "names neither table nor message prefix",
                "add table = \"public.outbox\" or message_prefix = \"outbox.\"",
            ),
            (_, Some(prefix)) if prefix.is_empty() => problem(
                "outbox.message_prefix",
                "is empty: every message would be an event",
                "such as \"outbox.\"",
            ),
            (Some(table), _) if !is_full_name(table) => {
                problem("outbox.table", "is no `schema.table`", "such as \"public.outbox\"")
            }
            _ => None,
        }
    }
}

fn is_full_name(name: &str) -> bool {
    name.split_once('.').is_some_and(|(schema, table)| !schema.is_empty() && !table.is_empty())
}

#[cfg(test)]
mod tests {
    use crate::config::{Config, Environment};

    #[test]
    fn a_rule_that_cannot_stand_is_placed_and_mended() {
        let head = "[source.app]\nkind = \"postgres\"\nurl = \"postgres://h/d\"\n\
                    [sink.s]\nkind = \"stdout\"\n";
        for (rules, told) in [
            (
                "[[sink.s.transform]]\ntables = [\"public.*\"]",
                "t:6:1: `sink.s.transform[0]` does nothing",
            ),
            (
                "[[sink.s.transform]]\ndrop = [\"a\"]\nset = { b = \"1\" }",
                "`sink.s.transform[0]` has both `drop` and `set`, whose order is not told",
            ),
            (
                "[[sink.s.transform]]\nexplode = \"record.a\"",
                "`explode` and `as` without the other",
            ),
            (
                "[[sink.s.transform]]\nmask = { a = \"hide\" }",
                "t:7:10: `sink.s.transform[0].mask.a` is \"hide\", which is no mask \
                 (one of: hash, redact, drop, or truncate:4)",
            ),
            ("[[sink.s.transform]]\nmask = { a = \"hash\" }", "but the sink has no `mask_key`"),
            (
                "[[sink.s.transform]]\ntables = [\"a\"]\ndrop = [\"a\"]",
                "tables[0]` names no schema",
            ),
            ("[sink.s.outbox]\n", "`sink.s.outbox` names neither table nor message prefix"),
            (
                "[sink.s.outbox]\ntable = \"outbox\"",
                "t:7:9: `sink.s.outbox.table` is no `schema.tab",
            ),
            ("[[sink.s.transform]]\nmaks = { a = \"drop\" }", "did you mean `mask`?"),
        ] {
            let parsed = Config::parse_in(&format!("{head}{rules}"), "t", &Environment::default());
            let said = parsed.unwrap_err().to_string();
            assert!(said.contains(told), "{said}\n  lacks {told}");
        }
    }
}
