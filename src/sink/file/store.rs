//! The data file and its sidecar on disk. All calls block.
//!
//! ```text
//! write:   data -> sync -> state -> sync
//! rotate:  state with the intent -> rename -> sync of the directory
//!          -> new data file -> sync of the directory -> state of the new file
//! open:    cut what lies beyond the state; finish a rotation that has an intent
//! ```

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::sidecar::{self, State};
use crate::{
    change::Timestamp,
    disk::{Disk, DiskFile},
    error::{Error, Result},
    failpoint,
    sink::Progress,
};

/// Bytes that go to the file layer in one call.
const PIECE_BYTES: usize = 1 << 20;

/// The end of the file that stays in the page cache, for those that read along.
const CACHED_BYTES: u64 = 32 << 20;

/// When a new file is begun; 0 is never.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rotation {
    pub(super) bytes_max: u64,
    pub(super) ms_max: u64,
}

/// Lines that belong to one progress.
#[derive(Debug)]
pub(super) struct Lines {
    /// Whole lines, each with its end.
    pub(super) bytes: Vec<u8>,
    /// The offsets of the first and the last change among them.
    pub(super) offsets: Option<(u64, u64)>,
    /// Changes for which the format has no line.
    pub(super) filtered: u64,
}

/// The data file and its sidecar.
#[derive(Debug)]
pub(super) struct Store {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    rotation: Rotation,
    /// `None` until opened, and after a failure that leaves the disk's state unknown.
    open: Option<Open>,
}

#[derive(Debug)]
struct Open {
    data: Box<dyn DiskFile>,
    sidecar: Box<dyn DiskFile>,
    state: State,
}

impl Store {
    pub(super) fn new(disk: Arc<dyn Disk>, path: PathBuf, rotation: Rotation) -> Self {
        Self { disk, path, rotation, open: None }
    }

    /// Opens or creates both files, undoing or finishing what was left unfinished.
    pub(super) fn open(&mut self) -> Result<Option<Progress>> {
        self.open = None;
        self.disk
            .create_dir_all(self.directory())
            .map_err(|cause| unavailable("create", self.directory(), cause))?;
        let sidecar_path = self.sidecar_path();
        let sidecar = self.open_existing(&sidecar_path)?;
        let state = match &sidecar {
            Some(file) => {
                // A state that was written but not synced must not be acted on: a rename that it
                // announces could outlive it.
                file.sync().map_err(|cause| failed_sync(&sidecar_path, cause))?;
                sidecar::read(&**file, &sidecar_path)?
            }
            None => None,
        };
        let open = match (sidecar, state) {
            (Some(sidecar), Some(state)) if state.rotating.is_some() => {
                self.finish_rotation(sidecar, state)?
            }
            (Some(sidecar), Some(state)) => self.resume(sidecar, state)?,
            (sidecar, None) => self.begin(sidecar)?,
            (None, Some(_)) => return Err(Error::bug("a state without a sidecar")),
        };
        let progress = open.state.progress;
        self.open = Some(open);
        Ok(progress)
    }

    /// The progress beside the data, without repairing either.
    pub(super) fn peek(&self) -> Result<Option<Progress>> {
        let path = self.sidecar_path();
        match self.disk.open(&path, false) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(unavailable("read", &path, error)),
            Ok(file) => Ok(sidecar::read(&*file, &path)?.and_then(|state| state.progress)),
        }
    }

    /// Makes the lines and the progress durable together. After a failure it has to be opened anew,
    /// so that it goes on from what the disk holds, not from what memory believes.
    pub(super) fn write(&mut self, lines: &Lines, progress: Progress) -> Result<()> {
        let Some(mut open) = self.open.take() else {
            return Err(Error::damaged(format!("{} is not open", self.path.display()))
                .remedy("after a failed sync nobody knows what the disk holds: start again"));
        };
        // What progress says is there is there: a write that was cancelled late was done after all.
        if open.state.progress == Some(progress) {
            self.open = Some(open);
            return Ok(());
        }
        check_forward(&open.state, &progress)?;
        if self.is_rotation_due(&open.state, lines) {
            open = self.rotate(open)?;
        }
        self.append(&mut open, lines, progress)?;
        self.open = Some(open);
        Ok(())
    }

    /// Lets go of the files.
    pub(super) fn close(&mut self) {
        self.open = None;
    }

    fn append(&self, open: &mut Open, lines: &Lines, progress: Progress) -> Result<()> {
        let mut state = State { number: open.state.number + 1, ..open.state.clone() };
        if !lines.bytes.is_empty() {
            self.append_data(open, &lines.bytes)?;
            state.tail_from = state.length;
            state.tail_crc = crc32c::crc32c(&lines.bytes);
            state.length += lines.bytes.len() as u64;
        }
        state.offsets = match (state.offsets, lines.offsets) {
            (Some((first, _)), Some((_, last))) => Some((first, last)),
            (known, new) => new.or(known),
        };
        state.progress = Some(progress);
        self.write_state(open, state)?;
        failpoint::reach("file::after_sidecar");
        Ok(())
    }

    fn append_data(&self, open: &Open, bytes: &[u8]) -> Result<()> {
        let mut at = open.state.length;
        let found = open.data.len().unwrap_or(at);
        if found != at {
            return Err(Error::retry(format!(
                "{} has {found} bytes where this sink left {at}: another process writes to it",
                self.path.display()
            ))
            .remedy("let one sink of one walrace write to it"));
        }
        for piece in bytes.chunks(PIECE_BYTES) {
            if let Err(cause) = open.data.write_all_at(piece, at) {
                return Err(self.cut_back(open, cause));
            }
            at += piece.len() as u64;
        }
        failpoint::reach("file::after_data");
        open.data.sync().map_err(|cause| failed_sync(&self.path, cause))?;
        failpoint::reach("file::after_data_sync");
        let old = |end: u64| end.saturating_sub(CACHED_BYTES);
        open.data.forget(old(open.state.length), old(at));
        Ok(())
    }

    /// A write that failed leaves nothing behind, so that it can be tried again.
    fn cut_back(&self, open: &Open, cause: io::Error) -> Error {
        match open.data.set_len(open.state.length) {
            Ok(()) => unavailable("write", &self.path, cause),
            Err(second) => Error::damaged(format!("cannot cut {} back", self.path.display()))
                .caused_by(second)
                .context(format!("after a failed write ({cause})")),
        }
    }

    fn write_state(&self, open: &mut Open, state: State) -> Result<()> {
        let path = self.sidecar_path();
        let (bytes, at) = sidecar::slot(&state)?;
        let written = open.sidecar.write_all_at(&bytes, at);
        written.map_err(|cause| unavailable("write", &path, cause))?;
        open.sidecar.sync().map_err(|cause| failed_sync(&path, cause))?;
        open.state = state;
        Ok(())
    }

    fn is_rotation_due(&self, state: &State, lines: &Lines) -> bool {
        let Rotation { bytes_max, ms_max } = self.rotation;
        let grown = state.length + lines.bytes.len() as u64;
        let age_us = Timestamp::now().0.saturating_sub(state.begun.0);
        let old = u64::try_from(age_us).unwrap_or(0) / 1000 >= ms_max;
        state.length > 0 && ((bytes_max > 0 && grown > bytes_max) || (ms_max > 0 && old))
    }

    fn rotate(&self, mut open: Open) -> Result<Open> {
        let name = self.rotated_name(&open.state)?;
        let state =
            State { number: open.state.number + 1, rotating: Some(name), ..open.state.clone() };
        self.write_state(&mut open, state)?;
        failpoint::reach("file::rotation_intent");
        let Open { sidecar, state, data } = open;
        drop(data);
        self.finish_rotation(sidecar, state)
    }

    /// `changes.<first>-<last>.jsonl`; after a rewind the same offsets come again, with a number.
    fn rotated_name(&self, state: &State) -> Result<String> {
        let (first, last) = state.offsets.unwrap_or_default();
        let part = |part: Option<&std::ffi::OsStr>| {
            part.map(|text| text.to_string_lossy().into_owned()).unwrap_or_default()
        };
        let (stem, extension) = (part(self.path.file_stem()), part(self.path.extension()));
        let taken = self.disk.list(self.directory());
        let taken = taken.map_err(|cause| unavailable("list", self.directory(), cause))?;
        let name = |again: usize| {
            let again = if again == 0 { String::new() } else { format!(".{again}") };
            let dot = if extension.is_empty() { "" } else { "." };
            format!("{stem}.{first:020}-{last:020}{again}{dot}{extension}")
        };
        let is_free = |name: &String| taken.iter().all(|path| *path != self.sibling(name));
        let free = (0..=taken.len()).map(name).find(is_free);
        free.ok_or_else(|| Error::bug("no free name for a rotated file"))
    }

    /// Goes on from wherever a rotation stopped.
    fn finish_rotation(&self, sidecar: Box<dyn DiskFile>, state: State) -> Result<Open> {
        let rotated = self.sibling(state.rotating.as_deref().unwrap_or_default());
        let done = match self.open_existing(&rotated)? {
            Some(file) => {
                self.verify(&*file, &rotated, &state)?;
                true
            }
            None => false,
        };
        if !done {
            let Some(data) = self.open_existing(&self.path)? else {
                return Err(self.missing(&rotated));
            };
            self.cut_tail(&*data, &state)?;
            let renamed = self.disk.rename(&self.path, &rotated);
            renamed.map_err(|cause| unavailable("rename", &self.path, cause))?;
        }
        self.sync_directory()?;
        failpoint::reach("file::rotated");
        let data = self.create_empty(&self.path)?;
        failpoint::reach("file::created");
        let next = State::begin(state.number + 1, state.progress);
        let mut open = Open { data, sidecar, state };
        self.write_state(&mut open, next)?;
        Ok(open)
    }

    /// The usual start: cuts what was never finished.
    fn resume(&self, sidecar: Box<dyn DiskFile>, state: State) -> Result<Open> {
        let Some(data) = self.open_existing(&self.path)? else {
            return Err(self.missing(&self.path));
        };
        self.cut_tail(&*data, &state)?;
        Ok(Open { data, sidecar, state })
    }

    /// The first start, or one after a crash within the first.
    fn begin(&self, torn: Option<Box<dyn DiskFile>>) -> Result<Open> {
        let (path, sidecar_path) = (self.path.display(), self.sidecar_path());
        let length = match self.open_existing(&self.path)? {
            Some(data) => data.len().map_err(|cause| unavailable("read", &self.path, cause))?,
            None => 0,
        };
        if length > 0 && torn.is_some() {
            return Err(Error::damaged(format!("{} holds no valid state", sidecar_path.display()))
                .remedy(self.remedy_of_damage()));
        }
        if length > 0 {
            return Err(Error::config(format!("{path} was not written by Walrace"))
                .remedy("move it away or choose another path"));
        }
        let data = self.create_empty(&self.path)?;
        let sidecar = match torn {
            Some(sidecar) => sidecar,
            None => self.create_empty(&sidecar_path)?,
        };
        // Both slots, so that later states need no further disk space.
        let mut open = Open { data, sidecar, state: State::begin(0, None) };
        self.write_state(&mut open, State::begin(0, None))?;
        self.write_state(&mut open, State::begin(1, None))?;
        Ok(open)
    }

    /// Cuts the data file to what the state says, and checks that it is the file the state means.
    fn cut_tail(&self, data: &dyn DiskFile, state: &State) -> Result<()> {
        let length = data.len().map_err(|cause| unavailable("read", &self.path, cause))?;
        if length > state.length {
            let cut = data.set_len(state.length).and_then(|()| data.sync());
            cut.map_err(|cause| failed_sync(&self.path, cause))?;
        }
        self.verify(data, &self.path, state)
    }

    fn verify(&self, data: &dyn DiskFile, path: &Path, state: &State) -> Result<()> {
        let unreadable = |cause| unavailable("read", path, cause);
        let length = data.len().map_err(unreadable)?;
        if length != state.length {
            return Err(Error::damaged(format!(
                "{} has {length} bytes, but {} were written",
                path.display(),
                state.length
            ))
            .remedy(self.remedy_of_damage()));
        }
        let mut sum = 0;
        let mut at = state.tail_from;
        let mut piece = vec![0; PIECE_BYTES];
        while at < length {
            let read = data.read_at(&mut piece, at).map_err(unreadable)?;
            if read == 0 {
                return Err(unavailable("read", path, io::ErrorKind::UnexpectedEof.into()));
            }
            sum = crc32c::crc32c_append(sum, piece.get(..read).unwrap_or_default());
            at += read as u64;
        }
        if sum != state.tail_crc {
            return Err(Error::damaged(format!("{} was replaced or edited", path.display()))
                .remedy(self.remedy_of_damage()));
        }
        Ok(())
    }

    fn open_existing(&self, path: &Path) -> Result<Option<Box<dyn DiskFile>>> {
        match self.disk.open(path, true) {
            Ok(file) => Ok(Some(file)),
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(cause) => Err(unavailable("open", path, cause)),
        }
    }

    /// The file, empty and durable; one that a crash left behind is taken if it is empty.
    fn create_empty(&self, path: &Path) -> Result<Box<dyn DiskFile>> {
        let file = match self.disk.create(path) {
            Err(cause) if cause.kind() == io::ErrorKind::AlreadyExists => {
                let file = self.disk.open(path, true);
                file.map_err(|cause| unavailable("open", path, cause))?
            }
            file => file.map_err(|cause| unavailable("create", path, cause))?,
        };
        if !file.is_empty().map_err(|cause| unavailable("read", path, cause))? {
            let path = path.display();
            return Err(Error::damaged(format!("{path} holds data that Walrace did not write"))
                .remedy("move it away and start again"));
        }
        self.sync_directory()?;
        Ok(file)
    }

    fn sync_directory(&self) -> Result<()> {
        let directory = self.directory();
        self.disk.sync_dir(directory).map_err(|cause| failed_sync(directory, cause))
    }

    fn missing(&self, path: &Path) -> Error {
        let sidecar = self.sidecar_path();
        let missing = format!("{} is missing, but {} is there", path.display(), sidecar.display());
        Error::damaged(missing).remedy(self.remedy_of_damage())
    }

    fn remedy_of_damage(&self) -> String {
        let (path, sidecar) = (self.path.display(), self.sidecar_path());
        let sidecar = sidecar.display();
        format!(
            "put the file back as it was; or move {path} and {sidecar} away and rewind the sink to \
             write it anew"
        )
    }

    fn directory(&self) -> &Path {
        let parent = self.path.parent().filter(|parent| !parent.as_os_str().is_empty());
        parent.unwrap_or(Path::new("."))
    }

    fn sidecar_path(&self) -> PathBuf {
        let mut name = self.path.as_os_str().to_owned();
        name.push(".walrace");
        PathBuf::from(name)
    }

    fn sibling(&self, name: &str) -> PathBuf {
        self.directory().join(name)
    }
}

/// Progress that goes back within an epoch comes from a writer that has been replaced.
fn check_forward(state: &State, progress: &Progress) -> Result<()> {
    let Some(held) = &state.progress else { return Ok(()) };
    let behind = held.lineage == progress.lineage
        && (progress.epoch < held.epoch
            || (progress.epoch == held.epoch
                && (progress.cursor < held.cursor || progress.retry_seq < held.retry_seq)));
    if !behind {
        return Ok(());
    }
    Err(Error::damaged(format!(
        "the file has epoch {} up to offset {}, but epoch {} offset {} was to be written",
        held.epoch, held.cursor, progress.epoch, progress.cursor
    ))
    .remedy("another Walrace writes the same file: stop one of them"))
}

/// A failed sync says nothing about what the disk holds.
fn failed_sync(path: &Path, cause: io::Error) -> Error {
    Error::damaged(format!("cannot sync {}", path.display())).caused_by(cause).remedy(
        "look at the disk, then start Walrace again: it goes on from the last certain state",
    )
}

fn unavailable(what: &str, path: &Path, cause: io::Error) -> Error {
    use io::ErrorKind::{
        IsADirectory, NotADirectory, PermissionDenied, QuotaExceeded, ReadOnlyFilesystem,
        StorageFull,
    };

    let message = format!("cannot {what} {}", path.display());
    match cause.kind() {
        PermissionDenied | ReadOnlyFilesystem => Error::config(message)
            .remedy("let the user that runs Walrace write there, or choose another path"),
        IsADirectory | NotADirectory => {
            Error::config(message).remedy("`path` names a file in a directory")
        }
        StorageFull | QuotaExceeded => Error::retry(message).remedy("free space on its volume"),
        _ => Error::retry(message),
    }
    .caused_by(cause)
}
