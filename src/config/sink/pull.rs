//! Options of the `http_pull` sink.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Format;

/// Options of the `http_pull` sink.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct HttpPull {
    /// How a message is written. The key `format`, where it says anything but `native`, goes
    /// before it.
    pub message: Format,
    /// A message that is not acknowledged within this time, in milliseconds, goes to whoever asks
    /// next.
    #[schemars(range(min = 500))]
    pub ack_wait_ms: u64,
    /// A message that was delivered so often and not acknowledged becomes a dead letter. Without it
    /// a message is delivered for as long as it takes.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1), example = 20)]
    pub max_deliver: Option<u32>,
    /// Delivery stops at this many messages that nobody has acknowledged, or one batch above it.
    #[schemars(range(min = 1))]
    pub max_ack_pending: usize,
    /// Delivery stops at this many bytes of such messages, or one batch above it.
    #[schemars(range(min = 1))]
    pub pending_bytes_max: usize,
    /// Consumers that wait at one time; one more is answered 429.
    #[schemars(range(min = 1))]
    pub max_waiting: usize,
    /// Whether a change waits until the earlier changes of its key are acknowledged. Without it
    /// every message is independent.
    pub message_grouping: bool,
}

impl Default for HttpPull {
    fn default() -> Self {
        Self {
            message: Format::Sequin,
            ack_wait_ms: 30_000,
            max_deliver: None,
            max_ack_pending: 10_000,
            pending_bytes_max: 32 << 20,
            max_waiting: 20,
            message_grouping: true,
        }
    }
}
