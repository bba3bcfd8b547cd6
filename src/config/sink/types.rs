//! How a sink's values of some types are written.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How values of some types are written; what is not said here is as PostgreSQL's `to_jsonb` has
/// it. For the formats `native` and `cloudevents`; the others have rules of their own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Types {
    /// `numeric` (`decimal`).
    pub numeric: NumberStyle,
    /// `int8` (`bigint`): beyond 2^53 a reader whose numbers are doubles, as JavaScript's, loses
    /// digits of a number.
    pub int8: NumberStyle,
    /// `bytea`.
    pub bytea: BytesStyle,
    /// `timestamp` and `timestamptz`.
    pub timestamp: TimestampStyle,
}

/// How a type of numbers is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum NumberStyle {
    /// A JSON number; `NaN` and the infinities are strings.
    #[default]
    Number,
    /// A string with PostgreSQL's digits.
    String,
}

/// How bytes are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum BytesStyle {
    /// `\\x00ff`.
    #[default]
    Hex,
    /// `AP8=`.
    Base64,
}

/// How points in time are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TimestampStyle {
    /// `2026-04-06T09:14:22.123`, of `timestamptz` in UTC with `+00:00`.
    #[default]
    Iso,
    /// Whole seconds since 1970-01-01, of `timestamptz` in UTC, rounded to the past; `infinity`
    /// stays a string.
    EpochSeconds,
    /// The same in milliseconds.
    EpochMillis,
    /// The same in microseconds, which loses nothing.
    EpochMicros,
}
