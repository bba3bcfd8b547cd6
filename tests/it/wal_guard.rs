//! What guards the primary's disk: a limit for the log that the server keeps for our slot.

use std::time::Duration;

use crate::kit::{Cluster, Server, source_toml, wait_for};

const PATIENCE: Duration = Duration::from_secs(60);

/// A source over its limit: a transaction that stays open makes the slot keep all log behind it.
async fn over_the_limit(policy: &str) -> (Cluster, Server, crate::kit::Session) {
    let cluster = Cluster::start().await;
    cluster.sql("create table t (id int primary key, v text)").await;
    let source = source_toml("app", &cluster.unix_url());
    let limit = format!("wal_retained_bytes_max = 1000000\nwal_retained_policy = \"{policy}\"\n");
    let sink = "[sink.lake]\nkind = \"file\"\npath = \"lake.jsonl\"\n";
    let mut server = Server::new(&format!("{source}{limit}\n{sink}"));
    server.start_ready().await;
    let holder = cluster.connect().await;
    holder.batch_execute("begin; insert into t values (-1, 'open')").await.unwrap();
    let load = "insert into t select g, repeat('x', 500) from generate_series(1, 10000) g";
    cluster.sql(load).await;
    cluster.sql("checkpoint").await;
    (cluster, server, holder)
}

#[tokio::test]
async fn log_that_is_kept_beyond_the_limit_is_told_and_capture_goes_on() {
    let (_cluster, server, holder) = over_the_limit("alert").await;
    let told = async || {
        let (code, body) = server.get("/ready").await;
        (code == 503 && body.contains("wal_retained_bytes_max")).then_some(())
    };
    wait_for(PATIENCE, told, || "it never says that the limit is passed".to_owned()).await;
    assert!(server.log().contains("than wal_retained_bytes_max = 1000000"));
    assert_eq!(server.metric("walrace_source_up", &[]).await, Some(1.0));
    holder.batch_execute("commit").await.unwrap();
}

#[tokio::test]
async fn a_slot_over_the_limit_is_dropped_when_the_policy_says_so_and_the_gap_is_named() {
    let (cluster, server, _holder) = over_the_limit("drop_slot").await;
    let slots = "select count(*) from pg_replication_slots";
    let dropped = async || (cluster.value(slots).await == 0).then_some(());
    wait_for(PATIENCE, dropped, || "the slot is still there".to_owned()).await;
    let named = async || {
        let (_, body) = server.get("/ready").await;
        (body.contains("is gone") && body.contains("--accept-gap")).then_some(())
    };
    wait_for(PATIENCE, named, || "the source does not name the gap".to_owned()).await;
    assert!(server.log().contains("is dropped, as wal_retained_policy says"));
}
