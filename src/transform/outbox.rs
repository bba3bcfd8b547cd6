//! Rows of an outbox table, and logical messages, as events of their own: with their route, key,
//! headers and body, and without a trace of the row that carried them.

use std::sync::Arc;

use bytes::Bytes;
use serde_json::Value as Json;

use super::view::ByTable;
use crate::{
    change::{Change, Message, Op, Row, Shaped, Value},
    config,
    error::{Error, Result},
    format::one_line,
    schema::{Identity, Table},
};

/// Which changes are events, and where their parts are.
#[derive(Debug)]
pub(super) struct Outbox {
    config: config::Outbox,
    tables: ByTable<(), Arc<Layout>>,
}

/// What the outbox makes of a change.
#[derive(Debug)]
pub(super) enum Sorted {
    /// It is an event now.
    Event(Change),
    /// A change of the outbox table that is none: an update, a delete or a truncate.
    Nothing,
    /// It has nothing to do with the outbox.
    Other(Change),
}

/// Where the parts of an event are in a version of the table.
#[derive(Debug)]
struct Layout {
    /// With the aggregate's id for its key, so that order holds for each aggregate.
    table: Arc<Table>,
    payload: (usize, Body),
    route: Option<usize>,
    key: Option<usize>,
    headers: Option<usize>,
    ty: Option<usize>,
    id: Option<usize>,
}

#[derive(Clone, Copy, Debug)]
enum Body {
    Json,
    Bytes,
    Text,
}

impl Outbox {
    pub(super) fn new(config: &config::Outbox) -> Self {
        Self { config: config.clone(), tables: ByTable::default() }
    }

    /// Tells events from other changes.
    pub(super) fn sort(&mut self, change: Change) -> Result<Sorted> {
        if let Some(message) = &change.message {
            let rest = self.config.message_prefix.as_deref();
            let rest = rest.and_then(|prefix| message.prefix.strip_prefix(prefix));
            return Ok(match rest {
                Some(rest) => Sorted::Event(message_event(&change, message, rest)),
                None => Sorted::Other(change),
            });
        }
        let Some(table) = change.table.as_ref().filter(|table| self.is_outbox(table)) else {
            return Ok(Sorted::Other(change));
        };
        let (Op::Insert | Op::Read, Some(row)) = (change.op, &change.after) else {
            return Ok(Sorted::Nothing);
        };
        let config = &self.config;
        let layout = self.tables.get(table, (), || layout(config, table).map(Arc::new))?;
        let shaped = event(&layout, row)?;
        Ok(Sorted::Event(layout.keyed(&change, shaped)))
    }

    /// Whether it is the outbox table; an error where that lacks a column that the rules name.
    pub(super) fn meet(&mut self, table: &Arc<Table>) -> Result<bool> {
        let config = &self.config;
        let is = self.is_outbox(table);
        if is {
            self.tables.get(table, (), || layout(config, table).map(Arc::new))?;
        }
        Ok(is)
    }

    /// The event of a change as far as its keys go, whatever else is wrong with it; `None` where it
    /// is none.
    pub(super) fn keyed(&mut self, change: &Change) -> Option<Change> {
        if change.message.is_some() {
            return match self.sort(change.clone()) {
                Ok(Sorted::Event(event)) => Some(event),
                _ => None,
            };
        }
        let table = change.table.as_ref().filter(|table| self.is_outbox(table))?;
        let config = &self.config;
        let layout = self.tables.get(table, (), || layout(config, table).map(Arc::new)).ok()?;
        let key = layout.text(change.after.as_ref()?, layout.key).ok()?;
        Some(layout.keyed(change, Shaped { key, ..Shaped::default() }))
    }

    fn is_outbox(&self, table: &Table) -> bool {
        let name = self.config.table.as_deref().and_then(|name| name.split_once('.'));
        name == Some((&table.schema, &table.name))
    }
}

fn message_event(change: &Change, message: &Message, rest: &str) -> Change {
    let (route, key) = match rest.split_once('#') {
        Some((route, key)) => (route, Some(key.to_owned())),
        None => (rest, None),
    };
    let route = (!route.is_empty()).then(|| route.to_owned());
    let payload = Some(message.content.clone());
    let shaped = Shaped { route, key, payload, ..Shaped::default() };
    Change { shaped: Some(Box::new(shaped)), ..change.clone() }
}

fn layout(config: &config::Outbox, table: &Arc<Table>) -> Result<Layout> {
    let find = |name: &str| {
        let found = table.columns.iter().position(|column| column.name == name);
        found.ok_or_else(|| {
            Error::config(format!("the outbox table {table} has no column {name}"))
                .remedy("name its columns under [sink.NAME.outbox]")
        })
    };
    let optional = |name: &Option<String>| name.as_deref().map(find).transpose();
    let payload = find(&config.payload_column)?;
    let body = match table.columns.get(payload).map(|column| column.ty.oid) {
        Some(114 | 3802) => Body::Json,
        Some(17) => Body::Bytes,
        _ => Body::Text,
    };
    let key = optional(&config.key_column)?;
    Ok(Layout {
        table: key.map_or_else(|| Arc::clone(table), |key| keyed_by(table, key)),
        payload: (payload, body),
        route: optional(&config.route_column)?,
        key,
        headers: optional(&config.headers_column)?,
        ty: optional(&config.type_column)?,
        id: optional(&config.id_column)?,
    })
}

impl Layout {
    /// The event that a row carries; without an aggregate its key is the row's.
    fn keyed(&self, row: &Change, shaped: Shaped) -> Change {
        let mut event = row.clone();
        if shaped.key.is_some() {
            event.table = Some(Arc::clone(&self.table));
        }
        event.shaped = Some(Box::new(shaped));
        if !row.row_keys().is_whole() {
            event.keep_keys_of(row);
        }
        event
    }

    fn text(&self, row: &Row, index: Option<usize>) -> Result<Option<String>> {
        let Some(Value::Text(bytes)) = index.and_then(|index| row.value(index)) else {
            return Ok(None);
        };
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(Some(text.to_owned())),
            Err(_) => Err(Error::data(format!("a column of {} is not UTF-8", self.table))),
        }
    }
}

fn keyed_by(table: &Table, key: usize) -> Arc<Table> {
    let mut table = Table { identity: Identity::Default, ..table.clone() };
    for (index, column) in table.columns.iter_mut().enumerate() {
        (column.primary_key, column.identity) = (index == key, index == key);
    }
    Arc::new(table)
}

fn event(layout: &Layout, row: &Row) -> Result<Shaped> {
    let text = |index| layout.text(row, index);
    let mut headers = match text(layout.headers)? {
        Some(json) => headers(&json, &layout.table)?,
        None => Vec::new(),
    };
    for (name, index) in [("id", layout.id), ("type", layout.ty)] {
        if let Some(value) = text(index)? {
            headers.push((name.to_owned(), value));
        }
    }
    let (index, body) = layout.payload;
    let payload = payload(row.value(index), body).ok_or_else(|| {
        Error::data(format!("the payload of {} is not what its type says", layout.table))
    })?;
    let (route, key) = (text(layout.route)?, text(layout.key)?);
    Ok(Shaped { route, key, headers, payload: Some(payload), ..Shaped::default() })
}

/// The message's body; a NULL is the JSON `null`.
fn payload(value: Option<Value<'_>>, body: Body) -> Option<Bytes> {
    let Some(Value::Text(text)) = value else { return Some(Bytes::from_static(b"null")) };
    Some(match body {
        Body::Text => Bytes::copy_from_slice(text),
        Body::Json => Bytes::from(one_line(text)?),
        Body::Bytes => Bytes::from(hex::decode(text.strip_prefix(b"\\x")?).ok()?),
    })
}

fn headers(json: &str, table: &Table) -> Result<Vec<(String, String)>> {
    let Ok(Json::Object(members)) = serde_json::from_str(json) else {
        return Err(Error::data(format!("the headers of {table} are no JSON object")));
    };
    let header = |(name, value)| match value {
        Json::Null => None,
        Json::String(text) => Some((name, text)),
        other => Some((name, other.to_string())),
    };
    Ok(members.into_iter().filter_map(header).collect())
}
