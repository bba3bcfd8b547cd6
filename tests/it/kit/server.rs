//! The real `walrace` binary as a child.

use std::{
    fs::{self, File},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::{
    scratch::Scratch,
    wait::{tail, wait_for},
};

const READY_LIMIT: Duration = Duration::from_secs(30);

/// `walrace run` with a configuration of its own, in a folder of its own, which is its working
/// directory: relative paths in the configuration lie in [`Server::path`].
#[derive(Debug)]
pub(crate) struct Server {
    scratch: Scratch,
    child: Option<Child>,
}

impl Server {
    /// Writes `walrace.toml` but starts nothing. The text is what a user would write; the kit adds
    /// `data_dir` before it and a free port for HTTP after it.
    pub(crate) fn new(config: &str) -> Self {
        let server = Self { scratch: Scratch::new("server"), child: None };
        server.set_config(config);
        server
    }

    /// Replaces the configuration; it counts from the next start on.
    pub(crate) fn set_config(&self, config: &str) {
        let text = format!("data_dir = \"data\"\n\n{config}\n\n[http]\nlisten = \"127.0.0.1:0\"\n");
        fs::write(self.path("walrace.toml"), text).expect("walrace.toml");
    }

    /// A file or folder below the working directory of the server.
    pub(crate) fn path(&self, relative: impl AsRef<Path>) -> PathBuf {
        self.scratch.path().join(relative)
    }

    /// Starts `walrace run`.
    pub(crate) fn start(&mut self) {
        self.spawn(None);
    }

    /// Starts `walrace run`, to die when it passes a named point, such as `append:3`. The test is
    /// built with the feature `failpoints`, or it fails here.
    pub(crate) fn start_to_die_at(&mut self, failpoint: &str) {
        if !cfg!(feature = "failpoints") {
            panic!("run this test with `--features failpoints`, as `make test` does");
        }
        self.spawn(Some(failpoint));
    }

    fn spawn(&mut self, failpoint: Option<&str>) {
        assert!(self.child.is_none(), "walrace runs already");
        let _ = fs::remove_file(self.address_path());
        let log = self.path("walrace.log");
        let log = File::options().create(true).append(true).open(log).expect("a log");
        let mut command = self.command(&["run"]);
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("a second handle")).stderr(log);
        if let Some(failpoint) = failpoint {
            command.env("WALRACE_FAILPOINT", failpoint);
        }
        let child = command.process_group(0).spawn().expect("walrace");
        self.scratch.note("walrace", child.id());
        self.child = Some(child);
    }

    /// Starts it and waits until it says that it is ready.
    pub(crate) async fn start_ready(&mut self) {
        self.start();
        self.wait_ready().await;
    }

    /// Runs another subcommand with the same configuration, to its end.
    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).stdin(Stdio::null()).output().expect("walrace")
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_walrace"));
        command.args(["-c", "walrace.toml"]).args(arguments).current_dir(self.scratch.path());
        command
    }

    /// Waits until `GET /ready` answers 200.
    pub(crate) async fn wait_ready(&mut self) {
        let log = self.path("walrace.log");
        let ready = async || {
            if let Some(code) = self.exit_code() {
                panic!("walrace ended with {code}:\n{}", self.log_tail());
            }
            let reply = self.try_get("/ready").await?;
            (reply.0 == 200).then_some(())
        };
        wait_for(READY_LIMIT, ready, || format!("not ready:\n{}", read_tail(&log))).await;
    }

    /// The address of its HTTP listener, once `run` has written it beside its data.
    pub(crate) fn address(&self) -> Option<String> {
        let text = fs::read_to_string(self.address_path()).ok()?;
        text.lines().next().map(str::to_owned)
    }

    fn address_path(&self) -> PathBuf {
        self.path("data/http.addr")
    }

    /// Status and body of `GET path`.
    pub(crate) async fn get(&self, path: &str) -> (u16, String) {
        let reply = self.try_get(path).await;
        reply.unwrap_or_else(|| panic!("no reply to GET {path}:\n{}", self.log_tail()))
    }

    /// Status and body of `GET path`, where the server may be down.
    pub(crate) async fn try_get(&self, path: &str) -> Option<(u16, String)> {
        let url = format!("http://{}{path}", self.address()?);
        let reply = http_client().get(url).timeout(Duration::from_secs(5)).send().await.ok()?;
        let status = reply.status().as_u16();
        Some((status, reply.text().await.ok()?))
    }

    /// The sum of a metric's samples whose labels contain each of `labels` (`sink="lake"`).
    pub(crate) async fn metric(&self, name: &str, labels: &[&str]) -> Option<f64> {
        let (_, text) = self.try_get("/metrics").await?;
        let values = text.lines().filter_map(|line| {
            let (series, value) = line.rsplit_once(' ')?;
            let (metric, rest) = series.split_once('{').unwrap_or((series, ""));
            let matches = metric == name && labels.iter().all(|label| rest.contains(label));
            matches.then(|| value.parse::<f64>().ok()).flatten()
        });
        let values: Vec<f64> = values.collect();
        (!values.is_empty()).then(|| values.iter().sum())
    }

    /// `kill -9`, and waits until it is gone.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
            self.scratch.forget("walrace");
        }
    }

    /// SIGTERM, and the code that it ends with.
    pub(crate) async fn stop(&mut self) -> ExitStatus {
        let child = self.child.as_ref().expect("walrace runs");
        kill_process(Pid::from_child(child), Signal::TERM).expect("SIGTERM");
        self.wait_exit(Duration::from_secs(30)).await
    }

    /// Waits until it ends by itself, as at a failpoint.
    pub(crate) async fn wait_exit(&mut self, limit: Duration) -> ExitStatus {
        let log = self.path("walrace.log");
        let ended = async || self.exit_code();
        let code =
            wait_for(limit, ended, || format!("walrace still runs:\n{}", read_tail(&log))).await;
        self.child = None;
        self.scratch.forget("walrace");
        code
    }

    /// Whether the process is there.
    pub(crate) fn is_running(&mut self) -> bool {
        self.child.is_some() && self.exit_code().is_none()
    }

    fn exit_code(&mut self) -> Option<ExitStatus> {
        self.child.as_mut()?.try_wait().expect("its state")
    }

    /// Process id, for `/proc`.
    pub(crate) fn pid(&self) -> u32 {
        self.child.as_ref().expect("walrace runs").id()
    }

    /// Everything that it printed, over all its starts.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.path("walrace.log")).unwrap_or_default()
    }

    pub(crate) fn log_tail(&self) -> String {
        read_tail(&self.path("walrace.log"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the log of walrace, {}", self.log_tail());
        }
        self.kill();
    }
}

fn read_tail(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    format!("{}:\n{}", path.display(), tail(&text, 40))
}

/// An HTTP client; its TLS wants the crypto provider named, though nothing here uses TLS.
pub(crate) fn http_client() -> reqwest::Client {
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::new()
}

/// A source table for [`Server::new`], over the unix socket.
pub(crate) fn source_toml(name: &str, url: &str) -> String {
    let url = Value::from(url);
    format!("[source.{name}]\nkind = \"postgres\"\nurl = {url}\n")
}
