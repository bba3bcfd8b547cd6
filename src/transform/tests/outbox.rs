//! Rows and messages that are events.

use serde_json::json;

use super::{change, example, message, native, row, shape, table, update};
use crate::{
    change::{Before, Change, Op},
    config::Format,
    error::Class,
    format::{Encoder, Names},
    schema::Identity,
};

#[test]
fn an_outbox_row_is_an_event_and_leaves_no_trace_of_the_row() {
    let rules = r#"
        [outbox]
        table = "public.outbox"
        route_column = "topic"
        key_column = "aggregate_id"
        headers_column = "headers"
        type_column = "type"
        id_column = "id"
        [[transform]]
        drop = ["*"]
    "#;
    let event = shape(rules, example("[outbox]")).unwrap().remove(0);
    assert_eq!(event.route(), Some("orders"));
    assert_eq!(
        event.headers().collect::<Vec<_>>(),
        [("attempt", "1"), ("trace", "af31"), ("id", "0d9c"), ("type", "OrderPaid")]
    );
    let mut body = Vec::new();
    let mut encoder = Encoder::new(Format::Sequin, &Names::default());
    assert!(encoder.encode(&event, &mut body).unwrap());
    assert_eq!(body, br#"{"order":1,"total":119.0}"#);
    body.clear();
    assert!(encoder.encode_key(&event, &mut body).unwrap());
    assert_eq!(body, b"order-1");
    let other = shape(rules, Change { index: 9, ..example("[outbox]") }).unwrap().remove(0);
    assert_eq!(event.keys(), other.keys());
    assert!(!event.keys().is_whole(), "order holds for each aggregate");

    let of = |op| Change { op, ..example("[outbox]") };
    let before = Before::Key(example("[outbox]").after.unwrap());
    let delete = Change { before, after: None, ..of(Op::Delete) };
    let truncate = Change { after: None, ..of(Op::Truncate) };
    for nothing in [of(Op::Update), delete, truncate] {
        assert!(shape(rules, nothing).unwrap().is_empty());
    }
    assert_eq!(shape(rules, of(Op::Read)).unwrap().len(), 1);
    assert_eq!(native(&shape(rules, update()).unwrap()[0])["after"], json!({}), "no outbox row");
}

#[test]
fn a_logical_message_with_the_prefix_is_an_event() {
    let rules = "[outbox]\nmessage_prefix = \"outbox.\"\n";
    let event = shape(rules, message("outbox.orders#7", "{\"a\":1}")).unwrap().remove(0);
    let shaped = event.shaped.clone().unwrap();
    assert_eq!((shaped.route.as_deref(), shaped.key.as_deref()), (Some("orders"), Some("7")));
    assert_eq!(native(&event), json!({"a": 1}));
    let bare = shape(rules, message("outbox.", "1")).unwrap().remove(0);
    assert_eq!(bare.route(), None);
    assert_eq!(bare.shaped.unwrap().key, None);
    assert_eq!(shape(rules, message("note", "1")).unwrap(), [message("note", "1")]);
}

#[test]
fn an_outbox_takes_raw_bodies_and_names_a_column_that_is_not_there() {
    let rules = "[outbox]\ntable = \"public.outbox\"\nkey_column = \"aggregate\"\n";
    let error = shape(rules, example("[outbox]")).unwrap_err();
    assert_eq!(error.class(), Class::Config);
    assert!(error.to_string().contains("public.outbox has no column aggregate"), "{error}");
    let outbox = table("outbox", &[("id", 20), ("payload", 17)], Identity::Default);
    let rules = "[outbox]\ntable = \"public.outbox\"\n";
    let raw = change(&outbox, Op::Insert, Before::Nothing, Some(row(&["1", "\\x00ff"])));
    let made = shape(rules, raw).unwrap().remove(0);
    assert_eq!(made.shaped.unwrap().payload.as_deref(), Some(&b"\x00\xff"[..]));
    let none = change(&outbox, Op::Insert, Before::Nothing, Some(row(&["1", "NULL"])));
    assert_eq!(native(&shape(rules, none).unwrap()[0]), json!(null));
}

#[test]
fn route_key_and_headers_are_those_of_the_reshaped_change() {
    let rules = r#"
        route = "record.total > 100 ? 'big' : null"
        message_key = "record.id"
        message_headers = { tenant = "record.tenant", none = "null", vip = "record.total > 1.0" }
        [[transform]]
        set = { total = "record.net * 2.0" }
    "#;
    let made = shape(rules, update()).unwrap().remove(0);
    assert_eq!(made.route(), Some("big"));
    assert_eq!(made.shaped.as_ref().unwrap().key.as_deref(), Some("1"));
    assert_eq!(made.headers().collect::<Vec<_>>(), [("tenant", "6f1c"), ("vip", "true")]);
    let plain = shape(rules, message("note", "x")).unwrap();
    assert_eq!(plain, [message("note", "x")], "a message has no row to read");
}
