use std::time::{Duration, Instant};

use serde_json::{Value as Json, json};
use walrace::{
    change::{Batch, Before, Change, Op, Row, Value},
    error::Class,
    sink::Sink,
};

use super::{batch, change, delivers, fails, opened, row, truncate};
use crate::kit::Redis;

async fn keys(redis: &Redis) -> Vec<String> {
    let mut keys: Vec<String> = redis.ask("KEYS *").await;
    keys.sort();
    keys
}

async fn apply(sink: &mut dyn Sink, changes: impl IntoIterator<Item = Change>) {
    delivers(sink, &Batch { changes: changes.into_iter().collect(), position: None }).await;
}

fn insert(id: &str, v: &str) -> Change {
    change(Op::Insert, Before::Nothing, Some(row(id, v)))
}

fn delete(id: &str) -> Change {
    let key = Row::from_values([Value::Text(id.as_bytes()), Value::Null]);
    change(Op::Delete, Before::Key(key), None)
}

#[tokio::test]
async fn a_row_is_a_string_and_a_deleted_row_is_none() {
    let redis = Redis::start().await;
    let mut sink = opened(&redis, "redis_string", json!({})).await;
    assert!(sink.capabilities().state_target);
    let update = change(Op::Update, Before::Nothing, Some(row("1", "b")));
    apply(&mut *sink, [insert("1", "a"), insert("2", "x"), update, delete("2")]).await;
    assert_eq!(keys(&redis).await, ["t:1"]);
    assert_eq!(redis.ask::<String>("GET t:1").await, r#"{"id":1,"v":"b"}"#);
    assert_eq!(redis.ask::<i64>("PTTL t:1").await, -1);
    // Again, as after a crash.
    apply(&mut *sink, [insert("1", "a"), insert("2", "x"), delete("2")]).await;
    assert_eq!(keys(&redis).await, ["t:1"]);
}

#[tokio::test]
async fn a_key_is_gone_at_most_100_ms_after_its_row() {
    let redis = Redis::start().await;
    let options = json!({"key": "sequin:{table}:{key}", "on_update": "delete"});
    let mut sink = opened(&redis, "redis_string", options).await;
    for (id, change) in
        [("1", delete("1")), ("2", change(Op::Update, Before::Nothing, Some(row("2", "new"))))]
    {
        redis.ask::<()>(&format!("SET sequin:t:{id} cached")).await;
        let begin = Instant::now();
        apply(&mut *sink, [change]).await;
        let spent = begin.elapsed();
        assert!(spent < Duration::from_millis(100), "{spent:?}");
        assert_eq!(keys(&redis).await, [""; 0]);
    }
}

#[tokio::test]
async fn a_value_lives_as_long_as_it_is_told() {
    let redis = Redis::start().await;
    let options = json!({"ttl_ms": 60_000, "payload": "message", "format": "sequin"});
    let mut sink = opened(&redis, "redis_string", options).await;
    delivers(&mut *sink, &batch(3..4)).await;
    let ttl: i64 = redis.ask("PTTL t:3").await;
    assert!((30_000..=60_000).contains(&ttl), "{ttl}");
    let text: String = redis.ask("GET t:3").await;
    let message: Json = serde_json::from_str(&text).unwrap();
    assert_eq!((&message["action"], &message["record"]["id"]), (&json!("insert"), &json!(3)));
}

#[tokio::test]
async fn an_update_of_the_key_leaves_no_old_one_behind() {
    let redis = Redis::start().await;
    let mut sink = opened(&redis, "redis_string", json!({})).await;
    let old = Before::Key(Row::from_values([Value::Text(b"1"), Value::Null]));
    let moved = change(Op::Update, old, Some(row("2", "b")));
    apply(&mut *sink, [insert("1", "a"), moved]).await;
    assert_eq!(keys(&redis).await, ["t:2"]);
    let same = change(Op::Update, Before::Full(row("2", "b")), Some(row("2", "c")));
    apply(&mut *sink, [same]).await;
    assert_eq!(redis.ask::<String>("GET t:2").await, r#"{"id":2,"v":"c"}"#);

    let options = json!({"key": "by-v:{record.v}"});
    let mut sink = opened(&redis, "redis_string", options).await;
    let renamed = change(Op::Update, Before::Full(row("7", "a")), Some(row("7", "b")));
    apply(&mut *sink, [insert("7", "a"), renamed]).await;
    assert_eq!(keys(&redis).await, ["by-v:b", "t:2"]);
}

#[tokio::test]
async fn an_update_that_does_not_tell_the_old_key_sets_the_new_one() {
    let redis = Redis::start().await;
    let mut sink = opened(&redis, "redis_string", json!({"key": "{key}:{record.v}"})).await;
    let old = Before::Key(Row::from_values([Value::Text(b"1"), Value::Null]));
    let moved = change(Op::Update, old, Some(row("2", "b")));
    apply(&mut *sink, [insert("1", "a"), moved]).await;
    assert_eq!(keys(&redis).await, ["1:a", "2:b"]);
}

#[tokio::test]
async fn a_change_that_does_not_tell_its_key_or_whole_row_is_refused_with_what_mends_it() {
    let redis = Redis::start().await;
    let mut by_v = opened(&redis, "redis_string", json!({"key": "{record.v}"})).await;
    let mut by_key = opened(&redis, "redis_string", json!({})).await;
    let partial = Row::from_values([Value::Text(b"1"), Value::Unchanged]);
    let toast = change(Op::Update, Before::Nothing, Some(partial.clone()));
    for (sink, bad) in [(&mut by_v, delete("1")), (&mut by_key, toast.clone())] {
        let error = fails(&mut **sink, &Batch { changes: vec![bad], position: None }).await;
        assert_eq!(error.class(), Class::Data, "{error}");
        assert!(error.to_string().contains("REPLICA IDENTITY FULL"), "{error}");
    }
    let known = change(Op::Update, Before::Full(row("1", "long")), Some(partial));
    apply(&mut *by_key, [known]).await;
    assert_eq!(redis.ask::<String>("GET t:1").await, r#"{"id":1,"v":"long"}"#);
    let mut invalidating = opened(&redis, "redis_string", json!({"on_update": "delete"})).await;
    apply(&mut *invalidating, [toast]).await;
    assert_eq!(keys(&redis).await, [""; 0]);
}

#[tokio::test]
async fn a_truncate_leaves_the_keys_or_deletes_those_of_its_table_in_its_turn() {
    let redis = Redis::start().await;
    let mut sink = opened(&redis, "redis_string", json!({})).await;
    apply(&mut *sink, [insert("1", "a"), truncate(1)]).await;
    assert_eq!(keys(&redis).await, ["t:1"]);
    redis.ask::<()>("MSET t2:1 other t other u[t]:1 other").await;
    redis.ask::<()>("LPUSH t:list other").await;
    let mut sink = opened(&redis, "redis_string", json!({"on_truncate": "scan"})).await;
    let mut many = batch(0..3_000).changes;
    many.push(truncate(0));
    many.push(insert("5", "after"));
    apply(&mut *sink, many).await;
    assert_eq!(keys(&redis).await, ["t", "t2:1", "t:5", "t:list", "u[t]:1"]);

    let options = json!({"key": "u[{table}]:{key}", "on_truncate": "scan", "on_delete": "ignore"});
    let mut sink = opened(&redis, "redis_string", options).await;
    redis.ask::<()>("SET ut:1 other").await;
    apply(&mut *sink, [delete("5"), truncate(0)]).await;
    assert_eq!(keys(&redis).await, ["t", "t2:1", "t:5", "t:list", "ut:1"]);
}
