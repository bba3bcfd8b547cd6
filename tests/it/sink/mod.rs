//! The sinks, against real servers.

use std::{ops::Range, path::Path, sync::Arc};

use serde_json::Value as Json;
use uuid::Uuid;
use walrace::{
    change::{Batch, Before, Change, Lsn, Op, Row, Timestamp, Transaction, Value},
    error::{Error, Result},
    format::Names,
    schema::{Column, Identity, Table, Type},
    sink::{self, Context, Outcome, Progress, Sink, Written},
};

pub(crate) mod conformance;
mod custom;
#[cfg(feature = "kafka")]
pub(crate) mod kafka;
#[cfg(feature = "kafka")]
pub(crate) mod kafka_target;
pub(crate) mod nats;
pub(crate) mod object_store;
pub(crate) mod opensearch;
mod pages;
pub(crate) mod plain;
pub(crate) mod postgres;
mod pull;
mod pull_target;
mod queue;
pub(crate) mod rabbitmq;
mod receiver;
pub(crate) mod redis;
mod replica;
pub(crate) mod target;
mod webhook;

fn context() -> Context {
    Context::new(Path::new("walrace-data"), Names::default(), Uuid::from_u128(7))
}

/// The sink that this configuration describes.
fn open(config: Json) -> Result<Box<dyn Sink>> {
    sink::open("hook", &serde_json::from_value(config).unwrap(), &context())
}

/// Inserts with these offsets, each its own transaction.
fn batch(offsets: Range<u64>) -> Batch {
    let column = |name: &str, oid, key| Column {
        name: name.into(),
        ty: Type::base(oid, -1),
        primary_key: key,
        identity: key,
        nullable: None,
    };
    let table = Arc::new(Table {
        oid: 1,
        schema: "public".into(),
        name: "t".into(),
        identity: Identity::Default,
        columns: vec![column("id", 20, true), column("v", 25, false)],
    });
    let change = |offset: u64| Change {
        offset,
        op: Op::Insert,
        index: 0,
        closes_transaction: true,
        transaction: Transaction {
            xid: 1,
            commit_lsn: Lsn(offset),
            commit_time: Timestamp(1_775_466_862_000_123),
        },
        table: Some(Arc::clone(&table)),
        before: Before::Nothing,
        after: Some(Row::from_values([
            Value::Text(offset.to_string().as_bytes()),
            Value::Text("ü \"quoted\"".as_bytes()),
        ])),
        message: None,
        shaped: None,
        backfill: None,
    };
    Batch { changes: offsets.map(change).collect(), position: None }
}

/// With a row of more bytes than the queues of the kit take as a message.
fn too_large(change: Change) -> Change {
    with_text(change, &"x".repeat(70_000))
}

fn with_text(change: Change, text: &str) -> Change {
    let id = change.offset.to_string();
    let values = [Value::Text(id.as_bytes()), Value::Text(text.as_bytes())];
    Change { after: Some(Row::from_values(values)), ..change }
}

fn truncate(offset: u64) -> Change {
    Change { op: Op::Truncate, after: None, ..batch(offset..offset + 1).changes.remove(0) }
}

async fn write(sink: &mut dyn Sink, batch: &Batch) -> Result<Written> {
    let cursor = batch.end().unwrap_or(0);
    let progress = Progress { lineage: Uuid::from_u128(7), epoch: 1, cursor, retry_seq: 0 };
    sink.write(batch, &progress).await
}

async fn delivers(sink: &mut dyn Sink, batch: &Batch) {
    let written = write(sink, batch).await;
    assert!(matches!(written, Ok(Written::All)), "{written:?}");
}

async fn fails(sink: &mut dyn Sink, batch: &Batch) -> Error {
    write(sink, batch).await.expect_err("a failure")
}

/// One letter for each outcome: durable, refused, unknown.
fn letters(written: &Written) -> String {
    let Written::Each(outcomes) = written else { panic!("{written:?}") };
    let letter = |outcome: &Outcome| match outcome {
        Outcome::Durable => 'd',
        Outcome::Refused(_) => 'r',
        Outcome::Unknown => 'u',
    };
    outcomes.iter().map(letter).collect()
}

fn offsets(messages: &[Json]) -> Vec<u64> {
    messages.iter().map(|message| message["offset"].as_u64().unwrap()).collect()
}
