//! The `[cdc]` block of five keys, and the queue that it makes, in a program that embeds Walrace.

use std::{fs, path::Path, sync::Arc, time::Duration};

use walrace::{
    config::{Config, Environment},
    runtime::Walrace,
    sink::{Delivery, Subscription},
};

use crate::kit::{Cluster, FileRecorder, Recorder, Scratch, Server, source_toml, wait_for};

const PATIENCE: Duration = Duration::from_secs(30);

/// As it was published, byte for byte.
const SEED: &str = r#"[cdc]
# Emitter type: "queue" | "webhook" | "file" | "custom"
emitter = "queue"

# Queue capacity (in-memory, backpressure applied)
queue_capacity = 65536

# Dead letter queue path
dlq_path = "/var/lib/weftkit/cdc-dlq"

# Schema filter (empty = capture all)
schemas = ["public"]

# Batch size for queue emitter
batch_size = 100"#;

/// A Walrace inside this process, with `text` as its file and `folder` for its data.
pub(crate) async fn embedded(text: &str, cluster: &Cluster, folder: &Path) -> Arc<Walrace> {
    Walrace::start(configured(text, cluster, folder)).await.expect("a start")
}

pub(crate) fn configured(text: &str, cluster: &Cluster, folder: &Path) -> Config {
    let file = folder.join("walrace.toml");
    fs::write(&file, text).unwrap();
    let path = |name: &str| folder.join(name).display().to_string();
    let mut variables =
        vec![("DATABASE_URL", cluster.unix_url()), ("WALRACE_DATA_DIR", path("data"))];
    if text.contains("[cdc]") {
        variables.push(("WALRACE_CDC_DLQ_PATH", path("dead-letters")));
    }
    Config::load_in(Some(&file), &Environment::of(variables)).expect("a configuration")
}

/// The next delivery, of at most `max` changes.
pub(crate) async fn take(queue: &mut Subscription, max: usize) -> Delivery {
    let next = tokio::time::timeout(PATIENCE, queue.next(max)).await;
    next.expect("nothing came").expect("the queue ended")
}

/// The first column of an inserted row.
pub(crate) fn id(change: &walrace::change::Change) -> u64 {
    let value = change.after.as_ref().and_then(|row| row.value(0));
    match value {
        Some(walrace::change::Value::Text(text)) => {
            std::str::from_utf8(text).unwrap().parse().unwrap()
        }
        other => panic!("no id: {other:?}"),
    }
}

#[tokio::test]
async fn the_cdc_block_of_the_seed_loads_unchanged_and_runs() {
    let cluster = Cluster::start().await;
    cluster
        .sql(
            "create schema other; create table other.t (id int primary key);
             create table t (id int primary key)",
        )
        .await;
    let folder = Scratch::new("cdc");
    let walrace = embedded(SEED, &cluster, folder.path()).await;
    let mut queue = walrace.subscribe("cdc").unwrap();
    captures(&walrace).await;
    cluster.sql("insert into other.t values (1); insert into t values (2), (3)").await;
    let delivery = take(&mut queue, 10).await;
    assert_eq!(delivery.changes.iter().map(id).collect::<Vec<_>>(), [2, 3]);
    queue.done();
    assert!(folder.path().join("dead-letters").is_dir(), "the path of dead letters is created");
    walrace.stop().await;
}

#[tokio::test]
async fn the_file_and_webhook_emitters_run_in_the_real_binary() {
    let cluster = Cluster::start().await;
    cluster.sql("create table t (id int primary key)").await;
    let hook = Recorder::start().await;
    let source = source_toml("app", &cluster.unix_url());
    let cdc = |emitter: &str, more: &str| {
        format!("{source}\n[cdc]\nemitter = \"{emitter}\"\ndlq_path = \"dead-letters\"\n{more}\n")
    };
    let mut server = Server::new(&cdc("file", "file_path = \"cdc.jsonl\""));
    server.start_ready().await;
    cluster.sql("insert into t values (1)").await;
    let file = FileRecorder::new(server.path("cdc.jsonl"));
    file.wait_until(PATIENCE, |seen| seen.len() == 1).await;
    assert!(server.stop().await.success());

    let mut server = Server::new(&cdc("webhook", &format!("webhook_url = \"{}\"", hook.url())));
    cluster.sql("select pg_drop_replication_slot('walrace_app')").await;
    server.start_ready().await;
    cluster.sql("insert into t values (2)").await;
    let changes = hook.wait_until(|seen| !seen.is_empty()).await;
    assert_eq!(changes[0]["after"]["id"], 2);
}

#[tokio::test]
async fn an_unknown_key_is_refused_with_its_line_and_the_nearest_name() {
    let server = Server::new("[cdc]\nemiter = \"queue\"\n");
    let said = server.run(&["config", "show"]);
    let said = (said.status.code(), String::from_utf8_lossy(&said.stderr).into_owned());
    assert_eq!(said.0, Some(1));
    assert!(said.1.contains("walrace.toml:4") && said.1.contains("emitter"), "{}", said.1);
}

#[tokio::test]
async fn a_queue_is_bounded_blocks_its_producer_and_keeps_the_order() {
    let cluster = Cluster::start().await;
    cluster.sql("create table t (id int primary key)").await;
    let folder = Scratch::new("queue");
    let text = SEED.replace("65536", "16");
    let walrace = embedded(&text, &cluster, folder.path()).await;
    let mut queue = walrace.subscribe("cdc").unwrap();
    captures(&walrace).await;
    for id in 0..500 {
        cluster.sql(&format!("insert into t values ({id})")).await;
    }
    // Capture goes on while the queue is full and nobody reads it.
    let journaled = async || (walrace.journal("app").unwrap().end() == 500).then_some(());
    wait_for(PATIENCE, journaled, || "capture waits for the queue".to_owned()).await;
    assert_eq!(walrace.status().sinks[0].cursor, 0, "the producer is blocked");
    let mut seen = Vec::new();
    while seen.len() < 500 {
        let delivery = take(&mut queue, usize::MAX).await;
        assert!(delivery.changes.len() <= 16, "{} at once", delivery.changes.len());
        seen.extend(delivery.changes.iter().map(id));
    }
    queue.done();
    assert_eq!(seen, (0..500).collect::<Vec<_>>());
    walrace.stop().await;
}

#[tokio::test]
async fn no_batch_is_larger_than_batch_size_and_a_partial_one_is_flushed_by_time() {
    let cluster = Cluster::start().await;
    cluster.sql("create table t (id int primary key)").await;
    let hook = Recorder::start().await;
    let folder = Scratch::new("batch");
    let text = format!(
        "{SEED}\n\n[sink.hook]\nkind = \"webhook\"\nurl = \"{}\"\n\
         batch_changes_max = 100\nbatch_ms_max = 400\n",
        hook.url()
    );
    let walrace = embedded(&text, &cluster, folder.path()).await;
    let mut queue = walrace.subscribe("cdc").unwrap();
    captures(&walrace).await;
    cluster.sql("insert into t select generate_series(0, 249)").await;
    let mut sizes = Vec::new();
    while sizes.iter().sum::<usize>() < 250 {
        sizes.push(take(&mut queue, usize::MAX).await.changes.len());
    }
    queue.done();
    assert_eq!(sizes, [100, 100, 50], "of the queue");
    hook.wait_until(|seen| seen.len() >= 250).await;
    let sizes: Vec<_> = hook.stored().iter().map(|request| request.changes().len()).collect();
    assert_eq!(sizes, [100, 100, 50], "of the webhook");
    // Commits that come one by one wait for each other, but not for ever.
    for id in 250..255 {
        cluster.sql(&format!("insert into t values ({id})")).await;
    }
    hook.wait_until(|seen| seen.len() >= 255).await;
    assert!(hook.stored().len() < 3 + 5, "they were gathered");
    drop(queue);
    walrace.stop().await;
}

/// Waits until every source is captured.
pub(crate) async fn captures(walrace: &Walrace) {
    let running = async || walrace.status().sources[0].state.is_running().then_some(());
    wait_for(PATIENCE, running, || format!("{:?}", walrace.status().sources[0].state)).await;
}
