//! What holds of every encoder.

use std::sync::Arc;

use serde_json::{Value as Json, json};

use super::{NEW, TEXTS, bookings, change, every_kind, message, names, row};
use crate::{
    change::{Before, Change, Lsn, Op, Row, Transaction, Value},
    config::Format,
    error::Class,
    format::Encoder,
    schema::Identity,
};

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
