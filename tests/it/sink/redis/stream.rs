use std::{
    io::Write,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::Duration,
};

use serde_json::{Value as Json, json};
use walrace::{
    change::{Batch, Op},
    error::Class,
    sink::{Sink, Written},
};

use super::{batch, change, config, delivers, fails, open, opened, progress, row, truncate};
use crate::kit::{Redis, wait_for};

const STREAM: &str = "walrace..public.t";

type Entry = (String, Vec<(String, String)>);

async fn entries(redis: &Redis, stream: &str) -> Vec<Entry> {
    redis.ask(&format!("XRANGE {stream} - +")).await
}

fn field<'a>(entry: &'a Entry, name: &str) -> &'a str {
    let found = entry.1.iter().find(|(found, _)| found == name);
    &found.unwrap_or_else(|| panic!("no {name} in {entry:?}")).1
}

pub(super) async fn offsets(redis: &Redis, stream: &str) -> Vec<u64> {
    let entries = entries(redis, stream).await;
    entries.iter().map(|entry| field(entry, "offset").parse().unwrap()).collect()
}

async fn stored(redis: &Redis) -> Json {
    let text: String = redis.ask("GET walrace:progress:hook").await;
    serde_json::from_str(&text).unwrap()
}

#[tokio::test]
async fn an_entry_has_the_message_and_what_consumers_go_by() {
    let redis = Redis::start().await;
    let mut sink = opened(&redis, "redis_stream", json!({"stream": "events"})).await;
    let mut batch = batch(5..7);
    batch.changes[1].shaped_mut().route = Some("other".into());
    batch.changes[1].shaped_mut().headers.push(("tenant".into(), "a".into()));
    delivers(&mut *sink, &batch).await;
    let entries_of_events = entries(&redis, "events").await;
    let [entry] = &entries_of_events[..] else { panic!("{entries_of_events:?}") };
    let names: Vec<&str> = entry.1.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["payload", "key", "op", "table", "offset", "idempotency_key"]);
    let payload: Json = serde_json::from_str(field(entry, "payload")).unwrap();
    assert_eq!(payload["after"], json!({"id": 5, "v": "ü \"quoted\""}));
    assert_eq!(payload["idempotency_key"], field(entry, "idempotency_key"));
    assert_eq!(field(entry, "key"), r#"{"id":5}"#);
    assert_eq!(field(entry, "op"), "c");
    assert_eq!(field(entry, "table"), "public.t");
    assert_eq!(field(entry, "offset"), "5");
    let routed = entries(&redis, "other").await;
    assert_eq!(field(&routed[0], "tenant"), "a");
    assert_eq!(field(&routed[0], "offset"), "6");
}

#[tokio::test]
async fn an_entry_of_sequin_has_a_field_for_each_member() {
    let redis = Redis::start().await;
    let mut sink = opened(&redis, "redis_stream", json!({"format": "sequin"})).await;
    let mut batch = batch(0..2);
    batch.changes.insert(1, truncate(1));
    delivers(&mut *sink, &batch).await;
    let entries = entries(&redis, STREAM).await;
    assert_eq!(entries.len(), 2, "a truncate has no message");
    let names: Vec<&str> = entries[0].1.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["record", "changes", "action", "metadata"]);
    assert_eq!(field(&entries[0], "action"), "insert");
    assert_eq!(field(&entries[0], "changes"), "null");
    let record: Json = serde_json::from_str(field(&entries[0], "record")).unwrap();
    assert_eq!(record, json!({"id": 0, "v": "ü \"quoted\""}));
    let metadata: Json = serde_json::from_str(field(&entries[0], "metadata")).unwrap();
    assert_eq!(metadata["table_name"], "t");
}

#[tokio::test]
async fn the_commands_of_walstream_show_the_insert() {
    let redis = Redis::start().await;
    let options = json!({"stream": "walstream:events"});
    let mut sink = opened(&redis, "redis_stream", options).await;
    let insert = change(Op::Insert, Default::default(), Some(row("1", "test insert")));
    delivers(&mut *sink, &Batch { changes: vec![insert], position: None }).await;
    assert_eq!(redis.cli("XLEN walstream:events").trim(), "1");
    let shown = redis.cli("XRANGE walstream:events - + COUNT 1");
    assert!(shown.contains("public.t") && shown.contains("test insert"), "{shown}");
}

#[tokio::test]
async fn the_progress_is_stored_with_each_write_and_found_again() {
    let redis = Redis::start().await;
    let mut sink = open(config(&redis, "redis_stream", json!({}))).unwrap();
    assert_eq!(sink.peek().await.unwrap(), None);
    assert_eq!(sink.open().await.unwrap(), None);
    // Nothing to append: the progress alone.
    sink.write(&Batch::default(), &progress(1, 4)).await.unwrap();
    assert_eq!(stored(&redis).await["cursor"], 4);
    delivers(&mut *sink, &batch(4..6)).await;
    let retried = walrace::sink::Progress { retry_seq: 9, ..progress(1, 6) };
    sink.write(&Batch::default(), &retried).await.unwrap();
    assert_eq!(stored(&redis).await["retry_seq"], 9);
    assert_eq!(sink.peek().await.unwrap(), Some(retried));
    sink.close().await.unwrap();
    let mut again = open(config(&redis, "redis_stream", json!({}))).unwrap();
    assert_eq!(again.peek().await.unwrap(), Some(retried));
    assert_eq!(again.open().await.unwrap(), Some(retried));
    assert_eq!(offsets(&redis, STREAM).await, [4, 5]);
    assert!(again.capabilities().transactional_progress);
}

/// Writes batches until all of `total` are delivered, however often it must open again.
async fn deliver_all(sink: &mut dyn Sink, total: u64, delivered: &AtomicU64) {
    let mut cursor = None;
    let mut acknowledged = 0;
    loop {
        let from = match cursor {
            Some(from) => from,
            None => match sink.open().await {
                Ok(stored) => stored.map_or(0, |progress| progress.cursor),
                Err(error) => {
                    assert_eq!(error.class(), Class::Retry, "{error}");
                    tokio::task::yield_now().await;
                    continue;
                }
            },
        };
        assert!(from >= acknowledged, "it forgot what it had acknowledged");
        acknowledged = from;
        delivered.store(from, Ordering::Relaxed);
        if from == total {
            return;
        }
        let end = (from + fastrand::u64(1..200)).min(total);
        cursor = match sink.write(&batch(from..end), &progress(1, end)).await {
            Ok(written) => {
                assert!(matches!(written, Written::All));
                Some(end)
            }
            Err(error) => {
                assert_eq!(error.class(), Class::Retry, "{error}");
                None
            }
        };
    }
}

#[tokio::test]
async fn each_change_is_there_once_however_often_the_server_is_killed() {
    const TOTAL: u64 = 40_000;
    const KILLS: u64 = 20;
    let mut redis = Redis::start().await;
    let options = json!({"maxlen": 0, "timeout_ms": 10_000});
    let mut sink = open(config(&redis, "redis_stream", options)).unwrap();
    let delivered = AtomicU64::new(0);
    let done = AtomicBool::new(false);
    let kills = async {
        let mut kills = 0;
        while !done.load(Ordering::Relaxed) && kills < KILLS {
            let next = TOTAL / (KILLS + 1) * (kills + 1);
            wait_for(
                Duration::from_secs(60),
                async || (delivered.load(Ordering::Relaxed) >= next).then_some(()),
                || "no headway".into(),
            )
            .await;
            tokio::time::sleep(Duration::from_micros(fastrand::u64(0..3_000))).await;
            redis.kill();
            redis.up().await;
            kills += 1;
        }
        kills
    };
    let deliver = async {
        deliver_all(&mut *sink, TOTAL, &delivered).await;
        done.store(true, Ordering::Relaxed);
    };
    let (kills, ()) = tokio::join!(kills, deliver);
    assert!(kills >= KILLS / 2, "only {kills} kills");
    assert_eq!(offsets(&redis, STREAM).await, (0..TOTAL).collect::<Vec<_>>());
    assert_eq!(stored(&redis).await["cursor"], TOTAL);
}

#[tokio::test]
async fn a_sink_that_was_overtaken_writes_nothing_more() {
    let redis = Redis::start().await;
    let mut zombie = opened(&redis, "redis_stream", json!({})).await;
    delivers(&mut *zombie, &batch(0..2)).await;
    let mut heir = opened(&redis, "redis_stream", json!({})).await;
    delivers(&mut *heir, &batch(2..4)).await;
    for late in [batch(2..3), batch(2..4), Batch::default()] {
        let error = fails(&mut *zombie, &late).await;
        assert_eq!(error.class(), Class::Retry, "{error}");
        assert!(error.to_string().contains("another walrace writes"), "{error}");
    }
    assert_eq!(offsets(&redis, STREAM).await, [0, 1, 2, 3]);
    assert_eq!(stored(&redis).await["cursor"], 4);
    assert_eq!(zombie.open().await.unwrap(), Some(progress(1, 4)));
    delivers(&mut *zombie, &batch(4..5)).await;
    assert_eq!(fails(&mut *heir, &batch(4..5)).await.class(), Class::Retry);
    assert_eq!(offsets(&redis, STREAM).await, [0, 1, 2, 3, 4]);
}

#[tokio::test]
async fn an_older_epoch_never_takes_the_place_of_a_newer() {
    let redis = Redis::start().await;
    let mut sink = opened(&redis, "redis_stream", json!({})).await;
    sink.write(&batch(0..2), &progress(1, 2)).await.unwrap();
    // A rewind: the cursor falls with the new epoch.
    sink.write(&batch(0..1), &progress(2, 1)).await.unwrap();
    let error = sink.write(&batch(1..2), &progress(1, 2)).await.unwrap_err();
    assert_eq!(error.class(), Class::Retry, "{error}");
    let foreign = walrace::sink::Progress { lineage: uuid::Uuid::from_u128(8), ..progress(3, 1) };
    assert!(sink.write(&batch(1..2), &foreign).await.is_err());
    assert_eq!(offsets(&redis, STREAM).await, [0, 1, 0]);
    assert_eq!(sink.open().await.unwrap(), Some(progress(2, 1)));
}

#[tokio::test]
async fn a_stream_is_trimmed_to_about_its_length() {
    let redis = Redis::start().await;
    let mut sink = opened(&redis, "redis_stream", json!({"maxlen": 1_000})).await;
    for start in (0..10_000).step_by(1_000) {
        delivers(&mut *sink, &batch(start..start + 1_000)).await;
    }
    let offsets = offsets(&redis, STREAM).await;
    assert!((1_000..1_200).contains(&offsets.len()), "{} entries", offsets.len());
    assert_eq!(offsets.last(), Some(&9_999));
}

#[tokio::test]
async fn a_large_batch_is_one_script() {
    let redis = Redis::start().await;
    let mut sink = opened(&redis, "redis_stream", json!({"maxlen": 0})).await;
    delivers(&mut *sink, &batch(0..20_000)).await;
    assert_eq!(redis.ask::<u64>(&format!("XLEN {STREAM}")).await, 20_000);
    let calls: String = redis.ask("INFO commandstats").await;
    assert!(calls.contains("cmdstat_evalsha:calls=2,"), "once without the script: {calls}");
}

#[tokio::test]
async fn a_key_of_another_type_stops_the_sink_before_anything_is_written() {
    let redis = Redis::start().await;
    redis.ask::<()>("SET taken x").await;
    let mut sink = opened(&redis, "redis_stream", json!({})).await;
    let mut mixed = batch(0..3);
    mixed.changes[1].shaped_mut().route = Some("taken".into());
    let error = fails(&mut *sink, &mixed).await;
    assert_eq!(error.class(), Class::Config, "{error}");
    assert!(error.to_string().contains("`taken`") && error.to_string().contains("string"));
    assert_eq!(redis.ask::<Vec<String>>("KEYS *").await, ["taken"]);

    redis.ask::<()>("DEL taken").await;
    redis.ask::<()>("SET walrace:progress:hook mine").await;
    let error = sink.open().await.unwrap_err();
    assert_eq!(error.class(), Class::Config, "{error}");
    assert!(error.remedy_text().unwrap().contains("progress_key"), "{error}");
    redis.ask::<()>("DEL walrace:progress:hook").await;
    redis.ask::<()>("LPUSH walrace:progress:hook mine").await;
    assert_eq!(sink.open().await.unwrap_err().class(), Class::Config);
    redis.ask::<()>("DEL walrace:progress:hook").await;
    sink.open().await.unwrap();
    delivers(&mut *sink, &mixed).await;
}

#[tokio::test]
async fn a_batch_that_fails_in_its_middle_is_taken_back() {
    let redis = Redis::start().await;
    let last = u64::MAX;
    redis.ask::<String>(&format!("XADD full {last}-{last} a b")).await;
    let mut sink = opened(&redis, "redis_stream", json!({})).await;
    let mut mixed = batch(0..4);
    mixed.changes[2].shaped_mut().route = Some("full".into());
    let error = fails(&mut *sink, &mixed).await;
    assert_eq!(error.class(), Class::Config, "{error}");
    assert!(error.to_string().contains("exhausted"), "{error}");
    assert_eq!(redis.ask::<u64>(&format!("XLEN {STREAM}")).await, 0);
    assert_eq!(sink.open().await.unwrap(), None);
}

#[tokio::test]
async fn a_server_without_memory_is_waited_for() {
    let redis = Redis::start().await;
    let mut sink = opened(&redis, "redis_stream", json!({})).await;
    delivers(&mut *sink, &batch(0..2)).await;
    redis.ask::<()>("CONFIG SET maxmemory 1").await;
    for refused in [batch(2..4), Batch::default()] {
        let error = fails(&mut *sink, &refused).await;
        assert_eq!(error.class(), Class::Retry, "{error}");
        assert!(error.remedy_text().unwrap().contains("maxmemory"), "{error}");
        assert_eq!(sink.open().await.unwrap(), Some(progress(1, 2)));
    }
    redis.ask::<()>("CONFIG SET maxmemory 0").await;
    delivers(&mut *sink, &batch(2..4)).await;
    assert_eq!(offsets(&redis, STREAM).await, [0, 1, 2, 3]);
}

#[tokio::test]
async fn data_and_progress_fall_back_together() {
    let mut redis = Redis::start().await;
    let mut sink = opened(&redis, "redis_stream", json!({})).await;
    delivers(&mut *sink, &batch(0..2)).await;
    let snapshot = redis.snapshot();
    delivers(&mut *sink, &batch(2..4)).await;
    redis.restore(&snapshot).await;
    assert_eq!(fails(&mut *sink, &batch(4..5)).await.class(), Class::Retry);
    assert_eq!(sink.open().await.unwrap(), Some(progress(1, 2)));
    assert_eq!(offsets(&redis, STREAM).await, [0, 1]);
    sink.write(&batch(2..4), &progress(2, 4)).await.unwrap();
    assert_eq!(offsets(&redis, STREAM).await, [0, 1, 2, 3]);
    redis.ask::<()>("FLUSHALL").await;
    let error = sink.write(&batch(4..5), &progress(2, 5)).await.unwrap_err();
    assert_eq!(error.class(), Class::Retry, "{error}");
    assert!(error.to_string().contains("has lost the progress"), "{error}");
    assert_eq!(sink.open().await.unwrap(), None);
    assert_eq!(redis.ask::<u64>("DBSIZE").await, 0);
}

#[tokio::test]
async fn a_transaction_that_a_crash_tore_is_not_brought_back() {
    let mut redis = Redis::start().await;
    let mut sink = opened(&redis, "redis_stream", json!({})).await;
    delivers(&mut *sink, &batch(0..2)).await;
    let entries = entries(&redis, STREAM).await;
    let (time, _) = entries.last().unwrap().0.split_once('-').unwrap();
    redis.kill();
    let mut torn = redis::cmd("MULTI").get_packed_command();
    let mut append = redis::cmd("XADD");
    append.arg(STREAM).arg(format!("{time}-99")).arg("offset").arg(2);
    torn.extend(append.get_packed_command());
    torn.extend(b"*5\r\n$4\r\nXA");
    let file = redis.data_dir().join("appendonly.aof.1.incr.aof");
    let mut file = std::fs::File::options().append(true).open(file).unwrap();
    file.write_all(&torn).unwrap();
    redis.up().await;
    assert_eq!(sink.open().await.unwrap(), Some(progress(1, 2)));
    delivers(&mut *sink, &batch(2..4)).await;
    redis.kill();
    redis.up().await;
    assert_eq!(offsets(&redis, STREAM).await, [0, 1, 2, 3]);
}

#[tokio::test]
async fn a_server_that_became_a_replica_is_waited_for() {
    let redis = Redis::start().await;
    for kind in ["redis_stream", "redis_string"] {
        let mut sink = opened(&redis, kind, json!({})).await;
        redis.ask::<()>("REPLICAOF 127.0.0.1 1").await;
        let error = fails(&mut *sink, &batch(0..1)).await;
        assert_eq!(error.class(), Class::Retry, "{error}");
        assert!(error.to_string().contains("READONLY"), "{error}");
        redis.ask::<()>("REPLICAOF NO ONE").await;
        sink.open().await.unwrap();
        delivers(&mut *sink, &batch(0..1)).await;
    }
}

#[tokio::test]
async fn a_script_that_the_server_forgot_is_loaded_again() {
    let redis = Redis::start().await;
    let mut sink = opened(&redis, "redis_stream", json!({})).await;
    for start in [0, 2, 4] {
        redis.ask::<()>("SCRIPT FLUSH").await;
        delivers(&mut *sink, &batch(start..start + 2)).await;
    }
    assert_eq!(offsets(&redis, STREAM).await, [0, 1, 2, 3, 4, 5]);
}

#[tokio::test]
async fn a_change_that_cannot_be_an_entry_is_refused_and_the_sink_goes_on() {
    let redis = Redis::start().await;
    let options = json!({"entry_bytes_max": 2_000, "stream": "s:{record.v}"});
    let mut sink = opened(&redis, "redis_stream", options).await;
    let large = change(Op::Insert, Default::default(), Some(row("1", &"x".repeat(2_000))));
    let nameless = truncate(1);
    for refused in [large, nameless] {
        let mut mixed = Batch { changes: vec![refused], position: None };
        assert_eq!(fails(&mut *sink, &mixed).await.class(), Class::Data);
        mixed.changes.extend(batch(0..2).changes);
        assert_eq!(fails(&mut *sink, &mixed).await.class(), Class::Data);
    }
    let insert = change(Op::Insert, Default::default(), Some(row("1", "a")));
    delivers(&mut *sink, &Batch { changes: vec![insert], position: None }).await;
    assert_eq!(offsets(&redis, "s:a").await, [0]);
}
