//! The kit's own tests: a tool that lies makes every test above it worthless.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

use super::*;

#[tokio::test]
async fn a_cluster_starts_from_its_template_and_stops_with_the_test() {
    drop(Cluster::start().await); // makes the template, where this is the first test
    let begin = Instant::now();
    let cluster = Cluster::start().await;
    let took = begin.elapsed();
    assert!(took < Duration::from_secs(5), "a start from the template took {took:?}");
    cluster.sql("create table t(id int primary key); insert into t values (1), (2)").await;
    assert_eq!(cluster.rows("table t order by id").await, [json!({"id": 1}), json!({"id": 2})]);
    assert_eq!(cluster.value("select current_setting('wal_level')").await, "logical");
    let folder = cluster.data_dir();
    drop(cluster);
    assert!(!folder.exists());
}

#[tokio::test]
async fn a_cluster_comes_back_after_each_kind_of_stop_and_from_a_snapshot() {
    let mut cluster = Cluster::start().await;
    cluster.sql("create table t(id int primary key); insert into t values (1)").await;
    for how in [Stop::Fast, Stop::Immediate, Stop::Kill] {
        cluster.restart(how).await;
        assert_eq!(cluster.value("select count(*) from t").await, 1);
    }
    let snapshot = cluster.snapshot().await;
    cluster.sql("insert into t values (2)").await;
    cluster.restore(&snapshot).await;
    assert_eq!(cluster.value("select count(*) from t").await, 1);
}

#[tokio::test]
async fn a_standby_is_promoted_to_a_timeline_of_its_own() {
    let mut primary = Cluster::start().await;
    primary.sql("create table t(id int primary key)").await;
    let standby = primary.standby().await;
    primary.sql("insert into t values (1)").await;
    let arrived = async || (standby.value("select count(*) from t").await == 1).then_some(());
    wait_for(Duration::from_secs(20), arrived, || "the row is not on the standby".into()).await;
    standby.promote().await;
    standby.sql("insert into t values (2)").await;
    standby.sql("checkpoint").await;
    let timeline = standby.value("select timeline_id from pg_control_checkpoint()").await;
    assert_eq!(timeline, 2);
}

#[tokio::test]
async fn the_oldest_and_the_newest_server_start() {
    for version in [14, 18] {
        let cluster = Cluster::version(version).await;
        let number = cluster.value("select current_setting('server_version_num')::int").await;
        assert_eq!(number.as_u64().map(|n| n / 10_000), Some(version.into()));
    }
}

#[tokio::test]
async fn a_cluster_can_have_an_identity_of_its_own() {
    let usual = Cluster::start().await;
    let other = Cluster::with(Setup { own_identity: true, ..Setup::default() }).await;
    let query = "select system_identifier::text from pg_control_system()";
    assert_ne!(usual.value(query).await, other.value(query).await);
}

#[test]
fn what_a_killed_test_leaves_behind_is_cleared_away() {
    let scratch = Scratch::new("self");
    let folder = scratch.path().to_owned();
    let mut sleeper = std::process::Command::new("sleep").arg("600").spawn().unwrap();
    scratch.note("sleeper", sleeper.id());
    drop(scratch); // the watchdog sees the same: its pipe closes
    assert!(!folder.exists());
    assert!(!sleeper.wait().unwrap().success());
}

/// A server that sends back what it is sent.
async fn echo() -> (u16, JoinSet<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut server = JoinSet::new();
    server.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            connections.spawn(async move {
                let (mut from, mut to) = stream.split();
                let _ = tokio::io::copy(&mut from, &mut to).await;
            });
        }
    });
    (port, server)
}

#[tokio::test]
async fn the_proxy_passes_stalls_cuts_and_refuses() {
    let (port, _server) = echo().await;
    let proxy = Proxy::to(port).await;
    let mut stream = TcpStream::connect(("127.0.0.1", proxy.port())).await.unwrap();
    let mut reply = [0; 4];
    stream.write_all(b"ping").await.unwrap();
    stream.read_exact(&mut reply).await.unwrap();
    assert_eq!((&reply, proxy.bytes_passed()), (b"ping", 4));

    proxy.stall(true);
    stream.write_all(b"wait").await.unwrap();
    let silence = tokio::time::timeout(Duration::from_millis(200), stream.read(&mut reply)).await;
    assert!(silence.is_err(), "a stalled connection neither answers nor closes");
    proxy.stall(false);
    stream.read_exact(&mut reply).await.unwrap();
    assert_eq!(&reply, b"wait");

    proxy.delay(Duration::from_millis(100));
    let begin = Instant::now();
    stream.write_all(b"slow").await.unwrap();
    stream.read_exact(&mut reply).await.unwrap();
    assert!(begin.elapsed() >= Duration::from_millis(200), "both directions wait");
    proxy.delay(Duration::ZERO);

    proxy.cut();
    assert!(!matches!(stream.read(&mut reply).await, Ok(1..)), "a cut ends the connection");
    proxy.refuse(true);
    let mut refused = TcpStream::connect(("127.0.0.1", proxy.port())).await.unwrap();
    assert!(!matches!(refused.read(&mut reply).await, Ok(1..)));
    proxy.refuse(false);

    let mut stream = TcpStream::connect(("127.0.0.1", proxy.port())).await.unwrap();
    proxy.cut_after_bytes(6);
    stream.write_all(b"0123456789").await.unwrap();
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest).await;
    assert_eq!(rest, b"012345");
}

#[tokio::test]
async fn the_recorder_stores_or_fails_as_it_is_told() {
    let mut recorder = Recorder::start().await;
    let client = http_client();
    let post = async |offset: u64| {
        let body = json!({"data": [{"offset": offset}]}).to_string();
        let request = client.post(recorder.url()).header("X-Test", "yes").body(body);
        let reply = request.timeout(Duration::from_millis(500)).send().await;
        reply.map(|reply| reply.status().as_u16()).map_err(|error| error.is_timeout())
    };
    recorder.next([
        Answer::Accept,
        Answer::Refuse(503),
        Answer::StoreThenFail(500),
        Answer::Hang,
        Answer::Disconnect,
        Answer::StoreThenDisconnect,
    ]);
    assert_eq!(post(1).await, Ok(200));
    assert_eq!(post(2).await, Ok(503));
    assert_eq!(post(3).await, Ok(500));
    assert_eq!(post(4).await, Err(true));
    assert_eq!(post(5).await, Err(false));
    assert_eq!(post(6).await, Err(false));
    assert_eq!(post(7).await, Ok(200));
    let changes = recorder.wait_until(|changes| changes.len() == 4).await;
    let offsets: Vec<u64> = changes.iter().map(|c| c["offset"].as_u64().unwrap()).collect();
    assert_eq!(offsets, [1, 3, 6, 7]);
    assert_eq!(recorder.asked(), 7);
    assert_eq!(recorder.stored()[0].header("x-test"), Some("yes"));

    let url = recorder.url();
    recorder.go_down().await;
    let another = http_client();
    assert!(another.post(&url).body("{}").send().await.unwrap_err().is_connect());
    recorder.come_back().await;
    assert_eq!(another.post(&url).body("{}").send().await.unwrap().status(), 200);
}

#[tokio::test]
async fn the_file_recorder_leaves_out_an_unfinished_line_only_when_told() {
    let scratch = Scratch::new("file");
    let path = scratch.path().join("changes.jsonl");
    std::fs::write(&path, "{\"offset\":2}\n{\"off").unwrap();
    std::fs::write(scratch.path().join("changes.0-1.jsonl"), "{\"offset\":1}\n").unwrap();
    let file = FileRecorder::new(&path);
    assert_eq!(file.changes_so_far(), [json!({"offset": 2})]);
    assert!(std::panic::catch_unwind(|| file.changes()).is_err());
    std::fs::write(&path, "{\"offset\":2}\n").unwrap();
    assert_eq!(file.changes(), [json!({"offset": 1}), json!({"offset": 2})]);
}

#[tokio::test]
async fn the_ledger_writes_through_a_restart_and_counts_what_it_did() {
    let mut cluster = Cluster::start().await;
    Ledger::create(&cluster).await;
    let pace = Pace { seed: 7, sessions: 3, pause: Duration::ZERO };
    let load = Ledger::load(&cluster, pace);
    let enough = |load: &Load, more: u64| load.committed() >= more && load.aborted() > 0;
    let limit = Duration::from_secs(60);
    wait_for(limit, async || enough(&load, 100).then_some(()), || "no 100 commits".into()).await;
    cluster.restart(Stop::Kill).await;
    let more = load.committed() + 100;
    wait_for(limit, async || enough(&load, more).then_some(()), || "none after it".into()).await;
    let (committed, _) = load.stop().await;
    let state = Ledger::final_state(&cluster).await;
    assert!(state.count("tx") as u64 >= committed);
    for table in ["account", "order_line", "document"] {
        assert!(state.count(table) > 0, "{table} is empty");
    }
    assert!(!Ledger::messages(&cluster).await.is_empty());
}

/// One change of a ledger in the native envelope.
fn change(offset: u64, lsn: u64, index: u64, rest: &Value) -> Value {
    let mut change = json!({
        "offset": offset, "source_schema": "ledger", "before": null, "after": null, "unchanged": [],
        "source_position": {"lsn": format!("0/{lsn:X}"), "tx_id": lsn, "index": index},
    });
    for (name, value) in rest.as_object().unwrap() {
        change[name] = value.clone();
    }
    change
}

/// A document that is inserted and given a new key and version, and an entry that goes again.
fn story() -> (Vec<Value>, State) {
    let entry = json!({"who": "ann", "amount": 1, "note": null});
    let changes = vec![
        change(
            1,
            16,
            0,
            &json!({"source_table": "document", "op": "c", "key": {"id": 1},
            "after": {"id": 1, "version": 1, "body": "long"}}),
        ),
        change(
            2,
            16,
            1,
            &json!({"source_table": "entry", "op": "c", "key": entry, "after": entry}),
        ),
        change(3, 16, 2, &json!({"op": "m", "message": {"prefix": "ledger", "content": "9"}})),
        change(
            4,
            32,
            0,
            &json!({"source_table": "document", "op": "u", "key": {"id": 2},
            "before": {"id": 1}, "after": {"id": 2, "version": 2}, "unchanged": ["body"]}),
        ),
        change(
            5,
            48,
            0,
            &json!({"source_table": "entry", "op": "d", "key": entry,
            "before": entry}),
        ),
    ];
    let mut tables = State::default();
    tables.insert("document", json!({"id": 2, "version": 2, "body": "long"}));
    (changes, tables)
}

fn check_story(changes: &[Value], tables: &State, delivery: Delivery) -> Report {
    check(changes, tables, &BTreeMap::from([(9, 1)]), delivery)
}

#[test]
fn the_check_passes_what_is_right() {
    let (changes, tables) = story();
    let report = check_story(&changes, &tables, Delivery::Once);
    report.assert_clean();
    assert_eq!((report.changes, report.transactions, report.duplicates), (5, 3, 0));
    let again: Vec<Value> = changes[..3].iter().chain(&changes).cloned().collect();
    let report = check_story(&again, &tables, Delivery::AtLeastOnce);
    report.assert_clean();
    assert_eq!(report.duplicates, 3);
}

#[test]
fn the_check_notices_what_is_lost_doubled_moved_or_altered() {
    let (changes, tables) = story();
    let notices = |name: &str, changes: &[Value], tables: &State| {
        let report = check_story(changes, tables, Delivery::Once);
        assert!(!report.problems.is_empty(), "{name} passed");
    };
    for missing in 0..changes.len() {
        let mut less = changes.clone();
        less.remove(missing);
        notices(&format!("without change {missing}"), &less, &tables);
    }
    for at in 0..changes.len() - 1 {
        let mut moved = changes.clone();
        moved.swap(at, at + 1);
        notices(&format!("{at} after its successor"), &moved, &tables);
    }
    let mut twice = changes.clone();
    twice.push(changes[4].clone());
    notices("a change twice", &twice, &tables);
    let mut altered = changes.clone();
    altered[3]["after"]["version"] = json!(3);
    notices("another value", &altered, &tables);
    let mut null = changes.clone();
    null[3]["unchanged"] = json!([]);
    notices("an unchanged value that is missing", &null, &tables);
    notices("a row too many", &changes, &State::default());
    let mut more = tables;
    more.insert("account", json!({"id": 1}));
    notices("a row that never arrived", &changes, &more);
}
