//! Options of the `opensearch` and `object_store` sinks.

use std::{collections::BTreeMap, path::PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::timeout_ms;
use crate::config::Secret;

/// Options of the `opensearch` sink (`elasticsearch` is the same).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Opensearch {
    /// The cluster's address, without the path of an index.
    #[schemars(example = "https://search.example:9200")]
    pub url: Secret,
    /// The index of each document: a template, lowercased once it is filled in.
    #[serde(default = "table_template")]
    pub index: String,
    /// What a document is.
    #[serde(default)]
    pub document: Document,
    /// The user of HTTP basic authentication.
    #[serde(default)]
    #[schemars(example = &"walrace")]
    pub username: Option<String>,
    /// The password of `username`.
    #[serde(default)]
    #[schemars(example = "${SEARCH_PASSWORD}")]
    pub password: Option<Secret>,
    /// An API key, base64 as the server gives it, in place of `username`.
    #[serde(default)]
    #[schemars(example = "${SEARCH_API_KEY}")]
    pub api_key: Option<Secret>,
    /// A bearer token, in place of `username`.
    #[serde(default)]
    #[schemars(example = "${SEARCH_TOKEN}")]
    pub bearer: Option<Secret>,
    /// Further headers.
    #[serde(default)]
    pub headers: BTreeMap<String, Secret>,
    /// A PEM file with the authorities that are trusted, beside those of the system.
    #[serde(default)]
    #[schemars(example = "/etc/walrace/ca.pem")]
    pub tls_ca: Option<PathBuf>,
    /// A reply that takes longer is an outage, in milliseconds.
    #[serde(default = "timeout_ms")]
    #[schemars(range(min = 1))]
    pub timeout_ms: u64,
    /// What a TRUNCATE does.
    #[serde(default)]
    pub on_truncate: SearchOnTruncate,
    /// What becomes of an update without the value of a large column that it left alone.
    #[serde(default)]
    pub unchanged: UnchangedColumns,
}

/// What a document is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Document {
    /// The row, with a field for each column.
    #[default]
    Record,
    /// The whole message of the sink's `format`.
    Message,
}

/// What a TRUNCATE does to the documents of its table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SearchOnTruncate {
    /// Nothing; it is counted as filtered.
    #[default]
    Ignore,
    /// Deletes every document of the index that is older than it; `index` must name the table.
    Delete,
}

/// What becomes of an update that lacks the value of a column which it left alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum UnchangedColumns {
    /// It is refused: the document would lose the column.
    #[default]
    Refuse,
    /// The document is written without the column.
    Omit,
}

/// Options of the `object_store` sink.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ObjectStore {
    /// `s3://bucket/prefix`, or `file:///folder`.
    #[schemars(example = "s3://warehouse/cdc")]
    pub url: Secret,
    /// The address of a store that speaks S3's protocol, where it is not Amazon's.
    #[serde(default)]
    #[schemars(example = "https://minio.example:9000")]
    pub endpoint: Option<String>,
    /// The bucket's region.
    #[serde(default = "region")]
    pub region: String,
    /// The access key's id. Without it the machine's own role is used, as Amazon provides it.
    #[serde(default)]
    #[schemars(example = "${AWS_ACCESS_KEY_ID}")]
    pub access_key_id: Option<String>,
    /// The secret half of the access key.
    #[serde(default)]
    #[schemars(example = "${AWS_SECRET_ACCESS_KEY}")]
    pub secret_access_key: Option<Secret>,
    /// Whether `endpoint` may be plain HTTP.
    #[serde(default)]
    pub allow_http: bool,
    /// What an object holds.
    #[serde(default)]
    pub layout: Layout,
    /// Each object's name below the prefix: a template that has, beside the fields of the change,
    /// `{yyyy}`, `{mm}`, `{dd}`, `{hh}` (the hour of the commit, UTC), `{first}` and `{last}` (the
    /// range of offsets), `{flush}` (a number that no other flush has) and `{ext}`.
    #[serde(default = "object_name")]
    pub name: String,
    /// Whether JSON Lines are compressed. Parquet always is, with Zstandard.
    #[serde(default)]
    pub compression: ObjectCompression,
    /// Objects are written once they hold this many bytes together, before compression.
    #[serde(default = "roll_bytes_max")]
    #[schemars(range(min = 1))]
    pub roll_bytes_max: usize,
    /// Objects are written once their first change has waited this long, in milliseconds.
    #[serde(default = "roll_ms_max")]
    pub roll_ms_max: u64,
    /// A request that takes longer is an outage, in milliseconds.
    #[serde(default = "timeout_ms")]
    #[schemars(range(min = 1))]
    pub timeout_ms: u64,
}

/// What an object holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Layout {
    /// One message of the sink's `format` on each line.
    #[default]
    JsonLines,
    /// One row for each change, with a column for each of the table's.
    Parquet,
}

/// How an object is compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ObjectCompression {
    /// Not at all.
    #[default]
    None,
    /// Zstandard; the extension gets `.zst`.
    Zstd,
}

fn table_template() -> String {
    "{schema}.{table}".into()
}

fn region() -> String {
    "us-east-1".into()
}

fn object_name() -> String {
    "{schema}.{table}/{yyyy}-{mm}-{dd}T{hh}/{first}-{last}-{flush}.{ext}".into()
}

fn roll_bytes_max() -> usize {
    32 << 20
}

fn roll_ms_max() -> u64 {
    60_000
}
