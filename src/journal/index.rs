//! Finding an offset or a time inside a segment without reading its blocks.

use std::sync::Arc;

use super::{
    block::{self, Times},
    record::{self, Tables},
    segment,
};
use crate::{change::Timestamp, disk::DiskFile, error::Result};

/// One entry covers at least this much of the file.
const STEP_BYTES: u64 = 64 << 10;

/// A run of blocks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    /// Where the first block lies in the file.
    pub(super) at: u64,
    /// The offset of its first change.
    pub(super) base: u64,
    /// Of all blocks of the run.
    pub(super) times: Times,
}

/// Sparse: about one entry for 64 KiB of file, and the tables that the segment describes.
#[derive(Clone, Debug, Default)]
pub(super) struct Index {
    entries: Vec<Entry>,
    pub(super) tables: Tables,
}

impl Index {
    /// Adds a block that follows all others.
    pub(super) fn add(&mut self, block: Entry) {
        match self.entries.last_mut() {
            Some(last) if block.at - last.at < STEP_BYTES => last.times.add(block.times),
            _ => self.entries.push(block),
        }
    }

    /// Forgets the blocks from `at` on, and the tables above the first `tables`.
    pub(super) fn cut_back(&mut self, at: u64, tables: usize) {
        self.entries.retain(|entry| entry.at < at);
        self.tables.truncate(tables);
    }

    /// A block at or before the one with `offset`: where it lies, and its first offset.
    pub(super) fn seek(&self, offset: u64) -> Option<(u64, u64)> {
        let after = self.entries.partition_point(|entry| entry.base <= offset);
        let entry = self.entries.get(after.checked_sub(1)?)?;
        Some((entry.at, entry.base))
    }

    /// The first offset whose run may have a change that was committed at `time` or later.
    pub(super) fn first_since(&self, time: Timestamp) -> Option<u64> {
        self.entries.iter().find(|entry| entry.times.commit_max >= time).map(|entry| entry.base)
    }

    /// Builds it by hopping over the headers of a segment whose file ends at `end`. A fault comes
    /// with its place.
    pub(super) fn build(
        file: &dyn DiskFile,
        base: u64,
        end: u64,
    ) -> Result<Self, (u64, block::Fault)> {
        let mut index = Self::default();
        let mut at = segment::HEADER_BYTES;
        while at < end {
            let fault = |fault| (at, fault);
            let header = block::read_header(file, at, end).map_err(fault)?;
            let first = base.saturating_add(header.base);
            index.add(Entry { at, base: first, times: header.times });
            if header.flags & block::TABLES != 0 {
                let block = block::read(file, at, end).map_err(fault)?;
                let records = block.records().map_err(|flaw| (at, flaw.into()))?;
                record::decode(&records, first, &mut index.tables)
                    .map_err(|flaw| (at, flaw.into()))?;
            }
            at += header.bytes();
        }
        Ok(index)
    }
}

/// The indexes of the sealed segments that were read last.
#[derive(Debug, Default)]
pub(super) struct Recent(Vec<(u64, Arc<Index>)>);

impl Recent {
    /// Indexes kept at most; one is about 50 KiB for a segment of 128 MiB.
    const MAX: usize = 32;

    pub(super) fn get(&mut self, base: u64) -> Option<Arc<Index>> {
        let place = self.0.iter().position(|(of, _)| *of == base)?;
        let entry = self.0.remove(place);
        let index = Arc::clone(&entry.1);
        self.0.push(entry);
        Some(index)
    }

    pub(super) fn put(&mut self, base: u64, index: Arc<Index>) {
        self.0.retain(|(of, _)| *of != base);
        if self.0.len() >= Self::MAX {
            self.0.remove(0);
        }
        self.0.push((base, index));
    }

    /// Forgets the segments from `base` on: they were rewritten or cut.
    pub(super) fn forget_from(&mut self, base: u64) {
        self.0.retain(|(of, _)| *of < base);
    }
}
