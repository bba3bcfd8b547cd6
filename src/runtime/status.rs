//! What a running Walrace says about itself: `/status`, `walrace lag`, metrics and readiness.

use serde::{Deserialize, Serialize};

use super::part::State;
use crate::{
    catalog::{BackfillState, NewBackfill},
    change::{Lsn, Timestamp},
    journal::Info,
    sink::Totals,
};

/// The whole process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// The version that runs.
    pub version: String,
    /// When it started.
    pub started_at: Timestamp,
    /// Each source, by name.
    pub sources: Vec<SourceStatus>,
    /// Each sink, by name.
    pub sinks: Vec<SinkStatus>,
    /// Backfills that have not ended, and the last ones that have.
    #[serde(default)]
    pub backfills: Vec<BackfillStatus>,
}

/// One backfill.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BackfillStatus {
    /// Its number.
    pub id: u64,
    /// What was asked for.
    #[serde(flatten)]
    pub asked: NewBackfill,
    /// What it is doing.
    pub state: BackfillState,
    /// Why it is not at work, or what it waits for.
    pub reason: Option<String>,
    /// Blocks of the tables, and how many of them are done.
    pub blocks: u64,
    /// Blocks that are done.
    pub blocks_done: u64,
    /// PostgreSQL's estimate of the rows.
    pub rows_estimated: u64,
    /// Rows that were read.
    pub rows: u64,
    /// Bytes of those rows.
    pub bytes: u64,
    /// Rows a second since it last began.
    pub rows_per_second: Option<u64>,
    /// Seconds that are left at the rate since it last began.
    pub seconds_left: Option<u64>,
    /// Chunks that were read in vain, and again, since the start.
    pub chunks_again: u64,
    /// When it was asked for.
    pub created_at: Timestamp,
    /// When it was done or given up.
    pub ended_at: Option<Timestamp>,
}

/// One source with its journal.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SourceStatus {
    /// Its name.
    pub name: String,
    /// What it is doing.
    #[serde(flatten)]
    pub state: State,
    /// Since when.
    pub since: Timestamp,
    /// The end of the server's WAL, as it last told us.
    pub server: Option<Lsn>,
    /// What we confirmed.
    pub confirmed: Option<Lsn>,
    /// WAL written and not confirmed.
    pub behind_bytes: Option<u64>,
    /// WAL that the server keeps for the slot.
    pub retained_wal_bytes: Option<u64>,
    /// The limit that was set for it; 0: none.
    #[serde(default)]
    pub wal_retained_bytes_max: u64,
    /// Seconds for which the server's WAL has moved and the slot has not.
    pub stalled_seconds: u64,
    /// Changes captured since the start.
    pub captured_changes: u64,
    /// What the journal holds.
    pub journal: Info,
    /// The journal's limit, `journal.bytes_max`; 0 is none.
    pub journal_bytes_max: u64,
    /// What stays free on the journal's volume, `journal.reserve_bytes`.
    pub journal_reserve_bytes: u64,
    /// What is free on the journal's volume, as the running process last saw it.
    pub journal_free_bytes: Option<u64>,
    /// Disk that transactions take that are still open.
    #[serde(default)]
    pub spool_bytes: u64,
}

/// One sink.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SinkStatus {
    /// Its name.
    pub name: String,
    /// The source that it reads.
    pub source: String,
    /// What it is doing.
    #[serde(flatten)]
    pub state: State,
    /// Since when.
    pub since: Timestamp,
    /// The offset after the last change that it has.
    pub cursor: u64,
    /// The cursor that survives a crash.
    pub recorded: u64,
    /// Changes in the journal that it does not have.
    pub behind_changes: u64,
    /// Journal bytes that it has not passed.
    pub behind_bytes: u64,
    /// Age of the oldest change that it does not have, in milliseconds.
    pub behind_ms: u64,
    /// Offsets that it will never get: the journal dropped them for want of disk.
    pub lost_changes: u64,
    /// Changes that were refused, or wait behind one that was; dead letters among them.
    #[serde(default)]
    pub parked_changes: u64,
    /// Parked changes whose attempts are used up: a person decides.
    #[serde(default)]
    pub dead_letters: u64,
    /// Bytes of the parked changes' rows.
    #[serde(default)]
    pub parked_bytes: u64,
    /// The limit; at it the sink waits.
    #[serde(default)]
    pub parked_changes_max: u64,
    /// Columns that a `mask` or a `drop` names in full and that no table had since the start.
    #[serde(default)]
    pub unmatched_columns: u64,
    /// Changes that a rule, or the format, kept from it since the start.
    pub filtered_changes: u64,
    /// Sums since the start.
    #[serde(flatten)]
    pub totals: Totals,
}

/// The server's WAL may move for this long without the slot before we are not ready.
const STALLED_SECONDS_MAX: u64 = 30;

impl Status {
    /// Why it is not ready, or nothing when it is: every source runs and its slot moves when WAL
    /// does, the server keeps no more of it than allowed, and no sink has stopped. A sink that
    /// waits for its target does not make us unready: the journal holds its changes.
    pub fn unready(&self) -> Vec<String> {
        let mut reasons = Vec::new();
        for source in &self.sources {
            match source.state.reason() {
                Some(reason) => reasons.push(format!("source {}: {reason}", source.name)),
                None if !source.state.is_running() => {
                    reasons.push(format!("source {} is {}", source.name, source.state.word()));
                }
                None if source.stalled_seconds >= STALLED_SECONDS_MAX => reasons.push(format!(
                    "source {}: the server's WAL moves and the slot has not for {} s",
                    source.name, source.stalled_seconds
                )),
                None => {}
            }
            let (limit, bytes) = (source.wal_retained_bytes_max, source.retained_wal_bytes);
            if let Some(bytes) = bytes.filter(|bytes| limit > 0 && *bytes > limit) {
                reasons.push(format!(
                    "source {}: the server keeps {bytes} bytes of log for the slot, more than \
                     wal_retained_bytes_max = {limit}",
                    source.name
                ));
            }
        }
        for sink in self.sinks.iter().filter(|sink| sink.state.is_stopped()) {
            let reason = sink.state.reason().unwrap_or_default();
            reasons.push(format!("sink {}: {reason}", sink.name));
        }
        reasons
    }
}
