//! What the messages of each format look like.

use std::sync::Arc;

use super::{bookings, change, column, every_kind, lines, names, row};
use crate::{
    change::{Before, Change, Lsn, Op, Timestamp, Transaction},
    config::Format,
    format::Encoder,
    schema::{Column, Table, Type},
};

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
