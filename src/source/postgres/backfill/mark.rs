//! Watermarks: logical messages of ours that fence the chunks of a backfill in the source's own
//! log, and that the journal keeps beside the rows.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::place::Place;
use crate::change::{Change, WATERMARK_PREFIX};

/// The content of a watermark.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// The journal that the backfill fills: marks of another Walrace are none of ours.
    pub lineage: Uuid,
    /// The backfill's number.
    pub backfill: u64,
    /// The part of it.
    pub part: u32,
    /// The table, for people.
    pub table: String,
    /// The chunk that ends here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub closes: Option<Closes>,
    /// The fence that begins here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub opens: Option<u64>,
}

/// The chunk that a watermark closes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Closes {
    /// Its fence.
    pub fence: u64,
    /// Up to where the part has been read, that row included.
    pub to: Place,
    /// Rows that were read, also those that lost to a change inside the fence.
    pub rows: u64,
    /// Bytes of those rows.
    pub bytes: u64,
    /// Nothing of the part is left.
    pub done: bool,
}

impl Mark {
    /// The mark that a change is, if it is one.
    pub fn of(change: &Change) -> Option<Self> {
        let message = change.message.as_ref().filter(|m| m.prefix == WATERMARK_PREFIX)?;
        serde_json::from_slice(&message.content).ok()
    }
}
