//! A change as it lies in the parking lot: whole, and readable by later versions.

use std::sync::Arc;

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::{
    change::{Before, Change, Lsn, Message, Op, Row, Timestamp, Transaction},
    error::{Class, Classify, Error, Result},
    schema::Table,
};

/// Rows are base64 of the tuple as the journal has it.
#[derive(Serialize, Deserialize)]
struct Stored {
    offset: u64,
    op: Op,
    index: u32,
    closes_transaction: bool,
    xid: u32,
    commit_lsn: Lsn,
    commit_time: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    table: Option<Table>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    before_key: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    before_full: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    after: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    message: Option<StoredMessage>,
}

#[derive(Serialize, Deserialize)]
struct StoredMessage {
    prefix: String,
    content: String,
    transactional: bool,
}

pub(super) fn to_text(change: &Change) -> Result<String> {
    let row = |row: &Row| STANDARD.encode(row.as_bytes());
    let (before_key, before_full) = match &change.before {
        Before::Nothing => (None, None),
        Before::Key(before) => (Some(row(before)), None),
        Before::Full(before) => (None, Some(row(before))),
    };
    let stored = Stored {
        offset: change.offset,
        op: change.op,
        index: change.index,
        closes_transaction: change.closes_transaction,
        xid: change.transaction.xid,
        commit_lsn: change.transaction.commit_lsn,
        commit_time: change.transaction.commit_time,
        table: change.table.as_deref().cloned(),
        before_key,
        before_full,
        after: change.after.as_ref().map(row),
        message: change.message.as_ref().map(|message| StoredMessage {
            prefix: message.prefix.clone(),
            content: STANDARD.encode(&message.content),
            transactional: message.transactional,
        }),
    };
    serde_json::to_string(&stored).class(Class::Bug, || "a change has no JSON form")
}

pub(super) fn from_text(text: &str) -> Result<Change> {
    let damaged = || "a parked change cannot be read";
    let stored: Stored = serde_json::from_str(text).class(Class::Damaged, damaged)?;
    let bytes = |text: &str| STANDARD.decode(text).class(Class::Damaged, damaged);
    let row = |text: Option<&String>| -> Result<Option<Row>> {
        let Some(text) = text else { return Ok(None) };
        let row = Row::new(Bytes::from(bytes(text)?));
        row.map(Some).map_err(|cause| Error::damaged(damaged()).caused_by(cause))
    };
    let before = match (row(stored.before_key.as_ref())?, row(stored.before_full.as_ref())?) {
        (_, Some(full)) => Before::Full(full),
        (Some(key), None) => Before::Key(key),
        (None, None) => Before::Nothing,
    };
    let message = match stored.message {
        None => None,
        Some(message) => Some(Arc::new(Message {
            content: Bytes::from(bytes(&message.content)?),
            prefix: message.prefix,
            transactional: message.transactional,
        })),
    };
    Ok(Change {
        offset: stored.offset,
        op: stored.op,
        index: stored.index,
        closes_transaction: stored.closes_transaction,
        transaction: Transaction {
            xid: stored.xid,
            commit_lsn: stored.commit_lsn,
            commit_time: stored.commit_time,
        },
        table: stored.table.map(Arc::new),
        before,
        after: row(stored.after.as_ref())?,
        message,
        shaped: None,
        backfill: None,
    })
}
