//! The written order when the disk is short, on file systems that are really small: history goes,
//! then a sink is released, then capture pauses. Nothing is confirmed that is not in the journal,
//! and everything goes on by itself when there is room.

use std::time::Duration;

use serde_json::Value;
use walrace::catalog::{Catalog, LostRange};

use crate::kit::{
    Answer, Cluster, FileRecorder, Recorder, Server, SmallDisk, source_toml, wait_for,
};

const PATIENCE: Duration = Duration::from_secs(60);
const DISK_MIB: u32 = 24;
const RESERVE: u64 = 4_000_000;

/// Rows of 1,920 bytes in hex, which compress to about 1.4 KB.
const ROWS_PER_MB: u64 = 700;
const ROWS_PER_TRANSACTION: u64 = 250;

/// A database, a server whose `data` lies on a small disk if the test says so, the file sink `lake`
/// beside it and the webhook `hook`.
struct Scene {
    disk: Option<SmallDisk>,
    cluster: Cluster,
    hook: Recorder,
    server: Server,
    file: FileRecorder,
    rows: u64,
}

impl Scene {
    /// `journal` and `hook` are further lines of those tables; `small` is what lies on the disk.
    async fn set(small: Option<&str>, journal: &str, hook: &str) -> Self {
        Self::with_file(small, "lake/lake.jsonl", &config(journal, hook)).await
    }

    async fn with_file(small: Option<&str>, file: &str, config: &Config) -> Self {
        let cluster = Cluster::start().await;
        cluster.sql("create table t (id int primary key, v text)").await;
        let recorder = Recorder::start().await;
        let mut server = Server::new("");
        server.set_config(&config.text(&cluster, &recorder, file));
        let disk = small.map(|path| SmallDisk::mount(server.path(path), DISK_MIB));
        let file = FileRecorder::new(server.path(file));
        server.start_ready().await;
        Self { disk, cluster, hook: recorder, server, file, rows: 0 }
    }

    fn disk(&self) -> &SmallDisk {
        self.disk.as_ref().unwrap()
    }

    /// Commits about so many megabytes of journal, in small transactions.
    async fn load(&mut self, megabytes: u64) {
        let session = self.cluster.connect().await;
        for _ in 0..megabytes * ROWS_PER_MB / ROWS_PER_TRANSACTION {
            let statement = self.insert(ROWS_PER_TRANSACTION);
            session.batch_execute(&statement).await.unwrap();
        }
    }

    /// As `load`, no faster than the file sink.
    async fn load_with_file(&mut self, megabytes: u64) {
        for _ in 0..megabytes {
            self.load(1).await;
            self.file.wait_for_text(PATIENCE, &self.last_offset()).await;
        }
    }

    fn last_offset(&self) -> String {
        format!("\"offset\":{},", self.rows - 1)
    }

    fn insert(&mut self, rows: u64) -> String {
        let (from, to) = (self.rows, self.rows + rows - 1);
        self.rows += rows;
        format!(
            "insert into t select i, (select string_agg(md5(i || '-' || j), '')
             from generate_series(1, 60) j) from generate_series({from}, {to}) i"
        )
    }

    async fn status(&self) -> Value {
        serde_json::from_str(&self.server.get("/status").await.1).expect("JSON")
    }

    async fn sink(&self, name: &str) -> Value {
        let status = self.status().await;
        let sinks = status["sinks"].as_array().unwrap();
        sinks.iter().find(|sink| sink["name"] == name).unwrap().clone()
    }

    async fn wait_for_source(&self, what: &str, condition: impl Fn(&Value) -> bool) -> Value {
        let probe = async || {
            let source = self.status().await["sources"][0].clone();
            condition(&source).then_some(source)
        };
        wait_for(PATIENCE, probe, || format!("the source is not {what}\n{}", self.server.log()))
            .await
    }

    async fn wait_paused(&self) -> String {
        let paused = |source: &Value| {
            source["state"] == "waiting"
                && source["reason"].as_str().unwrap().contains("capture is paused")
        };
        let source = self.wait_for_source("paused", paused).await;
        source["reason"].as_str().unwrap().to_owned()
    }

    async fn wait_for_sink(&self, name: &str, condition: impl Fn(&Value) -> bool) -> Value {
        let probe = async || Some(self.sink(name).await).filter(&condition);
        wait_for(PATIENCE, probe, || format!("sink {name} never\n{}", self.server.log())).await
    }

    /// The slot never passed what is in the journal, and holds back what is not.
    async fn check_slot_is_held(&self) {
        let source = self.status().await["sources"][0].clone();
        let progress = source["journal"]["progress"]["lsn"].as_u64().unwrap();
        let query = format!(
            "select confirmed_flush_lsn <= '0/0'::pg_lsn + {progress}
                 and confirmed_flush_lsn < pg_current_wal_lsn() - 1000000
             from pg_replication_slots"
        );
        assert_eq!(self.cluster.value(&query).await, true, "{source}");
    }

    /// Each change once and in its order in the file.
    async fn check_file_has_all(&self) {
        self.file.wait_for_text(PATIENCE, &self.last_offset()).await;
        assert_eq!(ids(&self.file.changes()), (0..self.rows).collect::<Vec<_>>());
    }

    async fn lost_ranges(&self) -> Vec<LostRange> {
        self.lost_ranges_of("hook").await
    }

    async fn lost_ranges_of(&self, sink: &str) -> Vec<LostRange> {
        let catalog = Catalog::inspect(&self.server.path("data")).await.unwrap().unwrap();
        catalog.lost_ranges(sink).await.unwrap()
    }

    fn times_logged(&self, text: &str) -> usize {
        self.server.log().matches(text).count()
    }
}

impl Drop for Scene {
    /// Before its disk goes, or the end of its log would be about that.
    fn drop(&mut self) {
        self.server.kill();
    }
}

struct Config {
    journal: String,
    lake: String,
    hook: Option<String>,
}

fn config(journal: &str, hook: &str) -> Config {
    Config { journal: journal.to_owned(), lake: String::new(), hook: Some(hook.to_owned()) }
}

impl Config {
    fn text(&self, cluster: &Cluster, recorder: &Recorder, file: &str) -> String {
        let Self { journal, lake, hook } = self;
        let hook = hook.as_ref().map_or_else(String::new, |hook| {
            format!(
                "[sink.hook]\nkind = \"webhook\"\nurl = \"{}\"\nbatch = true\n\
                 retry_ms_min = 20\nretry_ms_max = 200\n{hook}\n",
                recorder.url()
            )
        });
        let source = source_toml("app", &cluster.unix_url());
        format!(
            "{source}\n[journal]\nsegment_bytes_max = 1000000\nring_bytes_max = 100000\n{journal}\n\
             [sink.lake]\nkind = \"file\"\npath = \"{file}\"\nretry_ms_min = 20\n\
             retry_ms_max = 200\n{lake}\n{hook}"
        )
    }
}

fn ids(changes: &[Value]) -> Vec<u64> {
    changes.iter().map(|change| change["after"]["id"].as_u64().unwrap()).collect()
}

fn reserve() -> String {
    format!("reserve_bytes = {RESERVE}")
}

#[tokio::test]
async fn below_the_reserve_capture_pauses_says_why_and_goes_on_by_itself() {
    let mut scene = Scene::set(Some("data"), &reserve(), "").await;
    scene.load(2).await;
    scene.check_file_has_all().await;
    scene.disk().fill(RESERVE / 2);
    scene.load(3).await;
    let reason = scene.wait_paused().await;
    for part in ["data/journal/app", "reserve", "free space on that volume"] {
        assert!(reason.contains(part), "{reason}");
    }
    let (code, body) = scene.server.get("/ready").await;
    assert!(code == 503 && body.contains("data/journal/app"), "{code} {body}");
    scene.load(3).await;
    scene.check_slot_is_held().await;
    // It stays paused, with one state and one line of the log, and does not read in vain.
    assert_eq!(scene.times_logged("source app waits"), 1, "{}", scene.server.log());
    scene.disk().drop_ballast();
    scene.check_file_has_all().await;
    scene.server.wait_ready().await;
    let hooked = scene.hook.wait_until(|seen| seen.len() as u64 >= scene.rows).await;
    assert_eq!(ids(&hooked), (0..scene.rows).collect::<Vec<_>>());
    assert_eq!(scene.sink("hook").await["lost_changes"], 0);
}

#[tokio::test]
async fn history_that_every_sink_has_goes_before_capture_pauses() {
    let mut scene = Scene::set(Some("data"), &reserve(), "").await;
    scene.load_with_file(30).await;
    scene.check_file_has_all().await;
    let source = scene.wait_for_source("trimmed", |s| s["journal"]["start"] != 0).await;
    assert_eq!(source["state"], "running", "{source}");
    assert!(scene.disk().free_bytes() >= RESERVE - 1_000_000);
    assert_eq!(scene.times_logged("source app waits"), 0, "{}", scene.server.log());
}

#[tokio::test]
async fn on_a_disk_without_a_free_byte_neither_journal_nor_catalog_loses_anything() {
    let mut scene = Scene::set(Some("data"), "reserve_bytes = 0", "").await;
    scene.load(1).await;
    scene.hook.wait_until(|seen| seen.len() as u64 >= scene.rows).await;
    scene.hook.always(Answer::Refuse(503));
    scene.disk().fill(3_000_000);
    scene.load(8).await;
    let full =
        |source: &Value| source["reason"].as_str().is_some_and(|reason| reason.contains("is full"));
    let source = scene.wait_for_source("full", full).await;
    assert!(source["reason"].as_str().unwrap().contains("data/journal/app"), "{source}");
    // Not a byte for the catalog either: the sinks cannot record their progress.
    std::fs::write(scene.disk().path().join("rest"), vec![0; 100_000]).unwrap_err();
    assert!(scene.disk().free_bytes() < 4096, "{}", scene.disk().free_bytes());
    scene.hook.always(Answer::Accept);
    let waits = |sink: &Value| {
        sink["reason"].as_str().is_some_and(|reason| reason.contains("volume of data_dir"))
    };
    scene.wait_for_sink("hook", waits).await;
    scene.check_slot_is_held().await;
    std::fs::remove_file(scene.disk().path().join("rest")).unwrap();
    scene.disk().drop_ballast();
    scene.check_file_has_all().await;
    let all = |seen: &[Value]| ids(seen).last() == Some(&(scene.rows - 1));
    let hooked = scene.hook.wait_until(all).await;
    let mut once = ids(&hooked);
    once.sort_unstable();
    once.dedup();
    assert_eq!(once, (0..scene.rows).collect::<Vec<_>>(), "at least once, and none is missing");
    scene.server.stop().await;
    let verified = scene.server.run(&["journal", "verify"]);
    assert!(verified.status.success(), "{}", String::from_utf8_lossy(&verified.stderr));
}

#[tokio::test]
async fn at_the_limit_a_sink_that_is_down_is_released_and_the_others_get_everything() {
    let limit = 4_000_000;
    let journal = format!("{}\nbytes_max = {limit}", reserve());
    let mut scene = Scene::set(Some("data"), &journal, "").await;
    scene.hook.always(Answer::Refuse(503));
    scene.load_with_file(20).await;
    scene.check_file_has_all().await;
    let sink = scene.wait_for_sink("hook", |sink| sink["lost_changes"] != 0).await;
    let within = |s: &Value| s["journal"]["bytes"].as_u64().unwrap() <= limit;
    let source = scene.wait_for_source("within its limit", within).await;
    assert_eq!(source["state"], "running");
    scene.hook.always(Answer::Accept);
    let last = scene.rows - 1;
    let hooked = scene.hook.wait_until(|seen| ids(seen).last() == Some(&last)).await;
    let lost = scene.lost_ranges().await;
    assert_eq!(lost.len(), 1, "one outage is one range: {lost:?}");
    assert_eq!(lost[0].from, 0);
    assert!(lost[0].reason.contains("bytes_max"), "{lost:?}");
    assert_eq!(ids(&hooked), (lost[0].to..scene.rows).collect::<Vec<_>>());
    assert!(sink["lost_changes"].as_u64().unwrap() <= lost[0].to);
    assert_eq!(scene.sink("hook").await["lost_changes"], lost[0].to);
    assert_eq!(scene.sink("lake").await["lost_changes"], 0);
    let metric = scene.server.metric("walrace_sink_lost_changes", &["sink=\"hook\""]).await;
    assert_eq!(metric, Some(lost[0].to as f64));
    assert_eq!(scene.times_logged("source app waits"), 0, "capture never paused");
    // What is on record outlives a restart.
    scene.server.kill();
    scene.server.start_ready().await;
    assert_eq!(scene.sink("hook").await["lost_changes"], lost[0].to);
}

#[tokio::test]
async fn a_sink_at_work_that_is_only_behind_is_waited_for_and_loses_nothing() {
    // One request a change: far slower than what comes.
    let hook = "batch_changes_max = 1";
    let mut scene = Scene::set(None, "reserve_bytes = 0\nbytes_max = 3000000", hook).await;
    scene.load_with_file(8).await;
    let last = scene.rows - 1;
    let hooked = scene.hook.wait_until(|seen| ids(seen).last() == Some(&last)).await;
    assert_eq!(ids(&hooked), (0..scene.rows).collect::<Vec<_>>());
    assert_eq!(scene.sink("hook").await["lost_changes"], 0);
    assert!(scene.server.log().contains("which is at work and catches up"));
}

#[tokio::test]
async fn a_sink_that_is_always_retained_is_not_released_and_capture_pauses_instead() {
    let journal = format!("{}\nbytes_max = 4000000", reserve());
    let mut config = config(&journal, "retain = \"always\"");
    // The file may be behind for a moment, and is not what this is about.
    config.lake = "retain = \"always\"".to_owned();
    let mut scene = Scene::with_file(Some("data"), "lake/lake.jsonl", &config).await;
    scene.hook.always(Answer::Refuse(503));
    scene.load(12).await;
    let reason = scene.wait_paused().await;
    for part in ["sink hook", "retain = \"always\"", "bytes_max", "goes on by itself"] {
        assert!(reason.contains(part), "{reason}");
    }
    scene.check_slot_is_held().await;
    scene.hook.always(Answer::Accept);
    scene.check_file_has_all().await;
    let hooked = scene.hook.wait_until(|seen| seen.len() as u64 >= scene.rows).await;
    assert_eq!(ids(&hooked), (0..scene.rows).collect::<Vec<_>>());
    assert_eq!(scene.lost_ranges().await, []);
    scene.server.wait_ready().await;
}

#[tokio::test]
async fn a_transaction_larger_than_the_limit_passes_whole() {
    let mut config = config("reserve_bytes = 0\nbytes_max = 2000000", "retain = \"always\"");
    config.lake = "retain = \"always\"".to_owned();
    let mut scene = Scene::with_file(Some("data"), "lake/lake.jsonl", &config).await;
    scene.load(1).await;
    let statement = scene.insert(10_000);
    scene.cluster.sql(&statement).await;
    scene.load(1).await;
    scene.check_file_has_all().await;
    let hooked = scene.hook.wait_until(|seen| seen.len() as u64 >= scene.rows).await;
    assert_eq!(ids(&hooked), (0..scene.rows).collect::<Vec<_>>());
    scene.wait_for_source("small", |s| s["journal"]["bytes"].as_u64().unwrap() < 2_000_000).await;
}

#[tokio::test]
async fn a_file_sink_whose_own_disk_is_full_waits_and_writes_each_change_once() {
    let config = config(&reserve(), "");
    let mut scene = Scene::with_file(Some("lake"), "lake/lake.jsonl", &config).await;
    scene.load(1).await;
    scene.check_file_has_all().await;
    scene.disk().fill(1_500_000);
    scene.load(4).await;
    let waits = |sink: &Value| sink["state"] == "waiting";
    let lake = scene.wait_for_sink("lake", waits).await;
    let reason = lake["reason"].as_str().unwrap();
    assert!(reason.contains("lake/lake.jsonl") && reason.contains("free space"), "{reason}");
    scene.hook.wait_until(|seen| seen.len() as u64 >= scene.rows).await;
    let source = scene.status().await["sources"][0].clone();
    assert_eq!(source["state"], "running", "the others go on");
    // A restart on the full disk finds the file as it was.
    scene.server.kill();
    scene.server.start_ready().await;
    scene.wait_for_sink("lake", waits).await;
    scene.disk().drop_ballast();
    scene.check_file_has_all().await;
}

#[tokio::test]
async fn a_file_sink_that_is_released_misses_what_is_on_record_and_nothing_comes_twice() {
    let config = config("reserve_bytes = 0\nbytes_max = 4000000", "");
    let mut scene = Scene::with_file(Some("lake"), "lake/lake.jsonl", &config).await;
    scene.load(1).await;
    scene.check_file_has_all().await;
    scene.disk().fill(1_500_000);
    for _ in 0..8 {
        scene.load(1).await;
        scene.hook.wait_until(|seen| seen.len() as u64 >= scene.rows).await;
    }
    scene.wait_for_sink("lake", |sink| sink["lost_changes"] != 0).await;
    scene.disk().drop_ballast();
    scene.file.wait_for_text(PATIENCE, &scene.last_offset()).await;
    let lost = scene.lost_ranges_of("lake").await;
    assert!(lost.len() == 1 && lost[0].from > 0, "{lost:?}");
    let rest = (0..lost[0].from).chain(lost[0].to..scene.rows);
    assert_eq!(ids(&scene.file.changes()), rest.collect::<Vec<_>>(), "{lost:?}");
    assert_eq!(scene.lost_ranges_of("hook").await, []);
}

#[tokio::test]
async fn the_reserve_lets_a_killed_walrace_start_again_on_the_full_disk() {
    let mut scene = Scene::set(Some("data"), &reserve(), "").await;
    scene.hook.always(Answer::Refuse(503));
    scene.load(1).await;
    scene.check_file_has_all().await;
    scene.disk().fill(RESERVE + 1_500_000);
    scene.load(6).await;
    scene.wait_paused().await;
    let free = scene.disk().free_bytes();
    assert!(free > RESERVE / 4 && free < RESERVE, "{free} bytes are left for recovery");
    let held = scene.status().await["sources"][0]["journal"]["end"].as_u64().unwrap();
    scene.server.kill();
    scene.server.start();
    let begun =
        async || scene.server.try_get("/status").await.filter(|(code, _)| *code == 200).map(|_| ());
    wait_for(PATIENCE, begun, || scene.server.log()).await;
    let reason = scene.wait_paused().await;
    assert!(reason.contains("data/journal/app") && reason.contains("reserve"), "{reason}");
    let source = scene.status().await["sources"][0].clone();
    assert_eq!(source["journal"]["end"], held, "what was in the journal is there");
    scene.hook.always(Answer::Accept);
    let hooked = scene.hook.wait_until(|seen| seen.len() as u64 >= held).await;
    assert_eq!(ids(&hooked), (0..held).collect::<Vec<_>>(), "it delivers what it has");
    scene.disk().drop_ballast();
    scene.check_file_has_all().await;
}

#[tokio::test]
async fn without_a_free_byte_a_start_fails_and_names_what_to_mend() {
    let mut scene = Scene::set(Some("data"), &reserve(), "").await;
    scene.load(1).await;
    scene.check_file_has_all().await;
    assert!(scene.server.stop().await.success());
    scene.disk().fill(0);
    scene.server.start();
    let code = scene.server.wait_exit(PATIENCE).await;
    let log = scene.server.log();
    let said = ["data/catalog.sqlite: its disk is full", "free space on the volume of data_dir"];
    assert!(!code.success() && said.iter().all(|text| log.contains(text)), "{log}");
    scene.disk().drop_ballast();
    scene.server.start_ready().await;
    scene.load(1).await;
    scene.check_file_has_all().await;
}

#[tokio::test]
async fn alarms_sound_once_before_either_limit_and_rules_can_compare() {
    let journal = format!("{}\nbytes_max = 10000000", reserve());
    let mut scene = Scene::set(Some("data"), &journal, "retain = \"always\"").await;
    scene.hook.always(Answer::Refuse(503));
    let (near, short) = ("sink hook holds", "capture pauses below");
    scene.load(5).await;
    scene.check_file_has_all().await;
    let metric = async |name: &str| scene.server.metric(name, &["source=\"app\""]).await.unwrap();
    assert_eq!(metric("walrace_journal_bytes_max").await, 10_000_000.0);
    assert_eq!(metric("walrace_journal_reserve_bytes").await, RESERVE as f64);
    let free = scene.disk().free_bytes() as f64;
    assert!((metric("walrace_journal_free_bytes").await - free).abs() < 6e6, "{free}");
    assert_eq!((scene.times_logged(near), scene.times_logged(short)), (0, 0));
    while scene.status().await["sources"][0]["journal"]["bytes"].as_u64().unwrap() < 8_200_000 {
        let rows = scene.insert(ROWS_PER_TRANSACTION);
        scene.cluster.sql(&rows).await;
        scene.check_file_has_all().await;
    }
    let heard = async |text: &str| (scene.times_logged(text) > 0).then_some(());
    wait_for(PATIENCE, || heard(near), || scene.server.log()).await;
    scene.disk().fill(RESERVE + RESERVE / 8);
    wait_for(PATIENCE, || heard(short), || scene.server.log()).await;
    // A look every 2 s does not say it again.
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!((scene.times_logged(near), scene.times_logged(short)), (1, 1));
    assert_eq!(scene.status().await["sources"][0]["state"], "running");
}

#[tokio::test]
async fn a_sink_that_stopped_holds_the_journal_up_to_its_limit() {
    let mut scene = Scene::set(Some("data"), "reserve_bytes = 0\nbytes_max = 4000000", "").await;
    scene.hook.always(Answer::Refuse(401));
    scene.load(2).await;
    scene.wait_for_sink("hook", |sink| sink["state"] == "stopped").await;
    assert_eq!(scene.sink("hook").await["lost_changes"], 0);
    scene.load_with_file(6).await;
    scene.wait_for_sink("hook", |sink| sink["lost_changes"] != 0).await;
    scene.hook.always(Answer::Accept);
    scene.server.kill();
    scene.server.start_ready().await;
    let last = scene.rows - 1;
    let hooked = scene.hook.wait_until(|seen| ids(seen).last() == Some(&last)).await;
    let lost = scene.lost_ranges().await[0].to;
    assert_eq!(ids(&hooked), (lost..scene.rows).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_sink_that_was_removed_holds_nothing() {
    let mut scene = Scene::set(None, "reserve_bytes = 0\nage_ms_max = 500", "").await;
    scene.hook.always(Answer::Refuse(503));
    scene.load(3).await;
    scene.check_file_has_all().await;
    // Old enough by now, and looked at: it is the sink that holds it.
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(scene.status().await["sources"][0]["journal"]["start"], 0);
    scene.server.kill();
    let mut without = config("reserve_bytes = 0\nage_ms_max = 500", "");
    without.hook = None;
    let text = without.text(&scene.cluster, &scene.hook, "lake/lake.jsonl");
    scene.server.set_config(&text);
    scene.server.start_ready().await;
    scene.wait_for_source("trimmed", |s| s["journal"]["start"].as_u64().unwrap() > 700).await;
}
