//! How long a change takes from its commit to where it is wanted.

use std::time::Duration;

use serde_json::Value;

use crate::kit::{Cluster, Redis, Server, source_toml, wait_for};

const PATIENCE: Duration = Duration::from_secs(60);
const TRANSACTIONS: u64 = 400;
/// Of each transaction, of which one begins every 10 ms.
const CHANGES: u64 = 10;

#[tokio::test]
async fn of_a_hundred_changes_ninety_nine_are_at_their_target_within_a_second_of_their_commit() {
    let (cluster, redis) = tokio::join!(Cluster::start(), Redis::start());
    let now = "(extract(epoch from clock_timestamp()) * 1000)::bigint";
    let table = format!("create table event (id bigint primary key, ms bigint default {now})");
    cluster.sql(&table).await;
    let mut server = Server::new(&format!(
        "{}\n[sink.events]\nkind = \"redis_stream\"\nurl = \"{}\"\nstream = \"events\"\n",
        source_toml("app", &cluster.unix_url()),
        redis.url()
    ));
    server.start_ready().await;
    let session = cluster.connect().await;
    let mut tick = tokio::time::interval(Duration::from_millis(10));
    for first in (0..TRANSACTIONS * CHANGES).step_by(CHANGES as usize) {
        tick.tick().await;
        let last = first + CHANGES - 1;
        let insert = format!("insert into event select generate_series({first}, {last})");
        session.batch_execute(&insert).await.unwrap();
    }
    let all = async || {
        let count: u64 = redis.ask("XLEN events").await;
        (count == TRANSACTIONS * CHANGES).then_some(())
    };
    wait_for(PATIENCE, all, || server.log_tail()).await;

    // An entry's id begins with the milliseconds at which the server took it.
    let entries: Vec<(String, Vec<(String, String)>)> = redis.ask("XRANGE events - +").await;
    let took = |(id, fields): &(String, Vec<(String, String)>)| {
        let arrived: i64 = id.split('-').next().unwrap().parse().unwrap();
        let (_, payload) = fields.iter().find(|(name, _)| name == "payload").unwrap();
        let change: Value = serde_json::from_str(payload).unwrap();
        arrived - change["after"]["ms"].as_i64().unwrap()
    };
    let mut times: Vec<i64> = entries.iter().map(took).collect();
    times.sort_unstable();
    let p99 = times[times.len() * 99 / 100];
    println!("p50 {} ms, p99 {p99} ms", times[times.len() / 2]);
    assert!(p99 < 1000, "p99 is {p99} ms");
}
