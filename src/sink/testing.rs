//! Batches for the tests of the sinks.

use std::{ops::Range, path::Path, sync::Arc};

use uuid::Uuid;

use super::{Context, Progress, With};
use crate::{
    change::{Batch, Before, Change, Lsn, Op, Row, Timestamp, Transaction, Value},
    config::{Format, Types},
    format::Names,
    schema::{Column, Identity, Table, Type},
};

pub(super) fn context() -> Context {
    Context::new(Path::new("walrace-data"), Names::default(), Uuid::from_u128(7))
}

pub(super) fn with(context: &Context) -> With<'_> {
    With { name: "test", format: Format::Native, types: Types::default(), context }
}

pub(super) fn progress(cursor: u64) -> Progress {
    Progress { lineage: Uuid::from_u128(7), epoch: 1, cursor, retry_seq: 0 }
}

/// Inserts with these offsets, each its own transaction.
pub(super) fn batch(offsets: Range<u64>) -> Batch {
    let column = |name: &str, oid, key| Column {
        name: name.into(),
        ty: Type::base(oid, -1),
        primary_key: key,
        identity: key,
        nullable: None,
    };
    let table = Arc::new(Table {
        oid: 1,
        schema: "public".into(),
        name: "t".into(),
        identity: Identity::Default,
        columns: vec![column("id", 20, true), column("v", 25, false)],
    });
    let change = |offset: u64| Change {
        offset,
        op: Op::Insert,
        index: 0,
        closes_transaction: true,
        transaction: Transaction {
            xid: 1,
            commit_lsn: Lsn(offset),
            commit_time: Timestamp(1_775_466_862_000_123),
        },
        table: Some(Arc::clone(&table)),
        before: Before::Nothing,
        after: Some(Row::from_values([
            Value::Text(offset.to_string().as_bytes()),
            Value::Text(b"some text"),
        ])),
        message: None,
        shaped: None,
        backfill: None,
    };
    Batch { changes: offsets.map(change).collect(), position: None }
}

/// One that no JSON format can carry.
pub(super) fn not_utf8(offset: u64) -> Change {
    let mut change = batch(offset..offset + 1).changes.remove(0);
    change.after = Some(Row::from_values([Value::Text(b"1"), Value::Text(b"\xff")]));
    change
}
