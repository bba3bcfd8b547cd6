//! Options of the `kafka` sink.

use std::{collections::BTreeMap, path::PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::timeout_ms;
use crate::config::{Secret, yes};

/// Options of the `kafka` sink.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Kafka {
    /// Where the cluster is found: `["a:9092", "b:9092"]` or `"a:9092,b:9092"`.
    #[schemars(example = "localhost:9092")]
    pub brokers: Brokers,
    /// The topic of each change: a text with fields such as `{schema}` and `{table}`.
    #[serde(default = "kafka_topic")]
    pub topic: String,
    /// How the producer compresses.
    #[serde(default)]
    pub compression: Compression,
    /// `true`: changes and progress in one Kafka transaction. `false`: at least once, for clusters
    /// without transactions.
    #[serde(default = "yes")]
    pub transactional: bool,
    /// The id that shuts out a second writer; `walrace-`, the history's id, `-` and the sink's name
    /// where none is given.
    #[serde(default)]
    #[schemars(example = "walrace-bookings")]
    pub transactional_id: Option<String>,
    /// The compacted topic of one partition that keeps the progress, under the sink's name.
    #[serde(default = "kafka_progress_topic")]
    pub progress_topic: String,
    /// Whether a missing topic is created.
    #[serde(default = "yes")]
    pub create_topics: bool,
    /// Partitions of a topic that is created; else what the brokers' `num.partitions` says.
    #[serde(default)]
    #[schemars(range(min = 1), example = 6)]
    pub partitions: Option<u16>,
    /// Copies of each partition of a topic that is created; else what the brokers'
    /// `default.replication.factor` says.
    #[serde(default)]
    #[schemars(range(min = 1), example = 3)]
    pub replication_factor: Option<u16>,
    /// Whether to go on after the count of a topic's partitions changed, although later changes of
    /// a key may then lie in another partition than earlier ones.
    #[serde(default)]
    pub allow_partition_change: bool,
    /// How to log in; with it come `username` and `password`.
    #[serde(default)]
    #[schemars(example = &"scram_sha_512")]
    pub sasl_mechanism: Option<SaslMechanism>,
    /// The user's name.
    #[serde(default)]
    #[schemars(example = &"walrace")]
    pub username: Option<String>,
    /// The user's password.
    #[serde(default)]
    #[schemars(example = "${KAFKA_PASSWORD}")]
    pub password: Option<Secret>,
    /// Whether to connect by TLS.
    #[serde(default)]
    pub tls: bool,
    /// Certificates to trust, as PEM; else the system's.
    #[serde(default)]
    #[schemars(example = "/etc/walrace/kafka-ca.pem")]
    pub tls_ca: Option<PathBuf>,
    /// A cluster that takes longer to answer or to commit is an outage, in milliseconds.
    #[serde(default = "timeout_ms")]
    #[schemars(range(min = 1_000, max = 400_000))]
    pub timeout_ms: u64,
    /// A larger message (key, value and headers) is refused here, in bytes; not more than the
    /// topics' `max.message.bytes`.
    #[serde(default = "kafka_message_bytes_max")]
    #[schemars(range(min = 1_000, max = 1_000_000_000))]
    pub message_bytes_max: usize,
    /// Further settings of librdkafka, by its own names.
    #[serde(default)]
    pub properties: BTreeMap<String, Secret>,
}

/// Addresses of brokers: a list, or one text with commas.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Brokers {
    /// `"a:9092,b:9092"`.
    Text(String),
    /// `["a:9092", "b:9092"]`.
    List(Vec<String>),
}

/// How a Kafka producer compresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Compression {
    /// Not at all.
    None,
    /// The densest for most rows, and the slowest.
    Gzip,
    /// Fast.
    Snappy,
    /// Fast, and what every client reads.
    #[default]
    Lz4,
    /// Nearly as dense as gzip, and faster.
    Zstd,
}

/// How to log in to Kafka.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SaslMechanism {
    /// The password itself; over TLS only.
    Plain,
    /// SCRAM-SHA-256.
    #[serde(rename = "scram_sha_256")]
    ScramSha256,
    /// SCRAM-SHA-512.
    #[serde(rename = "scram_sha_512")]
    ScramSha512,
}

fn kafka_topic() -> String {
    "{source}.{schema}.{table}".into()
}

fn kafka_progress_topic() -> String {
    "walrace.progress".into()
}

fn kafka_message_bytes_max() -> usize {
    1_000_000
}
