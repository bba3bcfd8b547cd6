//! `walrace demo`: the first thing that a newcomer runs.

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};

use crate::kit::{Session, wait_for};

const LIMIT: Duration = Duration::from_secs(60);

/// A demo in a temporary folder of its own.
struct Demo {
    folder: tempfile::TempDir,
    child: Child,
}

impl Demo {
    fn start(arguments: &[&str]) -> Self {
        let folder = tempfile::Builder::new().prefix("walrace-it-").tempdir().unwrap();
        // As root the server runs as user postgres, who must be able to enter.
        let open = fs::Permissions::from_mode(0o755);
        fs::set_permissions(folder.path(), open).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_walrace"))
            .arg("demo")
            .args(arguments)
            .env("TMPDIR", folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .unwrap();
        Self { folder, child }
    }

    /// Reads lines until one has the text; all that were read.
    fn read_until(&self, out: &mut impl BufRead, text: &str) -> String {
        let mut lines = String::new();
        while !lines.contains(text) {
            assert!(out.read_line(&mut lines).unwrap() > 0, "it ended without `{text}`:\n{lines}");
        }
        lines
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// What it printed, and its code.
    async fn end(&mut self) -> (String, ExitStatus) {
        let mut out = self.child.stdout.take().unwrap();
        let mut err = self.child.stderr.take().unwrap();
        let reading = tokio::task::spawn_blocking(move || {
            let (mut text, mut errors) = (String::new(), String::new());
            out.read_to_string(&mut text).unwrap();
            err.read_to_string(&mut errors).unwrap();
            assert_eq!(errors, "", "after:\n{text}");
            text
        });
        let text = tokio::time::timeout(LIMIT, reading).await.unwrap().unwrap();
        (text, self.child.wait().unwrap())
    }

    /// Processes with a file or argument below the folder, by their command line.
    fn processes(&self) -> Vec<String> {
        let needle = self.folder.path().to_str().unwrap().to_owned();
        let lines = fs::read_dir("/proc").unwrap().filter_map(|entry| {
            let path = entry.ok()?.path();
            let line = fs::read(path.join("cmdline")).ok()?;
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            line.contains(&needle).then_some(line)
        });
        lines.collect()
    }

    async fn assert_gone(&self) {
        wait_for(
            Duration::from_secs(20),
            async || (self.processes().is_empty() && is_empty(self.folder.path())).then_some(()),
            || {
                let left: Vec<_> = fs::read_dir(self.folder.path()).unwrap().collect();
                format!("left behind: {:?}, {left:?}", self.processes())
            },
        )
        .await;
    }
}

fn is_empty(folder: &Path) -> bool {
    fs::read_dir(folder).unwrap().next().is_none()
}

fn only_entry(folder: &Path) -> PathBuf {
    fs::read_dir(folder).unwrap().next().unwrap().unwrap().path()
}

/// The figure at the head of the row `name` of the summary.
fn figure(text: &str, name: &str) -> u64 {
    let row = text.lines().find_map(|line| line.trim_start().strip_prefix(name));
    let row = row.unwrap_or_else(|| panic!("no row `{name}` in:\n{text}"));
    let word = row.split_whitespace().next().unwrap();
    word.replace(',', "").parse().unwrap_or_else(|_| panic!("`{word}` in:\n{text}"))
}

fn assert_proved(text: &str) {
    assert_eq!(figure(text, "lost "), 0, "{text}");
    assert!(figure(text, "committed ") > 772, "{text}"); // those are there from the beginning
    assert_eq!(figure(text, "committed "), figure(text, "delivered "), "{text}");
    assert!(figure(text, "replayed ") > 700, "{text}");
    assert!(text.contains("0 of their changes seen"), "{text}");
    assert!(text.contains("p50 ") && text.contains("p99 "), "{text}");
    assert!(!text.contains('\x1b'), "colours or movements where there is no terminal:\n{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_demo_proves_that_nothing_is_lost_and_leaves_nothing_behind() {
    let mut demo = Demo::start(&["--seconds", "3"]);
    let (text, status) = demo.end().await;
    assert!(status.success(), "{status}:\n{text}");
    assert_proved(&text);
    assert!(text.contains("insert   public.bookings"), "no live tail:\n{text}");
    assert!(is_empty(demo.folder.path()));
    demo.assert_gone().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_ends_the_demo_with_its_proof() {
    let mut demo = Demo::start(&["--rate", "400"]);
    let mut out = BufReader::new(demo.child.stdout.take().unwrap());
    let mut seen = demo.read_until(&mut out, "status: pending -> confirmed");
    demo.signal(Signal::INT);
    out.read_to_string(&mut seen).unwrap();
    let status = demo.child.wait().unwrap();
    assert!(status.success(), "{status}:\n{seen}");
    assert_proved(&seen);
    demo.assert_gone().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_that_do_not_arrive_make_the_proof_fail() {
    let mut demo = Demo::start(&[]);
    let mut out = BufReader::new(demo.child.stdout.take().unwrap());
    let mut seen = demo.read_until(&mut out, "status: pending -> confirmed");
    let mut config = tokio_postgres::Config::new();
    let sockets = only_entry(demo.folder.path()).join("postgres");
    config.host_path(sockets).user("postgres").dbname("postgres");
    let session = Session::open(&config).await.unwrap();
    let fewer = "alter publication walrace_harbor set (publish = 'insert')";
    session.batch_execute(fewer).await.unwrap();
    // Rows of the inventory are only ever updated: these updates came after, and nobody publishes.
    let value = async |query: &str| {
        session.json_rows(query).await[0]["v"].as_i64().expect("a whole number")
    };
    let altered = value("select txid_current() as v").await;
    let updated =
        format!("select count(*) as v from cabin_inventory where xmin::text::bigint > {altered}");
    let some = async || (value(&updated).await >= 5).then_some(());
    wait_for(Duration::from_secs(30), some, || "the demo updates nothing".to_owned()).await;
    drop(session);
    demo.signal(Signal::TERM);
    out.read_to_string(&mut seen).unwrap();
    assert_eq!(demo.child.wait().unwrap().code(), Some(1), "{seen}");
    assert!(figure(&seen, "lost ") > 0, "{seen}");
    assert!(seen.contains("has other values in the replay"), "{seen}");
    assert!(seen.contains("The proof has failed"), "{seen}");
    demo.assert_gone().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_demo_that_is_killed_leaves_neither_server_nor_folder() {
    let mut demo = Demo::start(&[]);
    let mut out = BufReader::new(demo.child.stdout.take().unwrap());
    demo.read_until(&mut out, "public.bookings");
    assert!(!demo.processes().is_empty());
    demo.child.kill().unwrap();
    demo.child.wait().unwrap();
    demo.assert_gone().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_without_postgresql_is_told_how_to_get_it() {
    let output = Command::new(env!("CARGO_BIN_EXE_walrace"))
        .args(["demo", "--seconds", "1"])
        .env("WALRACE_PG_BIN", "/nowhere")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(text.contains("WALRACE_PG_BIN names /nowhere"), "{text}");
    assert!(text.contains("help: "), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_demo_that_is_kept_leaves_its_folder_and_no_server() {
    let mut demo = Demo::start(&["--seconds", "1", "--keep"]);
    let (text, status) = demo.end().await;
    assert!(status.success(), "{status}:\n{text}");
    assert_eq!(demo.processes(), Vec::<String>::new());
    let kept = only_entry(demo.folder.path());
    assert!(text.contains(kept.to_str().unwrap()), "{text}");
    let changes = fs::read_to_string(kept.join("changes.jsonl")).unwrap();
    assert_eq!(changes.lines().count() as u64, figure(&text, "delivered "));
    assert!(kept.join("walrace.toml").exists() && kept.join("data").exists());
}
