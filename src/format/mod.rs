//! change -> bytes: the formats that a sink can pick.

use crate::{
    change::Change,
    config::{Format, Types},
    error::{Error, Result},
};

mod cloudevents;
mod debezium;
mod json;
mod native;
mod pretty;
mod read;
mod schemas;
mod sequin;
mod table;
mod template;
#[cfg(test)]
mod tests;
mod time;
mod wal2json;
mod walstream;

pub(crate) use self::read::{Reading, one_line};
pub use self::{schemas::schema, sequin::id, template::Template, walstream::ChangeRecord};

/// The names that a message may carry beside the change.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names {
    /// The source, as the configuration names it.
    pub source: String,
    /// The database's name on its server.
    pub database: String,
    /// The server's host name.
    pub hostname: String,
    /// The sink, as the configuration names it.
    pub sink: String,
}

/// Writes changes in one format. It keeps what is the same for a table and for a transaction, so
/// that one encoder is used for a sink's whole life.
#[derive(Debug)]
pub struct Encoder {
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Native(native::Native),
    Sequin(Box<sequin::Sequin>),
    Debezium(Box<debezium::Debezium>),
    Wal2json(Box<wal2json::Wal2json>),
    CloudEvents(Box<cloudevents::CloudEvents>),
    Walstream(table::Shapes),
    Pretty(pretty::Pretty),
}

impl Encoder {
    /// An encoder of `format`.
    pub fn new(format: Format, names: &Names) -> Self {
        Self::with_types(format, names, Types::default())
    }

    /// An encoder of `format` whose values are written as `types` says, where the format heeds it:
    /// see [`Encoder::heeds_types`].
    pub fn with_types(format: Format, names: &Names, types: Types) -> Self {
        let kind = match format {
            Format::Native => Kind::Native(native::Native::new(types)),
            Format::Sequin => Kind::Sequin(Box::new(sequin::Sequin::new(names))),
            Format::Debezium | Format::DebeziumSchema => {
                let with_schema = format == Format::DebeziumSchema;
                Kind::Debezium(Box::new(debezium::Debezium::new(names, with_schema)))
            }
            Format::Wal2json => Kind::Wal2json(Box::new(wal2json::Wal2json::new())),
            Format::Cloudevents | Format::CloudeventsBinary => {
                let structured = format == Format::Cloudevents;
                Kind::CloudEvents(Box::new(cloudevents::CloudEvents::new(names, structured, types)))
            }
            Format::Walstream => {
                Kind::Walstream(table::Shapes::new(json::Dialect::Postgres, walstream::head))
            }
        };
        Self { kind }
    }

    /// Whether a format leaves it to the sink how values are written.
    pub fn heeds_types(format: Format) -> bool {
        matches!(format, Format::Native | Format::Cloudevents | Format::CloudeventsBinary)
    }

    /// An encoder of one line a change for people, with ANSI colours where `colour`.
    pub fn pretty(colour: bool) -> Self {
        Self { kind: Kind::Pretty(pretty::Pretty::new(colour)) }
    }

    /// Appends the change, without a line end; a text holds no raw line end either. `false`: the
    /// format has no message for it, and nothing was appended. An error leaves `out` as it was. A
    /// body that the sink's rules made is taken as it is.
    pub fn encode(&mut self, change: &Change, out: &mut Vec<u8>) -> Result<bool> {
        if let Some(payload) = change.shaped.as_ref().and_then(|shaped| shaped.payload.as_ref()) {
            out.extend_from_slice(payload);
            return Ok(true);
        }
        let start = out.len();
        let written = match &mut self.kind {
            Kind::Native(native) => native.encode(change, out).map(|()| true),
            Kind::Sequin(sequin) => sequin.encode(change, out),
            Kind::Debezium(debezium) => debezium.encode(change, out).map(|()| true),
            Kind::Wal2json(wal2json) => wal2json.encode(change, out).map(|()| true),
            Kind::CloudEvents(events) => events.encode(change, out).map(|()| true),
            Kind::Walstream(shapes) => match &change.table {
                Some(table) => walstream::encode(change, shapes.of(table), out),
                None => Ok(false),
            },
            Kind::Pretty(pretty) => {
                pretty.encode(change, out);
                Ok(true)
            }
        };
        if written.is_err() {
            out.truncate(start);
        }
        written
    }

    /// Appends the new row alone, as a JSON object; the columns whose value was not sent are left
    /// out and given back by their index. A change without a new row is an error of class `Bug`.
    pub fn encode_record(&mut self, change: &Change, out: &mut Vec<u8>) -> Result<Vec<usize>> {
        let start = out.len();
        let written = match &mut self.kind {
            Kind::Native(native) => native.encode_record(change, out),
            Kind::Sequin(sequin) => sequin.encode_record(change, out),
            _ => Err(Error::bug("this format writes no record of its own")),
        };
        if written.is_err() {
            out.truncate(start);
        }
        written
    }

    /// Appends the key of the change's message, for targets that have keys: what the sink's rules
    /// chose, else the row's key as this format writes it. `false`: it has none, and nothing was
    /// appended. An error leaves `out` as it was.
    pub fn encode_key(&mut self, change: &Change, out: &mut Vec<u8>) -> Result<bool> {
        if let Some(key) = change.shaped.as_ref().and_then(|shaped| shaped.key.as_ref()) {
            out.extend_from_slice(key.as_bytes());
            return Ok(true);
        }
        let start = out.len();
        let written = match &mut self.kind {
            Kind::Native(native) => native.encode_key(change, out),
            Kind::Sequin(sequin) => sequin.encode_key(change, out),
            Kind::Debezium(debezium) => debezium.encode_key(change, out),
            Kind::Wal2json(wal2json) => wal2json.encode_key(change, out),
            Kind::CloudEvents(events) => events.encode_key(change, out),
            Kind::Walstream(_) => Ok(change.table.as_ref().is_some_and(|table| {
                out.extend_from_slice(table.full_name().as_bytes());
                true
            })),
            Kind::Pretty(_) => Ok(false),
        };
        if written.is_err() {
            out.truncate(start);
        }
        written
    }

    /// The headers that belong to the change's message, for targets that have headers: the
    /// attributes of `cloudevents_binary` as its HTTP binding names and encodes them (`ce-id`; the
    /// Kafka binding says `ce_id`). Of every other format none, at no cost.
    pub fn headers(&mut self, change: &Change) -> Result<Vec<(&'static str, String)>> {
        match &mut self.kind {
            Kind::CloudEvents(events) => events.headers(change),
            _ => Ok(Vec::new()),
        }
    }

    /// Whether the change's message is followed by one with the same key and no value, for targets
    /// that have keys and forget by them (a compacted topic of Kafka).
    pub fn tombstone(&self, change: &Change) -> bool {
        matches!(self.kind, Kind::Debezium(_)) && debezium::tombstone(change)
    }

    /// The media type of a message.
    pub fn content_type(&self) -> &'static str {
        match self.kind {
            Kind::Native(_) | Kind::Sequin(_) | Kind::Debezium(_) | Kind::Wal2json(_) => {
                "application/json"
            }
            Kind::CloudEvents(ref events) => events.content_type(),
            Kind::Walstream(_) => "application/x-protobuf",
            Kind::Pretty(_) => "text/plain; charset=utf-8",
        }
    }
}
