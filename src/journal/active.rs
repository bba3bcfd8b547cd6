//! The segment that is being written: changes become blocks, blocks become bytes of the file.

use std::{
    io,
    path::{Path, PathBuf},
};

use super::{
    Gap,
    block::{self, Hash, Times},
    index::Entry,
    record::Encoder,
    segment::{self, Summary},
};
use crate::{
    change::{Backfill, Change, Position, Timestamp},
    disk::{Disk, DiskFile},
    error::{Error, Result},
};

/// Finished blocks are handed to the file when they are this many bytes.
const WRITE_BYTES: usize = 1 << 20;

/// Where a segment ends, or ended at a commit: all that is needed to go on from there.
#[derive(Clone, Copy, Debug)]
pub(super) struct Point {
    /// Bytes of the file.
    pub(super) at: u64,
    /// The offset of the next change.
    pub(super) next: u64,
    /// The hash of the last block.
    pub(super) last_block: Hash,
    /// Of the segment's changes so far.
    pub(super) summary: Summary,
    /// Tables described so far.
    pub(super) tables: usize,
}

impl Point {
    /// The beginning of a segment.
    pub(super) fn start(base: u64) -> Self {
        Self {
            at: segment::HEADER_BYTES,
            next: base,
            last_block: [0; 32],
            summary: Summary::EMPTY,
            tables: 0,
        }
    }
}

/// How a block ends.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct BlockEnd {
    pub(super) commit: bool,
    pub(super) position: Option<Position>,
}

/// A segment open for writing.
#[derive(Debug)]
pub(super) struct Active {
    pub(super) file: Box<dyn DiskFile>,
    pub(super) path: PathBuf,
    pub(super) header: segment::Header,
    /// Everything before this is durable.
    pub(super) durable_at: u64,
    /// The blocks since the last call of `take_entries`.
    entries: Vec<Entry>,
    point: Point,
    encoder: Encoder,
    out: block::Out,
    append_time: Timestamp,
    count: u32,
    times: Times,
    gaps: bool,
    /// The backfill that read the block's changes.
    backfill: Option<Backfill>,
}

impl Active {
    /// Creates the file and writes its header; neither is durable yet.
    pub(super) fn create(
        disk: &dyn Disk,
        path: &Path,
        header: segment::Header,
    ) -> io::Result<Self> {
        let file = disk.create(path)?;
        file.write_all_at(&header.encode(), 0)?;
        Ok(Self::resume(file, path, header, (Point::start(header.base), Vec::new())))
    }

    /// Goes on with a segment that ends at the point and has described the tables.
    pub(super) fn resume(
        file: Box<dyn DiskFile>,
        path: &Path,
        header: segment::Header,
        (point, tables): (Point, super::record::Tables),
    ) -> Self {
        Self {
            file,
            path: path.to_owned(),
            header,
            durable_at: point.at,
            entries: Vec::new(),
            point,
            encoder: Encoder::resume(tables),
            out: block::Out::default(),
            append_time: Timestamp::default(),
            count: 0,
            times: Times::NONE,
            gaps: false,
            backfill: None,
        }
    }

    /// Where it ends, with all finished blocks.
    pub(super) fn point(&self) -> Point {
        self.point
    }

    /// The tables described so far.
    pub(super) fn tables(&self) -> &super::record::Tables {
        self.encoder.tables()
    }

    /// The next blocks are appended at `time`.
    pub(super) fn begin(&mut self, time: Timestamp) {
        self.append_time = time;
        self.begin_block();
    }

    /// Adds a change and gives it its offset.
    pub(super) fn push(&mut self, change: &mut Change) -> Result<()> {
        let raw_bytes = self.encoder.raw().len();
        // Only between changes, so that the last block of a batch never lacks a change: it is the
        // one that carries the commit.
        if self.count > 0
            && (raw_bytes >= block::RAW_BYTES_MAX
                || raw_bytes + change.bytes() > block::RAW_BYTES_MAX * 2
                || self.backfill != change.backfill)
        {
            self.finish_block(BlockEnd::default())?;
        }
        self.backfill = change.backfill;
        change.offset = self.point.next + u64::from(self.count);
        self.times.add_commit(change.transaction.commit_time);
        self.count += 1;
        self.encoder.change(change)
    }

    /// Adds a gap.
    pub(super) fn push_gap(&mut self, gap: &Gap) -> Result<()> {
        self.gaps = true;
        self.encoder.gap(gap)
    }

    /// Seals the block.
    pub(super) fn finish_block(&mut self, end: BlockEnd) -> Result<()> {
        if let Some(position) = end.position {
            self.encoder.progress(position);
        }
        self.seal(end)?;
        if self.out.bytes.len() >= WRITE_BYTES {
            self.flush().map_err(|error| write_error(&self.path, error))?;
        }
        Ok(())
    }

    /// Seals a block without records, which says that all before it is durable.
    pub(super) fn prove(&mut self, end: BlockEnd, time: Timestamp) -> Result<()> {
        self.begin(time);
        self.seal(end)?;
        self.flush().map_err(|error| write_error(&self.path, error))
    }

    fn seal(&mut self, end: BlockEnd) -> Result<()> {
        let flag = |set: bool, bit: u32| if set { bit } else { 0 };
        if self.count > 0 {
            self.times.append_max = self.append_time;
        }
        let mut header = block::Header {
            tag: self.header.tag,
            base: self.point.next - self.header.base,
            count: self.count,
            flags: flag(end.commit, block::COMMIT)
                | flag(end.position.is_some(), block::POSITION)
                | flag(self.gaps, block::GAPS)
                | flag(self.encoder.described(), block::TABLES)
                | flag(self.backfill.is_some(), block::BACKFILL),
            times: self.times,
            proven: self.durable_at - segment::HEADER_BYTES,
            position: end.position,
            backfill: self.backfill,
            codec: 0,
            raw_bytes: 0,
            stored_bytes: 0,
            payload_crc: 0,
            previous: self.point.last_block,
        };
        self.point.last_block = block::write(&mut header, self.encoder.raw(), &mut self.out)
            .map_err(|flaw| Error::data(flaw.to_string()))?;
        self.entries.push(Entry { at: self.point.at, base: self.point.next, times: self.times });
        self.point.at += header.bytes();
        self.point.next += u64::from(self.count);
        self.point.summary.times.add(self.times);
        self.point.summary.gaps |= self.gaps;
        self.point.tables = self.encoder.tables().len();
        self.begin_block();
        Ok(())
    }

    /// Hands all finished blocks to the file.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        let at = self.point.at - self.out.bytes.len() as u64;
        self.file.write_all_at(&self.out.bytes, at)?;
        self.out.bytes.clear();
        self.out.bytes.shrink_to(4 * WRITE_BYTES);
        Ok(())
    }

    /// Forgets what follows `point`, and cuts it off the file. What a power cut brings back of it
    /// lacks its last block, the one that commits, so recovery cuts it again.
    pub(super) fn cut_back(&mut self, point: Point) -> io::Result<()> {
        self.out.bytes.clear();
        self.entries.clear();
        self.encoder.cut_back(point.tables);
        self.point = point;
        self.begin_block();
        self.file.set_len(point.at)
    }

    /// The blocks that were finished since the last call.
    pub(super) fn take_entries(&mut self) -> std::vec::Drain<'_, Entry> {
        self.entries.drain(..)
    }

    fn begin_block(&mut self) {
        self.encoder.begin_block();
        self.count = 0;
        self.times = Times::NONE;
        self.gaps = false;
        self.backfill = None;
    }
}

/// What a failed write means: a full disk heals, anything else does not by itself.
pub(super) fn write_error(path: &Path, error: io::Error) -> Error {
    let directory = path.parent().unwrap_or(path).display();
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            Error::retry(format!("the disk of {directory} is full")).caused_by(error).remedy(
                "free space on that volume, or lower journal.bytes_max; capture goes on by itself",
            )
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            Error::config(format!("cannot write {}", path.display()))
                .caused_by(error)
                .remedy("give walrace the right to write there")
        }
        _ => Error::retry(format!("cannot write {}", path.display()))
            .caused_by(error)
            .remedy("check the disk"),
    }
}
