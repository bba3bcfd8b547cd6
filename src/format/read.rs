//! How expressions and functions see a value: PostgreSQL's text -> JSON, as the native format
//! writes it, but for `numeric`, whose text is kept.

use serde_json::Value as Json;

use super::json::{self, Dialect, Shape};
use crate::schema::{Type, TypeKind};

/// How the values of one column are seen; made once for each column.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Reading {
    /// `int2`, `int4`, `int8`: a whole number.
    Integer,
    /// `float4`, `float8`: a number; a string for `NaN` and the infinities.
    Double,
    /// `numeric`: its text, so that no digit is lost.
    Numeric,
    /// `bool`.
    Boolean,
    /// `json` and `jsonb`: the document.
    Document,
    /// What is a string in JSON too, PostgreSQL's text.
    Text,
    /// Times, arrays and rows, as the native format writes them.
    Structured(Structured),
}

/// The shape of a value that is more than a scalar.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Structured(Shape);

impl Structured {
    /// Whether it is a time, whose JSON is a string.
    pub(crate) fn is_time(&self) -> bool {
        matches!(self.0, Shape::Timestamp | Shape::TimestampTz(_))
    }
}

impl Reading {
    /// How values of `ty` are seen.
    pub(crate) fn of(ty: &Type) -> Self {
        match (&ty.kind, ty.oid) {
            (TypeKind::Domain { base }, _) => Self::of(base),
            (TypeKind::Base, 20 | 21 | 23) => Self::Integer,
            (TypeKind::Base, 700 | 701) => Self::Double,
            (TypeKind::Base, 1700) => Self::Numeric,
            (TypeKind::Base, 16) => Self::Boolean,
            (TypeKind::Base, 114 | 3802) => Self::Document,
            _ => match Shape::of(ty, Dialect::Postgres) {
                Shape::Text => Self::Text,
                shape => Self::Structured(Structured(shape)),
            },
        }
    }

    /// The value; a string with PostgreSQL's text for what does not parse as its type says. `None`:
    /// the text is not UTF-8.
    pub(crate) fn read(&self, bytes: &[u8]) -> Option<Json> {
        let text = simdutf8::basic::from_utf8(bytes).ok()?;
        let seen = match self {
            Self::Integer => text.parse::<i64>().ok().map(Json::from),
            Self::Double => text.parse::<f64>().ok().filter(|n| n.is_finite()).map(Json::from),
            Self::Numeric | Self::Text => None,
            Self::Boolean => matches!(text, "t" | "f").then(|| Json::Bool(text == "t")),
            Self::Document => serde_json::from_str(text).ok(),
            Self::Structured(Structured(shape)) => {
                let mut out = Vec::with_capacity(bytes.len() + 16);
                let written = json::write_value(&mut out, shape, bytes).is_ok();
                written.then(|| serde_json::from_slice(&out).ok()).flatten()
            }
        };
        Some(seen.unwrap_or_else(|| Json::String(text.to_owned())))
    }
}

/// A document of type `json` or `jsonb` on one line.
pub(crate) fn one_line(text: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len());
    json::write_value(&mut out, &Shape::Json, text).is_ok().then_some(out)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn no_digit_is_lost_and_nothing_is_refused() {
        let see =
            |oid, text: &str| Reading::of(&Type::base(oid, -1)).read(text.as_bytes()).unwrap();
        assert_eq!(see(20, "9223372036854775807"), json!(i64::MAX));
        assert_eq!(see(1700, "1.500000000000000000001"), json!("1.500000000000000000001"));
        assert_eq!(see(701, "1.5"), json!(1.5));
        assert_eq!(see(701, "NaN"), json!("NaN"));
        assert_eq!(see(16, "t"), json!(true));
        assert_eq!(see(3802, "{\"a\": [1, null]}"), json!({"a": [1, null]}));
        assert_eq!(see(3802, "1e999"), json!("1e999"));
        assert_eq!(see(1007, "{1,NULL}"), json!([1, null]));
        assert_eq!(see(1114, "2026-04-06 09:14:22"), json!("2026-04-06T09:14:22"));
        assert_eq!(see(2950, "a-b"), json!("a-b"));
        assert_eq!(Reading::Text.read(b"\xff"), None);
    }
}
