//! The journal through its public surface: what goes in comes out, in order, once, and lasts.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test may panic"
)]

use std::{path::PathBuf, sync::Arc};

use walrace::{
    change::{Batch, Before, Change, Lsn, Op, Position, Row, Timestamp, Transaction, Value},
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
        shaped: None,
        backfill: None,
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

#[test]
fn an_open_transaction_is_not_seen_until_it_commits_whatever_its_size() {
    block_on(async {
        let disk = PowerCut::default();
        let options = Options { ring_bytes_max: 10_000, ..options(&disk, 50_000) };
        let journal = Journal::open(options).unwrap();
        journal.append(committed(1, 1, &table("orders"))).await.unwrap();
        let mut reader = journal.reader(1).unwrap();
        let changes = transaction(2, 5_000, &table("orders"));
        for piece in changes.chunks(100) {
            let batch = Batch { changes: piece.to_vec(), position: None };
            journal.append(batch).await.unwrap();
            assert_eq!(journal.end(), 1);
            assert!(reader.try_next(ALL).await.unwrap().changes.is_empty());
        }
        let close = Batch { changes: Vec::new(), position: Some(position(2)) };
        journal.append(close).await.unwrap();
        assert_eq!(journal.end(), 5_001);
        let batch = reader.next(ALL).await.unwrap();
        assert_eq!((batch.changes.len(), batch.position.is_some()), (5_000, false));
        journal.append(committed(3, 2, &table("orders"))).await.unwrap();
        let batch = reader.next(ALL).await.unwrap();
        assert_eq!((batch.changes.len(), batch.position), (2, Some(position(3))));
    });
}

#[test]
fn a_transaction_that_closed_in_a_segment_without_changes_stays_closed() {
    block_on(async {
        let disk = PowerCut::default();
        let journal = Journal::open(options(&disk, 300)).unwrap();
        let piece = |number| {
            let changes = transaction(number, 1, &table("orders"));
            Batch { changes, position: None }
        };
        journal.append(piece(1)).await.unwrap();
        let close = Batch { changes: Vec::new(), position: Some(position(1)) };
        journal.append(close).await.unwrap(); // in a new segment, which it fills
        journal.append(piece(2)).await.unwrap(); // replaces that segment
        journal.abandon().await.unwrap();
        assert_eq!((journal.end(), journal.progress()), (1, Some(position(1))));
    });
}

#[test]
fn a_reader_waits_for_what_comes_and_a_cancelled_wait_loses_nothing() {
    block_on(async {
        let disk = PowerCut::default();
        let options = Options { ring_bytes_max: 0, ..options(&disk, 2_000) };
        let journal = Journal::open(options).unwrap();
        let mut reader = journal.reader(0).unwrap();
        let writing = async {
            for number in 1..100 {
                journal.append(committed(number, 3, &table("orders"))).await.unwrap();
            }
        };
        let reading = async {
            let (mut next, mut dropped) = (0, false);
            let limits = Limits { changes_max: 7, bytes_max: 1_000 };
            while next < 99 * 3 {
                // Dropped at its first await every second time, and waited for every other time.
                dropped = !dropped;
                let batch = tokio::select! {
                    biased;
                    batch = reader.next(limits) => Some(batch.unwrap()),
                    () = tokio::task::yield_now(), if dropped => None,
                };
                for change in batch.into_iter().flat_map(|batch| batch.changes) {
                    assert_eq!(change.offset, next);
                    next += 1;
                }
            }
        };
        tokio::join!(writing, reading);
    });
}

#[test]
fn a_full_disk_is_waited_for_and_leaves_the_journal_as_it_was() {
    block_on(async {
        let disk = PowerCut::default();
        let journal = Journal::open(options(&disk, 1 << 20)).unwrap();
        journal.append(committed(1, 1, &table("orders"))).await.unwrap();
        let before = disk.files();
        disk.fill(Some(150));
        let error = journal.append(committed(2, 5, &table("lines"))).await.unwrap_err();
        assert_eq!(error.class(), Class::Retry);
        let text = error.to_string();
        assert!(text.contains("/journal") && text.contains("journal.bytes_max"), "{text}");
        assert_eq!(disk.files(), before);
        disk.fill(None);
        journal.append(committed(2, 5, &table("lines"))).await.unwrap();
        assert_eq!(read_all(&journal, 0).await.len(), 6);
        journal.verify().unwrap();
    });
}

#[test]
fn a_disk_that_is_full_where_a_segment_begins_is_waited_for_too() {
    block_on(async {
        let disk = PowerCut::default();
        let journal = Journal::open(options(&disk, 300)).unwrap();
        journal.append(committed(1, 2, &table("orders"))).await.unwrap();
        let before = disk.files();
        disk.fill(Some(100));
        for _ in 0..2 {
            let error = journal.append(committed(2, 2, &table("orders"))).await.unwrap_err();
            assert_eq!(error.class(), Class::Retry, "{error}");
            assert_eq!(disk.files(), before);
        }
        disk.fill(None);
        journal.append(committed(2, 2, &table("orders"))).await.unwrap();
        drop(journal);
        let journal = Journal::open(options(&disk, 300)).unwrap();
        assert_eq!(journal.verify().unwrap().changes, 4);
    });
}

#[test]
fn the_reserve_of_the_disk_is_not_touched() {
    block_on(async {
        let disk = PowerCut::default();
        let options = Options { reserve_bytes: 1_000, ..options(&disk, 1 << 20) };
        let journal = Journal::open(options).unwrap();
        disk.set(Faults { free: Some(999), ..Faults::default() });
        let error = journal.append(committed(1, 1, &table("orders"))).await.unwrap_err();
        assert_eq!(error.class(), Class::Retry);
        assert!(
            error.to_string().contains("less left than the 1000 bytes kept in reserve"),
            "{error}"
        );
        disk.set(Faults::default());
        journal.append(committed(1, 1, &table("orders"))).await.unwrap();
    });
}

#[test]
fn a_failed_sync_poisons_the_journal_until_it_is_opened_again() {
    block_on(async {
        let disk = PowerCut::default();
        let journal = Journal::open(options(&disk, 1 << 20)).unwrap();
        journal.append(committed(1, 1, &table("orders"))).await.unwrap();
        disk.set(Faults { fail_sync: Some(1), ..Faults::default() });
        for number in 2..4 {
            let error = journal.append(committed(number, 1, &table("orders"))).await.unwrap_err();
            assert_eq!(error.class(), Class::Damaged);
            let text = error.to_string();
            assert!(text.contains("00000000000000000000.segment"), "{text}");
            assert!(text.contains("restart walrace; the source still has"), "{text}");
        }
        assert_eq!((journal.end(), read_all(&journal, 0).await.len()), (1, 1));
        drop(journal);
        let journal = Journal::open(options(&disk, 1 << 20)).unwrap();
        let end = journal.end();
        journal.append(committed(4, 1, &table("orders"))).await.unwrap();
        assert_eq!(journal.end(), end + 1);
    });
}

#[test]
fn two_processes_cannot_have_one_journal_but_anyone_may_look() {
    let directory = tempfile::tempdir().unwrap();
    let options = Options {
        directory: directory.path().join("app"),
        disk: RealDisk::shared(),
        segment_bytes_max: 4_000,
        ring_bytes_max: 0,
        reserve_bytes: 0,
    };
    let journal = Journal::open(options.clone()).unwrap();
    let error = Journal::open(options.clone()).unwrap_err();
    assert_eq!(error.class(), Class::Config);
    assert!(error.to_string().contains(&*options.directory.to_string_lossy()), "{error}");
    for number in 1..200 {
        block_on(journal.append(committed(number, 2, &table("orders")))).unwrap();
    }
    let inspection = Inspection::open(options.clone()).unwrap();
    assert_eq!(inspection.info().end, 398);
    assert!(inspection.info().segments > 3);
    let dumped: Vec<Change> = inspection.dump(100).collect::<Result<_, _>>().unwrap();
    assert_eq!(dumped, block_on(read_all(&journal, 100)));
    let report = inspection.verify().unwrap();
    assert_eq!(report, journal.verify().unwrap());
    assert_eq!((report.changes, report.head.len()), (398, 64));
    drop(journal);
    assert_eq!(Journal::open(options).unwrap().verify().unwrap(), report);
}

#[test]
fn retention_takes_only_what_is_below_the_cursor_and_the_start_survives_a_restart() {
    block_on(async {
        let disk = PowerCut::default();
        let journal = Journal::open(options(&disk, 600)).unwrap();
        for number in 1..30 {
            journal.append(committed(number, 2, &table("orders"))).await.unwrap();
        }
        let all = Retention { keep_from: 20, appended_before: Timestamp(i64::MAX), bytes_max: 0 };
        assert!(journal.trim(all).await.unwrap() > 0);
        let start = journal.start();
        assert!(start > 0 && start <= 20);
        let error = journal.reader(start - 1).unwrap_err();
        assert!(error.to_string().contains(&format!("the oldest left is {start}")), "{error}");
        assert_eq!(error.class(), Class::Config);
        assert_eq!(journal.reader(59).unwrap_err().class(), Class::Damaged);
        let young = Retention { keep_from: 58, appended_before: Timestamp(0), bytes_max: 0 };
        assert_eq!(journal.trim(young).await.unwrap(), 0);
        let small = Retention { bytes_max: 1_500, ..young };
        assert!(journal.trim(small).await.unwrap() > 0);
        assert!(journal.info().bytes <= 1_500);
        let (start, end) = (journal.start(), journal.end());
        drop(journal);
        let journal = Journal::open(options(&disk, 600)).unwrap();
        assert_eq!((journal.start(), journal.end()), (start, end));
    });
}

#[test]
fn no_offset_of_an_open_transaction_is_where_a_reader_could_go_on() {
    block_on(async {
        let disk = PowerCut::default();
        let journal = Journal::open(options(&disk, 2_000)).unwrap();
        journal.append(committed(1, 2, &table("orders"))).await.unwrap();
        for _ in 0..40 {
            let changes = transaction(2, 5, &table("orders"));
            journal.append(Batch { changes, position: None }).await.unwrap();
        }
        assert!(journal.info().segments > 2);
        assert_eq!(journal.second_segment_start(), None, "the last commit is in the oldest");
        journal.append(committed(2, 1, &table("orders"))).await.unwrap();
        assert!(journal.second_segment_start().is_some_and(|start| start <= journal.end()));
    });
}

#[test]
fn a_time_finds_the_blocks_that_overlap_it_though_commit_times_jump() {
    block_on(async {
        let disk = PowerCut::default();
        let journal = Journal::open(options(&disk, 500)).unwrap();
        let times = [50, 40, 10, 90, 20, 30, 60, 15, 95, 70, 80, 5];
        for (number, time) in times.iter().enumerate() {
            let mut batch = committed(number as u64 + 1, 1, &table("orders"));
            batch.changes[0].transaction.commit_time = Timestamp(*time);
            journal.append(batch).await.unwrap();
        }
        for time in 0..100 {
            let first = times.iter().position(|of| *of >= time).unwrap_or(times.len()) as u64;
            let offset = journal.offset_at(Timestamp(time)).unwrap();
            assert!(offset <= first, "{time}: {offset} is behind {first}");
            // Whole segments that are too old are passed.
            assert!(first - offset < 4, "{time}: {offset} is too far before {first}");
        }
    });
}

#[test]
fn the_lag_of_a_reader_is_told_in_changes_bytes_and_time() {
    block_on(async {
        let disk = PowerCut::default();
        let journal = Journal::open(options(&disk, 600)).unwrap();
        let before = Timestamp::now();
        for number in 1..20 {
            journal.append(committed(number, 2, &table("orders"))).await.unwrap();
        }
        let mut bytes = u64::MAX;
        let mut appended = before;
        for offset in 0..38 {
            let lag = journal.lag(offset).unwrap().unwrap();
            assert_eq!(lag.changes, 38 - offset);
            assert!(lag.bytes < bytes || offset % 2 == 1 && lag.bytes == bytes, "{offset}");
            assert!(lag.appended >= appended);
            (bytes, appended) = (lag.bytes, lag.appended);
        }
        assert!(appended <= Timestamp::now());
        assert_eq!(journal.lag(38).unwrap(), None);
    });
}

#[test]
fn a_reader_at_the_end_of_a_segment_that_goes_reads_on_in_the_next() {
    block_on(async {
        let disk = PowerCut::default();
        let journal = Journal::open(Options { ring_bytes_max: 0, ..options(&disk, 600) }).unwrap();
        let limits = Limits { changes_max: usize::MAX, bytes_max: usize::MAX };
        let mut reader = journal.reader(0).unwrap();
        let mut number = 0;
        while journal.second_segment_start().is_none() {
            let _ = reader.try_next(limits).await.unwrap();
            number += 1;
            journal.append(committed(number, 2, &table("orders"))).await.unwrap();
        }
        let next = reader.offset();
        assert_eq!(Some(next), journal.second_segment_start());
        let read =
            Retention { keep_from: next, appended_before: Timestamp(i64::MAX), bytes_max: 0 };
        assert!(journal.trim(read).await.unwrap() > 0);
        assert_eq!(reader.next(limits).await.unwrap().changes[0].offset, next);
    });
}

#[test]
fn a_token_resumes_and_one_that_is_foreign_or_expired_is_answered() {
    block_on(async {
        let disk = PowerCut::default();
        let journal = Journal::open(options(&disk, 500)).unwrap();
        for number in 1..20 {
            journal.append(committed(number, 2, &table("orders"))).await.unwrap();
        }
        let token = |offset| Token::new(journal.lineage(), position(1), offset);
        let given = Token::parse(&token(30).to_string()).unwrap();
        assert_eq!(journal.resolve(&given).unwrap(), 30);
        let all = Retention { keep_from: 20, appended_before: Timestamp(i64::MAX), bytes_max: 0 };
        journal.trim(all).await.unwrap();
        assert_eq!(journal.resolve(&token(0)).unwrap(), journal.start());
        assert_eq!(journal.resolve(&token(99)).unwrap_err().class(), Class::Damaged);
        let foreign = Token { lineage: uuid::Uuid::new_v4(), ..token(30) };
        assert_eq!(journal.resolve(&foreign).unwrap_err().class(), Class::Config);
        assert_eq!(Token::parse("hello").unwrap_err().class(), Class::Data);
    });
}

#[test]
fn a_new_incarnation_begins_above_every_offset_that_was_issued() {
    block_on(async {
        let disk = PowerCut::default();
        let lineage = uuid::Uuid::new_v4();
        let succession = Succession { lineage, incarnation: 2, first_offset: 1_000 };
        let journal = Journal::open_as(options(&disk, 500), succession).unwrap();
        assert_eq!((journal.start(), journal.end(), journal.lineage()), (1_000, 1_000, lineage));
        journal.append(committed(1, 2, &table("orders"))).await.unwrap();
        assert_eq!(read_all(&journal, 1_000).await[1].offset, 1_001);
        drop(journal);
        let journal = Journal::open(options(&disk, 500)).unwrap();
        assert_eq!((journal.info().incarnation, journal.end()), (2, 1_002));
        drop(journal);
        let other = Succession { lineage: uuid::Uuid::new_v4(), ..succession };
        let error = Journal::open_as(options(&disk, 500), other).unwrap_err();
        assert_eq!(error.class(), Class::Config);
    });
}

#[test]
fn origin_and_gaps_last_and_a_source_that_goes_back_needs_a_gap() {
    block_on(async {
        let disk = PowerCut::default();
        let journal = Journal::open(options(&disk, 500)).unwrap();
        let text = |text: &str| text.to_owned();
        let origin = Origin {
            system: text("7"),
            database: text("app"),
            slot: text("s"),
            ..Origin::default()
        };
        assert_eq!(journal.origin(), None);
        journal.set_origin(origin.clone()).await.unwrap();
        journal.append(committed(9, 2, &table("orders"))).await.unwrap();
        let error = journal.append(committed(8, 2, &table("orders"))).await.unwrap_err();
        assert_eq!(error.class(), Class::Bug);
        let gap = Gap { from: position(9), to: position(5), reason: text("restored") };
        journal.record_gap(gap.clone()).await.unwrap();
        for number in 5..20 {
            journal.append(committed(number, 2, &table("orders"))).await.unwrap();
        }
        drop(journal);
        let journal = Journal::open(options(&disk, 500)).unwrap();
        assert_eq!((journal.origin(), journal.info().gaps), (Some(origin), vec![gap]));
        assert!(journal.info().segments > 2, "the gap is in a sealed segment");
    });
}

#[test]
fn a_change_larger_than_a_block_and_any_bytes_come_back_whole() {
    block_on(async {
        let disk = PowerCut::default();
        let options = Options { ring_bytes_max: 0, ..options(&disk, 1 << 20) };
        let journal = Journal::open(options).unwrap();
        let mut batch = committed(1, 3, &table("orders"));
        let mut dice = fastrand::Rng::with_seed(1);
        let noise: Vec<u8> = (0..3 << 20).map(|_| dice.u8(..)).collect();
        batch.changes[1].after = Some(Row::from_values([Value::Text(&noise)]));
        journal.append(batch.clone()).await.unwrap();
        let limits = Limits { changes_max: 100, bytes_max: 1_000 };
        let mut reader = journal.reader(0).unwrap();
        for (offset, expected) in batch.changes.iter_mut().enumerate() {
            expected.offset = offset as u64;
            assert_eq!(reader.next(limits).await.unwrap().changes, std::slice::from_ref(expected));
        }
    });
}
