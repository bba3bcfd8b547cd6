//! Reading in order: from memory while caught up, else from the disk.

use std::{collections::VecDeque, sync::Arc};

use super::{
    Journal, Lag, Limits,
    block::{self, Header},
    cut::Flaw,
    record::{self, Tables},
    segment,
    store::{Segment, Store},
};
use crate::{
    change::{Backfill, Batch, Change, Position, Timestamp},
    disk::DiskFile,
    error::{Class, Classify, Error, Result},
};

/// Reads the durable changes of a [`Journal`] in order, from memory or disk.
#[derive(Debug)]
pub struct Reader {
    journal: Journal,
    offset: u64,
    /// The sink whose backfills it reads; `None`: all of them.
    audience: Option<u32>,
    /// Where it is on the disk; lost when a call is cancelled, and then found again.
    cursor: Option<Box<Cursor>>,
}

impl Reader {
    pub(super) fn new(journal: Journal, offset: u64) -> Self {
        Self { journal, offset, audience: None, cursor: None }
    }

    /// Leaves out the rows of backfills that are for other sinks than the one of number `sink`. A
    /// batch may be empty then, with `offset` moved on.
    #[must_use]
    pub fn for_sink(mut self, sink: u32) -> Self {
        self.audience = Some(sink);
        self
    }

    /// Waits until there is at least one durable change, and returns as many as there are, up to
    /// the limits. Cancel-safe.
    pub async fn next(&mut self, limits: Limits) -> Result<Batch> {
        let mut end = self.journal.store.end.subscribe();
        let from = self.offset;
        // The sender lives as long as the journal, which this reader keeps.
        let _ = end.wait_for(|end| *end > from).await;
        self.try_next(limits).await
    }

    /// As `next`, but an empty batch at the end instead of waiting.
    pub async fn try_next(&mut self, limits: Limits) -> Result<Batch> {
        let batches = self.journal.store.ring().read(self.offset, limits);
        let (batch, offset) = match batches {
            Some(batches) => {
                self.cursor = None;
                take(&batches, self.offset, limits, self.audience)
            }
            None if self.offset >= self.journal.end() => return Ok(Batch::default()),
            None => self.read_disk(limits).await?,
        };
        self.offset = offset;
        Ok(batch)
    }

    /// The offset of the change that comes next.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    async fn read_disk(&mut self, limits: Limits) -> Result<(Batch, u64)> {
        let mut cursor = self.cursor.take().unwrap_or_default();
        cursor.audience = self.audience;
        let (store, from) = (Arc::clone(&self.journal.store), self.offset);
        let read = tokio::task::spawn_blocking(move || {
            let batch = cursor.read(&store, from, limits);
            (cursor, batch)
        });
        let (cursor, batch) =
            read.await.class(Class::Bug, || "a thread that read the journal is gone")?;
        self.cursor = batch.is_ok().then_some(cursor);
        batch
    }
}

/// Copies what the limits allow out of shared batches; with the offset of what follows.
fn take(batches: &[Arc<Batch>], from: u64, limits: Limits, audience: Option<u32>) -> (Batch, u64) {
    let mut full = Full::new(limits);
    let mut taken = Batch::default();
    let mut next = from;
    for batch in batches {
        for change in batch.changes.iter().filter(|change| change.offset >= from) {
            if is_wanted(change.backfill, audience) {
                if full.with(change) {
                    return (taken, next);
                }
                taken.position = None;
                taken.changes.push(change.clone());
            }
            next = change.offset + 1;
        }
        taken.position = batch.position;
    }
    (taken, next)
}

fn is_wanted(backfill: Option<Backfill>, audience: Option<u32>) -> bool {
    backfill.zip(audience).is_none_or(|(backfill, sink)| backfill.is_for(sink))
}

/// Counts against [`Limits`].
struct Full {
    limits: Limits,
    changes: usize,
    bytes: usize,
}

impl Full {
    fn new(limits: Limits) -> Self {
        Self { limits, changes: 0, bytes: 0 }
    }

    /// Whether `change` is too much; the first never is.
    fn with(&mut self, change: &Change) -> bool {
        self.changes += 1;
        self.bytes += change.bytes();
        let over = self.changes > self.limits.changes_max || self.bytes > self.limits.bytes_max;
        over && self.changes > 1
    }
}

/// How far the change at `offset` is behind the end; `None` where there is no such change yet.
pub(super) fn lag(store: &Store, offset: u64) -> Result<Option<Lag>> {
    let end = store.end();
    if offset >= end {
        return Ok(None);
    }
    let open = Open::seek(store, offset)?;
    let base = open.segment.base;
    let (appended, at) = open.locate(store, offset)?;
    Ok(Some(Lag { changes: end - offset, bytes: store.bytes_behind(base, at), appended }))
}

/// A place on the disk, and what is left of the block that was read there.
#[derive(Debug, Default)]
pub(super) struct Cursor {
    audience: Option<u32>,
    open: Option<Open>,
    left: VecDeque<Change>,
    /// The position at the end of that block.
    position: Option<Position>,
}

/// A segment that is read.
#[derive(Debug)]
struct Open {
    segment: Segment,
    file: Box<dyn DiskFile>,
    /// Where the next block lies.
    at: u64,
    /// Its first offset.
    next: u64,
    tables: Tables,
}

impl Cursor {
    /// The durable changes from `from` on, and the offset of what follows them. Blocks.
    pub(super) fn read(
        &mut self,
        store: &Store,
        from: u64,
        limits: Limits,
    ) -> Result<(Batch, u64)> {
        let end = store.end();
        let mut full = Full::new(limits);
        let mut batch = Batch::default();
        let mut next = from;
        if self.left.front().is_some_and(|change| change.offset != from) {
            *self = Self { audience: self.audience, ..Self::default() };
        }
        while next < end {
            if self.left.is_empty() {
                self.load(store, &mut next, end)?;
            }
            while let Some(change) = self.left.pop_front() {
                if full.with(&change) {
                    next = change.offset;
                    self.left.push_front(change);
                    return Ok((batch, next));
                }
                batch.position = None;
                next = change.offset + 1;
                batch.changes.push(change);
            }
            batch.position = self.position;
        }
        Ok((batch, next))
    }

    /// Decodes the block that holds `next`, or passes blocks that are not for this reader until one
    /// is, or until `end`.
    fn load(&mut self, store: &Store, next: &mut u64, end: u64) -> Result<()> {
        while *next < end {
            let open = match self.open.take().filter(|open| open.next <= *next) {
                Some(open) => self.open.insert(open),
                None => self.open.insert(Open::seek(store, *next)?),
            };
            let Some(bytes) = store.bytes_of(open.segment.base) else {
                if *next < store.start() {
                    return Err(store.gone(*next));
                }
                // Read to its end, and removed because every sink has it.
                self.open = None;
                continue;
            };
            if open.at >= bytes {
                if open.next > *next || !store.follows(open.segment.base) {
                    let path = open.segment.path.display();
                    return Err(Error::bug(format!("{path} does not hold offset {next}")));
                }
                self.open = Some(Open::begin(store, open.next)?);
                continue;
            }
            if let Some((header, changes)) = open.step(bytes, *next, self.audience)? {
                self.position = header.position.filter(|_| header.commits());
                self.left = changes.into();
                return Ok(());
            }
            *next = open.next.max(*next);
        }
        Ok(())
    }
}

impl Open {
    /// The block that holds `offset`, or one a little before it.
    fn seek(store: &Store, offset: u64) -> Result<Self> {
        let segment = store.segment_of(offset).ok_or_else(|| store.gone(offset))?;
        let (place, tables) = store.seek(&segment, offset)?;
        let (at, next) = place.unwrap_or((segment::HEADER_BYTES, segment.base));
        Self::at(store, segment, (at, next), tables)
    }

    /// The segment that begins at `base`.
    fn begin(store: &Store, base: u64) -> Result<Self> {
        let segment = store.segment_of(base).ok_or_else(|| store.gone(base))?;
        if segment.base != base {
            let path = segment.path.display();
            return Err(Error::damaged(format!("{path} does not begin at offset {base}")));
        }
        Self::at(store, segment, (segment::HEADER_BYTES, base), Tables::new())
    }

    fn at(store: &Store, segment: Segment, (at, next): (u64, u64), tables: Tables) -> Result<Self> {
        match store.options.disk.open(&segment.path, false) {
            Ok(file) => Ok(Self { segment, file, at, next, tables }),
            Err(_) if store.start() > next => Err(store.gone(next)),
            Err(error) => {
                let what = format!("cannot open {}", segment.path.display());
                Err(Error::damaged(what).caused_by(error).remedy("restore the file from a copy"))
            }
        }
    }

    /// The append time of the block that holds `offset`, and where it lies.
    fn locate(mut self, store: &Store, offset: u64) -> Result<(Timestamp, u64)> {
        let end = store.bytes_of(self.segment.base).ok_or_else(|| store.gone(offset))?;
        loop {
            let (path, at) = (&self.segment.path, self.at);
            let header = block::read_header(&*self.file, at, end).map_err(|f| f.at(path, at))?;
            self.next = self.next.saturating_add(header.count.into());
            if self.next > offset {
                return Ok((header.times.append_max, at));
            }
            self.at += header.bytes();
        }
    }

    /// Passes one block; returns its changes from `offset` on, if it has any that `audience` wants.
    fn step(
        &mut self,
        end: u64,
        offset: u64,
        audience: Option<u32>,
    ) -> Result<Option<(Header, Vec<Change>)>> {
        let (path, at) = (&self.segment.path, self.at);
        let header = block::read_header(&*self.file, at, end).map_err(|f| f.at(path, at))?;
        if self.segment.base.checked_add(header.base) != Some(self.next) {
            return Err(Flaw::from("the offsets are not dense").at(path, at));
        }
        let first = self.next;
        let after = first.saturating_add(header.count.into());
        let wanted = after > offset && is_wanted(header.backfill, audience);
        let mut found = None;
        if wanted || header.flags & block::TABLES != 0 {
            let decoded = block::read(&*self.file, at, end)
                .and_then(|block| Ok(record::decode(&block.records()?, first, &mut self.tables)?));
            let mut changes = decoded.map_err(|fault| fault.at(path, at))?.changes;
            if changes.len() as u64 != u64::from(header.count) {
                return Err(Flaw::from("a block lacks changes").at(path, at));
            }
            changes.retain(|change| change.offset >= offset);
            changes.iter_mut().for_each(|change| change.backfill = header.backfill);
            found = wanted.then_some((header, changes));
        }
        self.at += header.bytes();
        self.next = after;
        Ok(found)
    }
}
