//! A private PostgreSQL in a temporary folder: unix socket only, gone with the demo.

use std::{
    env,
    ffi::OsStr,
    fmt::Display,
    fs::{self, File, Permissions},
    io::Write,
    os::unix::{
        fs::{PermissionsExt, chown},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    time::{Duration, Instant},
};

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use rustix::process::{Pid, Signal, getuid, kill_process};
use tempfile::TempDir;

use super::server_files;
use crate::{
    error::{Class, Classify, Error, Result},
    source::postgres::Session,
};

const START_LIMIT: Duration = Duration::from_secs(60);
const STOP_LIMIT: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(20);

/// A unix socket's path has 108 bytes on Linux; the name of PostgreSQL's takes 15 of them.
const SOCKET_FOLDER_BYTES_MAX: usize = 90;

/// What differs from `initdb`'s settings. The server is as durable as one that people run.
const SETTINGS: [&str; 10] = [
    "listen_addresses=",
    "port=5432",
    "unix_socket_permissions=0700",
    "wal_level=logical",
    "fsync=on",
    "synchronous_commit=on",
    "shared_buffers=64MB",
    "max_connections=20",
    "timezone=UTC",
    "log_timezone=UTC",
];

/// Waits until the demo says that it has cleaned up, or has died without: then stops the server
/// and, unless it is to be kept, removes the folder.
const WATCHDOG: &str = r#"
read -r _ && exit 0
kill -INT "$1" 2>/dev/null
for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
    kill -0 "$1" 2>/dev/null || break
    sleep 0.25
done
kill -QUIT "$1" 2>/dev/null
[ -n "$3" ] || rm -rf "$2"
"#;

/// A session as an application has one: names without a schema are those of `public`.
pub(super) fn connect(url: &str) -> Result<Session> {
    let mut session = Session::connect(url)?;
    session.execute("set search_path = public")?;
    Ok(session)
}

/// The folder of a demo, with a PostgreSQL that runs in it. Dropping it stops the server and
/// removes the folder, unless that is to be kept.
#[derive(Debug)]
pub(super) struct Cluster {
    server: Option<Server>,
    folder: Option<TempDir>,
    path: PathBuf,
    version: String,
    keep: bool,
}

impl Cluster {
    /// Finds a PostgreSQL, makes a cluster and starts it. Takes a second or two.
    pub(super) fn start(keep: bool) -> Result<Self> {
        let found = server_files::find()?;
        let user = User::of_server()?;
        let folder = make_folder(&user)?;
        let path = folder.path().to_owned();
        let mut cluster =
            Self { server: None, folder: Some(folder), path, version: found.version, keep };
        cluster.initialize(&found.bin, &user)?;
        let (server, url) = (Server::spawn(&cluster, &found.bin, &user)?, cluster.url());
        cluster.server.insert(server).wait_ready(&cluster.path, &url)?;
        Ok(cluster)
    }

    fn initialize(&self, bin: &Path, user: &User) -> Result<()> {
        let initdb = bin.join("initdb");
        let output = user
            .command(&initdb)
            .args(["--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C"])
            .args(["--no-sync", "--pgdata"])
            .arg(data_dir(&self.path))
            .output()
            .class(Class::Config, || format!("cannot run {}", initdb.display()))?;
        if output.status.success() {
            return Ok(());
        }
        let reason = String::from_utf8_lossy(&output.stderr);
        let error = Error::config(format!(
            "{} failed in {}: {}",
            initdb.display(),
            self.path.display(),
            last_lines(&reason, 3)
        ));
        Err(match user.ids {
            Some(_) => error.remedy("let TMPDIR name a folder that the user postgres may enter"),
            None => error.remedy("let TMPDIR name a folder with some free space"),
        })
    }

    /// Where everything of the demo is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The version of the server, such as `15.7`.
    pub(super) fn version(&self) -> &str {
        &self.version
    }

    /// How to connect, as the superuser.
    pub(super) fn url(&self) -> String {
        let host = socket_dir(&self.path).display().to_string();
        format!(
            "postgres://postgres@/postgres?host={}",
            utf8_percent_encode(&host, NON_ALPHANUMERIC)
        )
    }

    /// Stops the server, and removes the folder unless it is to be kept.
    pub(super) fn end(&mut self) {
        if let Some(server) = self.server.take() {
            server.stop();
        }
        match self.folder.take() {
            Some(folder) if self.keep => drop(folder.keep()),
            folder => drop(folder),
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.end();
    }
}

/// A running postmaster, and what ends it should the demo die.
#[derive(Debug)]
struct Server {
    postmaster: Child,
    watchdog: Child,
    pipe: Option<ChildStdin>,
}

impl Server {
    fn spawn(cluster: &Cluster, bin: &Path, user: &User) -> Result<Self> {
        let postgres = bin.join("postgres");
        let failed = || format!("cannot start {}", postgres.display());
        let log = File::create(log_path(&cluster.path)).class(Class::Config, failed)?;
        let stdout = log.try_clone().class(Class::Config, failed)?;
        let socket_dir = format!("unix_socket_directories={}", socket_dir(&cluster.path).display());
        let mut command = user.command(&postgres);
        command.arg("-D").arg(data_dir(&cluster.path)).args(["-c", &socket_dir]);
        for setting in SETTINGS {
            command.args(["-c", setting]);
        }
        // In a group of its own: Ctrl-C is for the demo, which still needs the server then.
        command.stdin(Stdio::null()).stdout(stdout).stderr(log).process_group(0);
        let mut postmaster = command.spawn().class(Class::Config, failed)?;
        let keep = if cluster.keep { "keep" } else { "" };
        let watchdog = Command::new("sh")
            .args(["-c", WATCHDOG, "walrace-demo-watchdog", &postmaster.id().to_string()])
            .args([cluster.path.as_os_str(), OsStr::new(keep)])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn();
        match watchdog {
            Ok(mut watchdog) => {
                let pipe = watchdog.stdin.take();
                Ok(Self { postmaster, watchdog, pipe })
            }
            Err(error) => {
                let _ = postmaster.kill(); // it has not begun to work yet
                let _ = postmaster.wait();
                Err(error).class(Class::Config, || "cannot run sh")
            }
        }
    }

    fn wait_ready(&mut self, folder: &Path, url: &str) -> Result<()> {
        let begin = Instant::now();
        loop {
            let refused = match Session::connect(url) {
                Ok(_) => return Ok(()),
                Err(error) => error,
            };
            let ended = self.postmaster.try_wait().ok().flatten();
            if ended.is_none() && begin.elapsed() < START_LIMIT {
                std::thread::sleep(POLL);
                continue;
            }
            let log = fs::read_to_string(log_path(folder)).unwrap_or_default();
            let log = last_lines(&log, 5);
            return Err(match ended {
                Some(status) => Error::config(format!("PostgreSQL ended with {status}: {log}")),
                None => refused.context(format!("PostgreSQL did not start in time: {log}")),
            });
        }
    }

    /// Ends sessions and stops; harder where that takes too long.
    fn stop(mut self) {
        for signal in [Signal::INT, Signal::QUIT, Signal::KILL] {
            let _ = kill_process(Pid::from_child(&self.postmaster), signal);
            if self.has_ended_within(STOP_LIMIT) {
                break;
            }
        }
        if let Some(mut pipe) = self.pipe.take() {
            let _ = pipe.write_all(b"done\n"); // where it is gone already, all the better
        }
        let _ = self.watchdog.wait();
    }

    fn has_ended_within(&mut self, limit: Duration) -> bool {
        let begin = Instant::now();
        while begin.elapsed() < limit {
            if !matches!(self.postmaster.try_wait(), Ok(None)) {
                return true;
            }
            std::thread::sleep(POLL);
        }
        false
    }
}

/// Who runs the server: PostgreSQL refuses root, so there it is the user `postgres`.
struct User {
    ids: Option<(u32, u32)>,
}

impl User {
    fn of_server() -> Result<Self> {
        if !getuid().is_root() {
            return Ok(Self { ids: None });
        }
        let id = |flag| {
            let output = Command::new("id").args([flag, "postgres"]).output().ok()?;
            String::from_utf8_lossy(&output.stdout).trim().parse().ok()
        };
        match (id("-u"), id("-g")) {
            (Some(user), Some(group)) => Ok(Self { ids: Some((user, group)) }),
            _ => Err(Error::config(
                "PostgreSQL refuses to run as root, and there is no user postgres",
            )
            .remedy("run the demo as another user, or create one: useradd --system postgres")),
        }
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = match self.ids {
            None => Command::new(program),
            Some((user, group)) => {
                let mut command = Command::new("setpriv");
                command.args([format!("--reuid={user}"), format!("--regid={group}")]);
                command.arg("--clear-groups").arg(program);
                command
            }
        };
        command.current_dir("/"); // a folder that any user may enter
        for variable in ["PGDATA", "PGPORT", "PGHOST", "PGOPTIONS"] {
            command.env_remove(variable);
        }
        command
    }
}

/// The folder of the demo; in it one for the server, which belongs to its user.
fn make_folder(user: &User) -> Result<TempDir> {
    let parent = env::temp_dir();
    let make = |parent: &Path| {
        let folder = tempfile::Builder::new().prefix("walrace-demo-").tempdir_in(parent)?;
        fs::create_dir(server_dir(folder.path()))?;
        fs::set_permissions(server_dir(folder.path()), Permissions::from_mode(0o700))?;
        if let Some((uid, gid)) = user.ids {
            fs::set_permissions(folder.path(), Permissions::from_mode(0o711))?;
            chown(server_dir(folder.path()), Some(uid), Some(gid))?;
        }
        Ok(folder)
    };
    let too_long =
        |folder: &TempDir| socket_dir(folder.path()).as_os_str().len() > SOCKET_FOLDER_BYTES_MAX;
    let made: std::io::Result<TempDir> = match make(&parent) {
        Ok(folder) if too_long(&folder) => make(Path::new("/tmp")),
        made => made,
    };
    made.map_err(|cause| {
        Error::config(format!("cannot create a folder in {}", parent.display()))
            .caused_by(cause)
            .remedy("let TMPDIR name a folder that you may write")
    })
}

fn server_dir(folder: &Path) -> PathBuf {
    folder.join("postgres")
}

fn socket_dir(folder: &Path) -> PathBuf {
    server_dir(folder)
}

fn data_dir(folder: &Path) -> PathBuf {
    server_dir(folder).join("data")
}

fn log_path(folder: &Path) -> PathBuf {
    server_dir(folder).join("postgres.log")
}

fn last_lines(text: &impl Display, count: usize) -> String {
    let text = text.to_string();
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let from = lines.len().saturating_sub(count);
    lines.get(from..).unwrap_or_default().join("; ")
}
