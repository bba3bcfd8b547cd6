//! The formats `debezium` and `debezium_schema`: what Debezium itself wrote of the same changes
//! (tests/fixtures/debezium), and what its own classes read of ours.

use std::{
    io::Write as _,
    path::PathBuf,
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use serde_json::{Value, json};
use walrace::{
    change::{Before, Change, Lsn, Message, Op, Row, Timestamp, Transaction, Value as Field},
    config::Format,
    format::{Encoder, Names},
    schema::{Column, Identity, Table, Type},
};

use crate::kit::{Cluster, FileRecorder, Server, source_toml};

const PATIENCE: Duration = Duration::from_secs(60);
const TABLES: &str = include_str!("../fixtures/debezium/tables.sql");
const CHANGES: &str = include_str!("../fixtures/debezium/changes.sql");
const RECORDED: &str = include_str!("../fixtures/debezium/events.ndjson");
const VALUE_SCHEMA: &str = include_str!("../../docs/schema/debezium.schema.json");
const WITH_SCHEMA: &str = include_str!("../../docs/schema/debezium_schema.schema.json");
const SERDE_VERSION: &str = "3.6.3.Final";

/// Columns of `all_types` that Debezium leaves out, for it does not know their types.
const UNKNOWN_TO_DEBEZIUM: [&str; 11] = [
    "c_box",
    "c_line",
    "c_circle",
    "c_path",
    "c_lseg",
    "c_polygon",
    "c_pair",
    "c_xid",
    "c_pglsn",
    "c_intmr",
    "c_name",
];

/// Both formats of one run of the fixture's changes, as the real binary wrote them.
async fn run() -> (Cluster, Server, Vec<Value>, Vec<Value>) {
    let cluster = Cluster::start().await;
    cluster.sql(TABLES).await;
    let sink = |name: &str| {
        format!("\n[sink.{name}]\nkind = \"file\"\npath = \"{name}.jsonl\"\nformat = \"{name}\"\n")
    };
    let sinks = format!("{}{}", sink("debezium"), sink("debezium_schema"));
    let mut server = Server::new(&format!("{}{sinks}", source_toml("app", &cluster.unix_url())));
    server.start_ready().await;
    // Each statement is a transaction of its own, as it was when Debezium wrote its events.
    for statement in CHANGES.split(';').filter(|statement| !statement.trim().is_empty()) {
        cluster.sql(statement).await;
    }
    let plain = FileRecorder::new(server.path("debezium.jsonl"));
    let with = FileRecorder::new(server.path("debezium_schema.jsonl"));
    let both = |seen: &[Value]| seen.iter().filter(|event| event["op"] == "m").count() == 2;
    let plain = plain.wait_until(PATIENCE, both).await;
    let with = with
        .wait_until(PATIENCE, |seen| {
            seen.iter().filter(|event| event["payload"]["op"] == "m").count() == 2
        })
        .await;
    (cluster, server, plain, with)
}

/// Debezium's events, without its tombstones.
fn recorded() -> Vec<Value> {
    let lines = RECORDED.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter(|event| event.get("tombstone").is_none()).collect()
}

fn number(value: &Value) -> Option<f64> {
    value.as_f64().filter(|_| value.is_number())
}

/// Equal, where `1.0` and `1` are one number.
fn same(ours: &Value, theirs: &Value) -> bool {
    match (ours, theirs) {
        (Value::Array(a), Value::Array(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b))
        }
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len() && a.iter().all(|(k, a)| b.get(k).is_some_and(|b| same(a, b)))
        }
        (a, b) => a == b || number(a).zip(number(b)).is_some_and(|(a, b)| a == b),
    }
}

/// What docs/formats.md names as different.
fn differs(table: &str, column: &str, op: &str, row: &str) -> bool {
    let of_all_types = UNKNOWN_TO_DEBEZIUM.contains(&column)
        // Debezium has numbers for infinite dates that no date is near to, and drops the
        // microseconds of a time within an array.
        || matches!(column, "c_times" | "c_date");
    // Debezium fills in a zero where a required column of the old row was not sent.
    let filled_in = op == "d" && row == "before";
    table == "all_types" && of_all_types || table == "uidx" && column == "id" && filled_in
}

fn compare_row(event: &Value, ours: &Value, row: &str) {
    let (table, op) = (event["table"].as_str().unwrap(), event["op"].as_str().unwrap());
    let (Some(theirs), Some(ours)) = (event[row].as_object(), ours[row].as_object()) else {
        assert_eq!(ours[row].is_null(), event[row].is_null(), "{row} of {op} of {table}");
        return;
    };
    for (column, value) in ours {
        if differs(table, column, op, row) {
            continue;
        }
        let expected = theirs.get(column).unwrap_or_else(|| panic!("{table}.{column} is new"));
        assert!(same(value, expected), "{op} {table}.{column}: {value}, Debezium {expected}");
    }
    for column in theirs.keys() {
        assert!(ours.contains_key(column), "{table}.{column} is missing");
    }
}

/// The types of the columns, but for what Debezium knows of defaults, labels and of `NOT NULL`.
fn compare_columns(event: &Value, ours: &Value) {
    let table = event["table"].as_str().unwrap();
    let fields = ours["schema"]["fields"].as_array().unwrap();
    let after = fields.iter().find(|field| field["field"] == "after").unwrap();
    for expected in event["columns"].as_array().unwrap() {
        let name = &expected["field"];
        let columns = after["fields"].as_array().unwrap();
        let found = columns.iter().find(|column| column["field"] == *name);
        let mut found = found.unwrap_or_else(|| panic!("no schema of {table}.{name}")).clone();
        let mut expected = expected.clone();
        for side in [&mut found, &mut expected] {
            let side = side.as_object_mut().unwrap();
            side.remove("optional");
            side.remove("default");
        }
        if matches!(name.as_str(), Some("c_mood" | "c_moods")) {
            continue;
        }
        assert_eq!(found, expected, "{table}.{name}");
    }
}

fn validate(schema: &str, events: &[Value]) {
    let validator = jsonschema::validator_for(&serde_json::from_str(schema).unwrap()).unwrap();
    for event in events {
        if let Err(error) = validator.validate(event) {
            panic!("{error}\n{event:#}");
        }
    }
}

/// Runs tests/fixtures/java/ReadDebezium.java over lines of a key, a tab and a value.
fn read_with_debezium(lines: &str) -> Vec<Value> {
    let cache = std::env::var("WALRACE_CACHE").expect("WALRACE_CACHE: . scripts/environment.sh");
    let jars = PathBuf::from(cache).join(format!("debezium-serde-{SERDE_VERSION}"));
    assert!(jars.is_dir(), "{} is missing: run scripts/install.sh test", jars.display());
    let program = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/java/ReadDebezium.java");
    let mut child = Command::new("java")
        .args(["-Xmx256m", "-cp", &format!("{}/*", jars.display()), program])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("java: run scripts/install.sh test");
    let mut stdin = child.stdin.take().unwrap();
    let text = lines.to_owned();
    let writer = std::thread::spawn(move || stdin.write_all(text.as_bytes()));
    let output = child.wait_with_output().unwrap();
    let _ = writer.join().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "Debezium's classes refuse it:\n{errors}");
    let lines = std::str::from_utf8(&output.stdout).unwrap().lines();
    lines.map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[tokio::test]
async fn every_event_of_a_real_run_is_what_debezium_wrote_and_its_classes_read_it() {
    let (_cluster, _server, plain, with) = run().await;
    let recorded = recorded();
    assert_eq!(plain.len(), recorded.len());
    validate(VALUE_SCHEMA, &plain);
    validate(WITH_SCHEMA, &with);
    for ((plain, with), event) in plain.iter().zip(&with).zip(&recorded) {
        assert_eq!(plain, &with["payload"], "the schema adds nothing to the payload");
        assert_eq!(plain["op"], event["op"]);
        assert_eq!(plain["source"]["table"], event["table"]);
        if event.get("message").is_some() {
            assert_eq!(plain["message"], event["message"]);
            continue;
        }
        compare_row(event, plain, "before");
        compare_row(event, plain, "after");
        if event.get("columns").is_some() {
            compare_columns(event, with);
        }
    }
    for (table, index) in [("all_types", 0), ("", recorded.len() - 2)] {
        let mut schema = with[index]["schema"].clone();
        let fields = schema["fields"].as_array_mut().unwrap();
        fields.retain(|field| field["field"] != "before" && field["field"] != "after");
        assert_eq!(schema, recorded[index]["schema"], "the envelope of `{table}`");
    }
    let lines: Vec<String> = with.iter().map(|event| format!("\t{event}")).collect();
    let read = read_with_debezium(&(lines.join("\n") + "\n"));
    assert_eq!(read.len(), with.len());
    let words = json!({"c": "CREATE", "u": "UPDATE", "d": "DELETE", "t": "TRUNCATE",
                       "m": "MESSAGE"});
    for (read, event) in read.iter().zip(&plain) {
        let op = event["op"].as_str().unwrap();
        assert_eq!(read["operation"], words[op]);
        assert_eq!(read["envelope"], op != "m");
        assert!(
            same(&read["serde"], &event.get("after").cloned().unwrap_or_default())
                || event["after"]["c_float8"].is_string(),
            "{read:#}"
        );
    }
    let first = &read[0]["after"];
    assert_eq!(first["c_num"], "123.45");
    assert_eq!(first["c_num102"], json!(99.95));
    assert_eq!(first["c_money"], json!(1234.5));
    assert_eq!(first["c_int8"], 9_007_199_254_740_993_u64);
    assert_eq!(first["c_bytea"], "AP8Q");
    assert_eq!(first["c_bit8"], "{0, 5, 7}");
    assert_eq!(first["c_ts"], 1_775_466_862_000_123_u64);
    assert_eq!(first["c_tstz"], "2026-04-06T09:14:22.000123Z");
    assert_eq!(first["c_nums"], json!(["1.5", "2.25"]));
    assert_eq!(first["c_point"]["x"], json!(1.5));
    assert_eq!(first["c_box"], "(1,1),(0,0)", "a type that Debezium leaves out is its text");
    assert_eq!(first["c_name"], "nm");
}

fn keyed() -> Arc<Table> {
    let column = |name: &str, oid, key| Column {
        name: name.into(),
        ty: Type::base(oid, -1),
        primary_key: key,
        identity: key,
        nullable: Some(!key),
    };
    Arc::new(Table {
        oid: 1,
        schema: "public".into(),
        name: "keyed".into(),
        identity: Identity::Default,
        columns: vec![column("a", 23, true), column("b", 25, true), column("v", 1700, false)],
    })
}

fn row(values: [Option<&str>; 3]) -> Row {
    Row::from_values(values.map(|v| v.map_or(Field::Null, |text| Field::Text(text.as_bytes()))))
}

fn change(op: Op, before: Before, after: Option<Row>) -> Change {
    let message = Message {
        prefix: "outbox".into(),
        content: Bytes::from_static(b"text"),
        transactional: true,
    };
    Change {
        offset: 1,
        op,
        index: 2,
        closes_transaction: true,
        transaction: Transaction {
            xid: 7,
            commit_lsn: Lsn(0x016B_6A90),
            commit_time: Timestamp(1_775_466_862_000_123),
        },
        table: (op != Op::Message).then(keyed),
        before,
        after,
        message: (op == Op::Message).then(|| Arc::new(message)),
        shaped: None,
        backfill: None,
    }
}

#[test]
fn debezium_reads_every_key_and_the_tombstone_after_a_delete() {
    let key = || Before::Key(row([Some("1"), Some("x"), None]));
    let new = || Some(row([Some("1"), Some("x"), Some("-12.500")]));
    let changes = [
        change(Op::Read, Before::Nothing, new()),
        change(Op::Insert, Before::Nothing, new()),
        change(Op::Update, key(), new()),
        change(Op::Delete, key(), None),
        change(Op::Truncate, Before::Nothing, None),
        change(Op::Message, Before::Nothing, None),
    ];
    let names = Names { source: "app".into(), database: "harbor".into(), ..Names::default() };
    let mut encoder = Encoder::new(Format::DebeziumSchema, &names);
    let mut lines = Vec::new();
    for change in &changes {
        let start = lines.len();
        encoder.encode_key(change, &mut lines).unwrap();
        let key = lines[start..].to_vec();
        lines.push(b'\t');
        encoder.encode(change, &mut lines).unwrap();
        lines.push(b'\n');
        assert_eq!(encoder.tombstone(change), change.op == Op::Delete);
        if encoder.tombstone(change) {
            lines.extend_from_slice(&key);
            lines.extend_from_slice(b"\t\n");
        }
    }
    let read = read_with_debezium(std::str::from_utf8(&lines).unwrap());
    let operations: Vec<_> = read.iter().map(|event| event["operation"].as_str()).collect();
    assert_eq!(
        operations,
        [
            Some("READ"),
            Some("CREATE"),
            Some("UPDATE"),
            Some("DELETE"),
            None,
            Some("TRUNCATE"),
            Some("MESSAGE")
        ]
    );
    let key = json!({"a": 1, "b": "x"});
    assert!(read[..5].iter().all(|event| event["key"] == key), "{read:#?}");
    assert_eq!(read[4], json!({"key": key}), "a tombstone is a key without a value");
    assert_eq!(read[5]["key"], json!(null));
    assert_eq!(read[6]["key"], json!({"prefix": "outbox"}));
    assert_eq!(read[6]["message"], json!({"prefix": "outbox", "content": "dGV4dA=="}));
    assert_eq!(read[0]["source"]["snapshot"], "incremental");
    assert_eq!(read[0]["after"]["v"], "-12.5");
    assert_eq!(read[3]["before"], json!({"a": 1, "b": "x", "v": null}));
    assert_eq!(read[1]["source"]["sequence"], "[\"23816848\",\"2\"]");
}
