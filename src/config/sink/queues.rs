//! Options of the `nats` and `rabbitmq` sinks.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::timeout_ms;
use crate::config::{Secret, yes};

/// Options of the `nats` sink.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Nats {
    /// The server, `nats://` or `tls://`, perhaps with `user:password@`; several of one cluster are
    /// separated by commas and tried in their order.
    #[schemars(example = "nats://localhost:4222")]
    pub url: Secret,
    /// The subject of each message: a template.
    #[serde(default = "dotted")]
    pub subject: String,
    /// `true`: each message waits for the acknowledgement of a stream. `false`: core NATS, where a
    /// message that nobody listens to is gone.
    #[serde(default = "yes")]
    pub jetstream: bool,
    /// The stream that the messages must land in; it is looked up when the sink connects. Absent:
    /// whichever stream has the subject.
    #[serde(default)]
    #[schemars(example = &"CHANGES")]
    pub stream: Option<String>,
    /// Creates `stream` where it is missing.
    #[serde(default)]
    pub create_stream: bool,
    /// The subjects of a stream that is created. Empty: `subject` with `*` for each field.
    #[serde(default)]
    pub stream_subjects: Vec<String>,
    /// The user, where the address names none.
    #[serde(default)]
    #[schemars(example = &"walrace")]
    pub username: Option<String>,
    /// The user's password.
    #[serde(default)]
    #[schemars(example = "${NATS_PASSWORD}")]
    pub password: Option<Secret>,
    /// A token, in place of a user.
    #[serde(default)]
    #[schemars(example = "${NATS_TOKEN}")]
    pub token: Option<Secret>,
    /// A credentials file (JWT and seed), in place of a user.
    #[serde(default)]
    #[schemars(example = "walrace.creds")]
    pub credentials: Option<PathBuf>,
    /// The seed of an NKey, in place of a user.
    #[serde(default)]
    #[schemars(example = "${NATS_NKEY_SEED}")]
    pub nkey_seed: Option<Secret>,
    /// Certificates (PEM) to trust in place of the system's.
    #[serde(default)]
    #[schemars(example = "ca.pem")]
    pub tls_ca: Option<PathBuf>,
    /// A connection or an acknowledgement that takes longer is an outage, in milliseconds.
    #[serde(default = "timeout_ms")]
    #[schemars(range(min = 1))]
    pub timeout_ms: u64,
}

/// Options of the `rabbitmq` sink.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Rabbitmq {
    /// The server and its virtual host, `amqp://` or `amqps://`; no path is the virtual host `/`.
    #[schemars(example = "amqp://localhost:5672")]
    pub url: Secret,
    /// The exchange. Empty: the default exchange, whose routing keys are the names of queues.
    #[serde(default)]
    pub exchange: String,
    /// The type of an exchange that is declared.
    #[serde(default = "exchange_type")]
    pub exchange_type: String,
    /// Declares the exchange, durable, when the sink connects. `false`: it must be there.
    #[serde(default = "yes")]
    pub declare: bool,
    /// The routing key of each message: a template.
    #[serde(default = "dotted")]
    pub routing_key: String,
    /// What to do about a message that no queue is bound for.
    #[serde(default)]
    pub unroutable: Unroutable,
    /// Certificates (PEM) to trust beside the system's.
    #[serde(default)]
    #[schemars(example = "ca.pem")]
    pub tls_ca: Option<PathBuf>,
    /// A connection or a confirm that takes longer is an outage, in milliseconds.
    #[serde(default = "timeout_ms")]
    #[schemars(range(min = 1))]
    pub timeout_ms: u64,
}

/// What the `rabbitmq` sink does about a message that no queue is bound for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Unroutable {
    /// The sink stops until a binding is there.
    #[default]
    Stop,
    /// The server drops it: for exchanges that are read only now and then.
    Drop,
}

fn dotted() -> String {
    "{source}.{schema}.{table}.{op}".into()
}

fn exchange_type() -> String {
    "topic".into()
}
