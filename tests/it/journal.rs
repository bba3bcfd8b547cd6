//! The journal through its public surface: what goes in comes out, in order, once, and lasts.

use std::{path::PathBuf, sync::Arc};

use bytes::Bytes;
use proptest::prelude::*;
use walrace::{
    change::{
        Batch, Before, Change, Lsn, Message, Op, Position, Row, Timestamp, Transaction, Value,
    },
    disk::RealDisk,
    error::Class,
    journal::{Gap, Inspection, Journal, Limits, Options, Origin, Retention, Succession, Token},
    schema::{Column, Identity, Table, Type},
};

use crate::kit::power_cut::{Faults, PowerCut};

pub(crate) const ALL: Limits = Limits { changes_max: usize::MAX, bytes_max: usize::MAX };

/// Runs a future to its end on a small runtime.
pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}

pub(crate) fn options(disk: &PowerCut, segment_bytes_max: u64) -> Options {
    Options {
        directory: PathBuf::from("/journal"),
        disk: disk.shared(),
        segment_bytes_max,
        ring_bytes_max: 1 << 20,
        reserve_bytes: 0,
    }
}

pub(crate) fn table(name: &str) -> Arc<Table> {
    let column = |name: &str, oid: u32, key: bool| Column {
        name: name.into(),
        ty: Type::base(oid, -1),
        primary_key: key,
        identity: key,
        nullable: Some(!key),
    };
    Arc::new(Table {
        oid: 16_384 + name.len() as u32,
        schema: "public".into(),
        name: name.into(),
        identity: Identity::Default,
        columns: vec![column("id", 20, true), column("note", 25, false)],
    })
}

pub(crate) fn row(id: u64, note: &str) -> Row {
    Row::from_values([Value::Text(id.to_string().as_bytes()), Value::Text(note.as_bytes())])
}

pub(crate) fn position(number: u64) -> Position {
    Position { timeline: 1, lsn: Lsn(number * 100), index: 0 }
}

/// A transaction of inserts whose rows say which they are.
pub(crate) fn transaction(number: u64, count: u32, table: &Arc<Table>) -> Vec<Change> {
    let insert = |index: u32| Change {
        offset: 0,
        op: Op::Insert,
        index,
        closes_transaction: index + 1 == count,
        transaction: Transaction {
            xid: number as u32,
            commit_lsn: Lsn(number * 100 - 1),
            commit_time: Timestamp(number as i64 * 1_000),
        },
        table: Some(Arc::clone(table)),
        before: Before::Nothing,
        after: Some(row(u64::from(index), &format!("transaction {number}"))),
        message: None,
    };
    (0..count).map(insert).collect()
}

pub(crate) fn committed(number: u64, count: u32, table: &Arc<Table>) -> Batch {
    Batch { changes: transaction(number, count, table), position: Some(position(number)) }
}

/// Everything from `from` on.
pub(crate) async fn read_all(journal: &Journal, from: u64) -> Vec<Change> {
    let mut reader = journal.reader(from).unwrap();
    let mut changes = Vec::new();
    loop {
        let batch = reader.try_next(ALL).await.unwrap();
        if batch.changes.is_empty() {
            return changes;
        }
        changes.extend(batch.changes);
    }
}

#[test]
fn what_was_appended_is_read_from_memory_and_from_disk() {
    block_on(async {
        let disk = PowerCut::default();
        let journal = Journal::open(options(&disk, 1 << 20)).unwrap();
        let (orders, lines) = (table("orders"), table("lines"));
        journal.append(committed(1, 3, &orders)).await.unwrap();
        journal.append(committed(2, 2, &lines)).await.unwrap();
        let ring = read_all(&journal, 0).await;
        assert_eq!(ring.iter().map(|c| c.offset).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
        drop(journal);
        let journal = Journal::open(options(&disk, 1 << 20)).unwrap();
        assert_eq!(read_all(&journal, 0).await, ring);
        assert_eq!(read_all(&journal, 4).await, ring[4..]);
        assert_eq!(journal.progress(), Some(position(2)));
        assert_eq!(journal.end(), 5);
    });
}
