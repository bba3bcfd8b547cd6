//! Options of the Redis sinks.

use std::{collections::BTreeMap, path::PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::timeout_ms;
use crate::config::Secret;

/// Options of the `redis_stream` sink.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RedisStream {
    /// The server: `redis://user:password@host:6379/0`, or `rediss://` for TLS.
    #[schemars(example = "redis://localhost:6379/0")]
    pub url: Secret,
    /// The stream of a change; a template, or one name for all.
    #[serde(default = "redis_target")]
    pub stream: String,
    /// A stream is trimmed to about this many entries, never to fewer. 0: never trimmed.
    #[serde(default = "redis_maxlen")]
    pub maxlen: u64,
    /// A change whose entry is larger is refused. At most the server's `proto-max-bulk-len`.
    #[serde(default = "redis_bytes_max")]
    #[schemars(range(min = 1, max = 536_870_912))]
    pub entry_bytes_max: usize,
    /// The key in the same database that keeps the progress; default
    /// `walrace:progress:NAME-OF-THE-SINK`.
    #[serde(default)]
    #[schemars(example = "walrace:progress:events")]
    pub progress_key: Option<String>,
    /// The authorities that may have signed the server's certificate, as a PEM file; default those
    /// of the system.
    #[serde(default)]
    #[schemars(example = "/etc/walrace/redis-ca.pem")]
    pub tls_ca: Option<PathBuf>,
    /// An answer that takes longer is an outage, in milliseconds.
    #[serde(default = "timeout_ms")]
    #[schemars(range(min = 1))]
    pub timeout_ms: u64,
}

/// Options of the `redis_pubsub` sink.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RedisPubsub {
    /// The server: `redis://user:password@host:6379`, or `rediss://` for TLS.
    #[schemars(example = "redis://localhost:6379")]
    pub url: Secret,
    /// The channel of a change; a template, or one name for all.
    #[serde(default = "redis_target")]
    pub channel: String,
    /// Templates for some tables in place of `channel`: by globs over `schema.table`, or over the
    /// table alone. A name without wildcards goes before a glob, a longer glob before a shorter.
    #[serde(default)]
    pub channels: BTreeMap<String, String>,
    /// What is published.
    #[serde(default)]
    pub payload: RedisPubsubPayload,
    /// The authorities that may have signed the server's certificate, as a PEM file; default those
    /// of the system.
    #[serde(default)]
    #[schemars(example = "/etc/walrace/redis-ca.pem")]
    pub tls_ca: Option<PathBuf>,
    /// An answer that takes longer is an outage, in milliseconds.
    #[serde(default = "timeout_ms")]
    #[schemars(range(min = 1))]
    pub timeout_ms: u64,
}

/// What the `redis_pubsub` sink publishes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RedisPubsubPayload {
    /// The message of the sink's format.
    #[default]
    Message,
    /// `{"table","action","record","changes","timestamp","source":"cdc"}`, as Strait's event
    /// streams expect it; `format` does not matter then.
    Strait,
}

/// Options of the `redis_string` sink.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RedisString {
    /// The server: `redis://user:password@host:6379/0`, or `rediss://` for TLS.
    #[schemars(example = "redis://localhost:6379/0")]
    pub url: Secret,
    /// The key of a row; a template.
    #[serde(default = "redis_key")]
    pub key: String,
    /// What is stored.
    #[serde(default)]
    pub payload: RedisStringPayload,
    /// A value lives this long, in milliseconds. 0: for ever.
    #[serde(default)]
    pub ttl_ms: u64,
    /// What an insert, update or read does with the key.
    #[serde(default)]
    pub on_update: RedisOnUpdate,
    /// What a delete does with the key.
    #[serde(default)]
    pub on_delete: RedisOnDelete,
    /// What a truncate does with the keys of its table.
    #[serde(default)]
    pub on_truncate: RedisOnTruncate,
    /// The authorities that may have signed the server's certificate, as a PEM file; default those
    /// of the system.
    #[serde(default)]
    #[schemars(example = "/etc/walrace/redis-ca.pem")]
    pub tls_ca: Option<PathBuf>,
    /// An answer that takes longer is an outage, in milliseconds.
    #[serde(default = "timeout_ms")]
    #[schemars(range(min = 1))]
    pub timeout_ms: u64,
}

/// What the `redis_string` sink stores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RedisStringPayload {
    /// The row as a JSON object.
    #[default]
    Record,
    /// The message of the sink's format.
    Message,
}

/// What an insert, update or read does with the key of its row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RedisOnUpdate {
    /// Sets it.
    #[default]
    Set,
    /// Deletes it: the next reader asks the database.
    Delete,
}

/// What a delete does with the key of its row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RedisOnDelete {
    /// Deletes it.
    #[default]
    Delete,
    /// Leaves it, counted as filtered.
    Ignore,
}

/// What a truncate does with the keys of its table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RedisOnTruncate {
    /// Leaves them, counted as filtered.
    #[default]
    Ignore,
    /// Walks through the whole database with SCAN and deletes the keys that begin as those of the
    /// table do.
    Scan,
}

fn redis_target() -> String {
    "walrace.{source}.{schema}.{table}".into()
}

fn redis_key() -> String {
    "{table}:{key}".into()
}

fn redis_maxlen() -> u64 {
    100_000
}

fn redis_bytes_max() -> usize {
    512 << 20
}
