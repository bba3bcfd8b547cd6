//! The configuration: one TOML file, one struct tree; checks, reference, schema and the names of
//! environment variables all come from the docs and types of these structs.
//!
//! ```text
//! text ─ document ─ environment ─ read (by shape) ─ serde ─ cdc ─ validate ─► Config
//! ```

use std::{collections::BTreeMap, path::PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

mod backfill;
mod cdc;
mod contracts;
mod document;
mod environment;
mod from;
mod glob;
mod interpolate;
mod load;
mod read;
mod reference;
mod rules;
mod secret;
mod shape;
mod sink;
#[cfg(test)]
mod tests;
mod validate;

pub use self::{
    backfill::Backfill,
    cdc::{Cdc, Emitter},
    contracts::{Compatibility, Contract, OnBreach},
    environment::Environment,
    from::From,
    glob::Globs,
    rules::{Mask, Outbox, Rules, Step},
    secret::Secret,
    sink::*,
};
pub(crate) use self::{glob::matches as glob_matches, interpolate::escape, read::nearest};

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
    /// Who may use the routes below `/api`. Without any, only a listener on this machine alone
    /// (loopback) answers them, to everybody.
    pub api_tokens: Vec<ApiToken>,
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
    /// The url of the primary, where `url` leads to a standby (PostgreSQL 16 and later): what
    /// a standby cannot write, such as the publication, is written there.
    #[serde(default)]
    #[schemars(example = "postgres://walrace:${PGPASSWORD}@primary:5432/app")]
    pub primary_url: Option<Secret>,
    /// Which tables: globs over `schema.table`; a leading `!` takes away. Empty: every table.
    #[serde(default)]
    pub tables: Vec<String>,
    /// The replication slot; by default `walrace_<source>`. One that exists is adopted.
    #[serde(default)]
    #[schemars(example = &"walrace_app")]
    pub slot: Option<String>,
    /// The publication; by default `walrace_<source>`. One that exists is adopted. For `pgoutput`
    /// only.
    #[serde(default)]
    #[schemars(example = &"walrace_app")]
    pub publication: Option<String>,
    /// The decoder on the server. A slot keeps the one that it was made with.
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
    /// How backfills read its tables.
    #[serde(default)]
    pub backfill: Backfill,
    /// Large transactions are sent while they are still open, and kept on our disk until they
    /// commit. `false`: the server keeps them, and sends each at its commit.
    #[serde(default = "yes")]
    pub streaming: bool,
    /// How much of all open transactions the server gathers in memory before it sends the largest
    /// (or writes it to its own disk, without `streaming`): `logical_decoding_work_mem` of our
    /// connection. Less than 65536 counts as that. 0: as the server is set up.
    #[serde(default = "decoding_bytes_max")]
    pub decoding_bytes_max: u64,
    /// Which readers new versions of a table must not break: docs/schema-changes.md.
    #[serde(default)]
    pub compatibility: Vec<Compatibility>,
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
    /// wal2json 2.5 or newer, with `format-version` 2. It needs no publication, and has to be
    /// installed at the server.
    Wal2json,
}

impl Plugin {
    /// Its name, as the server has it.
    pub fn name(self) -> &'static str {
        match self {
            Plugin::Pgoutput => "pgoutput",
            Plugin::Wal2json => "wal2json",
        }
    }
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

/// How much each journal keeps and how it writes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Journal {
    /// Changes older than this may go once every sink has them, in milliseconds.
    pub age_ms_max: u64,
    /// The journal may take this much disk. Beyond it capture waits up to a minute for sinks that
    /// are at work; then the sink farthest behind is released. 0: no limit but the disk.
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

/// A bearer token of the API.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ApiToken {
    /// What it is called.
    #[schemars(example = &"strait")]
    pub name: String,
    /// The token itself: `authorization: Bearer ...`.
    #[schemars(example = "${SEQUIN_API_TOKEN}")]
    pub token: Secret,
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
            api_tokens: Vec::new(),
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

fn decoding_bytes_max() -> u64 {
    64 << 20
}
