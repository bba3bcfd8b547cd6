//! What readers need of the tables, and what happens to changes that do not have it.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::schema::Mode;

/// Columns of one table that a sink needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Contract {
    /// The table, `schema.table`.
    #[schemars(example = &"public.orders")]
    pub table: String,
    /// The columns that it must have, and their types as SQL has them. A type without length or
    /// precision is met by any.
    #[schemars(example = BTreeMap::from([("total", "numeric")]))]
    pub columns: BTreeMap<String, String>,
}

/// Which readers new versions of some tables must not break.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[derive(Default)]
pub struct Compatibility {
    /// Which tables: globs over `schema.table`; a leading `!` takes away. Empty: every table. The
    /// first entry that chooses a table counts for it.
    pub tables: Vec<String>,
    /// Which readers must not break.
    pub mode: Mode,
    /// What happens to the changes of a version that breaks them.
    pub on_breach: OnBreach,
}

/// What happens to changes whose schema breaks a contract or a compatibility mode.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum OnBreach {
    /// They are delivered; the breach is reported.
    #[default]
    Pass,
    /// They become dead letters.
    DeadLetter,
    /// The table's changes wait, parked in their order, until somebody accepts the schema
    /// (`walrace schema accept`).
    Hold,
}
