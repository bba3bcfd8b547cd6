//! The pages of docs/sinks: the first example of each is run as it stands there, with the addresses
//! of real servers; and every piece of TOML in the documentation is loaded.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::{Value as Json, json};
use walrace::{
    config::{Config, Environment},
    error::Result,
    runtime::Walrace,
    sink,
    transform::Transform,
};

use super::{context, object_store, redis::pubsub};
use crate::kit::{
    Answer, Cluster, FileRecorder, Moto, Nats, OpenSearch, RabbitMq, Recorder, Redis, Scratch,
    Server, certificates, http_client, source_toml, wait_for,
};
#[cfg(feature = "kafka")]
use crate::kit::{Isolation, KAFKA_PASSWORD, Kafka};

const PATIENCE: Duration = Duration::from_secs(60);
const TABLES: &str = "
    create table orders (id bigint primary key, project_id text, status text);
    create table users (id bigint primary key, name text)";
const ORDER: &str = "insert into orders values (42, 'p1', 'paid')";
const USER: &str = "insert into users values (42, 'ann')";
/// Where a piece of TOML wants a variable.
const WORD: &str = "0123456789abcdef";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn page(kind: &str) -> String {
    fs::read_to_string(root().join(format!("docs/sinks/{kind}.md"))).unwrap()
}

/// The code of this language in a page.
fn blocks(page: &str, language: &str) -> Vec<String> {
    let fence = format!("```{language}\n");
    let code = page.split(&fence).skip(1).map(|rest| rest.split("```").next().unwrap().to_owned());
    code.collect()
}

/// With a word in place of each variable.
fn without_variables(mut text: String) -> String {
    while let Some((before, rest)) = text.split_once("${") {
        let (_, after) = rest.split_once('}').unwrap();
        text = format!("{before}{WORD}{after}");
    }
    text
}

/// The first example of a page with other addresses: each must be there.
fn example(kind: &str, addresses: &[(&str, &str)]) -> String {
    let mut text = blocks(&page(kind), "toml").remove(0);
    for (from, to) in addresses {
        assert!(text.contains(from), "the first example of docs/sinks/{kind}.md lacks {from}");
        text = text.replace(from, to);
    }
    without_variables(text)
}

/// A Walrace that runs an example, and the database that it captures.
struct Example {
    cluster: Cluster,
    server: Server,
}

impl Example {
    async fn start(kind: &str, addresses: &[(&str, &str)]) -> Self {
        let cluster = Cluster::start().await;
        cluster.sql(TABLES).await;
        let source = source_toml("app", &cluster.unix_url());
        let mut server = Server::new(&format!("{source}\n{}", example(kind, addresses)));
        server.start_ready().await;
        Self { cluster, server }
    }

    /// Waits until the target has what these statements write.
    async fn delivers(&self, statements: &str) {
        let count = async || {
            let name = "walrace_sink_delivered_changes_total";
            self.server.metric(name, &[]).await
        };
        let before = count().await.unwrap();
        self.cluster.sql(statements).await;
        let all = async || (count().await? > before).then_some(());
        wait_for(PATIENCE, all, || self.server.log_tail()).await;
    }
}

/// The order, in the format `native`.
fn assert_is_the_order(change: &Json) {
    assert_eq!(change["source_table"], "orders", "{change}");
    assert_eq!(change["after"], json!({"id": 42, "project_id": "p1", "status": "paid"}));
}

#[tokio::test]
async fn the_example_of_the_stdout_page_works() {
    let example = Example::start("stdout", &[]).await;
    example.delivers(ORDER).await;
    let log = example.server.log();
    let line = log.lines().find(|line| line.contains("\"paid\"")).expect("a line");
    assert_is_the_order(&serde_json::from_str(line).unwrap());
}

#[tokio::test]
async fn the_example_of_the_file_page_works() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("changes.jsonl");
    let paths = [("/var/lib/lake/changes.jsonl", path.to_str().unwrap())];
    let example = Example::start("file", &paths).await;
    example.delivers(ORDER).await;
    assert_is_the_order(&FileRecorder::new(&path).changes()[0]);
}

#[tokio::test]
async fn the_example_of_the_webhook_page_works() {
    let hook = Recorder::start().await;
    let addresses = [("https://crm.example/hooks/bookings", hook.url())];
    let addresses = addresses.each_ref().map(|(from, to)| (*from, to.as_str()));
    let example = Example::start("webhook", &addresses).await;
    example.delivers(ORDER).await;
    let request = hook.stored().remove(0);
    assert_is_the_order(&request.json()["data"][0]);
    let token = format!("Bearer {WORD}");
    assert_eq!(request.header("authorization"), Some(token.as_str()));
    for header in ["webhook-id", "webhook-signature", "x-sequin-signature"] {
        assert!(request.header(header).is_some(), "no {header}");
    }
}

#[tokio::test]
async fn the_example_of_the_custom_page_works() {
    let program = Recorder::start().await;
    program.always(Answer::Reply { status: 200, headers: Vec::new(), body: String::new() });
    let example = Example::start("custom", &[("http://127.0.0.1:8088/", &program.url())]).await;
    example.delivers(ORDER).await;
    assert_is_the_order(&program.stored().remove(0).json()["data"][0]);
}

#[tokio::test]
async fn the_example_of_the_queue_page_works() {
    let cluster = Cluster::start().await;
    cluster.sql(TABLES).await;
    let scratch = Scratch::new("embedded");
    let source = source_toml("app", &cluster.unix_url());
    let data = toml::Value::from(scratch.path().to_str().unwrap());
    let config = format!("data_dir = {data}\n{source}\n{}", example("queue", &[]));
    let walrace = Walrace::start(Config::parse(&config, "the page").unwrap()).await.unwrap();
    let mut changes = walrace.subscribe("changes").unwrap().linger(Duration::from_millis(50));
    let ready = async || walrace.status().unready().is_empty().then_some(());
    wait_for(PATIENCE, ready, || format!("{:?}", walrace.status().unready())).await;
    cluster.sql(ORDER).await;
    let delivery = tokio::time::timeout(PATIENCE, changes.next(100)).await.unwrap().unwrap();
    assert_eq!(delivery.changes[0].table.as_ref().unwrap().full_name(), "public.orders");
    changes.done();
    drop(changes);
    walrace.stop().await;
}

#[tokio::test]
async fn the_example_of_the_http_pull_page_works() {
    let example = Example::start("http_pull", &[]).await;
    example.cluster.sql(ORDER).await;
    let base = format!("http://{}/api/sequin_streams/orders", example.server.address().unwrap());
    let post = async |path: &str, body: Json| -> Json {
        let request = http_client().post(format!("{base}/{path}")).bearer_auth(WORD).json(&body);
        let text = request.send().await.unwrap().text().await.unwrap();
        serde_json::from_str(&text).unwrap()
    };
    let received = post("receive", json!({"wait_for": "30s"})).await;
    let message = &received["data"][0];
    assert_eq!(message["data"]["record"]["status"], "paid", "{received}");
    let acked = post("ack", json!({"ack_ids": [message["ack_id"]]})).await;
    assert_eq!(acked, json!({"success": true}));
}

#[tokio::test]
async fn the_examples_of_the_redis_pages_work() {
    let redis = Redis::start().await;
    let url = redis.url();
    let address = url.strip_prefix("redis://").unwrap().strip_suffix("/0").unwrap();

    let named = [("walrace:password@localhost:6379", address)];
    let example = Example::start("redis_stream", &named).await;
    example.delivers(ORDER).await;
    type Entry = (String, Vec<(String, String)>);
    let entries: Vec<Entry> = redis.ask("XRANGE walstream:events - +").await;
    let payload = entries[0].1.iter().find(|(name, _)| name == "payload").unwrap();
    assert_is_the_order(&serde_json::from_str(&payload.1).unwrap());
    drop(example);

    let example = Example::start("redis_list", &named).await;
    example.delivers(ORDER).await;
    let item: String = redis.ask("LINDEX jobs:orders 0").await;
    assert_is_the_order(&serde_json::from_str(&item).unwrap());
    drop(example);

    let mut listener = pubsub::listen(&redis).await;
    let example = Example::start("redis_pubsub", &named).await;
    example.delivers(ORDER).await;
    let (channel, message) = pubsub::next(&mut listener).await;
    assert_eq!(channel, "cdc:project:p1:orders");
    let message: Json = serde_json::from_str(&message).unwrap();
    assert_eq!(message["record"]["status"], "paid");
    drop(example);

    let named = [("cache:password@localhost:6379", address)];
    let example = Example::start("redis_string", &named).await;
    example.delivers(ORDER).await;
    let order: String = redis.cli("-n 1 GET orders:42");
    let order: Json = serde_json::from_str(&order).unwrap();
    assert_eq!(order["status"], "paid");
    redis.ask::<()>("SET user:42 old").await;
    let gone = async || redis.ask::<Option<String>>("GET user:42").await.is_none().then_some(());
    example.delivers(USER).await;
    wait_for(PATIENCE, gone, || example.server.log_tail()).await;
}

#[cfg(feature = "kafka")]
#[tokio::test]
async fn the_example_of_the_kafka_page_works() {
    let kafka = Kafka::start().await;
    let brokers = format!("[\"{}\"]", kafka.secure_brokers());
    let certificate = kafka.certificate();
    let addresses = [
        (r#"["kafka1:9092", "kafka2:9092"]"#, brokers.as_str()),
        ("${KAFKA_PASSWORD}", KAFKA_PASSWORD),
        ("/etc/walrace/kafka-ca.pem", certificate.to_str().unwrap()),
    ];
    let example = Example::start("kafka", &addresses).await;
    example.delivers(ORDER).await;
    let records = kafka.records(Isolation::Committed).await;
    assert_eq!(records[0].topic, "app.public.orders");
    assert_is_the_order(&records[0].json());
}

#[tokio::test]
async fn the_example_of_the_nats_page_works() {
    let nats = Nats::start().await;
    let url = nats.url();
    let example =
        Example::start("nats", &[("nats://walrace:${NATS_PASSWORD}@localhost:4222", &url)]).await;
    example.delivers(ORDER).await;
    let stored = nats.stored("CHANGES").await;
    assert_eq!(stored[0].subject, "app.public.orders.insert");
    assert_is_the_order(&serde_json::from_slice(&stored[0].payload).unwrap());
}

/// With the queue and the binding that the page makes.
#[tokio::test]
async fn the_example_of_the_rabbitmq_page_works() {
    let rabbitmq = RabbitMq::start().await;
    assert!(page("rabbitmq").contains("routing_key='app.public.orders.*'"));
    rabbitmq.bind("changes", "orders", "app.public.orders.*").await;
    let url = rabbitmq.url();
    let address = ("amqp://walrace:${RABBITMQ_PASSWORD}@localhost:5672", url.as_str());
    let example = Example::start("rabbitmq", &[address]).await;
    example.delivers(ORDER).await;
    let stored = rabbitmq.stored("orders").await;
    assert_eq!(stored[0].routing_key.as_str(), "app.public.orders.insert");
    assert_is_the_order(&serde_json::from_slice(&stored[0].data).unwrap());
}

/// With the role and the privileges that the page gives.
#[tokio::test]
async fn the_example_of_the_postgres_page_works() {
    let (target, scratch, _) = crate::source_login::with_tls("IP:127.0.0.1").await;
    target.sql(TABLES).await;
    let grants = blocks(&page("postgres"), "sql").remove(0);
    target
        .sql(&grants.replace("'…'", "'s3cret'").replace("database app", "database postgres"))
        .await;
    let login = format!("walrace:s3cret@127.0.0.1:{}/postgres", target.port());
    let authority = scratch.path().join("ca.pem");
    let addresses = [
        ("walrace:${TARGET_PASSWORD}@replica.example:5432/app", login.as_str()),
        ("/etc/walrace/target-ca.pem", authority.to_str().unwrap()),
    ];
    let example = Example::start("postgres", &addresses).await;
    example.delivers(ORDER).await;
    let rows = target.rows("select * from orders").await;
    assert_eq!(rows, [json!({"id": 42, "project_id": "p1", "status": "paid"})]);
    assert_eq!(target.value("select count(*) from walrace.progress").await, 1);
}

#[tokio::test]
async fn the_example_of_the_opensearch_page_works() {
    let opensearch = OpenSearch::start().await;
    let scratch = Scratch::new("authority");
    certificates(scratch.path(), "IP:127.0.0.1");
    let authority = scratch.path().join("ca.pem");
    let url = opensearch.url();
    let addresses = [
        ("https://search.example:9200", url.as_str()),
        ("/etc/walrace/ca.pem", authority.to_str().unwrap()),
    ];
    let example = Example::start("opensearch", &addresses).await;
    example.delivers(ORDER).await;
    let documents = opensearch.documents("public.orders").await;
    let row = json!({"id": 42, "project_id": "p1", "status": "paid"});
    assert_eq!(documents, [("42".to_owned(), row)]);
}

/// An object is due after a minute, or when Walrace stops.
#[tokio::test]
async fn the_example_of_the_object_store_page_works() {
    let moto = Moto::start().await;
    let url = format!("s3://bucket/cdc\"\nendpoint = \"{}\"\nallow_http = true #", moto.endpoint());
    let addresses = [
        ("s3://warehouse/cdc", url.as_str()),
        ("${AWS_ACCESS_KEY_ID}", &moto.access_key_id),
        ("${AWS_SECRET_ACCESS_KEY}", &moto.secret_access_key),
    ];
    let mut example = Example::start("object_store", &addresses).await;
    example.delivers(ORDER).await;
    assert!(example.server.stop().await.success());
    let objects = object_store::s3_objects(&moto).await;
    assert!(objects[0].0.starts_with("public.orders/"), "{objects:?}");
    assert_is_the_order(&object_store::lines_of(&objects)[0]);
}

/// Each test above says which page it runs.
#[test]
fn the_first_example_of_each_page_is_run_by_a_test() {
    let own = include_str!("pages.rs");
    for entry in fs::read_dir(root().join("docs/sinks")).unwrap() {
        let path = entry.unwrap().path();
        let kind = path.file_stem().unwrap().to_str().unwrap();
        let run = [format!("Example::start(\"{kind}\""), format!("example(\"{kind}\"")];
        assert!(run.iter().any(|run| own.contains(run)), "no test runs the example of {kind}.md");
    }
}

/// The pages of the documentation.
fn pages(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            pages(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "md") {
            found.push(path);
        }
    }
}

/// A piece of a configuration, made whole: rules and the choice of changes stand in a sink, what is
/// said of a slot and a publication in a source, and each sink reads a source.
fn whole(piece: &str) -> Option<toml::Table> {
    let mut table: toml::Table = piece.parse().unwrap_or_else(|error| panic!("{piece}{error}"));
    if table.contains_key("dependencies") {
        return None; // for Cargo
    }
    const TOP: [&str; 4] = ["source", "sink", "api_tokens", "data_dir"];
    let mut source = toml::Table::new();
    if !TOP.iter().any(|key| table.contains_key(*key)) {
        let mut piece = std::mem::take(&mut table);
        if piece.contains_key("publication") {
            source = piece;
        } else {
            piece.insert("kind".into(), "queue".into()); // which has a use for every rule
            table.insert("sink".into(), named("rules", piece));
        }
    }
    source.insert("kind".into(), "postgres".into());
    source.insert("url".into(), "postgres://localhost/app".into());
    table.entry("source").or_insert_with(|| named("app", source));
    Some(table)
}

fn named(name: &str, part: toml::Table) -> toml::Value {
    toml::Table::from_iter([(name.to_owned(), part.into())]).into()
}

/// Loads a configuration and makes its sinks and their rules, as `walrace run` does before it
/// connects.
fn load(text: &str) -> Result<()> {
    let none: [(&str, &str); 0] = [];
    let config = Config::parse_in(text, "the page", &Environment::of(none))?;
    for (name, options) in &config.sink {
        sink::open(name, options, &context())?;
        Transform::new(name, options)?;
    }
    Ok(())
}

/// With a certificate that is there in place of each that an example names.
fn with_certificates(mut text: String, authority: &Path) -> String {
    while let Some((before, rest)) = text.split_once("/etc/walrace/") {
        let (_, after) = rest.split_once(".pem").unwrap();
        text = format!("{before}{}{after}", authority.display());
    }
    text
}

#[test]
fn every_piece_of_toml_in_the_documentation_is_valid() {
    let folder = tempfile::tempdir().unwrap();
    certificates(folder.path(), "IP:127.0.0.1");
    let authority = folder.path().join("ca.pem");
    let mut found = vec![root().join("README.md"), root().join("bench/README.md")];
    pages(&root().join("docs"), &mut found);
    let mut seen = 0;
    for path in found {
        let page = fs::read_to_string(&path).unwrap();
        for piece in blocks(&page, "toml") {
            let Some(table) = whole(&without_variables(piece)) else { continue };
            let text = with_certificates(table.to_string(), &authority);
            load(&text).unwrap_or_else(|error| panic!("{}: {error}\n{text}", path.display()));
            seen += 1;
        }
    }
    assert!(seen >= 30, "only {seen} pieces");
}
