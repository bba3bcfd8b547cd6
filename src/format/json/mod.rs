//! PostgreSQL's text of a value -> JSON, equal to what `to_jsonb` gives for it.
//!
//! The session that produced the text has `TimeZone = UTC`, ISO dates, hex `bytea` and
//! `extra_float_digits = 3`. Whatever does not parse as its type says is written as a string that
//! holds PostgreSQL's text, so no value is ever lost or guessed.

use base64::{Engine, engine::general_purpose::STANDARD};

use crate::{
    config::{BytesStyle, NumberStyle, TimestampStyle, Types},
    schema::{Type, TypeKind},
};

mod document;
mod moment;
mod structure;

pub(super) use self::{
    moment::Zone,
    structure::{ARRAY_DEPTH_MAX, write_elements},
};

/// The text is not valid UTF-8, so that it has no JSON form at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NotUtf8;

/// Where formats and sinks differ.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Dialect {
    /// As `to_jsonb`.
    #[default]
    Postgres,
    /// As Sequin: `numeric` is a string, `timestamptz` ends in `Z`, `hstore` is text.
    Sequin,
    /// As `to_jsonb`, but for what the sink chose.
    Chosen(Types),
}

impl Dialect {
    fn types(self) -> Types {
        match self {
            Self::Postgres => Types::default(),
            Self::Sequin => Types { numeric: NumberStyle::String, ..Types::default() },
            Self::Chosen(types) => types,
        }
    }

    fn zone(self) -> Zone {
        if self == Self::Sequin { Zone::Z } else { Zone::Offset }
    }

    fn timestamp(self, zone: Option<Zone>) -> Shape {
        let unit = match (self.types().timestamp, zone) {
            (TimestampStyle::Iso, None) => return Shape::Timestamp,
            (TimestampStyle::Iso, Some(zone)) => return Shape::TimestampTz(zone),
            (TimestampStyle::EpochSeconds, _) => 1_000_000,
            (TimestampStyle::EpochMillis, _) => 1_000,
            (TimestampStyle::EpochMicros, _) => 1,
        };
        Shape::Epoch { unit, zone }
    }
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
    /// `bytea` as base64.
    Base64,
    /// The `json` type: as written, without the white space between tokens.
    Json,
    /// The `jsonb` type: as PostgreSQL prints it.
    Jsonb,
    /// `timestamp`.
    Timestamp,
    /// `timestamptz`.
    TimestampTz(Zone),
    /// Either of them as a count of so many microseconds; `zone` is `None` for `timestamp`.
    Epoch { unit: i64, zone: Option<Zone> },
    /// The extension's `hstore`: an object of strings and nulls.
    Hstore,
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
            TypeKind::Base => Self::of_base(ty.oid, &ty.name, dialect),
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

    /// The oids are those of PostgreSQL's `pg_type.dat`; they never change. Types of extensions go
    /// by their names.
    fn of_base(oid: u32, name: &str, dialect: Dialect) -> Self {
        let types = dialect.types();
        match oid {
            16 => Self::Bool,
            20 if types.int8 == NumberStyle::String => Self::Text,
            1700 if types.numeric == NumberStyle::String => Self::Text,
            20 | 21 | 23 | 700 | 701 | 1700 => Self::Number,
            17 if types.bytea == BytesStyle::Base64 => Self::Base64,
            114 => Self::Json,
            3802 => Self::Jsonb,
            1114 => dialect.timestamp(None),
            1184 => dialect.timestamp(Some(dialect.zone())),
            22 => Self::Vector(Box::new(Self::Number)),
            30 => Self::Vector(Box::new(Self::Text)),
            _ => match element_of(oid) {
                Some(element) => Self::Array {
                    element: Box::new(Self::of_base(element, "", dialect)),
                    delimiter: if oid == 1020 { b';' } else { b',' },
                },
                None if is_hstore(name) && dialect != Dialect::Sequin => Self::Hstore,
                None => Self::Text,
            },
        }
    }
}

/// The extension's type, in whatever schema: a base type needs code in C, so that nobody has
/// another of this name by chance; and text that is no hstore's stays text.
fn is_hstore(name: &str) -> bool {
    name.rsplit('.').next() == Some("hstore")
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
        Shape::Timestamp => return moment::write_time(out, text, None),
        Shape::TimestampTz(zone) => return moment::write_time(out, text, Some(*zone)),
        Shape::Epoch { unit, zone } => return moment::write_epoch(out, text, (*unit, *zone)),
        _ => return write_structured(out, shape, text),
    }
    Ok(())
}

/// Documents, bytes, arrays and rows; falls back to a string that holds PostgreSQL's text.
fn write_structured(out: &mut Vec<u8>, shape: &Shape, text: &[u8]) -> Result<(), NotUtf8> {
    let start = out.len();
    let written = match shape {
        Shape::Json => document::write_json(out, text),
        Shape::Jsonb => document::write_jsonb(out, text),
        Shape::Base64 => write_hex(out, text),
        Shape::Hstore => structure::write_hstore(out, text),
        Shape::Array { element, delimiter } => {
            structure::write_array(out, element, *delimiter, text)
        }
        Shape::Vector(element) => structure::write_vector(out, element, text),
        Shape::Composite(fields) => structure::write_composite(out, fields, text),
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

/// Appends a JSON string of base64.
pub(super) fn write_base64(out: &mut Vec<u8>, bytes: &[u8]) -> Option<()> {
    out.push(b'"');
    let start = out.len();
    out.resize(start + base64::encoded_len(bytes.len(), true)?, 0);
    STANDARD.encode_slice(bytes, out.get_mut(start..)?).ok()?;
    out.push(b'"');
    Some(())
}

/// Appends the bytes of `\x00ff` as base64.
pub(super) fn write_hex(out: &mut Vec<u8>, text: &[u8]) -> Option<()> {
    let (pairs, rest) = text.strip_prefix(b"\\x")?.as_chunks::<2>();
    if !rest.is_empty() {
        return None;
    }
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let bytes = pairs.iter().map(|[high, low]| Some(digit(*high)? << 4 | digit(*low)?));
    write_base64(out, &bytes.collect::<Option<Vec<u8>>>()?)
}
