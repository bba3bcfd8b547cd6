//! A source with the plugin wal2json from its slot to its end: what is adopted and refused, what is
//! found before it starts, and what kills and restarts leave.

use std::time::Duration;

use walrace::{
    config::{Plugin, Postgres},
    error::Class,
    source::{
        Known,
        postgres::{self, Level},
    },
};

use crate::{
    kit::{
        Cluster, Delivery, FileRecorder, Ledger, Pace, Server, Stop, check, source_toml, wait_for,
    },
    source::{PATIENCE, Reading},
    source_wal2json::{cluster, of, version},
};

#[tokio::test]
async fn a_slot_of_the_plugin_is_adopted_and_one_of_another_is_refused_with_what_to_do() {
    let cluster = cluster().await;
    cluster.sql("create table t (id int primary key)").await;
    cluster.sql("select pg_create_logical_replication_slot('walstream_slot', 'wal2json')").await;
    cluster.sql("insert into t values (1)").await;
    let slot = Some("walstream_slot".to_owned());
    let config = Postgres { slot, ..of(Plugin::Wal2json, &cluster) };
    let mut reading = Reading::open(&config, Known::default()).await.unwrap();
    assert_eq!(reading.take(1).await.len(), 1, "what the slot kept is there");
    drop(reading);
    assert_eq!(cluster.value("select count(*) from pg_publication").await, 0);
    let wrong = Postgres { plugin: Plugin::Pgoutput, ..config.clone() };
    let refused = async || {
        let error = Reading::open(&wrong, Known::default()).await.err().expect("it is refused");
        (error.class() == Class::Config).then_some(error)
    };
    let error = wait_for(PATIENCE, refused, || "the slot is not free".into()).await;
    let text = error.to_string();
    assert!(text.contains("`wal2json`") && text.contains("`pgoutput`"), "{text}");
    assert!(error.remedy_text().unwrap().contains("plugin = \"wal2json\""), "{text}");
    cluster.sql("select pg_create_logical_replication_slot('out', 'pgoutput')").await;
    let wrong = Postgres { slot: Some("out".into()), ..config.clone() };
    let error = Reading::open(&wrong, Known::default()).await.err().unwrap();
    assert!(error.to_string().contains("`pgoutput`, not of `wal2json`"), "{error}");
    let status = postgres::status("app", &config).await.unwrap();
    assert!(status.slot.is_some() && status.publications.is_empty());
    postgres::drop("app", &config).await.unwrap();
    assert!(postgres::status("app", &config).await.unwrap().slot.is_none());
}

#[tokio::test]
async fn a_plugin_that_is_not_installed_is_said_with_the_package_to_install() {
    let installed = version();
    let missing = [14, 16, 17, 18].into_iter().find(|other| *other != installed).unwrap();
    let cluster = Cluster::version(missing).await;
    cluster.sql("create table t (id int primary key); create role limited login replication").await;
    let config = of(Plugin::Wal2json, &cluster);
    let error = postgres::create("app", &config).await.unwrap_err();
    assert_eq!(error.class(), Class::Config, "{error}");
    assert!(error.remedy_text().unwrap().contains("postgresql-<version>-wal2json"), "{error}");
    let limited = cluster.unix_url().replace("postgres@", "limited@");
    for url in [cluster.unix_url(), limited] {
        let config = Postgres { url: walrace::config::Secret::new(url), ..config.clone() };
        let findings = postgres::preflight("app", &config).await;
        let finding = findings.iter().find(|f| f.subject == "plugin wal2json").unwrap();
        assert_eq!(finding.level, Level::Error, "{finding:?}");
        assert!(finding.text.contains("wal2json_<version>"), "{finding:?}");
    }
}

#[tokio::test]
async fn what_stands_in_the_way_of_the_plugin_is_found_before_it_starts() {
    let cluster = cluster().await;
    cluster
        .sql(
            "create table t (id int primary key); create table loose (v text);
             create role limited login replication",
        )
        .await;
    cluster.sql("create database latin encoding 'LATIN1' template template0").await;
    let limited = cluster.unix_url().replace("postgres@", "limited@");
    let config = of(Plugin::Wal2json, &cluster);
    for url in [cluster.unix_url(), limited] {
        let config = Postgres { url: walrace::config::Secret::new(url), ..config.clone() };
        let findings = postgres::preflight("app", &config).await;
        let bad: Vec<_> = findings.iter().filter(|f| f.level == Level::Error).collect();
        assert!(bad.is_empty(), "{bad:?}");
        assert!(findings.iter().any(|f| f.subject == "plugin wal2json" && f.level == Level::Ok));
        assert!(findings.iter().any(|f| f.subject == "public.loose" && f.level == Level::Warning));
    }
    assert_eq!(cluster.value("select count(*) from pg_replication_slots").await, 0);
    let refuse =
        Postgres { without_identity: walrace::config::WithoutIdentity::Refuse, ..config.clone() };
    let error = Reading::open(&refuse, Known::default()).await.err().unwrap();
    assert!(error.to_string().contains("public.loose"), "{error}");
    let url = cluster.unix_url().replace("/postgres?", "/latin?");
    let latin = Postgres { url: walrace::config::Secret::new(url), ..config.clone() };
    let findings = postgres::preflight("app", &latin).await;
    assert!(findings.iter().any(|f| f.subject == "encoding" && f.level == Level::Error));
    let error = Reading::open(&latin, Known::default()).await.err().unwrap();
    assert!(error.to_string().contains("LATIN1"), "{error}");
}

/// The named points of capture with the passes after which the process dies there.
const POINTS: [&str; 7] = [
    "capture::before_append:3",
    "journal::after_write:3",
    "journal::after_sync:4",
    "capture::before_confirm:3",
    "source::before_confirm:2",
    "source::after_confirm:2",
    "capture::after_confirm:5",
];

#[tokio::test(flavor = "multi_thread")]
async fn kills_of_both_ends_lose_nothing_and_repeat_nothing() {
    let mut cluster = cluster().await;
    Ledger::create(&cluster).await;
    let source = source_toml("app", &cluster.unix_url());
    let mut server = Server::new(&format!(
        "{source}plugin = \"wal2json\"\nslot = \"walstream_slot\"\ntables = [\"ledger.*\"]\n\n\
         [sink.lake]\nkind = \"file\"\npath = \"lake.jsonl\"\n"
    ));
    server.start_ready().await; // the slot is there before the first change
    server.kill();
    let pace = Pace { seed: 11, sessions: 2, pause: Duration::from_millis(2) };
    let load = Ledger::load(&cluster, pace);
    let file = FileRecorder::new(server.path("lake.jsonl"));
    for (round, point) in POINTS.into_iter().enumerate() {
        server.start_to_die_at(point);
        let died = server.wait_exit(Duration::from_secs(60)).await;
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&died), Some(9), "at {point}");
        if round == 3 {
            cluster.restart(Stop::Immediate).await;
        }
    }
    load.stop().await;
    server.start_ready().await;
    cluster.sql("insert into ledger.tx values (-1, 0, now())").await;
    let ended =
        |seen: &[serde_json::Value]| seen.iter().rev().any(|change| change["after"]["no"] == -1);
    file.wait_until(Duration::from_secs(60), ended).await;
    assert!(server.stop().await.success());
    let tables = Ledger::final_state(&cluster).await;
    let messages = Ledger::messages(&cluster).await;
    check(&file.changes(), &tables, &messages, Delivery::Once).assert_clean();
}

#[tokio::test]
async fn a_restart_in_the_middle_of_a_transaction_begins_it_anew_with_the_same_indexes() {
    let cluster = cluster().await;
    cluster.sql("create table t (id int primary key, body text)").await;
    let config = of(Plugin::Wal2json, &cluster);
    let mut reading = Reading::open(&config, Known::default()).await.unwrap();
    let origin = Some(reading.opened.origin.clone());
    let start = reading.opened.start;
    let rows = 20_000;
    let insert = "insert into t select i, repeat('x', 1000) from generate_series(1, 20000) i";
    cluster.sql(insert).await;
    let next = tokio::time::timeout(PATIENCE, reading.opened.source.next());
    let mut first = next.await.unwrap().unwrap();
    while first.changes.is_empty() {
        let next = tokio::time::timeout(PATIENCE, reading.opened.source.next());
        first = next.await.unwrap().unwrap();
    }
    assert!(first.changes.len() < rows && first.position.is_none(), "it is in the middle");
    drop(reading);
    let known = Known { progress: Some(start), origin, has_changes: true, ..Known::default() };
    let again = async || Reading::open(&config, known.clone()).await.ok();
    let mut reading = wait_for(PATIENCE, again, || "not free again".into()).await;
    let changes = reading.take(rows).await;
    let count = first.changes.len();
    assert_eq!(changes[..count], first.changes);
    assert!(changes.iter().enumerate().all(|(i, change)| change.index as usize == i));
}

#[tokio::test]
async fn the_capture_test_and_the_commands_of_a_source_pass_with_the_plugin() {
    let cluster = cluster().await;
    cluster
        .sql("create table t (id int primary key, v text); create schema o; create table o.t ()")
        .await;
    let source = source_toml("app", &cluster.unix_url());
    let mut server = Server::new(&format!(
        "{source}plugin = \"wal2json\"\ntables = [\"public.*\"]\n\n\
         [sink.lake]\nkind = \"file\"\npath = \"lake.jsonl\"\n"
    ));
    let text = |arguments: &[&str]| {
        let output = server.run(arguments);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
        text
    };
    assert!(text(&["check"]).contains("plugin wal2json"));
    text(&["source", "create", "app"]);
    let plugin = cluster.value("select plugin from pg_replication_slots").await;
    assert_eq!(plugin, "wal2json");
    assert!(text(&["source", "status", "app"]).contains("walrace_app"));
    server.start_ready().await;
    cluster
        .sql("insert into t values (1, 'a'); update t set v = 'b'; delete from t; truncate o.t, t")
        .await;
    let file = FileRecorder::new(server.path("lake.jsonl"));
    let changes = file.wait_until(PATIENCE, |seen| seen.len() >= 4).await;
    let letters: Vec<_> = changes.iter().map(|change| change["op"].as_str().unwrap()).collect();
    assert_eq!(letters, ["c", "u", "d", "t"]);
    assert_eq!(changes[1]["after"], serde_json::json!({"id": 1, "v": "b"}));
    assert!(server.stop().await.success());
    let dropped = async || server.run(&["source", "drop", "app"]).status.success().then_some(());
    wait_for(PATIENCE, dropped, || "the slot is not free".into()).await;
    assert_eq!(cluster.value("select count(*) from pg_replication_slots").await, 0);
}
