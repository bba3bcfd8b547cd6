//! Looking at segments without changing them: the headers of all, the blocks of the last.

use std::path::{Path, PathBuf};

use super::{
    Gap,
    active::Point,
    block::{self, Block, Fault},
    cut::Flaw,
    identity::Identity,
    index::{Entry, Index},
    record, segment,
};
use crate::{
    change::Position,
    disk::{Disk, DiskFile},
    error::{Class, Classify, Error, Result},
};

/// A segment file whose header was read and fits the one before.
#[derive(Clone, Debug)]
pub(super) struct Found {
    pub(super) path: PathBuf,
    pub(super) header: segment::Header,
    /// Bytes that belong to it.
    pub(super) bytes: u64,
    /// Bytes of the file; more only where recovery wrote what follows anew.
    pub(super) length: u64,
}

/// Every segment of a directory, the oldest first.
#[derive(Debug, Default)]
pub(super) struct Survey {
    pub(super) segments: Vec<Found>,
    /// A last file whose header was never finished: it holds nothing.
    pub(super) unfinished: Option<PathBuf>,
}

/// Reads the headers of all segments and checks that they form one chain.
pub(super) fn survey(disk: &dyn Disk, directory: &Path, identity: &Identity) -> Result<Survey> {
    let files = disk
        .list(directory)
        .class(Class::Config, || format!("cannot list {}", directory.display()))?;
    let files: Vec<PathBuf> =
        files.into_iter().filter(|path| segment::base_of(path).is_some()).collect();
    let mut survey = Survey::default();
    let last = files.last().cloned();
    for path in files {
        let (header, length) = match read_header(disk, &path)? {
            (Ok(header), length) => (header, length),
            (Err(Flaw::Bad(_)), length)
                if length <= segment::HEADER_BYTES
                    && Some(&path) == last.as_ref()
                    && !survey.segments.is_empty() =>
            {
                survey.unfinished = Some(path);
                break;
            }
            (Err(flaw), _) => return Err(flaw.at(&path, 0)),
        };
        let found = Found { path, header, bytes: length, length };
        check_identity(&found, identity)?;
        if let Some(previous) = survey.segments.last_mut() {
            join(previous, &found)?;
        }
        survey.segments.push(found);
    }
    if survey.segments.is_empty() {
        let what = format!("the segments of the journal in {} are gone", directory.display());
        return Err(Error::damaged(what).remedy("restore the directory from a copy"));
    }
    Ok(survey)
}

type Parsed = (Result<segment::Header, Flaw>, u64);

fn read_header(disk: &dyn Disk, path: &Path) -> Result<Parsed> {
    let cannot = || format!("cannot read {}", path.display());
    let file = disk.open(path, false).class(Class::Config, cannot)?;
    let length = file.len().class(Class::Damaged, cannot)?;
    let mut bytes = [0; segment::BYTES];
    match file.read_exact_at(&mut bytes, 0) {
        Ok(()) => Ok((segment::Header::parse(&bytes), length)),
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            Ok((Err("the file ends inside its header".into()), length))
        }
        Err(error) => Err(error).class(Class::Damaged, cannot),
    }
}

fn check_identity(found: &Found, identity: &Identity) -> Result<()> {
    let Found { path, header, .. } = found;
    if segment::base_of(path) != Some(header.base) {
        return Err(Flaw::from("its header has another offset than its name").at(path, 0));
    }
    if header.lineage != identity.lineage || header.incarnation != identity.incarnation {
        return Err(Flaw::from("it belongs to another journal").at(path, 0));
    }
    Ok(())
}

/// Checks that `next` was begun where `previous` ended.
fn join(previous: &mut Found, next: &Found) -> Result<()> {
    let flaw = |why: &str| Err(Flaw::from(why).at(&next.path, 0));
    let Some(before) = next.header.previous else {
        return flaw("it is the first of a journal but has one before it");
    };
    if before.base != previous.header.base {
        let missing = format!("the segment at offset {} before it is missing", before.base);
        return flaw(&missing);
    }
    if before.chain != previous.header.chain(&before.last_block) {
        return flaw("its chain does not go on from the segment before");
    }
    if previous.length < before.bytes || previous.length > before.bytes && !next.header.recovered {
        let why = format!("it has {} bytes instead of {}", previous.length, before.bytes);
        return Err(Flaw::Bad(why).at(&previous.path, previous.length.min(before.bytes)));
    }
    previous.bytes = before.bytes;
    Ok(())
}

/// The blocks of one segment.
#[derive(Debug)]
pub(super) struct Scan {
    /// After the last good block.
    pub(super) last: Point,
    /// After the last one that ends at a commit.
    pub(super) commit: Option<Point>,
    /// Where the source is at that commit.
    pub(super) progress: Option<Position>,
    /// Everything before this byte is known to have been durable.
    pub(super) proven_at: u64,
    /// Up to the commit.
    pub(super) index: Index,
    /// Up to the commit.
    pub(super) gaps: Vec<Gap>,
}

/// Reads and checks the blocks of a segment. A bad one below `sealed`, or below what a later block
/// proves to have been durable, is damage; any other is where a write was torn.
pub(super) fn scan(file: &dyn DiskFile, found: &Found, sealed: u64) -> Result<Scan> {
    let Found { path, header, bytes, .. } = found;
    let start = Point::start(header.base);
    let mut scan = Scan {
        last: start,
        commit: (!header.begins_open).then_some(start),
        progress: header.progress,
        proven_at: segment::HEADER_BYTES.max(sealed),
        index: Index::default(),
        gaps: Vec::new(),
    };
    let (mut gaps, mut gaps_at_commit) = (Vec::new(), 0);
    while scan.last.at < *bytes {
        let at = scan.last.at;
        let block = match next_block(file, found, &scan.last) {
            Ok(block) => block,
            Err(Fault::Flaw(Flaw::Bad(why))) => {
                if at < sealed
                    || proven_beyond(file, found, at).map_err(|e| Fault::Io(e).at(path, at))?
                {
                    return Err(Flaw::Bad(why).at(path, at));
                }
                break;
            }
            Err(fault) => return Err(fault.at(path, at)),
        };
        if block.header.flags & (block::TABLES | block::GAPS) != 0 {
            let records = block.records().map_err(|flaw| flaw.at(path, at))?;
            let base = scan.last.next;
            let decoded = record::decode(&records, base, &mut scan.index.tables)
                .map_err(|flaw| flaw.at(path, at))?;
            gaps.extend(decoded.gaps);
        }
        scan.pass(&block);
        if block.header.commits() {
            gaps_at_commit = gaps.len();
        }
    }
    gaps.truncate(gaps_at_commit);
    scan.gaps = gaps;
    if let Some(commit) = scan.commit {
        scan.index.cut_back(commit.at, commit.tables);
    }
    Ok(scan)
}

impl Scan {
    fn pass(&mut self, block: &Block) {
        let header = &block.header;
        let last = &mut self.last;
        self.index.add(Entry { at: last.at, base: last.next, times: header.times });
        last.at += header.bytes();
        last.next += u64::from(header.count);
        last.last_block = block.hash();
        last.summary.times.add(header.times);
        last.summary.gaps |= header.flags & block::GAPS != 0;
        last.tables = self.index.tables.len();
        self.proven_at = self.proven_at.max(segment::HEADER_BYTES + header.proven);
        // A block without records only proves what is before it: it may go, and does.
        if header.commits() && header.raw_bytes > 0 {
            self.commit = Some(*last);
            self.progress = header.position.or(self.progress);
        }
    }
}

/// Reads the block at `point` and checks that it continues what came before.
pub(super) fn next_block(
    file: &dyn DiskFile,
    found: &Found,
    point: &Point,
) -> Result<Block, Fault> {
    let block = block::read(file, point.at, found.bytes)?;
    let header = &block.header;
    let flaw = if header.tag != found.header.tag {
        "a block of another file"
    } else if header.previous != point.last_block {
        "the chain of blocks is broken"
    } else if found.header.base.checked_add(header.base) != Some(point.next) {
        "the offsets are not dense"
    } else if segment::HEADER_BYTES.saturating_add(header.proven) > point.at {
        "a block claims that itself was durable before it was written"
    } else {
        return Ok(block);
    };
    Err(Flaw::from(flaw).into())
}

/// Whether a later block says that the byte at `at` was durable.
fn proven_beyond(file: &dyn DiskFile, found: &Found, at: u64) -> std::io::Result<bool> {
    const STEP: usize = 1 << 20;
    let mut bytes = vec![0; STEP + block::HEADER_BYTES];
    let mut from = at + 1;
    while from < found.bytes {
        let mut filled = 0;
        while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match file.read_at(rest, from + filled as u64)? {
                0 => break,
                read => filled += read,
            }
        }
        let window = bytes.get(..filled).unwrap_or_default();
        for place in memchr::memmem::find_iter(window, &block::MAGIC) {
            let head = window.get(place..).and_then(<[u8]>::first_chunk);
            let header = head.and_then(|head| block::Header::parse(head).ok());
            let proves = |header: &block::Header| {
                header.tag == found.header.tag && segment::HEADER_BYTES + header.proven > at
            };
            if header.as_ref().is_some_and(proves) {
                return Ok(true);
            }
        }
        from += STEP as u64;
    }
    Ok(false)
}
