//! How Debezium's PostgreSQL connector writes a value, by its type: the default mapping of its
//! documentation (<https://debezium.io/documentation/reference/stable/connectors/postgresql.html>),
//! with `decimal.handling.mode = precise`, `time.precision.mode = adaptive` and
//! `hstore.handling.mode = json`.

use super::number::{self, Decimal};
use crate::{
    format::{
        json::{self, write_base64, write_hex},
        time,
    },
    schema::{Type, TypeKind},
};

/// What stands for a large value that PostgreSQL did not send.
const UNAVAILABLE: &str = "__debezium_unavailable_value";
/// The same in an array of uuid: the name-based UUID (version 3, without a namespace) of that text.
const UNAVAILABLE_UUID: &str = "b68a35a7-17ad-35b3-af2a-ae46edb4545a";
const UUID: &str = "io.debezium.data.Uuid";

/// How the text of one type is written; made once for each column.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Form {
    Bool,
    /// An integer of that many bits.
    Int(u8),
    Float32,
    Float64,
    /// A string, with Debezium's name of its meaning.
    Text(Option<&'static str>),
    Bytes,
    /// `numeric` without a scale: each value brings its own.
    VariableDecimal,
    Decimal {
        scale: i32,
        precision: i32,
    },
    Money,
    Date,
    /// A time of day: in milliseconds up to three digits of a second, else in microseconds.
    Time {
        milli: bool,
    },
    ZonedTime,
    /// The same two for `timestamp`.
    Timestamp {
        milli: bool,
    },
    /// `timestamptz`, with that many digits of a second.
    ZonedTimestamp(usize),
    Interval,
    /// `bit(1)`.
    Bit,
    Bits {
        length: i32,
    },
    Point,
    Hstore,
    Array {
        element: Box<Form>,
        delimiter: u8,
    },
}

/// Why a value has no form in this format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unfit {
    /// The text is not what its type says, or is beyond what the form can hold.
    Value,
    /// It was not sent, and no placeholder can be told from a value.
    Unavailable,
}

impl Form {
    pub(super) fn of(ty: &Type) -> Self {
        match &ty.kind {
            TypeKind::Base => Self::of_base(ty.oid, ty.modifier, &ty.name),
            TypeKind::Enum | TypeKind::Range | TypeKind::Composite { .. } => Self::Text(None),
            TypeKind::Domain { base } => Self::of(base),
            TypeKind::Array { element, delimiter } => {
                let modifier = if ty.modifier >= 0 { ty.modifier } else { element.modifier };
                let element = Type { modifier, ..(**element).clone() };
                Self::Array {
                    element: Box::new(Self::of(&element)),
                    delimiter: u8::try_from(*delimiter).unwrap_or(b','),
                }
            }
        }
    }

    /// The oids are those of PostgreSQL's `pg_type.dat`; types of extensions go by their names.
    fn of_base(oid: u32, modifier: i32, name: &str) -> Self {
        let milli = (0..=3).contains(&modifier);
        match oid {
            16 => Self::Bool,
            21 => Self::Int(16),
            23 => Self::Int(32),
            20 | 26 => Self::Int(64),
            700 => Self::Float32,
            701 => Self::Float64,
            17 => Self::Bytes,
            790 => Self::Money,
            1700 => numeric(modifier),
            1082 => Self::Date,
            1083 => Self::Time { milli },
            1266 => Self::ZonedTime,
            1114 => Self::Timestamp { milli },
            1184 => {
                Self::ZonedTimestamp(usize::try_from(modifier).map_or(6, |digits| digits.min(6)))
            }
            1186 => Self::Interval,
            2950 => Self::Text(Some(UUID)),
            114 | 3802 => Self::Text(Some("io.debezium.data.Json")),
            142 => Self::Text(Some("io.debezium.data.Xml")),
            3614 => Self::Text(Some("io.debezium.data.Tsvector")),
            1560 if modifier == 1 => Self::Bit,
            1560 | 1562 => Self::Bits { length: if modifier > 0 { modifier } else { i32::MAX } },
            600 => Self::Point,
            _ => match (json::element_of(oid), name.rsplit('.').next()) {
                (Some(element), _) => Self::Array {
                    element: Box::new(Self::of_base(element, modifier, "")),
                    delimiter: if oid == 1020 { b';' } else { b',' },
                },
                (None, Some("hstore")) => Self::Hstore,
                (None, Some("ltree")) => Self::Text(Some("io.debezium.data.Ltree")),
                _ => Self::Text(None),
            },
        }
    }

    /// Appends the value. `nested`: arrays may have several dimensions. Where it fails, a part may
    /// be left in `out`.
    #[inline]
    pub(super) fn write(&self, out: &mut Vec<u8>, text: &[u8], nested: bool) -> Result<(), Unfit> {
        let written = match self {
            Self::Int(_) if json::is_number(text) => {
                out.extend_from_slice(text);
                Some(())
            }
            Self::Text(_) => json::write_string(out, text).ok(),
            Self::Array { element, delimiter } => {
                let depth_max = if nested { json::ARRAY_DEPTH_MAX } else { 1 };
                json::write_elements(out, text, (*delimiter, depth_max), |out, text| {
                    element.write(out, text, nested).ok()
                })
            }
            Self::Bool | Self::Bit => write_bool(out, text),
            Self::Float32 | Self::Float64 => write_float(out, text),
            Self::Bytes => write_hex(out, text),
            Self::Bits { .. } => write_bits(out, text),
            Self::VariableDecimal | Self::Decimal { .. } | Self::Money => {
                self.write_decimal(out, text)
            }
            _ => std::str::from_utf8(text).ok().and_then(|text| self.write_structured(out, text)),
        };
        written.ok_or(Unfit::Value)
    }

    fn write_decimal(&self, out: &mut Vec<u8>, text: &[u8]) -> Option<()> {
        match self {
            Self::Money => {
                write_base64(out, &number::money(std::str::from_utf8(text).ok()?)?.unscaled())
            }
            Self::Decimal { scale, .. } => {
                let mut decimal = Decimal::parse(text)?;
                decimal.rescale(*scale)?;
                write_base64(out, &decimal.unscaled())
            }
            _ => {
                let mut decimal = Decimal::parse(text)?;
                decimal.shorten();
                out.extend_from_slice(b"{\"scale\":");
                write_integer(out, decimal.scale.into());
                out.extend_from_slice(b",\"value\":");
                write_base64(out, &decimal.unscaled())?;
                out.push(b'}');
                Some(())
            }
        }
    }

    fn write_structured(&self, out: &mut Vec<u8>, text: &str) -> Option<()> {
        let number = match self {
            Self::Date => match text {
                "infinity" => i32::MAX.into(),
                "-infinity" => i32::MIN.into(),
                _ => time::date(text)?,
            },
            Self::Time { milli } => time::clock(text)? / if *milli { 1000 } else { 1 },
            Self::Timestamp { milli } => {
                let micros = match text {
                    "infinity" => INFINITY,
                    "-infinity" => MINUS_INFINITY,
                    _ => time::moment(text)?.micros()?,
                };
                micros.div_euclid(if *milli { 1000 } else { 1 })
            }
            Self::Interval => time::interval(text)?,
            Self::ZonedTime => return write_zoned_time(out, text),
            Self::ZonedTimestamp(digits) => return write_zoned_timestamp(out, text, *digits),
            Self::Point => return write_point(out, text),
            Self::Hstore => return write_hstore(out, text),
            _ => return None,
        };
        write_integer(out, number);
        Some(())
    }

    /// Appends what stands for a value that was not sent.
    pub(super) fn write_unavailable(&self, out: &mut Vec<u8>) -> Result<(), Unfit> {
        match self {
            Self::Text(_) => json::write_str(out, UNAVAILABLE),
            Self::Bytes => write_base64(out, UNAVAILABLE.as_bytes()).ok_or(Unfit::Unavailable)?,
            Self::Hstore => {
                json::write_str(out, &format!("{{\"{UNAVAILABLE}\":\"{UNAVAILABLE}\"}}"));
            }
            Self::Array { element, .. } if **element == Self::Text(Some(UUID)) => {
                out.push(b'[');
                json::write_str(out, UNAVAILABLE_UUID);
                out.push(b']');
            }
            Self::Array { element, .. } if matches!(**element, Self::Text(_) | Self::Bytes) => {
                out.push(b'[');
                element.write_unavailable(out)?;
                out.push(b']');
            }
            // The placeholder's bytes as numbers.
            Self::Array { element, .. } if matches!(**element, Self::Int(32 | 64) | Self::Date) => {
                for (count, byte) in UNAVAILABLE.bytes().enumerate() {
                    out.push(if count == 0 { b'[' } else { b',' });
                    write_integer(out, byte.into());
                }
                out.push(b']');
            }
            _ => return Err(Unfit::Unavailable),
        }
        Ok(())
    }
}

/// What PostgreSQL's JDBC driver, and so Debezium, has for the timestamps `infinity` and
/// `-infinity`.
const INFINITY: i64 = 9_223_372_036_825_200_000;
const MINUS_INFINITY: i64 = -9_223_372_036_832_400_000;

/// The modifier holds precision and scale
/// (`numeric_typmod_precision` and `numeric_typmod_scale` of PostgreSQL's `numeric.c`).
fn numeric(modifier: i32) -> Form {
    if modifier < 4 {
        return Form::VariableDecimal;
    }
    let packed = modifier - 4;
    let scale = ((packed & 0x7FF) ^ 1024) - 1024;
    Form::Decimal { scale, precision: packed >> 16 & 0xFFFF }
}

pub(super) fn write_integer(out: &mut Vec<u8>, number: i64) {
    out.extend_from_slice(itoa::Buffer::new().format(number).as_bytes());
}

fn write_bool(out: &mut Vec<u8>, text: &[u8]) -> Option<()> {
    out.extend_from_slice(match text {
        b"t" | b"1" => b"true",
        b"f" | b"0" => b"false",
        _ => return None,
    });
    Some(())
}

fn write_float(out: &mut Vec<u8>, text: &[u8]) -> Option<()> {
    match text {
        b"NaN" | b"Infinity" | b"-Infinity" => json::write_string(out, text).ok(),
        _ => json::is_number(text).then(|| out.extend_from_slice(text)),
    }
}

/// `10100001` as a number in little-endian bytes, as few as hold it.
fn write_bits(out: &mut Vec<u8>, text: &[u8]) -> Option<()> {
    let byte = |bits: &[u8]| {
        bits.iter().try_fold(0_u8, |sum, bit| match bit {
            b'0' => Some(sum << 1),
            b'1' => Some(sum << 1 | 1),
            _ => None,
        })
    };
    let mut bytes = text.rchunks(8).map(byte).collect::<Option<Vec<u8>>>()?;
    while bytes.last() == Some(&0) {
        bytes.pop();
    }
    write_base64(out, &bytes)
}

/// `09:14:22.5+02` -> `"07:14:22.5Z"`.
fn write_zoned_time(out: &mut Vec<u8>, text: &str) -> Option<()> {
    use std::io::Write;

    let (clock, zone) = time::split_zone(text);
    let micros = (time::clock(clock)? - time::offset(zone)?).rem_euclid(time::DAY);
    let (seconds, fraction) = (micros / 1_000_000, micros % 1_000_000);
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    write!(out, "\"{hours:02}:{minutes:02}:{seconds:02}").ok()?;
    if fraction > 0 {
        let digits = format!(".{fraction:06}");
        out.extend_from_slice(digits.trim_end_matches('0').as_bytes());
    }
    out.extend_from_slice(b"Z\"");
    Some(())
}

/// `2026-04-06 09:14:22.1+00` -> `"2026-04-06T09:14:22.100000Z"`.
fn write_zoned_timestamp(out: &mut Vec<u8>, text: &str, digits: usize) -> Option<()> {
    use std::io::Write;

    if matches!(text, "infinity" | "-infinity") {
        json::write_str(out, text);
        return Some(());
    }
    let moment = time::moment(text)?;
    if moment.zone != "+00" {
        return None;
    }
    let sign = match moment.year {
        ..0 => "-",
        10_000.. => "+",
        _ => "",
    };
    write!(out, "\"{sign}{:04}{}T", moment.year.abs(), moment.month_day).ok()?;
    let (seconds, fraction) = (moment.clock / 1_000_000, moment.clock % 1_000_000);
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    write!(out, "{hours:02}:{minutes:02}:{seconds:02}").ok()?;
    if digits > 0 {
        let fraction = format!(".{fraction:06}");
        out.extend_from_slice(fraction.get(..=digits)?.as_bytes());
    }
    out.extend_from_slice(b"Z\"");
    Some(())
}

/// `(1.5,2)` -> the coordinates, and the same as well-known binary.
fn write_point(out: &mut Vec<u8>, text: &str) -> Option<()> {
    let (x, y) = text.strip_prefix('(')?.strip_suffix(')')?.split_once(',')?;
    let mut binary = vec![1, 1, 0, 0, 0];
    for (name, text) in [(&b"{\"x\":"[..], x), (b",\"y\":", y)] {
        json::is_number(text.as_bytes()).then_some(())?;
        out.extend_from_slice(name);
        out.extend_from_slice(text.as_bytes());
        binary.extend_from_slice(&text.parse::<f64>().ok()?.to_le_bytes());
    }
    out.extend_from_slice(b",\"wkb\":");
    write_base64(out, &binary)?;
    out.extend_from_slice(b",\"srid\":null}");
    Some(())
}

/// `"a"=>"1", "b"=>NULL` -> a string that holds `{"a":"1","b":null}`.
fn write_hstore(out: &mut Vec<u8>, text: &str) -> Option<()> {
    let mut object = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        object.push(b',');
        let (key, after) = quoted(rest)?;
        json::write_str(&mut object, &key);
        object.push(b':');
        let after = after.strip_prefix("=>")?;
        rest = if let Some(after) = after.strip_prefix("NULL") {
            object.extend_from_slice(b"null");
            after
        } else {
            let (value, after) = quoted(after)?;
            json::write_str(&mut object, &value);
            after
        };
        rest = if rest.is_empty() { rest } else { rest.strip_prefix(", ")? };
    }
    crate::format::table::close_object(&mut object, 0);
    json::write_string(out, &object).ok()
}

/// A text in double quotes at the head, with its escapes undone, and what follows it.
fn quoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut chars = text.strip_prefix('"')?.chars();
    loop {
        match chars.next()? {
            '"' => return Some((value, chars.as_str())),
            '\\' => value.push(chars.next()?),
            other => value.push(other),
        }
    }
}
