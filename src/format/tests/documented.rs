//! What docs/formats.md shows of each format.

use std::sync::Arc;

use serde_json::Value as Json;

use super::{super::Encoder, NEW, OLD, TEXTS, bookings, change, names};
use crate::{
    change::{Before, Change, Op, Row, Value},
    config::Format,
    format::ChangeRecord,
    schema::Identity,
};

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
fn as_text(record: &ChangeRecord) -> String {
    let ChangeRecord { lsn, commit_time, table, operation, .. } = record;
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
        return as_text(&ChangeRecord::decode(out.as_slice()).unwrap());
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
    let page = include_str!("../../../docs/formats.md");
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
