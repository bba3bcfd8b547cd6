//! Messages and the published schemas.

use serde_json::Value as Json;

use super::{TEXTS, every_kind, names};
use crate::{
    config::Format,
    format::{self, Encoder},
};

const NATIVE_SCHEMA: &str = include_str!("../../../docs/schema/native.schema.json");
const SEQUIN_SCHEMA: &str = include_str!("../../../docs/schema/sequin.schema.json");
const DEBEZIUM_SCHEMA: &str = include_str!("../../../docs/schema/debezium.schema.json");
const WITH_SCHEMA_SCHEMA: &str = include_str!("../../../docs/schema/debezium_schema.schema.json");
const WAL2JSON_SCHEMA: &str = include_str!("../../../docs/schema/wal2json.schema.json");
const CLOUDEVENTS_SCHEMA: &str = include_str!("../../../docs/schema/cloudevents.schema.json");

fn assert_valid(schema: &str, encoder: &mut Encoder) -> Vec<Json> {
    let schema: Json = serde_json::from_str(schema).unwrap();
    assert!(jsonschema::meta::is_valid(&schema));
    let validator = jsonschema::validator_for(&schema).unwrap();
    let mut messages = Vec::new();
    for (name, change) in every_kind() {
        let mut out = Vec::new();
        if encoder.encode(&change, &mut out).unwrap() {
            let message: Json = serde_json::from_slice(&out).unwrap();
            if let Err(error) = validator.validate(&message) {
                panic!("{name}: {error}\n{message:#}");
            }
            messages.push(message);
        }
    }
    // A schema that lets everything pass proves nothing: each required member is really required.
    for member in schema["required"].as_array().unwrap() {
        let mut broken = messages[0].clone();
        broken.as_object_mut().unwrap().remove(member.as_str().unwrap());
        assert!(!validator.is_valid(&broken), "{member} is not required");
    }
    messages
}

#[test]
fn native_passes_its_schema() {
    let messages = assert_valid(NATIVE_SCHEMA, &mut Encoder::new(Format::Native, &names()));
    assert_eq!(messages.len(), every_kind().len());
}

#[test]
fn sequin_passes_its_schema_and_has_nothing_for_truncate_and_message() {
    let messages = assert_valid(SEQUIN_SCHEMA, &mut Encoder::new(Format::Sequin, &names()));
    assert_eq!(messages.len(), every_kind().len() - 3);
}

#[test]
fn each_json_format_passes_its_schema() {
    for (format, schema) in [
        (Format::Debezium, DEBEZIUM_SCHEMA),
        (Format::DebeziumSchema, WITH_SCHEMA_SCHEMA),
        (Format::Wal2json, WAL2JSON_SCHEMA),
        (Format::Cloudevents, CLOUDEVENTS_SCHEMA),
        (Format::CloudeventsBinary, NATIVE_SCHEMA),
    ] {
        let messages = assert_valid(schema, &mut Encoder::new(format, &names()));
        assert_eq!(messages.len(), every_kind().len(), "{format:?}");
    }
}

#[test]
fn every_format_of_the_configuration_has_a_published_schema() {
    for format in TEXTS.into_iter().chain([Format::Walstream]) {
        let name = serde_json::to_value(format).unwrap();
        assert!(format::schema(name.as_str().unwrap()).is_some(), "{name}");
    }
}

#[test]
fn the_published_proto_has_the_fields_of_the_record() {
    let (proto, _) = format::schema("walstream").unwrap();
    for field in [
        "string lsn = 1;",
        "int64 commit_time = 2;",
        "string table = 3;",
        "string operation = 4;",
        "map<string, string> old = 5;",
        "map<string, string> new = 6;",
        "repeated string old_nulls = 101;",
        "repeated string new_nulls = 102;",
        "repeated string unchanged = 103;",
        "uint32 index = 104;",
        "string idempotency_key = 105;",
        "bool read = 106;",
    ] {
        assert!(proto.contains(field), "{field}");
    }
}
