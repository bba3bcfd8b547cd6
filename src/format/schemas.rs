//! The published description of each format.

/// The text and the media type of a format's schema, by the format's name in the configuration.
/// `None` for a name that is no format.
pub fn schema(format: &str) -> Option<(&'static str, &'static str)> {
    const JSON: &str = "application/schema+json";
    Some(match format {
        "native" | "cloudevents_binary" => {
            (include_str!("../../docs/schema/native.schema.json"), JSON)
        }
        "sequin" => (include_str!("../../docs/schema/sequin.schema.json"), JSON),
        "debezium" => (include_str!("../../docs/schema/debezium.schema.json"), JSON),
        "debezium_schema" => (include_str!("../../docs/schema/debezium_schema.schema.json"), JSON),
        "wal2json" => (include_str!("../../docs/schema/wal2json.schema.json"), JSON),
        "cloudevents" => (include_str!("../../docs/schema/cloudevents.schema.json"), JSON),
        "walstream" => {
            (include_str!("../../docs/schema/walstream.proto"), "text/plain; charset=utf-8")
        }
        _ => return None,
    })
}
