//! A segment file: its name, its header, and the chain that joins it to the one before.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::{
    block::{Hash, Times},
    cut::{Cut, Flaw},
};
use crate::change::{Lsn, Position, Timestamp};

/// Bytes of a segment's header.
pub(super) const HEADER_BYTES: u64 = 256;
/// The same, for arrays.
pub(super) const BYTES: usize = 256;
/// Bytes at the header's end that are zero in format 1.
const RESERVED: usize = 68;
const MAGIC: [u8; 8] = *b"walrace\n";
/// The format that this version writes, and the newest that it reads.
pub(super) const FORMAT: u32 = 1;

const HAS_PREVIOUS: u32 = 1;
const PREVIOUS_HAS_GAPS: u32 = 1 << 1;
const BEGINS_OPEN: u32 = 1 << 2;
const RECOVERED: u32 = 1 << 3;
const HAS_PROGRESS: u32 = 1 << 4;
const FLAGS: u32 = (1 << 5) - 1;

/// What the segment before held when this one was begun: it never changes afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Previous {
    pub(super) base: u64,
    /// Bytes of the file.
    pub(super) bytes: u64,
    pub(super) summary: Summary,
    /// The hash of its last block, zeros where it has none.
    pub(super) last_block: Hash,
    /// Its header and last block, hashed.
    pub(super) chain: Hash,
}

/// What is known of a segment without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Summary {
    pub(super) times: Times,
    pub(super) gaps: bool,
}

impl Summary {
    pub(super) const EMPTY: Self = Self { times: Times::NONE, gaps: false };
}

/// The head of a segment file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) lineage: Uuid,
    pub(super) incarnation: u32,
    /// The offset of the first change.
    pub(super) base: u64,
    /// The segment before; `None` for the first of an incarnation.
    pub(super) previous: Option<Previous>,
    /// It begins inside a transaction.
    pub(super) begins_open: bool,
    /// It was written by recovery: bytes that the one before has beyond `previous` do not count.
    pub(super) recovered: bool,
    /// Where the source was when it was begun.
    pub(super) progress: Option<Position>,
    pub(super) created: Timestamp,
    /// The tag of every block in the file.
    pub(super) tag: u64,
}

impl Header {
    pub(super) fn encode(&self) -> [u8; BYTES] {
        let none = Previous {
            base: 0,
            bytes: 0,
            summary: Summary { times: ZERO, gaps: false },
            last_block: [0; 32],
            chain: [0; 32],
        };
        let previous = self.previous.unwrap_or(none);
        let progress = self.progress.unwrap_or_default();
        let flag = |set: bool, bit: u32| if set { bit } else { 0 };
        let flags = flag(self.previous.is_some(), HAS_PREVIOUS)
            | flag(previous.summary.gaps, PREVIOUS_HAS_GAPS)
            | flag(self.begins_open, BEGINS_OPEN)
            | flag(self.recovered, RECOVERED)
            | flag(self.progress.is_some(), HAS_PROGRESS);
        let mut body = Vec::with_capacity(BYTES);
        body.extend_from_slice(&MAGIC);
        body.extend_from_slice(&FORMAT.to_le_bytes());
        body.extend_from_slice(&[0; 4]); // kind: a normal segment
        body.extend_from_slice(self.lineage.as_bytes());
        body.extend_from_slice(&self.incarnation.to_le_bytes());
        body.extend_from_slice(&flags.to_le_bytes());
        body.extend_from_slice(&self.base.to_le_bytes());
        body.extend_from_slice(&previous.chain);
        body.extend_from_slice(&previous.last_block);
        body.extend_from_slice(&previous.base.to_le_bytes());
        body.extend_from_slice(&previous.bytes.to_le_bytes());
        body.extend_from_slice(&previous.summary.times.commit_min.0.to_le_bytes());
        body.extend_from_slice(&previous.summary.times.commit_max.0.to_le_bytes());
        body.extend_from_slice(&previous.summary.times.append_max.0.to_le_bytes());
        body.extend_from_slice(&progress.timeline.to_le_bytes());
        body.extend_from_slice(&progress.index.to_le_bytes());
        body.extend_from_slice(&progress.lsn.0.to_le_bytes());
        body.extend_from_slice(&self.created.0.to_le_bytes());
        body.extend_from_slice(&self.tag.to_le_bytes());
        body.resize(BYTES - 4, 0); // the adopted transaction's commit, and room
        let crc = crc32c::crc32c(&body).to_le_bytes();
        let mut bytes = [0; BYTES];
        for (to, from) in bytes.iter_mut().zip(body.iter().chain(&crc)) {
            *to = *from;
        }
        bytes
    }

    pub(super) fn parse(bytes: &[u8; BYTES]) -> Result<Self, Flaw> {
        let mut cut = Cut(bytes);
        if cut.array()? != MAGIC {
            return Err("it is not a segment of a walrace journal".into());
        }
        let format = cut.u32()?;
        let (body, crc) = bytes.split_last_chunk::<4>().unwrap_or((&[], &[0; 4]));
        if u32::from_le_bytes(*crc) != crc32c::crc32c(body) {
            return Err("the checksum of its header does not match".into());
        }
        if format != FORMAT {
            let why = format!("format {format} is unknown: this walrace reads format {FORMAT}");
            return Err(Flaw::Newer(why));
        }
        if cut.u32()? != 0 {
            return Err(Flaw::Newer("it is a segment of an unknown kind".into()));
        }
        let lineage = Uuid::from_bytes(cut.array()?);
        let (incarnation, flags, base) = (cut.u32()?, cut.u32()?, cut.u64()?);
        if flags & !FLAGS != 0 {
            return Err(Flaw::Newer(format!("its header's flags {flags:#x} are unknown")));
        }
        let (chain, last_block) = (cut.array()?, cut.array()?);
        let (previous_base, previous_bytes) = (cut.u64()?, cut.u64()?);
        let times = Times {
            commit_min: Timestamp(cut.i64()?),
            commit_max: Timestamp(cut.i64()?),
            append_max: Timestamp(cut.i64()?),
        };
        let (timeline, index, lsn) = (cut.u32()?, cut.u32()?, Lsn(cut.u64()?));
        let (created, tag) = (Timestamp(cut.i64()?), cut.u64()?);
        if cut.array::<RESERVED>()? != [0; RESERVED] {
            return Err(Flaw::Newer("its header uses reserved bytes".into()));
        }
        let summary = Summary { times, gaps: flags & PREVIOUS_HAS_GAPS != 0 };
        let previous =
            Previous { base: previous_base, bytes: previous_bytes, summary, last_block, chain };
        Ok(Self {
            lineage,
            incarnation,
            base,
            previous: (flags & HAS_PREVIOUS != 0).then_some(previous),
            begins_open: flags & BEGINS_OPEN != 0,
            recovered: flags & RECOVERED != 0,
            progress: (flags & HAS_PROGRESS != 0).then_some(Position { timeline, lsn, index }),
            created,
            tag,
        })
    }

    /// The segment's value in the chain, once its last block is known.
    pub(super) fn chain(&self, last_block: &Hash) -> Hash {
        let mut hash = Sha256::new();
        hash.update(self.encode());
        hash.update(last_block);
        hash.finalize().into()
    }
}

const ZERO: Times =
    Times { commit_min: Timestamp(0), commit_max: Timestamp(0), append_max: Timestamp(0) };

/// The file of the segment that begins at `base`.
pub(super) fn path(directory: &Path, base: u64) -> PathBuf {
    directory.join(format!("{base:020}.segment"))
}

/// The base offset in a segment's name.
pub(super) fn base_of(path: &Path) -> Option<u64> {
    let digits = path.file_name()?.to_str()?.strip_suffix(".segment")?;
    if digits.len() != 20 || !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    digits.parse().ok()
}
