use std::{sync::Arc, time::Duration};

use futures_util::StreamExt;
use redis::aio::PubSub;
use serde_json::{Value as Json, json};
use walrace::{
    change::{Batch, Before, Change, Op, Row, Value},
    error::Class,
    schema::{Column, Identity, Table, Type},
};

use super::{batch, change, delivers, fails, opened, row, truncate};
use crate::kit::Redis;

/// Listens to every channel.
pub(crate) async fn listen(redis: &Redis) -> PubSub {
    let mut listener = redis.client().get_async_pubsub().await.unwrap();
    listener.psubscribe("*").await.unwrap();
    listener
}

pub(crate) async fn next(listener: &mut PubSub) -> (String, String) {
    let message = tokio::time::timeout(Duration::from_secs(20), listener.on_message().next()).await;
    let message = message.expect("a message in time").expect("a message");
    (message.get_channel_name().to_owned(), message.get_payload().unwrap())
}

#[tokio::test]
async fn a_subscriber_gets_the_messages_in_their_order() {
    let redis = Redis::start().await;
    let mut listener = listen(&redis).await;
    let mut sink = opened(&redis, "redis_pubsub", json!({})).await;
    for start in [0, 500] {
        delivers(&mut *sink, &batch(start..start + 500)).await;
    }
    for offset in 0..1_000 {
        let (channel, text) = next(&mut listener).await;
        assert_eq!(channel, "walrace..public.t");
        let message: Json = serde_json::from_str(&text).unwrap();
        assert_eq!(message["offset"], offset);
    }
    // Nothing to send is nothing to ask.
    delivers(&mut *sink, &Batch::default()).await;
}

fn run(table: &str, columns: &[&str], values: &[&str]) -> Change {
    let column = |name: &&str| Column {
        name: (*name).into(),
        ty: Type::base(25, -1),
        primary_key: *name == "id",
        identity: *name == "id",
        nullable: None,
    };
    let columns = columns.iter().map(column).collect();
    let table = Table {
        oid: 1,
        schema: "public".into(),
        name: table.into(),
        identity: Identity::Default,
        columns,
    };
    let row = Row::from_values(values.iter().map(|value| Value::Text(value.as_bytes())));
    Change { table: Some(Arc::new(table)), ..change(Op::Insert, Before::Nothing, Some(row)) }
}

#[tokio::test]
async fn the_channels_and_payloads_of_strait_are_exactly_its_own() {
    let redis = Redis::start().await;
    let mut listener = listen(&redis).await;
    let options = json!({
        "channel": "cdc:project:{record.project_id}:{table}",
        "channels": {
            "workflow_step_runs": "cdc:workflow_run:{record.workflow_run_id}:steps",
            "workflow_*": "cdc:any",
        },
        "payload": "strait",
    });
    let mut sink = opened(&redis, "redis_pubsub", options).await;
    let job = run("job_runs", &["id", "project_id", "status"], &["r1", "p1", "queued"]);
    let step = run("workflow_step_runs", &["id", "workflow_run_id"], &["s1", "w1"]);
    let other = run("workflow_runs", &["id"], &["w1"]);
    let mut update = job.clone();
    update.op = Op::Update;
    update.before = Before::Full(Row::from_values(
        ["r1", "p1", "new"].map(|text| Value::Text(text.as_bytes())),
    ));
    let changes = vec![job, step, truncate(2), other, update];
    delivers(&mut *sink, &Batch { changes, position: None }).await;
    let head = |table: &str, action: &str, record: &str, changes: &str| {
        format!(
            "{{\"table\":\"{table}\",\"action\":\"{action}\",\"record\":{record},\
             \"changes\":{changes},\"timestamp\":\"2026-04-06T09:14:22.000123Z\",\
             \"source\":\"cdc\"}}"
        )
    };
    let queued = r#"{"id":"r1","project_id":"p1","status":"queued"}"#;
    for (channel, payload) in [
        ("cdc:project:p1:job_runs", head("job_runs", "insert", queued, "null")),
        (
            "cdc:workflow_run:w1:steps",
            head("workflow_step_runs", "insert", r#"{"id":"s1","workflow_run_id":"w1"}"#, "null"),
        ),
        ("cdc:any", head("workflow_runs", "insert", r#"{"id":"w1"}"#, "null")),
        ("cdc:project:p1:job_runs", head("job_runs", "update", queued, r#"{"status":"new"}"#)),
    ] {
        assert_eq!(next(&mut listener).await, (channel.to_owned(), payload));
    }
}

#[tokio::test]
async fn a_change_without_a_channel_is_refused_alone() {
    let redis = Redis::start().await;
    let mut listener = listen(&redis).await;
    let options = json!({"channel": "p:{record.v}"});
    let mut sink = opened(&redis, "redis_pubsub", options).await;
    let mut bad = change(Op::Insert, Before::Nothing, Some(row("1", "x")));
    bad.after = Some(Row::from_values([Value::Text(b"1"), Value::Null]));
    let good = change(Op::Insert, Before::Nothing, Some(row("2", "a")));
    let mut routed = bad.clone();
    routed.shaped_mut().route = Some("routed".into());
    let both = Batch { changes: vec![good.clone(), bad.clone()], position: None };
    assert_eq!(fails(&mut *sink, &both).await.class(), Class::Data);
    let alone = Batch { changes: vec![bad], position: None };
    let error = fails(&mut *sink, &alone).await;
    assert!(error.to_string().contains("v is null"), "{error}");
    delivers(&mut *sink, &Batch { changes: vec![good, routed], position: None }).await;
    assert_eq!(next(&mut listener).await.0, "p:a");
    assert_eq!(next(&mut listener).await.0, "routed");
}
