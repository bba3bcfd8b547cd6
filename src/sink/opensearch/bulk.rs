//! One `_bulk` request: its lines, and what the reply says about each of them
//! (<https://docs.opensearch.org/latest/api-reference/document-apis/bulk/>).

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use super::place::Place;
use crate::{
    error::{Class, Classify, Error, Result},
    sink::Outcome,
};

/// The lines of a request, and which change of the batch each action belongs to.
#[derive(Debug, Default)]
pub(super) struct Bulk {
    pub(super) body: Vec<u8>,
    pub(super) actions: Vec<usize>,
}

/// The first line of an action. A version that is older than the document's is refused, an equal
/// one is the same change again.
#[derive(Serialize)]
struct Action<'a> {
    _index: &'a str,
    _id: &'a str,
    version: u64,
    version_type: &'static str,
}

/// What a server answers to a whole request.
#[derive(Debug, Deserialize)]
pub(super) struct Reply {
    #[serde(default)]
    items: Vec<HashMap<String, Item>>,
}

/// What it answers to one action.
#[derive(Debug, Deserialize)]
struct Item {
    status: u16,
    error: Option<Cause>,
}

#[derive(Debug, Default, Deserialize)]
struct Cause {
    #[serde(default)]
    r#type: String,
    #[serde(default)]
    reason: Option<String>,
}

impl Bulk {
    pub(super) fn delete(&mut self, change: usize, place: &Place, version: u64) -> Result<()> {
        self.action("delete", place, version)?;
        self.actions.push(change);
        Ok(())
    }

    pub(super) fn index(
        &mut self,
        change: usize,
        (place, document): (&Place, &[u8]),
        version: u64,
    ) -> Result<()> {
        self.action("index", place, version)?;
        self.body.extend_from_slice(document);
        self.body.push(b'\n');
        self.actions.push(change);
        Ok(())
    }

    fn action(&mut self, word: &str, place: &Place, version: u64) -> Result<()> {
        let Place { index, id } = place;
        let version_type = "external_gte";
        let action = Action { _index: index, _id: id, version, version_type };
        serde_json::to_writer(&mut self.body, &HashMap::from([(word, action)]))
            .class(Class::Bug, || "an action has no JSON")?;
        self.body.push(b'\n');
        Ok(())
    }
}

/// What became of the changes of a batch.
#[derive(Debug)]
pub(super) struct Outcomes {
    pub(super) each: Vec<Outcome>,
    /// Why the first that is unknown is so.
    wait: Option<String>,
}

impl Outcomes {
    pub(super) fn all_durable(changes: usize) -> Self {
        Self { each: (0..changes).map(|_| Outcome::Durable).collect(), wait: None }
    }

    pub(super) fn refuse(&mut self, change: usize, error: Error) {
        if let Some(outcome) = self.each.get_mut(change)
            && !matches!(outcome, Outcome::Refused(_))
        {
            *outcome = Outcome::Refused(error);
        }
    }

    pub(super) fn is_all_durable(&self) -> bool {
        self.each.iter().all(|outcome| matches!(outcome, Outcome::Durable))
    }

    /// Why nothing at all was achieved, where the first change has to wait.
    pub(super) fn outage(&mut self, name: &str) -> Option<Error> {
        let first = matches!(self.each.first(), Some(Outcome::Unknown));
        let why = self.wait.take().filter(|_| first)?;
        Some(Error::retry(format!("{name} asks to wait: {why}")))
    }

    /// Takes over what the server said of each action. An error is one that a person must mend.
    pub(super) fn settle(&mut self, bulk: &Bulk, reply: Reply, name: &str) -> Result<()> {
        if reply.items.len() != bulk.actions.len() {
            let (told, asked) = (reply.items.len(), bulk.actions.len());
            return Err(Error::retry(format!("{name} told of {told} of {asked} actions")));
        }
        for (item, &change) in reply.items.into_iter().zip(&bulk.actions) {
            let Some((word, item)) = item.into_iter().next() else {
                return Err(Error::retry(format!("{name} told nothing of an action")));
            };
            self.settle_one(change, (&word, item), name)?;
        }
        Ok(())
    }

    fn settle_one(&mut self, change: usize, (word, item): (&str, Item), name: &str) -> Result<()> {
        let Cause { r#type, reason } = item.error.unwrap_or_default();
        let status = item.status;
        let mut why = format!("{status} {type}: {}", reason.unwrap_or_default());
        crate::sink::http::cut(&mut why, REASON_BYTES_MAX);
        match (status, r#type.as_str()) {
            (200..=299, _) => {}
            // It has this change, or one that came after it.
            (409, "version_conflict_engine_exception") => {}
            (404, _) if word == "delete" => {}
            // An index that the server itself has locked, as it does when its disk runs full.
            (403 | 429, "cluster_block_exception") | (408 | 409 | 429 | 500..=599, _) => {
                self.unknown(change, why);
            }
            (404, _) => {
                return Err(Error::config(format!("{name} has no such index: {why}")).remedy(
                    "create the index, or allow it with the setting action.auto_create_index",
                ));
            }
            (401 | 403, _) => {
                return Err(Error::config(format!("{name} forbids the write: {why}"))
                    .remedy("give the login the privileges to create and write this index"));
            }
            _ => self.refuse(change, Error::data(format!("{name} refused: {why}"))),
        }
        Ok(())
    }

    fn unknown(&mut self, change: usize, why: String) {
        self.wait.get_or_insert(why);
        if let Some(outcome) = self.each.get_mut(change)
            && matches!(outcome, Outcome::Durable)
        {
            *outcome = Outcome::Unknown;
        }
    }
}

/// A reason is kept up to here.
const REASON_BYTES_MAX: usize = 1000;

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[expect(clippy::needless_pass_by_value, reason = "every caller makes it in place")]
    fn settled(items: serde_json::Value, actions: &[usize]) -> Result<String> {
        let bulk = Bulk { body: Vec::new(), actions: actions.to_vec() };
        let mut outcomes = Outcomes::all_durable(actions.iter().max().map_or(0, |last| last + 1));
        let reply = serde_json::from_value(json!({"errors": true, "items": items})).unwrap();
        outcomes.settle(&bulk, reply, "search")?;
        let letter = |outcome: &Outcome| match outcome {
            Outcome::Durable => 'd',
            Outcome::Refused(_) => 'r',
            Outcome::Unknown => 'u',
        };
        Ok(outcomes.each.iter().map(letter).collect())
    }

    fn item(word: &str, status: u16, kind: &str) -> serde_json::Value {
        json!({word: {"status": status, "error": {"type": kind, "reason": "so"}}})
    }

    #[test]
    fn each_status_of_an_action_has_its_outcome() {
        let conflict = "version_conflict_engine_exception";
        let items = json!([
            {"index": {"status": 201}}, item("index", 409, conflict), item("delete", 404, ""),
            item("index", 400, "mapper_parsing_exception"), item("index", 429, "rejected"),
            item("index", 403, "cluster_block_exception"), item("index", 503, "unavailable"),
        ]);
        assert_eq!(settled(items, &[0, 1, 2, 3, 4, 5, 6]).unwrap(), "dddruuu");
        for item in [item("index", 404, "index_not_found_exception"), item("delete", 403, "x")] {
            assert_eq!(settled(json!([item]), &[0]).unwrap_err().class(), Class::Config);
        }
        assert_eq!(settled(json!([]), &[0]).unwrap_err().class(), Class::Retry);
    }

    #[test]
    fn a_change_of_two_actions_has_the_worse_of_their_outcomes() {
        let (bad, wait) = (item("index", 400, "x"), item("delete", 429, "x"));
        let good = json!({"index": {"status": 200}});
        assert_eq!(settled(json!([wait, bad]), &[0, 0]).unwrap(), "r");
        assert_eq!(settled(json!([bad, wait]), &[0, 0]).unwrap(), "r");
        assert_eq!(settled(json!([wait, good]), &[0, 0]).unwrap(), "u");
    }
}
