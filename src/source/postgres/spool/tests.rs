//! The spool on a real disk.

use proptest::prelude::*;

use super::*;
use crate::disk::RealDisk;

pub(in super::super) fn options(directory: &Path) -> SpoolOptions {
    SpoolOptions { directory: directory.to_owned(), disk: RealDisk::shared(), reserve_bytes: 0 }
}

fn spool(directory: &Path) -> Spool {
    Spool::new(options(directory), Arc::default()).unwrap()
}

fn part(xid: u32, body: impl Into<Bytes>) -> Part {
    Part { xid, kind: b'M', body: body.into() }
}

fn bodies(mut replay: Replay) -> Vec<(u32, Bytes)> {
    let mut bodies = Vec::new();
    while let Some(records) = replay.next_block().unwrap() {
        bodies.extend(records.into_iter().map(|record| (record.xid, record.message.slice(1..))));
    }
    bodies
}

fn files(directory: &Path) -> Vec<PathBuf> {
    RealDisk.list(directory).unwrap()
}

#[test]
fn a_small_transaction_never_touches_the_disk() {
    let folder = tempfile::tempdir().unwrap();
    let mut spool = spool(&folder.path().join("app"));
    for number in 0..100u8 {
        spool.push(7, &part(7, vec![number; 100]), 0).unwrap();
    }
    assert!(!folder.path().join("app").exists());
    assert_eq!(bodies(spool.take(7).unwrap()).len(), 100);
    assert_eq!(spool.memory_bytes, 0);
}

#[test]
fn many_transactions_share_one_limit_of_memory() {
    let folder = tempfile::tempdir().unwrap();
    let mut spool = spool(folder.path());
    for round in 0..20u8 {
        for xid in 1..=1_000 {
            spool.push(xid, &part(xid, vec![round; 1_000]), 0).unwrap();
            assert!(spool.memory_bytes <= MEMORY_BYTES_MAX);
        }
    }
    let held: usize = spool.open.values().map(|spooled| spooled.tail.capacity()).sum();
    assert!(held < 3 * MEMORY_BYTES_MAX, "{held} bytes");
    for xid in 1..=1_000 {
        let rounds: Vec<_> =
            bodies(spool.take(xid).unwrap()).iter().map(|(_, body)| body[0]).collect();
        assert_eq!(rounds, (0..20).collect::<Vec<_>>());
    }
    assert_eq!(spool.memory_bytes, 0);
    assert_eq!(files(folder.path()).len(), 0);
}

#[test]
fn files_go_with_their_transaction_with_their_spool_and_after_a_crash() {
    let folder = tempfile::tempdir().unwrap();
    let stats = Arc::<Stats>::default();
    let mut spool = Spool::new(options(folder.path()), Arc::clone(&stats)).unwrap();
    for xid in [1, 2, 3] {
        spool.push(xid, &part(xid, vec![0; BLOCK_BYTES]), 0).unwrap();
    }
    assert!(stats.spool_bytes.load(Ordering::Relaxed) > 3 * BLOCK_BYTES as u64);
    spool.abort(1, 1);
    assert_eq!(files(folder.path()).len(), 2);
    drop(spool.take(2).unwrap());
    assert_eq!(files(folder.path()).len(), 1);
    drop(spool);
    assert_eq!(files(folder.path()).len(), 0);
    assert_eq!(stats.spool_bytes.load(Ordering::Relaxed), 0);
    std::fs::write(folder.path().join("3-left.spool"), "of a crash").unwrap();
    drop(self::spool(folder.path()));
    assert_eq!(files(folder.path()).len(), 0);
}

#[test]
fn a_byte_that_changed_on_the_disk_is_noticed_and_the_server_asked_again() {
    let folder = tempfile::tempdir().unwrap();
    for at in [0, 4, 8, 12, 5_000] {
        let mut spool = spool(folder.path());
        spool.push(7, &part(7, vec![1; BLOCK_BYTES]), 0).unwrap();
        let path = files(folder.path()).remove(0);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[at] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let error = spool.take(7).unwrap().next_block().unwrap_err();
        assert_eq!(error.class(), crate::error::Class::Retry, "{error}");
        assert!(error.to_string().contains(&path.display().to_string()), "{error}");
    }
}

#[test]
fn a_disk_with_less_than_the_reserve_is_named_with_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let options = SpoolOptions { reserve_bytes: u64::MAX, ..options(folder.path()) };
    let mut spool = Spool::new(options, Arc::default()).unwrap();
    let error = spool.push(7, &part(7, vec![0; BLOCK_BYTES]), 0).unwrap_err();
    assert_eq!(error.class(), crate::error::Class::Retry);
    let text = error.to_string();
    assert!(text.contains(&folder.path().display().to_string()), "{text}");
    assert!(text.contains("free space") && text.contains("streaming = false"), "{text}");
}

/// Bytes that compress a little.
fn noise(at: usize, number: usize, seed: u8) -> u8 {
    ((at * (number + 1)) >> 3).to_le_bytes()[0] ^ seed
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn what_is_read_back_is_what_was_kept_but_for_what_was_rolled_back(
        parts in prop::collection::vec(
            (1u32..4, 0u32..6, prop_oneof![
                9 => 0usize..3_000, 2 => 60_000usize..80_000, 1 => 260_000usize..300_000]), 0..120),
        aborted in prop::collection::hash_set((1u32..4, 1u32..6), 0..6),
        seed in any::<u8>(),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let mut spool = spool(folder.path());
        for (number, (top, sub, length)) in parts.iter().enumerate() {
            let body: Vec<u8> = (0..*length).map(|at| noise(at, number, seed)).collect();
            spool.push(*top, &part(top * 10 + sub, body), number as u64).unwrap();
        }
        for (top, sub) in &aborted {
            spool.abort(*top, top * 10 + sub);
        }
        for top in 1..4 {
            let expected: Vec<_> = parts
                .iter()
                .enumerate()
                .filter(|(_, (owner, sub, _))| *owner == top && !aborted.contains(&(top, *sub)))
                .map(|(number, (_, sub, length))| (top * 10 + sub, number as u64, *length))
                .collect();
            let mut replay = spool.take(top).unwrap();
            let mut found = Vec::new();
            while let Some(records) = replay.next_block().unwrap() {
                for record in records {
                    let body = record.message.slice(1..);
                    let number = usize::try_from(record.arrival).unwrap();
                    let same = |(at, byte): (usize, &u8)| *byte == noise(at, number, seed);
                    prop_assert!(body.iter().enumerate().all(same));
                    found.push((record.xid, record.arrival, body.len()));
                }
            }
            prop_assert_eq!(found, expected);
        }
    }
}
