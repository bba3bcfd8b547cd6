//! A real Redis in a folder of its own, which loses nothing that it has acknowledged.

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use redis::{
    AsyncConnectionConfig, Client, Cmd, FromRedisValue, TlsCertificates, aio::MultiplexedConnection,
};
use rustix::process::{Pid, Signal, kill_process};

use super::{cluster::free_port, scratch::Scratch, wait::tail};

const START_LIMIT: Duration = Duration::from_secs(30);

/// What every server begins with: one user with a password, and each write synced. The user
/// `default` keeps its rights although nobody can log in as it: Redis 7.0 reads the transactions of
/// its append-only file with them, and leaves out what they do not allow.
const SETTINGS: &str = r#"
bind 127.0.0.1
daemonize no
appendonly yes
appendfsync always
save ""
user default off ~* &* +@all
user walrace on >s3cret ~* &* +@all
"#;

/// A running Redis that dies with the test, however the test ends.
#[derive(Debug)]
pub(crate) struct Redis {
    port: u16,
    tls: bool,
    child: Option<Child>,
    scratch: Scratch,
    _port_lock: File,
}

impl Redis {
    /// A running server.
    pub(crate) async fn start() -> Self {
        Self::with(false, "").await
    }

    /// A running server that speaks TLS alone.
    pub(crate) async fn start_tls() -> Self {
        Self::with(true, "").await
    }

    /// A running server with further lines of `redis.conf`.
    pub(crate) async fn with(tls: bool, settings: &str) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let scratch = Scratch::new("redis");
        let (port, lock) = free_port();
        let folder = scratch.path();
        let listen = if tls {
            super::tls::certificates(folder, "IP:127.0.0.1");
            format!(
                "port 0\ntls-port {port}\ntls-auth-clients no\ntls-cert-file server.pem\n\
                 tls-key-file server.key\ntls-ca-cert-file ca.pem"
            )
        } else {
            format!("port {port}")
        };
        let text = format!("dir {}\n{SETTINGS}\n{listen}\n{settings}\n", folder.display());
        fs::write(folder.join("redis.conf"), text).expect("redis.conf");
        let mut server = Self { port, tls, child: None, scratch, _port_lock: lock };
        server.up().await;
        server
    }

    /// Starts a stopped server and waits until it answers.
    pub(crate) async fn up(&mut self) {
        assert!(self.child.is_none(), "the server runs already");
        self.mend();
        let log = File::options().create(true).append(true).open(self.log_path()).expect("a log");
        let child = Command::new("redis-server")
            .arg("redis.conf")
            .current_dir(self.scratch.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a second handle"))
            .stderr(log)
            .spawn()
            .expect("redis-server: run `scripts/install.sh test`");
        self.scratch.note("redis", child.id());
        self.child = Some(child);
        // No `wait_for`: a future that holds an async closure cannot be sent between threads.
        let begin = Instant::now();
        while !self.answers().await {
            assert!(begin.elapsed() < START_LIMIT, "redis-server does not answer");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Takes a transaction that a crash tore off the end of the append-only file. The server cuts
    /// off only its last command, and executes the others together with the next transaction when
    /// it is started once more (valkey-io/valkey#4342).
    fn mend(&self) {
        let manifest = self.data_dir().join("appendonly.aof.manifest");
        if !manifest.exists() {
            return;
        }
        let mut check = Command::new("redis-check-aof")
            .arg("--fix")
            .arg(manifest)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .expect("redis-check-aof: run `scripts/install.sh test`");
        let mut answer = check.stdin.take().expect("its input");
        let _ = answer.write_all(b"y\n"); // it asks only where there is something to cut off
        drop(answer);
        assert!(check.wait().expect("its end").success(), "redis-check-aof");
    }

    async fn answers(&mut self) -> bool {
        let ended = self.child.as_mut().and_then(|child| child.try_wait().expect("its state"));
        if let Some(code) = ended {
            panic!("redis-server ended with {code}:\n{}", self.log_tail());
        }
        let Ok(mut connection) = self.try_connect().await else { return false };
        redis::cmd("PING").exec_async(&mut connection).await.is_ok()
    }

    /// `kill -9`.
    pub(crate) fn kill(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        child.kill().expect("a kill");
        child.wait().expect("its end");
        self.scratch.forget("redis");
    }

    /// The folder of the append-only file.
    pub(crate) fn data_dir(&self) -> PathBuf {
        self.scratch.path().join("appendonlydir")
    }

    /// Copies the data of the server, to put back.
    pub(crate) fn snapshot(&self) -> PathBuf {
        let copy = self.scratch.path().join("snapshot");
        copy_folder(&self.data_dir(), &copy);
        copy
    }

    /// Kills the server and puts it back to a snapshot, as a failover to a late replica does.
    pub(crate) async fn restore(&mut self, snapshot: &Path) {
        self.kill();
        let data = self.data_dir();
        fs::remove_dir_all(&data).expect("the old data goes");
        copy_folder(snapshot, &data);
        self.up().await;
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
        let scheme = if self.tls { "rediss" } else { "redis" };
        format!("{scheme}://{login}@127.0.0.1:{}/0", self.port)
    }

    /// The authority that signed the certificate.
    pub(crate) fn ca(&self) -> PathBuf {
        self.scratch.path().join("ca.pem")
    }

    /// A new connection.
    pub(crate) async fn connect(&self) -> MultiplexedConnection {
        self.try_connect().await.expect("a connection")
    }

    async fn try_connect(&self) -> redis::RedisResult<MultiplexedConnection> {
        let limits = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(START_LIMIT))
            .set_response_timeout(Some(START_LIMIT));
        self.client().get_multiplexed_async_connection_with_config(&limits).await
    }

    /// A client for connections of other kinds.
    pub(crate) fn client(&self) -> Client {
        if !self.tls {
            return Client::open(self.url()).expect("a client");
        }
        let root = fs::read(self.ca()).expect("ca.pem");
        let certificates = TlsCertificates { client_tls: None, root_cert: Some(root) };
        Client::build_with_tls(self.url(), certificates).expect("a client")
    }

    /// The answer to one command, its words parted by spaces.
    pub(crate) async fn ask<T: FromRedisValue>(&self, command: &str) -> T {
        let mut words = command.split(' ');
        let mut cmd = Cmd::new();
        words.by_ref().for_each(|word| _ = cmd.arg(word));
        let answer = cmd.query_async(&mut self.connect().await).await;
        answer.unwrap_or_else(|error| panic!("{command}: {error}"))
    }

    /// What `redis-cli` prints.
    pub(crate) fn cli(&self, arguments: &str) -> String {
        let output = Command::new("redis-cli")
            .args(["--user", "walrace", "-p", &self.port.to_string()])
            .args(arguments.split(' '))
            .env("REDISCLI_AUTH", "s3cret")
            .output()
            .expect("redis-cli: run `scripts/install.sh test`");
        assert!(output.status.success(), "redis-cli {arguments}");
        String::from_utf8(output.stdout).expect("text")
    }

    fn log_path(&self) -> PathBuf {
        self.scratch.path().join("redis.log")
    }

    fn log_tail(&self) -> String {
        tail(&fs::read_to_string(self.log_path()).unwrap_or_default(), 30)
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the log of Redis on port {}:\n{}", self.port, self.log_tail());
        }
        self.kill();
    }
}

fn copy_folder(from: &Path, to: &Path) {
    let status = Command::new("cp").arg("-a").args([from, to]).status().expect("cp");
    assert!(status.success(), "cp {} {}", from.display(), to.display());
}
