//! Where a new sink starts.

use std::{borrow::Cow, fmt, str::FromStr};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::{
    change::Timestamp,
    error::{Error, Result},
};

/// A resume token is never shorter, so that a mistyped word is not taken for one.
const TOKEN_BYTES_MIN: usize = 20;

/// Where a new sink starts: `"start"`, `"now"`, an offset, an RFC 3339 time or a resume token.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum From {
    /// With the oldest change of the journal.
    #[default]
    Start,
    /// With the next change that is committed.
    Now,
    /// With the change of this offset.
    Offset(u64),
    /// With the first change that was committed at this time or later.
    Time(Timestamp),
    /// After the change that this resume token names.
    Token(String),
}

impl FromStr for From {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "start" => return Ok(From::Start),
            "now" => return Ok(From::Now),
            _ => {}
        }
        if let Ok(offset) = text.parse::<u64>() {
            return Ok(From::Offset(offset));
        }
        if let Ok(time) = text.parse::<jiff::Timestamp>() {
            return Ok(From::Time(Timestamp(time.as_microsecond())));
        }
        let token = |b: u8| b.is_ascii_alphanumeric() || b"-_.=+/".contains(&b);
        if text.len() >= TOKEN_BYTES_MIN && text.bytes().all(token) {
            return Ok(From::Token(text.to_owned()));
        }
        Err(Error::config("not a place to start from").remedy(
            "write \"start\", \"now\", an offset, a time such as \"2026-04-06T09:14:22Z\" or a \
             resume token",
        ))
    }
}

impl fmt::Display for From {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            From::Start => f.write_str("start"),
            From::Now => f.write_str("now"),
            From::Offset(offset) => offset.fmt(f),
            From::Time(time) => time.fmt(f),
            From::Token(token) => f.write_str(token),
        }
    }
}

impl Serialize for From {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            From::Offset(offset) => serializer.serialize_u64(*offset),
            other => serializer.collect_str(other),
        }
    }
}

impl<'de> Deserialize<'de> for From {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Visitor)
    }
}

struct Visitor;

impl de::Visitor<'_> for Visitor {
    type Value = From;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("\"start\", \"now\", an offset, a time or a resume token")
    }

    fn visit_u64<E: de::Error>(self, offset: u64) -> Result<From, E> {
        Ok(From::Offset(offset))
    }

    fn visit_i64<E: de::Error>(self, offset: i64) -> Result<From, E> {
        u64::try_from(offset).map(From::Offset).map_err(E::custom)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<From, E> {
        text.parse().map_err(E::custom)
    }
}

impl JsonSchema for From {
    fn schema_name() -> Cow<'static, str> {
        "From".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "Where a new sink starts: `\"start\"` (the oldest change of the \
                            journal), `\"now\"`, an offset, an RFC 3339 time or a resume token.",
            "type": ["string", "integer"],
            "minimum": 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_way_to_write_it_reads_back_as_written() {
        let token = "w1.AAECAwQFBgcICQoLDA0ODw";
        for text in ["start", "now", "42", "2026-04-06T09:14:22.000000Z", token] {
            assert_eq!(text.parse::<From>().unwrap().to_string(), text);
        }
        assert_eq!("42".parse::<From>().unwrap(), From::Offset(42));
        assert_eq!(
            "1970-01-01T00:00:01Z".parse::<From>().unwrap(),
            From::Time(Timestamp(1_000_000))
        );
    }

    #[test]
    fn a_mistyped_word_is_not_a_token() {
        assert!("strat".parse::<From>().is_err());
        assert!("".parse::<From>().is_err());
        assert!("-1".parse::<From>().is_err());
    }
}
