//! Kills at random moments and at every named point of both loops, under a load that never stops.
//!
//! The assertion is always the same: what the sink holds, replayed, equals the tables row for row;
//! nothing lost, nothing out of order, and nothing twice in the file.

use std::time::Duration;

use fastrand::Rng;

use crate::kit::{
    Answer, Cluster, Delivery, FileRecorder, Ledger, Load, Pace, Proxy, Recorder, Server, Stop,
    check, source_toml, wait_for,
};

const PACE: Pace = Pace { seed: 7, sessions: 2, pause: Duration::from_millis(2) };

/// Everything that a chaos test drives.
struct Scene {
    cluster: Cluster,
    /// Between the server and PostgreSQL.
    link: Proxy,
    hook: Recorder,
    server: Server,
}

impl Scene {
    async fn set() -> Self {
        let cluster = Cluster::start().await;
        Ledger::create(&cluster).await;
        let hook = Recorder::start().await;
        let link = Proxy::to(cluster.port()).await;
        let source = source_toml("app", &cluster.url_at(link.port()));
        let server = Server::new(&format!(
            "{source}tables = [\"ledger.*\"]\n\n\
             [sink.lake]\nkind = \"file\"\npath = \"lake.jsonl\"\nrotate_bytes_max = 4000000\n\n\
             [sink.hook]\nkind = \"webhook\"\nurl = \"{}\"\nretry_ms_min = 10\nretry_ms_max = 200\n\
             batch_changes_max = 200\n\n\
             [journal]\nsegment_bytes_max = 1000000\nage_ms_max = 1000\n",
            hook.url()
        ));
        let mut scene = Self { cluster, link, hook, server };
        scene.server.start_ready().await; // the slot is there before the first change
        scene.server.kill();
        scene
    }

    /// Runs until both sinks have everything that was committed, and compares with the tables.
    async fn settle(mut self, load: Load) {
        let (committed, aborted) = load.stop().await;
        if !self.server.is_running() {
            self.server.start();
        }
        self.server.wait_ready().await;
        self.cluster.sql("insert into ledger.tx values (-1, 0, now())").await;
        let file = FileRecorder::new(self.server.path("lake.jsonl"));
        file.wait_until(Duration::from_secs(60), has_end).await;
        let hooked = self.hook.wait_until(has_end).await;
        assert!(self.server.stop().await.success());
        let changes = file.changes();
        let tables = Ledger::final_state(&self.cluster).await;
        let messages = Ledger::messages(&self.cluster).await;
        let once = check(&changes, &tables, &messages, Delivery::Once);
        println!(
            "{} changes of {committed} transactions ({aborted} rolled back); webhook: {} twice",
            once.changes,
            check(&hooked, &tables, &messages, Delivery::AtLeastOnce).duplicates
        );
        once.assert_clean();
        check(&hooked, &tables, &messages, Delivery::AtLeastOnce).assert_clean();
    }
}

fn has_end(changes: &[serde_json::Value]) -> bool {
    changes.iter().rev().any(|change| change["after"]["no"] == -1)
}

#[tokio::test(flavor = "multi_thread")]
async fn chaos_of_kills_restarts_and_cuts_loses_nothing() {
    let kills = std::env::var("WALRACE_CHAOS_KILLS").ok().and_then(|text| text.parse().ok());
    let seed = std::env::var("WALRACE_CHAOS_SEED").ok().and_then(|text| text.parse().ok());
    let mut rng = Rng::with_seed(seed.unwrap_or(42));
    let mut scene = Scene::set().await;
    let load = Ledger::load(&scene.cluster, PACE);
    for kill in 0..kills.unwrap_or(10) {
        scene.server.start();
        tokio::time::sleep(Duration::from_millis(rng.u64(5..1500))).await;
        match kill % 5 {
            2 => scene.link.cut_after_bytes(rng.u64(1..100_000)),
            3 => {
                scene.hook.go_down().await;
                tokio::time::sleep(Duration::from_millis(rng.u64(5..300))).await;
                scene.hook.come_back().await;
            }
            4 => scene.cluster.restart(Stop::Immediate).await,
            _ => {}
        }
        tokio::time::sleep(Duration::from_millis(rng.u64(0..500))).await;
        scene.server.kill();
    }
    scene.settle(load).await;
}

/// The named points of both loops, of the journal and of the file sink, with the passes after which
/// the process dies there.
const POINTS: [&str; 20] = [
    "capture::before_append:3",
    "journal::before_write:2",
    "journal::after_write:3",
    "journal::after_sync:4",
    "journal::segment_created:2",
    "journal::segment_sealed:1",
    "journal::trim_removed:1",
    "capture::before_confirm:3",
    "source::before_confirm:2",
    "source::after_confirm:2",
    "capture::after_confirm:5",
    "deliver::before_transform:3",
    "deliver::before_write:4",
    "deliver::after_write:3",
    "deliver::before_advance:2",
    "file::after_data:3",
    "file::after_data_sync:2",
    "file::after_sidecar:3",
    "file::rotation_intent:1",
    "file::rotated:1",
];

#[tokio::test(flavor = "multi_thread")]
async fn chaos_at_each_step_of_both_loops_loses_nothing() {
    let mut scene = Scene::set().await;
    let load = Ledger::load(&scene.cluster, PACE);
    for point in POINTS {
        scene.server.start_to_die_at(point);
        println!("to die at {point}");
        let died = scene.server.wait_exit(Duration::from_secs(60)).await;
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&died), Some(9), "at {point}");
    }
    scene.settle(load).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_is_down_harms_neither_the_slot_nor_another_sink() {
    let mut scene = Scene::set().await;
    scene.hook.always(Answer::Refuse(503));
    scene.server.start_ready().await;
    let load = Ledger::load(&scene.cluster, PACE);
    scene.hook.wait_until_asked(3).await;
    let file = FileRecorder::new(scene.server.path("lake.jsonl"));
    file.wait_until(Duration::from_secs(30), |seen| seen.len() > 2_000).await;
    let behind = "select pg_current_wal_flush_lsn() - confirmed_flush_lsn < 16 * 1024 * 1024 \
                  from pg_replication_slots";
    wait_for(
        Duration::from_secs(10),
        async || (scene.cluster.value(behind).await == true).then_some(()),
        || "the slot is held back by a sink that is down".to_owned(),
    )
    .await;
    assert!(scene.hook.changes().is_empty());
    scene.hook.always(Answer::Accept);
    scene.settle(load).await;
}

/// WAL that an application writes while a target is down; `make chaos` asks for a gigabyte.
const DOWN_WAL_MB: u64 = 48;
/// A row of this many bytes stays within its page: its WAL is little more than itself.
const ROW_BYTES: u64 = 7_500;

#[tokio::test(flavor = "multi_thread")]
async fn chaos_of_a_large_load_with_a_target_down_holds_back_neither_slot_nor_file() {
    let asked = std::env::var("WALRACE_CHAOS_WAL_MB").ok().and_then(|text| text.parse().ok());
    let megabytes = asked.unwrap_or(DOWN_WAL_MB);
    let rows = (megabytes << 20) / ROW_BYTES / 100 * 100 + 100;
    let mut scene = Scene::set().await;
    let bulk = "create table ledger.bulk (id int primary key, body text); \
                alter table ledger.bulk alter body set storage plain";
    scene.cluster.sql(bulk).await;
    scene.hook.go_down().await;
    scene.server.start_ready().await;
    let begin = scene.cluster.value("select pg_current_wal_lsn()").await;
    for first in (0..rows).step_by(100) {
        let insert = format!(
            "insert into ledger.bulk select i, repeat(chr(65 + i % 26), {ROW_BYTES}) \
             from generate_series({first}, {first} + 99) i"
        );
        scene.cluster.sql(&insert).await;
    }
    let text = |value: serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let begin = text(begin);
    let written = format!("select (pg_current_wal_lsn() - '{begin}') / 1048576");
    let behind = "select pg_current_wal_flush_lsn() - confirmed_flush_lsn \
                  from pg_replication_slots";
    let number = |value: serde_json::Value| {
        value.as_f64().or_else(|| value.as_str()?.parse().ok()).expect("a number")
    };
    let (behind, written) =
        (number(scene.cluster.value(behind).await), number(scene.cluster.value(&written).await));
    println!("{written:.0} MB of WAL, {rows} rows; the slot is {:.1} MB behind", behind / 1e6);
    assert!(written >= megabytes as f64, "too little was written");
    assert!(behind < 16.0 * 1024.0 * 1024.0, "the slot is {behind} bytes behind");

    let cursor = async |sink: &str| scene.server.metric("walrace_sink_cursor", &[sink]).await;
    let reached = |cursor: Option<f64>| cursor.is_some_and(|cursor| cursor >= rows as f64);
    let limit = Duration::from_secs(5);
    wait_for(
        limit,
        async || reached(cursor("lake").await).then_some(()),
        || "the file is behind".to_owned(),
    )
    .await;
    assert!(!reached(cursor("hook").await), "nothing can have reached a target that is down");

    scene.hook.come_back().await;
    let limit = Duration::from_secs(30 + megabytes);
    wait_for(
        limit,
        async || reached(cursor("hook").await).then_some(()),
        || "the webhook does not catch up".to_owned(),
    )
    .await;
    let seen: std::collections::BTreeSet<_> =
        scene.hook.changes().iter().map(|change| change["after"]["id"].to_string()).collect();
    assert_eq!(seen.len() as u64, rows);
    assert!(scene.server.stop().await.success());
}
