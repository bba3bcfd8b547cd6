//! The text of `timestamp` and `timestamptz`.

use super::{NotUtf8, is_plain, write_string};
use crate::format::time;

/// How the time zone of a `timestamptz` is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::format) enum Zone {
    /// `+00:00`.
    Offset,
    /// `Z`.
    Z,
}

/// `2026-04-06 09:14:22.123+00` -> `"2026-04-06T09:14:22.123+00:00"`; `infinity` and years before
/// Christ stay readable as PostgreSQL's `to_jsonb` has them. `zone` is `None` for `timestamp`.
#[inline]
pub(super) fn write_time(
    out: &mut Vec<u8>,
    text: &[u8],
    zone: Option<Zone>,
) -> Result<(), NotUtf8> {
    let parts = text.iter().position(|&byte| byte == b' ').and_then(|at| {
        let (date, rest) = text.split_at_checked(at)?;
        Some((date, rest.get(1..)?))
    });
    let Some((date, rest)) = parts else { return write_string(out, text) };
    if !is_plain(text) {
        return write_string(out, text);
    }
    let (time, era) = match rest.strip_suffix(b" BC") {
        Some(time) => (time, b" BC".as_slice()),
        None => (rest, b"".as_slice()),
    };
    let sign = time.iter().position(|byte| matches!(byte, b'+' | b'-')).unwrap_or(time.len());
    let (clock, offset) = time.split_at(sign);
    out.push(b'"');
    out.extend_from_slice(date);
    out.push(b'T');
    out.extend_from_slice(clock);
    match zone {
        Some(Zone::Z) if offset == b"+00" => out.push(b'Z'),
        Some(_) if offset.len() == 3 => {
            out.extend_from_slice(offset);
            out.extend_from_slice(b":00");
        }
        _ => out.extend_from_slice(offset),
    }
    out.extend_from_slice(era);
    out.push(b'"');
    Ok(())
}

/// The count of units of `unit` microseconds since 1970-01-01 UTC, rounded to the past. What has
/// no such number of 64 bits, as `infinity`, is written as text.
pub(super) fn write_epoch(
    out: &mut Vec<u8>,
    text: &[u8],
    (unit, zone): (i64, Option<Zone>),
) -> Result<(), NotUtf8> {
    let wanted = if zone.is_some() { "+00" } else { "" };
    let micros = std::str::from_utf8(text)
        .ok()
        .and_then(time::moment)
        .filter(|moment| moment.zone == wanted)
        .and_then(|moment| moment.micros());
    let Some(count) = micros.and_then(|micros| micros.checked_div_euclid(unit)) else {
        return write_time(out, text, zone);
    };
    out.extend_from_slice(itoa::Buffer::new().format(count).as_bytes());
    Ok(())
}
