use std::time::{Duration, Instant};

use async_trait::async_trait;
use lapin::types::AMQPValue;
use serde_json::{Value as Json, json};
use walrace::{
    change::{Batch, Change, Row, Value},
    error::Class,
    sink::{Sink, Written},
};

use super::{
    batch, conformance::conforms, delivers, fails, letters, offsets, open, target::Target,
    too_large, truncate, write,
};
use crate::kit::RabbitMq;

/// A RabbitMQ with one queue for everything that the exchange `changes` gets.
pub(crate) struct RabbitMqTarget {
    server: RabbitMq,
}

impl RabbitMqTarget {
    pub(crate) async fn start() -> Self {
        let server = RabbitMq::start().await;
        server.bind("changes", "all", "#").await;
        Self { server }
    }
}

#[async_trait]
impl Target for RabbitMqTarget {
    fn config(&self) -> Json {
        config(&self.server.url(), json!({}))
    }

    fn wrong_login(&self) -> Option<Json> {
        Some(config(&self.server.url_of("walrace:wrong"), json!({})))
    }

    fn failpoints(&self) -> &'static [&'static str] {
        &["rabbitmq::after_publish:2", "rabbitmq::after_confirms:3"]
    }

    async fn stop(&mut self) {
        self.server.kill();
    }

    async fn start(&mut self) {
        self.server.up().await;
    }

    async fn content(&mut self) -> Vec<Json> {
        messages(&self.server, "all").await
    }

    fn refused(&self, change: Change) -> Option<Change> {
        Some(too_large(change))
    }
}

#[expect(clippy::needless_pass_by_value, reason = "every caller makes it in place")]
fn config(url: &str, more: Json) -> Json {
    let mut config = json!({
        "kind": "rabbitmq",
        "url": url,
        "exchange": "changes",
        "routing_key": "app.{schema}.{table}.{op}",
        "timeout_ms": 20_000,
    });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    config
}

async fn sink(server: &RabbitMq, more: Json) -> Box<dyn Sink> {
    let mut sink = open(config(&server.url(), more)).unwrap();
    sink.open().await.unwrap();
    sink
}

async fn messages(server: &RabbitMq, queue: &str) -> Vec<Json> {
    let stored = server.stored(queue).await;
    stored.iter().map(|message| serde_json::from_slice(&message.data).unwrap()).collect()
}

#[tokio::test]
async fn every_change_arrives_in_order_with_its_id_and_what_is_refused_stands_alone() {
    let RabbitMqTarget { server } = RabbitMqTarget::start().await;
    let mut sink = sink(&server, json!({})).await;
    let mut first = batch(0..2_000);
    first.changes[7].shaped_mut().headers = vec![("tenant".into(), "blue".into())];
    first.changes[8].shaped_mut().route = Some("elsewhere".into());
    delivers(&mut *sink, &first).await;
    delivers(&mut *sink, &Batch::default()).await;
    delivers(&mut *sink, &Batch { changes: vec![truncate(2_000)], position: None }).await;
    let stored = server.stored("all").await;
    let all = messages(&server, "all").await;
    assert_eq!(offsets(&all), (0..2_001).collect::<Vec<_>>());
    assert_eq!(stored[0].routing_key.as_str(), "app.public.t.insert");
    assert_eq!(stored[8].routing_key.as_str(), "elsewhere");
    assert_eq!(stored[2_000].routing_key.as_str(), "app.public.t.truncate");
    for (message, stored) in all.iter().zip(&stored) {
        let properties = &stored.properties;
        assert_eq!(properties.message_id().as_ref().unwrap().as_str(), message["idempotency_key"]);
        assert_eq!(properties.content_type().as_ref().unwrap().as_str(), "application/json");
        assert_eq!(properties.delivery_mode(), &Some(2));
        assert_eq!(properties.timestamp(), &Some(1_775_466_862));
        let headers = properties.headers().as_ref().unwrap().inner();
        let offset = &headers["walrace-offset"];
        assert_eq!(offset, &AMQPValue::LongLongInt(message["offset"].as_i64().unwrap()));
    }
    let headers = stored[7].properties.headers().as_ref().unwrap().inner();
    assert_eq!(headers["tenant"], AMQPValue::LongString("blue".into()));

    refusals_stand_alone(&server, &mut *sink).await;
    unroutable_messages_stop_the_sink(&server).await;
    wrong_settings_need_a_person(&server).await;
    a_full_queue_is_an_outage(&server).await;
    a_server_that_hangs_is_an_outage(&server).await;
}

async fn refusals_stand_alone(server: &RabbitMq, sink: &mut dyn Sink) {
    server.purge("all").await;
    let mut mixed = batch(0..9);
    mixed.changes[3] = too_large(mixed.changes[3].clone());
    // The server's limit is found out, and then known.
    let written = write(sink, &mixed).await.unwrap();
    assert_eq!(letters(&written), "dddruuuuu");
    let rest = Batch { changes: mixed.changes.split_off(3), position: None };
    let written = write(sink, &rest).await.unwrap();
    assert_eq!(letters(&written), "ruuuuu");
    delivers(sink, &batch(4..9)).await;
    let mut long = batch(9..12);
    long.changes[1].shaped_mut().route = Some("x".repeat(256));
    let written = write(sink, &long).await.unwrap();
    assert_eq!(letters(&written), "dru");
    let mut arrived = offsets(&messages(server, "all").await);
    arrived.dedup();
    arrived.sort_unstable();
    arrived.dedup();
    assert_eq!(arrived, [0, 1, 2, 4, 5, 6, 7, 8, 9]);
}

async fn unroutable_messages_stop_the_sink(server: &RabbitMq) {
    server.bind("narrow", "updates", "*.update").await;
    let more = |unroutable: &str| json!({"exchange": "narrow", "routing_key": "{table}.{op}", "unroutable": unroutable});
    let mut stops = sink(server, more("stop")).await;
    let error = fails(&mut *stops, &batch(0..3)).await;
    assert_eq!(error.class(), Class::Config, "{error}");
    assert!(error.to_string().contains("bound to narrow for the routing key t.insert"), "{error}");
    let remedy = error.remedy_text().unwrap();
    assert!(remedy.contains("rabbitmqadmin declare binding source=narrow"), "{remedy}");
    // Of one key: what is bound must not overtake what is not.
    let mut mixed = batch(0..4);
    for (index, change) in mixed.changes.iter_mut().enumerate() {
        let op = if index == 2 { "t.insert" } else { "t.update" };
        change.shaped_mut().route = Some(op.into());
        change.after = Some(Row::from_values([Value::Text(b"1"), Value::Text(b"v")]));
    }
    stops.open().await.unwrap();
    let written = write(&mut *stops, &mixed).await.unwrap();
    assert_eq!(letters(&written), "dduu");
    assert_eq!(offsets(&messages(server, "updates").await), [0, 1]);
    // Of many keys: each outcome belongs to its own message.
    server.purge("updates").await;
    let mut many = batch(0..500);
    for change in &mut many.changes {
        let op = if change.offset == 400 { "t.insert" } else { "t.update" };
        change.shaped_mut().route = Some(op.into());
    }
    let written = write(&mut *stops, &many).await.unwrap();
    let expected = format!("{}{}", "d".repeat(400), "u".repeat(100));
    assert_eq!(letters(&written), expected);

    let mut drops = sink(server, more("drop")).await;
    delivers(&mut *drops, &batch(0..3)).await;
    let mut plain = sink(server, json!({"exchange": "", "routing_key": "nobody"})).await;
    let error = fails(&mut *plain, &batch(0..1)).await;
    assert_eq!(error.class(), Class::Config, "{error}");
    assert!(error.to_string().contains("has no queue nobody"), "{error}");
}

async fn wrong_settings_need_a_person(server: &RabbitMq) {
    for login in ["walrace:wrong", "nobody:s3cret"] {
        let mut wrong = open(config(&server.url_of(login), json!({}))).unwrap();
        let error = wrong.open().await.unwrap_err();
        assert_eq!(error.class(), Class::Config, "{error}");
        assert!(error.to_string().contains("refuses the login"), "{error}");
        assert!(!format!("{error} {error:?}").contains("s3cret"), "{error:?}");
    }
    let url = format!("{}/elsewhere", server.url());
    let error = open(config(&url, json!({}))).unwrap().open().await.unwrap_err();
    assert_eq!(error.class(), Class::Config, "{error}");
    assert!(error.to_string().contains("virtual host elsewhere"), "{error}");

    let missing = json!({"exchange": "missing", "declare": false});
    let error = open(config(&server.url(), missing)).unwrap().open().await.unwrap_err();
    assert_eq!(error.class(), Class::Config, "{error}");
    assert!(error.remedy_text().unwrap().contains("declare exchange name=missing"), "{error}");
    let other = json!({"exchange_type": "fanout"});
    let error = open(config(&server.url(), other)).unwrap().open().await.unwrap_err();
    assert_eq!(error.class(), Class::Config, "{error}");
    assert!(error.to_string().contains("exchange_type"), "{error}");
    // Declared by the sink itself; nobody is bound to it yet.
    let mut fresh = sink(server, json!({"exchange": "fresh"})).await;
    assert_eq!(fails(&mut *fresh, &batch(0..1)).await.class(), Class::Config);
}

async fn a_full_queue_is_an_outage(server: &RabbitMq) {
    let reject = AMQPValue::LongString("reject-publish".into());
    let limits = [("x-max-length", AMQPValue::LongInt(1)), ("x-overflow", reject)];
    server.queue("small", &limits).await;
    let mut full = sink(server, json!({"exchange": "", "routing_key": "small"})).await;
    delivers(&mut *full, &batch(0..1)).await;
    let mut last = None;
    // The limit may be passed by a message or two.
    for offset in 1..5 {
        last = write(&mut *full, &batch(offset..offset + 1)).await.err().or(last);
    }
    let error = last.expect("a full queue");
    assert_eq!(error.class(), Class::Retry, "{error}");
    server.purge("small").await;
    full.open().await.unwrap();
    delivers(&mut *full, &batch(5..6)).await;
}

async fn a_server_that_hangs_is_an_outage(server: &RabbitMq) {
    let mut hung = sink(server, json!({"timeout_ms": 1_500})).await;
    server.pause();
    let begin = Instant::now();
    assert_eq!(fails(&mut *hung, &batch(0..3)).await.class(), Class::Retry);
    for _ in 0..3 {
        assert_eq!(hung.open().await.unwrap_err().class(), Class::Retry);
    }
    assert!(begin.elapsed() < Duration::from_secs(10));
    server.resume();
    let begin = Instant::now();
    while let Err(error) = hung.open().await {
        assert_eq!(error.class(), Class::Retry, "{error}");
        assert!(begin.elapsed() < Duration::from_secs(30), "{error}");
    }
    delivers(&mut *hung, &batch(0..3)).await;
}

#[tokio::test]
async fn a_rabbitmq_that_is_killed_loses_nothing_and_the_sink_goes_on() {
    let RabbitMqTarget { mut server } = RabbitMqTarget::start().await;
    let mut sink = sink(&server, json!({"timeout_ms": 5_000})).await;
    delivers(&mut *sink, &batch(0..100)).await;
    let load = batch(100..4_000);
    let sent = write(&mut *sink, &load);
    let killed = async {
        tokio::time::sleep(Duration::from_millis(30)).await;
        server.kill();
    };
    let (written, ()) = tokio::join!(sent, killed);
    let done = match &written {
        Ok(Written::All) => 4_000,
        Ok(_) => 100 + letters(written.as_ref().unwrap()).matches('d').count() as u64,
        Err(error) => {
            assert_eq!(error.class(), Class::Retry, "{error}");
            100
        }
    };
    let error = sink.open().await.unwrap_err();
    assert_eq!(error.class(), Class::Retry);
    assert!(error.to_string().starts_with("cannot reach 127.0.0.1:"), "{error}");
    server.up().await;
    sink.open().await.unwrap();
    delivers(&mut *sink, &batch(done..4_000)).await;
    let mut seen = 0;
    for offset in offsets(&messages(&server, "all").await) {
        assert!(offset <= seen, "{offset} came before {seen}");
        seen = seen.max(offset + 1);
    }
    assert_eq!(seen, 4_000);
}

#[tokio::test]
async fn a_server_under_an_alarm_is_an_outage() {
    let server = RabbitMq::with("disk_free_limit.absolute = 900000GB\n").await;
    server.bind("changes", "all", "#").await;
    let mut sink = sink(&server, json!({"timeout_ms": 1_500})).await;
    let error = fails(&mut *sink, &batch(0..2_000)).await;
    assert_eq!(error.class(), Class::Retry, "{error}");
    let error = sink.open().await.unwrap_err();
    assert_eq!(error.class(), Class::Retry, "{error}");
    assert!(error.to_string().contains("an alarm is raised"), "{error}");
}

#[test]
fn a_wrong_rabbitmq_setting_is_refused_before_anything_is_sent() {
    for wrong in [
        json!({"url": "http://walrace:hunter2@localhost"}),
        json!({"url": "hunter2"}),
        json!({"routing_key": "{tabel}"}),
        json!({"exchange": "x".repeat(256)}),
    ] {
        let error = open(config("amqp://localhost", wrong)).expect_err("a refusal");
        assert_eq!(error.class(), Class::Config, "{error}");
        assert!(!format!("{error:?}").contains("hunter2"), "{error}");
    }
}

#[tokio::test]
async fn the_rabbitmq_sink_conforms() {
    conforms(&mut RabbitMqTarget::start().await).await;
}
