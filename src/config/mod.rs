//! The configuration: one TOML file, one struct tree; checks, reference, schema and the names of
//! environment variables all come from the docs and types of these structs.
//!
//! ```text
//! text ─ document ─ environment ─ read (by shape) ─ serde ─ cdc ─ validate ─► Config
//! ```

use std::{collections::BTreeMap, path::PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::change::Op;

mod cdc;
mod document;
mod environment;
mod from;
mod glob;
mod interpolate;
mod load;
mod read;
mod reference;
mod secret;
mod shape;
#[cfg(test)]
mod tests;
mod validate;

pub(crate) use self::interpolate::escape;
pub use self::{
    cdc::{Cdc, Emitter},
    environment::Environment,
    from::From,
    glob::Globs,
    secret::Secret,
};

/// `walrace.toml`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Journals, spool and catalog: one directory to back up or delete.
    pub data_dir: PathBuf,
    /// The directory of dead letters; by default `dead-letters` in `data_dir`.
    #[schemars(example = "/var/lib/walrace/dead-letters")]
    pub dlq_path: Option<PathBuf>,
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
    /// One emitter in five keys: a shorthand for a sink named `cdc`, which it becomes on loading.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cdc: Option<Cdc>,
}

/// A database that is captured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Source {
    /// PostgreSQL 14 to 18, by logical replication.
    Postgres(Postgres),
}

/// A PostgreSQL source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Postgres {
    /// `postgres://user:password@host:port/database?sslmode=verify-full&sslrootcert=ca.pem`; `host`
    /// may be a directory (`?host=/run/postgresql`) for a unix socket. What `${...}` puts into user
    /// and password is percent-encoded for you.
    #[schemars(example = "postgres://walrace:${PGPASSWORD}@localhost:5432/app")]
    pub url: Secret,
    /// Which tables: globs over `schema.table`; a leading `!` takes away. Empty: every table.
    #[serde(default)]
    pub tables: Vec<String>,
    /// The replication slot; by default `walrace_<source>`. One that exists is adopted.
    #[serde(default)]
    #[schemars(example = &"walrace_app")]
    pub slot: Option<String>,
    /// The publication; by default `walrace_<source>`. One that exists is adopted.
    #[serde(default)]
    #[schemars(example = &"walrace_app")]
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
    #[schemars(range(min = 1))]
    pub reconcile_ms: u64,
    /// When the server keeps more log than this for our slot, `wal_retained_policy` says what
    /// happens. 0: no limit.
    #[serde(default)]
    pub wal_retained_bytes_max: u64,
    /// What happens at `wal_retained_bytes_max`.
    #[serde(default)]
    pub wal_retained_policy: WalRetainedPolicy,
    /// The largest change (old and new row together, as the server sends them) that is read into
    /// memory. A larger one stops the source and says so; nothing is lost. PostgreSQL's own limit
    /// is 1 GiB.
    #[serde(default = "change_bytes_max")]
    #[schemars(range(min = 1_048_576, max = 1_073_741_824))]
    pub change_bytes_max: usize,
}

/// What happens when the server keeps more log for our slot than it should.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum WalRetainedPolicy {
    /// Say so in the log, the metrics and the readiness.
    #[default]
    Alert,
    /// Drop the slot to save the primary. The source then stops and names the gap.
    DropSlot,
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
    /// What the journal keeps for this sink when its disk runs short.
    #[serde(default)]
    pub retain: Retain,
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
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
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

/// How much each journal keeps and how it writes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Journal {
    /// Changes older than this may go once every sink has them, in milliseconds.
    pub age_ms_max: u64,
    /// The journal may take this much disk; beyond it the sink farthest behind is released. 0: no
    /// limit but the disk.
    pub bytes_max: u64,
    /// A segment is closed at this size.
    #[schemars(range(min = 65_536))]
    pub segment_bytes_max: u64,
    /// Recent changes kept in memory for sinks that are caught up.
    pub ring_bytes_max: usize,
    /// This much of the volume stays free for the catalog and for recovery.
    pub reserve_bytes: u64,
}

/// The HTTP listener.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Http {
    /// Address and port; port 0 takes a free one. Empty: no HTTP.
    pub listen: String,
}

/// Logging.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// `info`, or filters such as `walrace=debug`.
    #[schemars(example = &"info")]
    pub level: Option<String>,
    /// How lines are written.
    pub format: LogFormat,
}

/// How log lines are written.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// For people.
    #[default]
    Human,
    /// One JSON object a line.
    Json,
}

impl Config {
    /// The source that `sink` reads: the one it names, else the only one.
    pub fn source_of<'a>(&'a self, sink: &'a Sink) -> &'a str {
        let only = || self.source.keys().next().map_or("", String::as_str);
        sink.source.as_deref().unwrap_or_else(only)
    }

    /// The directory of dead letters.
    pub fn dead_letters(&self) -> PathBuf {
        self.dlq_path.clone().unwrap_or_else(|| self.data_dir.join("dead-letters"))
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            data_dir: PathBuf::from("walrace-data"),
            dlq_path: None,
            source: BTreeMap::new(),
            sink: BTreeMap::new(),
            journal: Journal::default(),
            http: Http::default(),
            log: Log::default(),
            cdc: None,
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

fn change_bytes_max() -> usize {
    256 << 20
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
