//! The destinations: what all kinds share; each kind's own options are in `kinds.rs`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

mod kafka;
mod kinds;
#[cfg(test)]
mod pages;
mod postgres;
mod pull;
mod queues;
mod search;
mod types;

pub use self::{kafka::*, kinds::*, postgres::*, pull::*, queues::*, search::*, types::*};
use super::{Contract, From, OnBreach, Rules, yes};
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
    /// Whether a new sink begins with a backfill: the rows that its tables have already, as `read`
    /// changes beside the stream. A sink that has begun is not asked again; `walrace backfill
    /// start --sink` is for that.
    #[serde(default)]
    pub backfill: bool,
    /// How a change is written.
    #[serde(default)]
    pub format: Format,
    /// A batch has at most this many changes. Sinks whose readers see no batches, `file` and
    /// transactional `kafka`, are bound by bytes alone.
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
    /// How values of some types are written: docs/types.md. What is not said here is as
    /// PostgreSQL's `to_jsonb` has it.
    #[serde(default)]
    pub types: Types,
    /// The columns and types that it needs: docs/schema-changes.md.
    #[serde(default)]
    pub contract: Vec<Contract>,
    /// What happens to changes of a table that lacks what a contract needs.
    #[serde(default)]
    pub on_breach: OnBreach,
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
            backfill: false,
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
            types: Types::default(),
            contract: Vec::new(),
            on_breach: OnBreach::default(),
            rules: Rules::default(),
            kind,
        }
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
