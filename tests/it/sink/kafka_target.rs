//! Kafka as the conformance suite sees it.

use std::time::Duration;

use async_trait::async_trait;
use serde_json::{Value as Json, json};
use walrace::change::{Change, Row, Value};

use super::{
    conformance::conforms,
    kafka::{config, login},
    target::Target,
};
use crate::kit::{Isolation, Kafka, Record};

/// The broker, and what the conformance suite asks of it.
pub(crate) struct KafkaTarget(pub(crate) Kafka);

#[async_trait]
impl Target for KafkaTarget {
    fn config(&self) -> Json {
        config(&self.0, json!({}))
    }

    fn wrong_login(&self) -> Option<Json> {
        Some(login(&self.0, json!({"sasl_mechanism": "scram_sha_256", "password": "wrong"})))
    }

    fn pause(&self) -> Duration {
        Duration::from_millis(20)
    }

    fn failpoints(&self) -> &'static [&'static str] {
        &["kafka::after_produce:2", "kafka::before_commit:3", "kafka::after_commit:2"]
    }

    async fn stop(&mut self) {
        self.0.down();
    }

    async fn start(&mut self) {
        self.0.up().await;
    }

    async fn content(&mut self) -> Vec<Json> {
        self.0.records(Isolation::Committed).await.iter().map(Record::json).collect()
    }

    /// Larger than `message_bytes_max`.
    fn refused(&self, mut change: Change) -> Option<Change> {
        let count = change.after.as_ref()?.len();
        let long = "x".repeat(1_000_001);
        let row = change.after.as_ref()?.values().take(count - 1);
        let row: Vec<Value> = row.chain([Value::Text(long.as_bytes())]).collect();
        change.after = Some(Row::from_values(row));
        Some(change)
    }
}

#[tokio::test]
async fn the_kafka_sink_conforms() {
    conforms(&mut KafkaTarget(Kafka::start().await)).await;
}
