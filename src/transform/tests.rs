use std::sync::Arc;

use bytes::Bytes;
use proptest::prelude::*;
use serde_json::{Value as Json, json};

use super::*;
use crate::{
    change::{Before, Lsn, Message, Op, Row, Timestamp, Transaction, Value},
    config::Format,
    error::Class,
    format::{Encoder, Names},
    schema::{Column, Identity, Table, Type},
};

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

#[test]
fn no_rule_leaves_a_change_as_it_is() {
    let mut transform = compile("").unwrap();
    assert!(transform.is_plain());
    assert_eq!(transform.shape(update()).unwrap(), [update()]);
    assert!(!compile("where = \"true\"").unwrap().is_plain());
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

/// A page in which each block of JSON after one of TOML is what those rules make of the example.
fn proved(page: &str, seen: &mut usize) -> String {
    let mut proved = String::new();
    let (mut block, mut rules) = (None, None);
    for line in page.lines() {
        match (line.strip_prefix("```"), &mut block) {
            (Some(language), None) => {
                block = Some((language == "json" && rules.is_some(), String::new()));
                if language == "toml" {
                    rules = None;
                }
            }
            (Some(_), Some((told, text))) => {
                if *told {
                    *seen += 1;
                    let rules: String = rules.take().unwrap();
                    for change in shape(&rules, example(&rules)).unwrap() {
                        proved.push_str(&format!("{}\n", shown(&change)));
                    }
                } else {
                    rules = Some(std::mem::take(text));
                }
                block = None;
            }
            (None, Some((told, text))) => {
                text.push_str(&format!("{line}\n"));
                if *told {
                    continue;
                }
            }
            (None, None) => rules = rules.filter(|_| line.is_empty()),
        }
        proved.push_str(&format!("{line}\n"));
    }
    proved
}

#[test]
fn every_example_of_the_docs_does_what_the_docs_say() {
    let mut seen = 0;
    for name in ["docs/transforms.md", "docs/outbox.md"] {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
        let page = std::fs::read_to_string(&path).unwrap();
        let proved = proved(&page, &mut seen);
        if std::env::var_os("WALRACE_GENERATE").is_some() {
            std::fs::write(&path, &proved).unwrap();
        }
        for (number, (says, does)) in page.lines().zip(proved.lines()).enumerate() {
            assert_eq!(says, does, "{name}:{}", number + 1);
        }
        assert_eq!(page.len(), proved.len(), "{name}");
    }
    assert!(seen >= 12, "only {seen} examples");
}

const PLAIN: &str = r#"
    mask_key = "0123456789abcdef"
    [[transform]]
    mask = { secret = "hash", "c_*" = "redact" }
    [[transform]]
    rename = { kept = "renamed" }
    [[transform]]
    columns = ["secret", "renamed", "other", "c_*"]
"#;

proptest! {
    #[test]
    fn plain_steps_keep_every_other_column_byte_for_byte(
        values in prop::collection::vec(
            prop_oneof![
                Just(None),
                Just(Some(None)),
                prop::collection::vec(any::<u8>(), 0..40).prop_map(|bytes| Some(Some(bytes))),
            ],
            6
        ),
        full in any::<bool>(),
    ) {
        let columns =
            [("id", 23), ("secret", 25), ("kept", 1700), ("gone", 25), ("other", 114), ("c_1", 23)];
        let table = table("t", &columns, if full { Identity::Full } else { Identity::Default });
        let row = Row::from_values(values.iter().map(|value| match value {
            None => Value::Null,
            Some(None) => Value::Unchanged,
            Some(Some(bytes)) => Value::Text(bytes),
        }));
        let before = if full { Before::Full(row.clone()) } else { Before::Key(row.clone()) };
        let change = change(&table, Op::Update, before, Some(row.clone()));
        let made = shape(PLAIN, change).unwrap().remove(0);
        let table = made.table.as_ref().unwrap();
        let names: Vec<&str> = table.columns.iter().map(|column| column.name.as_str()).collect();
        prop_assert_eq!(names, ["id", "secret", "renamed", "other", "c_1"]);
        prop_assert_eq!(table.key_columns(), [0]);
        for new in [made.after.as_ref().unwrap(), made.before.row().unwrap()] {
            prop_assert_eq!(new.len(), 5);
            for (to, from) in [(0, 0), (2, 2), (3, 4)] {
                prop_assert_eq!(new.value(to), row.value(from));
            }
            for (to, from) in [(1, 1), (4, 5)] {
                match (new.value(to).unwrap(), row.value(from).unwrap()) {
                    (Value::Text(hash), Value::Text(_)) if to == 1 => {
                        prop_assert_eq!(hash.len(), 64);
                    }
                    (Value::Text(hidden), Value::Text(_)) => prop_assert_eq!(hidden, b"***"),
                    (new, old) => prop_assert_eq!(new, old),
                }
            }
        }
        prop_assert_eq!(made.before.row(), made.after.as_ref());
    }

    #[test]
    fn a_function_that_changes_nothing_changes_no_byte(
        int in any::<i64>(),
        numeric in "-?[1-9][0-9]{0,40}(\\.[0-9]{1,30})?",
        float in any::<f64>(),
        text in any::<String>(),
        list in prop::collection::vec(any::<i64>(), 0..4),
    ) {
        let doc = json!({"list": list, "text": text, "none": null, "empty": []}).to_string();
        let texts = [int.to_string(), numeric, float.to_string(), text, doc];
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let columns = [("int", 20), ("numeric", 1700), ("float", 701), ("text", 25), ("doc", 3802)];
        let change = insert(&columns, &texts);
        let rules = r#"transform = [{ function = "function transform(c) return c end" }]"#;
        prop_assert_eq!(shape(rules, change.clone()).unwrap(), [change]);
    }

    #[test]
    fn no_text_makes_the_compiler_of_expressions_panic(text in "\\PC{0,30}") {
        let _ = Expression::compile("where", &text);
    }

    #[test]
    fn a_numeric_is_a_double_only_where_no_digit_is_lost(text in "-?[0-9]{1,20}(\\.[0-9]{1,20})?") {
        if let cel::Value::Float(number) = expression::from_numeric(&text) {
            let plain = |text: &str| {
                let (sign, digits) = text.strip_prefix('-').map_or(("", text), |rest| ("-", rest));
                let digits = digits.trim_start_matches('0');
                let digits = if digits.contains('.') {
                    digits.trim_end_matches('0').trim_end_matches('.')
                } else {
                    digits
                };
                if digits.is_empty() { String::new() } else { format!("{sign}{digits}") }
            };
            prop_assert_eq!(plain(&format!("{number}")), plain(&text));
        }
    }
}

#[test]
fn a_mistake_is_placed_and_explained() {
    let check = |rules: &str, told: &str| {
        let said = refused(rules);
        assert!(said.contains(told), "{said}\n  lacks {told}");
    };
    check(r#"where = "record.total >""#, "sink s: `where`, line 1, column 15: ");
    check(r#"where = "total > 100""#, "line 1, column 1: there is no variable `total`");
    check(r#"where = "total > 100""#, "columns are record.total");
    check(
        "where = \"\"\"op == 'insert'\n  && recrod.x == 1\"\"\"",
        "line 2, column 6: there is no variable `recrod`",
    );
    check(r#"route = "uper(record.a)""#, "`route`, line 1, column 5: there is no function `uper`");
    check(r#"transform = [{ set = { a = "1 +" } }]"#, "`transform[0].set.a`, line 1");
    check(r#"message_headers = { x = "y" }"#, "`message_headers.x`, line 1, column 1");
    check(
        r#"transform = [{ function = "function transform(c)\n  retrn c\nend" }]"#,
        "transform[0].function:2:",
    );
    check(
        r#"transform = [{ function = "local x = 1" }]"#,
        "it defines no `function transform(change)`",
    );
    check(r#"transform = [{ function_file = "/nowhere.luau" }]"#, "cannot read /nowhere.luau");
    for known in [
        "[1, 2].exists(x, x > record.id)",
        "size(record.a) > 0 && record.a.startsWith('x') && has(record.b)",
        "record.email.lowerAscii().split('@')[1] == 'x' || record['odd name'] == 1",
        "math.greatest(1, 2) == 2 && base64.encode(b'x') != '' && type(record.a) == string",
        "timestamp(record.at) > timestamp('2026-01-01T00:00:00Z')",
        "double(metadata.commit_lsn) > 1.0 && message.prefix == 'x' && changes.a == before.a",
        "op in ['insert', 'update'] ? true : schema == table",
        "record.items.map(i, i.qty).all(q, q > 0) && record.items.filter(i, i.s != '').size() > 0",
    ] {
        if let Err(error) = compile(&format!("where = '''{known}'''")) {
            panic!("{known}: {error}");
        }
    }
}

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
fn a_mask_holds_for_the_old_row_and_the_key_and_is_the_same_everywhere() {
    let rules = r#"
        mask_key = "0123456789abcdef"
        [[transform]]
        mask = { id = "hash", email = "hash" }
    "#;
    let made = shape(rules, update()).unwrap().remove(0);
    let envelope = native(&made);
    let hash = envelope["after"]["id"].as_str().unwrap();
    assert_eq!((&envelope["before"]["id"], &envelope["key"]["id"]), (&json!(hash), &json!(hash)));
    assert_eq!(envelope["before"]["email"], envelope["after"]["email"]);
    let other = shape(rules, insert(&[("id", 25)], &["1"])).unwrap().remove(0);
    assert_eq!(native(&other)["after"]["id"], hash, "another table, another type, the same hash");
    let rekeyed = rules.replace("0123456789abcdef", "fedcba9876543210");
    assert_ne!(native(&shape(&rekeyed, update()).unwrap()[0])["after"]["id"], hash);
    // HMAC-SHA-256 of "1", computed by Python's hmac
    assert_eq!(hash, "6f51b61a3db920f1cbe06a4c38501bc0b002ebaf9ceab835ca0a6f899817de7a");
    assert!(refused(r#"transform = [{ mask = { a = "hash" } }]"#).contains("mask_key"));
}

#[test]
fn masks_cut_at_characters_and_globs_give_way_to_names() {
    let rules = r#"transform = [{ mask = { "*" = "redact", b = "truncate:2", c = "drop" } }]"#;
    let columns = [("id", 23), ("b", 25), ("c", 25), ("d", 25)];
    let made = after(rules, insert(&columns, &["1", "äöü", "x", "NULL"]));
    assert_eq!(made, json!({"id": "***", "b": "äö", "d": null}));
}

#[test]
fn a_table_that_loses_a_column_of_its_key_has_no_key() {
    for rules in [
        r#"transform = [{ drop = ["id"] }]"#,
        r#"transform = [{ mask = { id = "drop" } }]"#,
        r#"transform = [{ function = "function transform(c) c.record.id = nil; return c end" }]"#,
    ] {
        let made = shape(rules, update()).unwrap().remove(0);
        let envelope = native(&made);
        assert_eq!(envelope["key"], json!(null), "{rules}");
        assert!(envelope["after"].get("id").is_none() && envelope["after"].get("email").is_some());
        assert!(envelope["before"].get("id").is_none(), "{rules}");
        assert!(made.table.as_ref().unwrap().key_columns().is_empty());
    }
    let kept = after(r#"transform = [{ columns = ["email"] }]"#, update());
    assert_eq!(kept, json!({"id": 1, "email": "ann@example.org"}));
}

#[test]
fn a_step_stays_within_its_tables_and_operations() {
    let rules = |scope: &str| format!("transform = [{{ {scope}, set = {{ seen = \"true\" }} }}]");
    let seen = |scope: &str, change: Change| after(&rules(scope), change).get("seen").is_some();
    assert!(seen(r#"tables = ["public.ord*"]"#, update()));
    assert!(!seen(r#"tables = ["public.*", "!public.orders"]"#, update()));
    assert!(!seen(r#"operations = ["insert"]"#, update()));
    let read = Change { op: Op::Read, before: Before::Nothing, ..update() };
    assert!(seen(r#"operations = ["insert"]"#, read), "a row of a backfill is new to the sink");
    let names = fails(r#"transform = [{ rename = { email = "phone" } }]"#, update());
    assert!(names.contains("public.orders would have two columns named phone"), "{names}");
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

fn function(body: &str) -> String {
    format!("[[transform]]\nfunction = '''\nfunction transform(change)\n{body}\nend\n'''\n")
}

#[test]
fn a_function_changes_adds_and_takes_away_columns() {
    let columns =
        [("id", 20), ("n", 1700), ("doc", 3802), ("gone", 25), ("none", 25), ("at", 1184)];
    let at = "2026-04-06 09:14:22+00";
    let texts = ["9007199254740995", "1.10", "{\"b\":  [1, 2]}", "x", "NULL", at];
    let body = r#"
        local r = change.record
        assert(r.id == "9007199254740995" and r.n == "1.10" and r.none == nil)
        assert(r.at == "2026-04-06T09:14:22+00:00" and change.op == "insert")
        r.gone = nil
        r.doc.b[3] = r.doc.b[1] + 2
        r.total = tonumber(r.n) * 2
        r.flag, r.text, r.list, r.empty = true, "ü", {1, "a"}, null
        return change"#;
    let made = shape(&function(body), insert(&columns, &texts)).unwrap().remove(0);
    assert_eq!(
        native(&made)["after"],
        json!({
            "id": 9_007_199_254_740_995_i64, "n": 1.10, "doc": {"b": [1, 2, 3]}, "none": null,
            "at": "2026-04-06T09:14:22+00:00", "empty": null, "flag": true, "list": [1, "a"],
            "text": "ü", "total": 2.2
        })
    );
    let kept = made.after.as_ref().unwrap();
    assert_eq!(kept.value(0), Some(Value::Text(b"9007199254740995")));
    assert_eq!(kept.value(1), Some(Value::Text(b"1.10")), "its exact text");
    let body = "change.record.id = '9007199254740997' return change";
    let body = body.replace('\'', "\"");
    let bigger = after(&function(&body), insert(&columns, &texts));
    assert_eq!(bigger["id"], json!(9_007_199_254_740_997_i64));
}

#[test]
fn a_function_drops_and_splits() {
    assert!(shape(&function("return nil"), update()).unwrap().is_empty());
    assert!(shape(&function("return {}"), update()).unwrap().is_empty());
    let twice = r#"
        local other = table.clone(change)
        other.record = table.clone(change.record)
        other.record.status = "copy"
        return {change, other}"#;
    let parts = shape(&function(twice), update()).unwrap();
    let state = |part: &Change| native(part)["after"]["status"].clone();
    assert_eq!(parts.iter().map(state).collect::<Vec<_>>(), ["paid", "copy"]);
    assert_eq!(parts[1].shaped.as_ref().unwrap().part, 1);
}

#[test]
fn a_function_routes_and_writes_the_body() {
    let body = r#"
        change.route = "r-" .. change.record.id
        change.key = change.record.email
        change.headers["x-op"] = change.op
        change.payload = {total = 119, lines = #change.record.items}
        return change"#;
    let made = shape(&function(body), update()).unwrap().remove(0);
    assert_eq!(made.route(), Some("r-1"));
    assert_eq!(made.headers().collect::<Vec<_>>(), [("x-op", "update")]);
    assert_eq!(native(&made), json!({"total": 119, "lines": 2}));
    let raw = shape(&function(r#"change.payload = "raw" return change"#), update()).unwrap();
    assert_eq!(raw[0].shaped.as_ref().unwrap().payload.as_deref(), Some(&b"raw"[..]));
    let mine = function(r#"change.route = "mine" return change"#);
    let mine = format!("route = \"'theirs'\"\n{mine}");
    assert_eq!(shape(&mine, update()).unwrap()[0].route(), Some("mine"));
    let old = r#"change.before.email = "x" change.record.email = "y" return change"#;
    let envelope = native(&shape(&function(old), update()).unwrap()[0]);
    assert_eq!(
        (&envelope["before"]["email"], &envelope["after"]["email"]),
        (&json!("x"), &json!("y"))
    );
    let said =
        r#"assert(change.message.content == "hello" and change.record == nil) return change"#;
    let note = message("note", "hello");
    assert_eq!(shape(&function(said), note.clone()).unwrap(), [note]);
}

#[test]
fn a_function_that_fails_or_takes_too_much_is_a_data_error_and_the_next_call_works() {
    let body = r#"
        local s = change.record.status
        if s == "loop" then
            while true do pcall(function() while true do end end) end
        elseif s == "fat" then
            local t = {}
            while true do t[#t + 1] = string.rep("x", 1e6) .. #t end
        elseif s == "pattern" then
            string.find(string.rep("a", 40), string.rep("a?", 40) .. string.rep("a", 40))
        elseif s == "bad" then error("no such " .. s)
        elseif s == "odd" then return 7
        elseif s == "op" then change.op = "delete"
        elseif s == "less" then change.record = nil
        elseif s == "global" then count = 1
        end
        return change"#;
    let limits = "function_ms_max = 1000\nfunction_bytes_max = 4194304\n";
    let mut transform = compile(&(function(body) + limits)).unwrap();
    for (status, told) in [
        ("loop", "it takes longer than 1000 ms"),
        ("fat", "it takes more memory than it may"),
        ("pattern", "it takes longer than 1000 ms"),
        ("bad", "transform[0].function:11: no such bad"),
        ("odd", "it returns a"),
        ("op", "it changes `op`"),
        ("less", "returns a change without its record"),
        ("global", "readonly"),
    ] {
        let mut texts = ANN;
        texts[3] = status;
        let change = Change { after: Some(row(&texts)), ..update() };
        let error = transform.shape(change).unwrap_err();
        assert_eq!(error.class(), Class::Data, "{error}");
        assert!(error.to_string().contains(told), "{error}\n  lacks {told}");
        assert_eq!(transform.shape(update()).unwrap(), [update()]);
    }
}

#[test]
fn a_function_is_alone_in_its_sandbox() {
    for name in [
        "os",
        "io",
        "require",
        "loadstring",
        "print",
        "math.random",
        "debug",
        "coroutine",
        "getfenv",
    ] {
        let body = format!("assert({name} == nil) return change");
        assert_eq!(shape(&function(&body), update()).unwrap().len(), 1, "{name}");
    }
    let error = fails(&function("string.rep = nil return change"), update());
    assert!(error.contains("readonly"), "{error}");
}

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

const EVENTS: &str = "[outbox]\ntable = \"public.outbox\"\nkey_column = \"aggregate_id\"\n\
                      headers_column = \"headers\"\nmessage_prefix = \"outbox.\"\n";

/// An event of the outbox: id, aggregate and headers.
fn event(texts: [&str; 3]) -> Change {
    let columns = [("id", 20), ("aggregate_id", 25), ("headers", 3802), ("payload", 114)];
    let outbox = table("outbox", &columns, Identity::Default);
    let [id, aggregate, headers] = texts;
    change(&outbox, Op::Insert, Before::Nothing, Some(row(&[id, aggregate, headers, "{}"])))
}

#[test]
fn events_and_messages_of_an_aggregate_share_a_key_and_those_without_one_do_not() {
    let keys = |change: Change| shape(EVENTS, change).unwrap().remove(0).keys();
    let (one, two) = (keys(event(["1", "a", "{}"])), keys(event(["2", "a", "{}"])));
    assert!(one.meets(&two) && !one.meets(&keys(event(["3", "b", "{}"]))));
    assert!(one.meets(&keys(message("outbox.orders#a", "1"))));
    assert!(!one.meets(&keys(message("outbox.orders#b", "1"))));
    assert!(one.meets(&event(["1", "z", "{}"]).keys()), "the row's own key counts too");
    assert!(!keys(event(["4", "NULL", "{}"])).meets(&keys(event(["5", "NULL", "{}"]))));
    let bytes = one.to_bytes();
    assert_eq!(Keys::from_bytes(one.room, &bytes), one);
}

#[test]
fn an_outbox_without_a_key_of_its_own_goes_by_the_aggregate_alone() {
    let columns = [("id", 20), ("aggregate_id", 25), ("headers", 3802), ("payload", 114)];
    let mut outbox = Table::clone(&table("outbox", &columns, Identity::Nothing));
    outbox.columns.iter_mut().for_each(|c| (c.primary_key, c.identity) = (false, false));
    let outbox = Arc::new(outbox);
    let of = |aggregate| {
        let after = Some(row(&["1", aggregate, "{}", "{}"]));
        shape(EVENTS, change(&outbox, Op::Insert, Before::Nothing, after)).unwrap().remove(0).keys()
    };
    assert!(of("a").meets(&of("a")) && !of("a").meets(&of("b")));
}

#[test]
fn a_change_on_which_a_rule_fails_has_the_keys_that_the_others_tell() {
    let mut rules = compile(EVENTS).unwrap();
    let bad = event(["1", "a", "[]"]);
    assert!(rules.shape(bad.clone()).is_err());
    let good = shape(EVENTS, event(["2", "a", "{}"])).unwrap().remove(0);
    assert!(rules.keys_despite(&bad).meets(&good.keys()));
    let text = r#"
        message_key = "record.tenant"
        mask_key = "0123456789abcdef"
        transform = [{ set = { x = "1 / (record.id - 1)" } }, { mask = { tenant = "hash" } }]
    "#;
    let mut rules = compile(text).unwrap();
    assert!(rules.shape(update()).is_err());
    let passing = text.replace("record.id - 1", "record.id");
    let good = shape(&passing, update()).unwrap().remove(0);
    assert_eq!(rules.keys_despite(&update()), good.keys());
}

#[test]
fn a_step_that_alters_the_key_keeps_the_order_of_the_old_one_too() {
    let keys = |rules: &str| shape(rules, update()).unwrap().remove(0).keys();
    for rules in [
        "mask_key = \"0123456789abcdef\"\ntransform = [{ mask = { id = \"hash\" } }]",
        "transform = [{ set = { id = \"record.id + 7\" } }]",
        "transform = [{ drop = [\"id\"] }]",
        "message_key = \"record.tenant\"",
    ] {
        assert!(keys(rules).meets(&update().keys()) && !keys(rules).is_whole(), "{rules}");
    }
    let untouched = shape("transform = [{ drop = [\"email\"] }]", update()).unwrap().remove(0);
    assert_eq!(untouched.shaped, None, "nothing is kept where the key is as it was");
}

#[test]
fn a_column_that_a_step_names_is_told_where_no_table_has_it_or_one_has_it_no_more() {
    let rules = "transform = [{ mask = { emial = \"redact\", phone = \"redact\" } }]";
    let mut rules = compile(rules).unwrap();
    let told = |rules: &mut Transform| -> Vec<String> {
        rules.take_news().iter().map(ToString::to_string).collect()
    };
    let of = |name: &str, columns: &[(&str, u32)]| {
        let table = table(name, columns, Identity::Default);
        change(&table, Op::Insert, Before::Nothing, Some(row(&["1", "x"])))
    };
    for _ in 0..3 {
        rules.shape(of("orders", ORDERS)).unwrap_or_default();
    }
    let said = "transform[0].mask names the column `emial`, which public.orders does not have; \
                it has `email`";
    assert_eq!(told(&mut rules), [said]);
    rules.shape(of("other", &[("id", 20), ("v", 25)])).unwrap();
    let said = "transform[0].mask names the column `emial`, which public.other does not have";
    assert_eq!(told(&mut rules), [said], "orders has the other name");
    rules.shape(of("orders", &[("id", 20), ("telephone", 25)])).unwrap();
    let said = "transform[0].mask names the column `phone`, which public.orders does not have";
    assert_eq!(told(&mut rules), [said], "it had it before");
    assert_eq!(rules.count_unmatched(), 1);
    assert!(rules.unmatched()[0].bares);
}

#[test]
fn names_are_looked_for_in_the_table_as_the_steps_before_leave_it() {
    let check = |rules: &str| {
        let mut rules = compile(rules).unwrap();
        rules.meet(&table("orders", ORDERS, Identity::Full), &[Op::Insert, Op::Delete]).unwrap();
        rules.unmatched().into_iter().map(|it| (it.rule, it.column)).collect::<Vec<_>>()
    };
    let steps = "transform = [{ rename = { email = \"mail\" } }, { set = { total = \"1\" } },
                 { drop = [\"mail\", \"total\"] }, { columns = [\"email\", \"id\"] }]";
    assert_eq!(check(steps), [("transform[3].columns".to_owned(), "email".to_owned())]);
    let behind = "transform = [{ function = \"function transform(c) return c end\" },
                  { drop = [\"made_up\"] }]";
    let mut rules = compile(behind).unwrap();
    rules.meet(&table("orders", ORDERS, Identity::Full), &[Op::Insert]).unwrap();
    assert_eq!(rules.unmatched(), [], "only the function knows");
}
