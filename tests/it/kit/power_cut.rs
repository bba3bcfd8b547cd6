//! A disk in memory that forgets what was not synced.
//!
//! What programs see is the page cache; what a power cut leaves is what was synced, and any part of
//! the rest, in any order. A failed sync drops what was written, as Linux does: it can still be read
//! and is not on the disk.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test may panic"
)]

use std::{
    backtrace::Backtrace,
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
};

use walrace::disk::{Disk, DiskFile};

/// What may go wrong, by the number of the call, from 1.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Faults {
    /// After so many calls that change something, every further one fails: the process is dead.
    pub(crate) stop_after: Option<u64>,
    /// This sync does nothing and says that all is well.
    pub(crate) ignore_sync: Option<u64>,
    /// This sync fails.
    pub(crate) fail_sync: Option<u64>,
    /// Bytes that all files together may have.
    pub(crate) capacity: Option<u64>,
    /// What `free_bytes` answers.
    pub(crate) free: Option<u64>,
}

/// The disk. Clones are the same disk.
#[derive(Clone, Debug, Default)]
pub(crate) struct PowerCut(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    faults: Faults,
    calls: u64,
    syncs: u64,
    /// Where each sync was called from; gathered only when asked for.
    sites: Option<Vec<String>>,
    files: Vec<Content>,
    names: BTreeMap<PathBuf, usize>,
    durable_names: BTreeMap<PathBuf, usize>,
    unsynced_names: Vec<NameChange>,
}

/// One file: what is read, what is durable, and what lies between.
#[derive(Clone, Debug, Default)]
struct Content {
    cached: Vec<u8>,
    durable: Vec<u8>,
    unsynced: Vec<Change>,
}

#[derive(Clone, Debug)]
enum Change {
    Write(u64, Vec<u8>),
    Length(u64),
}

#[derive(Clone, Debug)]
enum NameChange {
    Link(PathBuf, usize),
    Unlink(PathBuf),
    Rename(PathBuf, PathBuf, usize),
}

const SECTOR: usize = 64; // small, so that the small files of tests tear too

impl PowerCut {
    /// Sets what goes wrong from now on, and counts from 1 again.
    pub(crate) fn set(&self, faults: Faults) {
        let mut state = self.state();
        (state.faults, state.calls, state.syncs) = (faults, 0, 0);
    }

    /// Lets all files together have so many bytes more.
    pub(crate) fn fill(&self, room: Option<u64>) {
        let mut state = self.state();
        let used: usize = state.names.values().map(|file| state.files[*file].cached.len()).sum();
        state.faults.capacity = room.map(|room| used as u64 + room);
    }

    /// Syncs since `set`.
    pub(crate) fn syncs(&self) -> u64 {
        self.state().syncs
    }

    /// Notes from now on where each sync is called from.
    pub(crate) fn trace(&self) {
        self.state().sites = Some(Vec::new());
    }

    /// Where each sync since `trace` was called from, as `file.rs:line`.
    pub(crate) fn sites(&self) -> Vec<String> {
        self.state().sites.take().unwrap_or_default()
    }

    /// Calls that changed something since `set`.
    pub(crate) fn calls(&self) -> u64 {
        self.state().calls
    }

    /// Cuts the power. Without a seed everything that was not synced is gone; with one, any part of
    /// it may have reached the disk.
    pub(crate) fn cut(&self, seed: Option<u64>) {
        let mut state = self.state();
        let mut dice = fastrand::Rng::with_seed(seed.unwrap_or(0));
        let mut keep = || seed.is_some() && dice.bool();
        for file in &mut state.files {
            let mut durable = std::mem::take(&mut file.durable);
            for change in std::mem::take(&mut file.unsynced) {
                apply_torn(&mut durable, change, &mut keep);
            }
            file.durable.clone_from(&durable);
            file.cached = durable;
        }
        let mut names = std::mem::take(&mut state.durable_names);
        for change in std::mem::take(&mut state.unsynced_names) {
            if keep() {
                apply_name(&mut names, change);
            }
        }
        state.durable_names.clone_from(&names);
        state.names = names;
        state.faults = Faults::default();
    }

    /// Every file, as it is read now.
    pub(crate) fn files(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let state = self.state();
        state
            .names
            .iter()
            .map(|(path, file)| (path.clone(), state.files[*file].cached.clone()))
            .collect()
    }

    /// A disk that holds these files durably.
    pub(crate) fn with(files: &[(PathBuf, Vec<u8>)]) -> Self {
        let disk = Self::default();
        {
            let mut state = disk.state();
            for (number, (path, bytes)) in files.iter().enumerate() {
                let (cached, durable) = (bytes.clone(), bytes.clone());
                state.files.push(Content { cached, durable, unsynced: Vec::new() });
                state.names.insert(path.clone(), number);
            }
            state.durable_names = state.names.clone();
        }
        disk
    }

    /// As the trait object that the journal takes.
    pub(crate) fn shared(&self) -> Arc<dyn Disk> {
        Arc::new(self.clone())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }
}

impl State {
    /// Counts a call that changes something; fails once the process is dead.
    fn step(&mut self) -> io::Result<()> {
        if self.faults.stop_after.is_some_and(|after| self.calls >= after) {
            return Err(io::Error::other("the process is dead"));
        }
        self.calls += 1;
        Ok(())
    }

    /// Counts a sync; `Ok(false)` where it is to be ignored.
    fn sync(&mut self) -> io::Result<bool> {
        self.step()?;
        self.syncs += 1;
        if let Some(sites) = &mut self.sites {
            sites.push(call_site());
        }
        Ok(self.faults.ignore_sync != Some(self.syncs))
    }

    fn find(&self, path: &Path) -> io::Result<usize> {
        self.names.get(path).copied().ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

/// The innermost line of the journal on the stack.
fn call_site() -> String {
    let trace = Backtrace::force_capture().to_string();
    let line = trace.lines().find_map(|line| line.trim().split_once("src/journal/"));
    let place = line.map(|(_, place)| place.rsplit_once(':').unwrap().0);
    place.expect("a sync that the journal did not call").to_owned()
}

fn apply(bytes: &mut Vec<u8>, change: Change) {
    match change {
        Change::Length(length) => bytes.resize(length as usize, 0),
        Change::Write(at, new) => {
            let end = at as usize + new.len();
            bytes.resize(bytes.len().max(end), 0);
            bytes[at as usize..end].copy_from_slice(&new);
        }
    }
}

/// A length is kept or not; of a write, each sector is.
fn apply_torn(bytes: &mut Vec<u8>, change: Change, keep: &mut impl FnMut() -> bool) {
    match change {
        Change::Length(_) if keep() => apply(bytes, change),
        Change::Length(_) => {}
        Change::Write(at, new) => {
            let whole = keep();
            for (number, sector) in new.chunks(SECTOR).enumerate() {
                if whole || keep() {
                    apply(bytes, Change::Write(at + (number * SECTOR) as u64, sector.to_vec()));
                }
            }
        }
    }
}

fn apply_name(names: &mut BTreeMap<PathBuf, usize>, change: NameChange) {
    match change {
        NameChange::Link(path, file) => {
            names.insert(path, file);
        }
        NameChange::Unlink(path) => {
            names.remove(&path);
        }
        NameChange::Rename(from, to, file) => {
            names.remove(&from);
            names.insert(to, file);
        }
    }
}

impl Disk for PowerCut {
    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let mut state = self.state();
        state.step()?;
        if state.names.contains_key(path) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let file = state.files.len();
        state.files.push(Content::default());
        state.names.insert(path.to_owned(), file);
        state.unsynced_names.push(NameChange::Link(path.to_owned(), file));
        Ok(Box::new(File { disk: self.clone(), file }))
    }

    fn open(&self, path: &Path, _write: bool) -> io::Result<Box<dyn DiskFile>> {
        let file = self.state().find(path)?;
        Ok(Box::new(File { disk: self.clone(), file }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.step()?;
        let file = state.find(from)?;
        state.names.remove(from);
        state.names.insert(to.to_owned(), file);
        state.unsynced_names.push(NameChange::Rename(from.to_owned(), to.to_owned(), file));
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.find(path)?;
        state.step()?;
        state.names.remove(path);
        state.unsynced_names.push(NameChange::Unlink(path.to_owned()));
        Ok(())
    }

    fn create_dir_all(&self, _path: &Path) -> io::Result<()> {
        Ok(())
    }

    fn sync_dir(&self, _directory: &Path) -> io::Result<()> {
        let mut state = self.state();
        if !state.sync()? {
            return Ok(());
        }
        if state.faults.fail_sync == Some(state.syncs) {
            return Err(io::Error::other("the disk failed"));
        }
        state.unsynced_names.clear();
        state.durable_names = state.names.clone();
        Ok(())
    }

    fn list(&self, directory: &Path) -> io::Result<Vec<PathBuf>> {
        let state = self.state();
        Ok(state.names.keys().filter(|path| path.parent() == Some(directory)).cloned().collect())
    }

    fn free_bytes(&self, _path: &Path) -> io::Result<u64> {
        Ok(self.state().faults.free.unwrap_or(u64::MAX))
    }
}

/// An open file of a [`PowerCut`].
#[derive(Debug)]
struct File {
    disk: PowerCut,
    file: usize,
}

impl File {
    fn change(&self, change: Change) -> io::Result<()> {
        let mut state = self.disk.state();
        state.step()?;
        let content = &mut state.files[self.file];
        apply(&mut content.cached, change.clone());
        content.unsynced.push(change);
        Ok(())
    }
}

impl DiskFile for File {
    fn write_all_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        let room = {
            let state = self.disk.state();
            let used: usize =
                state.names.values().map(|file| state.files[*file].cached.len()).sum();
            state.faults.capacity.map(|capacity| capacity.saturating_sub(used as u64) as usize)
        };
        match room {
            Some(room) if room < bytes.len() => {
                self.change(Change::Write(at, bytes[..room].to_vec()))?;
                Err(io::ErrorKind::StorageFull.into())
            }
            _ => self.change(Change::Write(at, bytes.to_vec())),
        }
    }

    fn read_at(&self, bytes: &mut [u8], at: u64) -> io::Result<usize> {
        let state = self.disk.state();
        let rest = state.files[self.file].cached.get(at as usize..).unwrap_or_default();
        let read = rest.len().min(bytes.len());
        bytes[..read].copy_from_slice(&rest[..read]);
        Ok(read)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.disk.state().files[self.file].cached.len() as u64)
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.change(Change::Length(length))
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.disk.state();
        if !state.sync()? {
            return Ok(());
        }
        let failed = state.faults.fail_sync == Some(state.syncs);
        let content = &mut state.files[self.file];
        let unsynced = std::mem::take(&mut content.unsynced);
        if failed {
            return Err(io::Error::other("the disk failed"));
        }
        for change in unsynced {
            apply(&mut content.durable, change);
        }
        Ok(())
    }
}
