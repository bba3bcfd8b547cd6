//! How a source's backfills are read.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How backfills read the tables of a source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Backfill {
    /// Connections that read side by side.
    #[schemars(range(min = 1, max = 64))]
    pub workers: u32,
    /// Rows that a worker has in memory, in bytes: it reads the second half of a chunk while the
    /// first goes into the journal. After a crash a worker reads at most one chunk again.
    #[schemars(range(min = 65_536))]
    pub chunk_bytes_max: usize,
    /// A chunk's transaction should take no longer than this, in milliseconds: chunks are made
    /// smaller where they do.
    #[schemars(range(min = 1))]
    pub chunk_ms: u64,
    /// A backfill for one sink waits while that sink is farther behind than this. 0: no limit.
    pub sink_behind_bytes_max: u64,
}

impl Default for Backfill {
    fn default() -> Self {
        Self { workers: 2, chunk_bytes_max: 8 << 20, chunk_ms: 500, sink_behind_bytes_max: 1 << 30 }
    }
}
