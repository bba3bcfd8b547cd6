//! A real PostgreSQL of a given version, in a folder of its own.

use std::{
    fs::{self, File},
    os::unix::{fs::chown, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, getuid, kill_process};
use serde_json::Value;
use tokio::task::JoinSet;

use super::{
    scratch::Scratch,
    wait::{tail, wait_for},
};

const START_LIMIT: Duration = Duration::from_secs(60);
const STOP_LIMIT: Duration = Duration::from_secs(60);
/// A server that is not needed any more may take this long to end by itself.
const QUIT_LIMIT: Duration = Duration::from_secs(3);

/// What every cluster begins with; a test adds its own through [`Setup`].
const SETTINGS: &str = "
wal_level = logical
max_wal_senders = 20
max_replication_slots = 20
listen_addresses = '127.0.0.1'
fsync = off                     # the machine does not lose power in most tests
wal_sender_timeout = 60s
shared_buffers = 32MB
max_connections = 60
max_wal_size = 4GB
log_min_messages = warning
timezone = 'UTC'
log_timezone = 'UTC'
lc_messages = 'C'
";

/// How a cluster differs from the usual one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Setup {
    /// The major version; else `WALRACE_PG_BIN`, `WALRACE_PG_VERSION`, or Debian's.
    pub(crate) version: Option<u32>,
    /// Lines of `postgresql.conf`, such as `wal_sender_timeout = 2s`.
    pub(crate) settings: String,
    /// A system identifier of its own (2 s of initdb); the others share one template's.
    pub(crate) own_identity: bool,
}

/// How a server stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// Ends sessions, sends what is left to replication clients, writes a checkpoint.
    Fast,
    /// Leaves the rest to crash recovery.
    Immediate,
    /// `kill -9` of every process, as the kernel's out-of-memory killer does.
    Kill,
}

/// A copy of a cluster's data, to put back.
#[derive(Debug)]
pub(crate) struct Snapshot(pub(super) PathBuf);

/// A running PostgreSQL that dies with the test, however the test ends.
#[derive(Debug)]
pub(crate) struct Cluster {
    pub(super) bin: PathBuf,
    pub(super) port: u16,
    postmaster: Option<Child>,
    snapshots: u32,
    pub(super) scratch: Scratch,
    _port_lock: File,
}

impl Cluster {
    /// A running server of the default version.
    pub(crate) async fn start() -> Self {
        Self::with(Setup::default()).await
    }

    /// A running server of a given major version.
    pub(crate) async fn version(major: u32) -> Self {
        Self::with(Setup { version: Some(major), ..Setup::default() }).await
    }

    /// A running server that differs from the usual one.
    pub(crate) async fn with(setup: Setup) -> Self {
        let bin = find_bin(setup.version);
        let mut cluster = Self::stopped(bin);
        if setup.own_identity {
            initdb(&cluster.bin, &cluster.data_dir());
        } else {
            copy(&template(&cluster.bin), &cluster.data_dir());
        }
        cluster.configure(SETTINGS);
        let socket_dir = format!("unix_socket_directories = '{}'", cluster.socket_dir().display());
        cluster.configure(&socket_dir);
        cluster.configure(&format!("port = {}", cluster.port));
        cluster.configure(&setup.settings);
        cluster.up().await;
        cluster
    }

    /// The default version where it is at least `min`, else the newest.
    pub(crate) fn default_version_from(min: u32) -> u32 {
        Some(default_version()).filter(|version| *version >= min).unwrap_or(18)
    }

    pub(super) fn stopped(bin: PathBuf) -> Self {
        let scratch = Scratch::new("pg");
        give_to_postgres(scratch.path());
        let (port, lock) = free_port();
        Self { bin, port, postmaster: None, snapshots: 0, scratch, _port_lock: lock }
    }

    /// Starts a stopped server and waits until it accepts connections.
    pub(crate) async fn up(&mut self) {
        assert!(self.postmaster.is_none(), "the server runs already");
        let log = File::options().create(true).append(true).open(self.log_path()).expect("a log");
        let child = as_postgres(self.bin.join("postgres"))
            .arg("-D")
            .arg(self.data_dir())
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a second handle"))
            .stderr(log)
            .process_group(0)
            .spawn()
            .expect("postgres");
        self.scratch.note("postmaster", child.id());
        let pid = child.id().to_string();
        let log_path = self.log_path();
        self.postmaster = Some(child);
        let status = self.data_dir().join("postmaster.pid");
        let ready = async || {
            let child = self.postmaster.as_mut().expect("it was just started");
            if let Some(code) = child.try_wait().expect("its state") {
                let log = fs::read_to_string(&log_path).unwrap_or_default();
                panic!("postgres ended with {code}:\n{}", tail(&log, 30));
            }
            let text = fs::read_to_string(&status).ok()?;
            let mut lines = text.lines();
            let ours = lines.next() == Some(&pid);
            let state = lines.nth(6).map(str::trim);
            (ours && matches!(state, Some("ready" | "standby"))).then_some(())
        };
        wait_for(START_LIMIT, ready, || {
            format!("postgres is not ready:\n{}", fs::read_to_string(&log_path).unwrap_or_default())
        })
        .await;
    }

    /// Stops the server and waits until its last process is gone.
    pub(crate) fn down(&mut self, how: Stop) {
        let Some(mut child) = self.postmaster.take() else { return };
        let postmaster = Pid::from_child(&child);
        let children = children_of(postmaster);
        let _ = match how {
            Stop::Fast => kill_process(postmaster, Signal::INT),
            Stop::Immediate => kill_process(postmaster, Signal::QUIT),
            Stop::Kill => kill_process(postmaster, Signal::KILL),
        };
        if how == Stop::Kill {
            // A backend notices the death of its postmaster only when it waits the next time.
            for child in &children {
                let _ = kill_process(*child, Signal::KILL);
            }
        }
        let begin = Instant::now();
        while child.try_wait().expect("its state").is_none() {
            assert!(begin.elapsed() < STOP_LIMIT, "postgres does not stop:\n{}", self.log_tail());
            std::thread::sleep(Duration::from_millis(5));
        }
        while children.iter().any(|pid| is_alive(*pid)) {
            assert!(begin.elapsed() < STOP_LIMIT, "a backend outlives its postmaster");
            std::thread::sleep(Duration::from_millis(5));
        }
        self.scratch.forget("postmaster");
        // Killed, it leaves its pid file behind; the number may soon belong to somebody else.
        let _ = fs::remove_file(self.data_dir().join("postmaster.pid"));
    }

    /// Stops and starts the server.
    pub(crate) async fn restart(&mut self, how: Stop) {
        self.down(how);
        self.up().await;
    }

    /// Copies the data of the server, which is stopped for it in good order.
    pub(crate) async fn snapshot(&mut self) -> Snapshot {
        self.down(Stop::Fast);
        self.snapshots += 1;
        let path = self.scratch.path().join(format!("snapshot-{}", self.snapshots));
        copy(&self.data_dir(), &path);
        self.up().await;
        Snapshot(path)
    }

    /// Puts the server back to a snapshot, as an operator who restores a backup does.
    pub(crate) async fn restore(&mut self, snapshot: &Snapshot) {
        self.down(Stop::Immediate);
        fs::remove_dir_all(self.data_dir()).expect("the old data goes");
        copy(&snapshot.0, &self.data_dir());
        self.up().await;
    }

    /// Adds lines to `postgresql.conf`; the last word on a setting wins. Needs a reload or restart.
    pub(crate) fn configure(&self, lines: &str) {
        append(&self.data_dir().join("postgresql.conf"), lines);
    }

    /// Replaces `pg_hba.conf`, but keeps the unix socket open to the test itself. Needs a reload.
    pub(crate) fn set_hba(&self, lines: &str) {
        let text = format!("local all postgres trust\n{lines}\n");
        fs::write(self.data_dir().join("pg_hba.conf"), text).expect("pg_hba.conf");
    }

    /// Makes the server read its configuration files again.
    pub(crate) async fn reload(&self) {
        self.sql("select pg_reload_conf()").await;
    }

    /// The URL over TCP, as the superuser `postgres` without a password.
    pub(crate) fn url(&self) -> String {
        format!("postgres://postgres@127.0.0.1:{}/postgres", self.port)
    }

    /// The URL over TCP through something that listens on another port, such as a `Proxy`.
    pub(crate) fn url_at(&self, port: u16) -> String {
        format!("postgres://postgres@127.0.0.1:{port}/postgres")
    }

    /// The URL over the unix socket.
    pub(crate) fn unix_url(&self) -> String {
        let socket = self.socket_dir().display().to_string();
        format!("postgres://postgres@/postgres?host={socket}&port={}", self.port)
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    pub(crate) fn socket_dir(&self) -> PathBuf {
        self.scratch.path().to_owned()
    }

    pub(crate) fn data_dir(&self) -> PathBuf {
        self.scratch.path().join("data")
    }

    pub(crate) fn log_path(&self) -> PathBuf {
        self.scratch.path().join("postgres.log")
    }

    /// The server's own log, whole.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    fn log_tail(&self) -> String {
        format!("{}:\n{}", self.log_path().display(), tail(&self.log(), 30))
    }

    /// A new session of the superuser.
    pub(crate) async fn connect(&self) -> Session {
        self.try_connect().await.expect("a session")
    }

    /// A new session of the superuser, where the server may be down.
    pub(crate) async fn try_connect(&self) -> Result<Session, tokio_postgres::Error> {
        let mut config = tokio_postgres::Config::new();
        config.host_path(self.socket_dir()).port(self.port).user("postgres").dbname("postgres");
        Session::open(&config).await
    }

    /// Runs statements, all of them in one transaction unless the text says otherwise.
    pub(crate) async fn sql(&self, statements: &str) {
        let session = self.connect().await;
        if let Err(error) = session.batch_execute(statements).await {
            panic!("{}\nin: {statements}", describe(&error));
        }
    }

    /// The rows of a query as JSON objects, as `to_jsonb` makes them.
    pub(crate) async fn rows(&self, query: &str) -> Vec<Value> {
        self.connect().await.json_rows(query).await
    }

    /// The first column of the first row, as JSON.
    pub(crate) async fn value(&self, query: &str) -> Value {
        let rows = self.rows(&format!("select v from ({query}) as t(v)")).await;
        rows.first().unwrap_or_else(|| panic!("no row from: {query}"))["v"].clone()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the log of PostgreSQL on port {}: {}", self.port, self.log_tail());
        }
        if let Some(mut child) = self.postmaster.take() {
            let postmaster = Pid::from_child(&child);
            // One that is killed leaves its shared memory behind, of which a machine has 4096.
            let _ = kill_process(postmaster, Signal::QUIT);
            if !ends_within(&mut child, QUIT_LIMIT) {
                for pid in children_of(postmaster).into_iter().chain([postmaster]) {
                    let _ = kill_process(pid, Signal::KILL);
                }
                let _ = child.wait();
            }
            self.scratch.forget("postmaster");
        }
    }
}

/// A session with the server; everything of `tokio_postgres::Client` works on it.
#[derive(Debug)]
pub(crate) struct Session {
    client: tokio_postgres::Client,
    _task: JoinSet<()>,
}

impl Session {
    pub(crate) async fn open(
        config: &tokio_postgres::Config,
    ) -> Result<Self, tokio_postgres::Error> {
        let (client, connection) = config.connect(tokio_postgres::NoTls).await?;
        let mut task = JoinSet::new();
        task.spawn(async {
            let _ = connection.await; // the client of this session reports what went wrong
        });
        Ok(Self { client, _task: task })
    }

    /// The rows of a query as JSON objects, as `to_jsonb` makes them.
    pub(crate) async fn json_rows(&self, query: &str) -> Vec<Value> {
        let rows = self.query(&format!("select to_jsonb(t) from ({query}) t"), &[]).await;
        let rows = rows.unwrap_or_else(|error| panic!("{}\nin: {query}", describe(&error)));
        rows.iter().map(|row| row.get(0)).collect()
    }
}

impl std::ops::Deref for Session {
    type Target = tokio_postgres::Client;

    fn deref(&self) -> &Self::Target {
        &self.client
    }
}

impl std::ops::DerefMut for Session {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.client
    }
}

/// `tokio_postgres` says only "db error" unless asked for its cause.
fn describe(error: &tokio_postgres::Error) -> String {
    error.as_db_error().map_or_else(|| error.to_string(), ToString::to_string)
}

/// The folder with `postgres` and `initdb`; a missing server is a failure that says what to run.
fn find_bin(version: Option<u32>) -> PathBuf {
    let from_environment = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let version = match version {
        Some(version) => version,
        None => match from_environment("WALRACE_PG_BIN") {
            Some(bin) => return bin,
            None => default_version(),
        },
    };
    let found = from_environment(&format!("WALRACE_PG_BIN_{version}"))
        .into_iter()
        .chain([format!("/usr/lib/postgresql/{version}/bin").into()])
        .chain([cache_dir().join(format!("postgres-{version}/bin"))])
        .find(|bin| bin.join("postgres").exists());
    found.unwrap_or_else(|| {
        panic!(
            "PostgreSQL {version} is missing: run `scripts/install.sh test`, \
             or set WALRACE_PG_BIN_{version} to its bin folder"
        )
    })
}

/// `WALRACE_PG_VERSION`, else 15, else the newest that Debian's packages installed.
fn default_version() -> u32 {
    if let Ok(version) = std::env::var("WALRACE_PG_VERSION") {
        return version.parse().expect("WALRACE_PG_VERSION is a major version such as 15");
    }
    let installed: Vec<u32> = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    match installed.iter().max() {
        Some(newest) if !installed.contains(&15) => *newest,
        _ => 15,
    }
}

/// Where `scripts/environment.sh` says that things are installed.
pub(super) fn cache_dir() -> PathBuf {
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from);
    variable("WALRACE_CACHE").unwrap_or_else(|| {
        if getuid().is_root() {
            return PathBuf::from("/var/cache/walrace");
        }
        let home = || variable("HOME").unwrap_or_default().join(".cache");
        variable("XDG_CACHE_HOME").unwrap_or_else(home).join("walrace")
    })
}

/// A data folder fresh from initdb, made once for each server and shared by all test processes.
fn template(bin: &Path) -> PathBuf {
    let output = Command::new(bin.join("postgres")).arg("--version").output().expect("postgres");
    let name: String = [String::from_utf8_lossy(&output.stdout).trim(), &bin.to_string_lossy()]
        .concat()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' })
        .collect();
    let folder = shared_dir();
    let lock = File::create(folder.join(format!("{name}.lock"))).expect("a lock file");
    lock.lock().expect("the lock");
    let path = folder.join(name);
    if !path.exists() {
        let fresh = path.with_extension("fresh");
        let _ = fs::remove_dir_all(&fresh);
        initdb(bin, &fresh);
        run(as_postgres("mv").args([&fresh, &path]));
    }
    path
}

fn initdb(bin: &Path, data: &Path) {
    run(as_postgres(bin.join("initdb"))
        .args(["--username=postgres", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C"])
        .arg("--pgdata")
        .arg(data));
}

/// What the processes of all tests share: templates and locks on ports.
fn shared_dir() -> PathBuf {
    let path = std::env::temp_dir().join(format!("walrace-kit-{}", getuid().as_raw()));
    fs::create_dir_all(&path).expect("a shared folder");
    if let Some((uid, gid)) = postgres_user() {
        chown(&path, Some(uid), Some(gid)).expect("chown to postgres");
    }
    path
}

/// A port below those that the kernel gives to outgoing connections, so that a server that is
/// down for a moment finds its own free; the lock keeps other test processes off it.
pub(super) fn free_port() -> (u16, File) {
    let folder = shared_dir();
    for _ in 0..1_000 {
        let port = fastrand::u16(20_000..32_000);
        let lock = File::create(folder.join(format!("port-{port}"))).expect("a lock file");
        if lock.try_lock().is_ok() && std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return (port, lock);
        }
    }
    panic!("no free port between 20000 and 32000");
}

/// PostgreSQL refuses to run as root: its user and group, where the test runs as root.
fn postgres_user() -> Option<(u32, u32)> {
    if !getuid().is_root() {
        return None;
    }
    let id = |flag| {
        let output = Command::new("id").args([flag, "postgres"]).output().expect("id");
        let text = String::from_utf8_lossy(&output.stdout).trim().parse();
        text.expect("the user `postgres`, which Debian's package postgresql creates")
    };
    Some((id("-u"), id("-g")))
}

/// Where the test runs as root, gives the folder and what is in it to the user of the server.
pub(super) fn give_to_postgres(folder: &Path) {
    if let Some((uid, gid)) = postgres_user() {
        run(Command::new("chown").arg("-R").arg(format!("{uid}:{gid}")).arg(folder));
    }
}

pub(super) fn as_postgres(program: impl AsRef<std::ffi::OsStr>) -> Command {
    if !getuid().is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]).arg(program);
    command.current_dir("/");
    command
}

pub(super) fn copy(from: &Path, to: &Path) {
    run(as_postgres("cp").args(["-a", "--reflink=auto"]).args([from, to]));
}

pub(super) fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{stderr}", output.status);
}

fn append(path: &Path, lines: &str) {
    use std::io::Write;
    let mut file = File::options().append(true).open(path).expect("a configuration file");
    writeln!(file, "{lines}").expect("a line more");
}

fn ends_within(child: &mut Child, limit: Duration) -> bool {
    let asked = Instant::now();
    loop {
        match child.try_wait() {
            Ok(Some(_)) => return true,
            Ok(None) if asked.elapsed() < limit => std::thread::sleep(Duration::from_millis(5)),
            _ => return false,
        }
    }
}

fn children_of(parent: Pid) -> Vec<Pid> {
    let parent = parent.as_raw_nonzero().to_string();
    let path = format!("/proc/{parent}/task/{parent}/children");
    let text = fs::read_to_string(path).unwrap_or_default();
    text.split_whitespace().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)).collect()
}

fn is_alive(pid: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()));
    // A zombie that its new parent has not collected yet holds nothing any more.
    stat.is_ok_and(|stat| !stat.contains(") Z "))
}
