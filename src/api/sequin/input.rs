//! What a request says, in its query or its body.

use std::time::Duration;

use axum::body::Bytes;
use serde_json::{Map, Value};
use uuid::Uuid;

use super::Failure;

/// The largest batch that a consumer may ask for.
const BATCH_MAX: u64 = 1000;
/// The longest wait, in milliseconds.
const WAIT_MS_MAX: u64 = 300_000;

/// Parameters by name; those of the body go before those of the query.
pub(super) struct Input(Map<String, Value>);

impl Input {
    pub(super) fn read(query: Vec<(String, String)>, body: &Bytes) -> Result<Self, Failure> {
        let query = query.into_iter().map(|(name, text)| (name, Value::String(text)));
        let mut values: Map<String, Value> = query.collect();
        if !body.trim_ascii().is_empty() {
            let body: Map<String, Value> = serde_json::from_slice(body)
                .map_err(|error| Failure::bad(format!("the body is not a JSON object: {error}")))?;
            values.extend(body);
        }
        Ok(Self(values))
    }

    fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    /// How many messages; 1 where nothing is said.
    pub(super) fn batch_size(&self) -> Result<usize, Failure> {
        let value = self.get("batch_size").or_else(|| self.get("max_batch_size"));
        let Some(value) = value else { return Ok(1) };
        let count = match value {
            Value::Number(number) => number.as_u64(),
            Value::String(text) => text.parse().ok(),
            _ => None,
        };
        let count = count.filter(|count| (1..=BATCH_MAX).contains(count));
        count.and_then(|count| usize::try_from(count).ok()).ok_or_else(|| {
            Failure::bad(format!(
                "Invalid `max_batch_size` (or `batch_size`): it must be a whole number from 1 to \
                 {BATCH_MAX}"
            ))
        })
    }

    /// How long to wait for the first message; not at all where nothing is said.
    pub(super) fn wait_for(&self) -> Result<Duration, Failure> {
        let Some(value) = self.get("wait_for") else { return Ok(Duration::ZERO) };
        let ms = match value {
            Value::Number(number) => number.as_u64(),
            Value::String(text) => duration_ms(text.trim()),
            _ => None,
        };
        let Some(ms) = ms else {
            return Err(Failure::bad(
                "Invalid `wait_for`: it must be milliseconds or a duration such as `500ms`, `30s` \
                 or `5m`",
            ));
        };
        match ms <= WAIT_MS_MAX {
            true => Ok(Duration::from_millis(ms)),
            false => Err(Failure::bad(format!(
                "Invalid `wait_for`: it must be at most {WAIT_MS_MAX} ms"
            ))),
        }
    }

    /// The messages that are meant: at least one.
    pub(super) fn ack_ids(&self) -> Result<Vec<Uuid>, Failure> {
        let list = self.get("ack_ids").and_then(Value::as_array).filter(|list| !list.is_empty());
        let ids = list.and_then(|list| list.iter().map(ack_id).collect());
        ids.ok_or_else(|| {
            Failure::bad("Invalid `ack_ids`: it must be a list of at least one UUID from `ack_id`")
        })
    }
}

fn ack_id(value: &Value) -> Option<Uuid> {
    Uuid::try_parse(value.as_str()?).ok()
}

/// `N`, `Nms`, `Ns` or `Nm`.
fn duration_ms(text: &str) -> Option<u64> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (count, unit) = text.split_at_checked(end)?;
    let factor = match unit {
        "" | "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        _ => return None,
    };
    count.parse::<u64>().ok()?.checked_mul(factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn input(body: &str) -> Input {
        Input::read(Vec::new(), &Bytes::copy_from_slice(body.as_bytes())).unwrap()
    }

    #[test]
    fn waits_are_numbers_or_durations_up_to_five_minutes() {
        for (text, ms) in [
            ("{}", 0),
            ("{\"wait_for\":null}", 0),
            ("{\"wait_for\":0}", 0),
            ("{\"wait_for\":120000}", 120_000),
            ("{\"wait_for\":\"1500\"}", 1_500),
            ("{\"wait_for\":\"700ms\"}", 700),
            ("{\"wait_for\":\"30s\"}", 30_000),
            ("{\"wait_for\":\"5m\"}", 300_000),
        ] {
            assert_eq!(input(text).wait_for().unwrap(), Duration::from_millis(ms), "{text}");
        }
        for text in ["300001", "-1", "1.5", "\"\"", "\"s\"", "\"5h\"", "\"6m\"", "true", "[]"] {
            let refused = input(&format!("{{\"wait_for\":{text}}}")).wait_for().unwrap_err();
            assert!(refused.summary.starts_with("Invalid `wait_for`"), "{text}: {refused:?}");
        }
    }

    #[test]
    fn the_old_name_of_the_batch_size_wins() {
        for (text, size) in [
            ("{}", 1),
            ("{\"max_batch_size\":\"7\"}", 7),
            ("{\"batch_size\":1000}", 1000),
            ("{\"batch_size\":2,\"max_batch_size\":9}", 2),
        ] {
            assert_eq!(input(text).batch_size().unwrap(), size, "{text}");
        }
        for text in ["0", "1001", "-1", "\"x\"", "1.5", "true"] {
            let refused = input(&format!("{{\"batch_size\":{text}}}")).batch_size().unwrap_err();
            assert!(refused.summary.starts_with("Invalid `max_batch_size`"), "{text}");
        }
        let query = vec![("batch_size".to_owned(), "3".to_owned())];
        let both = Input::read(query, &Bytes::from_static(b"{\"batch_size\":4}")).unwrap();
        assert_eq!(both.batch_size().unwrap(), 4);
    }

    #[test]
    fn ack_ids_are_uuids_and_there_is_one() {
        let id = "6ba7b812-9dad-51d1-80b4-00c04fd430c8";
        assert_eq!(input(&format!("{{\"ack_ids\":[\"{id}\"]}}")).ack_ids().unwrap().len(), 1);
        for text in ["null", "[]", "\"x\"", "[\"x\"]", "[1]", "[null]"] {
            input(&format!("{{\"ack_ids\":{text}}}")).ack_ids().unwrap_err();
        }
        assert!(Input::read(Vec::new(), &Bytes::from_static(b"[1]")).is_err());
    }
}
