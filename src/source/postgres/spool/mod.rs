//! The spool: what has come of transactions that are still open, by xid, in memory while it is
//! little and on disk beyond that.
//!
//! ```text
//!  block of xid 7 ──► tail of 7 ──(256 KiB, or all tails together 8 MiB)──► 7-….spool ─┐
//!  commit of xid 7 ──► Replay: its blocks, then its tail, without what was rolled back ◄┘
//! ```
//!
//! Nothing in it has to survive: the server keeps the log of an open transaction, and sends all of
//! it again on the next connection. So files are not synced, go when their owner does, and what a
//! crash left behind is removed before the next use.

mod block;
mod xids;

use std::{
    collections::HashMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use bytes::Bytes;
use lz4_flex::block::CompressTable;

pub(super) use self::block::Record;
use self::xids::Xids;
use super::{pgoutput::Part, stats::Stats};
use crate::{
    disk::Disk,
    error::{Error, Result},
    failpoint,
    source::SpoolOptions,
};

/// The tail of a transaction goes to disk at this size. A message that is larger is a block of its
/// own, which is not copied and not compressed.
const BLOCK_BYTES: usize = 256 << 10;
/// The tails of all transactions together; beyond it the longest goes to disk.
const MEMORY_BYTES_MAX: usize = 8 << 20;
/// Free space is looked at again after so much time or so many bytes.
const SPACE_INTERVAL: Duration = Duration::from_secs(1);
const SPACE_BYTES: u64 = 64 << 20;

/// The open transactions of one connection.
pub(super) struct Spool {
    options: SpoolOptions,
    stats: Arc<Stats>,
    /// In the names of the files: a reader that was given up may still write its own.
    run: u64,
    open: HashMap<u32, Spooled>,
    memory_bytes: usize,
    table: CompressTable,
    /// Kept between blocks for their memory.
    packed: Vec<u8>,
    spare: Vec<u8>,
    space_seen: Option<Instant>,
    space_bytes: u64,
}

/// What is kept of one transaction.
#[derive(Debug, Default)]
struct Spooled {
    file: Option<File>,
    /// Records behind those of the file.
    tail: Vec<u8>,
    /// Subtransactions that were rolled back.
    aborted: Xids,
}

/// A file of blocks, which goes when this does.
struct File {
    disk: Arc<dyn Disk>,
    stats: Arc<Stats>,
    path: PathBuf,
    bytes: u64,
}

impl Spool {
    /// An empty spool; what an earlier one left behind is removed.
    pub(super) fn new(options: SpoolOptions, stats: Arc<Stats>) -> Result<Self> {
        for path in options.disk.list(&options.directory).unwrap_or_default() {
            let gone = options.disk.remove(&path);
            gone.map_err(|error| failed("remove", &path, error))?;
        }
        Ok(Self {
            options,
            stats,
            run: fastrand::u64(..),
            open: HashMap::new(),
            memory_bytes: 0,
            table: CompressTable::default(),
            packed: Vec::new(),
            spare: Vec::new(),
            space_seen: None,
            space_bytes: 0,
        })
    }

    /// Whether anything is kept of the transaction `xid`.
    pub(super) fn holds(&self, xid: u32) -> bool {
        self.open.contains_key(&xid)
    }

    /// Begins to keep the transaction `xid`.
    pub(super) fn begin(&mut self, xid: u32) {
        self.open.entry(xid).or_default();
    }

    /// Keeps a message of the transaction `top`.
    pub(super) fn push(&mut self, top: u32, part: &Part, arrival: u64) -> Result<()> {
        if part.body.len() >= BLOCK_BYTES {
            self.write_tail(top)?;
            return self.write_large(top, part, arrival);
        }
        let spare = &mut self.spare;
        let spooled = self.open.entry(top).or_default();
        if spooled.tail.capacity() == 0 {
            spooled.tail = std::mem::take(spare);
        }
        let before = spooled.tail.len();
        block::push_head(&mut spooled.tail, arrival, part);
        spooled.tail.extend_from_slice(&part.body);
        self.memory_bytes += spooled.tail.len() - before;
        if spooled.tail.len() >= BLOCK_BYTES {
            return self.write_tail(top);
        }
        while self.memory_bytes > MEMORY_BYTES_MAX {
            let longest = self.open.iter().max_by_key(|(_, spooled)| spooled.tail.len());
            let Some((&xid, _)) = longest else { break };
            self.write_tail(xid)?;
        }
        Ok(())
    }

    /// Forgets the subtransaction `subxid` of `top`, or all of `top`.
    pub(super) fn abort(&mut self, top: u32, subxid: u32) {
        if top == subxid {
            self.remove(top);
        } else if let Some(spooled) = self.open.get_mut(&top) {
            spooled.aborted.insert(subxid);
        }
    }

    /// Gives up a transaction that has committed, to be read back.
    pub(super) fn take(&mut self, xid: u32) -> Result<Replay> {
        let Spooled { file, tail, aborted } = self.remove(xid).unwrap_or_default();
        let opened = file.as_ref().map(|file| {
            let opened = file.disk.open(&file.path, false);
            opened.map_err(|error| failed("read back", &file.path, error))
        });
        Ok(Replay { opened: opened.transpose()?, file, at: 0, tail: Some(tail.into()), aborted })
    }

    fn remove(&mut self, xid: u32) -> Option<Spooled> {
        let spooled = self.open.remove(&xid)?;
        self.memory_bytes -= spooled.tail.len();
        Some(spooled)
    }

    fn write_tail(&mut self, xid: u32) -> Result<()> {
        let Some(spooled) = self.open.get_mut(&xid) else { return Ok(()) };
        // Where the write fails the source ends, and the spool with it.
        let mut tail = std::mem::take(&mut spooled.tail);
        self.memory_bytes -= tail.len();
        if tail.is_empty() {
            return Ok(());
        }
        let mut packed = std::mem::take(&mut self.packed);
        block::pack(&tail, &mut self.table, &mut packed);
        let written = self.write(xid, &[&packed]);
        self.packed = packed;
        tail.clear();
        self.spare = tail;
        written
    }

    fn write_large(&mut self, xid: u32, part: &Part, arrival: u64) -> Result<()> {
        let mut head = Vec::new();
        block::push_head(&mut head, arrival, part);
        let block = block::head(head.len() + part.body.len(), &[&head, &part.body]);
        self.write(xid, &[&block, &head, &part.body])
    }

    fn write(&mut self, xid: u32, parts: &[&[u8]]) -> Result<()> {
        self.check_space()?;
        failpoint::reach("source::spool_write");
        let path = self.options.directory.join(format!("{xid}-{:016x}.spool", self.run));
        let spooled = self.open.entry(xid).or_default();
        let disk = &self.options.disk;
        // Opened for each block: open transactions by the thousand must not use up the handles.
        let (opened, file) = match &mut spooled.file {
            Some(file) => (disk.open(&path, true), file),
            None => {
                let created = disk.create(&path).map_err(|error| failed("write", &path, error))?;
                let (disk, stats) = (Arc::clone(disk), Arc::clone(&self.stats));
                let file = File { disk, stats, path: path.clone(), bytes: 0 };
                (Ok(created), spooled.file.insert(file))
            }
        };
        let opened = opened.map_err(|error| failed("write", &path, error))?;
        for part in parts {
            let written = opened.write_all_at(part, file.bytes);
            written.map_err(|error| failed("write", &path, error))?;
            file.bytes += part.len() as u64;
            self.space_bytes += part.len() as u64;
            self.stats.spool_bytes.fetch_add(part.len() as u64, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Refuses to write where the volume has less left than the journal's reserve.
    fn check_space(&mut self) -> Result<()> {
        let SpoolOptions { directory, disk, reserve_bytes } = &self.options;
        let bytes_max = SPACE_BYTES.min(reserve_bytes / 8);
        let recent = self.space_seen.is_some_and(|seen| seen.elapsed() < SPACE_INTERVAL);
        if recent && self.space_bytes <= bytes_max {
            return Ok(());
        }
        if self.space_seen.is_none() {
            let made = disk.create_dir_all(directory);
            made.map_err(|error| failed("write", &directory.join("."), error))?;
        }
        let free = disk.free_bytes(directory);
        if free.map_err(|error| failed("write", &directory.join("."), error))? < *reserve_bytes {
            return Err(Error::retry(format!(
                "capture is paused: an open transaction does not fit on the disk of {}, which has \
                 less left than the {reserve_bytes} bytes kept in reserve",
                directory.display()
            ))
            .remedy(REMEDY));
        }
        (self.space_seen, self.space_bytes) = (Some(Instant::now()), 0);
        Ok(())
    }
}

impl std::fmt::Debug for File {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({} bytes)", self.path.display(), self.bytes)
    }
}

impl Drop for File {
    fn drop(&mut self) {
        // What cannot be removed now is removed when the source is opened the next time.
        let _ = self.disk.remove(&self.path);
        self.stats.spool_bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// A transaction that is read back; its file goes when this does.
pub(super) struct Replay {
    opened: Option<Box<dyn crate::disk::DiskFile>>,
    file: Option<File>,
    at: u64,
    tail: Option<Bytes>,
    aborted: Xids,
}

impl Replay {
    /// The messages of the next block but for those that were rolled back; `None` after the last.
    pub(super) fn next_block(&mut self) -> Result<Option<Vec<Record>>> {
        let Some(raw) = self.next_raw()? else { return Ok(None) };
        self.records(raw).map(Some).map_err(|error| self.unreadable(error))
    }

    fn next_raw(&mut self) -> Result<Option<Bytes>> {
        match (&self.opened, &self.file) {
            (Some(opened), Some(file)) if self.at < file.bytes => {
                let (raw, next) = block::read(&**opened, self.at, file.bytes)
                    .map_err(|error| self.unreadable(error))?;
                self.at = next;
                Ok(Some(raw))
            }
            _ => Ok(self.tail.take()),
        }
    }

    fn records(&self, mut raw: Bytes) -> io::Result<Vec<Record>> {
        let mut records = Vec::new();
        while let Some(record) = block::next_record(&mut raw)? {
            if !self.aborted.contains(record.xid) {
                records.push(record);
            }
        }
        Ok(records)
    }

    fn unreadable(&self, error: io::Error) -> Error {
        let path = self.file.as_ref().map_or(Path::new("memory"), |file| &file.path);
        failed("read back", path, error)
    }
}

const REMEDY: &str = "free space on that volume, or set `streaming = false` in the source: then \
                      the server keeps open transactions; capture goes on by itself";

fn failed(verb: &str, path: &Path, error: io::Error) -> Error {
    let directory = path.parent().unwrap_or(path).display();
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            Error::retry(format!("capture is paused: the disk of {directory} is full"))
                .caused_by(error)
                .remedy(REMEDY)
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            Error::config(format!("cannot {verb} {}", path.display()))
                .caused_by(error)
                .remedy("give walrace the right to read and write there")
        }
        _ => Error::retry(format!("cannot {verb} {}", path.display()))
            .caused_by(error)
            .remedy("check the disk; the server sends the transaction again"),
    }
}

#[cfg(test)]
pub(super) mod tests;
