//! The `kafka` sink against a real broker. A broker takes seconds to start: few tests, each of much.

use std::{
    collections::{BTreeMap, HashMap},
    time::{Duration, Instant},
};

use rdkafka::{
    ClientConfig,
    producer::{BaseProducer, BaseRecord, Producer},
};
use serde_json::{Value as Json, json};
use uuid::Uuid;
use walrace::{
    change::{Batch, Change, Row, Value},
    error::Class,
    sink::{Progress, Sink},
};

use super::{batch, delivers, fails, open, truncate, write};
use crate::kit::{
    Cluster, Isolation, KAFKA_PASSWORD, Kafka, Record, Server, source_toml, wait_for,
};

fn with(mut config: Json, more: &Json) -> Json {
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    config
}

#[expect(clippy::needless_pass_by_value, reason = "every caller makes it in place")]
pub(super) fn config(kafka: &Kafka, more: Json) -> Json {
    let config = json!({
        "kind": "kafka", "brokers": kafka.brokers(), "topic": "{schema}.{table}",
        "timeout_ms": 20_000,
    });
    with(config, &more)
}

#[expect(clippy::needless_pass_by_value, reason = "every caller makes it in place")]
pub(super) fn login(kafka: &Kafka, more: Json) -> Json {
    let own = json!({
        "brokers": kafka.login_brokers(), "username": "walrace", "password": KAFKA_PASSWORD,
    });
    config(kafka, with(own, &more))
}

async fn opened(config: Json) -> Box<dyn Sink> {
    let mut sink = open(config).unwrap();
    sink.open().await.unwrap();
    sink
}

fn progress(cursor: u64) -> Progress {
    Progress { lineage: Uuid::from_u128(7), epoch: 1, cursor, retry_seq: 0 }
}

fn offsets_of(records: &[Record]) -> Vec<u64> {
    let offset = |record: &Record| record.header("walrace-offset").unwrap().parse().unwrap();
    records.iter().map(offset).collect()
}

/// How often each offset was read, and that each partition has them in order.
fn offsets(records: &[Record]) -> BTreeMap<u64, usize> {
    let mut counts = BTreeMap::new();
    let mut last: HashMap<(&str, i32), u64> = HashMap::new();
    for record in records {
        let offset = record.header("walrace-offset").unwrap().parse().unwrap();
        *counts.entry(offset).or_default() += 1;
        let before = last.insert((&record.topic, record.partition), offset);
        assert!(before.is_none_or(|before| before <= offset), "{before:?} before {offset}");
    }
    counts
}

fn once(offsets: std::ops::Range<u64>) -> BTreeMap<u64, usize> {
    offsets.map(|offset| (offset, 1)).collect()
}

/// Where Kafka's own partitioner puts these keys.
fn placed_by_librdkafka(brokers: &str, keys: &[String]) {
    let producer: BaseProducer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("partitioner", "murmur2_random")
        .create()
        .unwrap();
    for key in keys {
        producer.send(BaseRecord::to("reference").key(key).payload("x")).unwrap();
    }
    producer.flush(Duration::from_secs(20)).unwrap();
}

#[tokio::test]
async fn each_message_has_its_key_headers_time_and_partition() {
    let kafka = Kafka::start().await;
    let mut sink = open(config(&kafka, json!({}))).unwrap();
    assert_eq!(sink.peek().await.unwrap(), None);
    assert_eq!(sink.open().await.unwrap(), None);
    delivers(&mut *sink, &batch(0..20)).await;
    let records = kafka.records(Isolation::Committed).await;
    assert_eq!(offsets(&records), once(0..20));
    let keys: Vec<String> = records.iter().map(|record| record.key.clone().unwrap()).collect();
    kafka.create_topic("reference", 3, &[]).await;
    placed_by_librdkafka(&kafka.brokers(), &keys);
    let all = kafka.records(Isolation::Committed).await;
    let place = |topic: &str| -> BTreeMap<String, i32> {
        let own = all.iter().filter(|record| record.topic == topic);
        own.map(|record| (record.key.clone().unwrap(), record.partition)).collect()
    };
    assert_eq!(place("public.t"), place("reference"));
    assert_eq!(place("public.t").values().collect::<std::collections::BTreeSet<_>>().len(), 3);
    for record in &records {
        let json = record.json();
        let offset = json["offset"].as_u64().unwrap();
        assert_eq!(json["after"], json!({"id": offset, "v": "ü \"quoted\""}));
        assert_eq!(record.header("idempotency-key"), json["idempotency_key"].as_str());
        assert_eq!(record.header("walrace-offset"), Some(offset.to_string().as_str()));
        assert_eq!(record.timestamp_ms, Some(1_775_466_862_000));
    }

    // Progress: stored with an empty batch too, kept over a new sink, looked at without a change.
    let moved = Progress { retry_seq: 3, ..progress(25) };
    sink.write(&Batch::default(), &moved).await.unwrap();
    let mut other = open(config(&kafka, json!({}))).unwrap();
    assert_eq!(other.peek().await.unwrap(), Some(moved));
    let more = Progress { cursor: 26, ..moved };
    sink.write(&batch(25..26), &more).await.unwrap();
    assert_eq!(other.open().await.unwrap(), Some(more));
}

#[tokio::test]
async fn rules_route_formats_filter_and_every_compression_is_read_back() {
    let kafka = Kafka::start().await;
    let mut routed = batch(0..1).changes.remove(0);
    let shaped = routed.shaped_mut();
    shaped.route = Some("elsewhere".into());
    shaped.key = Some("own key".into());
    shaped.headers.push(("tenant".into(), "7".into()));
    let mut sink = opened(config(&kafka, json!({"partitions": 2}))).await;
    delivers(&mut *sink, &Batch { changes: vec![routed], position: None }).await;
    let records = kafka.records(Isolation::Committed).await;
    assert_eq!(records.len(), 1);
    assert_eq!(
        (records[0].topic.as_str(), records[0].key.as_deref()),
        ("elsewhere", Some("own key"))
    );
    assert_eq!(records[0].header("tenant"), Some("7"));

    for compression in ["none", "gzip", "snappy", "lz4", "zstd"] {
        for transactional in [true, false] {
            let more = json!({
                "compression": compression, "transactional": transactional, "format": "sequin",
                "topic": format!("c.{compression}.{transactional}"),
                "progress_topic": format!("walrace.progress.{compression}"),
            });
            let mut sink = opened(config(&kafka, more)).await;
            let mut mixed = batch(0..300);
            mixed.changes.insert(1, truncate(1));
            delivers(&mut *sink, &mixed).await;
            sink.close().await.unwrap();
        }
    }
    let records = kafka.records(Isolation::Committed).await;
    for compression in ["none", "gzip", "snappy", "lz4", "zstd"] {
        for transactional in [true, false] {
            let topic = format!("c.{compression}.{transactional}");
            let own: Vec<Record> = records.iter().filter(|r| r.topic == topic).cloned().collect();
            assert_eq!(offsets(&own), once(0..300), "{topic}");
        }
    }

    let more = json!({"create_topics": false, "topic": "nobody.made.it"});
    let mut sink = opened(config(&kafka, more)).await;
    let error = fails(&mut *sink, &batch(1..2)).await;
    assert_eq!(error.class(), Class::Config, "{error}");
    assert!(error.to_string().contains("has no topic nobody.made.it"), "{error}");
    assert!(error.remedy_text().unwrap().contains("kafka-topics --create"), "{error}");
    // A refused name leaves the sink open: the second one is refused by the broker, because
    // `elsewhere.a` and `elsewhere_a` would be one to its metrics.
    kafka.create_topic("elsewhere.a", 1, &[]).await;
    for name in ["no good", "elsewhere_a"] {
        let mut sink = opened(config(&kafka, json!({"topic": name}))).await;
        for _ in 0..2 {
            let error = fails(&mut *sink, &batch(1..2)).await;
            assert_eq!(error.class(), Class::Data, "{error}");
        }
    }
}

fn large(offset: u64, bytes: usize) -> Change {
    let mut change = batch(offset..offset + 1).changes.remove(0);
    let (id, text) = (offset.to_string(), "x".repeat(bytes));
    let row = [Value::Text(id.as_bytes()), Value::Text(text.as_bytes())];
    change.after = Some(Row::from_values(row));
    change
}

#[tokio::test]
async fn a_message_that_is_too_large_is_refused_and_what_was_aborted_is_not_committed() {
    let kafka = Kafka::start().await;
    kafka.create_topic("public.t", 1, &[("max.message.bytes", "20000")]).await;
    for transactional in [true, false] {
        let more = json!({"transactional": transactional, "message_bytes_max": 30_000});
        let mut sink = opened(config(&kafka, more)).await;
        let mut mixed = batch(0..3);
        mixed.changes[1] = large(1, 40_000);
        let error = fails(&mut *sink, &mixed).await;
        assert_eq!(error.class(), Class::Data);
        assert!(error.to_string().contains("larger than `message_bytes_max` = 30000"), "{error}");
        assert_eq!(kafka.records(Isolation::Uncommitted).await, [], "nothing was sent");
        sink.close().await.unwrap();
    }

    // The broker's own limit: known only once it has answered.
    for transactional in [true, false] {
        let topic = format!("limited.{transactional}");
        kafka.create_topic(&topic, 1, &[("max.message.bytes", "20000")]).await;
        let more = json!({
            "message_bytes_max": 30_000, "compression": "none", "transactional": transactional,
            "topic": topic,
        });
        let mut sink = opened(config(&kafka, more)).await;
        let mut mixed = batch(0..2);
        mixed.changes.push(large(2, 25_000));
        mixed.changes.insert(0, large(0, 15_000)); // a record batch of its own
        let error = fails(&mut *sink, &mixed).await;
        assert_eq!(error.class(), Class::Data, "{error}");
        let alone = Batch { changes: vec![large(2, 25_000)], position: None };
        let error = fails(&mut *sink, &alone).await;
        assert_eq!(error.class(), Class::Data, "{error}");
        delivers(&mut *sink, &batch(0..2)).await;
        delivers(&mut *sink, &batch(3..5)).await;
        let of = async |isolation| {
            let records = kafka.records(isolation).await;
            let own: Vec<_> = records.into_iter().filter(|r| r.topic == topic).collect();
            offsets_of(&own)
        };
        let committed = of(Isolation::Committed).await;
        assert!(committed.len() == 4 || !transactional, "{committed:?}");
        assert!(committed.ends_with(&[0, 1, 3, 4]), "{committed:?}");
        if transactional {
            assert!(of(Isolation::Uncommitted).await.len() > 4, "the refused batch was begun");
            assert_eq!(sink.peek().await.unwrap(), Some(progress(5)));
        }
    }
}

#[tokio::test]
async fn aborted_and_abandoned_transactions_are_for_uncommitted_readers_only() {
    let kafka = Kafka::start().await;
    let mut sink = opened(config(&kafka, json!({}))).await;
    delivers(&mut *sink, &batch(0..10)).await;
    // Writes that are given up at every moment, as at a stop: what is read back decides.
    let mut cursor = 10;
    let mut given_up = 0;
    for round in 0..40 {
        let limit = Duration::from_millis(4 * round);
        let changes = batch(cursor..cursor + 50);
        let written = tokio::time::timeout(limit, write(&mut *sink, &changes)).await;
        given_up += u64::from(written.is_err());
        match written {
            Ok(written) => {
                written.unwrap();
                cursor += 50;
            }
            Err(_) => {
                let held = sink.open().await.unwrap().unwrap().cursor;
                assert!(held == cursor || held == cursor + 50, "{held} after {cursor}");
                cursor = held;
            }
        }
    }
    println!("{given_up} of 40 writes were given up");
    assert!((3..40).contains(&given_up), "{given_up}");
    let committed = kafka.records(Isolation::Committed).await;
    assert_eq!(offsets(&committed), once(0..cursor));
    let uncommitted = kafka.records(Isolation::Uncommitted).await;
    assert!(uncommitted.len() >= committed.len());
}

#[tokio::test]
async fn a_second_writer_shuts_out_the_first() {
    let kafka = Kafka::start().await;
    let mut first = opened(config(&kafka, json!({}))).await;
    delivers(&mut *first, &batch(0..10)).await;
    let mut second = open(config(&kafka, json!({}))).unwrap();
    assert_eq!(second.open().await.unwrap(), Some(progress(10)));
    let error = fails(&mut *first, &batch(10..20)).await;
    assert_eq!(error.class(), Class::Retry, "{error}");
    assert!(error.to_string().contains("another walrace writes as `walrace-"), "{error}");
    assert_eq!(fails(&mut *first, &batch(10..20)).await.class(), Class::Retry);
    delivers(&mut *second, &batch(10..20)).await;
    assert_eq!(offsets(&kafka.records(Isolation::Committed).await), once(0..20));

    // Only a newer epoch goes back.
    let error = second.write(&batch(5..6), &progress(6)).await.unwrap_err();
    assert_eq!(error.class(), Class::Retry, "{error}");
    second.open().await.unwrap();
    let rewound = Progress { epoch: 2, ..progress(6) };
    second.write(&batch(5..6), &rewound).await.unwrap();
    assert_eq!(second.peek().await.unwrap(), Some(rewound));
    let foreign = Progress { lineage: Uuid::from_u128(8), ..rewound };
    let error = second.write(&batch(6..7), &foreign).await.unwrap_err();
    assert_eq!(error.class(), Class::Config, "{error}");
}

/// Delivers as the loop does: after an error the sink is opened, and tells what it has.
async fn deliver(sink: &mut dyn Sink, mut cursor: u64, end: u64, mut tick: impl AsyncFnMut(u64)) {
    let begin = Instant::now();
    while cursor < end {
        assert!(begin.elapsed() < Duration::from_secs(120), "stuck at {cursor}");
        tick(cursor).await;
        match write(sink, &batch(cursor..cursor + 100)).await {
            Ok(_) => cursor += 100,
            Err(error) => {
                assert_eq!(error.class(), Class::Retry, "{error}");
                loop {
                    match sink.open().await {
                        Ok(held) => break cursor = held.unwrap().cursor,
                        Err(error) => assert_eq!(error.class(), Class::Retry, "{error}"),
                    }
                    assert!(begin.elapsed() < Duration::from_secs(120), "stuck at {cursor}");
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_is_killed_while_it_is_written_to_ends_up_with_each_change_once() {
    let mut kafka = Kafka::start().await;
    let config = config(&kafka, json!({"timeout_ms": 5_000}));
    let mut sink = opened(config.clone()).await;
    let (sender, mut told) = tokio::sync::watch::channel(0);
    let writer = async {
        deliver(&mut *sink, 0, 20_000, async |cursor| {
            sender.send_replace(cursor);
        })
        .await;
    };
    let killer = async {
        for at in [500, 8_000] {
            told.wait_for(|cursor| *cursor >= at).await.unwrap();
            kafka.down();
            kafka.up().await;
        }
    };
    tokio::join!(writer, killer);
    assert_eq!(offsets(&kafka.records(Isolation::Committed).await), once(0..20_000));

    // Down: an outage, and the same sink goes on.
    kafka.down();
    assert_eq!(fails(&mut *sink, &batch(20_000..20_001)).await.class(), Class::Retry);
    let error = sink.open().await.unwrap_err();
    assert_eq!(error.class(), Class::Retry);
    assert!(error.to_string().contains(&kafka.brokers()), "{error}");
    kafka.up().await;
    assert_eq!(sink.open().await.unwrap(), Some(progress(20_000)));
    delivers(&mut *sink, &batch(20_000..20_001)).await;
}

#[tokio::test]
async fn forced_retries_of_the_producer_add_no_duplicates() {
    let kafka = Kafka::start().await;
    for transactional in [false, true] {
        let topic = format!("retried.{transactional}");
        let more = json!({
            "brokers": kafka.proxied_brokers(), "transactional": transactional, "topic": topic,
        });
        let mut sink = opened(config(&kafka, more)).await;
        let mut cursor = 0;
        let mut reopened = 0;
        for round in 0..40 {
            // The broker takes what it was sent, and its reply is lost.
            if round % 2 == 1 {
                kafka.proxy().cut_after_bytes(10 + round);
            }
            match write(&mut *sink, &batch(cursor..cursor + 200)).await {
                Ok(_) => cursor += 200,
                Err(error) => {
                    assert!(transactional, "{error}");
                    assert_eq!(error.class(), Class::Retry, "{error}");
                    cursor = sink.open().await.unwrap().unwrap().cursor;
                    reopened += 1;
                }
            }
        }
        println!("transactional = {transactional}: opened again {reopened} times");
        let records = kafka.records(Isolation::Committed).await;
        let own: Vec<_> = records.into_iter().filter(|record| record.topic == topic).collect();
        assert_eq!(offsets(&own), once(0..cursor));
        assert!(cursor >= 4_000, "{cursor}");
    }

    // A peer that hangs is an outage.
    let more = json!({
        "brokers": kafka.proxied_brokers(), "timeout_ms": 2_000, "progress_topic": "walrace.progress.hung",
    });
    let mut sink = opened(config(&kafka, more)).await;
    kafka.proxy().stall(true);
    let begin = Instant::now();
    let error = fails(&mut *sink, &batch(0..10)).await;
    assert_eq!(error.class(), Class::Retry, "{error}");
    let error = sink.open().await.unwrap_err();
    assert_eq!(error.class(), Class::Retry, "{error}");
    assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
    kafka.proxy().stall(false);
    kafka.proxy().cut();
    wait_for(Duration::from_secs(20), async || sink.open().await.ok(), || "open".into()).await;
    delivers(&mut *sink, &batch(0..10)).await;
}

#[tokio::test]
async fn a_refused_login_is_for_a_person_and_every_mechanism_works() {
    let kafka = Kafka::start().await;
    for mechanism in ["plain", "scram_sha_256", "scram_sha_512"] {
        let mut sink = opened(login(&kafka, json!({"sasl_mechanism": mechanism}))).await;
        delivers(&mut *sink, &Batch::default()).await;
        sink.close().await.unwrap();
        for transactional in [true, false] {
            let wrong = json!({
                "sasl_mechanism": mechanism, "password": "hunter2", "transactional": transactional,
            });
            let mut sink = open(login(&kafka, wrong)).unwrap();
            let begin = Instant::now();
            let error = sink.open().await.unwrap_err();
            assert_eq!(error.class(), Class::Config, "{error}");
            assert!(error.to_string().contains("refuses the login"), "{error}");
            assert!(!format!("{error} {error:?}").contains("hunter2"), "{error:?}");
            assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
        }
    }
    let guest = json!({"sasl_mechanism": "plain", "username": "guest"});
    let error = open(login(&kafka, guest.clone())).unwrap().open().await.unwrap_err();
    assert_eq!(error.class(), Class::Config, "{error}");
    let mut sink = opened(login(&kafka, with(guest, &json!({"transactional": false})))).await;
    let error = fails(&mut *sink, &batch(0..1)).await;
    assert_eq!(error.class(), Class::Config, "{error}");
    assert!(error.to_string().contains("public.t"), "{error}");

    let tls = json!({"brokers": kafka.tls_brokers(), "tls": true, "tls_ca": kafka.certificate()});
    let mut sink = opened(config(&kafka, tls)).await;
    delivers(&mut *sink, &batch(26..30)).await;
    let unknown = json!({"brokers": kafka.tls_brokers(), "tls": true});
    let error = open(config(&kafka, unknown)).unwrap().open().await.unwrap_err();
    assert_eq!(error.class(), Class::Config, "{error}");
}

#[tokio::test]
async fn a_changed_count_of_partitions_stops_the_sink_unless_allowed() {
    let kafka = Kafka::start().await;
    let mut sink = opened(config(&kafka, json!({}))).await;
    delivers(&mut *sink, &batch(0..10)).await;
    kafka.grow_topic("public.t", 5).await;
    // What is written until it is noticed lies where it would have lain before.
    delivers(&mut *sink, &batch(10..200)).await;
    assert!(kafka.records(Isolation::Committed).await.iter().all(|record| record.partition < 3));
    for sink in [&mut sink, &mut open(config(&kafka, json!({}))).unwrap()] {
        let error = sink.open().await.unwrap_err();
        assert_eq!(error.class(), Class::Config, "{error}");
        assert!(error.to_string().contains("public.t had 3 partitions and has 5"), "{error}");
    }
    let mut sink = opened(config(&kafka, json!({"allow_partition_change": true}))).await;
    delivers(&mut *sink, &batch(200..300)).await;
    let mut sink = open(config(&kafka, json!({}))).unwrap();
    assert_eq!(sink.open().await.unwrap(), Some(progress(300)), "the new count is known now");
    assert!(kafka.records(Isolation::Committed).await.iter().any(|record| record.partition > 2));
}

#[tokio::test]
async fn a_wrong_setting_is_refused_before_anything_is_sent() {
    for wrong in [
        json!({"topic": "a{tabel}"}),
        json!({"brokers": []}),
        json!({"brokers": "a:1,,b:1"}),
        json!({"sasl_mechanism": "plain", "username": "u"}),
        json!({"password": "hunter2"}),
        json!({"tls_ca": "/nowhere.pem"}),
        json!({"tls": true, "tls_ca": "/nowhere.pem"}),
        json!({"properties": {"acks": "1"}}),
        json!({"properties": {"no.such.thing": "hunter2"}}),
        json!({"properties": {"linger.ms": "hunter2"}}),
    ] {
        let config = json!({"kind": "kafka", "brokers": ["127.0.0.1:1"]});
        let error = open(with(config, &wrong)).expect_err("a refusal");
        assert_eq!(error.class(), Class::Config, "{wrong}: {error}");
        assert!(!format!("{error} {error:?}").contains("hunter2"), "{error:?}");
    }
    let config =
        json!({"kind": "kafka", "brokers": "127.0.0.1:1", "properties": {"linger.ms": "7"}});
    let begin = Instant::now();
    let error = open(config).unwrap().open().await.unwrap_err();
    assert_eq!(error.class(), Class::Retry);
    assert!(error.to_string().contains("127.0.0.1:1"), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
}

#[tokio::test]
async fn a_walrace_that_dies_in_any_step_of_a_commit_delivers_each_change_once() {
    let cluster = Cluster::start().await;
    cluster.sql("create table orders (id int primary key, v text)").await;
    let kafka = Kafka::start().await;
    let sink = format!("[sink.lake]\nkind = \"kafka\"\nbrokers = \"{}\"\n", kafka.brokers());
    let mut server = Server::new(&format!("{}\n{sink}", source_toml("app", &cluster.unix_url())));
    server.start_ready().await;
    let mut rows = 0;
    let mut insert = async || {
        cluster.sql(&format!("insert into orders values ({rows}, 'v{rows}')")).await;
        rows += 1;
        rows
    };
    insert().await;
    for point in ["kafka::after_produce", "kafka::before_commit", "kafka::after_commit"] {
        server.kill();
        server.start_to_die_at(&format!("{point}:2"));
        // The first write may have both rows of a restart: one more for the second.
        while server.is_running() {
            insert().await;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        server.wait_exit(Duration::from_secs(30)).await;
        server.start_ready().await;
    }
    let rows = insert().await;
    let arrived = async || {
        let records = kafka.records(Isolation::Committed).await;
        (records.len() >= rows).then_some(records)
    };
    let records = wait_for(Duration::from_secs(30), arrived, || "rows are missing".into()).await;
    let mut ids: Vec<_> = records.iter().map(|r| r.json()["after"]["id"].clone()).collect();
    ids.sort_by_key(Json::as_u64);
    assert_eq!(ids, (0..rows).map(|id| json!(id)).collect::<Vec<_>>());
    assert!(records.iter().all(|record| record.topic == "app.public.orders"));

    // What the documentation tells people to look with.
    let (brokers, count) = (kafka.brokers(), rows.to_string());
    let arguments = [
        "--bootstrap-server",
        &brokers,
        "--topic",
        "app.public.orders",
        "--from-beginning",
        "--isolation-level",
        "read_committed",
        "--max-messages",
        &count,
        "--timeout-ms",
        "20000",
    ];
    let output = kafka.tool("org.apache.kafka.tools.consumer.ConsoleConsumer", &arguments).await;
    let printed = String::from_utf8(output.stdout).unwrap();
    let mut printed: Vec<&str> = printed.lines().collect();
    let values: Vec<String> = records
        .iter()
        .map(|record| String::from_utf8(record.value.clone().unwrap()).unwrap())
        .collect();
    let mut values: Vec<&str> = values.iter().map(String::as_str).collect();
    printed.sort_unstable();
    values.sort_unstable();
    assert_eq!(printed, values);
}
