//! Feeds foreign bytes to the reader of journal segments:
//! `cargo +nightly fuzz run journal_segment`.
//!
//! The first byte chooses: the rest is a whole segment file; or the header and payload of a block,
//! whose checksums are made right so that the records behind them are reached.

#![no_main]

use std::{
    io,
    path::{Path, PathBuf},
};

use libfuzzer_sys::fuzz_target;
use walrace::disk::{Disk, DiskFile};

const SEGMENT_HEADER: usize = 256;
const BLOCK_HEADER: usize = 144;

fuzz_target!(|data: &[u8]| {
    let Some((kind, rest)) = data.split_first() else { return };
    let file = match kind % 3 {
        0 => rest.to_vec(),
        codec => segment(u16::from(codec - 1), rest),
    };
    let _ = walrace::journal::read_segment(&OneFile(file), Path::new("fuzzed.segment"));
});

/// A segment of one block with right checksums, whose counts and payload are foreign.
fn segment(codec: u16, data: &[u8]) -> Vec<u8> {
    let mut file = b"walrace\n\x01\0\0\0\0\0\0\0".to_vec();
    file.resize(SEGMENT_HEADER - 4, 0);
    file.extend(crc32c::crc32c(&file).to_le_bytes());
    let (counts, payload) = data.split_at(data.len().min(8));
    let mut block = vec![0; BLOCK_HEADER - 8];
    for (at, byte) in counts.iter().enumerate() {
        // Changes and flags, then the length of the records.
        let at = if at < 4 { 16 + at * 2 } else { 84 + at };
        block[at] = *byte;
    }
    block[84..86].copy_from_slice(&codec.to_le_bytes());
    block[92..96].copy_from_slice(&u32::try_from(payload.len()).unwrap_or(0).to_le_bytes());
    block[96..100].copy_from_slice(&crc32c::crc32c(payload).to_le_bytes());
    file.extend(b"WRBK");
    file.extend(crc32c::crc32c(&block).to_le_bytes());
    file.extend(block);
    file.extend(payload);
    file
}

/// A disk that has one file.
#[derive(Clone, Debug)]
struct OneFile(Vec<u8>);

fn refused<T>() -> io::Result<T> {
    Err(io::ErrorKind::PermissionDenied.into())
}

impl Disk for OneFile {
    fn create(&self, _path: &Path) -> io::Result<Box<dyn DiskFile>> {
        refused()
    }

    fn open(&self, _path: &Path, _write: bool) -> io::Result<Box<dyn DiskFile>> {
        Ok(Box::new(self.clone()))
    }

    fn rename(&self, _from: &Path, _to: &Path) -> io::Result<()> {
        refused()
    }

    fn remove(&self, _path: &Path) -> io::Result<()> {
        refused()
    }

    fn create_dir_all(&self, _path: &Path) -> io::Result<()> {
        refused()
    }

    fn sync_dir(&self, _directory: &Path) -> io::Result<()> {
        refused()
    }

    fn list(&self, _directory: &Path) -> io::Result<Vec<PathBuf>> {
        refused()
    }

    fn free_bytes(&self, _path: &Path) -> io::Result<u64> {
        refused()
    }
}

impl DiskFile for OneFile {
    fn write_all_at(&self, _bytes: &[u8], _at: u64) -> io::Result<()> {
        refused()
    }

    fn read_at(&self, bytes: &mut [u8], at: u64) -> io::Result<usize> {
        let rest = usize::try_from(at).ok().and_then(|at| self.0.get(at..)).unwrap_or_default();
        let read = rest.len().min(bytes.len());
        bytes[..read].copy_from_slice(&rest[..read]);
        Ok(read)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.len() as u64)
    }

    fn set_len(&self, _length: u64) -> io::Result<()> {
        refused()
    }

    fn sync(&self) -> io::Result<()> {
        refused()
    }
}
