//! Kills at random moments and at every named point of both loops, under a load that never stops.
//!
//! The assertion is always the same: what the sink holds, replayed, equals the tables row for row;
//! nothing lost, nothing out of order, and nothing twice in the file.

use std::time::Duration;

use fastrand::Rng;

use crate::kit::{
    Answer, Cluster, Delivery, FileRecorder, Ledger, Load, Pace, Recorder, Server, Stop, check,
    source_toml, wait_for,
};

const PACE: Pace = Pace { seed: 7, sessions: 2, pause: Duration::from_millis(2) };

/// Everything that a chaos test drives.
struct Scene {
    cluster: Cluster,
    hook: Recorder,
    server: Server,
}

impl Scene {
    async fn set() -> Self {
        let cluster = Cluster::start().await;
        Ledger::create(&cluster).await;
        let hook = Recorder::start().await;
        let source = source_toml("app", &cluster.unix_url());
        let server = Server::new(&format!(
            "{source}tables = [\"ledger.*\"]\n\n\
             [sink.lake]\nkind = \"file\"\npath = \"lake.jsonl\"\nrotate_bytes_max = 4000000\n\n\
             [sink.hook]\nkind = \"webhook\"\nurl = \"{}\"\nretry_ms_min = 10\nretry_ms_max = 200\n\
             batch_changes_max = 200\n\n\
             [journal]\nsegment_bytes_max = 1000000\nage_ms_max = 1000\n",
            hook.url()
        ));
        let mut scene = Self { cluster, hook, server };
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
