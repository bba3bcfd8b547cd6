//! Promises of the feature list that have no better home: kinds of source, the envelope's schema,
//! filters that are empty, signals, what survives a restart, a load that is drained.

use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::kit::{Answer, Cluster, FileRecorder, Recorder, Server, source_toml};

const PATIENCE: Duration = Duration::from_secs(30);
const LAKE: &str = "\n[sink.lake]\nkind = \"file\"\npath = \"lake.jsonl\"\n";

async fn begin(schema: &str, sinks: &str) -> (Cluster, Server, FileRecorder) {
    let cluster = Cluster::start().await;
    cluster.sql(schema).await;
    let mut server =
        Server::new(&format!("{}{LAKE}{sinks}", source_toml("app", &cluster.unix_url())));
    server.start_ready().await;
    let file = FileRecorder::new(server.path("lake.jsonl"));
    (cluster, server, file)
}

fn ids(changes: &[Value]) -> Vec<u64> {
    changes.iter().map(|change| change["after"]["id"].as_u64().unwrap()).collect()
}

fn letters(changes: &[Value]) -> Vec<&str> {
    changes.iter().map(|change| change["op"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn each_kind_of_source_that_is_listed_passes_the_capture_test() {
    let (cluster, server, file) = begin("create table t (id int primary key, v text)", "").await;
    let listed = server.run(&["source", "kinds"]);
    let listed = String::from_utf8(listed.stdout).unwrap();
    let kinds: Vec<&str> =
        listed.lines().map(|line| line.split_whitespace().next().unwrap()).collect();
    assert_eq!(kinds, ["postgres"], "a kind that is claimed needs its own run below");
    cluster
        .sql("insert into t values (1, 'a'); update t set v = 'b'; delete from t; truncate t")
        .await;
    let changes = file.wait_until(PATIENCE, |seen| seen.len() >= 4).await;
    assert_eq!(letters(&changes), ["c", "u", "d", "t"]);
}

#[tokio::test]
async fn every_envelope_of_a_real_run_passes_its_published_schema() {
    let schema = "create table plain (id int primary key, v text, big text);
        create table whole (id int, at timestamptz, tags text[], doc jsonb, price numeric);
        alter table whole replica identity full;
        alter table plain alter big set storage external;
        create table loose (v text)";
    let (cluster, _server, file) = begin(schema, "").await;
    cluster
        .sql(
            "insert into plain values (1, 'ü \"x\"', repeat('x', 9000)), (2, null, null);
             update plain set v = 'y' where id = 1; update plain set id = 3 where id = 2;
             insert into whole values (1, 'infinity', '{a,null}', '{\"a\": [1]}', 'NaN');
             update whole set price = 1.50; delete from whole; delete from plain;
             insert into loose values ('no key'); truncate plain, loose;
             select pg_logical_emit_message(true, 'outbox', 'text');
             select pg_logical_emit_message(false, 'outbox', '\\xff00'::bytea)",
        )
        .await;
    let seen = |letter: &'static str, count: usize| {
        move |seen: &[Value]| seen.iter().filter(|change| change["op"] == letter).count() >= count
    };
    file.wait_until(PATIENCE, |all| seen("m", 2)(all) && seen("t", 2)(all)).await;
    let schema = include_str!("../../docs/schema/native.schema.json");
    let validator = jsonschema::validator_for(&serde_json::from_str(schema).unwrap()).unwrap();
    let changes = file.changes_so_far();
    for change in &changes {
        if let Err(error) = validator.validate(change) {
            panic!("{error}\n{change:#}");
        }
    }
    for (letter, count) in [("c", 4), ("u", 3), ("d", 3), ("t", 2), ("m", 2)] {
        let found = letters(&changes).iter().filter(|op| **op == letter).count();
        assert_eq!(found, count, "{letter} in {changes:#?}");
    }
    let unchanged = changes.iter().find(|change| change["after"]["v"] == "y").unwrap();
    assert_eq!(unchanged["unchanged"], json!(["big"]));
    assert!(validator.validate(&json!({"op": "u"})).is_err(), "the schema refuses something");
}

#[tokio::test]
async fn an_empty_list_of_schemas_takes_all_of_them() {
    let sinks =
        "schemas = []\n\n[sink.one]\nkind = \"file\"\npath = \"one.jsonl\"\nschemas = [\"Odd\"]\n";
    let schema = "create schema \"Odd\"; create table \"Odd\".t (id int primary key);
        create table t (id int primary key)";
    let (cluster, server, file) = begin(schema, sinks).await;
    cluster.sql("insert into t values (1); insert into \"Odd\".t values (2)").await;
    let changes = file.wait_until(PATIENCE, |seen| seen.len() >= 2).await;
    assert_eq!(ids(&changes), [1, 2]);
    let one = FileRecorder::new(server.path("one.jsonl"));
    assert_eq!(ids(&one.wait_until(PATIENCE, |seen| !seen.is_empty()).await), [2]);
}

#[tokio::test]
async fn either_signal_ends_it_within_the_grace_time_under_load_and_nothing_is_lost() {
    let (cluster, mut server, file) = begin("create table t (id int primary key)", "").await;
    let mut next = 0;
    for signal in [Signal::INT, Signal::TERM] {
        let session = cluster.connect().await;
        let mut load = tokio::task::JoinSet::new();
        let from = next;
        load.spawn(async move {
            for id in from..from + 300 {
                session.batch_execute(&format!("insert into t values ({id})")).await.unwrap();
            }
        });
        next += 300;
        let some = |seen: &[Value]| seen.len() as u64 > from + 50;
        file.wait_until(PATIENCE, some).await;
        let pid = Pid::from_raw(i32::try_from(server.pid()).unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
        let code = server.wait_exit(Duration::from_secs(11)).await;
        assert!(code.success(), "{signal:?}: {code}");
        load.join_next().await.unwrap().unwrap();
        server.start_ready().await;
    }
    let changes = file.wait_until(PATIENCE, |seen| seen.len() as u64 >= next).await;
    assert_eq!(ids(&changes), (0..next).collect::<Vec<_>>());
}

#[tokio::test]
async fn offsets_confirmations_and_configuration_survive_a_restart() {
    let hook = Recorder::start().await;
    let sinks = format!(
        "\n[sink.hook]\nkind = \"webhook\"\nurl = \"{}\"\nbatch_changes_max = 10\n\
         retry_ms_min = 20\nretry_ms_max = 50\n",
        hook.url()
    );
    let (cluster, mut server, file) = begin("create table t (id int primary key)", &sinks).await;
    let shown = server.run(&["config", "show"]).stdout;
    // Two batches are confirmed, the third is refused for as long as the target is down.
    hook.next([Answer::Accept, Answer::Accept]);
    hook.always(Answer::Refuse(503));
    cluster.sql("insert into t select generate_series(0, 29)").await;
    file.wait_until(PATIENCE, |seen| seen.len() == 30).await;
    hook.wait_until_asked(4).await;
    let confirmed = "select confirmed_flush_lsn::text from pg_replication_slots";
    let before = cluster.value(confirmed).await;
    server.kill();
    server.start_ready().await;
    hook.always(Answer::Accept);
    let hooked = hook.wait_until(|seen| seen.len() >= 30).await;
    assert_eq!(ids(&hooked), (0..30).collect::<Vec<_>>(), "what was confirmed does not come again");
    let status: Value = serde_json::from_str(&server.get("/status").await.1).unwrap();
    assert_eq!(status["sources"][0]["journal"]["end"], 30, "offsets go on, none is given twice");
    cluster.sql("insert into t values (30)").await;
    let changes = file.wait_until(PATIENCE, |seen| seen.len() >= 31).await;
    assert_eq!(changes[30]["offset"], 30);
    let query = format!(
        "select confirmed_flush_lsn >= '{}' from pg_replication_slots",
        before.as_str().unwrap()
    );
    assert_eq!(cluster.value(&query).await, true, "the slot never goes back");
    assert_eq!(server.run(&["config", "show"]).stdout, shown);
}

#[tokio::test]
async fn two_hundred_thousand_changes_are_drained_and_none_is_lost() {
    const ROWS: u64 = 200_000;
    let (cluster, mut server, file) =
        begin("create table t (id int primary key, v text)", "").await;
    assert!(server.stop().await.success());
    for block in 0..ROWS / 1000 {
        let (from, to) = (block * 1000, block * 1000 + 999);
        cluster
            .sql(&format!(
                "insert into t select i, md5(i::text) from generate_series({from}, {to}) i"
            ))
            .await;
    }
    server.start_ready().await;
    let last = format!("\"offset\":{},", ROWS - 1);
    file.wait_for_text(Duration::from_secs(180), &last).await;
    assert!(server.stop().await.success());
    assert_eq!(ids(&file.changes()), (0..ROWS).collect::<Vec<_>>());
}
