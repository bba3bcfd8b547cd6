//! CloudEvents 1.0 (<https://github.com/cloudevents/spec>): a native envelope as an event's data,
//! in structured JSON mode or in binary mode, where the attributes are headers.
//! `docs/schema/cloudevents.schema.json` is the schema of the structured one.

use super::{Names, json, native::Native};
use crate::{
    change::{Change, Op},
    config::Types,
    error::Result,
};

/// Where the schema of the data is published.
const DATA_SCHEMA: &str = "https://walrace.dev/schema/native.schema.json";

/// Writes events.
#[derive(Debug)]
pub(super) struct CloudEvents {
    native: Native,
    /// Attributes in the message, or as headers beside it.
    structured: bool,
    /// The source as a URI reference: `/walrace/app`.
    source: String,
}

impl CloudEvents {
    pub(super) fn new(names: &Names, structured: bool, types: Types) -> Self {
        let source = format!("/walrace/{}", percent(&names.source));
        Self { native: Native::new(types), structured, source }
    }

    /// Appends one event, without a line end; in binary mode its data alone.
    pub(super) fn encode(&mut self, change: &Change, out: &mut Vec<u8>) -> Result<()> {
        if !self.structured {
            return self.native.encode(change, out);
        }
        out.extend_from_slice(b"{\"specversion\":\"1.0\",\"id\":\"");
        out.extend_from_slice(change.idempotency_key().as_bytes());
        out.extend_from_slice(b"\",\"source\":");
        json::write_str(out, &self.source);
        out.extend_from_slice(b",\"type\":\"");
        out.extend_from_slice(kind(change.op).as_bytes());
        out.extend_from_slice(b"\",\"subject\":");
        json::write_str(out, &subject(change));
        out.extend_from_slice(b",\"time\":\"");
        out.extend_from_slice(change.transaction.commit_time.to_string().as_bytes());
        out.extend_from_slice(b"\",\"datacontenttype\":\"application/json\",\"dataschema\":\"");
        out.extend_from_slice(DATA_SCHEMA.as_bytes());
        out.push(b'"');
        if let Some(key) = self.key(change)? {
            out.extend_from_slice(b",\"partitionkey\":");
            json::write_str(out, &key);
        }
        out.extend_from_slice(b",\"data\":");
        self.native.encode(change, out)?;
        out.push(b'}');
        Ok(())
    }

    /// Appends the native envelope's key.
    pub(super) fn encode_key(&mut self, change: &Change, out: &mut Vec<u8>) -> Result<bool> {
        self.native.encode_key(change, out)
    }

    /// The attributes as the HTTP binding names and encodes them; none in structured mode.
    pub(super) fn headers(&mut self, change: &Change) -> Result<Vec<(&'static str, String)>> {
        if self.structured {
            return Ok(Vec::new());
        }
        let mut headers = vec![
            ("ce-specversion", "1.0".to_owned()),
            ("ce-id", change.idempotency_key()),
            ("ce-source", self.source.clone()),
            ("ce-type", kind(change.op).to_owned()),
            ("ce-subject", percent(&subject(change))),
            ("ce-time", change.transaction.commit_time.to_string()),
            ("ce-dataschema", DATA_SCHEMA.to_owned()),
        ];
        if let Some(key) = self.key(change)? {
            headers.push(("ce-partitionkey", percent(&key)));
        }
        Ok(headers)
    }

    pub(super) fn content_type(&self) -> &'static str {
        if self.structured { "application/cloudevents+json" } else { "application/json" }
    }

    /// The message's key, so that events of one row can be kept together.
    fn key(&mut self, change: &Change) -> Result<Option<String>> {
        if let Some(key) = change.shaped.as_ref().and_then(|shaped| shaped.key.as_ref()) {
            return Ok(Some(key.clone()));
        }
        let mut key = Vec::new();
        let written = self.native.encode_key(change, &mut key)?;
        Ok(written.then(|| String::from_utf8_lossy(&key).into_owned()))
    }
}

fn kind(op: Op) -> &'static str {
    match op {
        Op::Insert => "dev.walrace.change.insert",
        Op::Update => "dev.walrace.change.update",
        Op::Delete => "dev.walrace.change.delete",
        Op::Read => "dev.walrace.change.read",
        Op::Truncate => "dev.walrace.change.truncate",
        Op::Message => "dev.walrace.change.message",
    }
}

/// `schema.table`, or the prefix of a logical message; the attribute must not be empty.
fn subject(change: &Change) -> String {
    match (&change.table, &change.message) {
        (Some(table), _) => table.full_name(),
        (None, Some(message)) if !message.prefix.is_empty() => message.prefix.clone(),
        _ => "message".to_owned(),
    }
}

/// Blanks, quotes, percent signs and whatever is not printable ASCII as `%XX`
/// (the HTTP protocol binding of CloudEvents, section 3.1.3.2).
fn percent(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'!' | b'#'..=b'$' | b'&'..=b'~' => encoded.push(byte.into()),
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}
