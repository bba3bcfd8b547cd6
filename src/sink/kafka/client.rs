//! librdkafka: how it is set up, what it tells, and what its errors mean.

use std::{
    path::Path,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use rdkafka::{
    ClientConfig, ClientContext, Message,
    admin::AdminClient,
    client::DefaultClientContext,
    config::{FromClientConfigAndContext, RDKafkaLogLevel},
    consumer::{BaseConsumer, ConsumerContext},
    error::{KafkaError, KafkaResult, RDKafkaErrorCode as Code},
    message::DeliveryResult,
    producer::{BaseProducer, ProducerContext},
};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::{
    config::{self, Brokers, Compression, SaslMechanism},
    error::{Class, Error, Result},
};

pub(super) type Producer = BaseProducer<Events>;

/// A wait in librdkafka is cut into pieces, so that a call that was given up ends soon.
const SLICE: Duration = Duration::from_millis(100);
const SLICE_MAX: Duration = Duration::from_secs(10);

/// What is produced waits this long for company.
const LINGER_MS: &str = "1";

/// Settings that Walrace's guarantees stand on, with their other names.
const OWNED: &[&str] = &[
    "acks",
    "allow.auto.create.topics",
    "bootstrap.servers",
    "compression.codec",
    "compression.type",
    "delivery.timeout.ms",
    "enable.auto.commit",
    "enable.gapless.guarantee",
    "enable.idempotence",
    "enable.partition.eof",
    "group.id",
    "isolation.level",
    "max.in.flight",
    "max.in.flight.requests.per.connection",
    "message.max.bytes",
    "message.send.max.retries",
    "message.timeout.ms",
    "metadata.broker.list",
    "partitioner",
    "request.required.acks",
    "retries",
    "sasl.mechanism",
    "sasl.mechanisms",
    "sasl.password",
    "sasl.username",
    "security.protocol",
    "ssl.ca.location",
    "transaction.timeout.ms",
    "transactional.id",
];

/// A cluster, and how it is reached.
pub(super) struct Cluster {
    /// What every client is made with.
    base: ClientConfig,
    producer: ClientConfig,
    /// For messages: `kafka at HOST:PORT`.
    name: String,
}

impl Cluster {
    pub(super) fn new(options: &config::Kafka) -> Result<Self> {
        let brokers = match &options.brokers {
            Brokers::Text(text) => text.clone(),
            Brokers::List(list) => list.join(","),
        };
        if brokers.split(',').any(|broker| broker.trim().is_empty()) {
            return Err(Error::config("`brokers` has an empty address")
                .remedy("write for instance brokers = [\"kafka1:9092\", \"kafka2:9092\"]"));
        }
        let mut base = ClientConfig::new();
        base.set("bootstrap.servers", &brokers)
            .set("client.id", "walrace")
            .set("allow.auto.create.topics", "false")
            .set("reconnect.backoff.max.ms", "1000")
            .set("socket.timeout.ms", options.timeout_ms.min(60_000).to_string())
            .set("socket.connection.setup.timeout.ms", options.timeout_ms.min(10_000).to_string());
        log_in(options, &mut base)?;
        for (name, value) in &options.properties {
            if OWNED.contains(&name.as_str()) {
                return Err(Error::config(format!("`properties` may not set `{name}`"))
                    .remedy("Walrace sets it, or has an option of its own for it"));
            }
            base.set(name, value.expose());
        }
        let producer = producer(options, &base);
        producer.create_native_config().map_err(|error| bad_setting(&error))?;
        Ok(Self { base, producer, name: format!("kafka at {brokers}") })
    }

    pub(super) fn producer(&self, transactional_id: Option<&str>) -> Result<Producer> {
        let mut config = self.producer.clone();
        if let Some(id) = transactional_id {
            config.set("transactional.id", id);
        }
        self.create(&config)
    }

    /// A consumer that is told what to read; the group is a name only.
    pub(super) fn consumer(&self, isolation: &str) -> Result<BaseConsumer<Events>> {
        let mut config = self.base.clone();
        config
            .set("group.id", "walrace-progress")
            .set("isolation.level", isolation)
            .set("enable.auto.commit", "false")
            .set("enable.partition.eof", "true")
            .set("auto.offset.reset", "earliest")
            .set("fetch.wait.max.ms", "50");
        self.create(&config)
    }

    pub(super) fn admin(&self) -> Result<AdminClient<DefaultClientContext>> {
        self.base.create().map_err(|error| bad_setting(&error))
    }

    /// What the messages call it.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    fn create<T: FromClientConfigAndContext<Events>>(&self, config: &ClientConfig) -> Result<T> {
        let events = Events { cluster: self.name.clone(), ..Events::default() };
        config.create_with_context(events).map_err(|error| bad_setting(&error))
    }
}

fn log_in(options: &config::Kafka, config: &mut ClientConfig) -> Result<()> {
    let protocol = match (options.sasl_mechanism.is_some(), options.tls) {
        (false, false) => "plaintext",
        (false, true) => "ssl",
        (true, false) => "sasl_plaintext",
        (true, true) => "sasl_ssl",
    };
    config.set("security.protocol", protocol);
    if let Some(file) = &options.tls_ca {
        if !options.tls {
            return Err(Error::config("`tls_ca` without `tls`").remedy("set `tls = true`"));
        }
        config.set("ssl.ca.location", readable(file)?);
    }
    match (&options.sasl_mechanism, &options.username, &options.password) {
        (Some(mechanism), Some(username), Some(password)) => {
            let mechanism = match mechanism {
                SaslMechanism::Plain => "PLAIN",
                SaslMechanism::ScramSha256 => "SCRAM-SHA-256",
                SaslMechanism::ScramSha512 => "SCRAM-SHA-512",
            };
            config
                .set("sasl.mechanism", mechanism)
                .set("sasl.username", username)
                .set("sasl.password", password.expose());
            Ok(())
        }
        (None, None, None) => Ok(()),
        _ => Err(Error::config("a login needs `sasl_mechanism`, `username` and `password`")
            .remedy("set all three, or none")),
    }
}

fn readable(file: &Path) -> Result<&str> {
    let path = file.to_str().filter(|_| file.is_file());
    path.ok_or_else(|| {
        Error::config(format!("`tls_ca`: {} is not a file", file.display()))
            .remedy("name a PEM file with the certificates to trust")
    })
}

fn producer(options: &config::Kafka, base: &ClientConfig) -> ClientConfig {
    let mut config = base.clone();
    let compression = match options.compression {
        Compression::None => "none",
        Compression::Gzip => "gzip",
        Compression::Snappy => "snappy",
        Compression::Lz4 => "lz4",
        Compression::Zstd => "zstd",
    };
    let buffer_kbytes = (64 << 10) + 2 * options.message_bytes_max / 1024;
    let transaction_ms = (2 * options.timeout_ms).max(10_000);
    for (name, value) in
        [("enable.idempotence", "true"), ("acks", "all"), ("compression.codec", compression)]
    {
        config.set(name, value);
    }
    config
        .set("message.max.bytes", options.message_bytes_max.to_string())
        .set("message.timeout.ms", options.timeout_ms.to_string())
        .set("transaction.timeout.ms", transaction_ms.to_string());
    for (name, value) in [
        ("linger.ms", LINGER_MS.to_owned()),
        ("queue.buffering.max.messages", "500000".to_owned()),
        ("queue.buffering.max.kbytes", buffer_kbytes.to_string()),
    ] {
        if !options.properties.contains_key(name) {
            config.set(name, value);
        }
    }
    config
}

/// Without the value, which may be a secret.
fn bad_setting(error: &KafkaError) -> Error {
    match error {
        KafkaError::ClientConfig(_, _, name, _) => {
            Error::config(format!("librdkafka does not take the setting `{name}`"))
                .remedy("see its CONFIGURATION.md for what it takes")
        }
        error => Error::config("librdkafka does not take the settings").caused_by(error.clone()),
    }
}

/// What librdkafka told one client.
#[derive(Default)]
pub(super) struct Events {
    cluster: String,
    /// The write that is counted: what comes late of an aborted one is not.
    write: AtomicUsize,
    /// Its messages that were delivered or have failed.
    done: AtomicU64,
    failure: Mutex<Option<(Code, String)>>,
    /// The last trouble with a connection.
    trouble: Mutex<Option<String>>,
    /// The login or the certificate was refused.
    refused: AtomicBool,
    all_down: AtomicBool,
}

impl Events {
    /// Begins to count anew; the number goes with each message.
    pub(super) fn begin(&self) -> usize {
        let write = self.write.fetch_add(1, Ordering::SeqCst) + 1;
        self.done.store(0, Ordering::SeqCst);
        *lock(&self.failure) = None;
        self.all_down.store(false, Ordering::SeqCst);
        write
    }

    pub(super) fn done(&self) -> u64 {
        self.done.load(Ordering::SeqCst)
    }

    /// The first message that failed: why, and its topic.
    pub(super) fn failure(&self) -> Option<(Code, String)> {
        lock(&self.failure).clone()
    }

    fn trouble(&self) -> String {
        lock(&self.trouble).as_ref().map_or_else(String::new, |text| format!(": {text}"))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ClientContext for Events {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        debug!("librdkafka {level:?} {facility}: {message}");
    }

    fn error(&self, error: KafkaError, reason: &str) {
        debug!("librdkafka: {error}: {reason}");
        match error.rdkafka_error_code() {
            Some(Code::AllBrokersDown) => {
                self.all_down.store(true, Ordering::SeqCst);
                return; // it says less than the one before it
            }
            Some(Code::Authentication) if !is_outage(reason) => {
                self.refused.store(true, Ordering::SeqCst);
            }
            Some(Code::SSL) if reason.contains("certificate verify failed") => {
                self.refused.store(true, Ordering::SeqCst);
            }
            _ => {}
        }
        *lock(&self.trouble) = Some(reason.to_owned());
    }
}

/// A connection that broke while it logged in is told as a failed login too.
fn is_outage(reason: &str) -> bool {
    ["Local: ", "isconnect", "imed out"].iter().any(|word| reason.contains(word))
}

impl ProducerContext for Events {
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, write: usize) {
        if write != self.write.load(Ordering::SeqCst) {
            return;
        }
        if let Err((error, message)) = result {
            let code = error.rdkafka_error_code().unwrap_or(Code::Unknown);
            let mut failure = lock(&self.failure);
            // What follows the first failure often fails of that.
            if failure.is_none() || class_of(code) == Class::Data {
                *failure = Some((code, message.topic().to_owned()));
            }
        }
        self.done.fetch_add(1, Ordering::SeqCst);
    }
}

impl ConsumerContext for Events {}

/// One call of the sink: it has a time limit, and the loop may give it up.
pub(super) struct Call {
    until: Instant,
    limit: Duration,
    given_up: CancellationToken,
}

impl Call {
    pub(super) fn new(limit: Duration, given_up: CancellationToken) -> Self {
        Self { until: Instant::now() + limit, limit, given_up }
    }

    /// A part of `call` with a limit of its own.
    pub(super) fn within(limit: Duration, call: &Call) -> Self {
        Self::new(limit.min(call.left()), call.given_up.clone())
    }

    pub(super) fn left(&self) -> Duration {
        self.until.saturating_duration_since(Instant::now())
    }

    /// How long one wait may last.
    pub(super) fn slice(&self) -> Duration {
        SLICE.min(self.left())
    }

    /// Whether there is time left to `doing` it.
    pub(super) fn check(&self, doing: &str) -> Result<()> {
        if self.given_up.is_cancelled() {
            return Err(Error::retry("the call was given up"));
        }
        if self.left().is_zero() {
            let ms = self.limit.as_millis();
            return Err(Error::retry(format!("kafka did not {doing} within {ms} ms")));
        }
        Ok(())
    }

    /// The same, and says what is known of the connections.
    pub(super) fn check_with(&self, doing: &str, events: &Events) -> Result<()> {
        if events.refused.load(Ordering::SeqCst) {
            let error =
                Error::config(format!("{} refuses the login{}", events.cluster, events.trouble()));
            return Err(error.remedy(
                "mend `sasl_mechanism`, `username`, `password`, `tls` or `tls_ca` of the sink",
            ));
        }
        if self.left().is_zero() {
            let ms = self.limit.as_millis();
            let (cluster, trouble) = (&events.cluster, events.trouble());
            return Err(Error::retry(format!("{cluster} did not {doing} within {ms} ms{trouble}")));
        }
        self.check(doing)
    }

    /// Asks until there is an answer; `ask` waits for as long as it is told.
    pub(super) fn ask<T>(
        &self,
        doing: &str,
        events: &Events,
        mut ask: impl FnMut(Duration) -> KafkaResult<T>,
    ) -> Result<T> {
        let mut slice = SLICE;
        loop {
            match ask(slice.min(self.left())) {
                Ok(answer) => return Ok(answer),
                Err(error) if is_temporary(&error) => {
                    self.check_with(doing, events)?;
                    if events.all_down.load(Ordering::SeqCst) {
                        let (cluster, trouble) = (&events.cluster, events.trouble());
                        return Err(Error::retry(format!("cannot reach {cluster}{trouble}")));
                    }
                }
                Err(error) => return Err(self.failed(doing, &error, events)),
            }
            slice = (slice * 2).min(SLICE_MAX);
        }
    }

    /// The error of a call of librdkafka that was to make the cluster `doing` it.
    pub(super) fn failed(&self, doing: &str, error: &KafkaError, events: &Events) -> Error {
        let class = code_of(error).map_or(Class::Retry, class_of);
        let text = format!("{} did not {doing}: {}", events.cluster, text_of(error));
        let error = Error::new(class, text);
        match class {
            Class::Config => error.remedy("let the sink's user do it: see kafka-acls"),
            _ => error,
        }
    }
}

/// Whether waiting helps, within one call.
fn is_temporary(error: &KafkaError) -> bool {
    if let KafkaError::Transaction(error) = error {
        return error.is_retriable();
    }
    matches!(
        code_of(error),
        Some(
            Code::OperationTimedOut
                | Code::RequestTimedOut
                | Code::MessageTimedOut
                | Code::BrokerTransportFailure
                | Code::NetworkException
                | Code::LeaderNotAvailable
                | Code::NotLeaderForPartition
                | Code::BrokerNotAvailable
                | Code::AllBrokersDown
        )
    )
}

/// Its code, where it has one.
pub(super) fn code_of(error: &KafkaError) -> Option<Code> {
    match error {
        KafkaError::AdminOp(code) => Some(*code),
        error => error.rdkafka_error_code(),
    }
}

fn text_of(error: &KafkaError) -> String {
    match error {
        KafkaError::Transaction(error) => error.string(),
        error => code_of(error).map_or_else(|| error.to_string(), |code| code.to_string()),
    }
}

/// What an error of librdkafka or a broker means for the sink.
pub(super) fn class_of(code: Code) -> Class {
    match code {
        Code::MessageSizeTooLarge
        | Code::MessageBatchTooLarge
        | Code::InvalidRecord
        | Code::InvalidTimestamp
        | Code::InvalidTopic => Class::Data,
        Code::SaslAuthenticationFailed
        | Code::UnsupportedSASLMechanism
        | Code::TopicAuthorizationFailed
        | Code::ClusterAuthorizationFailed
        | Code::GroupAuthorizationFailed
        | Code::TransactionalIdAuthorizationFailed
        | Code::UnsupportedVersion
        | Code::UnsupportedFeature
        | Code::UnsupportedForMessageFormat
        | Code::UnsupportedCompressionType
        | Code::PolicyViolation
        | Code::InvalidPartitions
        | Code::InvalidReplicationFactor
        | Code::InvalidReplicaAssignment
        | Code::InvalidConfig
        | Code::InvalidRequiredAcks
        | Code::InvalidTransactionTimeout => Class::Config,
        _ => Class::Retry,
    }
}

/// Whether it says that another producer has taken over the transactional id.
pub(super) fn is_fenced(code: Code) -> bool {
    matches!(code, Code::Fenced | Code::ProducerFenced | Code::InvalidProducerEpoch)
}
