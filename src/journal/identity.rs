//! `identity.json`: which journal this is. Its second line is the checksum of the first.

use std::path::Path;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Origin, segment::FORMAT};
use crate::{
    disk::Disk,
    error::{Class, Classify, Error, Result},
};

const NAME: &str = "identity.json";
const TEMPORARY: &str = "identity.tmp";
const BYTES_MAX: u64 = 64 << 10;

/// What is written once, when the journal begins, and the origin, which is learned later.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Identity {
    pub(super) format: u32,
    pub(super) lineage: Uuid,
    pub(super) incarnation: u32,
    /// The offset that the incarnation began at: above every one that was issued before.
    pub(super) first_offset: u64,
    pub(super) origin: Option<Origin>,
}

impl Identity {
    /// Reads it; `None` where the journal was never finished creating.
    pub(super) fn load(disk: &dyn Disk, directory: &Path) -> Result<Option<Self>> {
        let path = directory.join(NAME);
        let cannot = || format!("cannot read {}", path.display());
        let file = match disk.open(&path, false) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            file => file.class(Class::Config, cannot)?,
        };
        let length = file.len().class(Class::Damaged, cannot)?.min(BYTES_MAX);
        let mut bytes = vec![0; usize::try_from(length).unwrap_or_default()];
        file.read_exact_at(&mut bytes, 0).class(Class::Damaged, cannot)?;
        let damaged = || Error::damaged(format!("{} is damaged at byte 0", path.display()));
        let text = std::str::from_utf8(&bytes).map_err(|_| damaged())?;
        let (json, rest) = text.split_once('\n').ok_or_else(damaged)?;
        if rest != checksum(json) {
            return Err(damaged().context("its checksum does not match"));
        }
        let identity: Self = serde_json::from_str(json).class(Class::Damaged, cannot)?;
        if identity.format != FORMAT {
            let format = identity.format;
            let what =
                format!("{} has format {format}, this walrace reads {FORMAT}", path.display());
            return Err(Error::config(what).remedy("run a newer walrace"));
        }
        Ok(Some(identity))
    }

    /// Writes it: after a power cut there is the old one or the new one, whole.
    pub(super) fn store(&self, disk: &dyn Disk, directory: &Path) -> Result<()> {
        let json = serde_json::to_string(self).class(Class::Bug, || "cannot write an identity")?;
        let text = format!("{json}\n{}", checksum(&json));
        let (temporary, path) = (directory.join(TEMPORARY), directory.join(NAME));
        let write = || {
            Self::discard(disk, directory)?;
            let file = disk.create(&temporary)?;
            file.write_all_at(text.as_bytes(), 0)?;
            file.sync()?;
            disk.rename(&temporary, &path)?;
            disk.sync_dir(directory)
        };
        write().map_err(|error| super::active::write_error(&path, error))
    }

    /// Removes what an unfinished `store` left behind.
    pub(super) fn discard(disk: &dyn Disk, directory: &Path) -> std::io::Result<()> {
        match disk.remove(&directory.join(TEMPORARY)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

fn checksum(json: &str) -> String {
    format!("crc32c {:08x}\n", crc32c::crc32c(json.as_bytes()))
}
