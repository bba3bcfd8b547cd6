//! What an operator who sees a symptom is told: each test is a row of docs/troubleshooting.md.

use std::time::Duration;

use serde_json::Value;

use crate::kit::{Answer, Cluster, FileRecorder, Recorder, Server, Stop, source_toml, wait_for};

const PATIENCE: Duration = Duration::from_secs(30);
const TABLES: &str =
    "create table containers (id int primary key); create table analyses (id int primary key)";
const LAKE: &str = "\n[sink.lake]\nkind = \"file\"\npath = \"lake.jsonl\"\n";

/// Exit code, stdout and stderr of a command.
fn walrace(server: &Server, arguments: &[&str]) -> (i32, String, String) {
    let output = server.run(arguments);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
}

/// Waits until `/ready` answers 503 and names every one of `words`.
async fn not_ready(server: &Server, words: &[&str]) {
    let probe = async || {
        let (code, body) = server.try_get("/ready").await?;
        (code == 503 && words.iter().all(|word| body.contains(word))).then_some(())
    };
    let said = || format!("it never names {words:?}:\n{}", server.log());
    wait_for(PATIENCE, probe, said).await;
}

fn names(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "no `{word}` in:\n{text}");
    }
}

async fn database() -> (Cluster, String) {
    let cluster = Cluster::start().await;
    cluster.sql(TABLES).await;
    let source = source_toml("app", &cluster.unix_url());
    (cluster, source)
}

#[tokio::test]
async fn cannot_connect_because_the_server_is_down() {
    let (mut cluster, source) = database().await;
    let mut server = Server::new(&format!("{source}{LAKE}"));
    server.start_ready().await;
    cluster.down(Stop::Fast);
    let (code, said, _) = walrace(&server, &["check"]);
    assert_eq!(code, 1);
    names(&said, &["error", "connection", ".s.PGSQL."]);
    not_ready(&server, &["source app", ".s.PGSQL."]).await;
    let (_, said, _) = walrace(&server, &["lag"]);
    names(&said, &["waiting", "source app", ".s.PGSQL."]);
    cluster.up().await;
    server.wait_ready().await;
}

#[tokio::test]
async fn cannot_connect_because_the_password_is_wrong() {
    let (cluster, _) = database().await;
    cluster.sql("create role app login replication password 'right'").await;
    cluster.set_hba("host all all 127.0.0.1/32 scram-sha-256");
    cluster.reload().await;
    let url = format!("postgres://app:wr0ng@127.0.0.1:{}/postgres", cluster.port());
    let server = Server::new(&format!("{}{LAKE}", source_toml("app", &url)));
    let (code, said, _) = walrace(&server, &["check"]);
    assert_eq!(code, 1);
    names(&said, &["password authentication failed", "correct the user or the password"]);
    let (code, out, said) = walrace(&server, &["run"]);
    assert_eq!(code, 1);
    names(&said, &["source app", "password authentication failed", "correct the user"]);
    assert!(!format!("{out}{said}").contains("wr0ng"), "no secret is shown");
}

#[tokio::test]
async fn cannot_connect_because_the_database_is_unknown() {
    let (cluster, _) = database().await;
    let url = cluster.unix_url().replace("/postgres?", "/nosuch?");
    let server = Server::new(&format!("{}{LAKE}", source_toml("app", &url)));
    let (code, said, _) = walrace(&server, &["check"]);
    assert_eq!(code, 1);
    names(&said, &["database \"nosuch\" does not exist", "correct the database"]);
    let (code, _, said) = walrace(&server, &["run"]);
    assert_eq!(code, 1);
    names(&said, &["nosuch", "correct the database"]);
}

#[tokio::test]
async fn no_events_because_the_table_is_not_in_the_publication() {
    let (cluster, source) = database().await;
    cluster.sql("create publication sequin_cdc_publication for table containers").await;
    let source = format!("{source}publication = \"sequin_cdc_publication\"\n");
    let mut server = Server::new(&format!("{source}{LAKE}"));
    server.start_ready().await;
    let (_, said, _) = walrace(&server, &["source", "status"]);
    assert!(said.contains("public.containers") && !said.contains("public.analyses"), "{said}");
    let (code, said, _) = walrace(&server, &["check"]);
    assert_eq!(code, 0, "it is a warning: somebody may want it so");
    let remedy = "ALTER PUBLICATION \"sequin_cdc_publication\" ADD TABLE \"public\".\"analyses\"";
    names(&said, &["warning", "lacks public.analyses", remedy]);
    cluster.sql(remedy).await;
    cluster.sql("insert into analyses values (4)").await;
    let file = FileRecorder::new(server.path("lake.jsonl"));
    file.wait_until(PATIENCE, |seen| !seen.is_empty()).await;
}

#[tokio::test]
async fn no_events_because_nobody_reads_the_slot() {
    let (cluster, source) = database().await;
    let mut server = Server::new(&format!("{source}{LAKE}"));
    server.start_ready().await;
    server.kill();
    let free = "select count(*) from pg_replication_slots where active_pid is null";
    let free = async || (cluster.value(free).await == 1).then_some(());
    wait_for(PATIENCE, free, || "the slot stays in use".to_owned()).await;
    cluster.sql("insert into containers select generate_series(1, 1000)").await;
    let (_, said, _) = walrace(&server, &["source", "status"]);
    names(&said, &["slot walrace_app: read by nobody"]);
    let (code, said, _) = walrace(&server, &["lag"]);
    assert_eq!(code, 0);
    names(&said, &["walrace is not running", "start it with `walrace run`"]);
}

#[tokio::test]
async fn no_events_because_another_process_reads_the_slot() {
    let (_cluster, source) = database().await;
    let mut first = Server::new(&format!("{source}{LAKE}"));
    first.start_ready().await;
    let mut second = Server::new(&format!("{source}{LAKE}"));
    second.start();
    not_ready(&second, &["slot `walrace_app` is read by another process", "stop the other"]).await;
    let (_, said, _) = walrace(&second, &["check"]);
    names(&said, &["warning", "read by pid"]);
}

#[tokio::test]
async fn lag_grows_at_a_sink_that_is_down_and_not_at_the_slot() {
    let (cluster, source) = database().await;
    let mut hook = Recorder::start().await;
    let sink = format!("\n[sink.hook]\nkind = \"webhook\"\nurl = \"{}\"\n", hook.url());
    let mut server = Server::new(&format!("{source}{LAKE}{sink}"));
    server.start_ready().await;
    hook.go_down().await;
    cluster.sql("insert into containers select generate_series(1, 5000)").await;
    let lagging = async || {
        let (_, said, _) = walrace(&server, &["lag"]);
        (said.contains("sink hook waits") && said.contains("5000")).then_some(said)
    };
    let said = wait_for(PATIENCE, lagging, || walrace(&server, &["lag"]).1).await;
    names(&said, &["waiting", "127.0.0.1"]);
    assert_eq!(server.get("/ready").await.0, 200, "an outage of a target is not ours");
    let confirmed = "select pg_current_wal_flush_lsn() - confirmed_flush_lsn < 1000000 from pg_replication_slots";
    let confirmed = async || (cluster.value(confirmed).await == true).then_some(());
    wait_for(PATIENCE, confirmed, || "the slot waits for a sink".to_owned()).await;
}

#[tokio::test]
async fn lag_grows_at_the_slot_because_capture_is_paused() {
    let (cluster, source) = database().await;
    let hook = Recorder::start().await;
    hook.always(Answer::Refuse(503));
    let sink = format!(
        "\n[sink.hook]\nkind = \"webhook\"\nurl = \"{}\"\nretain = \"always\"\nretry_ms_max = 500\n\n\
         [journal]\nsegment_bytes_max = 65536\nbytes_max = 200000\n",
        hook.url()
    );
    let limit = "wal_retained_bytes_max = 1000000\n";
    let mut server = Server::new(&format!("{source}{limit}{sink}"));
    server.start_ready().await;
    for block in 0..5 {
        let ids = format!("generate_series({}, {})", block * 20_000, block * 20_000 + 19_999);
        cluster.sql(&format!("insert into containers select {ids}")).await;
    }
    not_ready(&server, &["source app", "capture is paused", "journal.bytes_max"]).await;
    // For a moment of each attempt the sink is running.
    let told = async || {
        let said = walrace(&server, &["lag"]).1;
        let words = ["capture is paused", "sink hook waits", "503"];
        words.iter().all(|word| said.contains(word)).then_some(())
    };
    wait_for(PATIENCE, told, || walrace(&server, &["lag"]).1).await;
    // Nobody reads the slot now, and still the log that it holds back is watched.
    cluster.sql("insert into analyses select generate_series(1, 50000)").await;
    not_ready(&server, &["bytes of log for the slot, more than wal_retained_bytes_max"]).await;
    let metric = async |name| server.metric(name, &["source=\"app\""]).await;
    let both = async || {
        let retained = metric("walrace_source_retained_wal_bytes").await?;
        let behind = metric("walrace_source_behind_bytes").await?;
        (retained > 1e6 && behind > 1e6).then_some(())
    };
    wait_for(PATIENCE, both, || "the metrics do not see it".to_owned()).await;
    hook.always(Answer::Accept);
    let changes = async || (hook.changes().len() >= 150_000).then_some(());
    let behind = || format!("{} of 150000 arrived", hook.changes().len());
    wait_for(Duration::from_secs(120), changes, behind).await;
    let last = std::cell::RefCell::new(String::new());
    // The server lets go of its log with the next checkpoint after we confirmed.
    let ready = async || {
        cluster.sql("checkpoint").await;
        let (code, body) = server.try_get("/ready").await?;
        *last.borrow_mut() = body;
        (code == 200).then_some(())
    };
    wait_for(Duration::from_secs(90), ready, || last.borrow().clone()).await;
}

#[tokio::test]
async fn what_a_sink_is_missing_and_how_far_it_is_behind_is_told_while_nothing_runs() {
    let (cluster, source) = database().await;
    let hook = Recorder::start().await;
    let sink = format!(
        "\n[sink.hook]\nkind = \"webhook\"\nurl = \"{}\"\ntables = [\"public.analyses\"]\n",
        hook.url()
    );
    let mut server = Server::new(&format!("{source}{LAKE}{sink}"));
    let (code, _, said) = walrace(&server, &["missing", "--sink", "hook"]);
    assert_eq!(code, 1);
    names(&said, &["no walrace ever ran on data_dir data", "walrace run"]);
    server.start_ready().await;
    hook.always(Answer::Refuse(503));
    cluster
        .sql(
            "insert into containers select generate_series(1, 20);
             insert into analyses select generate_series(1, 5)",
        )
        .await;
    let file = FileRecorder::new(server.path("lake.jsonl"));
    file.wait_until(PATIENCE, |seen| seen.len() == 25).await;
    hook.wait_until_asked(1).await;
    // The lines are there before they count: the sink has them once its progress is on disk.
    let has = async || {
        let status: Value = serde_json::from_str(&server.get("/status").await.1).ok()?;
        status["sinks"].as_array()?.iter().any(|sink| sink["cursor"] == 25).then_some(())
    };
    wait_for(PATIENCE, has, || "the file sink has not advanced".to_owned()).await;
    let running = walrace(&server, &["missing", "--sink", "hook", "--json"]);
    server.kill();
    let stopped = walrace(&server, &["missing", "--sink", "hook", "--json"]);
    assert_eq!((running.0, stopped.0), (3, 3), "{} {}", running.2, stopped.2);
    assert_eq!(running.1, stopped.1);
    assert_eq!(stopped.1.lines().count(), 5);
    names(
        &stopped.2,
        &["missing 5 committed", "not running", "of the server's log is not captured"],
    );
    // The file keeps its own progress, which is ahead of the catalog's after a kill.
    let (code, lines, said) = walrace(&server, &["missing", "--sink", "lake"]);
    assert_eq!((code, lines.as_str()), (0, ""), "{said}");
    let (code, said, _) = walrace(&server, &["lag", "--json"]);
    assert_eq!(code, 0);
    let status: Value = serde_json::from_str(&said).unwrap();
    let behind = |name: &str| {
        let sinks = status["sinks"].as_array().unwrap();
        sinks.iter().find(|s| s["name"] == name).unwrap()["behind_changes"].as_u64().unwrap()
    };
    assert!((5..=25).contains(&behind("hook")), "{said}");
    assert_eq!(behind("lake"), 0);
    assert_eq!(status["sources"][0]["state"], "stopped");
    assert!(status["sources"][0]["retained_wal_bytes"].as_u64().is_some());
    let (code, _, said) = walrace(&server, &["missing", "--sink", "nosuch"]);
    assert_eq!(code, 1);
    names(&said, &["there is no sink nosuch"]);
    server.start_ready().await;
    hook.always(Answer::Accept);
    assert_eq!(hook.wait_until(|seen| seen.len() >= 5).await.len(), 5, "nothing was changed");
}

/// The blocks of SQL below a heading of docs/sources/postgres.md, for the database `postgres`.
fn documented_sql(heading: &str) -> String {
    let page = include_str!("../../docs/sources/postgres.md");
    let (_, section) = page.split_once(&format!("\n### {heading}\n")).expect("the heading");
    let section = section.split("\n##").next().unwrap();
    let blocks: Vec<_> = section.split("```sql\n").skip(1).collect();
    assert!(!blocks.is_empty(), "no SQL below {heading}");
    let sql = blocks.iter().map(|block| block.split("```").next().unwrap());
    sql.collect::<String>().replace("DATABASE app", "DATABASE postgres")
}

#[tokio::test]
async fn the_privileges_that_the_documentation_grants_are_enough_and_needed() {
    let levels = [
        ("It makes the publication", ""),
        ("The owner makes the publication", "publication = \"walrace_app\"\n"),
        (
            "Everything is made by hand",
            "publication = \"walrace_app\"\nslot = \"walrace_app\"\ncreate = false\n",
        ),
    ];
    for (heading, keys) in levels {
        let cluster = Cluster::start().await;
        cluster
            .sql(&format!(
                "create role app_owner; grant create on schema public to app_owner;
                 set role app_owner; {TABLES}"
            ))
            .await;
        let sql = documented_sql(heading);
        for statement in sql.split_inclusive(';').filter(|text| !text.trim().is_empty()) {
            cluster.sql(statement).await;
        }
        let url = format!("postgres://walrace:secret@127.0.0.1:{}/postgres", cluster.port());
        let source = source_toml("app", &url);
        let mut server = Server::new(&format!("{source}{keys}{LAKE}"));
        let (code, said, _) = walrace(&server, &["check"]);
        assert_eq!(code, 0, "{heading}:\n{said}");
        server.start_ready().await;
        cluster.sql("insert into analyses values (9)").await;
        let file = FileRecorder::new(server.path("lake.jsonl"));
        file.wait_until(PATIENCE, |seen| seen.len() == 1).await;
        server.stop().await;

        cluster.sql("alter role walrace noreplication").await;
        let (code, said, _) = walrace(&server, &["check"]);
        assert_eq!(code, 1, "{heading}, without REPLICATION:\n{said}");
    }
}
