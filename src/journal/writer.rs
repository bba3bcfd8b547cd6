//! The thread that writes: one command after the other, each durable before it is answered.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::{mpsc, oneshot};

use super::{
    Gap, Origin, Retention,
    active::{Active, BlockEnd, Point, write_error},
    recovery::{self, Recovered},
    retention,
    segment::{self, Summary},
    store::{Segment, Store},
};
use crate::{
    change::{Batch, Position, Timestamp},
    disk::Disk,
    error::{Error, Result},
    failpoint,
};

/// Free space is looked at again after so much time or so many bytes.
const SPACE_INTERVAL: Duration = Duration::from_secs(1);
const SPACE_BYTES: u64 = 64 << 20;

/// Where the answer to a command goes.
pub(super) type Reply<T> = oneshot::Sender<Result<T>>;

/// What the thread is asked to do.
#[derive(Debug)]
pub(super) enum Command {
    Append(Batch, Reply<()>),
    Abandon(Reply<()>),
    CheckRoom(Reply<()>),
    Gap(Gap, Reply<()>),
    Origin(Origin, Reply<()>),
    /// Removes one segment; answers with its bytes, or 0 where none may go.
    Trim(Retention, Reply<u64>),
}

/// The only one that changes files.
#[derive(Debug)]
pub(super) struct Writer {
    store: Arc<Store>,
    active: Active,
    /// A transaction is open at the end.
    open: bool,
    /// Positions may not go back below this.
    floor: Option<Position>,
    /// Why nothing may be written any more.
    poison: Option<String>,
    space_seen: Option<Instant>,
    space_bytes: u64,
}

impl Writer {
    pub(super) fn new(store: Arc<Store>, recovered: &Recovered) -> Result<Self> {
        let active = reopen(&*store.options.disk, recovered)?;
        Ok(Self {
            active,
            open: false,
            floor: recovered.scan.progress,
            poison: None,
            space_seen: None,
            space_bytes: 0,
            store,
        })
    }

    /// Runs until every sender is gone. An answer that nobody waits for is not an error.
    pub(super) fn run(mut self, commands: &mut mpsc::Receiver<Command>) {
        while let Some(command) = commands.blocking_recv() {
            match command {
                Command::Append(batch, reply) => drop(reply.send(self.append(batch))),
                Command::Abandon(reply) => drop(reply.send(self.abandon())),
                Command::CheckRoom(reply) => drop(reply.send(self.check_space())),
                Command::Gap(gap, reply) => drop(reply.send(self.record_gap(&gap))),
                Command::Origin(origin, reply) => drop(reply.send(self.set_origin(origin))),
                Command::Trim(retention, reply) => drop(reply.send(self.trim(retention))),
            }
        }
        self.close();
    }

    fn append(&mut self, mut batch: Batch) -> Result<()> {
        if batch.changes.is_empty() && batch.position.is_none() {
            return Ok(());
        }
        self.check(batch.position)?;
        self.make_room()?;
        let before = self.active.point();
        failpoint::reach("journal::before_write");
        if let Err(error) = self.write(&mut batch) {
            return Err(self.cut_back(before, error));
        }
        failpoint::reach("journal::after_write");
        self.sync()?;
        failpoint::reach("journal::after_sync");
        if batch.position.is_none() {
            failpoint::reach("journal::after_part");
        }
        self.space_bytes += self.active.point().at - before.at;
        self.publish(batch);
        Ok(())
    }

    fn write(&mut self, batch: &mut Batch) -> Result<()> {
        self.active.begin(Timestamp::now());
        for change in &mut batch.changes {
            self.active.push(change)?;
        }
        let commit = batch.position.is_some();
        self.active.finish_block(BlockEnd { commit, position: batch.position })?;
        self.active.flush().map_err(|error| write_error(&self.active.path, error))
    }

    /// Shows readers what is durable.
    fn publish(&mut self, batch: Batch) {
        self.open = batch.position.is_none();
        self.floor = batch.position.or(self.floor);
        if !self.open {
            self.store.view().commit_base = self.active.header.base;
        }
        self.show(batch.position);
        let end = (!self.open).then(|| self.active.point().next);
        self.store.ring().push(batch);
        if let Some(end) = end {
            self.store.end.send_if_modified(|seen| std::mem::replace(seen, end) != end);
        }
    }

    /// Brings the shared view up to what is durable.
    fn show(&mut self, position: Option<Position>) {
        let point = self.active.point();
        let mut view = self.store.view();
        for entry in self.active.take_entries() {
            view.index.add(entry);
        }
        let tables = self.active.tables().get(view.index.tables.len()..).unwrap_or_default();
        view.index.tables.extend(tables.iter().map(Arc::clone));
        view.progress = position.or(view.progress);
        if let Some(segment) = view.segments.back_mut() {
            segment.bytes = point.at;
            segment.summary = point.summary;
        }
    }

    fn check(&self, position: Option<Position>) -> Result<()> {
        self.usable()?;
        match (self.floor, position) {
            (Some(floor), Some(to)) if to.timeline == floor.timeline && to < floor => {
                Err(Error::bug(format!("the source went back from {floor} to {to}")))
            }
            _ => Ok(()),
        }
    }

    fn usable(&self) -> Result<()> {
        match &self.poison {
            None => Ok(()),
            Some(why) => Err(Error::damaged(why.clone())
                .remedy("restart walrace; the source still has what was not confirmed")),
        }
    }

    fn sync(&mut self) -> Result<()> {
        if let Err(error) = self.active.file.sync() {
            return Err(self.fail(&format!("cannot sync {}", self.active.path.display()), &error));
        }
        self.active.durable_at = self.active.point().at;
        Ok(())
    }

    /// Refuses everything from now on: what is on the disk is no longer known.
    fn fail(&mut self, what: &str, error: &io::Error) -> Error {
        self.poison = Some(format!("{what}: {error}"));
        match self.usable() {
            Err(poisoned) => poisoned,
            Ok(()) => Error::bug("a poisoned journal is usable"),
        }
    }

    /// Undoes a write that failed, so that the journal is as it was.
    fn cut_back(&mut self, to: Point, error: Error) -> Error {
        match self.active.cut_back(to) {
            Ok(()) => error,
            Err(cut) => {
                self.fail(&format!("cannot undo a failed write ({})", error.summary()), &cut)
            }
        }
    }

    fn abandon(&mut self) -> Result<()> {
        self.usable()?;
        if !self.open {
            return Ok(());
        }
        let options = &self.store.options;
        let identity = self.store.view().identity.clone();
        let abandoned = recovery::abandon(&*options.disk, &options.directory, &identity)
            .and_then(|recovered| Ok((reopen(&*options.disk, &recovered)?, recovered)));
        let (active, recovered) = match abandoned {
            Ok(abandoned) => abandoned,
            Err(error) => {
                return Err(
                    self.fail("cannot remove an open transaction", &io::Error::other(error))
                );
            }
        };
        self.active = active;
        self.open = false;
        self.store.ring().abandon();
        self.store.adopt(&recovered);
        Ok(())
    }

    fn record_gap(&mut self, gap: &Gap) -> Result<()> {
        self.usable()?;
        if self.open {
            return Err(Error::bug("a gap inside an open transaction"));
        }
        self.make_room()?;
        let before = self.active.point();
        let end = BlockEnd { commit: true, position: self.store.view().progress };
        self.active.begin(Timestamp::now());
        let written =
            self.active.push_gap(gap).and_then(|()| self.active.finish_block(end)).and_then(|()| {
                self.active.flush().map_err(|error| write_error(&self.active.path, error))
            });
        if let Err(error) = written {
            return Err(self.cut_back(before, error));
        }
        self.sync()?;
        self.floor = None;
        self.show(None);
        self.store.view().gaps.push((self.active.header.base, gap.clone()));
        Ok(())
    }

    fn set_origin(&mut self, origin: Origin) -> Result<()> {
        self.usable()?;
        let mut identity = self.store.view().identity.clone();
        if identity.origin.as_ref() == Some(&origin) {
            return Ok(());
        }
        identity.origin = Some(origin);
        identity.store(&*self.store.options.disk, &self.store.options.directory)?;
        self.store.view().identity = identity;
        Ok(())
    }

    fn trim(&mut self, retention: Retention) -> Result<u64> {
        self.usable()?;
        let chosen = {
            let view = self.store.view();
            retention::oldest_to_remove(&view.segments, &retention, view.commit_base)
        };
        let Some(segment) = chosen else { return Ok(0) };
        let options = &self.store.options;
        // One that is gone already was removed by a call whose sync of the directory failed.
        let gone = match options.disk.remove(&segment.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            gone => gone,
        };
        failpoint::reach("journal::trim_removed");
        if let Err(error) = gone.and_then(|()| options.disk.sync_dir(&options.directory)) {
            return Err(write_error(&segment.path, error));
        }
        let mut view = self.store.view();
        view.segments.pop_front();
        view.gaps.retain(|(base, _)| *base != segment.base);
        Ok(segment.bytes)
    }

    /// Checks the free space, and begins a new segment where the last is full.
    fn make_room(&mut self) -> Result<()> {
        self.check_space()?;
        if self.active.point().at < self.store.options.segment_bytes_max {
            return Ok(());
        }
        let point = self.active.point();
        if point.next > self.active.header.base {
            return self.roll(point);
        }
        // A segment is named by its first offset, so one without changes cannot be followed.
        if point.summary.gaps || point.at <= segment::HEADER_BYTES {
            return Ok(());
        }
        let mut header = self.active.header;
        (header.progress, header.created) = (self.store.view().progress, Timestamp::now());
        (header.begins_open, header.tag) = (self.open, fastrand::u64(..));
        let replaced = recovery::replace(&*self.store.options.disk, &self.active.path, header);
        match replaced {
            Ok(active) => {
                self.active = active;
                self.store.view().index = super::index::Index::default();
                self.show(None);
                Ok(())
            }
            Err(error) if is_full(&error) => Err(write_error(&self.active.path, error)),
            Err(error) => {
                let what = format!("cannot replace {}", self.active.path.display());
                Err(self.fail(&what, &error))
            }
        }
    }

    fn roll(&mut self, point: Point) -> Result<()> {
        let store = Arc::clone(&self.store);
        let (disk, directory) = (&store.options.disk, &store.options.directory);
        let header = segment::Header {
            base: point.next,
            previous: Some(recovery::previous_of(&self.active.header, &point)),
            begins_open: self.open,
            recovered: false,
            progress: store.view().progress,
            created: Timestamp::now(),
            tag: fastrand::u64(..),
            ..self.active.header
        };
        let path = segment::path(directory, point.next);
        let mut created = Active::create(&**disk, &path, header);
        failpoint::reach("journal::segment_created");
        if created.as_ref().is_err_and(is_full) {
            // Where this fails too, the next attempt finds the file and says so.
            let _ = disk.remove(&path);
            return created.map(drop).map_err(|error| write_error(&path, error));
        }
        if let Ok(active) = &created
            && let Err(error) = active.file.sync().and_then(|()| disk.sync_dir(directory))
        {
            created = Err(error);
        }
        match created {
            Ok(active) => self.active = active,
            Err(error) => {
                return Err(self.fail(&format!("cannot begin {}", path.display()), &error));
            }
        }
        let mut view = store.view();
        if !self.open {
            view.commit_base = header.base;
        }
        let (base, summary) = (header.base, Summary::EMPTY);
        let sealed = std::mem::take(&mut view.index);
        let last = view.segments.back().map(|segment| segment.base);
        view.segments.push_back(Segment { path, base, bytes: segment::HEADER_BYTES, summary });
        drop(view);
        if let Some(last) = last {
            store.sealed(last, sealed);
        }
        failpoint::reach("journal::segment_sealed");
        Ok(())
    }

    /// Refuses to write where the volume has less left than the reserve.
    fn check_space(&mut self) -> Result<()> {
        let options = &self.store.options;
        // A small reserve is watched more closely, or it would be gone between two looks.
        let bytes_max = SPACE_BYTES.min(options.reserve_bytes / 8);
        let recent = self.space_seen.is_some_and(|seen| seen.elapsed() < SPACE_INTERVAL);
        if recent && self.space_bytes <= bytes_max {
            return Ok(());
        }
        let free = options
            .disk
            .free_bytes(&options.directory)
            .map_err(|error| write_error(&options.directory, error))?;
        if free < options.reserve_bytes {
            let directory = options.directory.display();
            let reserve = options.reserve_bytes;
            self.space_seen = None;
            // Not the bytes that are left: the reason would be another one at each look.
            return Err(Error::retry(format!(
                "capture is paused: the disk of {directory} has less left than the {reserve} bytes \
                 kept in reserve"
            ))
            .remedy(
                "free space on that volume, or lower journal.bytes_max; capture goes on by itself",
            ));
        }
        (self.space_seen, self.space_bytes) = (Some(Instant::now()), 0);
        Ok(())
    }

    /// Says on the disk that all is durable, so that the next start has nothing to write anew. It
    /// costs nothing to lose that word.
    fn close(&mut self) {
        let point = self.active.point();
        if self.poison.is_some() || self.open || point.at == segment::HEADER_BYTES {
            return;
        }
        let position = self.store.view().progress;
        let _ = self.active.prove(BlockEnd { commit: true, position }, Timestamp::now());
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

fn reopen(disk: &dyn Disk, recovered: &Recovered) -> Result<Active> {
    let last = recovered.last()?;
    let file = disk.open(&last.path, true).map_err(|error| write_error(&last.path, error))?;
    let ended = (recovered.end, recovered.scan.index.tables.clone());
    Ok(Active::resume(file, &last.path, last.header, ended))
}
