//! The configuration: one TOML file, one struct tree; reference, schema and `--help` come from it.

use std::{collections::BTreeMap, path::PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{change::Op, error::Result};

/// `walrace.toml`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Journals, spool and catalog: one directory to back up or delete.
    pub data_dir: PathBuf,
    /// The databases that are captured, by name.
    pub source: BTreeMap<String, Source>,
    /// The destinations, by name.
    pub sink: BTreeMap<String, Sink>,
    /// How much each journal keeps and how it writes.
    pub journal: Journal,
    /// Health, metrics and the API.
    pub http: Http,
    /// What is logged, and how.
    pub log: Log,
}

/// A database that is captured.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Source {
    /// PostgreSQL 14 to 18, by logical replication.
    Postgres(Postgres),
}

/// A PostgreSQL source.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Postgres {
    /// `postgres://user:password@host:port/database?sslmode=verify-full&sslrootcert=ca.pem`; `host`
    /// may be a directory (`?host=/run/postgresql`) for a unix socket.
    pub url: Secret,
    /// Which tables: globs over `schema.table`; a leading `!` takes away. Empty: every table.
    #[serde(default)]
    pub tables: Vec<String>,
    /// The replication slot; by default `walrace_<source>`. One that exists is adopted.
    #[serde(default)]
    pub slot: Option<String>,
    /// The publication; by default `walrace_<source>`. One that exists is adopted.
    #[serde(default)]
    pub publication: Option<String>,
    /// The decoder on the server.
    #[serde(default)]
    pub plugin: Plugin,
    /// Publish changes of partitions under the name of their root table.
    #[serde(default = "yes")]
    pub publish_via_partition_root: bool,
    /// What to do with a table that has no replica identity.
    #[serde(default)]
    pub without_identity: WithoutIdentity,
    /// Whether Walrace may create the publication and the slot.
    #[serde(default = "yes")]
    pub create: bool,
    /// How often the table globs are compared with the tables that exist, in milliseconds.
    #[serde(default = "reconcile_ms")]
    pub reconcile_ms: u64,
}

/// The logical decoding plugin of a slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Plugin {
    /// Built into PostgreSQL.
    #[default]
    Pgoutput,
}

/// What to do with a table that has no replica identity: publishing its updates and deletes would
/// make the application's own statements fail.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum WithoutIdentity {
    /// Publish its inserts and truncates only, in a second publication.
    #[default]
    Inserts,
    /// Refuse to start, and name the table.
    Refuse,
}

/// A destination: what all kinds share, and what its kind adds.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct Sink {
    /// The source that it reads; needed only where there are several.
    #[serde(default)]
    pub source: Option<String>,
    /// Which tables: globs over `schema.table`; a leading `!` takes away. Empty: every table.
    #[serde(default)]
    pub tables: Vec<String>,
    /// Which schemas, by exact name. Empty: all.
    #[serde(default)]
    pub schemas: Vec<String>,
    /// Which operations. Empty: all. `read` always passes unless the list is without it and
    /// `reads = false`.
    #[serde(default)]
    pub operations: Vec<Op>,
    /// Where a new sink starts.
    #[serde(default)]
    pub from: From,
    /// How a change is written.
    #[serde(default)]
    pub format: Format,
    /// A batch has at most this many changes.
    #[serde(default = "batch_changes_max")]
    pub batch_changes_max: usize,
    /// A batch has at most this many bytes of rows, or a single change.
    #[serde(default = "batch_bytes_max")]
    pub batch_bytes_max: usize,
    /// A batch that is not full waits this long for more, in milliseconds.
    #[serde(default)]
    pub batch_ms_max: u64,
    /// The first wait after a failure, in milliseconds; it doubles, with jitter, up to
    /// `retry_ms_max`.
    #[serde(default = "retry_ms_min")]
    pub retry_ms_min: u64,
    /// The longest wait after a failure, in milliseconds.
    #[serde(default = "retry_ms_max")]
    pub retry_ms_max: u64,
    /// `always`: the journal never drops what this sink has not read, whatever its size.
    #[serde(default)]
    pub retain: Retain,
    /// The kind of target and its options.
    #[serde(flatten)]
    pub kind: SinkKind,
}

/// Where a new sink starts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum From {
    /// With the oldest change of the journal.
    #[default]
    Start,
    /// With the next change that is committed.
    Now,
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

/// The kind of a destination.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum SinkKind {
    /// The terminal or a pipe.
    Stdout(Stdout),
    /// JSON Lines with rotation.
    File(File),
    /// An HTTP endpoint.
    Webhook(Webhook),
    /// A bounded queue inside a Rust program that embeds Walrace.
    Queue(Queue),
    /// A user's HTTP program that answers for each change.
    Custom(Custom),
}

/// Options of the `stdout` sink.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Stdout {
    /// `auto`: for people on a terminal, JSON Lines in a pipe.
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
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct File {
    /// The file that is written; rotated ones carry their range of offsets in the name.
    pub path: PathBuf,
    /// Begin a new file when it would grow beyond this. 0: never.
    #[serde(default)]
    pub rotate_bytes_max: u64,
    /// Begin a new file when this one is older, in milliseconds. 0: never.
    #[serde(default)]
    pub rotate_ms_max: u64,
}

/// Options of the `webhook` sink.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Webhook {
    /// Where each request is POSTed.
    pub url: Secret,
    /// `true`: one request with `{"data":[...]}`; `false`: one request a change.
    #[serde(default = "yes")]
    pub batch: bool,
    /// Further headers, such as `authorization`.
    #[serde(default)]
    pub headers: BTreeMap<String, Secret>,
    /// A reply that takes longer is an outage, in milliseconds.
    #[serde(default = "timeout_ms")]
    pub timeout_ms: u64,
    /// Signs each request by the Standard Webhooks scheme: `whsec_` and base64, or plain text.
    #[serde(default)]
    pub signing_secret: Option<Secret>,
    /// Adds a plain hex HMAC-SHA256 of the body under this key.
    #[serde(default)]
    pub hmac_secret: Option<Secret>,
    /// The name of the plain HMAC's header.
    #[serde(default = "hmac_header")]
    pub hmac_header: String,
}

/// Options of the `queue` sink.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Queue {
    /// Changes that wait at most; then delivery to this sink blocks.
    pub capacity: usize,
}

/// Options of the `custom` sink.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Custom {
    /// Where each batch is POSTed; the reply has an outcome for each change.
    pub url: Secret,
    /// Further headers.
    #[serde(default)]
    pub headers: BTreeMap<String, Secret>,
    /// A reply that takes longer is an outage, in milliseconds.
    #[serde(default = "timeout_ms")]
    pub timeout_ms: u64,
}

/// How much each journal keeps and how it writes.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Journal {
    /// Changes older than this may go once every sink has them, in milliseconds.
    pub age_ms_max: u64,
    /// The journal may take this much disk; beyond it the sink farthest behind is released. 0: no
    /// limit but the disk.
    pub bytes_max: u64,
    /// A segment is closed at this size.
    pub segment_bytes_max: u64,
    /// Recent changes kept in memory for sinks that are caught up.
    pub ring_bytes_max: usize,
    /// This much of the volume stays free for the catalog and for recovery.
    pub reserve_bytes: u64,
}

/// The HTTP listener.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Http {
    /// Address and port; port 0 takes a free one. Empty: no HTTP.
    pub listen: String,
}

/// Logging.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// `info`, or filters such as `walrace=debug`.
    pub level: Option<String>,
    /// How lines are written.
    pub format: LogFormat,
}

/// How log lines are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// For people.
    #[default]
    Human,
    /// One JSON object a line.
    Json,
}

/// A text that is never shown: `Debug` and `Display` mask it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Wraps a text.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text itself; never log it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("***")
    }
}

impl Config {
    /// Parses and validates; `origin` names the file in errors.
    pub fn parse(_text: &str, _origin: &str) -> Result<Self> {
        Err(crate::error::Error::bug("not written yet"))
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            data_dir: PathBuf::from("walrace-data"),
            source: BTreeMap::new(),
            sink: BTreeMap::new(),
            journal: Journal::default(),
            http: Http::default(),
            log: Log::default(),
        }
    }
}

impl Default for Journal {
    fn default() -> Self {
        Self {
            age_ms_max: 7 * 24 * 3_600_000,
            bytes_max: 0,
            segment_bytes_max: 128 << 20,
            ring_bytes_max: 16 << 20,
            reserve_bytes: 256 << 20,
        }
    }
}

impl Default for Queue {
    fn default() -> Self {
        Self { capacity: 65_536 }
    }
}

impl Default for Http {
    fn default() -> Self {
        Self { listen: "127.0.0.1:7376".into() }
    }
}

fn yes() -> bool {
    true
}

fn reconcile_ms() -> u64 {
    10_000
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
