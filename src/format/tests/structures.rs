//! Arrays, rows and `hstore` as PostgreSQL prints them, whole and damaged.

use std::collections::BTreeMap;

use proptest::prelude::*;
use serde_json::{Value as Json, json};

use crate::{
    config::{BytesStyle, NumberStyle, TimestampStyle, Types},
    format::json::{Dialect, Shape, write_value},
    schema::{Type, TypeKind},
};

fn text_type() -> Type {
    Type::base(25, -1)
}

fn array_of(element: Type) -> Type {
    let kind = TypeKind::Array { element: Box::new(element), delimiter: ',' };
    Type { kind, ..Type::base(70_001, -1) }
}

fn row_of(fields: &[(&str, Type)]) -> Type {
    let fields = fields.iter().map(|(name, ty)| ((*name).to_owned(), ty.clone())).collect();
    Type { kind: TypeKind::Composite { fields }, ..Type::base(70_002, -1) }
}

fn hstore() -> Type {
    Type { name: "extensions.hstore".into(), ..Type::base(70_003, -1) }
}

/// A row of a text, an array and a row of the same two.
fn nested() -> Type {
    let inner = [("a", text_type()), ("b", array_of(text_type()))];
    row_of(&[("a", text_type()), ("b", array_of(text_type())), ("c", row_of(&inner))])
}

fn shaped(ty: &Type, text: &str) -> Json {
    let mut out = Vec::new();
    write_value(&mut out, &Shape::of(ty, Dialect::Postgres), text.as_bytes()).unwrap();
    serde_json::from_slice(&out).unwrap()
}

/// What `array_out` and `record_out` print of a value.
fn printed(json: &Json, in_row: bool) -> String {
    let (text, quoted) = match json {
        Json::Null => return if in_row { String::new() } else { "NULL".into() },
        Json::String(text) => {
            let special: &[char] = if in_row { &['(', ')', ','] } else { &['{', '}', ','] };
            let blank = |c: char| c.is_ascii_whitespace() || c == '\x0b';
            let odd = |c: char| special.contains(&c) || c == '"' || c == '\\' || blank(c);
            let null = !in_row && text.eq_ignore_ascii_case("null");
            (text.clone(), text.is_empty() || null || text.contains(odd))
        }
        Json::Array(items) => {
            let items: Vec<_> = items.iter().map(|item| printed(item, false)).collect();
            let text = format!("{{{}}}", items.join(","));
            (text, in_row)
        }
        Json::Object(fields) => {
            let fields: Vec<_> = fields.values().map(|field| printed(field, true)).collect();
            (format!("({})", fields.join(",")), true)
        }
        other => panic!("{other} is in no such value"),
    };
    match (quoted, in_row) {
        (false, _) => text,
        (true, false) => format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"")),
        (true, true) => format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\"\"")),
    }
}

/// A value alone, not within another.
fn printed_alone(json: &Json) -> String {
    match json {
        Json::Object(fields) => {
            let fields: Vec<_> = fields.values().map(|field| printed(field, true)).collect();
            format!("({})", fields.join(","))
        }
        other => printed(other, false),
    }
}

/// The text without what only quotes: the same for every way to quote it.
fn bare(text: &str) -> String {
    text.replace(['"', '\\'], "").to_lowercase()
}

fn item() -> impl Strategy<Value = Json> {
    prop::option::of("[abNUL ,{}()\\[\\]=:\"\\\\é\n]{0,5}").prop_map(|text| json!(text))
}

/// Arrays of one or two dimensions.
fn array() -> impl Strategy<Value = Json> {
    let flat = prop::collection::vec(item(), 0..4).prop_map(Json::Array);
    let deep = (1_usize..3, 1_usize..3).prop_flat_map(|(rows, width)| {
        let row = prop::collection::vec(item(), width..=width).prop_map(Json::Array);
        prop::collection::vec(row, rows..=rows).prop_map(Json::Array)
    });
    prop_oneof![flat, deep]
}

fn value() -> impl Strategy<Value = (Type, Json)> {
    let maybe = |array| prop_oneof![Just(Json::Null), array];
    let row = (item(), maybe(array().boxed())).prop_map(|(a, b)| json!({"a": a, "b": b})).boxed();
    let nested_row = (item(), maybe(array().boxed()), maybe(row))
        .prop_map(|(a, b, c)| json!({"a": a, "b": b, "c": c}))
        .boxed();
    prop_oneof![
        array().prop_map(|json| (array_of(text_type()), json)),
        nested_row.clone().prop_map(|json| (nested(), json)),
        prop::collection::vec(prop_oneof![Just(Json::Null), nested_row], 0..3)
            .prop_map(|rows| (array_of(nested()), Json::Array(rows))),
    ]
}

/// One character is taken away, added or replaced, or the rest is cut off.
fn damaged(text: &str, (at, how, with): (prop::sample::Index, u8, char)) -> String {
    let mut chars: Vec<char> = text.chars().collect();
    let at = at.index(chars.len().max(1)).min(chars.len());
    match how {
        0 => chars.truncate(at),
        1 => chars.insert(at, with),
        _ if at == chars.len() => {}
        2 => drop(chars.remove(at)),
        _ => chars[at] = with,
    }
    chars.into_iter().collect()
}

fn pairs() -> impl Strategy<Value = BTreeMap<String, Option<String>>> {
    let value = prop::option::of("[bN\"\\\\,=>é]{0,4}");
    prop::collection::btree_map("[a\"\\\\,=> ]{0,4}", value, 0..4)
}

/// What `hstore_out` prints.
fn printed_hstore(json: &Json) -> String {
    let quoted = |text: &str| format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""));
    let pair = |(key, value): (&String, &Json)| {
        format!("{}=>{}", quoted(key), value.as_str().map_or("NULL".into(), quoted))
    };
    json.as_object().unwrap().iter().map(pair).collect::<Vec<_>>().join(", ")
}

/// The characters without what quotes, in an order of their own: an object has none.
fn sorted(text: &str) -> Vec<char> {
    let mut all: Vec<char> = bare(text).chars().collect();
    all.sort_unstable();
    all
}

proptest! {
    #[test]
    fn nested_arrays_and_rows_survive((ty, json) in value()) {
        prop_assert_eq!(shaped(&ty, &printed_alone(&json)), json);
    }

    /// Whatever is taken apart accounts for every character, in its order; else it is left whole.
    #[test]
    fn damaged_text_is_left_as_it_is_or_accounted_for_to_the_last_character(
        (ty, json) in value(),
        damage in (any::<prop::sample::Index>(), 0_u8..4, prop::sample::select(
            vec!['{', '}', '(', ')', ',', '"', '\\', '[', ']', '=', ' ', 'x', 'N', '1'],
        )),
    ) {
        let text = damaged(&printed_alone(&json), damage);
        let seen = shaped(&ty, &text);
        if seen != Json::String(text.clone()) {
            prop_assert_eq!(bare(&printed_alone(&seen)), bare(&text), "{}", seen);
        }
    }

    #[test]
    fn an_hstore_survives_and_a_damaged_one_is_left_as_it_is_or_accounted_for(
        pairs in pairs(),
        damage in (any::<prop::sample::Index>(), 0_u8..4, prop::sample::select(
            vec!['"', '\\', ',', '=', ' ', 'N'],
        )),
    ) {
        let json = json!(pairs);
        prop_assert_eq!(&shaped(&hstore(), &printed_hstore(&json)), &json);
        let text = damaged(&printed_hstore(&json), damage);
        let seen = shaped(&hstore(), &text);
        // a repeated key counts once
        let taken = seen.as_object().is_some_and(|seen| seen.len() == pairs.len());
        if taken {
            let seen = printed_hstore(&seen);
            prop_assert_eq!(sorted(&seen), sorted(&text), "{}", seen);
        }
    }

    #[test]
    fn no_bytes_make_any_shape_panic_or_write_half_a_value(
        bytes in prop_oneof![
            prop::collection::vec(any::<u8>(), 0..40),
            r#"[\[\]{}(),"\\ 0-9a-eNUL:;.+=>x-]{0,24}"#.prop_map(String::into_bytes),
        ],
        chosen in any::<bool>(),
    ) {
        let types = Types {
            numeric: NumberStyle::String,
            int8: NumberStyle::String,
            bytea: BytesStyle::Base64,
            timestamp: TimestampStyle::EpochMillis,
        };
        let dialect = if chosen { Dialect::Chosen(types) } else { Dialect::Postgres };
        let base = |oid| Type::base(oid, -1);
        let scalars = [17, 20, 1114, 1184, 1700, 22, 1182].map(base).into_iter();
        let all = scalars.chain([
            hstore(), nested(), array_of(nested()), array_of(hstore()), array_of(base(1184)),
            row_of(&[]),
        ]);
        for ty in all {
            let mut out = b"kept".to_vec();
            match write_value(&mut out, &Shape::of(&ty, dialect), &bytes) {
                Ok(()) => prop_assert!(serde_json::from_slice::<Json>(&out[4..]).is_ok()),
                Err(_) => prop_assert_eq!(&out, b"kept"),
            }
        }
    }
}

#[test]
fn arrays_that_no_printer_makes_are_left_as_they_are() {
    for text in [
        "{a,{b}}",
        "{{a},b}",
        "{{a,b},{c}}",
        "{{},{}}",
        "{a}b",
        "{a b\"c}",
        "{{{{{{{a}}}}}}}",
        "[x]={a}",
        "[1:1={a}",
        "[1:2]={a}",
        "[1:1][1:2]={a}",
        "[1:1]{a}",
        "[2:1]={}",
        "[0:1]={{a,b}}",
    ] {
        assert_eq!(shaped(&array_of(text_type()), text), json!(text));
    }
    assert_eq!(shaped(&array_of(text_type()), "[-1:0][5:5]={{a},{b}}"), json!([["a"], ["b"]]));
    for text in ["(a,\"b\"c)", "(a\"b\",c)", "(a),b)", "((a,b)", "(a\\,b)", "(\"a,b)", "(a,b"] {
        assert_eq!(shaped(&row_of(&[("a", text_type()), ("b", text_type())]), text), json!(text));
    }
    for text in
        ["\"a\"", "\"a\"=>", "\"a\"=>b", "\"a\"=>\"b\",\"c\"=>\"d\"", "\"a\"=>\"b\", ", "a=>b"]
    {
        assert_eq!(shaped(&hstore(), text), json!(text));
    }
    assert_eq!(shaped(&Type::base(22, -1), "1  2"), json!("1  2"));
}

#[test]
fn each_choice_of_types_holds_wherever_the_type_stands() {
    let written = |types: Types, ty: &Type, text: &str| {
        let mut out = Vec::new();
        let shape = Shape::of(ty, Dialect::Chosen(types));
        write_value(&mut out, &shape, text.as_bytes()).unwrap();
        String::from_utf8(out).unwrap()
    };
    let base = |oid| Type::base(oid, -1);
    let text =
        Types { numeric: NumberStyle::String, int8: NumberStyle::String, ..Types::default() };
    assert_eq!(written(text, &base(1700), "1.50"), "\"1.50\"");
    assert_eq!(written(text, &base(20), "9"), "\"9\"");
    assert_eq!(written(text, &base(23), "9"), "9");
    assert_eq!(written(text, &base(1016), "{9,NULL}"), "[\"9\",null]");
    let row = row_of(&[("n", array_of(base(1700))), ("f", base(701))]);
    assert_eq!(written(text, &row, "({1.0},1.5)"), "{\"n\":[\"1.0\"],\"f\":1.5}");

    let bytes = Types { bytea: BytesStyle::Base64, ..Types::default() };
    assert_eq!(written(bytes, &base(17), "\\x00ff"), "\"AP8=\"");
    assert_eq!(written(bytes, &base(17), "\\x"), "\"\"");
    assert_eq!(written(bytes, &base(17), "\\xabc"), "\"\\\\xabc\"");

    let times = |timestamp| Types { timestamp, ..Types::default() };
    let micros = times(TimestampStyle::EpochMicros);
    assert_eq!(written(micros, &base(1184), "2026-04-06 09:14:22.000123+00"), "1775466862000123");
    assert_eq!(written(micros, &base(1114), "1970-01-01 00:00:00"), "0");
    assert_eq!(written(micros, &base(1114), "infinity"), "\"infinity\"");
    assert_eq!(
        written(micros, &base(1184), "2026-04-06 09:14:22+02"),
        "\"2026-04-06T09:14:22+02:00\""
    );
    assert_eq!(written(micros, &base(1114), "294276-12-31 23:59:59"), "\"294276-12-31T23:59:59\"");
    let millis = times(TimestampStyle::EpochMillis);
    assert_eq!(written(millis, &base(1114), "1969-12-31 23:59:59.9999"), "-1");
    assert_eq!(written(millis, &base(1185), "{\"2026-04-06 09:14:22+00\"}"), "[1775466862000]");
    let seconds = times(TimestampStyle::EpochSeconds);
    assert_eq!(written(seconds, &base(1114), "0044-03-15 12:00:00 BC"), "-63517780800");
    assert_eq!(written(seconds, &base(1082), "2026-04-06"), "\"2026-04-06\"");
}
