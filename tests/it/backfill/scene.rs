//! Tables of every kind of key under a load that never stops, and what a sink makes of them.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use serde_json::Value;
use tokio::task::JoinSet;

use crate::kit::{Cluster, FileRecorder, Server, source_toml, wait_for};

pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// Tables by the kind of their key: the columns, the key's columns, and their values for a number.
const KINDS: [(&str, &str, &[&str], &[&str]); 7] = [
    ("big", "k bigint", &["k"], &["$1::bigint"]),
    ("uid", "k uuid", &["k"], &["md5($1::text)::uuid"]),
    ("icu", "k text collate churn.loose", &["k"], &["'Ключ-' || $1"]),
    ("com", "k1 text collate churn.loose, k2 int", &["k1", "k2"], &["'Grp' || ($1 % 50)", "$1"]),
    (
        "enu",
        "k1 churn.mood, k2 int",
        &["k1", "k2"],
        &["(array['glad','\"sad\"','so, so'])[1 + $1 % 3]::churn.mood", "$1"],
    ),
    ("num", "k numeric", &["k"], &["($1::numeric / 7)"]),
    ("tim", "k timestamptz", &["k"], &["'1999-12-31 23:00+01'::timestamptz + $1 * interval '1 s'"]),
];

/// The tables, in the order of [`KINDS`].
pub(super) fn tables() -> Vec<String> {
    KINDS.iter().map(|kind| format!("churn.{}", kind.0)).collect()
}

/// Creates the tables with so many rows each.
pub(super) async fn create(cluster: &Cluster, rows: u32) {
    cluster
        .sql(
            "create schema churn; create table churn.done (id int primary key);
             create collation churn.loose
               (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
             create type churn.mood as enum ('glad', '\"sad\"', 'so, so')",
        )
        .await;
    for (name, columns, key, values) in KINDS {
        let (key, values) = (key.join(", "), values.join(", ").replace("$1", "n"));
        cluster
            .sql(&format!(
                "create table churn.{name} ({columns}, v bigint, pad text, primary key ({key}));
                 insert into churn.{name}
                 select {values}, 0, repeat(md5(n::text), 5) from generate_series(1, {rows}) n"
            ))
            .await;
    }
}

/// Sessions that insert, update, delete, move keys and roll back until they are stopped.
pub(super) struct Churn {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    sessions: JoinSet<()>,
}

impl Churn {
    pub(super) fn begin(cluster: &Arc<Cluster>, rows: u32) -> Self {
        let (stop, done) = (Arc::default(), Arc::default());
        let mut sessions = JoinSet::new();
        for seed in 0..3 {
            let (cluster, stop, done) = (Arc::clone(cluster), Arc::clone(&stop), Arc::clone(&done));
            sessions.spawn(async move { churn(&cluster, (seed, rows), &stop, &done).await });
        }
        Self { stop, done, sessions }
    }

    /// Stops, and says how many transactions were committed.
    pub(super) async fn stop(mut self) -> u64 {
        self.stop.store(true, Relaxed);
        while let Some(ended) = self.sessions.join_next().await {
            ended.unwrap();
        }
        self.done.load(Relaxed)
    }
}

async fn churn(cluster: &Cluster, (seed, rows): (u64, u32), stop: &AtomicBool, done: &AtomicU64) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let session = cluster.connect().await;
    while !stop.load(Relaxed) {
        let mut sql = String::from("begin;");
        for _ in 0..rng.usize(1..5) {
            sql.push_str(&statement(&mut rng, rows));
        }
        sql.push_str(if rng.u8(0..10) == 0 { "rollback" } else { "commit" });
        // A deadlock or a key that is taken rolls back, as it does for any application.
        match session.batch_execute(&sql).await {
            Ok(()) => done.fetch_add(1, Relaxed),
            Err(_) => session.batch_execute("rollback").await.map_or(0, |()| 0),
        };
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

fn statement(rng: &mut fastrand::Rng, rows: u32) -> String {
    let (name, _, key, values) = KINDS[rng.usize(..KINDS.len())];
    // Also numbers that have no row yet.
    let mut number = || rng.u32(1..rows + rows / 5).to_string();
    let of = |number: &str| values.join(", ").replace("$1", number);
    let (one, other) = (of(&number()), of(&number()));
    let key = key.join(", ");
    match rng.u8(0..10) {
        0..5 => format!("update churn.{name} set v = v + 1 where ({key}) = ({one});"),
        5 => format!("update churn.{name} set pad = repeat('x', 9) where ({key}) = ({one});"),
        6 => format!("delete from churn.{name} where ({key}) = ({one});"),
        7 | 8 => {
            format!("insert into churn.{name} values ({one}, -1, 'new') on conflict do nothing;")
        }
        _ => format!(
            "update churn.{name} set ({key}) = row({other}), v = v + 100 where ({key}) = ({one})
             and not exists (select from churn.{name} where ({key}) = ({other}));"
        ),
    }
}

/// The rows of each table by key, as the changes of a sink leave them.
#[derive(Debug, Default)]
pub(super) struct Replayed {
    pub(super) rows: BTreeMap<String, BTreeMap<String, Value>>,
    /// Rows that a backfill read, by table.
    pub(super) reads: BTreeMap<String, u64>,
    /// Rows that it read although it had read one of the same key before.
    pub(super) read_twice: u64,
    keys: BTreeMap<String, std::collections::BTreeSet<String>>,
}

impl Replayed {
    pub(super) fn of(changes: &[Value]) -> Self {
        let mut replayed = Self::default();
        changes.iter().for_each(|change| replayed.apply(change));
        replayed
    }

    fn apply(&mut self, change: &Value) {
        let table = change["source_table"].as_str().unwrap_or_default().to_owned();
        let rows = self.rows.entry(table.clone()).or_default();
        let (before, after) = (&change["before"], &change["after"]);
        match change["op"].as_str().unwrap() {
            "t" => rows.clear(),
            "d" => drop(rows.remove(&key_of(&table, before))),
            op @ ("c" | "u" | "r") => {
                if before.is_object() {
                    rows.remove(&key_of(&table, before));
                }
                let key = key_of(&table, after);
                if op == "r" {
                    *self.reads.entry(table.clone()).or_default() += 1;
                    if !self.keys.entry(table).or_default().insert(key.clone()) {
                        self.read_twice += 1;
                    }
                }
                rows.insert(key, after.clone());
            }
            other => panic!("an operation {other}"),
        }
    }

    /// Fails unless each table has the rows that it has here.
    pub(super) async fn assert_equals(&self, cluster: &Cluster, tables: &[String]) {
        for table in tables {
            let name = table.split('.').next_back().unwrap();
            let real = cluster.rows(&format!("select * from {table}")).await;
            let real: BTreeMap<_, _> =
                real.into_iter().map(|row| (key_of(name, &row), row)).collect();
            let empty = BTreeMap::new();
            let ours = self.rows.get(name).unwrap_or(&empty);
            let wrong = real.iter().filter(|(key, row)| ours.get(*key) != Some(row));
            let wrong: Vec<_> = wrong.map(|(key, row)| (key, row, ours.get(key))).collect();
            let more: Vec<_> = ours.keys().filter(|key| !real.contains_key(*key)).collect();
            assert!(
                wrong.is_empty() && more.is_empty(),
                "{table}: {} rows of {} are wrong or lacking, such as {:?}; {} too many: {:?}",
                wrong.len(),
                real.len(),
                wrong.first(),
                more.len(),
                more.first(),
            );
        }
    }
}

/// The key of a row, by the table's kind; by its first column where it is none of them.
fn key_of(table: &str, row: &Value) -> String {
    let kind = KINDS.iter().find(|kind| kind.0 == table);
    let columns = kind.map_or(&["id"][..], |kind| kind.2);
    columns.iter().map(|column| row[*column].to_string()).collect::<Vec<_>>().join("|")
}

/// A Walrace with a file sink on a cluster; `more` is added to its source's table.
pub(super) fn server(cluster: &Cluster, tables: &str, more: &str) -> Server {
    Server::new(&config(cluster, tables, more))
}

pub(super) fn config(cluster: &Cluster, tables: &str, more: &str) -> String {
    let source = source_toml("app", &cluster.unix_url());
    let lake = "[sink.lake]\nkind = \"file\"\npath = \"lake.jsonl\"\n";
    format!("{source}tables = [{tables}]\n{more}\n{lake}")
}

pub(super) fn lake(server: &Server) -> FileRecorder {
    FileRecorder::new(server.path("lake.jsonl"))
}

/// Runs `walrace backfill ...`, which must succeed; what it printed.
#[track_caller]
pub(super) fn backfill(server: &Server, arguments: &[&str]) -> String {
    let output = server.run(&[&["backfill"], arguments].concat());
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// The backfills, as the API tells them.
pub(super) async fn statuses(server: &Server) -> Vec<Value> {
    let (code, body) = server.get("/backfills").await;
    assert_eq!(code, 200, "{body}");
    serde_json::from_str(&body).unwrap()
}

/// Waits until a backfill is in a state; its status then.
pub(super) async fn wait_state(server: &Server, id: u64, state: &str) -> Value {
    let look = async || {
        let all = statuses(server).await;
        let one = all.into_iter().find(|one| one["id"] == id)?;
        (one["state"] == state).then_some(one)
    };
    wait_for(PATIENCE, look, || format!("backfill {id} is never {state}\n{}", server.log_tail()))
        .await
}

/// Waits until the file has all that was committed before, and gives its changes. The table
/// `churn.done` was there from the start.
pub(super) async fn all_changes(cluster: &Cluster, server: &Server) -> Vec<Value> {
    cluster.sql("insert into churn.done select count(*) + 1 from churn.done").await;
    let last = cluster.value("select max(id) from churn.done").await;
    let look = async || {
        let changes = lake(server).changes();
        let ends =
            |change: &Value| change["source_table"] == "done" && change["after"]["id"] == last;
        changes.iter().rev().any(ends).then_some(changes)
    };
    wait_for(PATIENCE, look, || format!("the end never comes\n{}", server.log_tail())).await
}
