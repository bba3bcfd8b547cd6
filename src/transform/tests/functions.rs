//! Functions in Luau.

use serde_json::json;

use super::{ANN, after, compile, fails, insert, message, native, row, shape, update};
use crate::{
    change::{Change, Value},
    error::Class,
};

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
