//! The file layer under everything that must survive a power cut: the journal and the file sink.
//!
//! It is a trait so that tests can run both over a disk that forgets what was not synced, is full,
//! or fails. All calls block.

use std::{
    any::Any,
    fmt, fs, io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

/// A directory tree with explicit durability.
pub trait Disk: Send + Sync + fmt::Debug {
    /// Creates a new, empty file; fails where one exists. Lasts once the directory is synced.
    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>>;
    /// Opens an existing file for reading and, where `write`, for writing.
    fn open(&self, path: &Path, write: bool) -> io::Result<Box<dyn DiskFile>>;
    /// Renames over `to`. Lasts once the directory is synced.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a file. Lasts once the directory is synced.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Creates a directory with its parents, durably.
    fn create_dir_all(&self, path: &Path) -> io::Result<()>;
    /// Makes creations, renames and removals in `directory` durable.
    fn sync_dir(&self, directory: &Path) -> io::Result<()>;
    /// The files directly in `directory`, sorted by name; empty where it does not exist.
    fn list(&self, directory: &Path) -> io::Result<Vec<PathBuf>>;
    /// Bytes that an unprivileged process may still write below `path`.
    fn free_bytes(&self, path: &Path) -> io::Result<u64>;
    /// Takes the lock file at `path`, created where it does not exist, until the result is dropped;
    /// fails with `WouldBlock` where another holds it. A disk of one process has no need of it.
    fn lock(&self, path: &Path) -> io::Result<Box<dyn Any + Send + Sync>> {
        let _ = path;
        Ok(Box::new(()))
    }
}

/// An open file, addressed by position.
pub trait DiskFile: Send + Sync + fmt::Debug {
    /// Writes all of `bytes` at `at`.
    fn write_all_at(&self, bytes: &[u8], at: u64) -> io::Result<()>;
    /// Reads up to `bytes.len()` at `at`; 0 at the end.
    fn read_at(&self, bytes: &mut [u8], at: u64) -> io::Result<usize>;
    /// Current length in bytes.
    fn len(&self) -> io::Result<u64>;
    /// Whether it holds no byte.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
    /// Cuts or extends to `length` bytes.
    fn set_len(&self, length: u64) -> io::Result<()>;
    /// Makes the content and the length durable (`fdatasync`).
    fn sync(&self) -> io::Result<()>;
    /// Tells the system that synced bytes `from..to` will not be read soon. It may ignore that.
    fn forget(&self, from: u64, to: u64) {
        let _ = (from, to);
    }

    /// Fills `bytes` from `at`, or fails with `UnexpectedEof`.
    fn read_exact_at(&self, mut bytes: &mut [u8], mut at: u64) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.read_at(bytes, at) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => {
                    bytes = bytes.get_mut(read..).unwrap_or_default();
                    at += read as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// The operating system's file system.
#[derive(Clone, Copy, Debug, Default)]
pub struct RealDisk;

impl RealDisk {
    /// As the trait object that the journal and the file sink take.
    pub fn shared() -> Arc<dyn Disk> {
        Arc::new(Self)
    }
}

impl Disk for RealDisk {
    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let file = fs::OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
        Ok(Box::new(file))
    }

    fn open(&self, path: &Path, write: bool) -> io::Result<Box<dyn DiskFile>> {
        Ok(Box::new(fs::OpenOptions::new().read(true).write(write).open(path)?))
    }

    #[expect(clippy::disallowed_methods, reason = "the one place that renames; callers sync")]
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        if path.is_dir() {
            return Ok(());
        }
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        if let Some(parent) = parent {
            self.create_dir_all(parent)?;
        }
        match fs::create_dir(path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        self.sync_dir(parent.unwrap_or(Path::new(".")))
    }

    fn sync_dir(&self, directory: &Path) -> io::Result<()> {
        fs::File::open(directory)?.sync_all()
    }

    fn list(&self, directory: &Path) -> io::Result<Vec<PathBuf>> {
        let entries = match fs::read_dir(directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let mut files = Vec::new();
        for entry in entries {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                files.push(entry.path());
            }
        }
        files.sort();
        Ok(files)
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        let volume = rustix::fs::statvfs(path)?;
        Ok(volume.f_bavail.saturating_mul(volume.f_frsize))
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn Any + Send + Sync>> {
        let file = fs::OpenOptions::new().write(true).create(true).truncate(false).open(path)?;
        rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive)?;
        Ok(Box::new(file))
    }
}

impl DiskFile for fs::File {
    fn write_all_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        FileExt::write_all_at(self, bytes, at)
    }

    fn read_at(&self, bytes: &mut [u8], at: u64) -> io::Result<usize> {
        FileExt::read_at(self, bytes, at)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        fs::File::set_len(self, length)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn forget(&self, from: u64, to: u64) {
        // The system keeps a folio of many pages whole that lies across the end of a range.
        const FOLIO_MAX: u64 = 4 << 20;
        let from = from.saturating_sub(FOLIO_MAX) / FOLIO_MAX * FOLIO_MAX;
        #[cfg(target_os = "linux")]
        if let Some(length) = std::num::NonZero::new(to.saturating_sub(from)) {
            let _ = rustix::fs::fadvise(self, from, Some(length), rustix::fs::Advice::DontNeed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_forgotten_by_the_page_cache_is_still_in_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = RealDisk.create(&folder.path().join("f")).unwrap();
        let bytes: Vec<u8> = (0..=250).cycle().take(9_000_000).collect();
        file.write_all_at(&bytes, 0).unwrap();
        file.sync().unwrap();
        file.forget(0, 5_000_000);
        file.forget(5_000_000, 5_000_000);
        let mut read = vec![0; bytes.len()];
        file.read_exact_at(&mut read, 0).unwrap();
        assert!(read == bytes);
    }
}
