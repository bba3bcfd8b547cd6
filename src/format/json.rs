//! PostgreSQL's text of a value -> JSON, equal to what `to_jsonb` gives for it.
//!
//! The session that produced the text has `TimeZone = UTC`, ISO dates, hex `bytea` and
//! `extra_float_digits = 3`. Whatever does not parse as its type says is written as a string that
//! holds PostgreSQL's text, so no value is ever lost or guessed.

use crate::schema::{Type, TypeKind};

/// The text is not valid UTF-8, so that it has no JSON form at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NotUtf8;

/// Where the two families of formats differ.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Dialect {
    /// As `to_jsonb`.
    #[default]
    Postgres,
    /// As Sequin: `numeric` is a string, `timestamptz` ends in `Z`.
    Sequin,
}

/// How the text of one type becomes JSON; made once for each column.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// A string.
    Text,
    /// `t` or `f`.
    Bool,
    /// A number, or a string where JSON has none (`NaN`, `Infinity`).
    Number,
    /// The `json` type: as written, without the white space between tokens.
    Json,
    /// The `jsonb` type: as PostgreSQL prints it.
    Jsonb,
    /// `timestamp`.
    Timestamp,
    /// `timestamptz`.
    TimestampTz(Dialect),
    /// An array of any dimension.
    Array { element: Box<Shape>, delimiter: u8 },
    /// `int2vector` and `oidvector`: elements parted by blanks.
    Vector(Box<Shape>),
    /// A row type: for each field `,"name":` and its shape.
    Composite(Vec<(Box<[u8]>, Shape)>),
}

impl Shape {
    pub(super) fn of(ty: &Type, dialect: Dialect) -> Self {
        match &ty.kind {
            TypeKind::Base => Self::of_base(ty.oid, dialect),
            TypeKind::Enum | TypeKind::Range => Self::Text,
            TypeKind::Domain { base } => Self::of(base, dialect),
            TypeKind::Array { element, delimiter } => Self::Array {
                element: Box::new(Self::of(element, dialect)),
                delimiter: u8::try_from(*delimiter).unwrap_or(b','),
            },
            TypeKind::Composite { fields } => {
                let field = |(name, ty): &(String, Type)| (fragment(name), Self::of(ty, dialect));
                Self::Composite(fields.iter().map(field).collect())
            }
        }
    }

    /// The oids are those of PostgreSQL's `pg_type.dat`; they never change.
    fn of_base(oid: u32, dialect: Dialect) -> Self {
        match (oid, dialect) {
            (16, _) => Self::Bool,
            (20 | 21 | 23 | 700 | 701, _) | (1700, Dialect::Postgres) => Self::Number,
            (114, _) => Self::Json,
            (3802, _) => Self::Jsonb,
            (1114, _) => Self::Timestamp,
            (1184, _) => Self::TimestampTz(dialect),
            (22, _) => Self::Vector(Box::new(Self::Number)),
            (30, _) => Self::Vector(Box::new(Self::Text)),
            _ => match element_of(oid) {
                Some(element) => Self::Array {
                    element: Box::new(Self::of_base(element, dialect)),
                    delimiter: if oid == 1020 { b';' } else { b',' },
                },
                None => Self::Text,
            },
        }
    }
}

/// The element's oid of a built-in array type, for columns of which only the oid is known.
pub(super) fn element_of(array: u32) -> Option<u32> {
    Some(match array {
        1000 => 16,   // bool
        1001 => 17,   // bytea
        1002 => 18,   // "char"
        1003 => 19,   // name
        1005 => 21,   // int2
        1007 => 23,   // int4
        1009 => 25,   // text
        1014 => 1042, // bpchar
        1015 => 1043, // varchar
        1016 => 20,   // int8
        1020 => 603,  // box
        1021 => 700,  // float4
        1022 => 701,  // float8
        1028 => 26,   // oid
        1041 => 869,  // inet
        651 => 650,   // cidr
        1115 => 1114, // timestamp
        1182 => 1082, // date
        1183 => 1083, // time
        1185 => 1184, // timestamptz
        1187 => 1186, // interval
        1231 => 1700, // numeric
        199 => 114,   // json
        2951 => 2950, // uuid
        3807 => 3802, // jsonb
        _ => return None,
    })
}

/// `,"name":`, ready to be copied before a value.
pub(super) fn fragment(name: &str) -> Box<[u8]> {
    let mut text = vec![b','];
    write_str(&mut text, name);
    text.push(b':');
    text.into_boxed_slice()
}

/// Appends the value; leaves `out` as it was where it fails.
#[inline]
pub(super) fn write_value(out: &mut Vec<u8>, shape: &Shape, text: &[u8]) -> Result<(), NotUtf8> {
    match shape {
        Shape::Number if is_number(text) => out.extend_from_slice(text),
        Shape::Text | Shape::Number => return write_string(out, text),
        Shape::Bool => match text {
            b"t" => out.extend_from_slice(b"true"),
            b"f" => out.extend_from_slice(b"false"),
            _ => return write_string(out, text),
        },
        Shape::Timestamp => return write_time(out, text, None),
        Shape::TimestampTz(dialect) => return write_time(out, text, Some(*dialect)),
        _ => return write_structured(out, shape, text),
    }
    Ok(())
}

/// Documents, arrays and rows; falls back to a string that holds PostgreSQL's text.
fn write_structured(out: &mut Vec<u8>, shape: &Shape, text: &[u8]) -> Result<(), NotUtf8> {
    let start = out.len();
    let written = match shape {
        Shape::Json => write_json(out, text),
        Shape::Jsonb => write_jsonb(out, text),
        Shape::Array { element, delimiter } => write_array(out, element, *delimiter, text),
        Shape::Vector(element) => write_vector(out, element, text),
        Shape::Composite(fields) => write_composite(out, fields, text),
        _ => None,
    };
    if written.is_some() {
        return Ok(());
    }
    out.truncate(start);
    write_string(out, text)
}

/// Appends a JSON string of text that is known to be UTF-8.
pub(super) fn write_str(out: &mut Vec<u8>, text: &str) {
    out.push(b'"');
    write_escaped(out, text.as_bytes());
    out.push(b'"');
}

/// Appends a JSON string.
#[inline]
pub(super) fn write_string(out: &mut Vec<u8>, text: &[u8]) -> Result<(), NotUtf8> {
    if is_plain(text) {
        out.push(b'"');
        out.extend_from_slice(text);
        out.push(b'"');
        return Ok(());
    }
    let text = simdutf8::basic::from_utf8(text).map_err(|_| NotUtf8)?;
    write_str(out, text);
    Ok(())
}

/// Whether every byte is ASCII that needs no escape.
#[inline]
fn is_plain(text: &[u8]) -> bool {
    let (words, tail) = text.as_chunks::<8>();
    words.iter().all(|word| is_plain_word(u64::from_le_bytes(*word)))
        && tail.iter().all(|&byte| !needs_escape(byte) && byte < 0x80)
}

/// The same for eight bytes at once: a subtraction sets the high bit of each byte that is below the
/// subtrahend. A borrow can only come from a byte that is itself found, so "any" is exact.
#[inline]
fn is_plain_word(word: u64) -> bool {
    const ONES: u64 = u64::MAX / 255;
    let control = word.wrapping_sub(ONES * 0x20);
    let quote = (word ^ (ONES * u64::from(b'"'))).wrapping_sub(ONES);
    let backslash = (word ^ (ONES * u64::from(b'\\'))).wrapping_sub(ONES);
    (word | control | quote | backslash) & (ONES * 0x80) == 0
}

#[inline]
fn needs_escape(byte: u8) -> bool {
    byte < 0x20 || byte == b'"' || byte == b'\\'
}

fn write_escaped(out: &mut Vec<u8>, mut text: &[u8]) {
    while let Some(at) = text.iter().position(|&byte| needs_escape(byte)) {
        let (plain, rest) = text.split_at(at);
        out.extend_from_slice(plain);
        let Some((&byte, rest)) = rest.split_first() else { return };
        match byte {
            b'"' | b'\\' => out.extend_from_slice(&[b'\\', byte]),
            b'\n' => out.extend_from_slice(b"\\n"),
            b'\r' => out.extend_from_slice(b"\\r"),
            b'\t' => out.extend_from_slice(b"\\t"),
            8 => out.extend_from_slice(b"\\b"),
            12 => out.extend_from_slice(b"\\f"),
            _ => {
                out.extend_from_slice(b"\\u00");
                out.extend_from_slice(&[b'0' + (byte >> 4), hex_digit(byte & 15)]);
            }
        }
        text = rest;
    }
    out.extend_from_slice(text);
}

fn hex_digit(value: u8) -> u8 {
    if value < 10 { b'0' + value } else { b'a' + value - 10 }
}

/// Whether the text is a number of the JSON grammar (RFC 8259, section 6).
#[inline]
pub(super) fn is_number(text: &[u8]) -> bool {
    let text = text.strip_prefix(b"-").unwrap_or(text);
    let Some((whole, mut rest)) = split_digits(text) else { return false };
    if whole.len() > 1 && whole.first() == Some(&b'0') {
        return false;
    }
    if let Some(fraction) = rest.strip_prefix(b".") {
        let Some((_, after)) = split_digits(fraction) else { return false };
        rest = after;
    }
    if let Some((b'e' | b'E', exponent)) = rest.split_first() {
        let exponent = match exponent.split_first() {
            Some((b'+' | b'-', digits)) => digits,
            _ => exponent,
        };
        let Some((_, after)) = split_digits(exponent) else { return false };
        rest = after;
    }
    rest.is_empty()
}

/// One or more digits, and what follows.
#[inline]
fn split_digits(text: &[u8]) -> Option<(&[u8], &[u8])> {
    let count = text.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(text.len());
    if count == 0 { None } else { text.split_at_checked(count) }
}

/// `2026-04-06 09:14:22.123+00` -> `"2026-04-06T09:14:22.123+00:00"`; `infinity` and years before
/// Christ stay readable as PostgreSQL's `to_jsonb` has them. `zone` is `None` for `timestamp`.
#[inline]
fn write_time(out: &mut Vec<u8>, text: &[u8], zone: Option<Dialect>) -> Result<(), NotUtf8> {
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
        Some(Dialect::Sequin) if offset == b"+00" => out.push(b'Z'),
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

/// `jsonb` text comes from PostgreSQL's own printer: one line, valid.
fn write_jsonb(out: &mut Vec<u8>, text: &[u8]) -> Option<()> {
    let text = simdutf8::basic::from_utf8(text).ok()?.as_bytes();
    if text.is_empty() || text.iter().any(|&byte| byte < 0x20) {
        return None;
    }
    out.extend_from_slice(text);
    Some(())
}

/// `json` text is as its writer typed it: it may hold raw newlines between tokens.
fn write_json(out: &mut Vec<u8>, text: &[u8]) -> Option<()> {
    let text = simdutf8::basic::from_utf8(text).ok()?;
    serde_json::from_str::<serde::de::IgnoredAny>(text).ok()?;
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        if byte == b'"' {
            let length = string_length(rest)?;
            let (string, after) = rest.split_at_checked(length)?;
            out.extend_from_slice(string);
            rest = after;
            continue;
        }
        if !matches!(byte, b' ' | b'\n' | b'\r' | b'\t') {
            out.push(byte);
        }
        rest = after;
    }
    Some(())
}

/// Bytes of the JSON string at the head of `text`, with its quotes. `None` for half a surrogate
/// pair: PostgreSQL's `json` lets it pass, but strict readers refuse the whole line.
fn string_length(text: &[u8]) -> Option<usize> {
    let mut at = 1;
    loop {
        match *text.get(at)? {
            b'"' => return Some(at + 1),
            b'\\' if text.get(at + 1) == Some(&b'u') => {
                at += 6;
                match code_unit(text, at - 6)? {
                    0xD800..=0xDBFF => {
                        let low = code_unit(text, at)?;
                        (0xDC00..=0xDFFF).contains(&low).then_some(())?;
                        at += 6;
                    }
                    0xDC00..=0xDFFF => return None,
                    _ => {}
                }
            }
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
}

/// The code unit of an escape such as `\u00e9` at `at`.
fn code_unit(text: &[u8], at: usize) -> Option<u16> {
    let digits = text.get(at..at + 6)?.strip_prefix(b"\\u")?;
    u16::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
}

/// `{1,NULL,"a \"b\""}`, `{{1,2},{3,4}}` or `[0:1]={1,2}`
/// (<https://www.postgresql.org/docs/current/arrays.html#ARRAYS-IO>); lower bounds are dropped.
fn write_array(out: &mut Vec<u8>, element: &Shape, delimiter: u8, text: &[u8]) -> Option<()> {
    let write = |out: &mut Vec<u8>, text: &[u8]| write_value(out, element, text).ok();
    write_elements(out, text, (delimiter, ARRAY_DEPTH_MAX), write)
}

/// Appends an array of at most `depth_max` dimensions, whose elements `write` appends.
pub(super) fn write_elements(
    out: &mut Vec<u8>,
    text: &[u8],
    (delimiter, depth_max): (u8, usize),
    write: impl FnMut(&mut Vec<u8>, &[u8]) -> Option<()>,
) -> Option<()> {
    let text = if text.first() == Some(&b'[') {
        let equals = text.iter().position(|&byte| byte == b'=')?;
        text.get(equals + 1..)?
    } else {
        text
    };
    let mut array = Array { rest: text, element: write, delimiter, depth_max, scratch: Vec::new() };
    array.write(out, 0)?;
    array.rest.is_empty().then_some(())
}

struct Array<'a, W> {
    rest: &'a [u8],
    element: W,
    delimiter: u8,
    depth_max: usize,
    scratch: Vec<u8>,
}

/// PostgreSQL's own limit is `MAXDIM`, 6.
pub(super) const ARRAY_DEPTH_MAX: usize = 6;

impl<W: FnMut(&mut Vec<u8>, &[u8]) -> Option<()>> Array<'_, W> {
    fn write(&mut self, out: &mut Vec<u8>, depth: usize) -> Option<()> {
        self.rest = self.rest.strip_prefix(b"{")?;
        out.push(b'[');
        if let Some(rest) = self.rest.strip_prefix(b"}") {
            self.rest = rest;
            out.push(b']');
            return Some(());
        }
        loop {
            match self.rest.first()? {
                b'{' if depth + 1 < self.depth_max => self.write(out, depth + 1)?,
                b'"' => self.quoted(out)?,
                _ => self.bare(out)?,
            }
            let (&byte, rest) = self.rest.split_first()?;
            self.rest = rest;
            match byte {
                b'}' => break,
                _ if byte == self.delimiter => out.push(b','),
                _ => return None,
            }
        }
        out.push(b']');
        Some(())
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
            _ => (self.element)(out, text),
        }
    }
}

/// `1 2 3`, the text of `int2vector` and `oidvector`.
fn write_vector(out: &mut Vec<u8>, element: &Shape, text: &[u8]) -> Option<()> {
    out.push(b'[');
    for (index, item) in text.split(|&byte| byte == b' ').enumerate() {
        if item.is_empty() && text.is_empty() {
            break;
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
fn write_composite(out: &mut Vec<u8>, fields: &[(Box<[u8]>, Shape)], text: &[u8]) -> Option<()> {
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
    match out.get_mut(start) {
        Some(comma) => *comma = b'{',
        None => out.push(b'{'),
    }
    out.push(b'}');
    rest.is_empty().then_some(())
}

/// Reads one field up to its comma, with quotes and escapes undone, and returns what follows.
fn read_field<'a>(field: &mut Vec<u8>, mut rest: &'a [u8]) -> Option<&'a [u8]> {
    let mut quoted = false;
    loop {
        match rest {
            [b'\\', escaped, after @ ..] => {
                field.push(*escaped);
                rest = after;
            }
            [b'"', b'"', after @ ..] if quoted => {
                field.push(b'"');
                rest = after;
            }
            [b'"', after @ ..] => {
                quoted = !quoted;
                rest = after;
            }
            [] | [b',', ..] if !quoted => return Some(rest),
            [] => return None,
            [byte, after @ ..] => {
                field.push(*byte);
                rest = after;
            }
        }
    }
}
