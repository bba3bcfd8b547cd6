//! Making a journal fit to be used again, before anything reads it.
//!
//! ```text
//!                 proven            commit      torn
//!   ... |=========|=================|===========|
//!        durable   readable, perhaps  cut off
//!                  never synced:
//!                  written anew
//! ```
//!
//! After a failed fsync the kernel may hold pages that look written and are not. So what no later
//! block proves to have been durable is copied to a new file and synced before anyone sees it.

use std::{io, path::Path};

use super::{
    Succession,
    active::{Active, BlockEnd, Point, write_error},
    identity::Identity,
    record, scan,
    scan::{Found, Scan},
    segment::{self, Previous},
};
use crate::{
    change::Timestamp,
    disk::{Disk, DiskFile},
    error::{Class, Classify, Error, Result},
};

const TEMPORARY: &str = "segment.tmp";

/// A journal that ends at a durable commit.
#[derive(Debug)]
pub(super) struct Recovered {
    /// All segments; the last is the one to go on with.
    pub(super) segments: Vec<Found>,
    /// Of the last segment.
    pub(super) scan: Scan,
    /// Where it ends.
    pub(super) end: Point,
}

impl Recovered {
    /// The last segment.
    pub(super) fn last(&self) -> Result<&Found> {
        self.segments.last().ok_or_else(|| Error::bug("a recovered journal has no segment"))
    }
}

/// Begins a journal: its first segment, then the identity, which says that it exists.
pub(super) fn create(
    disk: &dyn Disk,
    directory: &Path,
    succession: Succession,
) -> Result<Identity> {
    let Succession { lineage, incarnation, first_offset } = succession;
    let files = disk
        .list(directory)
        .class(Class::Config, || format!("cannot list {}", directory.display()))?;
    for path in files.iter().filter(|path| segment::base_of(path).is_some()) {
        let length = open(disk, path)?.len().class(Class::Config, || "cannot read a length")?;
        if length > segment::HEADER_BYTES {
            let what = format!("{} has changes but no identity.json", directory.display());
            return Err(Error::damaged(what).remedy("restore the directory from a copy"));
        }
        disk.remove(path).map_err(|error| write_error(path, error))?;
    }
    let header = segment::Header {
        lineage,
        incarnation,
        base: first_offset,
        previous: None,
        begins_open: false,
        recovered: false,
        progress: None,
        created: Timestamp::now(),
        tag: fastrand::u64(..),
    };
    let path = segment::path(directory, first_offset);
    let created = Active::create(disk, &path, header)
        .and_then(|active| active.file.sync())
        .and_then(|()| disk.sync_dir(directory));
    created.map_err(|error| write_error(&path, error))?;
    let format = segment::FORMAT;
    let identity = Identity { format, lineage, incarnation, first_offset, origin: None };
    identity.store(disk, directory)?;
    Ok(identity)
}

/// Finds the last commit without changing anything.
pub(super) fn inspect(disk: &dyn Disk, directory: &Path, identity: &Identity) -> Result<Recovered> {
    find_commit(disk, scan::survey(disk, directory, identity)?.segments, |_| Ok(()))
}

/// Cuts off what is torn, makes durable what is not proven to be, and removes what is left over.
pub(super) fn recover(disk: &dyn Disk, directory: &Path, identity: &Identity) -> Result<Recovered> {
    remove_temporary(disk, directory).map_err(|error| write_error(directory, error))?;
    let survey = scan::survey(disk, directory, identity)?;
    if let Some(path) = &survey.unfinished {
        disk.remove(path).map_err(|error| write_error(path, error))?;
    }
    // A file that was created just before a crash may not have its name on the disk yet.
    disk.sync_dir(directory).map_err(|error| write_error(directory, error))?;
    for found in &survey.segments {
        if found.length > found.bytes {
            open(disk, &found.path)?
                .set_len(found.bytes)
                .map_err(|error| write_error(&found.path, error))?;
        }
    }
    let recovered = find_commit(disk, survey.segments, |path| remove(disk, directory, path))?;
    if recovered.scan.proven_at < recovered.end.at {
        return rewrite(disk, directory, recovered);
    }
    let last = recovered.last()?;
    if last.length > recovered.end.at {
        cut(disk, &last.path, recovered.end.at)?;
    }
    Ok(recovered)
}

/// Cuts the open transaction off: segments that lie inside it are removed, the newest first.
pub(super) fn abandon(disk: &dyn Disk, directory: &Path, identity: &Identity) -> Result<Recovered> {
    let survey = scan::survey(disk, directory, identity)?;
    let recovered = find_commit(disk, survey.segments, |path| remove(disk, directory, path))?;
    let last = recovered.last()?;
    if last.length > recovered.end.at {
        cut(disk, &last.path, recovered.end.at)?;
    }
    Ok(recovered)
}

/// Goes back to the segment that has the last commit; `drop` is called for each one behind it.
fn find_commit(
    disk: &dyn Disk,
    mut segments: Vec<Found>,
    drop: impl Fn(&Path) -> Result<()>,
) -> Result<Recovered> {
    let mut sealed = 0;
    loop {
        let last = segments.last().ok_or_else(|| Error::bug("a journal without a segment"))?;
        let scan = scan::scan(&*open(disk, &last.path)?, last, sealed)?;
        if let Some(end) = scan.commit {
            return Ok(Recovered { segments, scan, end });
        }
        let Some(previous) = last.header.previous.filter(|_| segments.len() > 1) else {
            let what = format!("{} begins inside a transaction", last.path.display());
            return Err(Error::damaged(what).remedy("restore the journal from a copy"));
        };
        drop(&last.path)?;
        sealed = previous.bytes;
        segments.pop();
    }
}

/// Copies what is not proven to be durable into a new segment.
fn rewrite(disk: &dyn Disk, directory: &Path, recovered: Recovered) -> Result<Recovered> {
    let Recovered { mut segments, scan, end } = recovered;
    let old = segments.pop().ok_or_else(|| Error::bug("a recovered journal has no segment"))?;
    let file = open(disk, &old.path)?;
    let proven = Found { bytes: scan.proven_at, ..old.clone() };
    let proven_scan = scan::scan(&*file, &proven, scan.proven_at)?;
    let from = proven_scan.last;
    // A segment is named after its first offset, so one without changes is replaced as a whole.
    let whole = from.next == old.header.base;
    let begin = if whole { Point::start(old.header.base) } else { from };
    let header = if whole {
        segment::Header { tag: fastrand::u64(..), ..old.header }
    } else {
        segment::Header {
            base: from.next,
            previous: Some(previous_of(&old.header, &from)),
            begins_open: proven_scan.commit.is_none_or(|commit| commit.at < from.at),
            recovered: true,
            progress: proven_scan.progress,
            created: Timestamp::now(),
            tag: fastrand::u64(..),
            ..old.header
        }
    };
    let temporary = directory.join(TEMPORARY);
    let failed = |error| write_error(&temporary, error);
    let mut new = Active::create(disk, &temporary, header).map_err(failed)?;
    let tables = if whole { Vec::new() } else { proven_scan.index.tables };
    copy(&*file, &Found { bytes: end.at, ..old.clone() }, (begin, tables), &mut new)?;
    new.file.sync().map_err(failed)?;
    let path = segment::path(directory, header.base);
    disk.rename(&temporary, &path).map_err(failed)?;
    disk.sync_dir(directory).map_err(failed)?;
    if !whole {
        // Not synced: what comes back is not part of the chain, and is cut again.
        file.set_len(from.at).map_err(|error| write_error(&old.path, error))?;
        segments.push(Found { bytes: from.at, length: from.at, ..old });
    }
    let bytes = new.point().at;
    segments.push(Found { path, header, bytes, length: bytes });
    find_commit(disk, segments, |_| Err(Error::bug("what was written anew has no commit")))
}

/// Copies the blocks from a point to the end of `from`, keeping their ends and times.
fn copy(
    file: &dyn DiskFile,
    from: &Found,
    (mut point, mut tables): (Point, record::Tables),
    to: &mut Active,
) -> Result<()> {
    while point.at < from.bytes {
        let at = point.at;
        let block = scan::next_block(file, from, &point).map_err(|f| f.at(&from.path, at))?;
        let decoded = block
            .records()
            .and_then(|records| record::decode(&records, point.next, &mut tables))
            .map_err(|flaw| flaw.at(&from.path, at))?;
        to.begin(block.header.times.append_max);
        for mut change in decoded.changes {
            to.push(&mut change)?;
        }
        for gap in &decoded.gaps {
            to.push_gap(gap)?;
        }
        let commit = block.header.commits();
        to.finish_block(BlockEnd { commit, position: block.header.position })?;
        point.at += block.header.bytes();
        point.next += u64::from(block.header.count);
        point.last_block = block.hash();
    }
    to.flush().map_err(|error| write_error(&to.path, error))
}

/// What the header of the next segment says of one that ends at `point`.
pub(super) fn previous_of(header: &segment::Header, point: &Point) -> Previous {
    Previous {
        base: header.base,
        bytes: point.at,
        summary: point.summary,
        last_block: point.last_block,
        chain: header.chain(&point.last_block),
    }
}

/// Replaces a segment without changes, which has nothing but positions, by an empty one.
pub(super) fn replace(disk: &dyn Disk, path: &Path, header: segment::Header) -> io::Result<Active> {
    let temporary = path.with_file_name(TEMPORARY);
    remove_temporary(disk, path.parent().unwrap_or(path))?;
    let mut new = Active::create(disk, &temporary, header)?;
    new.file.sync()?;
    disk.rename(&temporary, path)?;
    disk.sync_dir(path.parent().unwrap_or(path))?;
    new.path = path.to_owned();
    Ok(new)
}

fn remove_temporary(disk: &dyn Disk, directory: &Path) -> io::Result<()> {
    match disk.remove(&directory.join(TEMPORARY)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn remove(disk: &dyn Disk, directory: &Path, path: &Path) -> Result<()> {
    let failed = |error| write_error(path, error);
    disk.remove(path).map_err(failed)?;
    disk.sync_dir(directory).map_err(failed)
}

/// Shortens a file. Synced, because an open transaction that came back behind newer blocks would
/// claim that what lies between is durable, and look like damage.
fn cut(disk: &dyn Disk, path: &Path, bytes: u64) -> Result<()> {
    let file = open(disk, path)?;
    file.set_len(bytes).and_then(|()| file.sync()).map_err(|error| write_error(path, error))
}

fn open(disk: &dyn Disk, path: &Path) -> Result<Box<dyn DiskFile>> {
    disk.open(path, true).class(Class::Config, || format!("cannot open {}", path.display()))
}
