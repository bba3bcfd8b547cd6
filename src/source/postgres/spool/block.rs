//! A block of the spool: messages of one transaction, compressed and checked.
//!
//! ```text
//!  block   raw bytes u32 | stored bytes u32 | crc32c of what is around it u32 | payload
//!  record  arrival u64 | xid u32 | message bytes u32 | message            (little endian)
//! ```
//!
//! The payload is LZ4 where that made it smaller. The format is that of one run of the program: no
//! other one ever reads it.

use std::io;

use bytes::{Buf, Bytes};
use lz4_flex::block::{
    CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size,
};

use super::super::pgoutput::Part;
use crate::disk::DiskFile;

/// Bytes before a block's payload.
const HEAD_BYTES: usize = 12;
/// Bytes before a record's message.
const RECORD_BYTES: usize = 16;

/// A message of a transaction that is still open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) struct Record {
    /// The transaction or subtransaction that it belongs to.
    pub(in super::super) xid: u32,
    /// For a relation: its number among all relations that the server has sent.
    pub(in super::super) arrival: u64,
    /// As it would have come in a whole transaction.
    pub(in super::super) message: Bytes,
}

/// Writes what stands before a message's body: the record's head, and the kind.
pub(super) fn push_head(out: &mut Vec<u8>, arrival: u64, part: &Part) {
    // A message is at most 1 GiB: the frames refuse a longer one.
    let length = u32::try_from(part.body.len() + 1).unwrap_or(u32::MAX);
    out.extend_from_slice(&arrival.to_le_bytes());
    out.extend_from_slice(&part.xid.to_le_bytes());
    out.extend_from_slice(&length.to_le_bytes());
    out.push(part.kind);
}

/// Takes the next record off `raw`; `None` at its end.
pub(super) fn next_record(raw: &mut Bytes) -> io::Result<Option<Record>> {
    if raw.is_empty() {
        return Ok(None);
    }
    if raw.len() < RECORD_BYTES {
        return Err(flaw("a block of the spool ends inside a record"));
    }
    let (arrival, xid, length) = (raw.get_u64_le(), raw.get_u32_le(), raw.get_u32_le() as usize);
    if length > raw.len() {
        return Err(flaw("a block of the spool ends inside a message"));
    }
    Ok(Some(Record { xid, arrival, message: raw.split_to(length) }))
}

/// Writes `raw` as a block over what is in `out`.
pub(super) fn pack(raw: &[u8], table: &mut CompressTable, out: &mut Vec<u8>) {
    out.clear();
    out.resize(HEAD_BYTES + get_maximum_output_size(raw.len()), 0);
    let space = out.get_mut(HEAD_BYTES..).unwrap_or_default();
    match compress_into_with_table(raw, space, table) {
        Ok(length) if length < raw.len() => out.truncate(HEAD_BYTES + length),
        _ => {
            out.truncate(HEAD_BYTES);
            out.extend_from_slice(raw);
        }
    }
    let head = head(raw.len(), &[out.get(HEAD_BYTES..).unwrap_or_default()]);
    if let Some(space) = out.get_mut(..HEAD_BYTES) {
        space.copy_from_slice(&head);
    }
}

/// What stands before the payload that `parts` are together, of records of `raw_bytes`.
pub(super) fn head(raw_bytes: usize, parts: &[&[u8]]) -> [u8; HEAD_BYTES] {
    let count = |bytes: usize| u32::try_from(bytes).unwrap_or(u32::MAX).to_le_bytes();
    let (raw, stored) = (count(raw_bytes), count(parts.iter().map(|part| part.len()).sum()));
    let crc = checksum(&raw, &stored, parts).to_le_bytes();
    let mut head = [0; HEAD_BYTES];
    for (to, from) in head.iter_mut().zip(raw.iter().chain(&stored).chain(&crc)) {
        *to = *from;
    }
    head
}

/// Reads the block at `at` of a file of `end` bytes: its records, and where the next one begins.
pub(super) fn read(file: &dyn DiskFile, at: u64, end: u64) -> io::Result<(Bytes, u64)> {
    let mut head = [0; HEAD_BYTES];
    file.read_exact_at(&mut head, at)?;
    let [raw, stored, crc] = [0, 4, 8].map(|from: usize| {
        head.get(from..).and_then(<[u8]>::first_chunk::<4>).copied().unwrap_or_default()
    });
    let (raw_bytes, stored_bytes) = (u32::from_le_bytes(raw), u32::from_le_bytes(stored));
    let begin = at + HEAD_BYTES as u64;
    let next = begin + u64::from(stored_bytes);
    if next > end {
        return Err(flaw("the spool ends inside a block"));
    }
    let mut payload = vec![0; stored_bytes as usize];
    file.read_exact_at(&mut payload, begin)?;
    if checksum(&raw, &stored, &[&payload]) != u32::from_le_bytes(crc) {
        return Err(flaw("the checksum of a block of the spool does not match"));
    }
    if raw_bytes == stored_bytes {
        return Ok((payload.into(), next));
    }
    let mut raw = vec![0; raw_bytes as usize];
    match decompress_into(&payload, &mut raw) {
        Ok(length) if length == raw.len() => Ok((raw.into(), next)),
        _ => Err(flaw("a block of the spool cannot be decompressed")),
    }
}

fn checksum(raw: &[u8], stored: &[u8], parts: &[&[u8]]) -> u32 {
    let lengths = crc32c::crc32c_append(crc32c::crc32c(raw), stored);
    parts.iter().fold(lengths, |crc, part| crc32c::crc32c_append(crc, part))
}

fn flaw(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
