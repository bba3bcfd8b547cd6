//! The end of a journal, as it is compared with what the server sends again.

use walrace::{
    change::{Batch, Lsn, Mark, Op, Timestamp},
    journal::{Journal, Origin, Retention},
};

use crate::{
    journal::{block_on, committed, options, position, table, transaction},
    kit::power_cut::PowerCut,
};

/// The numbers of the transactions from `lsn` on, and from where on none is lacking.
fn recent(journal: &Journal, lsn: u64) -> (Vec<u32>, Option<u64>) {
    let recent = journal.recent(Lsn(lsn)).unwrap();
    let numbers = recent.transactions.iter().map(|transaction| transaction.xid).collect();
    (numbers, recent.complete_from.map(|lsn| lsn.0))
}

async fn mark(journal: &Journal, offset: u64, lsn: u64) {
    let comparable = Some(Mark { offset, lsn: Lsn(lsn) });
    journal.set_origin(Origin { comparable, ..Origin::default() }).await.unwrap();
}

/// Transactions 1 to 30 of two changes each: number `n` commits at `100 n - 1`.
async fn thirty(disk: &PowerCut) -> Journal {
    let journal = Journal::open(options(disk, 2_000)).unwrap();
    for number in 1..=30 {
        journal.append(committed(number, 2, &table("orders"))).await.unwrap();
    }
    journal
}

#[test]
fn the_last_transactions_are_complete_from_where_one_before_them_was_seen() {
    block_on(async {
        let disk = PowerCut::default();
        let journal = thirty(&disk).await;
        assert_eq!(recent(&journal, 2_000), ((21..=30).collect(), Some(2_000)));
        assert_eq!(recent(&journal, 9_999), (Vec::new(), Some(9_999)));
        // An older journal does not say where it began.
        assert_eq!(recent(&journal, 0), ((1..=30).collect(), Some(99)));
        mark(&journal, 0, 50).await;
        assert_eq!(recent(&journal, 0), ((1..=30).collect(), Some(50)));
        assert_eq!(recent(&journal, 60), ((1..=30).collect(), Some(60)));
    });
}

#[test]
fn what_is_before_an_accepted_gap_or_was_removed_is_not_compared() {
    block_on(async {
        let disk = PowerCut::default();
        let journal = thirty(&disk).await;
        mark(&journal, 40, 1_500).await;
        assert_eq!(recent(&journal, 0), ((21..=30).collect(), Some(1_500)));
        mark(&journal, 0, 0).await;
        let all = Retention { keep_from: 40, appended_before: Timestamp(i64::MAX), bytes_max: 0 };
        while journal.trim(all).await.unwrap() > 0 {}
        let first = journal.start() / 2 + 1;
        assert!(first > 1);
        let (numbers, complete) = recent(&journal, 0);
        assert_eq!(numbers.first().map(|number| u64::from(*number)), Some(first));
        assert_eq!(complete, Some(first * 100 - 1));
    });
}

#[test]
fn a_backfill_of_any_length_does_not_hide_the_transactions_before_it() {
    block_on(async {
        let disk = PowerCut::default();
        let journal = thirty(&disk).await;
        for _ in 0..14 {
            let mut changes = transaction(31, 10_000, &table("orders"));
            changes.iter_mut().for_each(|change| change.op = Op::Read);
            journal.append(Batch { changes, position: Some(position(31)) }).await.unwrap();
        }
        assert_eq!(recent(&journal, 2_950), (vec![30], Some(2_950)));
    });
}
