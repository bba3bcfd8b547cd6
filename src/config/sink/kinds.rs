//! Every kind of sink, and the options of most; a few kinds with many have a file of their own.

use std::{collections::BTreeMap, path::PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{HttpPull, Kafka, Nats, ObjectStore, Opensearch, PostgresTarget, Rabbitmq, timeout_ms};
use crate::config::{Secret, yes};

/// Every kind of sink: how the configuration names it, its options, and the type that opens it.
/// `config` makes [`SinkKind`] of this list and `sink::open` its one `match`.
macro_rules! sink_kinds {
    ($with:ident) => {
        $with! {
            /// The terminal or a pipe.
            Stdout => stdout::Stdout,
            /// JSON Lines with rotation.
            File => file::File,
            /// An HTTP endpoint.
            Webhook => webhook::Webhook,
            /// A bounded queue inside a Rust program that embeds Walrace.
            Queue => queue::Queue,
            /// A user's HTTP program that answers for each change.
            Custom => custom::Custom,
            /// Entries of Redis streams.
            RedisStream => redis::Stream,
            /// Items of Redis lists, which are work queues.
            RedisList => redis::List,
            /// Messages on Redis channels.
            RedisPubsub => redis::Pubsub,
            /// A Redis string for each row: a cache that follows the tables.
            RedisString => redis::Strings,
            /// Tables of another PostgreSQL, kept the same.
            #[serde(rename = "postgres")]
            PostgresTarget => postgres::Postgres,
            /// Documents in OpenSearch or Elasticsearch.
            #[serde(alias = "elasticsearch")]
            Opensearch => opensearch::Opensearch,
            /// Objects in a bucket or a local folder: JSON Lines or Parquet.
            ObjectStore => object_store::ObjectStore,
            /// NATS: JetStream, or core NATS.
            Nats => nats::Nats,
            /// An exchange of a RabbitMQ.
            Rabbitmq => rabbitmq::Rabbitmq,
            /// Topics of Apache Kafka.
            Kafka => kafka::Kafka,
            /// Consumers fetch messages over HTTP and acknowledge them; a Sequin Stream.
            #[serde(alias = "sequin_stream")]
            HttpPull => pull::HttpPull,
        }
    };
}
pub(crate) use sink_kinds;

macro_rules! sink_kind {
    ($($(#[$doc:meta])+ $kind:ident => $module:ident :: $sink:ident,)+) => {
        /// The kind of a destination.
        #[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
        #[serde(tag = "kind", rename_all = "snake_case")]
        pub enum SinkKind {
            $($(#[$doc])+ $kind($kind),)+
        }
    };
}
sink_kinds!(sink_kind);

/// Options of the `stdout` sink.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Stdout {
    /// How changes are printed.
    pub style: StdoutStyle,
}

/// How the `stdout` sink prints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum StdoutStyle {
    /// `pretty` on a terminal, else `json`.
    #[default]
    Auto,
    /// One coloured line a change.
    Pretty,
    /// JSON Lines.
    Json,
}

/// Options of the `file` sink.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct File {
    /// The file that is written; rotated ones carry their range of offsets in the name.
    #[schemars(example = "changes.jsonl")]
    pub path: PathBuf,
    /// Begin a new file when it would grow beyond this. 0: never.
    #[serde(default)]
    pub rotate_bytes_max: u64,
    /// Begin a new file when this one is older, in milliseconds. 0: never.
    #[serde(default)]
    pub rotate_ms_max: u64,
}

/// Options of the `webhook` sink.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Webhook {
    /// Where each request is POSTed.
    #[schemars(example = "https://example.org/hook")]
    pub url: Secret,
    /// `true`: one request with `{"data":[...]}`; `false`: one request a change.
    #[serde(default = "yes")]
    pub batch: bool,
    /// Further headers, such as `authorization`.
    #[serde(default)]
    pub headers: BTreeMap<String, Secret>,
    /// A reply that takes longer is an outage, in milliseconds.
    #[serde(default = "timeout_ms")]
    #[schemars(range(min = 1))]
    pub timeout_ms: u64,
    /// Signs each request by the Standard Webhooks scheme: `whsec_` and base64, or plain text.
    #[serde(default)]
    #[schemars(example = "${WEBHOOK_SECRET}")]
    pub signing_secret: Option<Secret>,
    /// Adds a plain hex HMAC-SHA256 of the body under this key.
    #[serde(default)]
    #[schemars(example = "${WEBHOOK_HMAC_SECRET}")]
    pub hmac_secret: Option<Secret>,
    /// The name of the plain HMAC's header.
    #[serde(default = "hmac_header")]
    pub hmac_header: String,
}

/// Options of the `queue` sink.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Queue {
    /// Changes that wait at most; then delivery to this sink blocks.
    #[schemars(range(min = 1))]
    pub capacity: usize,
}

/// Options of the `custom` sink.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Custom {
    /// Where each batch is POSTed; the reply has an outcome for each change.
    #[schemars(example = "http://localhost:8080/changes")]
    pub url: Secret,
    /// Further headers.
    #[serde(default)]
    pub headers: BTreeMap<String, Secret>,
    /// A reply that takes longer is an outage, in milliseconds.
    #[serde(default = "timeout_ms")]
    #[schemars(range(min = 1))]
    pub timeout_ms: u64,
}

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

/// Options of the `redis_list` sink.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RedisList {
    /// The server: `redis://user:password@host:6379/0`, or `rediss://` for TLS.
    #[schemars(example = "redis://localhost:6379/0")]
    pub url: Secret,
    /// The list of a change; a template, or one name for all.
    #[serde(default = "redis_list")]
    pub list: String,
    /// A list has at most this many items. 0: as many as the server's memory holds.
    #[serde(default = "redis_length_max")]
    pub length_max: u64,
    /// What happens where a list has no room for a batch.
    #[serde(default)]
    pub on_full: RedisOnFull,
    /// A change whose message is larger is refused. At most the server's `proto-max-bulk-len`.
    #[serde(default = "redis_bytes_max")]
    #[schemars(range(min = 1, max = 536_870_912))]
    pub item_bytes_max: usize,
    /// The key in the same database that keeps the progress; default
    /// `walrace:progress:NAME-OF-THE-SINK`.
    #[serde(default)]
    #[schemars(example = "walrace:progress:jobs")]
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

/// What the `redis_list` sink does where a list has no room for a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RedisOnFull {
    /// Waits until consumers have taken enough.
    #[default]
    Wait,
    /// Appends, and drops the oldest items: work that nobody has done is lost.
    Trim,
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

impl Default for Queue {
    fn default() -> Self {
        Self { capacity: 65_536 }
    }
}

impl File {
    /// A file without rotation.
    pub fn to(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), rotate_bytes_max: 0, rotate_ms_max: 0 }
    }
}

impl Webhook {
    /// Unsigned batches to `url`.
    pub fn to(url: Secret) -> Self {
        Self {
            url,
            batch: true,
            headers: BTreeMap::new(),
            timeout_ms: timeout_ms(),
            signing_secret: None,
            hmac_secret: None,
            hmac_header: hmac_header(),
        }
    }
}

impl Custom {
    /// Batches to `url`.
    pub fn to(url: Secret) -> Self {
        Self { url, headers: BTreeMap::new(), timeout_ms: timeout_ms() }
    }
}

fn hmac_header() -> String {
    "X-Sequin-Signature".into()
}

fn redis_target() -> String {
    "walrace.{source}.{schema}.{table}".into()
}

fn redis_list() -> String {
    "walrace:{schema}.{table}".into()
}

fn redis_length_max() -> u64 {
    1_000_000
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
