//! The real binary: killed in the middle, short of disk, and with far more than it may hold.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use fastrand::Rng;
use tokio::task::JoinSet;

use crate::{
    kit::{Cluster, FileRecorder, Server, SmallDisk, source_toml, wait_for},
    streaming::{SCHEMA, rows, run},
};

const PATIENCE: Duration = Duration::from_secs(120);

fn config(cluster: &Cluster, source: &str, rest: &str) -> String {
    let head = source_toml("app", &cluster.unix_url());
    format!(
        "{head}decoding_bytes_max = 65536\n{source}\n\n\
         [sink.lake]\nkind = \"file\"\npath = \"lake.jsonl\"\n\n{rest}"
    )
}

/// Every id that the file has, in its order, by table; each change once.
fn ids(file: &FileRecorder, table: &str) -> Vec<i64> {
    let changes = file.changes();
    let offsets: Vec<_> = changes.iter().map(|change| change["offset"].as_u64().unwrap()).collect();
    assert!(offsets.is_sorted_by(|a, b| a < b), "a change came twice, or out of its order");
    let of_table = changes.iter().filter(|change| change["source_table"] == table);
    of_table.map(|change| change["after"]["id"].as_i64().unwrap()).collect()
}

/// The files that hold open transactions.
fn spooled(server: &Server) -> usize {
    std::fs::read_dir(server.path("data/spool/app")).map_or(0, Iterator::count)
}

/// A transaction of 40,000 rows, some of them rolled back, around which others commit; the process
/// dies at `point` meanwhile.
async fn killed_at(point: &str) {
    let cluster = Cluster::start().await;
    cluster.sql(SCHEMA).await;
    let mut server = Server::new(&config(&cluster, "", ""));
    server.start_ready().await;
    server.kill();
    server.start_to_die_at(point);
    let a = cluster.connect().await;
    run(&a, "begin").await;
    for round in 0..40 {
        run(&a, &rows("t", round * 1_000)).await;
        if round == 10 {
            run(&a, &format!("savepoint s; {}; rollback to s", rows("t", 900_000))).await;
        }
        cluster.sql(&format!("insert into u values ({round}, 'x')")).await;
    }
    run(&a, "commit").await;
    cluster.sql("insert into u values (40, 'last')").await;
    let died = server.wait_exit(PATIENCE).await;
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&died), Some(9), "at {point}");
    server.start_ready().await;
    let file = FileRecorder::new(server.path("lake.jsonl"));
    file.wait_for_text(PATIENCE, "\"last\"").await;
    assert!(server.stop().await.success());
    assert!(ids(&file, "t").into_iter().eq(0..40_000), "{point}");
    assert!(ids(&file, "u").into_iter().eq(0..41), "{point}");
    assert_eq!(spooled(&server), 0, "{point}");
}

#[tokio::test]
async fn killed_while_it_spools_it_gets_everything_again_once() {
    killed_at("source::spool_write:3").await;
    killed_at("source::spool_write:12").await;
}

#[tokio::test]
async fn killed_while_it_reads_back_it_leaves_no_part_and_gets_everything_again_once() {
    killed_at("source::replayed:1").await;
    killed_at("source::replayed:3").await;
    killed_at("source::read_back").await;
}

#[tokio::test]
async fn killed_with_a_part_in_the_journal_it_leaves_no_part_and_gets_everything_again_once() {
    killed_at("journal::after_part:1").await;
    killed_at("journal::after_part:2").await;
}

/// Writes transactions of up to 3,000 rows, a part of which is rolled back, until it is told to end.
async fn write(cluster: &Cluster, number: i64, stop: &AtomicBool) {
    let session = cluster.connect().await;
    let mut rng = Rng::with_seed(number.unsigned_abs());
    let mut next = number * 1_000_000_000;
    while !stop.load(Ordering::Relaxed) {
        run(&session, "begin").await;
        for _ in 0..rng.u32(1..4) {
            let (rows, undone) = (rng.i64(1..1_000), rng.u32(..4) == 0);
            let insert = format!(
                "savepoint s; insert into t select i, repeat(md5(i::text), 6)
                 from generate_series({next}, {next} + {rows}) i"
            );
            run(&session, &insert).await;
            run(&session, if undone { "rollback to s" } else { "release s" }).await;
            next += rows + 1;
        }
        run(&session, if rng.u32(..6) == 0 { "rollback" } else { "commit" }).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kills_at_random_moments_amid_open_transactions_lose_nothing_and_bring_nothing_twice() {
    let seed = std::env::var("WALRACE_CHAOS_SEED").ok().and_then(|text| text.parse().ok());
    let seed = seed.unwrap_or_else(|| fastrand::u64(..1_000_000));
    println!("WALRACE_CHAOS_SEED={seed}");
    let cluster = Arc::new(Cluster::start().await);
    cluster.sql("create table t (id bigint primary key, body text)").await;
    let mut server = Server::new(&config(&cluster, "", ""));
    server.start_ready().await;
    let stop = Arc::new(AtomicBool::new(false));
    let mut writers = JoinSet::new();
    for number in 1..4 {
        let (cluster, stop) = (Arc::clone(&cluster), Arc::clone(&stop));
        writers.spawn(async move { write(&cluster, number, &stop).await });
    }
    let mut rng = Rng::with_seed(seed);
    for _ in 0..8 {
        // A random moment is what this test is about.
        tokio::time::sleep(Duration::from_millis(rng.u64(100..1_200))).await;
        server.kill();
        server.start_ready().await;
    }
    stop.store(true, Ordering::Relaxed);
    while let Some(ended) = writers.join_next().await {
        ended.unwrap();
    }
    cluster.sql("insert into t values (-1, 'the last')").await;
    let file = FileRecorder::new(server.path("lake.jsonl"));
    file.wait_for_text(PATIENCE, "the last").await;
    let streamed = "select stream_txns from pg_stat_replication_slots";
    assert!(cluster.value(streamed).await.as_u64().unwrap() > 10);
    assert!(server.stop().await.success());
    let mut seen = ids(&file, "t");
    seen.sort_unstable();
    let rows = cluster.rows("select id from t order by id").await;
    let rows: Vec<_> = rows.iter().map(|row| row["id"].as_i64().unwrap()).collect();
    assert!(seen == rows, "{} changes of {} rows", seen.len(), rows.len());
    assert_eq!(spooled(&server), 0);
}

/// The largest resident size of the server so far.
fn peak_bytes(server: &Server) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_of_300_mb_takes_disk_while_it_is_open_and_no_more_memory_than_a_small_one() {
    let cluster = Cluster::start().await;
    cluster.sql("create table t (id int primary key, body text)").await;
    cluster.sql("create table u (id int primary key, body text)").await;
    let mut server = Server::new(&config(&cluster, "tables = [\"public.*\"]", ""));
    server.start_ready().await;
    let a = cluster.connect().await;
    run(&a, "begin").await;
    let count = 300_000;
    run(
        &a,
        &format!(
            "insert into t select i, (select string_agg(md5(i::text || j), '')
             from generate_series(1, 31) j) from generate_series(1, {count}) i"
        ),
    )
    .await;
    let grown = async || {
        let bytes = server.metric("walrace_source_spool_bytes", &["source=\"app\""]).await?;
        (bytes > 150e6).then_some(())
    };
    wait_for(PATIENCE, grown, || format!("it is not spooled:\n{}", server.log())).await;
    cluster.sql("insert into u values (1, 'meanwhile')").await;
    let file = FileRecorder::new(server.path("lake.jsonl"));
    file.wait_for_text(PATIENCE, "meanwhile").await;
    let spooling = peak_bytes(&server);
    run(&a, "commit").await;
    cluster.sql("insert into u values (2, 'last')").await;
    let gone = async || (spooled(&server) == 0).then_some(());
    wait_for(PATIENCE, gone, || "it is not read back".into()).await;
    let captured = async || {
        let changes = server.metric("walrace_source_changes_total", &["source=\"app\""]).await?;
        (changes >= f64::from(count + 2)).then_some(())
    };
    wait_for(PATIENCE, captured, || format!("it does not arrive:\n{}", server.log())).await;
    let peak = peak_bytes(&server);
    println!("peak memory: {spooling} bytes while it was open, {peak} bytes in all");
    assert!(spooling < 100 << 20, "{spooling} bytes");
    assert!(peak < 200 << 20, "{peak} bytes");
    assert_eq!(server.metric("walrace_source_spool_bytes", &[]).await, Some(0.0));
    assert!(server.stop().await.success());
}

#[tokio::test]
async fn an_open_transaction_that_does_not_fit_on_the_disk_is_said_and_comes_once_there_is_room() {
    let cluster = Cluster::start().await;
    cluster.sql(SCHEMA).await;
    let rest = "[journal]\nreserve_bytes = 4000000\n";
    let mut server = Server::new(&config(&cluster, "", rest));
    let _disk = SmallDisk::mount(server.path("data"), 24);
    server.start_ready().await;
    let a = cluster.connect().await;
    run(&a, "begin").await;
    let noise = "insert into t select i, (select string_agg(md5(i::text || j), '')
                 from generate_series(1, 31) j) from generate_series(1, 40000) i";
    run(&a, noise).await;
    let said = async || {
        let (_, body) = server.get("/ready").await;
        (body.contains("an open transaction does not fit") && body.contains("data/spool/app"))
            .then_some(())
    };
    wait_for(PATIENCE, said, || format!("it never says why it waits:\n{}", server.log())).await;
    assert!(server.log().contains("streaming = false"), "{}", server.log());
    run(&a, "rollback").await;
    cluster.sql("insert into u values (1, 'last')").await;
    let file = FileRecorder::new(server.path("lake.jsonl"));
    file.wait_for_text(PATIENCE, "\"last\"").await;
    assert_eq!(spooled(&server), 0);
    assert!(server.stop().await.success());
}
