//! Masks, renamed and chosen columns.

use proptest::prelude::*;
use serde_json::json;

use super::{after, change, fails, insert, native, refused, shape, table, update};
use crate::{
    change::{Before, Change, Op, Row, Value},
    schema::Identity,
    transform::expression::{self, Expression},
};

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
