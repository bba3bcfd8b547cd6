//! The destinations: what all kinds share, and the options of each kind.

use std::{collections::BTreeMap, path::PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

mod kafka;
mod postgres;
mod pull;
mod queues;
mod redis;
mod search;

pub use self::{kafka::*, postgres::*, pull::*, queues::*, redis::*, search::*};
use super::{From, Rules, Secret, yes};
use crate::change::Op;

/// A destination: what all kinds share, and what its kind adds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("unevaluatedProperties" = false))]
pub struct Sink {
    /// The source that it reads; needed only where there are several.
    #[serde(default)]
    #[schemars(example = &"app")]
    pub source: Option<String>,
    /// Which tables: globs over `schema.table`; a leading `!` takes away. Empty: every table.
    #[serde(default)]
    pub tables: Vec<String>,
    /// Which schemas, by exact name. Empty: all.
    #[serde(default)]
    pub schemas: Vec<String>,
    /// Which operations. Empty: all. It does not remove the rows of backfills; `reads` does.
    #[serde(default)]
    pub operations: Vec<Op>,
    /// Whether the rows of backfills (`read`) pass.
    #[serde(default = "yes")]
    pub reads: bool,
    /// Where a new sink starts: `start` (with the oldest change of the journal), `now`, an offset,
    /// a time such as `2026-04-06T09:14:22Z`, or a resume token.
    #[serde(default)]
    pub from: From,
    /// How a change is written.
    #[serde(default)]
    pub format: Format,
    /// A batch has at most this many changes. The `file` sink, whose readers see no batches, is
    /// bound by bytes alone.
    #[serde(default = "batch_changes_max")]
    #[schemars(range(min = 1))]
    pub batch_changes_max: usize,
    /// A batch has at most this many bytes of rows, or a single change.
    #[serde(default = "batch_bytes_max")]
    #[schemars(range(min = 1))]
    pub batch_bytes_max: usize,
    /// A batch that is not full waits this long for more, in milliseconds.
    #[serde(default)]
    pub batch_ms_max: u64,
    /// The first wait after a failure, in milliseconds; it doubles, with jitter, up to
    /// `retry_ms_max`.
    #[serde(default = "retry_ms_min")]
    #[schemars(range(min = 1))]
    pub retry_ms_min: u64,
    /// The longest wait after a failure, in milliseconds.
    #[serde(default = "retry_ms_max")]
    #[schemars(range(min = 1))]
    pub retry_ms_max: u64,
    /// Connections that write at the same time, each with the changes of its own keys; of use
    /// where the target takes long to answer. The order of each key is kept.
    #[serde(default = "one_lane", alias = "concurrency")]
    #[schemars(range(min = 1, max = 64))]
    pub lanes: usize,
    /// A change that the target refuses is tried so often, the first time counted, with waits as
    /// after a failure; then it is a dead letter. Outages never count.
    #[serde(default = "attempts_max")]
    #[schemars(range(min = 1))]
    pub attempts_max: u32,
    /// What becomes of the later changes of a dead letter's key.
    #[serde(default)]
    pub after_dead_letter: AfterDeadLetter,
    /// Refused changes, and those that wait behind them, are parked up to this many; then the sink
    /// waits until somebody makes room.
    #[serde(default = "parked_changes_max")]
    #[schemars(range(min = 1))]
    pub parked_changes_max: u64,
    /// Parked changes have at most this many bytes of rows.
    #[serde(default = "parked_bytes_max")]
    #[schemars(range(min = 1))]
    pub parked_bytes_max: u64,
    /// What the journal keeps for this sink when its disk runs short.
    #[serde(default)]
    pub retain: Retain,
    /// What it makes of changes before they are delivered.
    #[serde(flatten)]
    pub rules: Rules,
    /// The kind of target and its options.
    #[serde(flatten)]
    pub kind: SinkKind,
}

/// How a change is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// Walrace's own envelope.
    #[default]
    Native,
    /// Sequin's message.
    Sequin,
    /// The change event of Debezium's PostgreSQL connector, without a schema.
    Debezium,
    /// The same with its schema beside it, as Kafka Connect's `JsonConverter` writes it with
    /// `schemas.enable = true`.
    DebeziumSchema,
    /// The object of the output plugin wal2json with `format-version = 2`, one a change.
    Wal2json,
    /// CloudEvents 1.0 in structured mode: a JSON event with the native envelope as its data.
    Cloudevents,
    /// CloudEvents 1.0 in binary mode: the native envelope, with the attributes as headers `ce-*`.
    /// For sinks that have headers.
    CloudeventsBinary,
    /// WalStream's `ChangeRecord` in protobuf. For sinks whose messages may be any bytes.
    Walstream,
}

/// What becomes of the later changes of a dead letter's key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AfterDeadLetter {
    /// They wait until somebody retries, edits or drops it.
    #[default]
    Hold,
    /// They go on; should it be retried, it is marked late, or refused by targets that keep state.
    Release,
}

/// What the journal keeps for a sink when its disk runs short.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Retain {
    /// Until `journal.bytes_max`; then the sink farthest behind is released and its lost range
    /// recorded.
    #[default]
    Bounded,
    /// Everything that it has not read; capture pauses instead.
    Always,
}

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

impl Default for Queue {
    fn default() -> Self {
        Self { capacity: 65_536 }
    }
}

impl Sink {
    /// A sink of `kind` with the default of every other key.
    pub fn of(kind: SinkKind) -> Self {
        Self {
            source: None,
            tables: Vec::new(),
            schemas: Vec::new(),
            operations: Vec::new(),
            reads: true,
            from: From::default(),
            format: Format::default(),
            batch_changes_max: batch_changes_max(),
            batch_bytes_max: batch_bytes_max(),
            batch_ms_max: 0,
            retry_ms_min: retry_ms_min(),
            retry_ms_max: retry_ms_max(),
            lanes: one_lane(),
            attempts_max: attempts_max(),
            after_dead_letter: AfterDeadLetter::default(),
            parked_changes_max: parked_changes_max(),
            parked_bytes_max: parked_bytes_max(),
            retain: Retain::default(),
            rules: Rules::default(),
            kind,
        }
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

fn one_lane() -> usize {
    1
}

fn attempts_max() -> u32 {
    10
}

fn parked_changes_max() -> u64 {
    100_000
}

fn parked_bytes_max() -> u64 {
    1 << 30
}

fn batch_changes_max() -> usize {
    1_000
}

fn batch_bytes_max() -> usize {
    4 << 20
}

fn retry_ms_min() -> u64 {
    200
}

fn retry_ms_max() -> u64 {
    30_000
}

fn timeout_ms() -> u64 {
    30_000
}

fn hmac_header() -> String {
    "X-Sequin-Signature".into()
}
