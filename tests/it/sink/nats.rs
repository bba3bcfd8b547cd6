use std::time::{Duration, Instant};

use async_nats::jetstream::stream;
use async_trait::async_trait;
use futures_util::StreamExt;
use serde_json::{Value as Json, json};
use walrace::{
    change::{Batch, Change, Row, Value},
    error::Class,
    sink::Sink,
};

use super::{
    batch, conformance::conforms, delivers, fails, letters, offsets, open, target::Target,
    too_large, truncate, with_text, write,
};
use crate::kit::{Nats, Proxy};

/// A NATS server with a stream for everything below `app`.
pub(crate) struct NatsTarget {
    server: Nats,
}

impl NatsTarget {
    pub(crate) async fn start() -> Self {
        let server = Nats::start().await;
        server.stream("CHANGES", &["app.>"]).await;
        Self { server }
    }
}

#[async_trait]
impl Target for NatsTarget {
    fn config(&self) -> Json {
        config(&self.server.url(), json!({}))
    }

    fn wrong_login(&self) -> Option<Json> {
        Some(config(&self.server.url_of("walrace:wrong"), json!({})))
    }

    fn failpoints(&self) -> &'static [&'static str] {
        &["nats::after_publish:2", "nats::after_acks:3"]
    }

    async fn stop(&mut self) {
        self.server.kill();
    }

    async fn start(&mut self) {
        self.server.up().await;
    }

    async fn content(&mut self) -> Vec<Json> {
        messages(&self.server).await
    }

    fn refused(&self, change: Change) -> Option<Change> {
        Some(too_large(change))
    }
}

#[expect(clippy::needless_pass_by_value, reason = "every caller makes it in place")]
fn config(url: &str, more: Json) -> Json {
    let mut config = json!({
        "kind": "nats",
        "url": url,
        "subject": "app.{schema}.{table}.{op}",
        "timeout_ms": 10_000,
    });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    config
}

async fn sink(server: &Nats, more: Json) -> Box<dyn Sink> {
    let mut sink = open(config(&server.url(), more)).unwrap();
    sink.open().await.unwrap();
    sink
}

async fn messages(server: &Nats) -> Vec<Json> {
    let stored = server.stored("CHANGES").await;
    stored.iter().map(|message| serde_json::from_slice(&message.payload).unwrap()).collect()
}

#[tokio::test]
async fn every_change_arrives_in_order_once_with_its_id() {
    let NatsTarget { server } = NatsTarget::start().await;
    let mut sink = sink(&server, json!({})).await;
    let mut first = batch(0..2_000);
    first.changes[7].shaped_mut().headers = vec![("tenant".into(), "blue".into())];
    first.changes[8].shaped_mut().route = Some("app.elsewhere".into());
    delivers(&mut *sink, &first).await;
    delivers(&mut *sink, &Batch::default()).await;
    delivers(&mut *sink, &Batch { changes: vec![truncate(2_000)], position: None }).await;

    let stored = server.stored("CHANGES").await;
    let all = messages(&server).await;
    assert_eq!(offsets(&all), (0..2_001).collect::<Vec<_>>());
    assert_eq!(stored[0].subject, "app.public.t.insert");
    assert_eq!(stored[8].subject, "app.elsewhere");
    assert_eq!(stored[2_000].subject, "app.public.t.truncate");
    let header = |at: usize, name: &str| stored[at].headers.get(name).map(ToString::to_string);
    assert_eq!(header(7, "tenant").unwrap(), "blue");
    for (message, stored) in all.iter().zip(&stored) {
        let id = stored.headers.get("Nats-Msg-Id").unwrap().as_str();
        assert_eq!(id, message["idempotency_key"]);
        let offset = stored.headers.get("walrace-offset").unwrap().as_str();
        assert_eq!(offset, message["offset"].to_string());
    }
    assert_eq!(all[3]["after"], json!({"id": 3, "v": "ü \"quoted\""}));

    // A redelivery, by this sink and by one that knows nothing, is told by the ids.
    delivers(&mut *sink, &batch(1_500..2_000)).await;
    delivers(&mut *self::sink(&server, json!({})).await, &batch(0..10)).await;
    assert_eq!(server.stored("CHANGES").await.len(), 2_001);
}

#[tokio::test]
async fn changes_of_one_key_keep_their_order() {
    let NatsTarget { server } = NatsTarget::start().await;
    let mut sink = sink(&server, json!({})).await;
    let mut same = batch(0..300);
    for change in &mut same.changes {
        let key = (change.offset % 7).to_string();
        change.after =
            Some(Row::from_values([Value::Text(key.as_bytes()), Value::Text(b"some text")]));
    }
    delivers(&mut *sink, &same).await;
    assert_eq!(offsets(&messages(&server).await), (0..300).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_server_that_is_killed_loses_nothing_and_the_sink_goes_on() {
    let NatsTarget { mut server } = NatsTarget::start().await;
    let mut sink = sink(&server, json!({"timeout_ms": 3_000})).await;
    let mut done = 0;
    for round in 0..3_u64 {
        let sent = async { write(&mut *sink, &batch(done..done + 3_000)).await };
        let killed = async {
            tokio::time::sleep(Duration::from_millis(10 * (round + 1))).await;
            server.kill();
        };
        let (written, ()) = tokio::join!(sent, killed);
        if let Ok(walrace::sink::Written::All) = written {
            done += 3_000;
        } else if let Err(error) = &written {
            assert_eq!(error.class(), Class::Retry, "{error}");
        }
        assert_eq!(sink.open().await.unwrap_err().class(), Class::Retry);
        server.up().await;
        sink.open().await.unwrap();
    }
    delivers(&mut *sink, &batch(done..9_000)).await;
    let offsets = offsets(&messages(&server).await);
    assert_eq!(offsets, (0..9_000).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_connection_that_breaks_within_a_batch_reorders_nothing() {
    let NatsTarget { server } = NatsTarget::start().await;
    let proxy = Proxy::to(server.port()).await;
    let url = format!("nats://walrace:s3cret@127.0.0.1:{}", proxy.port());
    let mut sink = open(config(&url, json!({"timeout_ms": 3_000}))).unwrap();
    for round in 0..10_u64 {
        let begin = round * 1_000;
        sink.open().await.unwrap();
        let thousand = batch(begin..begin + 1_000);
        let sent = write(&mut *sink, &thousand);
        let cut = async {
            tokio::time::sleep(Duration::from_millis(round * 3)).await;
            proxy.cut();
        };
        let _ = tokio::join!(sent, cut);
        sink.open().await.unwrap();
        delivers(&mut *sink, &batch(begin..begin + 1_000)).await;
    }
    let offsets = offsets(&messages(&server).await);
    assert_eq!(offsets, (0..10_000).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_server_that_hangs_or_is_down_is_an_outage() {
    let NatsTarget { mut server } = NatsTarget::start().await;
    let mut sink = sink(&server, json!({"timeout_ms": 500})).await;
    server.pause();
    let begin = Instant::now();
    let error = fails(&mut *sink, &batch(0..10)).await;
    assert_eq!(error.class(), Class::Retry, "{error}");
    assert_eq!(sink.open().await.unwrap_err().class(), Class::Retry);
    assert!(begin.elapsed() < Duration::from_secs(5));
    server.resume();
    sink.open().await.unwrap();
    delivers(&mut *sink, &batch(0..10)).await;
    server.kill();
    // Well before the limit: the end of a connection is heard of at once.
    let error = fails(&mut *sink, &batch(10..20)).await;
    assert_eq!(error.class(), Class::Retry, "{error}");
    let error = sink.open().await.unwrap_err();
    assert!(error.to_string().starts_with("cannot reach 127.0.0.1:"), "{error}");
    assert!(!format!("{error} {error:?}").contains("s3cret"), "{error:?}");
    server.up().await;
    sink.open().await.unwrap();
    delivers(&mut *sink, &batch(10..20)).await;
    assert_eq!(offsets(&messages(&server).await), (0..20).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_login_that_is_refused_or_may_not_publish_needs_a_person() {
    let NatsTarget { server } = NatsTarget::start().await;
    for login in ["walrace:wrong", "nobody:s3cret", "s3cret"] {
        let mut sink = open(config(&server.url_of(login), json!({}))).unwrap();
        let error = sink.open().await.unwrap_err();
        assert_eq!(error.class(), Class::Config, "{error}");
        assert!(error.to_string().contains("refuses the login"), "{error}");
        assert!(!format!("{error} {error:?}").contains("wrong"), "{error:?}");
    }
    let url = format!("nats://127.0.0.1:{}", server.port());
    let more = json!({"username": "walrace", "password": "s3cret"});
    let mut named = open(config(&url, more)).unwrap();
    named.open().await.unwrap();
    delivers(&mut *named, &batch(0..1)).await;

    let mut guest = open(config(&server.url_of("guest:s3cret"), json!({}))).unwrap();
    guest.open().await.unwrap();
    let begin = Instant::now();
    let error = fails(&mut *guest, &batch(0..5)).await;
    assert_eq!(error.class(), Class::Config, "{error}");
    assert!(error.to_string().contains("app.public.t.insert"), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(5), "it does not wait for an answer");
}

#[tokio::test]
async fn a_missing_stream_is_told_or_created() {
    let server = Nats::start().await;
    let mut lost = sink(&server, json!({})).await;
    let error = fails(&mut *lost, &batch(0..5)).await;
    assert_eq!(error.class(), Class::Config, "{error}");
    assert!(error.to_string().contains("app.public.t.insert"), "{error}");
    assert!(error.remedy_text().unwrap().contains("nats stream add"), "{error}");

    let mut named = open(config(&server.url(), json!({"stream": "CHANGES"}))).unwrap();
    let error = named.open().await.unwrap_err();
    assert_eq!(error.class(), Class::Config, "{error}");
    let remedy = error.remedy_text().unwrap();
    assert!(remedy.contains("nats stream add CHANGES --subjects 'app.*.*.*'"), "{remedy}");

    let more = json!({"stream": "CHANGES", "create_stream": true});
    let mut creating = sink(&server, more).await;
    delivers(&mut *creating, &batch(0..5)).await;
    named.open().await.unwrap();
    delivers(&mut *named, &batch(5..9)).await;
    assert_eq!(offsets(&messages(&server).await), (0..9).collect::<Vec<_>>());

    // What would land in another stream is refused.
    server.stream("OTHER", &["other.>"]).await;
    let more = json!({"stream": "CHANGES", "subject": "other.{table}"});
    let mut astray = sink(&server, more).await;
    let error = fails(&mut *astray, &batch(0..1)).await;
    assert_eq!(error.class(), Class::Config, "{error}");
}

#[tokio::test]
async fn a_server_without_jetstream_is_told_apart_from_a_missing_stream() {
    let server = Nats::start_core().await;
    let url = format!("nats://127.0.0.1:{}", server.port());
    let mut sink = open(config(&url, json!({"timeout_ms": 2_000}))).unwrap();
    sink.open().await.unwrap();
    let error = fails(&mut *sink, &batch(0..5)).await;
    assert_eq!(error.class(), Class::Retry, "{error}");
    assert!(error.to_string().contains("-js"), "{error}");
}

#[tokio::test]
async fn a_change_that_is_too_large_or_has_no_subject_stands_alone() {
    let NatsTarget { server } = NatsTarget::start().await;
    let mut sink = sink(&server, json!({"subject": "app.{record.v}"})).await;
    for (round, bad) in ["white space", "*", ">", "a..b", ""].into_iter().enumerate() {
        let begin = round as u64 * 10;
        let mut mixed = batch(begin..begin + 5);
        mixed.changes = mixed.changes.into_iter().map(|change| with_text(change, "fine")).collect();
        mixed.changes[2] = with_text(mixed.changes[2].clone(), bad);
        let written = write(&mut *sink, &mixed).await.unwrap();
        assert_eq!(letters(&written), "ddruu", "{bad:?}");
    }
    let mut fixed = self::sink(&server, json!({"subject": "app.fixed"})).await;
    let mut mixed = batch(100..105);
    mixed.changes[2] = too_large(mixed.changes[2].clone());
    let written = write(&mut *fixed, &mixed).await.unwrap();
    assert_eq!(letters(&written), "ddruu");
    delivers(&mut *fixed, &batch(103..105)).await;
    let stored = offsets(&messages(&server).await);
    assert_eq!(stored, [0, 1, 10, 11, 20, 21, 30, 31, 40, 41, 100, 101, 103, 104]);
}

#[tokio::test]
async fn the_limits_of_a_stream_are_told_apart() {
    let server = Nats::start().await;
    server
        .stream_with(stream::Config {
            name: "CHANGES".into(),
            subjects: vec!["app.>".into()],
            max_message_size: 2_000,
            max_messages: 6,
            discard: stream::DiscardPolicy::New,
            ..stream::Config::default()
        })
        .await;
    let medium = |change: Change| with_text(change, &"x".repeat(2_000));
    // Known beforehand where the stream is named, else from its refusal.
    for (more, begin) in [(json!({"stream": "CHANGES"}), 0), (json!({}), 10)] {
        let mut sink = sink(&server, more).await;
        let mut mixed = batch(begin..begin + 3);
        mixed.changes[1] = medium(mixed.changes[1].clone());
        let written = write(&mut *sink, &mixed).await.unwrap();
        assert_eq!(letters(&written), "dru");
    }
    // Full: a consumer or a person makes room.
    let mut sink = sink(&server, json!({})).await;
    let written = write(&mut *sink, &batch(20..30)).await.unwrap();
    assert!(letters(&written).starts_with("ddd"), "{written:?}");
    let error = fails(&mut *sink, &batch(29..30)).await;
    assert_eq!(error.class(), Class::Retry, "{error}");
    assert!(error.to_string().contains("maximum messages exceeded"), "{error}");
}

#[tokio::test]
async fn core_nats_reaches_who_listens() {
    let server = Nats::start_core().await;
    let url = format!("nats://127.0.0.1:{}", server.port());
    let mut sink = open(config(&url, json!({"jetstream": false}))).unwrap();
    sink.open().await.unwrap();
    delivers(&mut *sink, &batch(0..10)).await;
    let client = async_nats::connect(&url).await.unwrap();
    let mut listener = client.subscribe("app.>").await.unwrap();
    // The server has the subscription once it has answered what came after it.
    let nobody = client.new_inbox();
    client.request(nobody, "".into()).await.unwrap_err();
    delivers(&mut *sink, &batch(10..1_000)).await;
    for offset in 10..1_000 {
        let message = listener.next().await.unwrap();
        let value: Json = serde_json::from_slice(&message.payload).unwrap();
        assert_eq!(value["offset"], offset);
        let headers = message.headers.unwrap();
        assert_eq!(headers.get("Nats-Msg-Id").unwrap().as_str(), value["idempotency_key"]);
    }
}

#[tokio::test]
async fn tls_needs_the_authority_that_signed() {
    let server = Nats::start_tls().await;
    server.stream("CHANGES", &["app.>"]).await;
    let mut sink = sink(&server, json!({"tls_ca": server.ca()})).await;
    delivers(&mut *sink, &batch(0..3)).await;
    assert_eq!(offsets(&messages(&server).await), [0, 1, 2]);
    let mut stranger = open(config(&server.url(), json!({}))).unwrap();
    let error = stranger.open().await.unwrap_err();
    assert_eq!(error.class(), Class::Config, "{error}");
    assert!(error.remedy_text().unwrap().contains("tls_ca"), "{error}");
}

#[tokio::test]
async fn several_servers_are_tried_in_their_order() {
    let NatsTarget { server } = NatsTarget::start().await;
    let url = format!("nats://127.0.0.1:1, {}", server.url());
    let mut sink = open(config(&url, json!({}))).unwrap();
    sink.open().await.unwrap();
    delivers(&mut *sink, &batch(0..3)).await;
    assert_eq!(offsets(&messages(&server).await), [0, 1, 2]);
}

#[tokio::test]
async fn a_wrong_nats_setting_is_refused_before_anything_is_sent() {
    for wrong in [
        json!({"url": "http://walrace:hunter2@localhost"}),
        json!({"url": "hunter2"}),
        json!({"subject": "a b"}),
        json!({"subject": "{tabel}"}),
        json!({"subject": "app.>"}),
        json!({"create_stream": true}),
        json!({"stream": "S", "jetstream": false}),
        json!({"token": "hunter2", "username": "walrace", "password": "hunter2"}),
    ] {
        let error = open(config("nats://localhost", wrong)).expect_err("a refusal");
        assert_eq!(error.class(), Class::Config, "{error}");
        assert!(!format!("{error:?}").contains("hunter2"), "{error}");
    }
}

#[tokio::test]
async fn the_nats_sink_conforms() {
    conforms(&mut NatsTarget::start().await).await;
}
