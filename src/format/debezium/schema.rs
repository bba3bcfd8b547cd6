//! The schema block that Kafka Connect's `JsonConverter` writes beside each payload with
//! `schemas.enable = true`; made once for each version of a table.

use super::form::Form;
use crate::{format::json, schema::Table};

/// The blocks of one table, ready to be copied: `{"schema":…,"payload":`.
#[derive(Debug, Default)]
pub(super) struct Blocks {
    pub(super) value: Vec<u8>,
    pub(super) key: Vec<u8>,
    /// Of a delete that knows only the identity's columns.
    pub(super) partial_key: Vec<u8>,
}

const SOURCE: &str = concat!(
    r#"{"type":"struct","fields":["#,
    r#"{"type":"string","optional":false,"field":"version"},"#,
    r#"{"type":"string","optional":false,"field":"connector"},"#,
    r#"{"type":"string","optional":false,"field":"name"},"#,
    r#"{"type":"int64","optional":false,"field":"ts_ms"},"#,
    r#"{"type":"string","optional":true,"name":"io.debezium.data.Enum","version":1,"parameters":"#,
    r#"{"allowed":"true,first,first_in_data_collection,last_in_data_collection,last,false,"#,
    r#"incremental"},"default":"false","field":"snapshot"},"#,
    r#"{"type":"string","optional":false,"field":"db"},"#,
    r#"{"type":"string","optional":true,"field":"sequence"},"#,
    r#"{"type":"int64","optional":true,"field":"ts_us"},"#,
    r#"{"type":"int64","optional":true,"field":"ts_ns"},"#,
    r#"{"type":"string","optional":false,"field":"schema"},"#,
    r#"{"type":"string","optional":false,"field":"table"},"#,
    r#"{"type":"int64","optional":true,"field":"txId"},"#,
    r#"{"type":"int64","optional":true,"field":"lsn"},"#,
    r#"{"type":"int64","optional":true,"field":"xmin"},"#,
    r#"{"type":"string","optional":true,"field":"origin"},"#,
    r#"{"type":"int64","optional":true,"field":"origin_lsn"}],"#,
    r#""optional":false,"name":"io.debezium.connector.postgresql.Source","version":1,"#,
    r#""field":"source"}"#,
);

const TRANSACTION: &str = concat!(
    r#"{"type":"struct","fields":["#,
    r#"{"type":"string","optional":false,"field":"id"},"#,
    r#"{"type":"int64","optional":false,"field":"total_order"},"#,
    r#"{"type":"int64","optional":false,"field":"data_collection_order"}],"#,
    r#""optional":true,"name":"event.block","version":1,"field":"transaction"}"#,
);

/// The block before a logical message's payload.
pub(super) fn of_message() -> Vec<u8> {
    format!(
        "{{\"schema\":{{\"type\":\"struct\",\"fields\":[\
         {{\"type\":\"string\",\"optional\":false,\"field\":\"op\"}},\
         {{\"type\":\"int64\",\"optional\":true,\"field\":\"ts_ms\"}},{SOURCE},{TRANSACTION},\
         {{\"type\":\"struct\",\"fields\":[\
         {{\"type\":\"string\",\"optional\":true,\"field\":\"prefix\"}},\
         {{\"type\":\"bytes\",\"optional\":true,\"field\":\"content\"}}],\"optional\":false,\
         \"name\":\"io.debezium.connector.postgresql.Message\",\"version\":1,\
         \"field\":\"message\"}}],\"optional\":false,\
         \"name\":\"io.debezium.connector.postgresql.MessageValue\",\"version\":1}},\"payload\":"
    )
    .into_bytes()
}

/// The block before the payload of a logical message's key.
pub(super) const MESSAGE_KEY: &str = concat!(
    r#"{"schema":{"type":"struct","fields":[{"type":"string","optional":true,"field":"prefix"}],"#,
    r#""optional":false,"name":"io.debezium.connector.postgresql.MessageKey","version":1},"#,
    r#""payload":"#,
);

/// What the blocks of a table are made of.
pub(super) struct Described<'a> {
    /// `topic.prefix` of Debezium.
    pub(super) prefix: &'a str,
    pub(super) table: &'a Table,
    pub(super) forms: &'a [Form],
    /// For each column, whether every old and new row has a value for it.
    pub(super) required: &'a [bool],
    pub(super) key: &'a [usize],
    pub(super) partial_key: &'a [usize],
}

impl Described<'_> {
    pub(super) fn blocks(&self) -> Blocks {
        Blocks {
            value: self.value(),
            key: self.key(self.key),
            partial_key: self.key(self.partial_key),
        }
    }

    fn name(&self, what: &str) -> String {
        format!("{}.{}.{}.{what}", self.prefix, self.table.schema, self.table.name)
    }

    fn value(&self) -> Vec<u8> {
        let mut out = b"{\"schema\":{\"type\":\"struct\",\"fields\":[".to_vec();
        for row in ["before", "after"] {
            out.extend_from_slice(b"{\"type\":\"struct\",\"fields\":[");
            self.columns(&mut out, 0..self.forms.len(), |index| {
                !self.required.get(index).copied().unwrap_or_default()
            });
            out.extend_from_slice(b"],\"optional\":true,\"name\":");
            json::write_str(&mut out, &self.name("Value"));
            out.extend_from_slice(format!(",\"field\":\"{row}\"}},").as_bytes());
        }
        out.extend_from_slice(
            format!(
                "{SOURCE},{TRANSACTION},{{\"type\":\"string\",\"optional\":false,\"field\":\"op\"}}"
            )
            .as_bytes(),
        );
        for time in ["ts_ms", "ts_us", "ts_ns"] {
            let field = format!(",{{\"type\":\"int64\",\"optional\":true,\"field\":\"{time}\"}}");
            out.extend_from_slice(field.as_bytes());
        }
        out.extend_from_slice(b"],\"optional\":false,\"name\":");
        json::write_str(&mut out, &self.name("Envelope"));
        out.extend_from_slice(b",\"version\":2},\"payload\":");
        out
    }

    fn key(&self, columns: &[usize]) -> Vec<u8> {
        let mut out = b"{\"schema\":{\"type\":\"struct\",\"fields\":[".to_vec();
        self.columns(&mut out, columns.iter().copied(), |_| false);
        out.extend_from_slice(b"],\"optional\":false,\"name\":");
        json::write_str(&mut out, &self.name("Key"));
        out.extend_from_slice(b"},\"payload\":");
        out
    }

    fn columns(
        &self,
        out: &mut Vec<u8>,
        indexes: impl Iterator<Item = usize>,
        optional: impl Fn(usize) -> bool,
    ) {
        for (count, index) in indexes.enumerate() {
            let (Some(form), Some(column)) = (self.forms.get(index), self.table.columns.get(index))
            else {
                continue;
            };
            if count > 0 {
                out.push(b',');
            }
            write_type(out, form, optional(index));
            out.extend_from_slice(b",\"field\":");
            json::write_str(out, &column.name);
            out.push(b'}');
        }
    }
}

/// Appends the schema of a value, up to its closing brace.
fn write_type(out: &mut Vec<u8>, form: &Form, optional: bool) {
    out.extend_from_slice(b"{\"type\":\"");
    out.extend_from_slice(connect_type(form).as_bytes());
    out.push(b'"');
    match form {
        Form::Array { element, .. } => {
            out.extend_from_slice(b",\"items\":");
            write_type(out, element, true);
            out.push(b'}');
        }
        Form::VariableDecimal => out.extend_from_slice(
            b",\"fields\":[{\"type\":\"int32\",\"optional\":false,\"field\":\"scale\"},\
              {\"type\":\"bytes\",\"optional\":false,\"field\":\"value\"}]",
        ),
        Form::Point => out.extend_from_slice(
            b",\"fields\":[{\"type\":\"double\",\"optional\":false,\"field\":\"x\"},\
              {\"type\":\"double\",\"optional\":false,\"field\":\"y\"},\
              {\"type\":\"bytes\",\"optional\":true,\"field\":\"wkb\"},\
              {\"type\":\"int32\",\"optional\":true,\"field\":\"srid\"}]",
        ),
        _ => {}
    }
    out.extend_from_slice(if optional { b",\"optional\":true" } else { b",\"optional\":false" });
    let Some(name) = logical_name(form) else { return };
    out.extend_from_slice(format!(",\"name\":\"{name}\",\"version\":1").as_bytes());
    let rest = match form {
        Form::VariableDecimal => ",\"doc\":\"Variable scaled decimal\"".to_owned(),
        Form::Point => ",\"doc\":\"Geometry (POINT)\"".to_owned(),
        Form::Bits { length } => format!(",\"parameters\":{{\"length\":\"{length}\"}}"),
        Form::Money => ",\"parameters\":{\"scale\":\"2\"}".to_owned(),
        Form::Decimal { scale, precision } => format!(
            ",\"parameters\":{{\"scale\":\"{scale}\",\
             \"connect.decimal.precision\":\"{precision}\"}}"
        ),
        _ => String::new(),
    };
    out.extend_from_slice(rest.as_bytes());
}

fn connect_type(form: &Form) -> &'static str {
    match form {
        Form::Bool | Form::Bit => "boolean",
        Form::Int(16) => "int16",
        Form::Int(32) | Form::Date | Form::Time { milli: true } => "int32",
        Form::Int(_) | Form::Time { milli: false } | Form::Timestamp { .. } | Form::Interval => {
            "int64"
        }
        Form::Float32 => "float",
        Form::Float64 => "double",
        Form::Text(_) | Form::ZonedTime | Form::ZonedTimestamp(_) | Form::Hstore => "string",
        Form::Bytes | Form::Decimal { .. } | Form::Money | Form::Bits { .. } => "bytes",
        Form::VariableDecimal | Form::Point => "struct",
        Form::Array { .. } => "array",
    }
}

/// What the value means, beside its type.
fn logical_name(form: &Form) -> Option<&'static str> {
    Some(match form {
        Form::Text(name) => (*name)?,
        Form::Hstore => "io.debezium.data.Json",
        Form::VariableDecimal => "io.debezium.data.VariableScaleDecimal",
        Form::Decimal { .. } | Form::Money => "org.apache.kafka.connect.data.Decimal",
        Form::Date => "io.debezium.time.Date",
        Form::Time { milli: true } => "io.debezium.time.Time",
        Form::Time { milli: false } => "io.debezium.time.MicroTime",
        Form::ZonedTime => "io.debezium.time.ZonedTime",
        Form::Timestamp { milli: true } => "io.debezium.time.Timestamp",
        Form::Timestamp { milli: false } => "io.debezium.time.MicroTimestamp",
        Form::ZonedTimestamp(_) => "io.debezium.time.ZonedTimestamp",
        Form::Interval => "io.debezium.time.MicroDuration",
        Form::Bits { .. } => "io.debezium.data.Bits",
        Form::Point => "io.debezium.data.geometry.Point",
        _ => return None,
    })
}
