//! The formats, on one table and every kind of change.

use std::sync::Arc;

use bytes::Bytes;

use super::{Encoder, Names};
use crate::{
    change::{Before, Change, Lsn, Message, Op, Row, Timestamp, Transaction, Value},
    config::Format,
    schema::{Column, Identity, Table, Type},
};

mod documented;
mod encoders;
mod schemas;
mod shapes;
mod structures;
mod values;
mod walstream;

/// Every format whose messages are JSON.
const TEXTS: [Format; 7] = [
    Format::Native,
    Format::Sequin,
    Format::Debezium,
    Format::DebeziumSchema,
    Format::Wal2json,
    Format::Cloudevents,
    Format::CloudeventsBinary,
];

fn column(name: &str, oid: u32, key: bool) -> Column {
    Column {
        name: name.into(),
        ty: Type::base(oid, -1),
        primary_key: key,
        identity: key,
        nullable: None,
    }
}

fn bookings() -> Arc<Table> {
    Arc::new(Table {
        oid: 16_385,
        schema: "public".into(),
        name: "bookings".into(),
        identity: Identity::Default,
        columns: vec![
            column("booking_id", 20, true),
            column("status", 25, false),
            column("confirmed_at", 1184, false),
            column("amount", 1700, false),
            column("notes \"x\"", 25, false),
        ],
    })
}

fn row(values: [Option<&str>; 5]) -> Row {
    let value =
        |text: Option<&'static str>| text.map_or(Value::Null, |t| Value::Text(t.as_bytes()));
    let values = values.map(|v| v.map(|v| &*Box::leak(v.to_owned().into_boxed_str())));
    Row::from_values(values.map(value))
}

const OLD: [Option<&str>; 5] = [Some("8841"), Some("pending"), None, Some("2200.00"), Some("a\nb")];
const NEW: [Option<&str>; 5] = [
    Some("8841"),
    Some("confirmed"),
    Some("2026-04-06 09:14:22+00"),
    Some("2200.00"),
    Some("a\nb"),
];
const KEY: [Option<&str>; 5] = [Some("8841"), None, None, None, None];

fn change(op: Op, before: Before, after: Option<Row>) -> Change {
    Change {
        offset: 12,
        op,
        index: 1,
        closes_transaction: true,
        transaction: Transaction {
            xid: 731_992,
            commit_lsn: Lsn(0x016B_6A90),
            commit_time: Timestamp(1_775_466_862_000_123),
        },
        table: Some(bookings()),
        before,
        after,
        message: None,
        shaped: None,
        backfill: None,
    }
}

fn message(content: &'static [u8]) -> Change {
    let message = Message {
        prefix: "outbox".into(),
        content: Bytes::from_static(content),
        transactional: true,
    };
    Change {
        table: None,
        message: Some(Arc::new(message)),
        shaped: None,
        backfill: None,
        ..change(Op::Message, Before::Nothing, None)
    }
}

fn unchanged_notes() -> Row {
    let [a, b, c, d, _] = NEW;
    let values = [a, b, c, d].map(|text| Value::Text(text.unwrap().as_bytes()));
    Row::from_values(values.into_iter().chain([Value::Unchanged]))
}

/// One of each kind that a format has to tell apart, with its name.
fn every_kind() -> Vec<(&'static str, Change)> {
    let full = || Before::Full(row(OLD));
    let moved = [Some("9"), Some("confirmed"), None, Some("2200.00"), None];
    vec![
        ("insert", change(Op::Insert, Before::Nothing, Some(row(NEW)))),
        ("update without an old row", change(Op::Update, Before::Nothing, Some(row(NEW)))),
        ("update with the old row", change(Op::Update, full(), Some(row(NEW)))),
        ("update of the key", change(Op::Update, Before::Key(row(KEY)), Some(row(moved)))),
        ("update, value not sent", change(Op::Update, Before::Nothing, Some(unchanged_notes()))),
        ("update, value completed", change(Op::Update, full(), Some(unchanged_notes()))),
        ("delete with the key", change(Op::Delete, Before::Key(row(KEY)), None)),
        ("delete with the old row", change(Op::Delete, full(), None)),
        ("read", change(Op::Read, Before::Nothing, Some(row(NEW)))),
        ("truncate", change(Op::Truncate, Before::Nothing, None)),
        ("message of text", message(b"{\"a\": 1}\n")),
        ("message of bytes", message(b"\xff\x00")),
    ]
}

fn names() -> Names {
    Names {
        source: "app".into(),
        database: "harbor".into(),
        hostname: "db.local".into(),
        sink: "lake".into(),
    }
}

/// Every kind in one format, as lines; what the format has no message for is named.
fn lines(mut encoder: Encoder) -> String {
    let mut out = Vec::new();
    for (name, change) in every_kind() {
        out.extend_from_slice(format!("{name}: ").as_bytes());
        if !encoder.encode(&change, &mut out).unwrap() {
            out.extend_from_slice(b"(nothing)");
        }
        out.push(b'\n');
    }
    String::from_utf8(out).unwrap()
}
