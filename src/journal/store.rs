//! What the writer and the readers of a journal share.

use std::{
    any::Any,
    collections::VecDeque,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::watch;

use super::{
    Gap, Info, Options, Report,
    identity::Identity,
    index::{Index, Recent},
    record::Tables,
    recovery::Recovered,
    ring::Ring,
    segment::Summary,
};
use crate::{
    change::{Position, Timestamp},
    error::{Class, Classify, Error, Result},
};

type Place = Option<(u64, u64)>;

/// A segment as readers see it.
#[derive(Clone, Debug)]
pub(super) struct Segment {
    pub(super) path: PathBuf,
    pub(super) base: u64,
    pub(super) bytes: u64,
    pub(super) summary: Summary,
}

/// Everything that changes, under one short lock.
#[derive(Debug)]
pub(super) struct View {
    pub(super) identity: Identity,
    /// The oldest first; the last is being written.
    pub(super) segments: VecDeque<Segment>,
    /// The segment that has the last commit: it and all later ones stay.
    pub(super) commit_base: u64,
    /// Of the last segment.
    pub(super) index: Index,
    pub(super) progress: Option<Position>,
    /// With the base of the segment that holds each.
    pub(super) gaps: Vec<(u64, Gap)>,
}

/// One journal.
#[derive(Debug)]
pub(super) struct Store {
    pub(super) options: Options,
    view: Mutex<View>,
    ring: Mutex<Ring>,
    recent: Mutex<Recent>,
    /// The offset after the last durable commit.
    pub(super) end: watch::Sender<u64>,
    /// Held as long as the journal is open for writing.
    _lock: Option<Box<dyn Any + Send + Sync>>,
}

impl Store {
    pub(super) fn new(
        options: Options,
        identity: Identity,
        recovered: &Recovered,
        lock: Option<Box<dyn Any + Send + Sync>>,
    ) -> Result<Self> {
        let ring_bytes_max = options.ring_bytes_max;
        let store = Self {
            view: Mutex::new(View {
                identity,
                segments: VecDeque::new(),
                commit_base: 0,
                index: Index::default(),
                progress: None,
                gaps: Vec::new(),
            }),
            ring: Mutex::new(Ring::new(ring_bytes_max)),
            recent: Mutex::default(),
            end: watch::Sender::new(recovered.end.next),
            options,
            _lock: lock,
        };
        store.adopt(recovered);
        store.find_gaps()?;
        Ok(store)
    }

    pub(super) fn view(&self) -> MutexGuard<'_, View> {
        lock(&self.view)
    }

    pub(super) fn ring(&self) -> MutexGuard<'_, Ring> {
        lock(&self.ring)
    }

    /// Takes over what recovery found.
    pub(super) fn adopt(&self, recovered: &Recovered) {
        let mut view = self.view();
        let found = &recovered.segments;
        view.segments.clear();
        for (segment, next) in found.iter().zip(found.iter().skip(1)) {
            let summary = next.header.previous.map_or(Summary::EMPTY, |before| before.summary);
            let (path, base, bytes) = (segment.path.clone(), segment.header.base, segment.bytes);
            view.segments.push_back(Segment { path, base, bytes, summary });
        }
        if let Some(last) = found.last() {
            let base = last.header.base;
            view.commit_base = base;
            view.segments.push_back(Segment {
                path: last.path.clone(),
                base,
                bytes: recovered.end.at,
                summary: recovered.end.summary,
            });
            view.gaps.retain(|(of, _)| *of < base);
            view.gaps.extend(recovered.scan.gaps.iter().map(|gap| (base, gap.clone())));
            lock(&self.recent).forget_from(base);
        }
        view.progress = recovered.scan.progress;
        view.index = recovered.scan.index.clone();
    }

    /// Collects the gaps of the sealed segments that have some.
    fn find_gaps(&self) -> Result<()> {
        let mut view = self.view();
        let count = view.segments.len().saturating_sub(1);
        let with: Vec<Segment> =
            view.segments.iter().take(count).filter(|s| s.summary.gaps).cloned().collect();
        let mut gaps = Vec::new();
        for segment in with {
            for gap in super::verify::gaps_of(&*self.options.disk, &segment)? {
                gaps.push((segment.base, gap));
            }
        }
        gaps.append(&mut view.gaps);
        view.gaps = gaps;
        Ok(())
    }

    /// The oldest offset that can be read.
    pub(super) fn start(&self) -> u64 {
        self.view().segments.front().map_or(0, |segment| segment.base)
    }

    pub(super) fn end(&self) -> u64 {
        *self.end.borrow()
    }

    /// The segment that holds `offset`.
    pub(super) fn segment_of(&self, offset: u64) -> Option<Segment> {
        let view = self.view();
        let after = view.segments.partition_point(|segment| segment.base <= offset);
        view.segments.get(after.checked_sub(1)?).cloned()
    }

    /// Durable bytes of the segment that begins at `base`; `None` where it was removed.
    pub(super) fn bytes_of(&self, base: u64) -> Option<u64> {
        let view = self.view();
        let at = view.segments.binary_search_by_key(&base, |segment| segment.base).ok()?;
        view.segments.get(at).map(|segment| segment.bytes)
    }

    /// Bytes on the disk from the byte at `at` of the segment at `base` to the end.
    pub(super) fn bytes_behind(&self, base: u64, at: u64) -> u64 {
        let view = self.view();
        let later = view.segments.iter().filter(|segment| segment.base >= base);
        later.map(|segment| segment.bytes).sum::<u64>().saturating_sub(at)
    }

    /// Whether there is a segment after the one at `base`.
    pub(super) fn follows(&self, base: u64) -> bool {
        self.view().segments.back().is_some_and(|last| last.base > base)
    }

    /// A block at or before the one with `offset` (where it lies, and its first offset), and the
    /// tables of the segment.
    pub(super) fn seek(&self, segment: &Segment, offset: u64) -> Result<(Place, Tables)> {
        let near = |index: &Index| (index.seek(offset), index.tables.clone());
        {
            let view = self.view();
            if view.segments.back().is_some_and(|last| last.base == segment.base) {
                return Ok(near(&view.index));
            }
        }
        Ok(near(&*self.index_of(segment)?))
    }

    /// The index of a sealed segment.
    fn index_of(&self, segment: &Segment) -> Result<Arc<Index>> {
        if let Some(index) = lock(&self.recent).get(segment.base) {
            return Ok(index);
        }
        let file = self
            .options
            .disk
            .open(&segment.path, false)
            .class(Class::Damaged, || format!("cannot open {}", segment.path.display()))?;
        let index = Index::build(&*file, segment.base, segment.bytes)
            .map_err(|(at, fault)| fault.at(&segment.path, at))?;
        let index = Arc::new(index);
        lock(&self.recent).put(segment.base, Arc::clone(&index));
        Ok(index)
    }

    pub(super) fn offset_at(&self, time: Timestamp) -> Result<u64> {
        let (sealed, active, end) = {
            let view = self.view();
            let since = |segment: &&Segment| segment.summary.times.commit_max >= time;
            let count = view.segments.len().saturating_sub(1);
            let sealed = view.segments.iter().take(count).find(since).cloned();
            (sealed, view.index.first_since(time), self.end())
        };
        let offset = match sealed {
            Some(segment) => {
                let index = self.index_of(&segment)?;
                index.first_since(time).unwrap_or(segment.base)
            }
            None => active.unwrap_or(end),
        };
        Ok(offset.min(end))
    }

    pub(super) fn gone(&self, offset: u64) -> Error {
        let start = self.start();
        let directory = self.options.directory.display();
        Error::config(format!(
            "offset {offset} of the journal in {directory} was removed; the oldest left is {start}"
        ))
        .remedy(format!("rewind to {start}, and backfill what lies before it"))
    }

    pub(super) fn info(&self) -> Info {
        let end = self.end();
        let view = self.view();
        Info {
            lineage: view.identity.lineage,
            incarnation: view.identity.incarnation,
            start: view.segments.front().map_or(end, |segment| segment.base),
            end,
            progress: view.progress,
            origin: view.identity.origin.clone(),
            segments: view.segments.len(),
            bytes: view.segments.iter().map(|segment| segment.bytes).sum(),
            gaps: view.gaps.iter().map(|(_, gap)| gap.clone()).collect(),
        }
    }

    pub(super) fn verify(&self) -> Result<Report> {
        let identity = self.view().identity.clone();
        let (disk, directory) = (&*self.options.disk, &*self.options.directory);
        super::verify::steady(disk, directory, || super::verify::verify(disk, directory, &identity))
    }

    /// Keeps the index of a segment that was just sealed.
    pub(super) fn sealed(&self, base: u64, index: Index) {
        lock(&self.recent).put(base, Arc::new(index));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while it holds one of these; and if so, what it guards is still whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
