use std::sync::Arc;

use bytes::Bytes;
use proptest::prelude::*;
use serde_json::{Value as Json, json};

use super::{
    Encoder, Names,
    json::{Dialect, Shape, write_str, write_value},
};
use crate::{
    change::{Before, Change, Lsn, Message, Op, Row, Timestamp, Transaction, Value},
    config::Format,
    error::Class,
    schema::{Column, Identity, Table, Type, TypeKind},
};

const ORACLE: &str = include_str!("../../tests/fixtures/to_jsonb.ndjson");
const NATIVE_SCHEMA: &str = include_str!("../../docs/schema/native.schema.json");
const SEQUIN_SCHEMA: &str = include_str!("../../docs/schema/sequin.schema.json");
const DEBEZIUM_SCHEMA: &str = include_str!("../../docs/schema/debezium.schema.json");
const WITH_SCHEMA_SCHEMA: &str = include_str!("../../docs/schema/debezium_schema.schema.json");
const WAL2JSON_SCHEMA: &str = include_str!("../../docs/schema/wal2json.schema.json");
const CLOUDEVENTS_SCHEMA: &str = include_str!("../../docs/schema/cloudevents.schema.json");

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

fn shaped(ty: &Type, text: &[u8]) -> String {
    let mut out = Vec::new();
    write_value(&mut out, &Shape::of(ty, Dialect::Postgres), text).unwrap();
    String::from_utf8(out).unwrap()
}

/// Numbers by value: `-0`, `1e300` and `1.50` are written in more than one way.
fn by_value(json: Json) -> Json {
    match json {
        Json::Number(number) => json!(number.as_f64().unwrap() + 0.0),
        Json::Array(items) => items.into_iter().map(by_value).collect(),
        Json::Object(members) => members.into_iter().map(|(k, v)| (k, by_value(v))).collect(),
        other => other,
    }
}

#[test]
fn every_type_is_shaped_as_to_jsonb_of_postgres_shapes_it() {
    let mut seen = 0;
    for line in ORACLE.lines() {
        let line: Json = serde_json::from_str(line).unwrap();
        let ty: Type = serde_json::from_value(line["type"].clone()).unwrap();
        let text = line["text"].as_str().unwrap();
        let ours = shaped(&ty, text.as_bytes());
        assert!(!ours.contains('\n'), "{ours}");
        let ours: Json = serde_json::from_str(&ours).unwrap_or_else(|e| panic!("{ours}: {e}"));
        assert_eq!(by_value(ours), by_value(line["json"].clone()), "{} {text}", ty.name);
        seen += 1;
    }
    assert!(seen > 100, "only {seen} values in the fixture");
}

#[test]
fn a_builtin_array_of_which_only_the_oid_is_known_is_an_array() {
    assert_eq!(shaped(&Type::base(1007, -1), b"{1,NULL,3}"), "[1,null,3]");
    assert_eq!(shaped(&Type::base(1009, -1), br#"{a,"b\"c"}"#), r#"["a","b\"c"]"#);
}

#[test]
fn text_that_its_type_does_not_explain_is_a_string() {
    let array = Type {
        kind: TypeKind::Array { element: Box::new(Type::base(23, -1)), delimiter: ',' },
        ..Type::base(1007, -1)
    };
    for broken in ["{1,2", "1,2}", "{1,,2}", "{1}x", "{", "[0:1]", r#"{"a}"#, "{{1}{2}}"] {
        assert_eq!(shaped(&array, broken.as_bytes()), json!(broken).to_string());
    }
    let fields = vec![("a".into(), Type::base(23, -1)), ("b".into(), Type::base(25, -1))];
    let pair = Type { kind: TypeKind::Composite { fields }, ..Type::base(70_000, -1) };
    for broken in ["(1)", "(1,2,3)", "1,2", "(1,\"2)", "("] {
        assert_eq!(shaped(&pair, broken.as_bytes()), json!(broken).to_string());
    }
    for broken in ["{\"a\":", "\"\\ud800\"", "\"\\ud800\\u0041\"", "\"\\udc00\"", "nul"] {
        assert_eq!(shaped(&Type::base(114, -1), broken.as_bytes()), json!(broken).to_string());
    }
    for broken in ["01", "1.", ".5", "1e", "", "-", "+1", "1 ", "0x10"] {
        assert_eq!(shaped(&Type::base(1700, -1), broken.as_bytes()), json!(broken).to_string());
    }
    assert_eq!(shaped(&Type::base(16, -1), b"yes"), "\"yes\"");
    assert_eq!(shaped(&Type::base(3802, -1), b"{\n}"), "\"{\\n}\"");
}

proptest! {
    #[test]
    fn any_text_survives_as_a_string(text in any::<String>()) {
        let mut out = Vec::new();
        write_str(&mut out, &text);
        prop_assert_eq!(serde_json::from_slice::<String>(&out).unwrap(), text.clone());
        prop_assert_eq!(shaped(&Type::base(25, -1), text.as_bytes()), json!(text).to_string());
    }

    #[test]
    fn any_text_of_any_type_is_one_line_of_valid_json(
        text in prop_oneof![any::<String>(), r#"[\[\]{}(),"\\ 0-9a-eNUL:;.+-]{0,24}"#],
        oid in prop::sample::select(vec![
            16, 23, 25, 114, 1114, 1184, 1700, 3802, 22, 1007, 1009, 199,
        ])
    ) {
        // PostgreSQL guarantees jsonb; everything else is checked by us.
        let trusted = oid == 3802 && serde_json::from_str::<Json>(&text).is_err();
        prop_assume!(!trusted);
        let ours = shaped(&Type::base(oid, -1), text.as_bytes());
        prop_assert!(!ours.contains(['\n', '\r']));
        prop_assert!(serde_json::from_str::<Json>(&ours).is_ok(), "{}", ours);
    }

    #[test]
    fn arrays_of_text_survive(
        items in prop::collection::vec(prop::option::of(any::<String>()), 0..8)
    ) {
        let quoted = |item: &Option<String>| match item {
            None => "NULL".into(),
            Some(text) => format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"")),
        };
        let text = format!("{{{}}}", items.iter().map(quoted).collect::<Vec<_>>().join(","));
        let ours: Vec<Option<String>> =
            serde_json::from_str(&shaped(&Type::base(1009, -1), text.as_bytes())).unwrap();
        prop_assert_eq!(ours, items);
    }

    #[test]
    fn foreign_bytes_are_refused_or_shaped_and_never_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..40),
        oid in prop::sample::select(vec![16, 23, 25, 114, 1114, 1184, 3802, 22, 1007, 1009])
    ) {
        let mut out = b"kept".to_vec();
        let shape = Shape::of(&Type::base(oid, -1), Dialect::Postgres);
        match write_value(&mut out, &shape, &bytes) {
            Ok(()) => prop_assert!(std::str::from_utf8(&out).is_ok()),
            Err(_) => {
                prop_assert_eq!(&out, b"kept");
                prop_assert!(std::str::from_utf8(&bytes).is_err());
            }
        }
    }
}

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

fn assert_valid(schema: &str, encoder: &mut Encoder) -> Vec<Json> {
    let schema: Json = serde_json::from_str(schema).unwrap();
    assert!(jsonschema::meta::is_valid(&schema));
    let validator = jsonschema::validator_for(&schema).unwrap();
    let mut messages = Vec::new();
    for (name, change) in every_kind() {
        let mut out = Vec::new();
        if encoder.encode(&change, &mut out).unwrap() {
            let message: Json = serde_json::from_slice(&out).unwrap();
            if let Err(error) = validator.validate(&message) {
                panic!("{name}: {error}\n{message:#}");
            }
            messages.push(message);
        }
    }
    // A schema that lets everything pass proves nothing: each required member is really required.
    for member in schema["required"].as_array().unwrap() {
        let mut broken = messages[0].clone();
        broken.as_object_mut().unwrap().remove(member.as_str().unwrap());
        assert!(!validator.is_valid(&broken), "{member} is not required");
    }
    messages
}

#[test]
fn native_has_a_stable_shape() {
    insta::assert_snapshot!(lines(Encoder::new(Format::Native, &names())));
}

#[test]
fn sequin_has_a_stable_shape() {
    insta::assert_snapshot!(lines(Encoder::new(Format::Sequin, &names())));
}

#[test]
fn pretty_reads_as_one_plain_line_a_change() {
    insta::assert_snapshot!(lines(Encoder::pretty(false)));
}

#[test]
fn pretty_colours_only_where_asked() {
    assert!(lines(Encoder::pretty(true)).contains("\u{1b}[1m\u{1b}[33mupdate"));
    assert!(!lines(Encoder::pretty(false)).contains('\u{1b}'));
}

#[test]
fn pretty_cuts_long_values_and_lets_no_control_character_through() {
    let long = "é".repeat(200);
    let evil = [Some("1"), Some(long.as_str()), Some("\u{1b}[2J"), None, None];
    let mut out = Vec::new();
    Encoder::pretty(false)
        .encode(&change(Op::Insert, Before::Nothing, Some(row(evil))), &mut out)
        .unwrap();
    let line = String::from_utf8(out).unwrap();
    assert!(line.contains(&format!("status: {}…", "é".repeat(60))), "{line}");
    assert!(line.contains("·[2J"), "{line}");
}

#[test]
fn native_passes_its_schema() {
    let messages = assert_valid(NATIVE_SCHEMA, &mut Encoder::new(Format::Native, &names()));
    assert_eq!(messages.len(), every_kind().len());
}

#[test]
fn sequin_passes_its_schema_and_has_nothing_for_truncate_and_message() {
    let messages = assert_valid(SEQUIN_SCHEMA, &mut Encoder::new(Format::Sequin, &names()));
    assert_eq!(messages.len(), every_kind().len() - 3);
}

#[test]
fn the_idempotency_key_of_each_format_is_that_of_the_change() {
    for (_, change) in every_kind() {
        let mut out = Vec::new();
        Encoder::new(Format::Native, &names()).encode(&change, &mut out).unwrap();
        let native: Json = serde_json::from_slice(&out).unwrap();
        assert_eq!(native["idempotency_key"], change.idempotency_key());
    }
    let largest = Change {
        index: u32::MAX,
        transaction: Transaction { commit_lsn: Lsn(u64::MAX), ..Transaction::default() },
        ..message(b"")
    };
    let mut out = Vec::new();
    Encoder::new(Format::Native, &names()).encode(&largest, &mut out).unwrap();
    let native: Json = serde_json::from_slice(&out).unwrap();
    assert_eq!(native["idempotency_key"], largest.idempotency_key());
}

#[test]
fn a_delete_that_knows_only_another_index_has_that_index_as_its_key() {
    let mut table = (*bookings()).clone();
    table.identity = Identity::Index;
    table.columns[0].identity = false;
    table.columns[1].identity = true;
    let only_status = row([None, Some("pending"), None, None, None]);
    let change = Change {
        table: Some(Arc::new(table)),
        ..change(Op::Delete, Before::Key(only_status), None)
    };
    let mut out = Vec::new();
    Encoder::new(Format::Native, &names()).encode(&change, &mut out).unwrap();
    let native: Json = serde_json::from_slice(&out).unwrap();
    assert_eq!(native["key"], json!({"status": "pending"}));
    assert_eq!(native["before"], json!({"status": "pending"}));
}

#[test]
fn bytes_that_are_not_utf8_are_a_data_error_that_names_the_column_and_leaves_nothing_behind() {
    let values = [b"1".as_slice(), b"\xff", b"", b"1", b""].map(Value::Text);
    let change = change(Op::Insert, Before::Nothing, Some(Row::from_values(values)));
    for format in TEXTS.into_iter().chain([Format::Walstream]) {
        let mut out = b"kept".to_vec();
        let error = Encoder::new(format, &names()).encode(&change, &mut out).unwrap_err();
        assert_eq!(error.class(), Class::Data);
        assert!(error.to_string().contains("`status` of public.bookings"), "{error}");
        assert_eq!(out, b"kept");
    }
}

#[test]
fn a_row_that_does_not_fit_its_table_is_refused() {
    let change = change(Op::Insert, Before::Nothing, Some(Row::from_values([Value::Null])));
    for format in TEXTS.into_iter().chain([Format::Walstream]) {
        let error = Encoder::new(format, &names()).encode(&change, &mut Vec::new()).unwrap_err();
        assert_eq!(error.class(), Class::Bug, "{error}");
    }
}

#[test]
fn an_encoder_follows_the_versions_of_a_table() {
    let mut encoder = Encoder::new(Format::Native, &names());
    for round in 0..3000 {
        let mut table = (*bookings()).clone();
        table.columns[1].name = format!("status_{round}");
        let change = Change {
            table: Some(Arc::new(table)),
            ..change(Op::Insert, Before::Nothing, Some(row(NEW)))
        };
        let mut out = Vec::new();
        encoder.encode(&change, &mut out).unwrap();
        let native: Json = serde_json::from_slice(&out).unwrap();
        assert_eq!(native["after"][format!("status_{round}")], "confirmed");
    }
}

/// Without the version, which changes with each release.
fn stable(format: Format) -> String {
    let version = concat!("walrace-", env!("CARGO_PKG_VERSION"));
    lines(Encoder::new(format, &names())).replace(version, "walrace-VERSION")
}

/// The key and the headers of every kind in one format.
fn keys(format: Format) -> String {
    let mut encoder = Encoder::new(format, &names());
    let mut text = String::new();
    for (name, change) in every_kind() {
        let mut key = Vec::new();
        let keyed = encoder.encode_key(&change, &mut key).unwrap();
        assert_eq!(keyed, !key.is_empty());
        let key = String::from_utf8(key).unwrap();
        let then = if encoder.tombstone(&change) { ", then a tombstone" } else { "" };
        text.push_str(&format!("{name}: {key}{then}\n"));
        for (name, value) in encoder.headers(&change).unwrap() {
            text.push_str(&format!("  {name}: {value}\n"));
        }
    }
    text
}

#[test]
fn debezium_has_a_stable_shape() {
    insta::assert_snapshot!(stable(Format::Debezium));
}

#[test]
fn debezium_with_its_schema_has_a_stable_shape() {
    insta::assert_snapshot!(stable(Format::DebeziumSchema).lines().next().unwrap());
}

#[test]
fn wal2json_has_a_stable_shape() {
    insta::assert_snapshot!(stable(Format::Wal2json));
}

#[test]
fn cloudevents_has_a_stable_shape() {
    insta::assert_snapshot!(stable(Format::Cloudevents));
}

#[test]
fn keys_tombstones_and_headers_have_a_stable_shape() {
    let of = |format: Format| format!("{format:?}\n{}", keys(format));
    let formats =
        [Format::Debezium, Format::Wal2json, Format::CloudeventsBinary, Format::Walstream];
    insta::assert_snapshot!(formats.map(of).join("\n"));
}

#[test]
fn each_json_format_passes_its_schema() {
    for (format, schema) in [
        (Format::Debezium, DEBEZIUM_SCHEMA),
        (Format::DebeziumSchema, WITH_SCHEMA_SCHEMA),
        (Format::Wal2json, WAL2JSON_SCHEMA),
        (Format::Cloudevents, CLOUDEVENTS_SCHEMA),
        (Format::CloudeventsBinary, NATIVE_SCHEMA),
    ] {
        let messages = assert_valid(schema, &mut Encoder::new(format, &names()));
        assert_eq!(messages.len(), every_kind().len(), "{format:?}");
    }
}

#[test]
fn the_data_of_an_event_is_the_native_envelope_and_binary_mode_has_it_alone() {
    for (_, change) in every_kind() {
        let text = |format| {
            let mut out = Vec::new();
            Encoder::new(format, &names()).encode(&change, &mut out).unwrap();
            serde_json::from_slice::<Json>(&out).unwrap()
        };
        let native = text(Format::Native);
        assert_eq!(text(Format::Cloudevents)["data"], native);
        assert_eq!(text(Format::CloudeventsBinary), native);
        let event = text(Format::Cloudevents);
        let headers: std::collections::HashMap<_, _> =
            Encoder::new(Format::CloudeventsBinary, &names())
                .headers(&change)
                .unwrap()
                .into_iter()
                .collect();
        for name in ["id", "source", "type", "time", "specversion", "dataschema", "subject"] {
            assert_eq!(headers[format!("ce-{name}").as_str()], event[name].as_str().unwrap());
        }
    }
}

#[test]
fn headers_hold_printable_ascii_only() {
    let mut table = (*bookings()).clone();
    table.schema = "ü \"%".into();
    let change = Change {
        table: Some(Arc::new(table)),
        ..change(Op::Insert, Before::Nothing, Some(row(NEW)))
    };
    let mut encoder = Encoder::new(Format::CloudeventsBinary, &names());
    let headers = encoder.headers(&change).unwrap();
    assert!(headers.contains(&("ce-subject", "%C3%BC%20%22%25.bookings".into())), "{headers:?}");
    assert!(headers.iter().all(|(_, value)| value.bytes().all(|byte| byte.is_ascii_graphic())));
}

/// WalStream's record as its own readers know it.
#[derive(Clone, PartialEq, Eq, prost::Message)]
struct OldRecord {
    #[prost(string, tag = "1")]
    lsn: String,
    #[prost(int64, tag = "2")]
    commit_time: i64,
    #[prost(string, tag = "3")]
    table: String,
    #[prost(string, tag = "4")]
    operation: String,
    #[prost(map = "string, string", tag = "5")]
    old: std::collections::HashMap<String, String>,
    #[prost(map = "string, string", tag = "6")]
    new: std::collections::HashMap<String, String>,
}

#[test]
fn walstream_reads_its_record_and_nulls_are_told_beside_it() {
    use prost::Message as _;
    let mut table = (*bookings()).clone();
    table.columns[1] = column("status", 16, false);
    let values = [Some("8841"), Some("t"), None, Some("2200.00"), Some("a")];
    let change = Change {
        table: Some(Arc::new(table)),
        ..change(Op::Update, Before::Nothing, Some(row(values)))
    };
    let mut out = Vec::new();
    let mut encoder = Encoder::new(Format::Walstream, &names());
    assert!(encoder.encode(&change, &mut out).unwrap());
    let old = OldRecord::decode(out.as_slice()).unwrap();
    assert_eq!((old.lsn.as_str(), old.commit_time), ("23816848", 1_775_466_862_000));
    assert_eq!((old.table.as_str(), old.operation.as_str()), ("public.bookings", "UPDATE"));
    assert_eq!(old.old, [("booking_id".to_owned(), "8841".to_owned())].into());
    assert_eq!(old.new["status"], "True");
    assert_eq!(old.new["amount"], "2200.00");
    assert!(!old.new.contains_key("confirmed_at"));
    let new = super::ChangeRecord::decode(out.as_slice()).unwrap();
    assert_eq!(new.new_nulls, ["confirmed_at"]);
    assert_eq!(new.idempotency_key, change.idempotency_key());
    let mut key = Vec::new();
    assert!(encoder.encode_key(&change, &mut key).unwrap());
    assert_eq!(key, b"public.bookings");
    assert!(!encoder.encode(&message(b"x"), &mut Vec::new()).unwrap());
}

#[test]
fn the_published_proto_has_the_fields_of_the_record() {
    let (proto, _) = super::schema("walstream").unwrap();
    for field in [
        "string lsn = 1;",
        "int64 commit_time = 2;",
        "string table = 3;",
        "string operation = 4;",
        "map<string, string> old = 5;",
        "map<string, string> new = 6;",
        "repeated string old_nulls = 101;",
        "repeated string new_nulls = 102;",
        "repeated string unchanged = 103;",
        "uint32 index = 104;",
        "string idempotency_key = 105;",
        "bool read = 106;",
    ] {
        assert!(proto.contains(field), "{field}");
    }
}

#[test]
fn every_format_of_the_configuration_has_a_published_schema() {
    for format in TEXTS.into_iter().chain([Format::Walstream]) {
        let name = serde_json::to_value(format).unwrap();
        assert!(super::schema(name.as_str().unwrap()).is_some(), "{name}");
    }
}

#[test]
fn wal2json_names_a_type_with_its_length() {
    let column = |name: &str, ty: Type, key| Column { ty, ..column(name, 0, key) };
    let ty = |oid, modifier, name: &str| Type { name: name.into(), ..Type::base(oid, modifier) };
    let table = Table {
        columns: vec![
            column("id", ty(23, -1, "integer"), true),
            column("n", ty(1700, (6 << 16 | 2) + 4, "numeric"), false),
            column("v", ty(1043, 24, "character varying"), false),
            column("t", ty(1184, 3, "timestamp with time zone"), false),
            column("c", ty(18, -1, "\"char\""), false),
        ],
        ..(*bookings()).clone()
    };
    let values = [Some("1"), Some("NaN"), Some("x"), Some("2026-11-21 00:17:32.35+00"), None];
    let change = Change {
        table: Some(Arc::new(table)),
        transaction: Transaction {
            xid: 728,
            commit_time: Timestamp(1_795_220_252_361_460),
            commit_lsn: Lsn(0x0153_20A0),
        },
        ..change(Op::Insert, Before::Nothing, Some(row(values)))
    };
    let mut out = Vec::new();
    Encoder::new(Format::Wal2json, &names()).encode(&change, &mut out).unwrap();
    assert_eq!(
        String::from_utf8(out).unwrap(),
        "{\"action\":\"I\",\"xid\":728,\"timestamp\":\"2026-11-21 00:17:32.36146+00\",\
         \"lsn\":\"0/15320A0\",\"schema\":\"public\",\"table\":\"bookings\",\"columns\":[\
         {\"name\":\"id\",\"type\":\"integer\",\"value\":1},\
         {\"name\":\"n\",\"type\":\"numeric(6,2)\",\"value\":\"NaN\"},\
         {\"name\":\"v\",\"type\":\"character varying(20)\",\"value\":\"x\"},\
         {\"name\":\"t\",\"type\":\"timestamp(3) with time zone\",\
         \"value\":\"2026-11-21 00:17:32.35+00\"},\
         {\"name\":\"c\",\"type\":\"char\",\"value\":null}]}"
    );
}

/// The update that docs/formats.md shows in each format.
fn shown() -> Change {
    let mut table = (*bookings()).clone();
    table.identity = Identity::Full;
    table.columns.truncate(3);
    table.columns.iter_mut().for_each(|column| column.identity = true);
    let row = |values: [Option<&str>; 5]| {
        let values = values.map(|value| value.map(str::as_bytes));
        Row::from_values(values.into_iter().take(3).map(|v| v.map_or(Value::Null, Value::Text)))
    };
    Change {
        index: 0,
        table: Some(Arc::new(table)),
        ..change(Op::Update, Before::Full(row(OLD)), Some(row(NEW)))
    }
}

/// A record in the text format of protobuf, without the fields that it lacks.
fn as_text(record: &super::ChangeRecord) -> String {
    let super::ChangeRecord { lsn, commit_time, table, operation, .. } = record;
    let mut text = format!(
        "lsn: {lsn:?}\ncommit_time: {commit_time}\ntable: {table:?}\noperation: {operation:?}\n"
    );
    for (name, columns) in [("old", &record.old), ("new", &record.new)] {
        for (key, value) in columns {
            text.push_str(&format!("{name} {{ key: {key:?} value: {value:?} }}\n"));
        }
    }
    for (name, columns) in [("old_nulls", &record.old_nulls), ("new_nulls", &record.new_nulls)] {
        columns.iter().for_each(|column| text.push_str(&format!("{name}: {column:?}\n")));
    }
    text + &format!("idempotency_key: {:?}\n", record.idempotency_key)
}

/// A message as its example in the documentation is written, to be compared with it.
fn written(format: Format) -> String {
    use prost::Message as _;
    let mut encoder = Encoder::new(format, &names());
    let mut out = Vec::new();
    assert!(encoder.encode(&shown(), &mut out).unwrap());
    if format == Format::Walstream {
        return as_text(&super::ChangeRecord::decode(out.as_slice()).unwrap());
    }
    let headers = encoder.headers(&shown()).unwrap();
    let mut text = String::new();
    for (name, value) in headers {
        text.push_str(&format!("{name}: {value}\n"));
    }
    if !text.is_empty() {
        text.push_str(&format!("content-type: {}\n\n", encoder.content_type()));
    }
    text + std::str::from_utf8(&out).unwrap()
}

/// Whether `shown` is `whole`, or what is left of it where members and the ends of lists are cut.
fn is_part(shown: &Json, whole: &Json) -> bool {
    match (shown, whole) {
        (Json::Object(shown), Json::Object(whole)) => shown
            .iter()
            .all(|(name, value)| whole.get(name).is_some_and(|whole| is_part(value, whole))),
        (Json::Array(shown), Json::Array(whole)) => {
            shown.len() <= whole.len() && shown.iter().zip(whole).all(|(a, b)| is_part(a, b))
        }
        _ => shown == whole,
    }
}

/// The blocks of docs/formats.md that are not TOML, in its order.
fn examples() -> Vec<String> {
    let page = include_str!("../../docs/formats.md");
    let fenced = page.split("\n```").skip(1).step_by(2);
    let blocks = fenced.filter_map(|block| block.split_once('\n'));
    blocks.filter(|(language, _)| *language != "toml").map(|(_, text)| text.to_owned()).collect()
}

#[test]
fn the_documentation_shows_what_each_format_writes() {
    let formats = TEXTS.into_iter().chain([Format::Walstream]);
    let examples = examples();
    assert_eq!(examples.len(), 8, "docs/formats.md has one example of each format");
    for (format, example) in formats.zip(examples) {
        let written = written(format);
        let said =
            format!("docs/formats.md shows of {format:?}\n{example}\nbut it writes\n{written}");
        if format == Format::Walstream {
            assert_eq!(example.trim_end(), written.trim_end(), "{said}");
            continue;
        }
        let split = |text: &str| match text.split_once("\n\n") {
            Some((head, body)) => (head.to_owned(), serde_json::from_str::<Json>(body)),
            None => (String::new(), serde_json::from_str::<Json>(text)),
        };
        let ((shown_head, shown), (head, whole)) = (split(&example), split(&written));
        assert_eq!(shown_head, head, "{said}");
        let (shown, whole) =
            (shown.unwrap_or_else(|error| panic!("{error}: {said}")), whole.unwrap());
        let cut = [Format::DebeziumSchema, Format::Cloudevents, Format::CloudeventsBinary];
        let cut = cut.contains(&format);
        assert!(if cut { is_part(&shown, &whole) } else { shown == whole }, "{said}");
    }
}
