//! `<path>.walrace`: what the data file holds for certain, kept beside it.
//!
//! ```text
//! byte 0      slot of the even states    one line of JSON, padded with blanks to 2048 bytes:
//! byte 2048   slot of the odd states     crc32c of the rest in hex, a blank, the state, a newline
//! ```
//!
//! States are written in turn, each with one write and one sync, so that a torn write leaves the
//! state before it whole. The valid slot with the higher `number` counts.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::{
    change::Timestamp,
    disk::DiskFile,
    error::{Class, Classify, Error, Result},
    sink::Progress,
};

const SLOT_BYTES: usize = 2048;
/// The checksum in hex and a blank.
const HEAD_BYTES: usize = 9;

/// What the data file holds for certain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct State {
    /// The version of this layout: 1.
    pub(super) version: u32,
    /// Counts the states; its parity is the slot.
    pub(super) number: u64,
    /// Bytes of the data file; what lies beyond was never finished.
    pub(super) length: u64,
    /// Where the last write began, and the checksum of its bytes: a file that was replaced or
    /// edited is known by it.
    pub(super) tail_from: u64,
    pub(super) tail_crc: u32,
    /// The offsets of the first and the last change in the data file.
    pub(super) offsets: Option<(u64, u64)>,
    /// When the data file was begun.
    pub(super) begun: Timestamp,
    /// The name that the data file is about to get: a rotation was begun and not finished.
    pub(super) rotating: Option<String>,
    /// What the sink has, in the data file and the rotated ones before it.
    pub(super) progress: Option<Progress>,
}

impl State {
    /// Of an empty data file that was begun now.
    pub(super) fn begin(number: u64, progress: Option<Progress>) -> Self {
        Self {
            version: 1,
            number,
            length: 0,
            tail_from: 0,
            tail_crc: 0,
            offsets: None,
            begun: Timestamp::now(),
            rotating: None,
            progress,
        }
    }
}

/// The bytes of `state` and where they go.
pub(super) fn slot(state: &State) -> Result<(Vec<u8>, u64)> {
    let json = serde_json::to_string(state).class(Class::Bug, || "cannot write a state as JSON")?;
    let body = format!("{json:width$}\n", width = SLOT_BYTES - HEAD_BYTES - 1);
    let slot = format!("{:08x} {body}", crc32c::crc32c(body.as_bytes()));
    if slot.len() != SLOT_BYTES {
        let length = slot.len();
        return Err(Error::bug(format!("a state of {length} bytes for a slot of {SLOT_BYTES}")));
    }
    Ok((slot.into_bytes(), (state.number % 2) * SLOT_BYTES as u64))
}

/// The newest valid state; `None` where no slot holds one.
pub(super) fn read(file: &dyn DiskFile, path: &Path) -> Result<Option<State>> {
    let mut newest = None;
    for slot in 0..2 {
        let mut bytes = Vec::new();
        let length =
            file.len().class(Class::Retry, || format!("cannot read {}", path.display()))?;
        let at = slot * SLOT_BYTES as u64;
        bytes.resize(
            usize::try_from(length.saturating_sub(at)).unwrap_or(SLOT_BYTES).min(SLOT_BYTES),
            0,
        );
        file.read_exact_at(&mut bytes, at)
            .class(Class::Retry, || format!("cannot read {}", path.display()))?;
        let Some(state) = parse(&bytes) else { continue };
        if newest.as_ref().is_none_or(|newest: &State| newest.number < state.number) {
            newest = Some(state);
        }
    }
    match newest {
        Some(state) if state.version != 1 => Err(Error::config(format!(
            "{} has version {}, which this Walrace does not know",
            path.display(),
            state.version
        ))
        .remedy("use the Walrace that wrote it, or a newer one")),
        newest => Ok(newest),
    }
}

fn parse(slot: &[u8]) -> Option<State> {
    let (head, body) = slot.split_at_checked(HEAD_BYTES)?;
    let sum = std::str::from_utf8(head.get(..8)?).ok()?;
    let sum = u32::from_str_radix(sum, 16).ok()?;
    if slot.len() != SLOT_BYTES || sum != crc32c::crc32c(body) {
        return None;
    }
    serde_json::from_slice(body).ok()
}
