//! A block: a fixed header, then records, compressed; checked by crc32c and chained by SHA-256.
//!
//! Everything in it is relative to its segment, so that a file can be given its place later.

use bytes::Bytes;
use lz4_flex::block::{
    CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size,
};
use sha2::{Digest, Sha256};

use super::cut::{Cut, Flaw};
use crate::{
    change::{Backfill, Lsn, Position, Timestamp},
    disk::DiskFile,
    error::Error,
};

/// Records gather up to this many bytes; one that is larger has a block of its own.
pub(super) const RAW_BYTES_MAX: usize = 256 << 10;
/// Bytes of a block's header.
pub(super) const HEADER_BYTES: usize = 144;
/// Larger blocks are stored as they are: the compressor counts in 32 bits.
const COMPRESSED_BYTES_MAX: usize = 64 << 20;

pub(super) const MAGIC: [u8; 4] = *b"WRBK";
const STORED: u16 = 0;
const LZ4: u16 = 1;

/// Ends at a commit: what precedes may be read once it is durable.
pub(super) const COMMIT: u32 = 1;
/// Carries a position.
pub(super) const POSITION: u32 = 1 << 1;
/// Holds a gap record.
pub(super) const GAPS: u32 = 1 << 2;
/// Holds a table's descriptor.
pub(super) const TABLES: u32 = 1 << 3;
/// Holds rows that one backfill read, and no other change.
pub(super) const BACKFILL: u32 = 1 << 4;
const FLAGS: u32 = COMMIT | POSITION | GAPS | TABLES | BACKFILL;

/// A SHA-256.
pub(super) type Hash = [u8; 32];

/// The earliest and latest commit time, and the latest append time, of some changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Times {
    pub(super) commit_min: Timestamp,
    pub(super) commit_max: Timestamp,
    pub(super) append_max: Timestamp,
}

impl Times {
    /// Of no change.
    pub(super) const NONE: Self = Self {
        commit_min: Timestamp(i64::MAX),
        commit_max: Timestamp(i64::MIN),
        append_max: Timestamp(i64::MIN),
    };

    pub(super) fn add(&mut self, other: Self) {
        self.commit_min = self.commit_min.min(other.commit_min);
        self.commit_max = self.commit_max.max(other.commit_max);
        self.append_max = self.append_max.max(other.append_max);
    }

    pub(super) fn add_commit(&mut self, time: Timestamp) {
        self.commit_min = self.commit_min.min(time);
        self.commit_max = self.commit_max.max(time);
    }
}

/// What a block says about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// Random for each file, so that bytes inside a row cannot pass for a block of it.
    pub(super) tag: u64,
    /// The first change's offset, counted from the segment's base.
    pub(super) base: u64,
    /// Changes inside.
    pub(super) count: u32,
    pub(super) flags: u32,
    pub(super) times: Times,
    /// Bytes of blocks that were durable in this file when this one was written.
    pub(super) proven: u64,
    pub(super) position: Option<Position>,
    /// The backfill that read all of its changes.
    pub(super) backfill: Option<Backfill>,
    pub(super) codec: u16,
    pub(super) raw_bytes: u32,
    pub(super) stored_bytes: u32,
    pub(super) payload_crc: u32,
    /// Of the block before, whole; zeros for a segment's first.
    pub(super) previous: Hash,
}

impl Header {
    /// Whether it ends at a commit.
    pub(super) fn commits(&self) -> bool {
        self.flags & COMMIT != 0
    }

    /// Bytes of the whole block.
    pub(super) fn bytes(&self) -> u64 {
        HEADER_BYTES as u64 + u64::from(self.stored_bytes)
    }

    fn encode(&self) -> [u8; HEADER_BYTES] {
        let position = self.position.unwrap_or_default();
        let mut body = Vec::with_capacity(HEADER_BYTES);
        body.extend_from_slice(&self.tag.to_le_bytes());
        body.extend_from_slice(&self.base.to_le_bytes());
        body.extend_from_slice(&self.count.to_le_bytes());
        body.extend_from_slice(&self.flags.to_le_bytes());
        body.extend_from_slice(&self.times.commit_min.0.to_le_bytes());
        body.extend_from_slice(&self.times.commit_max.0.to_le_bytes());
        body.extend_from_slice(&self.times.append_max.0.to_le_bytes());
        body.extend_from_slice(&self.proven.to_le_bytes());
        body.extend_from_slice(&position.timeline.to_le_bytes());
        body.extend_from_slice(&position.index.to_le_bytes());
        body.extend_from_slice(&position.lsn.0.to_le_bytes());
        let none = Backfill { id: 0, audience: 0 };
        let backfill = self.backfill.unwrap_or(none);
        body.extend_from_slice(&backfill.id.to_le_bytes());
        body.extend_from_slice(&backfill.audience.to_le_bytes());
        body.extend_from_slice(&self.codec.to_le_bytes());
        body.extend_from_slice(&[0; 2]);
        body.extend_from_slice(&self.raw_bytes.to_le_bytes());
        body.extend_from_slice(&self.stored_bytes.to_le_bytes());
        body.extend_from_slice(&self.payload_crc.to_le_bytes());
        body.extend_from_slice(&[0; 4]);
        body.extend_from_slice(&self.previous);
        let mut bytes = [0; HEADER_BYTES];
        let crc = crc32c::crc32c(&body).to_le_bytes();
        for (to, from) in bytes.iter_mut().zip(MAGIC.iter().chain(&crc).chain(&body)) {
            *to = *from;
        }
        bytes
    }

    /// Reads and checks a header.
    pub(super) fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self, Flaw> {
        let mut cut = Cut(bytes);
        if cut.array()? != MAGIC {
            return Err("no block begins here".into());
        }
        if cut.u32()? != crc32c::crc32c(cut.0) {
            return Err("the checksum of a block's header does not match".into());
        }
        let (tag, base, count, flags) = (cut.u64()?, cut.u64()?, cut.u32()?, cut.u32()?);
        let times = Times {
            commit_min: Timestamp(cut.i64()?),
            commit_max: Timestamp(cut.i64()?),
            append_max: Timestamp(cut.i64()?),
        };
        let proven = cut.u64()?;
        let (timeline, index, lsn) = (cut.u32()?, cut.u32()?, Lsn(cut.u64()?));
        let position = (flags & POSITION != 0).then_some(Position { timeline, lsn, index });
        let (id, audience) = (cut.u64()?, cut.u32()?);
        let backfill = (flags & BACKFILL != 0).then_some(Backfill { id, audience });
        let reserved = backfill.is_some() || (id, audience) == (0, 0);
        let codec = cut.u16()?;
        let reserved = cut.u16()? == 0 && reserved;
        let (raw_bytes, stored_bytes, payload_crc) = (cut.u32()?, cut.u32()?, cut.u32()?);
        let reserved = cut.u32()? == 0 && reserved;
        if !reserved || flags & !FLAGS != 0 || codec > LZ4 {
            return Err(Flaw::Newer("its block uses what only a newer walrace knows".into()));
        }
        let previous = cut.array()?;
        #[rustfmt::skip]
        let header = Self { tag, base, count, flags, times, proven, position, backfill,
            codec, raw_bytes, stored_bytes, payload_crc, previous };
        Ok(header)
    }
}

/// Where finished blocks gather until they are written.
#[derive(Default)]
pub(super) struct Out {
    pub(super) bytes: Vec<u8>,
    table: CompressTable,
}

impl std::fmt::Debug for Out {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Out({} bytes)", self.bytes.len())
    }
}

/// Seals `raw` as a block at the end of `out` and returns its hash. `header` comes without lengths,
/// codec and checksum.
pub(super) fn write(header: &mut Header, raw: &[u8], out: &mut Out) -> Result<Hash, Flaw> {
    let Out { bytes: out, table } = out;
    let too_large = |_| Flaw::Bad(format!("a block of {} bytes is too large", raw.len()));
    let begin = out.len();
    let body = begin + HEADER_BYTES;
    header.raw_bytes = u32::try_from(raw.len()).map_err(too_large)?;
    let room =
        if raw.len() <= COMPRESSED_BYTES_MAX { get_maximum_output_size(raw.len()) } else { 0 };
    out.resize(body + room, 0);
    let packed = match out.get_mut(body..) {
        Some(space) if !space.is_empty() => compress_into_with_table(raw, space, table).ok(),
        _ => None,
    };
    header.codec = match packed.filter(|length| *length < raw.len()) {
        Some(length) => {
            out.truncate(body + length);
            LZ4
        }
        None => {
            out.truncate(body);
            out.extend_from_slice(raw);
            STORED
        }
    };
    let payload = out.get(body..).unwrap_or_default();
    header.stored_bytes = u32::try_from(payload.len()).map_err(too_large)?;
    header.payload_crc = crc32c::crc32c(payload);
    let head = header.encode();
    if let Some(space) = out.get_mut(begin..body) {
        space.copy_from_slice(&head);
    }
    Ok(hash(out.get(begin..).unwrap_or_default()))
}

/// A block as it lies in its file, with header and checksum checked.
#[derive(Debug)]
pub(super) struct Block {
    pub(super) header: Header,
    bytes: Vec<u8>,
}

impl Block {
    /// Its place in the chain.
    pub(super) fn hash(&self) -> Hash {
        hash(&self.bytes)
    }

    /// Its records, uncompressed.
    pub(super) fn records(&self) -> Result<Bytes, Flaw> {
        let payload = self.bytes.get(HEADER_BYTES..).unwrap_or_default();
        let raw_bytes = self.header.raw_bytes as usize;
        if self.header.codec == STORED {
            return Ok(Bytes::copy_from_slice(payload));
        }
        // LZ4 cannot expand further: a length beyond it is a lie that must not take memory.
        if raw_bytes / 255 > payload.len() + 64 {
            return Err(format!("{} bytes cannot hold {raw_bytes}", payload.len()).into());
        }
        let mut raw = vec![0; raw_bytes];
        let length = decompress_into(payload, &mut raw).map_err(|error| error.to_string())?;
        if length == raw_bytes {
            Ok(raw.into())
        } else {
            Err(format!("a block holds {length} bytes of records instead of {raw_bytes}").into())
        }
    }
}

/// Why a block could not be read.
#[derive(Debug)]
pub(super) enum Fault {
    /// The bytes are not what they should be.
    Flaw(Flaw),
    /// The disk did not give them.
    Io(std::io::Error),
}

impl From<Flaw> for Fault {
    fn from(flaw: Flaw) -> Self {
        Self::Flaw(flaw)
    }
}

impl Fault {
    /// As the error that names file and byte.
    pub(super) fn at(self, path: &std::path::Path, at: u64) -> Error {
        match self {
            Self::Flaw(flaw) => flaw.at(path, at),
            Self::Io(error) => {
                let what = format!("cannot read {} at byte {at}", path.display());
                Error::damaged(what).caused_by(error).remedy("check the disk")
            }
        }
    }
}

impl From<std::io::Error> for Fault {
    fn from(error: std::io::Error) -> Self {
        match error.kind() {
            std::io::ErrorKind::UnexpectedEof => Self::Flaw("the file ends inside a block".into()),
            _ => Self::Io(error),
        }
    }
}

/// Reads the header at `at` of a file whose blocks end at `end`.
pub(super) fn read_header(file: &dyn DiskFile, at: u64, end: u64) -> Result<Header, Fault> {
    let mut bytes = [0; HEADER_BYTES];
    if end.saturating_sub(at) < HEADER_BYTES as u64 {
        return Err(Fault::Flaw("the file ends inside a block's header".into()));
    }
    file.read_exact_at(&mut bytes, at)?;
    let header = Header::parse(&bytes)?;
    match header.bytes() <= end - at {
        true => Ok(header),
        false => Err(Fault::Flaw("the file ends inside a block".into())),
    }
}

/// Reads the block at `at`, whole.
pub(super) fn read(file: &dyn DiskFile, at: u64, end: u64) -> Result<Block, Fault> {
    let header = read_header(file, at, end)?;
    let mut bytes = vec![0; HEADER_BYTES + header.stored_bytes as usize];
    file.read_exact_at(&mut bytes, at)?;
    // The header is taken from the same bytes that are hashed: nothing can change in between.
    let head = bytes.first_chunk().ok_or_else(|| Flaw::from("an empty block"))?;
    if Header::parse(head)? != header {
        return Err(Fault::Flaw("a block changed while it was read".into()));
    }
    let payload = bytes.get(HEADER_BYTES..).unwrap_or_default();
    match crc32c::crc32c(payload) == header.payload_crc {
        true => Ok(Block { header, bytes }),
        false => Err(Fault::Flaw("the checksum of a block does not match".into())),
    }
}

fn hash(bytes: &[u8]) -> Hash {
    Sha256::digest(bytes).into()
}
