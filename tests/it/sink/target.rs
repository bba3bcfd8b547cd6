//! What the conformance suite asks of each kind of sink: its real server, and a look into it.

use std::time::Duration;

use async_trait::async_trait;
use serde_json::Value as Json;
use walrace::change::Change;

/// A real target, started, with a way to read back what is in it.
#[async_trait]
pub(crate) trait Target: Send {
    /// The sink's configuration, as JSON of what stands in `[sink.NAME]`: `{"kind": "...", ...}`,
    /// with `format` native where the kind has a choice.
    fn config(&self) -> Json;

    /// The same with a login that the server refuses; `None` where it has none.
    fn wrong_login(&self) -> Option<Json> {
        None
    }

    /// Ends the server at once, as a crash does; what it has acknowledged stays on its disk.
    async fn stop(&mut self);

    /// Starts it again, at the same address.
    async fn start(&mut self);

    /// Everything that it holds now, in its own order: for an event target the native envelopes
    /// (of a keyed one, in the order within each partition); for a state target one object
    /// `{"table": ..., "row": {...}}` for each row or document.
    async fn content(&mut self) -> Vec<Json>;

    /// The configuration for the ledger, which has tables without a key and logical messages too.
    fn ledger_config(&self) -> Json {
        self.config()
    }

    /// The pause after each transaction of the load: longer for a server that takes long to start.
    fn pause(&self) -> Duration {
        Duration::from_millis(4)
    }

    /// Whether what it has acknowledged is there after its server was down.
    fn is_durable(&self) -> bool {
        true
    }

    /// The tables of the ledger that it can take: those with a key, for a target that needs one.
    fn tables(&self) -> &'static [&'static str] {
        &["*"]
    }

    /// Its own steps at which the process is killed, such as `kafka::after_produce:2`.
    fn failpoints(&self) -> &'static [&'static str] {
        &[]
    }

    /// A change like `change` that this target refuses (too large, of a wrong type); `None` where
    /// it takes everything.
    fn refused(&self, change: Change) -> Option<Change> {
        let _ = change;
        None
    }
}
