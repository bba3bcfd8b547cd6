//! Counters of one sink.

use std::{
    sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use crate::change::{Batch, Timestamp};

/// What one sink has done since the process began; written by its loop, read by status and metrics.
#[derive(Debug, Default)]
pub struct SinkStats {
    cursor: AtomicU64,
    recorded: AtomicU64,
    record_wanted: AtomicBool,
    changes: AtomicU64,
    bytes: AtomicU64,
    batches: AtomicU64,
    failures: AtomicU64,
    filtered: AtomicU64,
    refused: AtomicU64,
    parked: AtomicU64,
    dead: AtomicU64,
    parked_bytes: AtomicU64,
    unmatched: AtomicU64,
    parked_alarm: AtomicBool,
    commit_time: AtomicI64,
    moved_at: AtomicI64,
}

impl SinkStats {
    /// A loop begins, or begins again, at `cursor`; the catalog has `recorded`.
    pub fn begin(&self, cursor: u64, recorded: u64) {
        self.cursor.store(cursor, Relaxed);
        self.recorded.store(recorded, Relaxed);
    }

    /// A batch is durable at the target, and everything below `cursor` with it.
    pub fn delivered(&self, batch: &Batch, cursor: u64) {
        self.cursor.store(cursor, Relaxed);
        self.changes.fetch_add(batch.changes.len() as u64, Relaxed);
        self.bytes.fetch_add(batch.bytes() as u64, Relaxed);
        self.batches.fetch_add(1, Relaxed);
        self.moved_at.store(Timestamp::now().0, Relaxed);
        if let Some(change) = batch.changes.last() {
            self.commit_time.store(change.transaction.commit_time.0, Relaxed);
        }
    }

    /// Whether something was delivered not longer ago than `time`.
    pub fn moved_within(&self, time: Duration) -> bool {
        let time = i64::try_from(time.as_micros()).unwrap_or(i64::MAX);
        Timestamp::now().0.saturating_sub(self.moved_at.load(Relaxed)) <= time
    }

    /// The cursor is durable, whatever happens to this process.
    pub fn record(&self, cursor: u64) {
        self.cursor.fetch_max(cursor, Relaxed);
        self.recorded.store(cursor, Relaxed);
        self.record_wanted.store(false, Relaxed);
    }

    /// Somebody waits for the cursor to become durable.
    pub fn want_record(&self) {
        self.record_wanted.store(true, Relaxed);
    }

    /// Whether somebody waits for the cursor to become durable.
    pub fn is_record_wanted(&self) -> bool {
        self.record_wanted.load(Relaxed)
    }

    /// A rule kept changes from the sink.
    pub fn filter(&self, changes: usize) {
        self.filtered.fetch_add(changes as u64, Relaxed);
    }

    /// Changes that a rule kept from the sink.
    pub fn filtered(&self) -> u64 {
        self.filtered.load(Relaxed)
    }

    /// A change was refused, by the target or by a rule.
    pub fn park(&self) {
        self.refused.fetch_add(1, Relaxed);
    }

    /// Parked changes were delivered.
    pub fn redelivered(&self, changes: usize) {
        self.changes.fetch_add(changes as u64, Relaxed);
    }

    /// How many changes are parked, how many of them are dead letters and their bytes; `alarm`:
    /// near the limit. True when the alarm is new.
    pub fn show_parked(&self, counts: (u64, u64, u64), alarm: bool) -> bool {
        self.set_parked(counts);
        !self.parked_alarm.swap(alarm, Relaxed) && alarm
    }

    /// As `show_parked`, by one who knows of no alarm.
    pub fn set_parked(&self, (parked, dead, bytes): (u64, u64, u64)) {
        self.parked.store(parked, Relaxed);
        self.dead.store(dead, Relaxed);
        self.parked_bytes.store(bytes, Relaxed);
    }

    /// How many changes are parked, how many of them are dead letters, and their bytes.
    pub fn parked(&self) -> (u64, u64, u64) {
        (self.parked.load(Relaxed), self.dead.load(Relaxed), self.parked_bytes.load(Relaxed))
    }

    /// So many columns were to be hidden or taken away, and are in no table that came so far.
    pub fn set_unmatched(&self, columns: usize) {
        self.unmatched.store(columns as u64, Relaxed);
    }

    /// See `set_unmatched`.
    pub fn unmatched(&self) -> u64 {
        self.unmatched.load(Relaxed)
    }

    /// An attempt failed.
    pub fn fail(&self) {
        self.failures.fetch_add(1, Relaxed);
    }

    /// The offset after the last change that the target has.
    pub fn cursor(&self) -> u64 {
        self.cursor.load(Relaxed)
    }

    /// The cursor that is durable: what retention may rely on.
    pub fn recorded(&self) -> u64 {
        self.recorded.load(Relaxed)
    }

    /// Changes and batches delivered, bytes of their rows, and failures.
    pub fn totals(&self) -> Totals {
        Totals {
            changes: self.changes.load(Relaxed),
            bytes: self.bytes.load(Relaxed),
            batches: self.batches.load(Relaxed),
            failures: self.failures.load(Relaxed),
            refused: self.refused.load(Relaxed),
        }
    }
}

/// Sums since the process began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Totals {
    /// Changes delivered.
    pub changes: u64,
    /// Bytes of their rows.
    pub bytes: u64,
    /// Batches delivered.
    pub batches: u64,
    /// Attempts that failed.
    pub failures: u64,
    /// Changes that the target, or a rule, refused.
    #[serde(default)]
    pub refused: u64,
}
