//! The sinks of Redis, against a real server.

use std::time::Duration;

use serde_json::{Value as Json, json};
use uuid::Uuid;
use walrace::{
    change::{Batch, Before, Change, Op, Row, Value},
    error::Class,
    sink::{Progress, Sink},
};

use super::{batch, delivers, fails, open, truncate, write};
use crate::kit::{Redis, wait_for};

pub(super) mod pubsub;
mod stream;
mod strings;
mod target;

use target::kinds;
pub(crate) use target::{ListTarget, PubsubTarget, StreamTarget, StringTarget};

/// A sink of `kind` with further options, open.
async fn opened(redis: &Redis, kind: &str, options: Json) -> Box<dyn Sink> {
    let mut sink = open(config(redis, kind, options)).unwrap();
    sink.open().await.unwrap();
    sink
}

fn config(redis: &Redis, kind: &str, options: Json) -> Json {
    let mut config = json!({"kind": kind, "url": redis.url(), "timeout_ms": 5_000});
    let Json::Object(options) = options else { panic!("{options}") };
    config.as_object_mut().unwrap().extend(options);
    config
}

/// Its page in the documentation.
fn page(kind: &str) -> String {
    let path = format!("{}/docs/sinks/{kind}.md", env!("CARGO_MANIFEST_DIR"));
    std::fs::read_to_string(path).unwrap()
}

fn progress(epoch: u64, cursor: u64) -> Progress {
    Progress { lineage: Uuid::from_u128(7), epoch, cursor, retry_seq: 0 }
}

/// The one change of a batch with this row after it, and this one before.
fn change(op: Op, before: Before, after: Option<Row>) -> Change {
    Change { op, before, after, ..batch(0..1).changes.remove(0) }
}

fn row(id: &str, v: &str) -> Row {
    Row::from_values([Value::Text(id.as_bytes()), Value::Text(v.as_bytes())])
}

#[tokio::test]
async fn a_login_that_is_refused_stops_the_sink_and_no_password_is_shown() {
    let redis = Redis::with(false, "user reader on >s3cret ~* &* +@read +auth +client").await;
    for (kind, _) in kinds() {
        for (login, told) in [
            ("walrace:hunter2", "WRONGPASS"),
            ("nobody:hunter2", "WRONGPASS"),
            (":hunter2", "WRONGPASS"),
            ("", "NOAUTH"),
            ("reader:s3cret", "NOPERM"),
        ] {
            let url = redis.url_of(login);
            let mut sink = open(config(&redis, kind, json!({"url": url}))).unwrap();
            let error = match sink.open().await {
                Ok(_) => fails(&mut *sink, &batch(0..1)).await,
                Err(error) => error,
            };
            assert_eq!(error.class(), Class::Config, "{kind} as {login}: {error}");
            assert!(error.to_string().contains(told), "{kind} as {login}: {error}");
            assert!(error.remedy_text().is_some(), "{error}");
            for secret in ["hunter2", "s3cret"] {
                assert!(!error.to_string().contains(secret), "{error}");
            }
        }
    }
    let url = format!("{}99", redis.url());
    let mut sink = open(config(&redis, "redis_stream", json!({"url": url}))).unwrap();
    let error = sink.open().await.unwrap_err();
    assert_eq!(error.class(), Class::Config, "{error}");
    assert!(error.to_string().contains("DB index"), "{error}");
}

#[tokio::test]
async fn a_server_that_is_down_is_waited_for_and_the_same_sink_goes_on() {
    let mut redis = Redis::start().await;
    for (kind, _) in kinds() {
        let mut sink = opened(&redis, kind, json!({})).await;
        delivers(&mut *sink, &batch(0..2)).await;
        redis.kill();
        assert_eq!(fails(&mut *sink, &batch(2..3)).await.class(), Class::Retry, "{kind}");
        assert_eq!(sink.open().await.unwrap_err().class(), Class::Retry, "{kind}");
        // Not open: still an outage, nothing else.
        assert_eq!(fails(&mut *sink, &batch(2..3)).await.class(), Class::Retry, "{kind}");
        redis.up().await;
        let stored = sink.open().await.unwrap();
        let keeps = sink.capabilities().transactional_progress;
        let expected = keeps.then(|| progress(1, 2));
        assert_eq!(stored, expected, "{kind}");
        delivers(&mut *sink, &batch(2..3)).await;
        sink.close().await.unwrap();
    }
}

#[tokio::test]
async fn a_server_that_hangs_is_an_outage_after_the_timeout() {
    let redis = Redis::start().await;
    for (kind, _) in kinds() {
        let mut sink = opened(&redis, kind, json!({"timeout_ms": 200})).await;
        redis.pause();
        let error = fails(&mut *sink, &batch(0..1)).await;
        assert_eq!(error.class(), Class::Retry, "{error}");
        assert!(error.to_string().contains("did not answer within 200 ms"), "{error}");
        assert_eq!(sink.open().await.unwrap_err().class(), Class::Retry);
        redis.resume();
        let stored = sink.open().await.unwrap().map_or(0, |progress| progress.cursor);
        delivers(&mut *sink, &batch(stored..2)).await;
    }
    // What was sent to the stream before it hung came through or not, but never twice.
    assert_eq!(redis.ask::<u64>("XLEN walrace..public.t").await, 2);
}

#[tokio::test]
async fn a_write_that_is_cancelled_leaves_nothing_behind_that_the_next_one_could_trip_over() {
    let redis = Redis::start().await;
    let mut sink = opened(&redis, "redis_stream", json!({})).await;
    redis.pause();
    let all = batch(0..50);
    {
        let cancelled = write(&mut *sink, &all);
        let limit = Duration::from_millis(50);
        assert!(tokio::time::timeout(limit, cancelled).await.is_err());
    }
    redis.resume();
    // The request may come through while the sink opens, or after it.
    loop {
        let from = sink.open().await.unwrap().map_or(0, |progress| progress.cursor);
        match write(&mut *sink, &batch(from..60)).await {
            Ok(_) => break,
            Err(error) => assert_eq!(error.class(), Class::Retry, "{error}"),
        }
    }
    assert_eq!(stream::offsets(&redis, "walrace..public.t").await, (0..60).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_connection_that_was_given_up_is_closed_before_the_next_write() {
    let redis = Redis::start().await;
    let mut sink = opened(&redis, "redis_string", json!({"timeout_ms": 100})).await;
    let count = async || redis.ask::<String>("CLIENT LIST").await.lines().count();
    let before = count().await;
    for value in ["a", "b", "c"] {
        redis.pause();
        let insert = change(Op::Insert, Before::Nothing, Some(row("1", "old")));
        let old = Batch { changes: vec![insert; 1000], position: None };
        assert_eq!(fails(&mut *sink, &old).await.class(), Class::Retry);
        redis.resume();
        sink.open().await.unwrap();
        let insert = change(Op::Insert, Before::Nothing, Some(row("1", value)));
        let new = Batch { changes: vec![insert], position: None };
        delivers(&mut *sink, &new).await;
        let stored: String = redis.ask("GET t:1").await;
        assert_eq!(stored, format!(r#"{{"id":1,"v":"{value}"}}"#));
        assert_eq!(count().await, before);
    }
}

#[tokio::test]
async fn tls_wants_the_authority_that_signed_the_certificate() {
    let redis = Redis::start_tls().await;
    for (kind, _) in kinds() {
        let ca = redis.ca();
        let mut sink = opened(&redis, kind, json!({"tls_ca": ca})).await;
        delivers(&mut *sink, &batch(0..3)).await;
        let mut sink = open(config(&redis, kind, json!({}))).unwrap();
        let error = sink.open().await.unwrap_err();
        assert_eq!(error.class(), Class::Config, "{error}");
        assert!(error.remedy_text().unwrap().contains("tls_ca"), "{error}");
        let mut sink = open(config(&redis, kind, json!({"tls_ca": "/nowhere.pem"}))).unwrap();
        let error = sink.open().await.unwrap_err();
        assert_eq!(error.class(), Class::Config, "{error}");
        assert!(error.to_string().contains("/nowhere.pem"), "{error}");
    }
    assert_eq!(redis.ask::<u64>("XLEN walrace..public.t").await, 3);
}

#[tokio::test]
async fn the_rights_that_the_documentation_names_are_enough() {
    let redis = Redis::start().await;
    for (kind, target) in kinds() {
        let page = page(kind);
        let rule = page.split("`ACL SETUSER ").nth(1).unwrap().split('`').next().unwrap();
        let rule = rule.split_once(' ').unwrap().1;
        for (user, dropped) in [("whole", ""), ("least", " +client|info +client|kill")] {
            assert!(rule.contains(dropped), "{rule}");
            let rule = rule.replace(dropped, "");
            redis.ask::<()>(&format!("ACL SETUSER {user} reset {rule}")).await;
            let mut options = target.clone();
            options["url"] = json!(redis.url_of(&format!("{user}:password")));
            let mut sink = opened(&redis, kind, options).await;
            let mut batch = batch(0..3);
            batch.changes.push(truncate(2));
            delivers(&mut *sink, &batch).await;
            sink.open().await.unwrap();
            delivers(&mut *sink, &batch).await;
        }
    }
}

#[tokio::test]
async fn of_a_cluster_one_slot_is_written_and_more_are_refused_with_what_to_do() {
    let redis = Redis::with(false, "cluster-enabled yes").await;
    redis.ask::<()>("CLUSTER ADDSLOTSRANGE 0 16383").await;
    let up = async || {
        let info: String = redis.ask("CLUSTER INFO").await;
        info.contains("cluster_state:ok").then_some(())
    };
    wait_for(Duration::from_secs(30), up, || "the cluster is not up".into()).await;
    let mut sink = opened(&redis, "redis_stream", json!({})).await;
    let error = fails(&mut *sink, &batch(0..1)).await;
    assert_eq!(error.class(), Class::Config, "{error}");
    assert!(error.remedy_text().unwrap().contains("hash tag"), "{error}");
    let options = json!({"stream": "{{walrace}}:{table}", "progress_key": "{walrace}:progress"});
    let mut sink = opened(&redis, "redis_stream", options).await;
    delivers(&mut *sink, &batch(0..3)).await;
    assert_eq!(stream::offsets(&redis, "{walrace}:t").await, [0, 1, 2]);
}
