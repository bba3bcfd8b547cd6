//! Backfills while the stream goes on: through kills, pauses and commits that are not visible yet.

mod scene;

use std::{sync::Arc, time::Duration};

use self::scene::{
    Churn, Replayed, all_changes, backfill, create, lake, server, tables, wait_state,
};
use crate::kit::{Cluster, wait_for};

const ALL: &str = "\"churn.*\"";

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_were_there_before_are_read_once_beside_the_stream() {
    let cluster = Cluster::start().await;
    create(&cluster, 3000).await;
    let mut server = server(&cluster, ALL, "");
    server.start_ready().await;
    let said = backfill(&server, &["start", "--watch"]);
    assert!(said.contains("backfill 1 begins"), "{said}");
    let changes = all_changes(&cluster, &server).await;
    let replayed = Replayed::of(&changes);
    replayed.assert_equals(&cluster, &tables()).await;
    assert_eq!(replayed.reads.values().sum::<u64>(), 7 * 3000);
    assert_eq!(replayed.read_twice, 0);
    let keys: std::collections::BTreeSet<_> =
        changes.iter().map(|change| change["idempotency_key"].to_string()).collect();
    assert_eq!(keys.len(), changes.len(), "each change has a key of its own");
    let status = wait_state(&server, 1, "done").await;
    assert_eq!((&status["rows"], &status["seconds_left"]), (&21_000.into(), &().into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backfill_killed_at_random_moments_under_load_ends_with_the_tables_state() {
    const ROWS: u32 = 8000;
    let cluster = Arc::new(Cluster::start().await);
    create(&cluster, ROWS).await;
    // Small chunks: there shall be many of them to be killed in.
    let more = "[source.app.backfill]\nchunk_bytes_max = 262144\n";
    let mut server = server(&cluster, ALL, more);
    server.start_ready().await;
    let churn = Churn::begin(&cluster, ROWS);
    backfill(&server, &["start"]);
    let mut rng = fastrand::Rng::with_seed(11);
    for _ in 0..20 {
        tokio::time::sleep(Duration::from_millis(rng.u64(20..400))).await;
        server.kill();
        server.start();
    }
    server.wait_ready().await;
    wait_state(&server, 1, "done").await;
    let committed = churn.stop().await;
    let changes = all_changes(&cluster, &server).await;
    let replayed = Replayed::of(&changes);
    println!("{committed} transactions, {} changes, {:?}", changes.len(), replayed.reads);
    replayed.assert_equals(&cluster, &tables()).await;
    // A row whose key moved into blocks that are read later may be read under both.
    assert!(replayed.read_twice < 200, "{} rows were read twice", replayed.read_twice);
    assert!(replayed.reads.values().sum::<u64>() > 5 * u64::from(ROWS));
}

/// A transaction whose commit is in the log and that nobody sees, because it waits for a standby
/// that does not come.
async fn commit_unseen(cluster: &Arc<Cluster>, sql: &str) -> tokio::task::JoinHandle<()> {
    let (unseen, sql) = (Arc::clone(cluster), format!("begin; {sql}; commit"));
    let session = cluster.connect().await;
    let waits = || "select count(*) from pg_stat_activity where wait_event = 'SyncRep'";
    #[expect(clippy::disallowed_methods, reason = "the test awaits it")]
    let task = tokio::spawn(async move {
        session.batch_execute(&sql).await.unwrap();
        drop(unseen);
    });
    let look = async || (cluster.value(waits()).await == 1).then_some(());
    wait_for(Duration::from_secs(20), look, || "it never waits for the standby".into()).await;
    task
}

async fn await_standby(cluster: &Cluster, name: &str) {
    cluster.configure(&format!("synchronous_standby_names = '{name}'"));
    cluster.reload().await;
    let query = "select current_setting('synchronous_standby_names')";
    let look = async || (cluster.value(query).await == name).then_some(());
    wait_for(Duration::from_secs(20), look, || "the setting never changes".into()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_is_in_the_log_and_not_visible_yet_is_not_undone_by_a_read() {
    let cluster = Arc::new(Cluster::start().await);
    cluster
        .sql(
            "create schema churn; create table churn.done (id int primary key);
             create table churn.t (id int primary key, v int, pad text);
             insert into churn.t select n, 0, repeat('x', 500) from generate_series(1, 20000) n",
        )
        .await;
    let more = "[source.app.backfill]\nworkers = 1\nchunk_bytes_max = 65536\nchunk_ms = 1\n";
    let mut server = server(&cluster, ALL, more);
    server.start_ready().await;
    // One that waits before the backfill begins: it is waited for.
    await_standby(&cluster, "nobody").await;
    let before = commit_unseen(&cluster, "update churn.t set v = 1 where id in (1, 2000)").await;
    backfill(&server, &["start"]);
    let waits = async || {
        let status = scene::statuses(&server).await.pop()?;
        status["reason"].as_str()?.contains("is written to by a transaction").then_some(())
    };
    wait_for(scene::PATIENCE, waits, || "it does not wait for the writer".into()).await;
    await_standby(&cluster, "").await;
    before.await.unwrap();
    // One that begins to wait in its middle: what it hides is read again until it is seen.
    let some = async || {
        let status = scene::statuses(&server).await.pop()?;
        (status["rows"].as_u64()? > 0).then_some(())
    };
    wait_for(scene::PATIENCE, some, || "nothing is read".into()).await;
    await_standby(&cluster, "nobody").await;
    let during = commit_unseen(&cluster, "update churn.t set v = 2 where id in (3, 19999)").await;
    let again = async || {
        let status = scene::statuses(&server).await.pop()?;
        (status["chunks_again"].as_u64()? > 2 || status["state"] == "done").then_some(status)
    };
    let status = wait_for(scene::PATIENCE, again, || "nothing is read again".into()).await;
    assert_eq!(status["state"], "running", "the whole table was read meanwhile: {status}");
    await_standby(&cluster, "").await;
    during.await.unwrap();
    wait_state(&server, 1, "done").await;
    let replayed = Replayed::of(&all_changes(&cluster, &server).await);
    replayed.assert_equals(&cluster, &["churn.t".to_owned()]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backfill_is_paused_resumed_and_cancelled_and_ends_where_a_kill_left_it() {
    let cluster = Arc::new(Cluster::start().await);
    cluster
        .sql(
            "create schema churn; create table churn.done (id int primary key);
             create table churn.t (id int primary key, pad text);
             insert into churn.t select n, repeat('x', 900) from generate_series(1, 3000) n",
        )
        .await;
    let more = "[source.app.backfill]\nworkers = 1\nchunk_bytes_max = 65536\nchunk_ms = 1\n";
    let mut server = server(&cluster, ALL, more);
    server.start_ready().await;
    backfill(&server, &["start", "churn.t", "--why", "a test"]);
    backfill(&server, &["pause", "1", "--why", "lunch"]);
    let paused = wait_state(&server, 1, "paused").await;
    assert!(paused["reason"].as_str().unwrap().contains("lunch"), "{paused}");
    assert!(paused["rows"].as_u64().unwrap() < 3000, "{paused}");
    server.kill();
    server.start_ready().await;
    assert_eq!(wait_state(&server, 1, "paused").await["rows"], paused["rows"]);
    backfill(&server, &["resume", "1"]);
    let done = wait_state(&server, 1, "done").await;
    assert_eq!(done["rows"], 3000);
    let replayed = Replayed::of(&all_changes(&cluster, &server).await);
    assert_eq!((replayed.reads["t"], replayed.read_twice), (3000, 0));

    backfill(&server, &["start", "churn.t"]);
    backfill(&server, &["cancel", "2"]);
    wait_state(&server, 2, "cancelled").await;
    let refused = server.run(&["backfill", "resume", "2"]);
    assert!(!refused.status.success());
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(text.contains("backfill 2 is cancelled already"), "{text}");
    let list = backfill(&server, &["list"]);
    assert!(list.contains("done") && list.contains("cancelled"), "{list}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_part_of_a_table_is_read_for_one_sink_alone_and_a_dry_run_reads_nothing() {
    let cluster = Arc::new(Cluster::start().await);
    cluster
        .sql(
            "create schema churn; create table churn.done (id int primary key);
             create table churn.t (id int primary key, a text, b text);
             insert into churn.t select n, 'a' || n, 'b' || n from generate_series(1, 500) n;
             analyze churn.t",
        )
        .await;
    let mut server = server(&cluster, ALL, "[sink.other]\nkind = \"file\"\npath = \"o.jsonl\"\n");
    server.start_ready().await;
    let plan = backfill(&server, &["start", "--dry-run"]);
    assert!(plan.contains("churn.t") && plan.contains("500"), "{plan}");
    assert!(scene::statuses(&server).await.is_empty());
    let chosen =
        ["start", "churn.t", "--sink", "lake", "--where", "id % 10 = 3", "--columns", "id,b"];
    backfill(&server, &[&chosen[..], &["--watch"]].concat());
    let changes = all_changes(&cluster, &server).await;
    let reads: Vec<_> = changes.iter().filter(|change| change["op"] == "r").collect();
    assert_eq!(reads.len(), 50);
    let after = &reads[0]["after"];
    assert_eq!((&after["id"], &after["a"], &after["b"]), (&3.into(), &().into(), &"b3".into()));
    let other = crate::kit::FileRecorder::new(server.path("o.jsonl"));
    let has_end = |changes: &[serde_json::Value]| {
        changes.iter().any(|change| change["source_table"] == "done")
    };
    let others = other.wait_until(scene::PATIENCE, has_end).await;
    assert!(others.iter().all(|change| change["op"] != "r"), "{others:?}");
    let refused = server.run(&["backfill", "start", "churn.missing"]);
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(text.contains("no captured table fits `churn.missing`"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_sink_begins_with_the_rows_of_its_tables() {
    let cluster = Arc::new(Cluster::start().await);
    cluster
        .sql(
            "create schema churn; create table churn.done (id int primary key);
             create table churn.t (id int primary key);
             create table churn.u (id int primary key);
             insert into churn.t select generate_series(1, 100);
             insert into churn.u select generate_series(1, 100)",
        )
        .await;
    let mut server = server(&cluster, ALL, "");
    server.start_ready().await;
    server.stop().await;
    let config = scene::config(&cluster, ALL, "");
    let added = "[sink.late]\nkind = \"file\"\npath = \"late.jsonl\"\nbackfill = true\n\
                 tables = [\"churn.u\"]\nfrom = \"now\"\n";
    server.set_config(&format!("{config}\n{added}"));
    server.start_ready().await;
    wait_state(&server, 1, "done").await;
    let late = crate::kit::FileRecorder::new(server.path("late.jsonl"));
    let changes = late.wait_until(scene::PATIENCE, |changes| changes.len() >= 100).await;
    assert!(changes.iter().all(|c| c["op"] == "r" && c["source_table"] == "u"), "{changes:?}");
    server.stop().await;
    server.start_ready().await;
    assert_eq!(scene::statuses(&server).await.len(), 1, "it is asked for once");
    assert!(lake(&server).changes_so_far().iter().all(|change| change["op"] != "r"));
}

#[tokio::test(flavor = "multi_thread")]
async fn partitions_are_read_under_their_roots_name_and_a_rewritten_table_anew() {
    let cluster = Arc::new(Cluster::start().await);
    cluster
        .sql(
            "create schema churn; create table churn.done (id int primary key);
             create table churn.p (id int primary key, pad text) partition by range (id);
             create table churn.p1 partition of churn.p for values from (0) to (2000);
             create table churn.p2 (pad text, id int not null);
             alter table churn.p attach partition churn.p2 for values from (2000) to (9000);
             insert into churn.p select n, repeat('x', 700) from generate_series(1, 4000) n",
        )
        .await;
    let more = "[source.app.backfill]\nworkers = 1\nchunk_bytes_max = 65536\nchunk_ms = 1\n";
    let mut server = server(&cluster, "\"churn.p\", \"churn.done\"", more);
    server.start_ready().await;
    backfill(&server, &["start", "churn.p"]);
    let some = async || {
        let status = scene::statuses(&server).await.pop()?;
        (status["rows"].as_u64()? > 0).then_some(())
    };
    wait_for(scene::PATIENCE, some, || "nothing is read".into()).await;
    cluster.sql("delete from churn.p where id % 2 = 0").await;
    for table in ["churn.p1", "churn.p2"] {
        let session = cluster.connect().await;
        session.batch_execute(&format!("vacuum full {table}")).await.unwrap();
    }
    wait_state(&server, 1, "done").await;
    let replayed = Replayed::of(&all_changes(&cluster, &server).await);
    replayed.assert_equals(&cluster, &["churn.p".to_owned()]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_without_a_key_are_read_as_a_whole_and_each_copy_of_a_row_counts() {
    let cluster = Arc::new(Cluster::start().await);
    cluster
        .sql(
            "create schema churn; create table churn.done (id int primary key);
             create table churn.t (id int, pad text);
             alter table churn.t replica identity full;
             insert into churn.t select n % 200, 'x' from generate_series(1, 4000) n;
             create table churn.log (id int);
             insert into churn.log select generate_series(1, 1000)",
        )
        .await;
    let mut server = server(&cluster, ALL, "");
    server.start_ready().await;
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let (loaded, until) = (Arc::clone(&cluster), Arc::clone(&stop));
    #[expect(clippy::disallowed_methods, reason = "the test awaits it")]
    let load = tokio::spawn(async move {
        let (session, mut round) = (loaded.connect().await, 0);
        while !until.load(std::sync::atomic::Ordering::Relaxed) {
            round += 1;
            let id = round % 200;
            let one = format!("(select ctid from churn.t where id = {id} limit 1)");
            let sql = format!(
                "delete from churn.t where ctid = {one};
                 update churn.t set pad = 'y' where ctid = (select ctid from churn.t
                                                                  where id = {} limit 1);
                 insert into churn.t values ({id}, 'x'); insert into churn.log values ({round})",
                (id + 7) % 200,
            );
            session.batch_execute(&sql).await.unwrap();
        }
    });
    backfill(&server, &["start", "churn.t", "churn.log", "--watch"]);
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    load.await.unwrap();
    let changes = all_changes(&cluster, &server).await;
    let (_, status) = server.get("/status").await;
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    let end = &status["sources"][0]["journal"]["end"];
    let path = format!("/sources/app/changes?from=start&operations=message&to={end}");
    let (_, marks) = server.get(&path).await;
    for table in ["t", "log"] {
        // What was read is the table at the mark that opened the fence; what came before belongs
        // to an older copy of it.
        let opens = |mark: &&serde_json::Value| {
            let content = mark["message"]["content"].as_str();
            let content = content.unwrap_or_else(|| panic!("no mark: {mark}"));
            content.contains(&format!("\"churn.{table}\"")) && content.contains("opens")
        };
        let marks = marks.lines().map(|line| serde_json::from_str(line).unwrap());
        let marks: Vec<serde_json::Value> =
            marks.filter(|mark: &serde_json::Value| mark["op"] == "m").collect();
        let from = marks.iter().find(opens).unwrap_or_else(|| panic!("{table}: {marks:?}"));
        let from = from["offset"].as_u64();
        let of_table = |change: &&serde_json::Value| {
            change["source_table"] == table && change["offset"].as_u64() > from
        };
        let rows = copies(changes.iter().filter(of_table));
        let mut real = std::collections::BTreeMap::<String, i64>::new();
        for row in cluster.rows(&format!("select * from churn.{table}")).await {
            *real.entry(row.to_string()).or_default() += 1;
        }
        assert_eq!(rows, real, "{table}");
    }
}

/// How many copies of each row the changes leave. What goes away and was not there is one of which
/// nobody has heard.
fn copies<'a>(
    changes: impl Iterator<Item = &'a serde_json::Value>,
) -> std::collections::BTreeMap<String, i64> {
    let mut rows = std::collections::BTreeMap::<String, i64>::new();
    for change in changes {
        if change["before"].is_object() {
            let left = rows.entry(change["before"].to_string()).or_default();
            *left = (*left - 1).max(0);
        }
        if change["after"].is_object() {
            *rows.entry(change["after"].to_string()).or_default() += 1;
        }
    }
    rows.retain(|_, count| *count != 0);
    rows
}
