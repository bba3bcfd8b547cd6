//! A real NATS server in a folder of its own, which loses nothing that it has acknowledged.

use std::{
    fs::{self, File},
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use async_nats::{
    Client, ConnectOptions,
    jetstream::{self, stream},
};
use futures_util::StreamExt;
use rustix::process::{Pid, Signal, kill_process};

use super::{cluster::free_port, scratch::Scratch, wait::tail};

const START_LIMIT: Duration = Duration::from_secs(30);

/// What every server begins with: two users, of whom `guest` may publish nothing below `app`.
const SETTINGS: &str = r#"
server_name: kit
max_payload: 65536
jetstream { store_dir: "store", sync_interval: always }
authorization { users: [
    { user: walrace, password: "s3cret" }
    { user: guest, password: "s3cret", permissions: { publish: { deny: ["app.>"] } } }
] }
"#;

/// A running NATS server that dies with the test, however the test ends.
#[derive(Debug)]
pub(crate) struct Nats {
    port: u16,
    tls: bool,
    child: Option<Child>,
    scratch: Scratch,
    _port_lock: File,
}

/// One message of a stream.
#[derive(Clone, Debug)]
pub(crate) struct Stored {
    pub(crate) subject: String,
    pub(crate) headers: async_nats::HeaderMap,
    pub(crate) payload: Vec<u8>,
}

impl Nats {
    /// A running server.
    pub(crate) async fn start() -> Self {
        Self::with(SETTINGS, false).await
    }

    /// A running server that speaks TLS alone.
    pub(crate) async fn start_tls() -> Self {
        let tls = "tls { cert_file: \"server.pem\", key_file: \"server.key\" }\n";
        Self::with(&format!("{SETTINGS}{tls}"), true).await
    }

    /// A running server without JetStream.
    pub(crate) async fn start_core() -> Self {
        Self::with("max_payload: 65536\n", false).await
    }

    async fn with(settings: &str, tls: bool) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let scratch = Scratch::new("nats");
        if tls {
            super::tls::certificates(scratch.path(), "IP:127.0.0.1");
        }
        let (port, lock) = free_port();
        let text = format!("listen: \"127.0.0.1:{port}\"\n{settings}");
        fs::write(scratch.path().join("nats.conf"), text).expect("nats.conf");
        let mut server = Self { port, tls, child: None, scratch, _port_lock: lock };
        server.up().await;
        server
    }

    /// Starts a stopped server and waits until it is ready.
    pub(crate) async fn up(&mut self) {
        assert!(self.child.is_none(), "the server runs already");
        let log = File::create(self.log_path()).expect("a log");
        let child = Command::new("nats-server")
            .args(["-c", "nats.conf"])
            .current_dir(self.scratch.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a second handle"))
            .stderr(log)
            .spawn()
            .expect("nats-server: run `scripts/install.sh test`");
        self.scratch.note("nats", child.id());
        self.child = Some(child);
        let begin = Instant::now();
        while !self.log().contains("Server is ready") {
            let child = self.child.as_mut().expect("it was just started");
            let ended = child.try_wait().expect("its state");
            assert!(ended.is_none(), "nats-server ended:\n{}", tail(&self.log(), 30));
            assert!(begin.elapsed() < START_LIMIT, "not ready:\n{}", tail(&self.log(), 30));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// `kill -9`.
    pub(crate) fn kill(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        child.kill().expect("a kill");
        child.wait().expect("its end");
        self.scratch.forget("nats");
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
        let child = self.child.as_ref().expect("a running server");
        kill_process(Pid::from_child(child), signal).expect("a signal");
    }

    /// The URL with the user `walrace` and its password.
    pub(crate) fn url(&self) -> String {
        self.url_of("walrace:s3cret")
    }

    /// The URL with another login.
    pub(crate) fn url_of(&self, login: &str) -> String {
        let scheme = if self.tls { "tls" } else { "nats" };
        format!("{scheme}://{login}@127.0.0.1:{}", self.port)
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// The authority that signed the certificate.
    pub(crate) fn ca(&self) -> PathBuf {
        self.scratch.path().join("ca.pem")
    }

    /// A client of its own.
    pub(crate) async fn client(&self) -> Client {
        let options = ConnectOptions::with_user_and_password("walrace".into(), "s3cret".into());
        let options = if self.tls { options.add_root_certificates(self.ca()) } else { options };
        let scheme = if self.tls { "tls" } else { "nats" };
        options.connect(format!("{scheme}://127.0.0.1:{}", self.port)).await.expect("a client")
    }

    /// Creates a stream of these subjects.
    pub(crate) async fn stream(&self, name: &str, subjects: &[&str]) {
        self.stream_with(stream::Config {
            name: name.into(),
            subjects: subjects.iter().map(|&subject| subject.into()).collect(),
            ..stream::Config::default()
        })
        .await;
    }

    pub(crate) async fn stream_with(&self, config: stream::Config) {
        let context = jetstream::new(self.client().await);
        context.create_stream(config).await.expect("a stream");
    }

    /// All messages of a stream, in its order.
    pub(crate) async fn stored(&self, stream: &str) -> Vec<Stored> {
        let context = jetstream::new(self.client().await);
        let mut stream = context.get_stream(stream).await.expect("the stream");
        let count = stream.info().await.expect("its state").state.messages;
        let config = jetstream::consumer::pull::OrderedConfig::default();
        let consumer = stream.create_consumer(config).await.expect("a consumer");
        let mut messages = consumer.messages().await.expect("messages");
        let mut stored = Vec::new();
        while (stored.len() as u64) < count {
            let message = messages.next().await.expect("a message").expect("a message");
            stored.push(Stored {
                subject: message.subject.to_string(),
                headers: message.headers.clone().unwrap_or_default(),
                payload: message.payload.to_vec(),
            });
        }
        stored
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    fn log_path(&self) -> PathBuf {
        self.scratch.path().join("nats.log")
    }
}

impl Drop for Nats {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the log of NATS on port {}:\n{}", self.port, tail(&self.log(), 30));
        }
        self.kill();
    }
}
