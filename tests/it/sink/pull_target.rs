//! What the conformance suite asks, of a sink whose other end is consumers: they pull and
//! acknowledge while the process is killed at every step.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};

use serde_json::{Value as Json, json};
use tokio::task::JoinSet;

use super::conformance::{POINTS, ordered_per_key};
use crate::kit::{
    Cluster, Delivery, Ledger, Pace, Server, check, http_client, source_toml, wait_for,
};

/// What all consumers saw.
#[derive(Default)]
struct Seen {
    /// Each message as it came, every time.
    messages: Vec<Json>,
    ack_ids: BTreeMap<u64, String>,
    /// The keys of what is with a consumer.
    out: BTreeSet<String>,
    refused: BTreeSet<u64>,
}

impl Seen {
    fn take(&mut self, received: &[Json]) {
        for message in received {
            let data = &message["data"];
            let offset = data["offset"].as_u64().unwrap();
            let id = message["ack_id"].as_str().unwrap().to_owned();
            let first = self.ack_ids.entry(offset).or_insert_with(|| id.clone());
            assert_eq!(*first, id, "offset {offset} came with two ids");
            assert!(self.out.insert(key(data)), "two of a group are out: {data}");
            self.messages.push(data.clone());
        }
    }
}

fn key(data: &Json) -> String {
    format!("{}{}{}", data["source_table"], data["key"], data["message"]["prefix"])
}

/// Pulls, gives some messages back once, and acknowledges the others, until it is told to stop.
struct Consumer {
    address: PathBuf,
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
    client: reqwest::Client,
}

impl Consumer {
    async fn run(self) {
        while !self.stop.load(SeqCst) {
            let Some(messages) = self.receive().await else {
                tokio::time::sleep(Duration::from_millis(20)).await; // it is down
                continue;
            };
            let back = {
                let mut seen = self.seen.lock().unwrap();
                seen.take(&messages);
                let offset = |message: &Json| message["data"]["offset"].as_u64().unwrap();
                let first = |message: &Json| {
                    offset(message).is_multiple_of(7) && seen.refused.insert(offset(message))
                };
                let (back, done): (Vec<_>, Vec<_>) = messages.into_iter().partition(first);
                for message in back.iter().chain(&done) {
                    seen.out.remove(&key(&message["data"]));
                }
                [("nack", back), ("ack", done)]
            };
            for (how, messages) in back.into_iter().filter(|(_, messages)| !messages.is_empty()) {
                let ids: Vec<_> = messages.iter().map(|message| &message["ack_id"]).collect();
                self.post(how, json!({"ack_ids": ids})).await;
            }
        }
    }

    async fn receive(&self) -> Option<Vec<Json>> {
        let reply = self.post("receive", json!({"batch_size": 50, "wait_for": 500})).await?;
        Some(reply["data"].as_array()?.clone())
    }

    async fn post(&self, what: &str, body: Json) -> Option<Json> {
        let address = fs::read_to_string(&self.address).ok()?;
        let url = format!("http://{}/api/sequin_streams/kills/{what}", address.lines().next()?);
        self.client.post(url).json(&body).send().await.ok()?.json().await.ok()
    }
}

/// Its own steps.
const OWN_POINTS: [&str; 5] = [
    "pull::after_write:3",
    "pull::before_lease:4",
    "pull::after_lease:3",
    "pull::before_ack:4",
    "pull::after_ack:3",
];

#[tokio::test]
async fn consumers_of_the_http_pull_sink_get_everything_in_order_through_kills_at_every_step() {
    let cluster = Cluster::start().await;
    Ledger::create(&cluster).await;
    let source = source_toml("app", &cluster.unix_url());
    // A look-ahead that is often full.
    let mut server = Server::new(&format!(
        "{source}tables = [\"ledger.*\"]\n\n[sink.kills]\nkind = \"http_pull\"\n\
         message = \"native\"\nack_wait_ms = 5000\nmax_ack_pending = 200\nretry_ms_min = 10\n\
         retry_ms_max = 200\n"
    ));
    server.start_ready().await;
    server.kill();
    let (seen, stop) = (Arc::<Mutex<Seen>>::default(), Arc::<AtomicBool>::default());
    let mut consumers = JoinSet::new();
    for _ in 0..2 {
        let consumer = Consumer {
            address: server.path("data/http.addr"),
            seen: Arc::clone(&seen),
            stop: Arc::clone(&stop),
            client: http_client(),
        };
        consumers.spawn(consumer.run());
    }
    let pace = Pace { seed: 11, sessions: 2, pause: Duration::from_millis(8) };
    let load = Ledger::load(&cluster, pace);
    for point in POINTS.iter().chain(&OWN_POINTS) {
        server.start_to_die_at(point);
        let died = server.wait_exit(Duration::from_secs(60)).await;
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&died), Some(9), "at {point}");
    }
    server.start_ready().await;
    load.stop().await;
    cluster.sql("insert into ledger.tx values (-1, 0, now())").await;
    let written = cluster.value("select pg_current_wal_lsn()").await;
    let written = written.as_str().unwrap();
    let captured = format!("select confirmed_flush_lsn >= '{written}' from pg_replication_slots");
    let done = async || {
        (cluster.value(&captured).await == true).then_some(())?;
        let behind = server.metric("walrace_sink_behind_changes", &["kills"]).await?;
        let parked = server.metric("walrace_sink_parked_changes", &["kills"]).await?;
        (behind == 0.0 && parked == 0.0).then_some(())
    };
    wait_for(Duration::from_secs(120), done, || server.log_tail()).await;
    stop.store(true, SeqCst);
    while let Some(ended) = consumers.join_next().await {
        ended.unwrap();
    }
    assert!(server.stop().await.success());
    let mut changes = std::mem::take(&mut seen.lock().unwrap().messages);
    ordered_per_key(&changes);
    changes.sort_by_key(|change| change["offset"].as_u64());
    let state = Ledger::final_state(&cluster).await;
    let messages = Ledger::messages(&cluster).await;
    let report = check(&changes, &state, &messages, Delivery::AtLeastOnce);
    println!("{} changes, {} twice", report.changes, report.duplicates);
    report.assert_clean();
}
