//! Filters, computed columns and parts, in CEL.

use std::sync::Arc;

use serde_json::{Value as Json, json};

use super::{
    ANN, ORDERS, after, change, compile, fails, insert, message, native, row, shape, table, update,
};
use crate::{
    change::{Before, Change, Op},
    schema::Identity,
    transform::Shape,
};

#[test]
fn a_filter_sees_rows_operations_and_what_changed() {
    let passes = |text: &str, change: Change| {
        let rules = format!("where = '''{text}'''");
        !shape(&rules, change).unwrap_or_else(|e| panic!("{text}: {e}")).is_empty()
    };
    for (text, passed) in [
        ("record.status == 'paid' && before.status == 'new' && changes.status == 'new'", true),
        ("has(changes.status) && !has(changes.email)", true),
        ("changes == {'status': 'new'}", true),
        ("record.net > 99.5 && record.net == 100.0 && record.id == 1", true),
        ("record.net > 100", false),
        ("record.items[1].sku == 'B-7' && size(record.items) == 2", true),
        ("op == 'update' && table == 'orders' && schema == 'public'", true),
        ("metadata.tx_id == 700 && metadata.commit_lsn == 23803720", true),
        ("metadata.commit_idx == 3", true),
        ("metadata.commit_timestamp == '2026-04-06T09:14:22.000123Z'", true),
        ("record.nothing == 1 || op == 'update'", true),
        ("has(record.nothing)", false),
    ] {
        assert_eq!(passes(text, update()), passed, "{text}");
    }
    let note = || message("note", "hello");
    assert!(passes("op == 'message' && message.prefix == 'note'", note()));
    assert!(passes("message.content == 'hello'", note()));
    let orders = table("orders", ORDERS, Identity::Full);
    let truncate = || change(&orders, Op::Truncate, Before::Nothing, None);
    // an expression that needs a row says nothing about a change without one
    assert!(passes("record.id == 5", note()) && passes("record.id == 5", truncate()));
    assert!(!passes("op != 'truncate' && record.id == 5", truncate()));
    assert!(passes("record.status == null", insert(&[("id", 20), ("status", 25)], &["1", "NULL"])));
    let delete = change(&orders, Op::Delete, Before::Full(row(&ANN)), None);
    let whole = "record.status == 'paid' && before.status == 'paid' && changes == {}";
    assert!(passes(whole, delete));
}

#[test]
fn an_expression_that_fails_says_why_and_shows_no_value() {
    let check = |rules: &str, change: Change, told: &[&str]| {
        let said = fails(rules, change);
        for told in told {
            assert!(said.contains(told), "{said}\n  lacks {told}");
        }
        assert!(!said.contains("ann@"), "{said}");
    };
    let rule = |text: &str| format!("where = '''{text}'''");
    let told = "where reads `totl`, but public.orders has no such column";
    check(&rule("record.totl > 1"), update(), &[told]);
    check(&rule("record.email > 1"), update(), &["where fails: ", "string"]);
    check(&rule("record.id"), update(), &["gives a int where true or false is wanted"]);
    let null = || insert(&[("id", 20), ("x", 20)], &["1", "NULL"]);
    check(&rule("record.x > 1"), null(), &["where fails: ", "record.x != null && record.x > 1"]);
    check(&rule("record.id / 0 == 1"), null(), &["division by zero"]);
    let told = "reads `color`, which is not there";
    check(&rule("record.items[0].color == 'x'"), update(), &[told]);
    let orders = table("orders", ORDERS, Identity::Default);
    let mut big = ANN;
    big[5] = "?";
    let toast = || change(&orders, Op::Update, Before::Nothing, Some(row(&big)));
    let full = "ALTER TABLE public.orders REPLICA IDENTITY FULL";
    let told = "a large value that the update left alone";
    check(&rule("size(record.items) > 1"), toast(), &[told, full]);
    let set = r#"transform = [{ set = { n = "size(record.items)" } }]"#;
    check(set, toast(), &["transform[0].set.n reads `items`", told, full]);
    let key = ["1", "NULL", "NULL", "NULL", "NULL", "NULL", "NULL"];
    let delete = || change(&orders, Op::Delete, Before::Key(row(&key)), None);
    let told = "which the old row of this delete does not carry";
    check(&rule("record.status == 'paid'"), delete(), &[told, full]);
    check(r#"message_key = "record.items""#, update(), &["message_key gives no text"]);
    let explode = r#"transform = [{ explode = "record.id", as = "x" }]"#;
    check(explode, update(), &["transform[0].explode gives no list"]);
    // a mask does not need the value
    let masked = shape(r#"transform = [{ mask = { items = "redact" } }]"#, toast()).unwrap();
    assert_eq!(native(&masked[0])["unchanged"], json!(["items"]));
    // what would be computed of a row that is not known is left out of it
    let set = r#"transform = [{ set = { n = "size(record.items)", email = "'x'" } }]"#;
    assert_eq!(native(&shape(set, delete()).unwrap()[0])["before"], json!({"id": 1}));
}

#[test]
fn a_computed_column_has_the_type_of_its_values() {
    let set = |text: &str, change: Change| {
        after(&format!("transform = [{{ set = {{ x = '''{text}''' }} }}]"), change)["x"].clone()
    };
    let number = || insert(&[("id", 20), ("x", 23)], &["9007199254740993", "5"]);
    assert_eq!(set("record.id + 1", number()), json!(9_007_199_254_740_994_i64));
    assert_eq!(set("double(record.x) * 1.5", number()), json!(7.5));
    assert_eq!(set("'a' + string(record.x)", number()), json!("a5"));
    assert_eq!(set("[record.x, null, {'a': 1.5}]", number()), json!([5, null, {"a": 1.5}]));
    assert_eq!(set("record.x > 4", number()), json!(true));
    assert_eq!(set("null", number()), json!(null));
    assert_eq!(set("record.net * 1.19", update()), json!(119.0));
    let rules = r#"transform = [{ set = { status = "{'is': record.status}" } }]"#;
    let envelope = native(&shape(rules, update()).unwrap()[0]);
    assert_eq!(envelope["before"]["status"], json!({"is": "new"}));
    assert_eq!(envelope["after"]["status"], json!({"is": "paid"}));
    let mut transform = compile(r#"transform = [{ set = { n = "1" } }]"#).unwrap();
    let change = update();
    let mut table = || transform.shape(change.clone()).unwrap()[0].table.clone().unwrap();
    assert!(Arc::ptr_eq(&table(), &table()), "formats know a table by its address");
}

#[test]
fn parts_are_numbered_in_order_and_the_last_closes_the_transaction() {
    let rules = r#"
        message_key = "record.item.sku"
        [[transform]]
        explode = "record.items"
        as = "item"
        [[transform]]
        drop = ["items", "phone"]
    "#;
    let parts = shape(rules, update()).unwrap();
    let items: Vec<Json> = parts.iter().map(|part| native(part)["after"]["item"].clone()).collect();
    assert_eq!(items, [json!({"sku": "A-1", "qty": 2}), json!({"sku": "B-7", "qty": 1})]);
    let closing: Vec<bool> = parts.iter().map(|part| part.closes_transaction).collect();
    assert_eq!(closing, [false, true]);
    let keys: Vec<String> = parts.iter().map(Change::idempotency_key).collect();
    assert_eq!(keys[0], update().idempotency_key());
    assert_ne!(keys[0], keys[1]);
    assert_eq!(parts[1].shaped.as_ref().unwrap().key.as_deref(), Some("B-7"));
    assert!(native(&parts[0])["before"].get("item").is_none(), "an old row has no element");
    let none = insert(&[("id", 20), ("items", 3802)], &["1", "[]"]);
    let mut transform = compile(r#"transform = [{ explode = "record.items", as = "i" }]"#).unwrap();
    let left_out = transform.explain(none).unwrap();
    assert!(matches!(left_out, Shape::LeftOut(rule) if rule == "transform[0].explode"));
}

#[test]
fn an_expression_at_the_edge_of_its_types_fails_or_gives_a_value_but_never_panics() {
    let small = "-9223372036854775808";
    for text in [
        format!("{small} / -1"),
        format!("{small} % -1"),
        format!("-({small})"),
        format!("{small} - 1 * record.id"),
        "int(1e300) + uint(-1.0) + int('x')".into(),
        "record.id % 0".into(),
        "timestamp('9999-12-31T23:59:59Z') + duration('999999h')".into(),
        "duration('9223372036s') * 2".into(),
        "timestamp('x') > timestamp(record.email)".into(),
        "record.email.matches('(') || record.email.matches('(a+)+$')".into(),
        "'äöü'.substring(1, 2) + 'äöü'.substring(2, 1) + 'x'.charAt(9) + 'x'.substring(-1)".into(),
        "'äöü'.substring(9)".into(),
        "'äöü'.charAt(-1)".into(),
        "'a,b'.split(',', -5)[9]".into(),
        "'%d %s %f %x'.format([1])".into(),
        "'%.99999f'.format([1.0])".into(),
        "[1, 2].slice(5, 2)".into(),
        "[1, 2].slice(-1, 1)".into(),
        "record.items[-1]".into(),
        "record.items[99999999999]".into(),
        "lists.range(-5)".into(),
        "math.bitShiftLeft(1, 99) + math.bitShiftRight(1, -1)".into(),
        "base64.decode('!!')".into(),
        "{'a': 1}[record.id] == {record.items: 1}".into(),
        "'x'.replace('', 'y', 5) + 'äx'.indexOf('x', 99)".into(),
        "[3, 'a', null].sort()".into(),
        "[[1], [[2]]].flatten(-1)".into(),
        format!("{}1{}", "(".repeat(60), ")".repeat(60)),
    ] {
        if let Ok(mut transform) =
            compile(&format!("transform = [{{ set = {{ x = '''{text}''' }} }}]"))
        {
            let _ = transform.shape(update());
        }
    }
}
