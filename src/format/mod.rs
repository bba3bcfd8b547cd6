//! change -> bytes: the formats that a sink can pick.

use crate::{change::Change, config::Format, error::Result};

mod json;
mod native;
mod pretty;
mod sequin;
mod table;
mod template;
#[cfg(test)]
mod tests;

pub use self::{sequin::id, template::Template};

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
    Pretty(pretty::Pretty),
}

impl Encoder {
    /// An encoder of `format`.
    pub fn new(format: Format, names: &Names) -> Self {
        let kind = match format {
            Format::Native => Kind::Native(native::Native::new()),
            Format::Sequin => Kind::Sequin(Box::new(sequin::Sequin::new(names))),
        };
        Self { kind }
    }

    /// An encoder of one line a change for people, with ANSI colours where `colour`.
    pub fn pretty(colour: bool) -> Self {
        Self { kind: Kind::Pretty(pretty::Pretty::new(colour)) }
    }

    /// Appends the change, without a line end; the text holds no raw line end either. `false`: the
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

    /// Appends the key of the change's message, for targets that have keys: what the sink's rules
    /// chose, else the row's key as this format writes it. `false`: it has none, and nothing was
    /// appended.
    pub fn encode_key(&mut self, change: &Change, out: &mut Vec<u8>) -> Result<bool> {
        if let Some(key) = change.shaped.as_ref().and_then(|shaped| shaped.key.as_ref()) {
            out.extend_from_slice(key.as_bytes());
            return Ok(true);
        }
        match &mut self.kind {
            Kind::Native(native) => native.encode_key(change, out),
            Kind::Sequin(sequin) => sequin.encode_key(change, out),
            Kind::Pretty(_) => Ok(false),
        }
    }

    /// The media type of a message.
    pub fn content_type(&self) -> &'static str {
        match self.kind {
            Kind::Native(_) | Kind::Sequin(_) => "application/json",
            Kind::Pretty(_) => "text/plain; charset=utf-8",
        }
    }
}
