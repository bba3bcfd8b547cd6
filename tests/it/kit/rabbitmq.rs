//! A real RabbitMQ, a node of its own with its own port mapper, without plugins.

use std::{
    fs::{self, File},
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use lapin::{
    Connection, ConnectionProperties,
    message::Delivery,
    options::{
        BasicGetOptions, ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions,
        QueuePurgeOptions,
    },
    types::{AMQPValue, FieldTable},
};
use rustix::process::{Pid, Signal, kill_process};

use super::{cluster::free_port, scratch::Scratch, wait::tail};

const START_LIMIT: Duration = Duration::from_secs(120);
const PROGRAM: &str = "/usr/lib/rabbitmq/bin/rabbitmq-server";

const SETTINGS: &str = "
default_user = walrace
default_pass = s3cret
max_message_size = 65536
log.console = true
log.file = false
";

/// A running RabbitMQ that dies with the test, however the test ends. It takes some seconds to
/// start: one for each test, and few tests.
#[derive(Debug)]
pub(crate) struct RabbitMq {
    port: u16,
    distribution_port: u16,
    mapper_port: u16,
    node: Option<Child>,
    mapper: Option<Child>,
    scratch: Scratch,
    _port_locks: [File; 3],
}

impl RabbitMq {
    /// A running server.
    pub(crate) async fn start() -> Self {
        Self::with("").await
    }

    /// A running server with further lines of `rabbitmq.conf`.
    pub(crate) async fn with(settings: &str) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let scratch = Scratch::new("rabbitmq");
        let ((port, one), (distribution_port, two), (mapper_port, three)) =
            (free_port(), free_port(), free_port());
        let path = |name: &str| scratch.path().join(name);
        fs::create_dir(path("home")).expect("a home, for Erlang's cookie");
        fs::write(path("rabbitmq.conf"), format!("{SETTINGS}{settings}")).expect("rabbitmq.conf");
        fs::write(path("plugins"), "[].").expect("a list of plugins");
        let mut server = Self {
            port,
            distribution_port,
            mapper_port,
            node: None,
            mapper: None,
            scratch,
            _port_locks: [one, two, three],
        };
        server.start_mapper();
        server.up().await;
        server
    }

    /// Erlang would start one that outlives everything.
    fn start_mapper(&mut self) {
        let mapper = Command::new("epmd")
            .args(["-port", &self.mapper_port.to_string(), "-address", "127.0.0.1"])
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("epmd of Erlang: run `scripts/install.sh test`");
        self.scratch.note("epmd", mapper.id());
        self.mapper = Some(mapper);
    }

    /// Starts a stopped server and waits until it is ready.
    pub(crate) async fn up(&mut self) {
        assert!(self.node.is_none(), "the server runs already");
        let log = File::create(self.log_path()).expect("a log");
        let path = |name: &str| self.scratch.path().join(name);
        let node = Command::new(PROGRAM)
            .current_dir(self.scratch.path())
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", path("home"))
            .env("RABBITMQ_NODENAME", format!("walrace-{}@localhost", self.port))
            .env("RABBITMQ_NODE_IP_ADDRESS", "127.0.0.1")
            .env("RABBITMQ_NODE_PORT", self.port.to_string())
            .env("RABBITMQ_DIST_PORT", self.distribution_port.to_string())
            .env("ERL_EPMD_PORT", self.mapper_port.to_string())
            .env("ERL_EPMD_ADDRESS", "127.0.0.1")
            .env("RABBITMQ_MNESIA_BASE", path("data"))
            .env("RABBITMQ_LOG_BASE", path("log"))
            .env("RABBITMQ_CONFIG_FILE", path("rabbitmq"))
            .env("RABBITMQ_CONF_ENV_FILE", path("no-environment"))
            .env("RABBITMQ_ENABLED_PLUGINS_FILE", path("plugins"))
            .env("RABBITMQ_PID_FILE", path("node"))
            // As under systemd: the script becomes the node, whose process id is then ours.
            .env("NOTIFY_SOCKET", path("nobody"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a second handle"))
            .stderr(log)
            .spawn()
            .expect("rabbitmq-server: run `scripts/install.sh test`");
        self.scratch.note("rabbitmq", node.id());
        self.node = Some(node);
        let begin = Instant::now();
        while !self.log().contains("Server startup complete") {
            let node = self.node.as_mut().expect("it was just started");
            let ended = node.try_wait().expect("its state");
            assert!(ended.is_none(), "rabbitmq-server ended:\n{}", tail(&self.log(), 40));
            assert!(begin.elapsed() < START_LIMIT, "not ready:\n{}", tail(&self.log(), 40));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// `kill -9`.
    pub(crate) fn kill(&mut self) {
        let Some(mut node) = self.node.take() else { return };
        node.kill().expect("a kill");
        node.wait().expect("its end");
        self.scratch.forget("rabbitmq");
    }

    /// Lets it hang: connections stay, and nothing is answered.
    pub(crate) fn pause(&self) {
        self.signal(Signal::STOP);
    }

    /// Lets it go on.
    pub(crate) fn resume(&self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, signal: Signal) {
        let node = self.node.as_ref().expect("a running server");
        kill_process(Pid::from_child(node), signal).expect("a signal");
    }

    /// The URL with the user `walrace` and its password.
    pub(crate) fn url(&self) -> String {
        self.url_of("walrace:s3cret")
    }

    /// The URL with another login.
    pub(crate) fn url_of(&self, login: &str) -> String {
        format!("amqp://{login}@127.0.0.1:{}", self.port)
    }

    /// A connection of its own, by which a test sets things up and looks at them.
    pub(crate) async fn connect(&self) -> Connection {
        let properties = ConnectionProperties::default();
        Connection::connect(&self.url(), properties).await.expect("a connection")
    }

    /// A durable exchange of type topic, and a durable queue that gets what matches `key`.
    pub(crate) async fn bind(&self, exchange: &str, queue: &str, key: &str) {
        let connection = self.connect().await;
        let channel = connection.create_channel().await.expect("a channel");
        let durable = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
        let none = FieldTable::default;
        let topic = lapin::ExchangeKind::Topic;
        channel.exchange_declare(exchange.into(), topic, durable, none()).await.expect("exchange");
        self.queue(queue, &[]).await;
        let options = QueueBindOptions::default();
        channel
            .queue_bind(queue.into(), exchange.into(), key.into(), options, none())
            .await
            .expect("a binding");
    }

    /// A durable queue.
    pub(crate) async fn queue(&self, name: &str, arguments: &[(&str, AMQPValue)]) {
        let connection = self.connect().await;
        let channel = connection.create_channel().await.expect("a channel");
        let mut table = FieldTable::default();
        for (key, value) in arguments {
            table.insert((*key).into(), value.clone());
        }
        let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        channel.queue_declare(name.into(), options, table).await.expect("a queue");
    }

    /// All messages of a queue, in its order; they stay there.
    pub(crate) async fn stored(&self, queue: &str) -> Vec<Delivery> {
        let connection = self.connect().await;
        let channel = connection.create_channel().await.expect("a channel");
        let mut stored = Vec::new();
        let options = BasicGetOptions { no_ack: false };
        while let Some(message) = channel.basic_get(queue.into(), options).await.expect("a get") {
            stored.push(message.delivery);
        }
        // Closing the connection puts them back where they were.
        connection.close(200, "OK".into()).await.expect("a close");
        stored
    }

    pub(crate) async fn purge(&self, queue: &str) {
        let connection = self.connect().await;
        let channel = connection.create_channel().await.expect("a channel");
        channel.queue_purge(queue.into(), QueuePurgeOptions::default()).await.expect("a purge");
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    fn log_path(&self) -> PathBuf {
        self.scratch.path().join("rabbitmq.log")
    }
}

impl Drop for RabbitMq {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the log of RabbitMQ on port {}:\n{}", self.port, tail(&self.log(), 30));
        }
        self.kill();
        if let Some(mut mapper) = self.mapper.take() {
            let _ = mapper.kill();
            let _ = mapper.wait();
            self.scratch.forget("epmd");
        }
    }
}
