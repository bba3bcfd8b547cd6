//! What rules do to changes.

use std::sync::Arc;

use bytes::Bytes;
use serde_json::{Value as Json, json};

use super::Transform;
use crate::{
    change::{Before, Change, Lsn, Message, Op, Row, Timestamp, Transaction, Value},
    config::{self, Format},
    error::{Class, Result},
    format::{Encoder, Names},
    schema::{Column, Identity, Table, Type},
};

mod columns;
mod examples;
mod expressions;
mod functions;
mod keys;
mod mistakes;
mod outbox;
mod plain;

const ORDERS: &[(&str, u32)] = &[
    ("id", 20),
    ("email", 25),
    ("phone", 25),
    ("status", 25),
    ("net", 1700),
    ("items", 3802),
    ("tenant", 2950),
];
const ANN: [&str; 7] = [
    "1",
    "ann@example.org",
    "+49 170 1234567",
    "paid",
    "100.00",
    r#"[{"sku": "A-1", "qty": 2}, {"sku": "B-7", "qty": 1}]"#,
    "6f1c",
];

fn table(name: &str, columns: &[(&str, u32)], identity: Identity) -> Arc<Table> {
    let column = |(index, (name, oid)): (usize, &(&str, u32))| Column {
        name: (*name).to_owned(),
        ty: Type::base(*oid, -1),
        primary_key: index == 0,
        identity: index == 0 || identity == Identity::Full,
        nullable: None,
    };
    let columns = columns.iter().enumerate().map(column).collect();
    Arc::new(Table { oid: 7, schema: "public".into(), name: name.into(), identity, columns })
}

fn row(texts: &[&str]) -> Row {
    Row::from_values(texts.iter().map(|text| match *text {
        "NULL" => Value::Null,
        "?" => Value::Unchanged,
        text => Value::Text(text.as_bytes()),
    }))
}

fn change(table: &Arc<Table>, op: Op, before: Before, after: Option<Row>) -> Change {
    Change {
        offset: 41,
        op,
        index: 3,
        closes_transaction: true,
        transaction: Transaction {
            xid: 700,
            commit_lsn: Lsn(0x16B_3748),
            commit_time: Timestamp(1_775_466_862_000_123),
        },
        table: Some(Arc::clone(table)),
        before,
        after,
        message: None,
        shaped: None,
        backfill: None,
    }
}

/// The update of an order that the docs show: `status` was `new`.
fn update() -> Change {
    let orders = table("orders", ORDERS, Identity::Full);
    let mut old = ANN;
    old[3] = "new";
    change(&orders, Op::Update, Before::Full(row(&old)), Some(row(&ANN)))
}

fn insert(columns: &[(&str, u32)], texts: &[&str]) -> Change {
    let table = table("t", columns, Identity::Default);
    change(&table, Op::Insert, Before::Nothing, Some(row(texts)))
}

fn message(prefix: &str, content: &'static str) -> Change {
    let message = Message {
        prefix: prefix.into(),
        content: Bytes::from_static(content.as_bytes()),
        transactional: true,
    };
    let orders = table("orders", ORDERS, Identity::Full);
    let change = change(&orders, Op::Message, Before::Nothing, None);
    Change { table: None, message: Some(Arc::new(message)), ..change }
}

fn compile(rules: &str) -> Result<Transform> {
    let rules: config::Rules = toml::from_str(rules).unwrap_or_else(|e| panic!("{rules}: {e}"));
    let kind = config::SinkKind::Stdout(config::Stdout::default());
    Transform::new("s", &config::Sink { rules, ..config::Sink::of(kind) })
}

fn shape(rules: &str, change: Change) -> Result<Vec<Change>> {
    compile(rules).unwrap().shape(change)
}

fn native(change: &Change) -> Json {
    let mut out = Vec::new();
    Encoder::new(Format::Native, &Names::default()).encode(change, &mut out).unwrap();
    serde_json::from_slice(&out).unwrap()
}

/// What the docs show of a change.
fn shown(change: &Change) -> Json {
    let mut shown = serde_json::Map::new();
    let mut put =
        |name: &str, value: Json| (!value.is_null()).then(|| shown.insert(name.into(), value));
    put("route", json!(change.route()));
    let shaped = change.shaped.clone().unwrap_or_default();
    put("key", json!(shaped.key));
    if !shaped.headers.is_empty() {
        let header = |(name, value): &(String, String)| (name.clone(), json!(value));
        put("headers", shaped.headers.iter().map(header).collect());
    }
    if let Some(payload) = &shaped.payload {
        put("payload", serde_json::from_slice(payload).unwrap_or_else(|_| json!(payload)));
        return shown.into();
    }
    let envelope = native(change);
    for field in ["op", "key", "before", "after"] {
        if field != "key" || shaped.key.is_none() {
            put(field, envelope[field].clone());
        }
    }
    shown.into()
}

fn after(rules: &str, change: Change) -> Json {
    let changes = shape(rules, change).unwrap();
    assert_eq!(changes.len(), 1, "{changes:?}");
    native(&changes[0])["after"].clone()
}

fn fails(rules: &str, change: Change) -> String {
    let error = shape(rules, change).unwrap_err();
    assert_eq!(error.class(), Class::Data, "{error}");
    assert!(error.to_string().starts_with("by the rules of sink s: "), "{error}");
    error.to_string().replacen("by the rules of sink s: ", "", 1)
}

fn refused(rules: &str) -> String {
    let error = compile(rules).unwrap_err();
    assert_eq!(error.class(), Class::Config, "{error}");
    error.to_string()
}

/// What an example is about: an outbox row where there is an outbox, else the order.
fn example(rules: &str) -> Change {
    if !rules.contains("[outbox]") {
        return update();
    }
    let columns = [
        ("id", 2950),
        ("topic", 25),
        ("aggregate_id", 25),
        ("type", 25),
        ("headers", 3802),
        ("payload", 114),
    ];
    let outbox = table("outbox", &columns, Identity::Default);
    let texts = [
        "0d9c",
        "orders",
        "order-1",
        "OrderPaid",
        r#"{"trace": "af31", "attempt": 1}"#,
        r#"{"order": 1,  "total": 119.0}"#,
    ];
    change(&outbox, Op::Insert, Before::Nothing, Some(row(&texts)))
}

#[test]
fn no_rule_leaves_a_change_as_it_is() {
    let mut transform = compile("").unwrap();
    assert!(transform.is_plain());
    assert_eq!(transform.shape(update()).unwrap(), [update()]);
    assert!(!compile("where = \"true\"").unwrap().is_plain());
}
