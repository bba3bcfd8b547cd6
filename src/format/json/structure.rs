//! The text of arrays, rows and `hstore`.
//!
//! Only what PostgreSQL's own printers write is read. Of anything else nothing is taken, so that
//! its text stays what it is: half an array would be a wrong value.

use super::{Shape, write_str, write_value};
use crate::format::table::close_object;

/// PostgreSQL's own limit is `MAXDIM`, 6.
pub(in crate::format) const ARRAY_DEPTH_MAX: usize = 6;

/// `{1,NULL,"a \"b\""}`, `{{1,2},{3,4}}` or `[0:1]={1,2}`
/// (<https://www.postgresql.org/docs/current/arrays.html#ARRAYS-IO>); lower bounds are dropped.
pub(super) fn write_array(
    out: &mut Vec<u8>,
    element: &Shape,
    delimiter: u8,
    text: &[u8],
) -> Option<()> {
    let write = |out: &mut Vec<u8>, text: &[u8]| write_value(out, element, text).ok();
    write_elements(out, text, (delimiter, ARRAY_DEPTH_MAX), write)
}

/// Appends an array of at most `depth_max` dimensions, whose elements `write` appends.
pub(in crate::format) fn write_elements(
    out: &mut Vec<u8>,
    text: &[u8],
    (delimiter, depth_max): (u8, usize),
    write: impl FnMut(&mut Vec<u8>, &[u8]) -> Option<()>,
) -> Option<()> {
    let mut extent = Extent::default();
    let rest = extent.read_bounds(text)?;
    let mut array =
        Array { rest, extent, element: write, delimiter, depth_max, scratch: Vec::new() };
    array.write(out, 0)?;
    array.rest.is_empty().then_some(())
}

/// How many dimensions an array has, and how long each is, as far as it is known.
#[derive(Default)]
struct Extent {
    dimensions: Option<usize>,
    lengths: [Option<usize>; ARRAY_DEPTH_MAX],
}

impl Extent {
    /// `[0:1][2:3]=`, where the text begins with it, and what follows.
    fn read_bounds<'a>(&mut self, text: &'a [u8]) -> Option<&'a [u8]> {
        let mut rest = text;
        let mut depth = 0;
        while let Some(after) = rest.strip_prefix(b"[") {
            let (bounds, after) = after.split_at_checked(memchr::memchr(b']', after)?)?;
            let (low, high) = std::str::from_utf8(bounds).ok()?.split_once(':')?;
            let (low, high) = (low.parse::<i32>().ok()?, high.parse::<i32>().ok()?);
            let length = i64::from(high) - i64::from(low) + 1;
            self.close(depth, usize::try_from(length).ok().filter(|length| *length > 0)?)?;
            depth += 1;
            rest = after.strip_prefix(b"]")?;
        }
        if depth == 0 {
            return Some(text);
        }
        self.dimensions = Some(depth);
        rest.strip_prefix(b"=")
    }

    /// An element stands at this depth.
    fn hold(&mut self, depth: usize) -> Option<()> {
        (*self.dimensions.get_or_insert(depth + 1) == depth + 1).then_some(())
    }

    /// An inner array begins at this depth.
    fn enter(&self, depth: usize) -> Option<()> {
        self.dimensions.is_none_or(|dimensions| depth + 1 < dimensions).then_some(())
    }

    /// An array of this depth ends with so many elements.
    fn close(&mut self, depth: usize, length: usize) -> Option<()> {
        (*self.lengths.get_mut(depth)?.get_or_insert(length) == length).then_some(())
    }
}

struct Array<'a, W> {
    rest: &'a [u8],
    extent: Extent,
    element: W,
    delimiter: u8,
    depth_max: usize,
    scratch: Vec<u8>,
}

impl<W: FnMut(&mut Vec<u8>, &[u8]) -> Option<()>> Array<'_, W> {
    fn write(&mut self, out: &mut Vec<u8>, depth: usize) -> Option<()> {
        self.rest = self.rest.strip_prefix(b"{")?;
        out.push(b'[');
        if let Some(rest) = self.rest.strip_prefix(b"}") {
            self.rest = rest;
            out.push(b']');
            return (depth == 0 && self.extent.dimensions.is_none()).then_some(());
        }
        let mut length = 0;
        loop {
            match self.rest.first()? {
                b'{' if depth + 1 < self.depth_max => {
                    self.extent.enter(depth)?;
                    self.write(out, depth + 1)?;
                }
                byte => {
                    self.extent.hold(depth)?;
                    if *byte == b'"' { self.quoted(out)? } else { self.bare(out)? }
                }
            }
            length += 1;
            let (&byte, rest) = self.rest.split_first()?;
            self.rest = rest;
            match byte {
                b'}' => break,
                _ if byte == self.delimiter => out.push(b','),
                _ => return None,
            }
        }
        out.push(b']');
        self.extent.close(depth, length)
    }

    fn quoted(&mut self, out: &mut Vec<u8>) -> Option<()> {
        self.scratch.clear();
        let mut rest = self.rest.strip_prefix(b"\"")?;
        loop {
            let stop = memchr::memchr2(b'"', b'\\', rest)?;
            let (plain, after) = rest.split_at_checked(stop)?;
            self.scratch.extend_from_slice(plain);
            match after {
                [b'\\', escaped, after @ ..] => {
                    self.scratch.push(*escaped);
                    rest = after;
                }
                [b'"', after @ ..] => {
                    self.rest = after;
                    return (self.element)(out, &self.scratch);
                }
                _ => return None,
            }
        }
    }

    fn bare(&mut self, out: &mut Vec<u8>) -> Option<()> {
        let end = memchr::memchr2(self.delimiter, b'}', self.rest)?;
        let (text, rest) = self.rest.split_at_checked(end)?;
        self.rest = rest;
        match text {
            b"" => None,
            _ if text.eq_ignore_ascii_case(b"NULL") => {
                out.extend_from_slice(b"null");
                Some(())
            }
            _ if text.iter().any(|byte| matches!(byte, b'{' | b'"' | b'\\')) => None,
            _ => (self.element)(out, text),
        }
    }
}

/// `1 2 3`, the text of `int2vector` and `oidvector`.
pub(super) fn write_vector(out: &mut Vec<u8>, element: &Shape, text: &[u8]) -> Option<()> {
    out.push(b'[');
    for (index, item) in text.split(|&byte| byte == b' ').enumerate() {
        if item.is_empty() && text.is_empty() {
            break;
        }
        if item.is_empty() || !item.iter().all(|byte| matches!(byte, b'-' | b'0'..=b'9')) {
            return None;
        }
        if index > 0 {
            out.push(b',');
        }
        write_value(out, element, item).ok()?;
    }
    out.push(b']');
    Some(())
}

/// `(1,"a ""b""",)` (<https://www.postgresql.org/docs/current/rowtypes.html#ROWTYPES-IO-SYNTAX>);
/// an empty field is NULL.
pub(super) fn write_composite(
    out: &mut Vec<u8>,
    fields: &[(Box<[u8]>, Shape)],
    text: &[u8],
) -> Option<()> {
    let mut rest = text.strip_prefix(b"(")?.strip_suffix(b")")?;
    let start = out.len();
    let mut scratch = Vec::new();
    for (index, (name, shape)) in fields.iter().enumerate() {
        if index > 0 {
            rest = rest.strip_prefix(b",")?;
        }
        out.extend_from_slice(name);
        if matches!(rest.first(), None | Some(b',')) {
            out.extend_from_slice(b"null");
            continue;
        }
        scratch.clear();
        rest = read_field(&mut scratch, rest)?;
        write_value(out, shape, &scratch).ok()?;
    }
    close_object(out, start);
    rest.is_empty().then_some(())
}

/// Reads one field, quoted as a whole or not at all, and returns what follows.
fn read_field<'a>(field: &mut Vec<u8>, text: &'a [u8]) -> Option<&'a [u8]> {
    let Some(mut rest) = text.strip_prefix(b"\"") else {
        let (bare, rest) =
            text.split_at_checked(memchr::memchr(b',', text).unwrap_or(text.len()))?;
        field.extend_from_slice(bare);
        let plain = |byte: &u8| !matches!(byte, b'"' | b'\\' | b'(' | b')');
        return bare.iter().all(plain).then_some(rest);
    };
    loop {
        let stop = memchr::memchr2(b'"', b'\\', rest)?;
        let (plain, after) = rest.split_at_checked(stop)?;
        field.extend_from_slice(plain);
        rest = match after {
            [b'\\', escaped, after @ ..] => {
                field.push(*escaped);
                after
            }
            [b'"', b'"', after @ ..] => {
                field.push(b'"');
                after
            }
            [_, after @ ..] => return Some(after),
            [] => return None,
        };
    }
}

/// `"a"=>"1", "b"=>NULL` (<https://www.postgresql.org/docs/current/hstore.html>).
pub(super) fn write_hstore(out: &mut Vec<u8>, text: &[u8]) -> Option<()> {
    let start = out.len();
    let mut rest = text;
    while !rest.is_empty() {
        out.push(b',');
        rest = write_quoted(out, rest)?.strip_prefix(b"=>")?;
        out.push(b':');
        rest = if let Some(after) = rest.strip_prefix(b"NULL") {
            out.extend_from_slice(b"null");
            after
        } else {
            write_quoted(out, rest)?
        };
        if !rest.is_empty() {
            rest = rest.strip_prefix(b", ").filter(|rest| !rest.is_empty())?;
        }
    }
    close_object(out, start);
    Some(())
}

/// Appends the text in double quotes at the head as a JSON string, and returns what follows it.
fn write_quoted<'a>(out: &mut Vec<u8>, text: &'a [u8]) -> Option<&'a [u8]> {
    let mut rest = text.strip_prefix(b"\"")?;
    let mut value = Vec::new();
    loop {
        let (plain, after) = rest.split_at_checked(memchr::memchr2(b'"', b'\\', rest)?)?;
        value.extend_from_slice(plain);
        rest = match after {
            [b'\\', escaped, after @ ..] => {
                value.push(*escaped);
                after
            }
            [_, after @ ..] => {
                write_str(out, simdutf8::basic::from_utf8(&value).ok()?);
                return Some(after);
            }
            [] => return None,
        };
    }
}
