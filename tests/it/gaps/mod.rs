//! Every way in which a server's history can part from the journal's: each is noticed, named and
//! acceptable, and what is none goes on.

mod cluster;
mod failover;
mod past;
mod publications;
mod put_back;
mod slots;
mod standby;

use std::time::Duration;

use serde_json::Value;

use crate::kit::{Cluster, FileRecorder, Server, Setup, source_toml, wait_for};

pub(crate) const PATIENCE: Duration = Duration::from_secs(40);

/// A database with a table, captured into a file by the real binary.
pub(crate) struct Scene {
    pub(crate) cluster: Cluster,
    pub(crate) server: Server,
    pub(crate) file: FileRecorder,
    /// Rows that were inserted through the scene, and must arrive.
    inserted: Vec<i64>,
}

impl Scene {
    pub(crate) async fn set() -> Self {
        Self::with(Setup::default(), "").await
    }

    /// `keys` are further lines of the source.
    pub(crate) async fn with(setup: Setup, keys: &str) -> Self {
        Self::of(Cluster::with(setup).await, keys).await
    }

    pub(crate) async fn of(cluster: Cluster, keys: &str) -> Self {
        cluster.sql("create table t (id int primary key, v text)").await;
        Self::over(cluster, keys).await
    }

    /// Over a cluster that has the table already.
    pub(crate) async fn over(cluster: Cluster, keys: &str) -> Self {
        let server = Server::new(&config(&cluster.unix_url(), keys));
        let file = FileRecorder::new(server.path("lake.jsonl"));
        let mut scene = Self { cluster, server, file, inserted: Vec::new() };
        scene.server.start_ready().await;
        scene
    }

    /// Of parts that a test has made itself.
    pub(crate) fn at_rest(cluster: Cluster, server: Server, file: FileRecorder) -> Self {
        Self { cluster, server, file, inserted: Vec::new() }
    }

    /// Leads the source elsewhere, from the next start on.
    pub(crate) fn lead_to(&self, cluster: &Cluster, keys: &str) {
        self.server.set_config(&config(&cluster.unix_url(), keys));
    }

    /// Rows that must arrive.
    pub(crate) async fn insert(&mut self, ids: std::ops::Range<i64>) {
        insert(&self.cluster, ids.clone()).await;
        self.inserted.extend(ids);
    }

    /// As `insert`, at a server that took the place of the first one.
    pub(crate) async fn insert_at(&mut self, cluster: &Cluster, ids: std::ops::Range<i64>) {
        insert(cluster, ids.clone()).await;
        self.inserted.extend(ids);
    }

    /// Waits until every row that was inserted has arrived.
    pub(crate) async fn arrived(&self) {
        let all = |changes: &[Value]| {
            let ids = ids(changes);
            self.inserted.iter().all(|id| ids.contains(id))
        };
        self.file.wait_until(PATIENCE, all).await;
    }

    /// Waits until the slot is confirmed up to now: it has run for a while then, and a source that
    /// stops does not look like one that could not start, with which the process ends.
    pub(crate) async fn confirmed(&self) {
        let recovery = "case when pg_is_in_recovery() then pg_last_wal_replay_lsn()
                        else pg_current_wal_lsn() end";
        let end = self.cluster.value(&format!("select ({recovery})::text")).await;
        let query = format!(
            "select confirmed_flush_lsn >= '{}' from pg_replication_slots
             where slot_name = 'walrace_app'",
            end.as_str().unwrap()
        );
        holds(&self.cluster, &query).await;
    }

    /// That no row has arrived twice.
    pub(crate) fn assert_each_once(&self) {
        let mut seen = ids(&self.file.changes_so_far());
        let all = seen.len();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), all, "a row arrived twice");
    }

    pub(crate) async fn stop(&mut self) {
        assert!(self.server.stop().await.success());
    }

    /// Starts it, and it must end at once with an error that has all `words`; so must `check` and
    /// `source status`.
    pub(crate) async fn refused(&mut self, words: &[&str]) {
        let before = self.server.log().len();
        self.server.start();
        let code = self.server.wait_exit(PATIENCE).await;
        assert!(!code.success());
        names(&self.server.log()[before..], words);
        self.named_by_commands(words);
    }

    /// What the commands say of a source that has stopped.
    pub(crate) fn named_by_commands(&self, words: &[&str]) {
        let (success, said) = self.walrace(&["check"]);
        assert!(!success, "{said}");
        names(&said, words);
        let (_, said) = self.walrace(&["source", "status"]);
        names(&said, words);
    }

    /// Waits until the running source has stopped and says so with all `words`: `/ready`, the log
    /// and `lag`.
    pub(crate) async fn stopped(&self, words: &[&str]) {
        let probe = async || {
            let (code, body) = self.server.try_get("/ready").await?;
            (code == 503 && words.iter().all(|word| body.contains(word))).then_some(())
        };
        let said = || format!("it never names {words:?}:\n{}", self.server.log());
        wait_for(PATIENCE, probe, said).await;
        names(&self.server.log(), words);
        names(&self.walrace(&["lag"]).1, words);
    }

    /// Accepts the gap, with further `arguments`; the journal has it then, and its reason has all
    /// `words`.
    pub(crate) fn accept(&self, arguments: &[&str], words: &[&str]) {
        let command = ["source", "create", "app", "--accept-gap"];
        let (success, said) = self.walrace(&[&command[..], arguments].concat());
        assert!(success, "{said}");
        names(&said, words);
        let (_, said) = self.walrace(&["journal", "info"]);
        names(&said, &["GAP"]);
        names(&said, words);
    }

    /// Starts it, and what is inserted from now on arrives.
    pub(crate) async fn goes_on(&mut self, ids: std::ops::Range<i64>) {
        self.server.start_ready().await;
        self.insert(ids).await;
        self.arrived().await;
    }

    /// As `goes_on`, where it runs already.
    pub(crate) async fn goes_on_running(&mut self, ids: std::ops::Range<i64>) {
        self.insert(ids).await;
        self.arrived().await;
    }

    /// Whether a command succeeded, and what it said.
    pub(crate) fn walrace(&self, arguments: &[&str]) -> (bool, String) {
        let output = self.server.run(arguments);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.success(), text(&output.stdout) + &text(&output.stderr))
    }
}

pub(crate) async fn insert(cluster: &Cluster, ids: std::ops::Range<i64>) {
    let (first, last) = (ids.start, ids.end - 1);
    cluster.sql(&format!("insert into t select generate_series({first}, {last})")).await;
}

fn config(url: &str, keys: &str) -> String {
    let source = source_toml("app", url);
    format!("{source}{keys}\n[sink.lake]\nkind = \"file\"\npath = \"lake.jsonl\"\n")
}

/// The ids of the rows of `t` that were inserted.
pub(crate) fn ids(changes: &[Value]) -> Vec<i64> {
    let rows = changes.iter().filter(|change| change["source_table"] == "t");
    rows.filter_map(|change| change["after"]["id"].as_i64()).collect()
}

fn names(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "no `{word}` in:\n{text}");
    }
}

/// Waits until a query answers `true`.
pub(crate) async fn holds(cluster: &Cluster, query: &str) {
    let probe = async || (cluster.value(query).await == true).then_some(());
    wait_for(PATIENCE, probe, || format!("it never holds: {query}")).await;
}

/// Writes some log that has nothing to do with `t`.
pub(crate) async fn fill(cluster: &Cluster, rows: u32) {
    let sql = format!("create table fill as select generate_series(1, {rows}); drop table fill");
    cluster.sql(&sql).await;
}

/// Runs statements in another database than that of a cluster's own sessions.
pub(crate) async fn execute(url: &str, sql: &str) {
    let (url, sql) = (url.to_owned(), sql.to_owned());
    let run = move || {
        let mut session = walrace::source::postgres::Session::connect(&url).unwrap();
        session.execute(&sql).unwrap();
    };
    tokio::task::spawn_blocking(run).await.unwrap();
}
