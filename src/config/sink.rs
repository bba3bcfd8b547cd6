//! The destinations: what all kinds share, and the options of each kind.

use std::{collections::BTreeMap, path::PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{From, Secret, yes};
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
            /// Documents in OpenSearch or Elasticsearch.
            #[serde(alias = "elasticsearch")]
            Opensearch => opensearch::Opensearch,
            /// Objects in a bucket or a local folder: JSON Lines or Parquet.
            ObjectStore => object_store::ObjectStore,
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
    pub on_truncate: OnTruncate,
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
pub enum OnTruncate {
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
    pub compression: Compression,
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
pub enum Compression {
    /// Not at all.
    #[default]
    None,
    /// Zstandard; the extension gets `.zst`.
    Zstd,
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
            retain: Retain::default(),
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

fn hmac_header() -> String {
    "X-Sequin-Signature".into()
}
