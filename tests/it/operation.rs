//! What an operator sees and does: stop, restart, lag, missing changes, readiness, clean-up.

use std::time::Duration;

use serde_json::{Value, json};

use crate::kit::{Answer, Cluster, FileRecorder, Recorder, Server, Stop, source_toml, wait_for};

const PATIENCE: Duration = Duration::from_secs(30);
const TABLE: &str = "create table t (id int primary key, v text)";

struct Scene {
    cluster: Cluster,
    hook: Recorder,
    server: Server,
    file: FileRecorder,
}

impl Scene {
    async fn set() -> Self {
        let cluster = Cluster::start().await;
        cluster.sql(TABLE).await;
        let hook = Recorder::start().await;
        let source = source_toml("app", &cluster.unix_url());
        let server = Server::new(&format!(
            "{source}\n[sink.lake]\nkind = \"file\"\npath = \"lake.jsonl\"\n\n\
             [sink.hook]\nkind = \"webhook\"\nurl = \"{}\"\nretry_ms_min = 20\nretry_ms_max = 100\n",
            hook.url()
        ));
        let file = FileRecorder::new(server.path("lake.jsonl"));
        let mut scene = Self { cluster, hook, server, file };
        scene.server.start_ready().await;
        scene
    }

    async fn insert(&self, ids: std::ops::Range<u32>) {
        let statement =
            format!("insert into t select generate_series({}, {})", ids.start, ids.end - 1);
        self.cluster.sql(&statement).await;
    }

    async fn status(&self) -> Value {
        serde_json::from_str(&self.server.get("/status").await.1).expect("JSON")
    }

    fn walrace(&self, arguments: &[&str]) -> (Option<i32>, String, String) {
        let output = self.server.run(arguments);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    }
}

#[tokio::test]
async fn a_signal_ends_it_in_time_and_nothing_is_lost() {
    let mut scene = Scene::set().await;
    scene.insert(0..500).await;
    assert!(scene.server.stop().await.success(), "SIGTERM is a clean end");
    scene.insert(500..600).await;
    scene.server.start_ready().await;
    let changes = scene.file.wait_until(PATIENCE, |seen| seen.len() >= 600).await;
    assert_eq!(changes.len(), 600);
    let hooked = scene.hook.wait_until(|seen| seen.len() >= 600).await;
    assert_eq!(hooked.len(), 600, "a clean stop delivers nothing twice");
}

#[tokio::test]
async fn a_stop_does_not_wait_for_a_target_that_asked_for_time() {
    let mut scene = Scene::set().await;
    let headers = vec![("retry-after".to_owned(), "600".to_owned())];
    scene.hook.next([Answer::RefuseWith { status: 429, headers, body: String::new() }]);
    scene.insert(0..1).await;
    scene.hook.wait_until_asked(1).await;
    tokio::time::sleep(Duration::from_millis(500)).await; // five times the longest backoff
    assert_eq!(scene.hook.asked(), 1, "it asked for ten minutes");
    let begun = std::time::Instant::now();
    assert!(scene.server.stop().await.success());
    assert!(begun.elapsed() < Duration::from_secs(5), "the stop took {:?}", begun.elapsed());
}

#[tokio::test]
async fn streams_of_changes_are_limited_and_a_closed_one_makes_room() {
    let scene = Scene::set().await;
    let url = format!("http://{}/sources/app/changes", scene.server.address().unwrap());
    let open = async || crate::kit::http_client().get(&url).send().await.unwrap();
    let mut streams = Vec::new();
    for _ in 0..64 {
        streams.push(open().await);
    }
    assert!(streams.iter().all(|stream| stream.status() == 200));
    let refused = open().await;
    assert_eq!(refused.status(), 503);
    assert!(refused.text().await.unwrap().contains("64 streams of changes are open"));
    streams.pop();
    // A change makes the server write, and so notice who is gone.
    scene.insert(0..1).await;
    let room = async || (open().await.status() == 200).then_some(());
    wait_for(PATIENCE, room, || "no room after a stream was closed".to_owned()).await;
}

#[tokio::test]
async fn capture_goes_on_by_itself_after_the_database_restarts() {
    let mut scene = Scene::set().await;
    scene.insert(0..10).await;
    scene.file.wait_until(PATIENCE, |seen| seen.len() == 10).await;
    scene.cluster.restart(Stop::Immediate).await;
    scene.insert(10..20).await;
    let changes = scene.file.wait_until(PATIENCE, |seen| seen.len() >= 20).await;
    assert_eq!(changes.len(), 20);
}

#[tokio::test]
async fn each_sink_has_a_position_of_its_own_that_survives_a_restart() {
    let mut scene = Scene::set().await;
    scene.hook.always(Answer::Refuse(503));
    scene.insert(0..50).await;
    scene.file.wait_until(PATIENCE, |seen| seen.len() == 50).await;
    scene.hook.wait_until_asked(2).await;
    scene.server.kill();
    scene.server.start_ready().await;
    scene.hook.wait_until_asked(4).await;
    let status = scene.status().await;
    let sink = |name: &str| {
        status["sinks"].as_array().unwrap().iter().find(|s| s["name"] == name).unwrap().clone()
    };
    assert_eq!((&sink("lake")["cursor"], &sink("hook")["cursor"]), (&json!(50), &json!(0)));
    assert_eq!(sink("hook")["state"], "waiting");
    scene.hook.always(Answer::Accept);
    let hooked = scene.hook.wait_until(|seen| seen.len() >= 50).await;
    assert_eq!(hooked.len(), 50);
    assert_eq!(scene.file.changes().len(), 50);
}

#[tokio::test]
async fn one_command_answers_which_committed_changes_a_sink_is_missing() {
    let scene = Scene::set().await;
    scene.hook.always(Answer::Refuse(503));
    scene.insert(0..7).await;
    scene.file.wait_until(PATIENCE, |seen| seen.len() == 7).await;
    let (code, lines, said) = scene.walrace(&["missing", "--sink", "hook", "--json"]);
    assert_eq!((code, lines.lines().count()), (Some(3), 7), "{said}");
    let first: Value = serde_json::from_str(lines.lines().next().unwrap()).unwrap();
    assert_eq!(first["after"]["id"], 0);
    let (code, lines, said) = scene.walrace(&["missing", "--sink", "lake"]);
    assert_eq!((code, lines.as_str()), (Some(0), ""), "{said}");
    scene.hook.always(Answer::Accept);
    scene.hook.wait_until(|seen| seen.len() == 7).await;
}

#[tokio::test]
async fn the_lag_query_of_the_database_equals_the_lag_that_is_exported() {
    let scene = Scene::set().await;
    scene.insert(0..100).await;
    let query = "select pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)::bigint from pg_replication_slots";
    let same = async || {
        let exported =
            scene.server.metric("walrace_source_retained_wal_bytes", &["source=\"app\""]).await?;
        let asked = scene.cluster.value(query).await.as_f64()?;
        ((exported - asked).abs() < 200_000.0).then_some(())
    };
    wait_for(PATIENCE, same, || "the two never agree".to_owned()).await;
}

#[tokio::test]
async fn log_lag_journal_and_sink_lag_are_separate_numbers() {
    let scene = Scene::set().await;
    scene.hook.always(Answer::Refuse(503));
    scene.insert(0..30).await;
    scene.file.wait_until(PATIENCE, |seen| seen.len() == 30).await;
    let metric = async |name: &str, label: &str| scene.server.metric(name, &[label]).await.unwrap();
    // A line is in the file a moment before its sink's counters say so.
    let caught_up = async || {
        let behind = metric("walrace_sink_behind_changes", "sink=\"lake\"").await;
        (behind == 0.0).then_some(())
    };
    wait_for(PATIENCE, caught_up, || "the file sink is behind".to_owned()).await;
    assert_eq!(metric("walrace_sink_behind_changes", "sink=\"hook\"").await, 30.0);
    assert_eq!(metric("walrace_journal_end_offset", "source=\"app\"").await, 30.0);
    assert!(metric("walrace_source_behind_bytes", "source=\"app\"").await < 1e6);
    assert!(metric("walrace_sink_behind_bytes", "sink=\"hook\"").await > 0.0);
}

#[tokio::test]
async fn one_command_drops_slot_and_publication_and_a_fresh_start_works() {
    let mut scene = Scene::set().await;
    scene.insert(0..3).await;
    scene.file.wait_until(PATIENCE, |seen| seen.len() == 3).await;
    scene.server.stop().await;
    let (code, said, failure) = scene.walrace(&["source", "drop", "app"]);
    assert_eq!(code, Some(0), "{said}{failure}");
    let left = "select (select count(*) from pg_replication_slots) + (select count(*) from pg_publication)";
    assert_eq!(scene.cluster.value(left).await, 0);
    std::fs::remove_dir_all(scene.server.path("data")).unwrap();
    std::fs::remove_file(scene.server.path("lake.jsonl")).unwrap();
    std::fs::remove_file(scene.server.path("lake.jsonl.walrace")).unwrap();
    scene.server.start_ready().await;
    scene.insert(3..5).await;
    let changes = scene.file.wait_until(PATIENCE, |seen| seen.len() >= 2).await;
    assert_eq!(changes[0]["after"]["id"], 3);
}

fn promtool(arguments: &[&str], input: &str) -> Result<(), String> {
    let mut promtool = std::process::Command::new("promtool")
        .args(arguments)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("promtool: scripts/install.sh test installs Debian's prometheus");
    std::io::Write::write_all(&mut promtool.stdin.take().unwrap(), input.as_bytes()).unwrap();
    let output = promtool.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() { Ok(()) } else { Err(said) }
}

#[tokio::test]
async fn metrics_and_the_documented_alerts_pass_promtool() {
    let scene = Scene::set().await;
    let (_, text) = scene.server.get("/metrics").await;
    promtool(&["check", "metrics"], &text).unwrap();

    let page = include_str!("../../docs/operating.md");
    let (_, rest) = page.split_once("```yaml\n").unwrap();
    let (rules, _) = rest.split_once("```").unwrap();
    promtool(&["check", "rules", "/dev/stdin"], rules).unwrap();
    for name in rules.split(|c: char| !c.is_alphanumeric() && c != '_') {
        let is_metric = name.starts_with("walrace_");
        assert!(!is_metric || text.contains(&format!("# TYPE {name} ")), "no metric {name}");
    }
}

#[tokio::test]
async fn live_changes_stream_over_http_from_any_offset() {
    let scene = Scene::set().await;
    scene.insert(0..20).await;
    scene.file.wait_until(PATIENCE, |seen| seen.len() == 20).await;
    let (code, body) = scene.server.get("/sources/app/changes?from=5&to=8").await;
    let offsets: Vec<_> = body
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["offset"].clone())
        .collect();
    assert_eq!((code, offsets), (200, vec![json!(5), json!(6), json!(7)]));
    let (code, body) = scene.server.get("/sources/app/changes?from=nonsense").await;
    assert_eq!(code, 400, "{body}");
}

#[tokio::test]
async fn whoever_has_the_port_of_a_walrace_that_was_killed_is_not_asked_for_it() {
    let mut killed = Scene::set().await;
    killed.server.kill();
    let other = Scene::set().await;
    let address = other.server.address().unwrap();
    let theirs = killed.server.path("data/http.addr");
    let text = std::fs::read_to_string(&theirs).unwrap();
    let (_, instance) = text.split_once('\n').unwrap();
    std::fs::write(&theirs, format!("{address}\n{instance}")).unwrap();
    let (_, _, said) = killed.walrace(&["tail"]);
    assert!(said.contains("no walrace is running"), "{said}");
}

#[tokio::test]
async fn it_is_not_ready_while_the_stream_is_silent_and_the_database_writes() {
    let scene = Scene::set().await;
    let pid = "select active_pid from pg_replication_slots";
    let pid = scene.cluster.value(pid).await.as_i64().unwrap() as i32;
    let walsender = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(walsender, rustix::process::Signal::STOP).unwrap();
    scene.insert(0..10).await;
    let unready = async || (scene.server.get("/ready").await.0 == 503).then_some(());
    wait_for(Duration::from_secs(90), unready, || "still ready".to_owned()).await;
    rustix::process::kill_process(walsender, rustix::process::Signal::CONT).unwrap();
    scene.file.wait_until(PATIENCE, |seen| seen.len() == 10).await;
}
