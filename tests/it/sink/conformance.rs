//! What every sink must hold, against its real server. The suite reads what a sink declares about
//! itself; one line below for each target.

use std::{collections::BTreeMap, time::Duration};

use serde_json::Value as Json;
use uuid::Uuid;
use walrace::{
    change::{Batch, Change},
    error::Class,
    sink::{Capabilities, Outcome, Progress, Sink, Written},
};

use super::{batch, open, target::Target};
use crate::kit::{Cluster, Delivery, Ledger, Pace, Server, State, check, source_toml, wait_for};

fn progress(epoch: u64, cursor: u64, retry_seq: u64) -> Progress {
    Progress { lineage: Uuid::from_u128(7), epoch, cursor, retry_seq }
}

/// The sink of a target, opened, with the progress that the target keeps.
async fn opened(config: Json) -> (Box<dyn Sink>, Option<Progress>) {
    let mut sink = open(config).unwrap();
    let progress = sink.open().await.unwrap();
    (sink, progress)
}

/// Writes as the pipeline does: what is refused as a whole is halved. The changes that were
/// refused.
async fn deliver(sink: &mut dyn Sink, changes: Vec<Change>, at: Progress) -> Vec<u64> {
    let end = changes.last().map_or(at.cursor, |change| change.offset + 1);
    let mut refused = Vec::new();
    let mut runs = vec![changes];
    while let Some(mut run) = runs.pop() {
        let Some(last) = run.last() else { continue };
        let cursor = last.offset + 1;
        let own = Batch { changes: run.clone(), position: None };
        match sink.write(&own, &Progress { cursor, ..at }).await {
            Ok(Written::All) => {}
            Ok(Written::Until(durable)) if durable >= cursor => {}
            Ok(Written::Until(_)) => {
                let flushed = sink.write(&Batch::default(), &Progress { cursor, ..at }).await;
                assert!(matches!(flushed, Ok(Written::All)), "an empty batch closes: {flushed:?}");
            }
            Ok(Written::Each(outcomes)) => {
                let mut rest = Vec::new();
                for (change, outcome) in run.into_iter().zip(outcomes) {
                    match outcome {
                        Outcome::Durable => {}
                        Outcome::Refused(_) => refused.push(change.offset),
                        Outcome::Unknown => rest.push(change),
                    }
                }
                runs.push(rest);
            }
            Err(error) if error.class() == Class::Data && run.len() > 1 => {
                let second = run.split_off(run.len() / 2);
                runs.push(second);
                runs.push(run);
            }
            Err(error) if error.class() == Class::Data => refused.push(run[0].offset),
            Err(error) => panic!("{error}"),
        }
    }
    // What was passed without a write is made known.
    let told = sink.write(&Batch::default(), &Progress { cursor: end, ..at }).await;
    assert!(told.is_ok(), "{told:?}");
    refused
}

/// How often each key (`id` of `public.t`, which the tests make equal to the offset) is there.
async fn ids(target: &mut dyn Target) -> BTreeMap<u64, usize> {
    let mut ids = BTreeMap::new();
    for item in target.content().await {
        let row = if item["row"].is_object() { &item["row"] } else { &item["after"] };
        let id = row["id"].as_u64().or_else(|| row["id"].as_str()?.parse().ok());
        *ids.entry(id.unwrap_or_else(|| panic!("no id in {item}"))).or_default() += 1;
    }
    ids
}

#[track_caller]
fn assert_ids(found: &BTreeMap<u64, usize>, expected: std::ops::Range<u64>, once: bool) {
    let keys: Vec<u64> = found.keys().copied().collect();
    assert_eq!(keys, expected.collect::<Vec<_>>());
    assert!(!once || found.values().all(|count| *count == 1), "some came twice: {found:?}");
}

/// Everything.
pub(crate) async fn conforms(target: &mut dyn Target) {
    holds_as_a_sink(target).await;
    holds_through_kills(target).await;
}

/// What holds of the sink as an object.
pub(crate) async fn holds_as_a_sink(target: &mut dyn Target) {
    let (mut sink, kept) = opened(target.config()).await;
    let caps = sink.capabilities();
    let once = caps.transactional_progress || caps.state_target;
    assert_eq!(kept, None, "a new target has no progress");

    assert_eq!(deliver(&mut *sink, batch(0..10).changes, progress(1, 0, 0)).await, [0u64; 0]);
    assert_ids(&ids(target).await, 0..10, true);
    assert_eq!(deliver(&mut *sink, Vec::new(), progress(1, 10, 0)).await, [0u64; 0]);
    sink.close().await.unwrap();
    drop(sink);

    let (mut sink, kept) = opened(target.config()).await;
    let keeps = |at| caps.transactional_progress.then_some(at);
    assert_eq!(kept, keeps(progress(1, 10, 0)), "after it was closed");
    assert_eq!(sink.peek().await.unwrap(), kept, "a look changes nothing");

    outage(target, &mut sink, once).await;
    refusal(target, &mut *sink).await;
    if caps.transactional_progress {
        only_one_writes(target, sink).await;
    }
    if let Some(wrong) = target.wrong_login() {
        let mut sink = open(wrong).unwrap();
        let error = match sink.open().await {
            Err(error) => error,
            Ok(_) => {
                let written = sink.write(&batch(90..91), &progress(1, 91, 0)).await;
                written.expect_err("a wrong login")
            }
        };
        assert_eq!(error.class(), Class::Config, "{error}");
    }
}

/// A server that is gone is an outage; once it is back the same sink goes on.
async fn outage(target: &mut dyn Target, sink: &mut Box<dyn Sink>, once: bool) {
    target.stop().await;
    let at = progress(1, 20, 0);
    let written = sink.write(&batch(10..20), &at).await;
    if let Err(error) = &written {
        assert_eq!(error.class(), Class::Retry, "{error}");
        let error = sink.open().await.err().map(|error| error.class());
        assert!(matches!(error, None | Some(Class::Retry)), "{error:?}");
    }
    target.start().await;
    let limit = Duration::from_secs(60);
    let mut kept = None;
    let deadline = std::time::Instant::now() + limit;
    loop {
        match sink.open().await {
            Ok(progress) => {
                kept = progress.or(kept);
                break;
            }
            Err(error) => {
                assert_eq!(error.class(), Class::Retry, "{error}");
                assert!(std::time::Instant::now() < deadline, "{error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
    let from = match kept {
        Some(kept) => kept.cursor,
        None if written.is_ok() => 20,
        None => 10,
    };
    deliver(&mut **sink, batch(from..20).changes, progress(1, from, 0)).await;
    assert_ids(&ids(target).await, 0..20, once);
}

/// One change that the target refuses harms no other.
async fn refusal(target: &mut dyn Target, sink: &mut dyn Sink) {
    let mut changes = batch(20..29).changes;
    let Some(bad) = target.refused(changes[4].clone()) else { return };
    changes[4] = bad;
    assert_eq!(deliver(sink, changes, progress(1, 20, 0)).await, [24]);
    let mut found = ids(target).await;
    assert_eq!(found.remove(&24), None);
    let others: Vec<u64> = found.into_keys().filter(|id| *id >= 20).collect();
    assert_eq!(others, [20, 21, 22, 23, 25, 26, 27, 28]);
}

/// Progress within an epoch only grows, a retry has a number of its own, a rewind begins a new
/// epoch, and who was overtaken by another writes nothing.
async fn only_one_writes(target: &mut dyn Target, mut zombie: Box<dyn Sink>) {
    let (mut sink, kept) = opened(target.config()).await;
    let at = kept.expect("progress").cursor;
    deliver(&mut *sink, batch(at..at + 3).changes, progress(1, at, 0)).await;
    let before = ids(target).await;
    let late = zombie.write(&batch(at..at + 3), &progress(1, at + 3, 0)).await;
    let late = match late {
        Ok(Written::Until(_)) => zombie.write(&Batch::default(), &progress(1, at + 3, 0)).await,
        written => written,
    };
    assert_eq!(late.expect_err("two write").class(), Class::Retry);
    assert_eq!(ids(target).await, before, "the one that was overtaken wrote nothing");

    let at = at + 3;
    let mut again = batch(100..101).changes;
    again[0].offset = 1; // parked long ago
    let sent = sink.write(&Batch { changes: again, position: None }, &progress(1, at, 1)).await;
    if matches!(sent, Ok(Written::Until(_))) {
        sink.write(&Batch::default(), &progress(1, at, 1)).await.unwrap();
    } else {
        sent.unwrap();
    }
    drop(sink);
    let (mut sink, kept) = opened(target.config()).await;
    assert_eq!(kept, Some(progress(1, at, 1)), "the number of the retry");
    assert_eq!(ids(target).await.get(&100), Some(&1));

    deliver(&mut *sink, batch(200..203).changes, progress(2, 5, 1)).await;
    drop(sink);
    let (_sink, kept) = opened(target.config()).await;
    assert_eq!(kept, Some(progress(2, 203, 1)), "an older offset in a newer epoch");
    assert_eq!(ids(target).await.get(&202), Some(&1));
}

/// The named points of a sink's loop.
pub(super) const POINTS: [&str; 4] = [
    "deliver::before_transform:2",
    "deliver::before_write:3",
    "deliver::after_write:4",
    "deliver::before_advance:1",
];

/// Under a load, with the process killed at every step and the server once: nothing is lost,
/// nothing is out of order, and nothing came twice where the sink says so.
pub(crate) async fn holds_through_kills(target: &mut dyn Target) {
    let caps = capabilities(target);
    let cluster = Cluster::start().await;
    Ledger::create(&cluster).await;
    let tables = tables(target);
    if caps.state_target {
        // A target that keeps states needs whole rows.
        cluster.sql("alter table ledger.document replica identity full").await;
    }
    let mut sink = target.ledger_config();
    sink["retry_ms_min"] = 10.into();
    sink["retry_ms_max"] = 200.into();
    let sink = toml::to_string(&serde_json::json!({"sink": {"kills": sink}})).unwrap();
    let source = source_toml("app", &cluster.unix_url());
    let mut server = Server::new(&format!("{source}tables = {tables:?}\n\n{sink}"));
    server.start_ready().await;
    server.kill();
    let pace = Pace { seed: 11, sessions: 2, pause: target.pause() };
    let load = Ledger::load(&cluster, pace);
    let points = POINTS.iter().copied().chain(target.failpoints().iter().copied());
    for point in points {
        server.start_to_die_at(point);
        let died = server.wait_exit(Duration::from_secs(60)).await;
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&died), Some(9), "at {point}");
    }
    server.start_ready().await;
    if target.is_durable() {
        target.stop().await;
        tokio::time::sleep(Duration::from_millis(500)).await; // some changes come meanwhile
        target.start().await;
    }
    load.stop().await;
    cluster.sql("insert into ledger.tx values (-1, 0, now())").await;
    let written = cluster.value("select pg_current_wal_lsn()").await;
    let written = written.as_str().unwrap();
    let captured = format!("select confirmed_flush_lsn >= '{written}' from pg_replication_slots");
    let done = async || {
        (cluster.value(&captured).await == true).then_some(())?;
        let behind = server.metric("walrace_sink_behind_changes", &["kills"]).await?;
        let parked = server.metric("walrace_sink_parked_changes", &["kills"]).await?;
        (behind == 0.0 && parked == 0.0).then_some(())
    };
    wait_for(Duration::from_secs(120), done, || server.log_tail()).await;
    assert!(server.stop().await.success());
    compare(target, caps, &cluster).await;
}

/// What the sink of a target declares about itself.
pub(crate) fn capabilities(target: &dyn Target) -> Capabilities {
    open(target.ledger_config()).unwrap().capabilities()
}

/// The tables of the ledger that a target takes, as a configuration names them.
pub(crate) fn tables(target: &dyn Target) -> Vec<String> {
    target.tables().iter().map(|table| format!("ledger.{table}")).collect()
}

/// What a target holds against the tables that it was made from: nothing lost, in the order of each
/// key, and each change once where the sink says so, else again only with the same idempotency key.
pub(crate) async fn compare(target: &mut dyn Target, caps: Capabilities, cluster: &Cluster) {
    let content = target.content().await;
    let state = Ledger::final_state(cluster).await.only(target.tables());
    if caps.state_target {
        let mut found = State::default();
        for item in content {
            let name = item["table"].as_str().unwrap();
            let table = name.rsplit('.').next().unwrap_or(name);
            found.insert(table, item["row"].clone());
        }
        found.without("t").assert_equal(&state);
        return;
    }
    let mut changes: Vec<Json> =
        content.into_iter().filter(|change| change["source_table"] != "t").collect();
    let once = caps.transactional_progress;
    ordered_per_key(&changes);
    changes.sort_by_key(|change| change["offset"].as_u64());
    let messages = Ledger::messages(cluster).await;
    let delivery = if once { Delivery::Once } else { Delivery::AtLeastOnce };
    let report = check(&changes, &state, &messages, delivery);
    println!("{} changes, {} twice", report.changes, report.duplicates);
    report.assert_clean();
}

/// What comes for the first time comes in order, key for key; what comes again has the same
/// idempotency key.
pub(super) fn ordered_per_key(changes: &[Json]) {
    let mut last = BTreeMap::new();
    let mut ids = BTreeMap::new();
    for change in changes {
        let offset = change["offset"].as_u64().unwrap();
        let id = change["idempotency_key"].to_string();
        if let Some(first) = ids.insert(offset, id.clone()) {
            assert_eq!(first, id, "offset {offset} came with two idempotency keys");
            continue;
        }
        let key = format!("{}{}", change["source_table"], change["key"]);
        let before = last.insert(key.clone(), offset);
        assert!(before < Some(offset), "{key}: {offset} after {before:?}");
    }
}
