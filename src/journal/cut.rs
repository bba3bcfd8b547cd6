//! Reading little-endian fields off the head of a byte slice, and what can be wrong with them.

use std::{fmt, path::Path};

use crate::error::Error;

/// Why bytes could not be understood; the caller adds file and place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Flaw {
    /// They are not what was written.
    Bad(String),
    /// They are whole, but only a newer version knows their meaning: never cut, never repaired.
    Newer(String),
}

impl Flaw {
    /// As the error that names file and byte.
    pub(super) fn at(&self, path: &Path, at: u64) -> Error {
        match self {
            Flaw::Bad(why) => {
                let what = format!("{} is damaged at byte {at}: {why}", path.display());
                let mend = "restore the journal from a copy, or move its directory away and begin \
                            anew with a backfill";
                Error::damaged(what).remedy(mend)
            }
            Flaw::Newer(why) => Error::config(format!("{} at byte {at}: {why}", path.display()))
                .remedy("run the walrace version that wrote it, or a newer one"),
        }
    }
}

impl fmt::Display for Flaw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Flaw::Bad(why) | Flaw::Newer(why)) = self;
        f.write_str(why)
    }
}

impl From<String> for Flaw {
    fn from(why: String) -> Self {
        Self::Bad(why)
    }
}

impl From<&str> for Flaw {
    fn from(why: &str) -> Self {
        Self::Bad(why.into())
    }
}

/// What is left of a slice; every read fails with what is missing instead of panicking.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cut<'a>(pub(super) &'a [u8]);

impl<'a> Cut<'a> {
    pub(super) fn is_empty(self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], Flaw> {
        let (head, rest) = self.0.split_first_chunk::<N>().ok_or_else(|| short(N, self.0.len()))?;
        self.0 = rest;
        Ok(*head)
    }

    pub(super) fn u8(&mut self) -> Result<u8, Flaw> {
        self.array().map(u8::from_le_bytes)
    }

    pub(super) fn u16(&mut self) -> Result<u16, Flaw> {
        self.array().map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, Flaw> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, Flaw> {
        self.array().map(u64::from_le_bytes)
    }

    pub(super) fn i64(&mut self) -> Result<i64, Flaw> {
        self.array().map(i64::from_le_bytes)
    }

    /// A u32 length and that many bytes.
    pub(super) fn run(&mut self) -> Result<&'a [u8], Flaw> {
        let length = self.u32()? as usize;
        let (head, rest) =
            self.0.split_at_checked(length).ok_or_else(|| short(length, self.0.len()))?;
        self.0 = rest;
        Ok(head)
    }
}

fn short(wanted: usize, left: usize) -> Flaw {
    Flaw::Bad(format!("{wanted} bytes wanted where {left} are left"))
}
