//! Values of every type, as JSON has them.

use proptest::prelude::*;
use serde_json::{Value as Json, json};

use crate::{
    format::json::{Dialect, Shape, write_str, write_value},
    schema::{Type, TypeKind},
};

const ORACLE: &str = include_str!("../../../tests/fixtures/to_jsonb.ndjson");

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
