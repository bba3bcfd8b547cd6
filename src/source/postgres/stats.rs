//! What metrics and readiness read of an open source, without asking its thread.

use std::sync::atomic::{AtomicI64, AtomicU64};

/// Counters of one open source; all but `spool_bytes` grow.
#[derive(Debug, Default)]
pub struct Stats {
    /// The LSN that was received and handed over.
    pub received: AtomicU64,
    /// The end of the server's log, as far as the server has told.
    pub server_end: AtomicU64,
    /// The LSN that was last confirmed to the server.
    pub confirmed: AtomicU64,
    /// Changes handed over.
    pub changes: AtomicU64,
    /// Bytes read from the stream.
    pub bytes: AtomicU64,
    /// Disk that transactions take that are still open.
    pub spool_bytes: AtomicU64,
    /// When something was last handed over, in microseconds since 1970; 0: never.
    pub last_message_us: AtomicI64,
}
