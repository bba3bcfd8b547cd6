//! What a stream's entry is made of, by the sink's format.

use std::{borrow::Cow, fmt};

use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::{
    change::{Change, Op},
    config::Format,
    error::{Class, Classify, Error, Result},
};

/// A script hands at most about 8000 values to one call.
const FIELDS_MAX: usize = 1_000;

/// The names and values of one entry.
pub(super) type Fields = Vec<(Cow<'static, str>, Vec<u8>)>;

/// How a message becomes an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// The message in one field, and what consumers go by beside it.
    Whole,
    /// A field for each member of the message, as Sequin writes them.
    Members,
    /// The four fields of WalStream, whose message is protobuf.
    Walstream,
}

impl Shape {
    /// The shape of a format whose messages are of this media type.
    pub(super) fn of(format: Format, content_type: &str) -> Self {
        match format {
            Format::Sequin => Self::Members,
            _ if content_type.contains("protobuf") => Self::Walstream,
            _ => Self::Whole,
        }
    }

    /// The entry of a change with this message and key.
    pub(super) fn fields(
        self,
        change: &Change,
        payload: Vec<u8>,
        key: Option<Vec<u8>>,
    ) -> Result<Fields> {
        // First, so that of two with the same name a reader's map keeps the entry's own.
        let headers = change.headers();
        let mut fields: Fields =
            headers.map(|(name, value)| (Cow::Owned(name.to_owned()), value.into())).collect();
        match self {
            Self::Whole => whole(&mut fields, change, payload, key),
            Self::Members => members(&mut fields, &payload)?,
            Self::Walstream => walstream(&mut fields, change, payload),
        }
        if fields.len() > FIELDS_MAX {
            let count = fields.len();
            return Err(Error::data(format!("an entry of {count} fields, above {FIELDS_MAX}")));
        }
        Ok(fields)
    }
}

fn whole(fields: &mut Fields, change: &Change, payload: Vec<u8>, key: Option<Vec<u8>>) {
    fields.push((Cow::Borrowed("payload"), payload));
    if let Some(key) = key {
        fields.push((Cow::Borrowed("key"), key));
    }
    fields.push((Cow::Borrowed("op"), change.op.letter().to_string().into_bytes()));
    if let Some(table) = &change.table {
        fields.push((Cow::Borrowed("table"), table.full_name().into_bytes()));
    }
    fields.push((Cow::Borrowed("offset"), change.offset.to_string().into_bytes()));
    let idempotency_key = change.idempotency_key().into_bytes();
    fields.push((Cow::Borrowed("idempotency_key"), idempotency_key));
}

fn walstream(fields: &mut Fields, change: &Change, payload: Vec<u8>) {
    let time_ms = change.transaction.commit_time.0.div_euclid(1_000);
    let table = change.table.as_ref().map(|table| table.full_name()).unwrap_or_default();
    let operation = match change.op {
        Op::Read => Op::Insert.word(), // WalStream knows no other word for a row that is there
        op => op.word(),
    };
    fields.push((Cow::Borrowed("payload"), payload));
    fields.push((Cow::Borrowed("time_ms"), time_ms.to_string().into_bytes()));
    fields.push((Cow::Borrowed("table"), table.into_bytes()));
    fields.push((Cow::Borrowed("operation"), operation.to_uppercase().into_bytes()));
}

/// Texts as they are, everything else as JSON.
fn members(fields: &mut Fields, payload: &[u8]) -> Result<()> {
    let refused = || "an entry of the format `sequin` is a JSON object";
    let mut reader = serde_json::Deserializer::from_slice(payload);
    let members = reader.deserialize_map(Members).class(Class::Data, refused)?;
    reader.end().class(Class::Data, refused)?;
    for (name, value) in members {
        let text = value.get();
        let value = if text.starts_with('"') {
            serde_json::from_str::<String>(text).class(Class::Data, refused)?
        } else {
            text.to_owned()
        };
        fields.push((Cow::Owned(name), value.into_bytes()));
    }
    Ok(())
}

/// The members of an object in their order.
struct Members;

impl<'de> Visitor<'de> for Members {
    type Value = Vec<(String, &'de RawValue)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut members = Vec::with_capacity(4);
        while let Some(member) = map.next_entry()? {
            members.push(member);
        }
        Ok(members)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sink::testing;

    fn change() -> Change {
        testing::batch(5..6).changes.remove(0)
    }

    fn entry(shape: Shape, change: &Change, payload: &str) -> Vec<(String, String)> {
        let fields = shape.fields(change, payload.into(), Some(b"k".to_vec())).unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        fields.into_iter().map(|(name, value)| (name.into_owned(), text(value))).collect()
    }

    fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect()
    }

    #[test]
    fn a_whole_message_comes_with_what_consumers_go_by() {
        let mut change = change();
        change.shaped_mut().headers.push(("tenant".into(), "a".into()));
        change.shaped_mut().late = true;
        assert_eq!(
            entry(Shape::Whole, &change, "{}"),
            pairs(&[
                ("tenant", "a"),
                ("walrace-late", "true"),
                ("payload", "{}"),
                ("key", "k"),
                ("op", "c"),
                ("table", "public.t"),
                ("offset", "5"),
                ("idempotency_key", &change.idempotency_key()),
            ])
        );
    }

    #[test]
    fn members_keep_their_order_texts_raw_and_the_rest_as_json() {
        let message = r#"{"record":{"a": "ü"},"changes":null,"action":"up\"date","n":1.50}"#;
        assert_eq!(
            entry(Shape::Members, &change(), message),
            pairs(&[
                ("record", r#"{"a": "ü"}"#),
                ("changes", "null"),
                ("action", "up\"date"),
                ("n", "1.50")
            ])
        );
        for body in ["[1]", "1", "{} {}", "no", ""] {
            let error = Shape::Members.fields(&change(), body.into(), None).unwrap_err();
            assert_eq!(error.class(), Class::Data, "{body}");
        }
    }

    #[test]
    fn walstream_has_its_four_fields() {
        assert_eq!(Shape::of(Format::Native, "application/x-protobuf"), Shape::Walstream);
        assert_eq!(Shape::of(Format::Native, "application/json"), Shape::Whole);
        let expected = |operation| {
            pairs(&[
                ("payload", "p"),
                ("time_ms", "1775466862000"),
                ("table", "public.t"),
                ("operation", operation),
            ])
        };
        let mut change = change();
        assert_eq!(entry(Shape::Walstream, &change, "p"), expected("INSERT"));
        change.op = Op::Read;
        assert_eq!(entry(Shape::Walstream, &change, "p"), expected("INSERT"));
        change.op = Op::Truncate;
        assert_eq!(entry(Shape::Walstream, &change, "p"), expected("TRUNCATE"));
    }

    #[test]
    fn an_entry_of_more_fields_than_a_script_can_pass_is_refused() {
        let mut change = change();
        let header = |n: usize| (format!("h{n}"), String::new());
        change.shaped_mut().headers = (0..FIELDS_MAX).map(header).collect();
        let error = Shape::Whole.fields(&change, Vec::new(), None).unwrap_err();
        assert_eq!(error.class(), Class::Data);
    }
}
