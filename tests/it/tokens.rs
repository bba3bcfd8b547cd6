//! Resume tokens: each restarts right after its change, an expired one names the oldest that is
//! left, and a foreign one is refused.

use std::time::Duration;

use serde_json::Value;
use uuid::Uuid;
use walrace::{
    change::Position,
    journal::{Limits, Token},
    runtime::Walrace,
};

use crate::{
    config_cdc::{captures, configured, embedded, id, take},
    kit::{Cluster, FileRecorder, Scratch, Server, source_toml, wait_for},
};

const PATIENCE: Duration = Duration::from_secs(30);
const QUEUE: &str = "[sink.mine]\nkind = \"queue\"\nbatch_changes_max = 7\n";
const LAKE: &str = "\n[sink.lake]\nkind = \"file\"\npath = \"lake.jsonl\"\n";

fn foreign() -> Token {
    Token::new(Uuid::from_u128(7), Position::default(), 3)
}

#[tokio::test]
async fn a_token_of_a_delivery_restarts_right_after_it_in_this_run_and_the_next() {
    let cluster = Cluster::start().await;
    cluster.sql("create table t (id int primary key)").await;
    let folder = Scratch::new("tokens");
    let walrace = embedded(QUEUE, &cluster, folder.path()).await;
    let mut queue = walrace.subscribe("mine").unwrap();
    captures(&walrace).await;
    cluster.sql("insert into t select generate_series(0, 39)").await;
    let mut tokens = Vec::new();
    let mut next = 0;
    while next < 40 {
        let delivery = take(&mut queue, 5).await;
        next = id(delivery.changes.last().unwrap()) + 1;
        tokens.push((walrace.token(&delivery).unwrap(), next));
    }
    queue.done();
    let journal = walrace.journal("app").unwrap().clone();
    for (token, next) in &tokens {
        let mut reader = journal.reader(journal.resume(token).unwrap()).unwrap();
        if *next < 40 {
            let batch = reader.next(Limits { changes_max: 1, bytes_max: 1 }).await.unwrap();
            assert_eq!(id(&batch.changes[0]), *next, "{token}");
        }
    }
    assert!(journal.resume(&foreign()).is_err());
    drop(journal);
    walrace.stop().await;
    drop(walrace);

    let (token, next) = &tokens[3];
    let text = format!("{QUEUE}\n[sink.later]\nkind = \"queue\"\nfrom = \"{token}\"\n");
    let walrace = embedded(&text, &cluster, folder.path()).await;
    let mut later = walrace.subscribe("later").unwrap();
    assert_eq!(id(&take(&mut later, 1).await.changes[0]), *next);
    drop(later);
    walrace.stop().await;
    drop(walrace);

    let text = format!("{QUEUE}\n[sink.alien]\nkind = \"queue\"\nfrom = \"{}\"\n", foreign());
    let refused = Walrace::start(configured(&text, &cluster, folder.path())).await.unwrap_err();
    let refused = refused.to_string();
    assert!(refused.contains("sink alien") && refused.contains("lineage"), "{refused}");
}

fn tokens(body: &str) -> Vec<(Option<u64>, String)> {
    let mut before = None;
    let mut tokens = Vec::new();
    for line in body.lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        match line["resume_token"].as_str() {
            Some(token) => tokens.push((before, token.to_owned())),
            None => before = line["offset"].as_u64(),
        }
    }
    tokens
}

async fn first_offset(server: &Server, token: &str, to: u64) -> Option<u64> {
    let path = format!("/sources/app/changes?from={token}&to={to}");
    let (code, body) = server.get(&path).await;
    assert_eq!(code, 200, "{body}");
    let line = body.lines().next()?;
    serde_json::from_str::<Value>(line).unwrap()["offset"].as_u64()
}

#[tokio::test]
async fn every_token_that_a_stream_tells_restarts_right_after_its_change() {
    let cluster = Cluster::start().await;
    cluster.sql("create table t (id int primary key); create table u (id int primary key)").await;
    let mut server = Server::new(&format!("{}{LAKE}", source_toml("app", &cluster.unix_url())));
    server.start_ready().await;
    let file = FileRecorder::new(server.path("lake.jsonl"));
    for block in 0..6 {
        let (from, to) = (block * 300, block * 300 + 299);
        cluster
            .sql(&format!(
                "insert into t select generate_series({from}, {to}); insert into u values ({from})"
            ))
            .await;
    }
    let end = 6 * 301;
    file.wait_until(PATIENCE, |seen| seen.len() == end).await;
    let path = format!("/sources/app/changes?from=start&to={end}&tokens=true");
    let told = tokens(&server.get(&path).await.1);
    assert!(told.len() >= 3, "{told:?}");
    server.kill();
    server.start_ready().await;
    for (before, token) in &told {
        let after = before.unwrap() + 1;
        let want = (after < end as u64).then_some(after);
        assert_eq!(first_offset(&server, token, end as u64).await, want);
    }
    // A reader of one table resumes behind what was filtered from it.
    let path = format!("/sources/app/changes?from=start&to={end}&tokens=true&tables=public.u");
    let filtered = tokens(&server.get(&path).await.1);
    assert_eq!(first_offset(&server, &filtered.last().unwrap().1, end as u64).await, None);
    let (code, body) = server.get(&format!("/sources/app/changes?from={}", foreign())).await;
    assert!(code == 400 && body.contains("lineage"), "{code} {body}");
    let (code, body) = server.get("/sources/app/changes?from=AAAA").await;
    assert!(code == 400 && body.contains("not a resume token"), "{code} {body}");
}

#[tokio::test]
async fn an_expired_token_names_the_oldest_offset_that_is_left() {
    let cluster = Cluster::start().await;
    cluster.sql("create table t (id int primary key, v text)").await;
    let journal = "\n[journal]\nsegment_bytes_max = 65536\nage_ms_max = 1\n";
    let source = source_toml("app", &cluster.unix_url());
    let mut server = Server::new(&format!("{source}{LAKE}{journal}"));
    server.start_ready().await;
    cluster.sql("insert into t values (-1, 'first')").await;
    let file = FileRecorder::new(server.path("lake.jsonl"));
    file.wait_until(PATIENCE, |seen| seen.len() == 1).await;
    let body = server.get("/sources/app/changes?from=0&to=1&tokens=true").await.1;
    let token = tokens(&body)[0].1.clone();
    for block in 0..20 {
        let statement = "insert into t select i, (select string_agg(md5(random()::text || i * n), '') \
                         from generate_series(1, 20) n) from generate_series";
        cluster.sql(&format!("{statement}({}, {}) i", block * 100, block * 100 + 99)).await;
    }
    let start = async || {
        let (code, body) = server.get(&format!("/sources/app/changes?from={token}&to=2")).await;
        let body: Value = serde_json::from_str(body.lines().next().unwrap_or("null")).ok()?;
        (code == 410).then(|| body["oldest"].as_u64().unwrap())
    };
    let oldest = wait_for(PATIENCE, start, || "the token never expires".to_owned()).await;
    assert!(oldest > 1);
    let status: Value = serde_json::from_str(&server.get("/status").await.1).unwrap();
    assert!(status["sources"][0]["journal"]["start"].as_u64().unwrap() >= oldest);
    assert!(server.stop().await.success());
    let late = format!("\n[sink.late]\nkind = \"stdout\"\nfrom = \"{token}\"\n");
    server.set_config(&format!("{source}{LAKE}{journal}{late}"));
    let output = server.run(&["run"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success());
    assert!(
        said.contains("sink late") && said.contains("expired") && said.contains("oldest"),
        "{said}"
    );
}
