//! Options of the `postgres` sink.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::timeout_ms;
use crate::config::Secret;

/// Options of the `postgres` sink.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PostgresTarget {
    /// The target database: `postgres://user:password@host:port/database?sslmode=verify-full`.
    #[schemars(example = "postgres://walrace:${TARGET_PASSWORD}@replica/app?sslmode=verify-full")]
    pub url: Secret,
    /// The table that a change goes to, `schema.table` with fields of the change in braces.
    #[serde(default = "same_table")]
    pub table: String,
    /// What happens where the target lacks a column of the change.
    #[serde(default)]
    pub missing_columns: MissingColumns,
    /// What happens where the target lacks the table.
    #[serde(default)]
    pub missing_table: MissingTable,
    /// What happens where the target refuses a row.
    #[serde(default)]
    pub on_refusal: OnRefusal,
    /// What happens where the source truncates a table.
    #[serde(default)]
    pub on_truncate: OnTruncate,
    /// The table of the target that keeps this sink's progress; it is created where absent.
    #[serde(default = "progress_table")]
    pub progress_table: String,
    /// A PEM file of certificates that the target's is checked against, instead of the system's.
    #[serde(default)]
    #[schemars(example = "/etc/walrace/target-ca.pem")]
    pub tls_ca: Option<PathBuf>,
    /// A write that takes longer is an outage, in milliseconds. It bounds locks and statements too.
    #[serde(default = "timeout_ms")]
    #[schemars(range(min = 1))]
    pub timeout_ms: u64,
}

/// What the `postgres` sink does where the target lacks a column of the change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MissingColumns {
    /// Stop, and name the `ALTER TABLE` that mends it.
    #[default]
    Refuse,
    /// Leave its values out.
    Ignore,
    /// Add it, with the source's type where the target has that, else as text.
    Add,
}

/// What the `postgres` sink does where the target lacks the table of a change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MissingTable {
    /// Stop, and name the `CREATE TABLE` that mends it.
    #[default]
    Refuse,
    /// Create it with the columns, types and key of the source.
    Create,
}

/// What the `postgres` sink does where the target refuses a row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnRefusal {
    /// Find the row, name it and stop; whole transactions stay whole.
    #[default]
    Block,
    /// Park the row and go on; the rest of its transaction is committed without it.
    Park,
}

/// What the `postgres` sink does where the source truncates a table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnTruncate {
    /// Truncate the target's.
    #[default]
    Truncate,
    /// Keep the target's rows, and count the change as filtered.
    Ignore,
}

impl PostgresTarget {
    /// Every table to the one of the same name at `url`.
    pub fn to(url: Secret) -> Self {
        Self {
            url,
            table: same_table(),
            missing_columns: MissingColumns::default(),
            missing_table: MissingTable::default(),
            on_refusal: OnRefusal::default(),
            on_truncate: OnTruncate::default(),
            progress_table: progress_table(),
            tls_ca: None,
            timeout_ms: timeout_ms(),
        }
    }
}

fn same_table() -> String {
    "{schema}.{table}".into()
}

fn progress_table() -> String {
    "walrace.progress".into()
}
