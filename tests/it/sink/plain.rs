//! The conformance suite over the sinks that need no server of others.

use async_trait::async_trait;
use serde_json::{Value as Json, json};
use tempfile::TempDir;
use walrace::change::{Change, Row, Value};

use super::{
    conformance::{holds_as_a_sink, holds_through_kills},
    target::Target,
};
use crate::kit::{FileRecorder, Recorder};

/// The sink `file` in a folder of its own.
pub(crate) struct FileTarget {
    folder: TempDir,
}

impl FileTarget {
    pub(crate) fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }
}

#[async_trait]
impl Target for FileTarget {
    fn config(&self) -> Json {
        json!({"kind": "file", "path": self.folder.path().join("lake.jsonl")})
    }

    /// A disk does not go away; `full_disk.rs` has what happens when it is full.
    async fn stop(&mut self) {}

    async fn start(&mut self) {}

    async fn content(&mut self) -> Vec<Json> {
        FileRecorder::new(self.folder.path().join("lake.jsonl")).changes()
    }

    fn failpoints(&self) -> &'static [&'static str] {
        &["file::after_data:3", "file::after_data_sync:2", "file::after_sidecar:3"]
    }

    /// Not UTF-8, so that it has no JSON.
    fn refused(&self, change: Change) -> Option<Change> {
        let row = Row::from_values([Value::Text(b"24"), Value::Text(b"\xff")]);
        Some(Change { after: Some(row), ..change })
    }
}

/// The sink `webhook` and who receives its requests.
pub(crate) struct WebhookTarget {
    hook: Recorder,
    lanes: usize,
}

impl WebhookTarget {
    pub(crate) async fn start(lanes: usize) -> Self {
        Self { hook: Recorder::start().await, lanes }
    }
}

#[async_trait]
impl Target for WebhookTarget {
    fn config(&self) -> Json {
        json!({"kind": "webhook", "url": self.hook.url(), "timeout_ms": 2_000, "lanes": self.lanes})
    }

    async fn stop(&mut self) {
        self.hook.go_down().await;
    }

    async fn start(&mut self) {
        self.hook.come_back().await;
    }

    async fn content(&mut self) -> Vec<Json> {
        self.hook.changes()
    }

    fn refused(&self, change: Change) -> Option<Change> {
        self.hook.refuse(|change| change["after"]["v"] == "no");
        let row = Row::from_values([Value::Text(b"24"), Value::Text(b"no")]);
        Some(Change { after: Some(row), ..change })
    }
}

#[tokio::test]
async fn the_file_sink_conforms() {
    let mut target = FileTarget::new();
    holds_as_a_sink(&mut target).await;
    holds_through_kills(&mut FileTarget::new()).await;
}

#[tokio::test]
async fn the_webhook_sink_conforms_with_one_lane_and_with_four() {
    for lanes in [1, 4] {
        let mut target = WebhookTarget::start(lanes).await;
        holds_as_a_sink(&mut target).await;
        target.hook.refuse_nothing();
        holds_through_kills(&mut target).await;
    }
}
