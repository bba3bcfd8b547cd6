//! The ledger's check, proved on what PostgreSQL itself sends: a decoder of pgoutput in a hundred
//! lines that shares nothing with the product's turns a slot into native changes, and the check
//! must pass them all, and notice each one that is taken away.

use std::{collections::HashMap, time::Duration};

use serde_json::{Map, Value, json};

use super::*;

#[tokio::test]
async fn the_check_passes_what_postgres_sent_and_notices_each_change_that_is_missing() {
    let cluster = Cluster::start().await;
    cluster.sql("create publication p for all tables").await;
    cluster.sql("select pg_create_logical_replication_slot('s', 'pgoutput')").await;
    Ledger::create(&cluster).await;
    let load = Ledger::load(&cluster, Pace { seed: 42, sessions: 3, pause: Duration::ZERO });
    let enough = async || (load.committed() >= 400).then_some(());
    wait_for(Duration::from_secs(60), enough, || "no 400 commits".into()).await;
    load.stop().await;
    let tables = Ledger::final_state(&cluster).await;
    let messages = Ledger::messages(&cluster).await;
    let changes = changes_of(&cluster, "s").await;

    let report = check(&changes, &tables, &messages, Delivery::Once);
    report.assert_clean();
    assert!(report.transactions >= 400);
    let op = |letter: &str| changes.iter().filter(|change| change["op"] == letter).count();
    let unchanged = |change: &&Value| !change["unchanged"].as_array().unwrap().is_empty();
    for letter in ["c", "u", "d", "t", "m"] {
        assert!(op(letter) > 0, "the load made no change of kind {letter}");
    }
    assert!(changes.iter().filter(unchanged).count() > 0, "no value was left unsent");
    for missing in (0..changes.len()).step_by(changes.len() / 25) {
        let mut less = changes.clone();
        less.remove(missing);
        let report = check(&less, &tables, &messages, Delivery::Once);
        assert!(!report.problems.is_empty(), "nobody missed {}", changes[missing]);
    }
}

/// All changes of a slot in the native envelope.
async fn changes_of(cluster: &Cluster, slot: &str) -> Vec<Value> {
    let query = format!(
        "select data from pg_logical_slot_get_binary_changes('{slot}', null, null, \
         'proto_version', '1', 'publication_names', 'p', 'messages', 'true')"
    );
    let mut stream = Stream::default();
    for row in cluster.connect().await.query(&query, &[]).await.unwrap() {
        stream.message(&mut Bytes(row.get(0)));
    }
    stream.changes
}

/// <https://www.postgresql.org/docs/current/protocol-logicalrep-message-formats.html>
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn take(&mut self, count: usize) -> Vec<u8> {
        let (head, rest) = self.0.split_at(count);
        self.0 = rest;
        head.to_vec()
    }

    fn number(&mut self, bytes: usize) -> u64 {
        self.take(bytes).iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
    }

    fn letter(&mut self) -> char {
        char::from(self.take(1)[0])
    }

    fn text(&mut self) -> String {
        let length = self.0.iter().position(|byte| *byte == 0).unwrap();
        let text = String::from_utf8(self.take(length)).unwrap();
        self.take(1);
        text
    }
}

#[derive(Default)]
struct Stream {
    /// Name and columns of each table by its oid.
    tables: HashMap<u64, (String, Vec<(String, u64)>)>,
    commit_lsn: u64,
    index: u64,
    changes: Vec<Value>,
}

impl Stream {
    fn message(&mut self, bytes: &mut Bytes) {
        match bytes.letter() {
            'B' => (self.commit_lsn, self.index) = (bytes.number(8), 0),
            'R' => self.relation(bytes),
            'I' => {
                let (table, _) = self.tuple_of(bytes);
                let (after, _) = self.tuple(table, bytes);
                self.push(table, json!({"op": "c", "after": after}));
            }
            'U' => {
                let (table, mut before) = (bytes.number(4), Value::Null);
                if bytes.letter() != 'N' {
                    before = self.tuple(table, bytes).0;
                    bytes.letter();
                }
                let (after, unchanged) = self.tuple(table, bytes);
                let rest = json!({"op": "u", "before": before, "after": after});
                self.push(table, rest);
                self.changes.last_mut().unwrap()["unchanged"] = unchanged;
            }
            'D' => {
                let (table, _) = self.tuple_of(bytes);
                let (before, _) = self.tuple(table, bytes);
                self.push(table, json!({"op": "d", "before": before}));
            }
            'T' => {
                let count = bytes.number(4);
                bytes.take(1);
                for _ in 0..count {
                    let table = bytes.number(4);
                    self.push(table, json!({"op": "t"}));
                }
            }
            'M' => {
                bytes.take(9);
                let prefix = bytes.text();
                let length = bytes.number(4) as usize;
                let content = String::from_utf8(bytes.take(length)).unwrap();
                let message = json!({"prefix": prefix, "content": content});
                self.push(0, json!({"op": "m", "message": message}));
            }
            _ => {}
        }
    }

    fn relation(&mut self, bytes: &mut Bytes) {
        let oid = bytes.number(4);
        bytes.text();
        let name = bytes.text();
        bytes.take(1);
        let columns = (0..bytes.number(2)).map(|_| {
            bytes.take(1);
            let column = (bytes.text(), bytes.number(4));
            bytes.take(4);
            column
        });
        let columns = columns.collect();
        self.tables.insert(oid, (name, columns));
    }

    fn tuple_of(&self, bytes: &mut Bytes) -> (u64, char) {
        (bytes.number(4), bytes.letter())
    }

    /// A row, and the names of the columns that were not sent.
    fn tuple(&self, table: u64, bytes: &mut Bytes) -> (Value, Value) {
        let (mut row, mut unchanged) = (Map::new(), Vec::new());
        let count = bytes.number(2) as usize;
        for (name, oid) in &self.tables[&table].1[..count] {
            match bytes.letter() {
                'n' => drop(row.insert(name.clone(), Value::Null)),
                'u' => unchanged.push(name.as_str()),
                _ => {
                    let length = bytes.number(4) as usize;
                    let text = String::from_utf8(bytes.take(length)).unwrap();
                    row.insert(name.clone(), shape(&text, *oid));
                }
            }
        }
        (Value::Object(row), json!(unchanged))
    }

    fn push(&mut self, table: u64, rest: Value) {
        let lsn = format!("{:X}/{:X}", self.commit_lsn >> 32, self.commit_lsn & 0xFFFF_FFFF);
        let row = if rest["after"].is_null() { &rest["before"] } else { &rest["after"] };
        let mut change = json!({
            "offset": self.changes.len(), "before": null, "after": null, "unchanged": [],
            "source_table": self.tables.get(&table).map(|(name, _)| name), "key": row,
            "source_position": {"lsn": lsn, "index": self.index},
        });
        let Value::Object(rest) = rest else { unreachable!("it is made above") };
        change.as_object_mut().unwrap().extend(rest);
        self.changes.push(change);
        self.index += 1;
    }
}

/// The JSON of a value as `to_jsonb` makes it, for the types of the ledger.
fn shape(text: &str, oid: u64) -> Value {
    match oid {
        20 | 23 | 1700 => serde_json::from_str(text).unwrap(),
        1009 => {
            json!(text.trim_matches(['{', '}']).replace('"', "").split(',').collect::<Vec<_>>())
        }
        1184 => json!(text.replace(' ', "T") + ":00"),
        _ => json!(text),
    }
}
