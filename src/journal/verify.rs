//! Reading everything, and believing nothing: the walk of `walrace journal verify`, and the journal
//! as a program sees it that must not write.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    Gap, Info, Lag, Limits, Options, Report,
    active::Point,
    block::{self, Block, Fault, Times},
    cut::Flaw,
    identity::Identity,
    reader::{self, Cursor},
    record::{self, Tables},
    recovery, scan,
    scan::Found,
    segment,
    store::{Segment, Store},
};
use crate::{
    change::{Batch, Change, Op},
    disk::{Disk, DiskFile},
    error::{Class, Classify, Error, Result},
};

/// A journal opened only for reading: it may be in use by another process, whose last commit at
/// the time of opening is the end. Nothing is repaired and nothing is written.
#[derive(Debug)]
pub struct Inspection {
    pub(super) store: Arc<Store>,
}

impl Inspection {
    /// Looks at the journal in `options.directory`. Blocks.
    pub fn open(options: Options) -> Result<Self> {
        let identity = Identity::load(&*options.disk, &options.directory)?;
        let directory = options.directory.display();
        let identity = identity.ok_or_else(|| {
            Error::config(format!("there is no journal in {directory}"))
                .remedy("name the directory that holds identity.json")
        })?;
        let (disk, directory) = (&*options.disk, &*options.directory);
        let found = steady(disk, directory, || recovery::inspect(disk, directory, &identity))?;
        Ok(Self { store: Arc::new(Store::new(options, identity, &found, None)?) })
    }

    /// What it holds.
    pub fn info(&self) -> Info {
        self.store.info()
    }

    /// How far a reader whose next change is the one at `offset` is behind; `None` where it is
    /// caught up. Blocks.
    pub fn lag(&self, offset: u64) -> Result<Option<Lag>> {
        reader::lag(&self.store, offset)
    }

    /// Checks every byte up to the last commit.
    pub fn verify(&self) -> Result<Report> {
        self.store.verify()
    }

    /// The changes from `from` (or the oldest, where that is later) to the end. Blocks.
    pub fn dump(&self, from: u64) -> Dump {
        Dump {
            store: Arc::clone(&self.store),
            cursor: Cursor::default(),
            next: from.max(self.store.start()),
            batch: Batch::default().changes.into_iter(),
        }
    }
}

/// The changes of an [`Inspection`], in order. Ends after an error.
#[derive(Debug)]
pub struct Dump {
    store: Arc<Store>,
    cursor: Cursor,
    next: u64,
    batch: std::vec::IntoIter<Change>,
}

impl Iterator for Dump {
    type Item = Result<Change>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Some(change) = self.batch.next() {
            return Some(Ok(change));
        }
        let limits = Limits { changes_max: 10_000, bytes_max: 4 << 20 };
        match self.cursor.read(&self.store, self.next, limits) {
            Ok((batch, next)) => {
                self.next = next;
                self.batch = batch.changes.into_iter();
                self.batch.next().map(Ok)
            }
            Err(error) => {
                self.next = u64::MAX;
                Some(Err(error))
            }
        }
    }
}

/// Looks again where a look fails and the files changed meanwhile: the writer may have cut or
/// removed what was just being read. Damage does not move.
pub(super) fn steady<T>(
    disk: &dyn Disk,
    directory: &Path,
    look: impl Fn() -> Result<T>,
) -> Result<T> {
    const LOOKS_MAX: usize = 5;
    let mut before = lengths(disk, directory);
    for _ in 1..LOOKS_MAX {
        let seen = look();
        let after = lengths(disk, directory);
        if seen.is_ok() || before == after {
            return seen;
        }
        before = after;
    }
    look()
}

fn lengths(disk: &dyn Disk, directory: &Path) -> Vec<(PathBuf, u64)> {
    let files = disk.list(directory).unwrap_or_default();
    let length = |path: PathBuf| {
        let length = disk.open(&path, false).and_then(|file| file.len()).unwrap_or_default();
        (path, length)
    };
    files.into_iter().map(length).collect()
}

/// Walks every segment up to the last commit: checksums, both chains, dense offsets, times, and
/// every record.
pub(super) fn verify(disk: &dyn Disk, directory: &Path, identity: &Identity) -> Result<Report> {
    let found = recovery::inspect(disk, directory, identity)?;
    let mut report = Report {
        segments: found.segments.len(),
        start: found.segments.first().map_or(0, |first| first.header.base),
        end: found.end.next,
        ..Report::default()
    };
    let mut segments = found.segments.into_iter().peekable();
    while let Some(mut segment) = segments.next() {
        let next = segments.peek().and_then(|next| next.header.previous);
        if next.is_none() {
            segment.bytes = found.end.at;
        }
        let end = walk(disk, &segment, &mut report)?;
        let told = next.map(|next| (next.last_block, next.summary));
        if told.is_some_and(|told| told != (end.last_block, end.summary)) {
            let flaw = Flaw::from("it does not end as the next segment says");
            return Err(flaw.at(&segment.path, end.at));
        }
        report.bytes += segment.bytes;
        report.head = hex::encode(segment.header.chain(&end.last_block));
    }
    if report.changes != report.end - report.start {
        return Err(Error::damaged(format!(
            "{} holds {} changes from {} to {}",
            directory.display(),
            report.changes,
            report.start,
            report.end
        )));
    }
    Ok(report)
}

fn walk(disk: &dyn Disk, found: &Found, report: &mut Report) -> Result<Point> {
    let file = open(disk, &found.path)?;
    let mut point = Point::start(found.header.base);
    let mut tables = Tables::new();
    while point.at < found.bytes {
        let at = point.at;
        let checked = scan::next_block(&*file, found, &point)
            .and_then(|block| check(&block, point.next, &mut tables).map(|()| block));
        let block = checked.map_err(|fault| fault.at(&found.path, at))?;
        point.at += block.header.bytes();
        point.next += u64::from(block.header.count);
        point.last_block = block.hash();
        point.summary.times.add(block.header.times);
        point.summary.gaps |= block.header.flags & block::GAPS != 0;
        report.blocks += 1;
        report.changes += u64::from(block.header.count);
    }
    Ok(point)
}

/// Decodes a block and compares it with what its header says.
fn check(block: &Block, first: u64, tables: &mut Tables) -> Result<(), Fault> {
    let header = &block.header;
    let described = tables.len();
    let records = block.records()?;
    let decoded = record::decode(&records, first, tables)?;
    let mut times = Times { append_max: header.times.append_max, ..Times::NONE };
    for change in &decoded.changes {
        times.add_commit(change.transaction.commit_time);
    }
    let flaw = if decoded.changes.len() as u64 != u64::from(header.count) {
        "a block lacks changes"
    } else if times != header.times {
        "the commit times are not those of the block's header"
    } else if !records.is_empty() && decoded.progress != header.position {
        "the position is not that of the block's header"
    } else if decoded.gaps.is_empty() == (header.flags & block::GAPS != 0) {
        "the gaps are not those of the block's header"
    } else if (tables.len() > described) != (header.flags & block::TABLES != 0) {
        "the tables are not those of the block's header"
    } else if header.backfill.is_some() && decoded.changes.iter().any(|c| c.op != Op::Read) {
        "a block of a backfill holds what is no row that was read"
    } else {
        return Ok(());
    };
    Err(Flaw::from(flaw).into())
}

/// The gaps that a sealed segment records.
pub(super) fn gaps_of(disk: &dyn Disk, segment: &Segment) -> Result<Vec<Gap>> {
    let file = open(disk, &segment.path)?;
    let (mut at, mut gaps, mut tables) = (segment::HEADER_BYTES, Vec::new(), Tables::new());
    while at < segment.bytes {
        let header = block::read_header(&*file, at, segment.bytes)
            .map_err(|fault| fault.at(&segment.path, at))?;
        if header.flags & (block::GAPS | block::TABLES) != 0 {
            let decoded = block::read(&*file, at, segment.bytes)
                .and_then(|block| Ok(record::decode(&block.records()?, 0, &mut tables)?));
            gaps.extend(decoded.map_err(|fault| fault.at(&segment.path, at))?.gaps);
        }
        at += header.bytes();
    }
    Ok(gaps)
}

/// Reads one segment file on its own, whatever its bytes are: what the fuzzer calls. Returns how
/// many changes were read before the first flaw.
pub fn read_segment(disk: &dyn Disk, path: &Path) -> Result<u64> {
    let file = open(disk, path)?;
    let length = file.len().class(Class::Damaged, || "cannot read a length")?;
    let mut bytes = [0; segment::BYTES];
    file.read_exact_at(&mut bytes, 0).class(Class::Damaged, || "no header")?;
    let header = segment::Header::parse(&bytes).map_err(|flaw| flaw.at(path, 0))?;
    let found = Found { path: path.to_owned(), header, bytes: length, length };
    scan::scan(&*file, &found, 0)?;
    let mut report = Report::default();
    let walked = walk(disk, &found, &mut report);
    if walked.is_err() && report.changes == 0 { walked.map(|_| 0) } else { Ok(report.changes) }
}

fn open(disk: &dyn Disk, path: &Path) -> Result<Box<dyn DiskFile>> {
    disk.open(path, false).class(Class::Damaged, || format!("cannot open {}", path.display()))
}
