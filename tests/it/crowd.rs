//! Many sinks on one source: what three bad ones do to nine healthy ones, which is nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tokio::{net::TcpListener, task::JoinSet};

use crate::{
    kit::{Cluster, FileRecorder, Recorder, Server, source_toml, wait_for},
    sink::{
        postgres::Postgres,
        redis::{PubsubTarget, StreamTarget, StringTarget},
        target::Target,
    },
};

const PATIENCE: Duration = Duration::from_secs(60);
/// How far a healthy sink may be behind what was in the journal at any moment, on a machine that
/// does other things too. `bench/crowd.py` asks for a second at 5,000 changes each second.
const LAG_MAX: Duration = Duration::from_secs(4);
const MEMORY_MIB_MAX: u64 = 400;
/// Rows; a tenth of them is refused by one target.
const KEYS: u64 = 200;
/// Transactions, and the changes of each.
const TRANSACTIONS: u64 = 300;
const CHANGES: u64 = 10;
const PAUSE: Duration = Duration::from_millis(33);

fn is_refused(id: u64) -> bool {
    id % 10 == 7
}

fn id(change: &Value) -> u64 {
    change["after"]["id"].as_u64().unwrap()
}

/// The versions of each row in the order in which they came.
fn versions<'a>(changes: impl IntoIterator<Item = &'a Value>) -> BTreeMap<u64, Vec<u64>> {
    let mut versions = BTreeMap::<u64, Vec<u64>>::new();
    for change in changes {
        let version = change["after"]["version"].as_u64().unwrap();
        versions.entry(id(change)).or_default().push(version);
    }
    versions
}

/// Takes connections and what they send, and answers nothing.
async fn silence() -> (String, JoinSet<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let mut task = JoinSet::new();
    task.spawn(async move {
        let mut open = Vec::new();
        while let Ok((stream, _)) = listener.accept().await {
            open.push(stream);
        }
    });
    (address, task)
}

/// Where nobody listens.
async fn nobody() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    listener.local_addr().unwrap().to_string()
}

/// What the status said at one moment: the journal's end, and each sink's cursor.
struct Sample {
    at: Instant,
    end: u64,
    cursors: BTreeMap<String, u64>,
}

fn sample(status: &Value) -> Sample {
    let cursor = |sink: &Value| {
        (sink["name"].as_str().unwrap().to_owned(), sink["cursor"].as_u64().unwrap())
    };
    let end = status["sources"][0]["journal"]["end"].as_u64().unwrap();
    let cursors = status["sinks"].as_array().unwrap().iter().map(cursor).collect();
    Sample { at: Instant::now(), end, cursors }
}

/// The longest time from a moment until a sink had what was in the journal then.
fn lag_max(samples: &[Sample], sink: &str) -> Duration {
    let mut longest = Duration::ZERO;
    let mut later = 0;
    for now in samples {
        while samples.get(later).is_some_and(|sample| sample.cursors[sink] < now.end) {
            later += 1;
        }
        let Some(there) = samples.get(later) else { return Duration::MAX };
        longest = longest.max(there.at.saturating_duration_since(now.at));
    }
    longest
}

struct Crowd {
    cluster: Cluster,
    server: Server,
    /// Refuses every change of a tenth of the keys.
    picky: Recorder,
    /// The names of the others that work.
    healthy: Vec<String>,
    /// Held until the end.
    _targets: (Vec<Box<dyn Target>>, Vec<Recorder>, JoinSet<()>),
}

impl Crowd {
    async fn gather() -> Self {
        let (cluster, postgres, stream, strings, pubsub) = tokio::join!(
            Cluster::start(),
            Postgres::start("park"),
            StreamTarget::start(),
            StringTarget::start(),
            PubsubTarget::start(),
        );
        cluster.sql("create table item (id bigint primary key, version bigint not null)").await;
        let targets: Vec<Box<dyn Target>> =
            vec![Box::new(postgres), Box::new(stream), Box::new(strings), Box::new(pubsub)];
        let mut sinks = serde_json::Map::new();
        for target in &targets {
            let config = target.config();
            sinks.insert(config["kind"].as_str().unwrap().to_owned(), config);
        }
        for name in ["lake", "manifest"] {
            let path = format!("{name}.jsonl");
            sinks.insert(name.into(), json!({"kind": "file", "path": path}));
        }
        let hooks = [Recorder::start().await, Recorder::start().await, Recorder::start().await];
        for (number, hook) in hooks.iter().enumerate() {
            let config = json!({"kind": "webhook", "url": hook.url(), "lanes": number + 1});
            sinks.insert(format!("hook_{number}"), config);
        }
        let healthy = sinks.keys().cloned().collect();
        let picky = Recorder::start().await;
        picky.refuse(|change| is_refused(id(change)));
        sinks.insert("picky".into(), json!({"kind": "webhook", "url": picky.url()}));
        let (silent, task) = silence().await;
        let hangs =
            json!({"kind": "webhook", "url": format!("http://{silent}/"), "timeout_ms": 1_000});
        sinks.insert("hangs".into(), hangs);
        let down = format!("redis://{}", nobody().await);
        sinks.insert("down".into(), json!({"kind": "redis_stream", "url": down, "stream": "s"}));
        let config = toml::to_string(&json!({"sink": sinks})).unwrap();
        let source = source_toml("app", &cluster.unix_url());
        let mut server = Server::new(&format!("{source}\n{config}"));
        server.start_ready().await;
        Self { cluster, server, picky, healthy, _targets: (targets, hooks.into(), task) }
    }

    async fn status(&self) -> Value {
        serde_json::from_str(&self.server.get("/status").await.1).unwrap()
    }

    /// Writes at an even pace and looks at the status all the while.
    async fn load(&self) -> Vec<Sample> {
        let session = self.cluster.connect().await;
        let mut writer = JoinSet::new();
        writer.spawn(async move {
            let mut tick = tokio::time::interval(PAUSE);
            for number in 0..TRANSACTIONS {
                tick.tick().await;
                let first = number * CHANGES % KEYS;
                let statement = format!(
                    "insert into item select i, {number} from generate_series({first}, {}) i \
                     on conflict (id) do update set version = excluded.version",
                    first + CHANGES - 1
                );
                session.batch_execute(&statement).await.unwrap();
            }
        });
        let mut samples = Vec::new();
        while writer.try_join_next().is_none() {
            samples.push(sample(&self.status().await));
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
        let all = async || {
            let now = sample(&self.status().await);
            let there = |name: &String| now.cursors[name] >= TRANSACTIONS * CHANGES;
            let done = self.healthy.iter().all(there) && there(&"picky".into());
            samples.push(now);
            done.then_some(())
        };
        wait_for(PATIENCE, all, || self.server.log_tail()).await;
        samples
    }

    fn walrace(&self, arguments: &[&str]) -> String {
        let output = self.server.run(arguments);
        let failure = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{arguments:?}: {failure}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// The offsets of what is parked, in the order of the list.
    fn parked(&self) -> Vec<u64> {
        let listed = self.walrace(&["dlq", "list", "--sink", "picky", "--json", "--limit", "9999"]);
        let offset = |line: &str| {
            let letter: Value = serde_json::from_str(line).unwrap();
            letter["offset"].as_u64().unwrap()
        };
        listed.lines().map(offset).collect()
    }

    fn memory_mib(&self) -> u64 {
        let status = format!("/proc/{}/status", self.server.pid());
        let status = std::fs::read_to_string(status).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nine_healthy_sinks_keep_up_beside_one_that_hangs_one_that_refuses_and_one_that_is_down() {
    let mut crowd = Crowd::gather().await;
    assert_eq!(crowd.healthy.len(), 9);
    let samples = crowd.load().await;
    for name in &crowd.healthy {
        let lag = lag_max(&samples, name);
        println!("{name}: {lag:.2?} behind at most");
        assert!(lag < LAG_MAX, "{name} was {lag:?} behind");
    }
    println!("picky: {:.2?} behind at most", lag_max(&samples, "picky"));
    let memory = crowd.memory_mib();
    println!("{memory} MiB at most");
    assert!(memory < MEMORY_MIB_MAX);
    assert_eq!(crowd.server.get("/ready").await.0, 200, "bad targets are no reason for a restart");

    let status = crowd.status().await;
    for (name, told) in [("hangs", "within 1000 ms"), ("down", "refused")] {
        let sink = status["sinks"].as_array().unwrap().iter().find(|sink| sink["name"] == name);
        let sink = sink.unwrap();
        assert_eq!(sink["state"], "waiting", "{sink}");
        assert!(sink["reason"].as_str().unwrap().contains(told), "{sink}");
        assert_eq!((&sink["cursor"], &sink["parked_changes"]), (&json!(0), &json!(0)), "{sink}");
    }

    let all = FileRecorder::new(crowd.server.path("lake.jsonl")).changes();
    let (bad, good): (Vec<&Value>, Vec<&Value>) =
        all.iter().partition(|change| is_refused(id(change)));
    let bad_offsets: Vec<u64> =
        bad.iter().map(|change| change["offset"].as_u64().unwrap()).collect();
    assert_eq!(bad_offsets.len() as u64, TRANSACTIONS * CHANGES / 10);
    assert_eq!(crowd.parked(), bad_offsets, "all of them, in their order, and nothing else");
    let came = crowd.picky.changes();
    assert_eq!(versions(&came), versions(good), "the others, in the order of each key");

    // Once the target takes them they follow, in the order of each key.
    crowd.picky.refuse_nothing();
    crowd.walrace(&["dlq", "retry", "--sink", "picky", "--all"]);
    let empty = async || {
        let parked = crowd.server.metric("walrace_sink_parked_changes", &["picky"]).await?;
        (parked == 0.0).then_some(())
    };
    wait_for(PATIENCE, empty, || crowd.server.log_tail()).await;
    let came = crowd.picky.changes();
    let distinct: BTreeSet<_> = came.iter().map(|change| change["offset"].as_u64()).collect();
    assert_eq!(distinct.len(), came.len(), "nothing twice, as nothing died");
    assert_eq!(versions(&came), versions(&all));
    assert!(crowd.server.stop().await.success());
}
