//! Rows that wait on disk: those of a table that can only be read as a whole.

use std::{
    collections::HashMap,
    fs::{File, OpenOptions},
    io::{BufReader, BufWriter, Read, Seek, Write},
    path::{Path, PathBuf},
};

use bytes::Bytes;
use sha2::{Digest, Sha256};

use crate::{
    change::{Key, Row},
    error::{Error, Result},
};

const BUFFER_BYTES: usize = 1 << 20;

/// A file of rows that has no name: it is gone with the process, however that ends.
#[derive(Debug)]
pub struct Spool {
    directory: PathBuf,
    file: BufWriter<File>,
    rows: u64,
    bytes: u64,
}

impl Spool {
    /// An empty one in `directory`, which is created where it does not exist.
    pub(super) fn create(directory: &Path) -> Result<Self> {
        let path = directory.join(format!("backfill-{:016x}", fastrand::u64(..)));
        let file = std::fs::create_dir_all(directory)
            .and_then(|()| OpenOptions::new().read(true).write(true).create_new(true).open(&path))
            .and_then(|file| std::fs::remove_file(&path).map(|()| file))
            .map_err(|error| unwritten(directory, error))?;
        let file = BufWriter::with_capacity(BUFFER_BYTES, file);
        Ok(Self { directory: directory.to_owned(), file, rows: 0, bytes: 0 })
    }

    /// Rows, and their bytes.
    pub(super) fn size(&self) -> (u64, u64) {
        (self.rows, self.bytes)
    }

    pub(super) fn push(&mut self, row: &Row) -> Result<()> {
        let bytes = row.as_bytes();
        let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        let written = self.file.write_all(&length.to_be_bytes());
        written
            .and_then(|()| self.file.write_all(bytes))
            .map_err(|error| unwritten(&self.directory, error))?;
        self.rows += 1;
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    /// Reads it from its beginning, without rows that are `gone`, as often as they are.
    pub(super) fn read(self, gone: HashMap<Key, u32>) -> Result<Spooled> {
        let directory = self.directory;
        let mut file =
            self.file.into_inner().map_err(|error| unwritten(&directory, error.into_error()))?;
        file.rewind().map_err(unread)?;
        let file = BufReader::with_capacity(BUFFER_BYTES, file);
        Ok(Spooled { file, left: self.rows, gone })
    }
}

/// A [`Spool`] that is read.
#[derive(Debug)]
pub(super) struct Spooled {
    file: BufReader<File>,
    left: u64,
    gone: HashMap<Key, u32>,
}

impl Spooled {
    /// The next rows, of some `bytes_max` bytes; `None` after the last.
    pub(super) fn next(&mut self, bytes_max: usize) -> Result<Option<Vec<Row>>> {
        let (mut rows, mut bytes) = (Vec::new(), 0);
        while self.left > 0 && bytes < bytes_max {
            let mut length = [0; 4];
            self.file.read_exact(&mut length).map_err(unread)?;
            let mut text = vec![0; u32::from_be_bytes(length) as usize];
            self.file.read_exact(&mut text).map_err(unread)?;
            self.left -= 1;
            let row = Row::new(Bytes::from(text))?;
            if !self.is_gone(&row) {
                bytes += row.as_bytes().len();
                rows.push(row);
            }
        }
        Ok((!rows.is_empty()).then_some(rows))
    }

    fn is_gone(&mut self, row: &Row) -> bool {
        if self.gone.is_empty() {
            return false;
        }
        let key = whole_row(row);
        let Some(left) = self.gone.get_mut(&key) else { return false };
        *left -= 1;
        if *left == 0 {
            self.gone.remove(&key);
        }
        true
    }
}

/// A row by all of its values.
pub(super) fn whole_row(row: &Row) -> Key {
    let digest = Sha256::digest(row.as_bytes());
    digest.first_chunk().map_or(0, |bytes| u128::from_be_bytes(*bytes))
}

fn unwritten(directory: &Path, error: std::io::Error) -> Error {
    Error::retry(format!("cannot keep the rows of a backfill in {}", directory.display()))
        .caused_by(error)
        .remedy("free space on that volume: a table without a key needs as much as its rows take")
}

fn unread(error: std::io::Error) -> Error {
    Error::retry("cannot read the rows of a backfill back").caused_by(error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::Value;

    fn row(text: &str) -> Row {
        Row::from_values([Value::Text(text.as_bytes())])
    }

    #[test]
    fn rows_come_back_in_order_without_those_that_are_gone_as_often_as_they_are() {
        let directory = tempfile::tempdir().unwrap();
        let mut spool = Spool::create(&directory.path().join("new")).unwrap();
        for text in ["a", "b", "a", "c", "a"] {
            spool.push(&row(text)).unwrap();
        }
        assert_eq!(spool.size(), (5, 5 * 8));
        let gone = HashMap::from([(whole_row(&row("a")), 2), (whole_row(&row("x")), 1)]);
        let mut spooled = spool.read(gone).unwrap();
        assert_eq!(spooled.next(1).unwrap().unwrap(), [row("b")]);
        assert_eq!(spooled.next(1 << 20).unwrap().unwrap(), [row("c"), row("a")]);
        assert!(spooled.next(1).unwrap().is_none());
        assert_eq!(std::fs::read_dir(directory.path().join("new")).unwrap().count(), 0);
    }
}
