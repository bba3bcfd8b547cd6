//! Every kind of sink at once in one process, which is killed at random moments under a load while
//! one target after the other goes away and comes back.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use fastrand::Rng;
use serde_json::{Value as Json, json};
use tokio::task::JoinSet;
use walrace::sink::Capabilities;

#[cfg(feature = "kafka")]
use crate::sink::kafka_target::KafkaTarget;
use crate::{
    kit::{Cluster, Ledger, Load, Pace, Server, Stop, http_client, source_toml, wait_for},
    sink::{
        conformance::{capabilities, compare, tables},
        nats::NatsTarget,
        object_store::S3Target,
        opensearch::OpenSearchTarget,
        plain::{FileTarget, WebhookTarget},
        postgres::Postgres,
        rabbitmq::RabbitMqTarget,
        redis::{ListTarget, PubsubTarget, StreamTarget, StringTarget},
        target::Target,
    },
};

/// Slow, because three targets take the changes of a table without a key one by one.
const PACE: Pace = Pace { seed: 5, sessions: 2, pause: Duration::from_millis(150) };
const PATIENCE: Duration = Duration::from_secs(180);

/// A sink's name and its target.
struct Attached {
    name: &'static str,
    target: Box<dyn Target>,
}

impl Attached {
    fn capabilities(&self) -> Capabilities {
        let caps = capabilities(&*self.target);
        // It keeps its own progress, and still a consumer may get a message again.
        let once = caps.transactional_progress && self.name != "http_pull";
        Capabilities { transactional_progress: once, ..caps }
    }

    /// Its part of the configuration.
    fn section(&self) -> Json {
        let mut sink = self.target.ledger_config();
        sink["tables"] = json!(tables(&*self.target));
        sink["retry_ms_min"] = 10.into();
        sink["retry_ms_max"] = 200.into();
        sink
    }
}

/// One target of each kind, all running.
async fn targets() -> Vec<Attached> {
    let slow = async { tokio::join!(OpenSearchTarget::new(), kafka(), RabbitMqTarget::start()) };
    let redis = async {
        let entries = async { tokio::join!(StreamTarget::start(), ListTarget::start()) };
        tokio::join!(entries, StringTarget::start(), PubsubTarget::start())
    };
    let others =
        async { tokio::join!(NatsTarget::start(), Postgres::start("block"), S3Target::new()) };
    let (
        (opensearch, kafka, rabbitmq),
        ((stream, list), strings, pubsub),
        (nats, postgres, objects),
    ) = tokio::join!(slow, redis, others);
    let attach = |name, target| Attached { name, target };
    let mut all = vec![
        attach("file", Box::new(FileTarget::new()) as Box<dyn Target>),
        attach("webhook", Box::new(WebhookTarget::start(2).await)),
        attach("redis_stream", Box::new(stream)),
        attach("redis_list", Box::new(list)),
        attach("redis_string", Box::new(strings)),
        attach("redis_pubsub", Box::new(pubsub)),
        attach("nats", Box::new(nats)),
        attach("rabbitmq", Box::new(rabbitmq)),
        attach("postgres", Box::new(postgres)),
        attach("opensearch", Box::new(opensearch)),
        attach("object_store", Box::new(objects)),
    ];
    all.extend(kafka.map(|target| attach("kafka", target)));
    all
}

#[cfg(feature = "kafka")]
async fn kafka() -> Option<Box<dyn Target>> {
    Some(Box::new(KafkaTarget(crate::kit::Kafka::start().await)))
}

#[cfg(not(feature = "kafka"))]
async fn kafka() -> Option<Box<dyn Target>> {
    None
}

/// A consumer of the sink `http_pull`, which asks whatever process runs and acknowledges what it
/// has noted.
struct Consumer {
    received: Arc<Mutex<Vec<Json>>>,
    _task: JoinSet<()>,
}

impl Consumer {
    /// Reads the address of the running process from the file where each writes it.
    fn start(address: PathBuf) -> Self {
        let received = Arc::<Mutex<Vec<Json>>>::default();
        let mut task = JoinSet::new();
        let noted = Arc::clone(&received);
        task.spawn(async move {
            loop {
                if consume(&address, &noted).await.is_none() {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
        });
        Self { received, _task: task }
    }
}

/// One fetch and its acknowledgement; `None` where nobody answers, or not well.
async fn consume(address: &Path, noted: &Mutex<Vec<Json>>) -> Option<()> {
    let text = std::fs::read_to_string(address).ok()?;
    let base = format!("http://{}/api/http_pull_consumers/http_pull", text.lines().next()?);
    let ask = async |what: &str, body: Json| {
        let request = http_client().post(format!("{base}/{what}")).json(&body);
        let reply = request.timeout(Duration::from_secs(5)).send().await.ok()?;
        reply.error_for_status().ok()?.json::<Json>().await.ok()
    };
    let reply = ask("receive", json!({"batch_size": 500, "wait_for": 500})).await?;
    let messages = reply["data"].as_array()?;
    if messages.is_empty() {
        return Some(());
    }
    noted.lock().unwrap().extend(messages.iter().map(|message| message["data"].clone()));
    let ids: Vec<&Json> = messages.iter().map(|message| &message["ack_id"]).collect();
    ask("ack", json!({"ack_ids": ids})).await.map(|_| ())
}

#[async_trait]
impl Target for Consumer {
    fn config(&self) -> Json {
        pull_config()
    }

    async fn stop(&mut self) {}

    async fn start(&mut self) {}

    async fn content(&mut self) -> Vec<Json> {
        self.received.lock().unwrap().clone()
    }
}

/// What was out with the consumer when the process died comes again after `ack_wait_ms`.
fn pull_config() -> Json {
    json!({"kind": "http_pull", "message": "native", "ack_wait_ms": 1_000})
}

struct Scene {
    cluster: Cluster,
    sinks: Vec<Attached>,
    server: Server,
}

impl Scene {
    async fn set() -> Self {
        let (cluster, mut sinks) = tokio::join!(Cluster::start(), targets());
        Ledger::create(&cluster).await;
        // Targets that keep states need whole rows.
        cluster.sql("alter table ledger.document replica identity full").await;
        let mut sections: serde_json::Map<_, _> =
            sinks.iter().map(|sink| (sink.name.to_owned(), sink.section())).collect();
        let mut pull = pull_config();
        pull["retry_ms_max"] = 200.into();
        sections.insert("http_pull".into(), pull);
        let config = toml::to_string(&json!({"sink": sections})).unwrap();
        let source = source_toml("app", &cluster.unix_url());
        let mut server = Server::new(&format!("{source}tables = [\"ledger.*\"]\n\n{config}"));
        server.start_ready().await; // the slot is there before the first change
        server.kill();
        let consumer = Consumer::start(server.path("data/http.addr"));
        sinks.push(Attached { name: "http_pull", target: Box::new(consumer) });
        Self { cluster, sinks, server }
    }

    /// Runs for a moment, within which one target goes away, and dies before or after it is back.
    async fn round(&mut self, number: usize, rng: &mut Rng) {
        self.server.start();
        pause(rng.u64(5..2_000)).await;
        let count = self.sinks.len();
        let away = &mut self.sinks[number % count];
        // Who subscribes sees what is published while it is there: this one is there all the time.
        let goes = away.target.is_durable();
        if goes {
            away.target.stop().await;
            pause(rng.u64(5..600)).await;
        }
        let dies_first = rng.bool();
        if dies_first {
            self.server.kill();
        }
        if goes {
            away.target.start().await;
        }
        if number % 4 == 3 {
            self.cluster.restart(Stop::Immediate).await;
        }
        if !dies_first {
            pause(rng.u64(0..800)).await;
            self.server.kill();
        }
        // A server hangs up on a subscriber that does not read.
        for sink in self.sinks.iter_mut().filter(|sink| !sink.target.is_durable()) {
            sink.target.content().await;
        }
    }

    /// Waits until every sink has everything that was committed, and compares each with the tables.
    async fn settle(mut self, load: Load) {
        let (committed, aborted) = load.stop().await;
        println!("{committed} transactions, {aborted} rolled back");
        self.server.start_ready().await;
        self.cluster.sql("insert into ledger.tx values (-1, 0, now())").await;
        let written = self.cluster.value("select pg_current_wal_lsn()").await;
        let written = written.as_str().unwrap();
        let captured =
            format!("select confirmed_flush_lsn >= '{written}' from pg_replication_slots");
        let done = async || {
            (self.cluster.value(&captured).await == true).then_some(())?;
            let behind = self.server.metric("walrace_sink_behind_changes", &[]).await?;
            let parked = self.server.metric("walrace_sink_parked_changes", &[]).await?;
            (behind + parked == 0.0).then_some(())
        };
        let began = Instant::now();
        wait_for(PATIENCE, done, || self.server.log_tail()).await;
        println!("all have everything after {:.1?}", began.elapsed());
        assert!(self.server.stop().await.success());
        for sink in &mut self.sinks {
            let began = Instant::now();
            println!("{}:", sink.name);
            let caps = sink.capabilities();
            compare(&mut *sink.target, caps, &self.cluster).await;
            println!("  as it should be, compared in {:.1?}", began.elapsed());
        }
    }
}

async fn pause(milliseconds: u64) {
    tokio::time::sleep(Duration::from_millis(milliseconds)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn chaos_with_every_kind_of_sink_attached_loses_nothing_anywhere() {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let mut rng = Rng::with_seed(number("WALRACE_CHAOS_SEED").unwrap_or(42));
    let began = Instant::now();
    let mut scene = Box::pin(Scene::set()).await;
    println!("all are up after {:.1?}", began.elapsed());
    let load = Ledger::load(&scene.cluster, PACE);
    for round in 0..number("WALRACE_CHAOS_KILLS").unwrap_or(10) {
        scene.round(usize::try_from(round).unwrap(), &mut rng).await;
        println!("kill {round} after {:.1?}", began.elapsed());
    }
    scene.settle(load).await;
}
