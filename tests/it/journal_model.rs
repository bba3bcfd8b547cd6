//! The journal against a model of it: a list of committed changes.

use std::sync::Arc;

use bytes::Bytes;
use proptest::prelude::*;
use walrace::{
    change::{Batch, Before, Change, Lsn, Message, Op, Row, Timestamp, Transaction, Value},
    journal::{Gap, Journal, Limits, Options, Retention},
};

use crate::{
    journal::{block_on, options, position, read_all, table},
    kit::power_cut::PowerCut,
};

/// Any change that a source can make.
fn any_change() -> impl Strategy<Value = Change> {
    let value = prop_oneof![
        Just(None),
        Just(Some(None)),
        prop::collection::vec(any::<u8>(), 0..40).prop_map(|text| Some(Some(text))),
    ];
    let row = prop::collection::vec(value, 0..4).prop_map(|values| {
        Row::from_values(values.iter().map(|value| match value {
            None => Value::Null,
            Some(None) => Value::Unchanged,
            Some(Some(text)) => Value::Text(text),
        }))
    });
    let before = prop_oneof![
        Just(Before::Nothing),
        row.clone().prop_map(Before::Key),
        row.clone().prop_map(Before::Full),
    ];
    let message = (".{0,8}", prop::collection::vec(any::<u8>(), 0..30), any::<bool>()).prop_map(
        |(prefix, content, transactional)| {
            Arc::new(Message { prefix, content: Bytes::from(content), transactional })
        },
    );
    let op = prop::sample::select(Op::ALL.to_vec());
    let rows = (before, prop::option::of(row), prop::option::of(message));
    let place = (any::<u32>(), 0..3u32, any::<i32>(), prop::option::of(0..3usize));
    (op, any::<bool>(), rows, place).prop_map(|(op, closes, (before, after, message), place)| {
        let (index, xid, time, named) = place;
        Change {
            offset: 0,
            op,
            index: if index % 3 == 0 { index } else { index % 4 },
            closes_transaction: closes,
            transaction: Transaction {
                xid,
                commit_lsn: Lsn(u64::from(xid) << 30),
                commit_time: Timestamp(i64::from(time)),
            },
            table: named.map(|named| table(["a", "orders", "order_lines"][named])),
            before,
            after,
            message: message.filter(|_| op == Op::Message),
            shaped: None,
            backfill: None,
        }
    })
}

/// What is done to a journal.
#[derive(Clone, Debug)]
enum Act {
    Append(Vec<Change>, bool),
    Abandon,
    Reopen,
    Trim(prop::sample::Index),
    Gap,
    Read(prop::sample::Index, usize, usize),
}

fn any_act() -> impl Strategy<Value = Act> {
    let append = (prop::collection::vec(any_change(), 0..8), any::<bool>());
    let read = (any::<prop::sample::Index>(), 1..10usize, 1..300usize);
    prop_oneof![
        8 => append.prop_map(|(changes, commit)| Act::Append(changes, commit)),
        1 => Just(Act::Abandon),
        1 => Just(Act::Reopen),
        1 => any::<prop::sample::Index>().prop_map(Act::Trim),
        1 => Just(Act::Gap),
        2 => read.prop_map(|(from, changes, bytes)| Act::Read(from, changes, bytes)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    #[test]
    fn a_journal_is_a_list_of_committed_changes(
        acts in prop::collection::vec(any_act(), 1..40),
        segment_bytes_max in 300..3_000u64,
        ring_bytes_max in prop_oneof![Just(0usize), 500..4_000usize, Just(1 << 20)],
    ) {
        block_on(follow(acts, segment_bytes_max, ring_bytes_max));
    }
}

async fn follow(acts: Vec<Act>, segment_bytes_max: u64, ring_bytes_max: usize) {
    let disk = PowerCut::default();
    let options = Options { ring_bytes_max, ..options(&disk, segment_bytes_max) };
    let mut journal = Journal::open(options.clone()).unwrap();
    let (mut held, mut open, mut gaps) = (Vec::new(), Vec::new(), 0);
    let mut progress = None;
    for (number, act) in acts.into_iter().enumerate() {
        match act {
            Act::Append(changes, commit) => {
                let position = commit.then(|| position(number as u64 + 1));
                journal.append(Batch { changes: changes.clone(), position }).await.unwrap();
                open.extend(changes);
                if commit {
                    held.append(&mut open);
                    progress = position;
                }
            }
            Act::Abandon => {
                journal.abandon().await.unwrap();
                open.clear();
            }
            Act::Reopen => {
                drop(journal);
                journal = Journal::open(options.clone()).unwrap();
                open.clear();
            }
            Act::Trim(keep) => {
                let keep_from = keep.index(held.len() + 1) as u64;
                let appended_before = Timestamp(i64::MAX);
                let (bytes, start) = (journal.info().bytes, journal.start());
                let retention = Retention { keep_from, appended_before, bytes_max: 0 };
                let freed = journal.trim(retention).await.unwrap();
                assert_eq!(journal.info().bytes, bytes - freed);
                assert!(journal.start() <= keep_from.max(start));
                gaps = journal.info().gaps.len();
            }
            Act::Gap if open.is_empty() => {
                let gap = Gap { from: position(1), to: position(2), reason: "why".into() };
                journal.record_gap(gap).await.unwrap();
                gaps += 1;
            }
            Act::Gap => {}
            Act::Read(from, changes_max, bytes_max) => {
                let from =
                    journal.start() + from.index(held.len() + 1 - journal.start() as usize) as u64;
                read_in_pieces(&journal, from, Limits { changes_max, bytes_max }, &held).await;
            }
        }
        for (offset, change) in held.iter_mut().enumerate() {
            change.offset = offset as u64;
        }
        assert_eq!(journal.end(), held.len() as u64);
        assert_eq!(journal.progress(), progress);
        assert_eq!(journal.info().gaps.len(), gaps);
    }
    assert_eq!(read_all(&journal, journal.start()).await, held[journal.start() as usize..]);
    journal.verify().unwrap();
}

/// Reads to the end within limits, and checks each batch.
async fn read_in_pieces(journal: &Journal, from: u64, limits: Limits, held: &[Change]) {
    let mut reader = journal.reader(from).unwrap();
    let mut next = from as usize;
    loop {
        let batch = reader.try_next(limits).await.unwrap();
        let after = next + batch.changes.len();
        assert_eq!(batch.changes, held[next..after]);
        assert!(batch.changes.len() <= limits.changes_max);
        assert!(batch.bytes() <= limits.bytes_max || batch.changes.len() == 1);
        if batch.changes.is_empty() {
            assert_eq!(next, held.len());
            return;
        }
        next = after;
        assert_eq!(reader.offset(), next as u64);
    }
}
