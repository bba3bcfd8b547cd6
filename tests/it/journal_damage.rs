//! A journal whose bytes were altered, cut or swapped behind its back: it gives back what was
//! written, or a prefix that ends at a commit where the tail was never proven to be durable, or it
//! says `Damaged`. It never panics and never gives back anything else.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test may panic"
)]

use std::path::{Path, PathBuf};

use proptest::prelude::*;
use walrace::{
    change::Change,
    error::{Class, Error},
    journal::{Inspection, Journal},
};

use crate::{
    journal::{block_on, committed, options, read_all, table},
    kit::power_cut::PowerCut,
};

const SEGMENT_BYTES: u64 = 700;

/// A small journal of several segments, with what it holds and the ends of its commits.
struct Small {
    files: Vec<(PathBuf, Vec<u8>)>,
    changes: Vec<Change>,
    commits: Vec<u64>,
}

impl Small {
    /// Closed in order, so that all of it is proven; or not, so that the last append is not.
    fn new(closed: bool) -> Self {
        let disk = PowerCut::default();
        let journal = Journal::open(options(&disk, SEGMENT_BYTES)).unwrap();
        let mut commits = vec![0];
        for (number, count) in [(1, 2), (2, 1), (3, 3), (4, 0), (5, 2), (6, 1), (7, 3)] {
            let table = table(if number % 2 == 0 { "orders" } else { "lines" });
            block_on(journal.append(committed(number, count, &table))).unwrap();
            commits.push(journal.end());
        }
        let changes = block_on(read_all(&journal, 0));
        let before = disk.files();
        drop(journal);
        let files = if closed { disk.files() } else { before };
        assert!(files.len() >= 4, "an identity and at least three segments");
        Self { files, changes, commits }
    }

    /// The segment that was written last.
    fn last(&self) -> &Path {
        &self.files.iter().rfind(|(path, _)| path.extension().unwrap() == "segment").unwrap().0
    }

    /// Opens altered files in every way there is, and compares. Returns the end, or the error.
    fn check(&self, files: &[(PathBuf, Vec<u8>)]) -> Result<u64, Error> {
        let inspected = Inspection::open(options(&PowerCut::with(files), SEGMENT_BYTES));
        if let Ok(inspection) = &inspected {
            let dumped: Vec<Change> = inspection.dump(0).map_while(Result::ok).collect();
            assert!(self.changes.starts_with(&dumped), "a dump gives other changes");
        }
        let disk = PowerCut::with(files);
        let journal = Journal::open(options(&disk, SEGMENT_BYTES))?;
        let (start, end) = (journal.start(), journal.end());
        assert_eq!(start, 0);
        assert!(self.commits.contains(&end), "{end} is not the end of a commit");
        let mut reader = journal.reader(0)?;
        let mut read = Vec::new();
        loop {
            let batch = block_on(reader.try_next(crate::journal::ALL))?;
            if batch.changes.is_empty() {
                break;
            }
            read.extend(batch.changes);
        }
        assert_eq!(read, self.changes[..end as usize], "other changes than were written");
        journal.verify()?;
        Ok(end)
    }
}

fn class_is_honest(error: &Error) {
    assert_eq!(error.class(), Class::Damaged, "{error}");
    assert!(error.to_string().contains("/journal"), "it names no file: {error}");
}

#[test]
fn a_flipped_bit_anywhere_is_damage_or_a_cut_of_the_unproven_tail() {
    for closed in [true, false] {
        let small = Small::new(closed);
        let full = *small.commits.last().unwrap();
        let before_last = small.commits[small.commits.len() - 2];
        for file in 0..small.files.len() {
            for place in 0..small.files[file].1.len() {
                let mut files = small.files.clone();
                files[file].1[place] ^= 1 << (place % 8);
                match small.check(&files) {
                    Err(error) => class_is_honest(&error),
                    Ok(end) if end == full => {
                        let proof = closed && small.files[file].0 == small.last();
                        assert!(
                            proof,
                            "an alteration of {:?} at {place} was missed",
                            files[file].0
                        );
                    }
                    Ok(end) => {
                        assert!(
                            !closed,
                            "a proven commit was cut off: {:?} {place}",
                            files[file].0
                        );
                        assert_eq!((end, &*small.files[file].0), (before_last, small.last()));
                    }
                }
            }
        }
    }
}

#[test]
fn a_file_that_ends_anywhere_is_damage_or_a_clean_prefix() {
    for closed in [true, false] {
        let small = Small::new(closed);
        for file in 0..small.files.len() {
            for length in 0..small.files[file].1.len() {
                let mut files = small.files.clone();
                files[file].1.truncate(length);
                match small.check(&files) {
                    Err(error) => class_is_honest(&error),
                    // Cut at the end of a commit there is nothing to notice but the offset.
                    Ok(_) => assert_eq!(files[file].0, small.last()),
                }
            }
        }
    }
}

#[test]
fn a_write_torn_at_any_byte_leaves_what_was_there_before() {
    let disk = PowerCut::default();
    let journal = Journal::open(options(&disk, 1 << 20)).unwrap();
    block_on(journal.append(committed(1, 3, &table("orders")))).unwrap();
    let before = disk.files();
    block_on(journal.append(committed(2, 4, &table("orders")))).unwrap();
    let after = disk.files();
    let changes = block_on(read_all(&journal, 0));
    let small = Small { files: Vec::new(), changes, commits: vec![3, 7] };
    let (old, new) = (&before[0].1, &after[0].1);
    for written in old.len()..=new.len() {
        for rest in [None, Some(0u8), Some(0xA5)] {
            let mut files = after.clone();
            files[0].1.truncate(written);
            if let Some(rest) = rest {
                files[0].1.resize(new.len(), rest);
            }
            let whole = files[0].1 == *new;
            assert_eq!(small.check(&files).unwrap(), if whole { 7 } else { 3 }, "{written}");
        }
    }
}

#[test]
fn a_missing_or_swapped_segment_is_damage() {
    let small = Small::new(true);
    let segments: Vec<usize> = (0..small.files.len())
        .filter(|i| small.files[*i].0.extension().unwrap() == "segment")
        .collect();
    for pair in segments.windows(2).skip(1) {
        let mut files = small.files.clone();
        files.remove(pair[0]);
        class_is_honest(&small.check(&files).unwrap_err());
        let mut files = small.files.clone();
        files[pair[0]].1 = small.files[pair[1]].1.clone();
        class_is_honest(&small.check(&files).unwrap_err());
    }
    let without_identity: Vec<_> =
        small.files.iter().filter(|(path, _)| !path.ends_with("identity.json")).cloned().collect();
    class_is_honest(&small.check(&without_identity).unwrap_err());
    let identity_alone: Vec<_> =
        small.files.iter().filter(|(path, _)| path.ends_with("identity.json")).cloned().collect();
    class_is_honest(&small.check(&identity_alone).unwrap_err());
}

#[test]
fn bytes_inside_a_row_cannot_pass_for_a_block() {
    // A row that holds a whole block of another journal, behind a torn write.
    let foreign = Small::new(true)
        .files
        .iter()
        .find(|(path, _)| path.ends_with("00000000000000000000.segment"))
        .unwrap()
        .1[256..]
        .to_vec();
    let disk = PowerCut::default();
    let journal = Journal::open(options(&disk, 1 << 20)).unwrap();
    block_on(journal.append(committed(1, 1, &table("orders")))).unwrap();
    let changes = block_on(read_all(&journal, 0));
    let mut files = disk.files();
    files[0].1.extend_from_slice(b"torn");
    files[0].1.extend_from_slice(&foreign);
    let small = Small { files: Vec::new(), changes, commits: vec![1] };
    assert_eq!(small.check(&files).unwrap(), 1);
}

#[test]
fn a_newer_format_is_refused_and_left_alone() {
    let small = Small::new(true);
    let newer = |file: &mut Vec<u8>| {
        file[8] = 2; // the format of a segment
        let crc = crc32c::crc32c(&file[..252]);
        file[252..256].copy_from_slice(&crc.to_le_bytes());
    };
    let last = small.files.iter().rposition(|(path, _)| path == small.last()).unwrap();
    let mut files = small.files.clone();
    newer(&mut files[last].1);
    let error = small.check(&files).unwrap_err();
    assert_eq!(error.class(), Class::Config, "{error}");
    assert!(error.to_string().contains("format 2 is unknown"), "{error}");

    // A block with a flag that nobody knows yet, at the unproven end: not cut off.
    let mut files = Small::new(false).files;
    let bytes = &mut files[last].1;
    bytes[256 + 28] |= 0x80;
    let crc = crc32c::crc32c(&bytes[256 + 8..256 + 144]);
    bytes[256 + 4..256 + 8].copy_from_slice(&crc.to_le_bytes());
    let error = small.check(&files).unwrap_err();
    assert_eq!(error.class(), Class::Config, "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn any_alteration_is_noticed_or_harmless(
        closed: bool,
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<u8>(), 0..4u8), 1..6),
    ) {
        let small = Small::new(closed);
        let mut files = small.files.clone();
        for (file, place, byte, kind) in edits {
            let bytes = &mut files[file.index(small.files.len())].1;
            if bytes.is_empty() {
                continue;
            }
            let place = place.index(bytes.len());
            match kind {
                0 => bytes[place] = byte,
                1 => bytes.truncate(place),
                2 => bytes.insert(place, byte),
                _ => {
                    bytes.remove(place);
                }
            }
        }
        if let Err(error) = small.check(&files) {
            prop_assert!(matches!(error.class(), Class::Damaged | Class::Config), "{}", error);
        }
    }
}
