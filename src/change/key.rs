//! The keys of a change: what parking, lanes and the order per key go by.
//!
//! A key is the primary key, else the index of the replica identity, else the whole table. A change
//! has a set of them: an update of the key has the old and the new one, a truncate has every key of
//! its table. Messages of one prefix share a key. What a sink's rules made of a change has the keys
//! that it had before, and those that the rules gave it.

use sha2::{Digest, Sha256};

use super::{Before, Change, Op, Row, Value};
use crate::schema::Table;

/// A table, or the prefix of messages, in 8 bytes of a hash.
pub type Room = u64;

/// One key, in 16 bytes of a hash over its table and its values.
pub type Key = u128;

/// The keys of one change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keys {
    /// The table that they belong to.
    pub room: Room,
    /// One key, or the old and the new; empty: every key of the table.
    pub rows: Vec<Key>,
    /// Keys of messages that rules gave: whatever the table, what shares one keeps its order.
    pub named: Vec<Key>,
}

/// Between the keys of rows and those of messages, where [`Keys`] are bytes.
const THEN_NAMED: Key = 0;

impl Keys {
    /// Whether the change concerns the table as a whole.
    pub fn is_whole(&self) -> bool {
        self.rows.is_empty()
    }

    /// Whether the two changes must keep their order.
    pub fn meets(&self, other: &Keys) -> bool {
        let row = self.room == other.room
            && (self.is_whole()
                || other.is_whole()
                || self.rows.iter().any(|key| other.rows.contains(key)));
        row || self.named.iter().any(|key| other.named.contains(key))
    }

    /// Adds the keys of another change of the same table.
    pub fn join(&mut self, other: Keys) {
        match self.is_whole() || other.is_whole() {
            true => self.rows.clear(),
            false => add(&mut self.rows, other.rows),
        }
        add(&mut self.named, other.named);
    }

    /// All keys, 16 bytes each, as [`Keys::from_bytes`] reads them.
    pub fn to_bytes(&self) -> Vec<u8> {
        let border = Some(&THEN_NAMED).filter(|_| !self.named.is_empty());
        let keys = self.rows.iter().chain(border).chain(&self.named);
        keys.flat_map(|key| key.to_be_bytes()).collect()
    }

    /// The keys that `bytes` hold, of changes of `room`.
    pub fn from_bytes(room: Room, bytes: &[u8]) -> Self {
        let keys = bytes.as_chunks().0.iter().map(|key| Key::from_be_bytes(*key));
        let mut rows: Vec<Key> = keys.collect();
        let border = rows.iter().position(|key| *key == THEN_NAMED).unwrap_or(rows.len());
        let named = rows.split_off(border).into_iter().skip(1).collect();
        Self { room, rows, named }
    }
}

fn add(keys: &mut Vec<Key>, more: impl IntoIterator<Item = Key>) {
    for key in more {
        if !keys.contains(&key) {
            keys.push(key);
        }
    }
}

impl Change {
    /// The set of its keys.
    pub fn keys(&self) -> Keys {
        let mut keys = self.row_keys();
        let given = self.shaped.as_ref().and_then(|shaped| shaped.key.as_ref());
        let given = given.map(|key| hash(room(&["key"]), &[Value::Text(key.as_bytes())]));
        keys.named.extend(given);
        keys
    }

    /// The same without the key that rules gave its message.
    pub fn row_keys(&self) -> Keys {
        let Some(table) = &self.table else {
            let prefix = self.message.as_ref().map_or("", |message| message.prefix.as_str());
            let room = room(&["message", prefix]);
            return Keys { room, rows: Vec::new(), named: Vec::new() };
        };
        let room = room(&[&table.schema, &table.name]);
        let mut rows = Vec::with_capacity(2);
        for key in self.key_values().into_iter().flatten() {
            add(&mut rows, [hash(room, &key)]);
        }
        let mut keys = Keys { room, rows, named: Vec::new() };
        match self.shaped.as_ref().and_then(|shaped| shaped.source_keys.as_deref()) {
            None => {}
            // Rules took its key away, so that nothing goes by that any more.
            Some(source) if keys.is_whole() => keys.rows.clone_from(&source.rows),
            Some(source) => keys.join(source.clone()),
        }
        keys
    }

    /// Has it keep its order with every change of its table, whatever their keys.
    pub fn concern_the_table(&mut self) {
        let Keys { room, .. } = self.row_keys();
        let keys = Keys { room, rows: Vec::new(), named: Vec::new() };
        self.shaped_mut().source_keys = Some(Box::new(keys));
    }

    /// Has it keep the keys of `source`, which rules made it of, where its own row has others.
    pub fn keep_keys_of(&mut self, source: &Change) {
        if self.table.is_some() && self.key_values() != source.key_values() {
            self.shaped_mut().source_keys = Some(Box::new(source.row_keys()));
        }
    }

    /// The key before and after the change; neither where it concerns the whole table.
    fn key_values(&self) -> [Option<Vec<Value<'_>>>; 2] {
        let Some(table) = self.table.as_ref().filter(|_| self.op != Op::Truncate) else {
            return [None, None];
        };
        let columns = table.key_columns();
        if columns.is_empty() {
            return [None, None];
        }
        [self.old_key(table, &columns), self.new_key(&columns)]
    }

    /// The key before the change, where the old row has all of it.
    fn old_key<'a>(&'a self, table: &Table, columns: &[usize]) -> Option<Vec<Value<'a>>> {
        let sent = |index: usize| match &self.before {
            Before::Nothing => false,
            Before::Full(_) => true,
            Before::Key(_) => table.columns.get(index).is_some_and(|column| column.identity),
        };
        if !columns.iter().all(|&index| sent(index)) {
            return None;
        }
        values(self.before.row()?, columns)
    }

    /// The key after the change; a value that was not sent is as it was.
    fn new_key<'a>(&'a self, columns: &[usize]) -> Option<Vec<Value<'a>>> {
        let new = values(self.after.as_ref()?, columns)?;
        let old = self.before.row();
        let known = columns.iter().zip(new).map(|(&index, value)| match value {
            Value::Unchanged => old.and_then(|row| row.value(index)).unwrap_or(value),
            value => value,
        });
        Some(known.collect())
    }
}

fn values<'a>(row: &'a Row, columns: &[usize]) -> Option<Vec<Value<'a>>> {
    columns.iter().map(|&index| row.value(index)).collect()
}

fn room(words: &[&str]) -> Room {
    let mut hash = Sha256::new();
    for word in words {
        hash.update((word.len() as u64).to_be_bytes());
        hash.update(word);
    }
    let digest = hash.finalize();
    digest.first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes))
}

fn hash(room: Room, values: &[Value]) -> Key {
    let mut hash = Sha256::new();
    hash.update(room.to_be_bytes());
    for value in values {
        match value {
            Value::Null => hash.update([b'n']),
            Value::Unchanged => hash.update([b'u']),
            Value::Text(text) => {
                hash.update([b't']);
                hash.update((text.len() as u64).to_be_bytes());
                hash.update(text);
            }
        }
    }
    let digest = hash.finalize();
    digest.first_chunk().map_or(0, |bytes| u128::from_be_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        change::Transaction,
        schema::{Column, Identity, Type},
    };

    fn table(identity: Identity, primary_key: bool) -> Arc<Table> {
        let column = |name: &str, key| Column {
            name: name.into(),
            ty: Type::base(25, -1),
            primary_key: key && primary_key,
            identity: key && identity != Identity::Nothing || identity == Identity::Full,
            nullable: None,
        };
        let columns = vec![column("a", true), column("b", true), column("c", false)];
        let (schema, name) = ("public".to_owned(), "t".to_owned());
        Arc::new(Table { oid: 1, schema, name, identity, columns })
    }

    fn row(texts: [Option<&'static str>; 3]) -> Row {
        Row::from_values(texts.map(|text| match text {
            Some("?") => Value::Unchanged,
            Some(text) => Value::Text(text.as_bytes()),
            None => Value::Null,
        }))
    }

    fn change(table: &Arc<Table>, op: Op, before: Before, after: Option<Row>) -> Change {
        Change {
            offset: 1,
            op,
            index: 0,
            closes_transaction: true,
            transaction: Transaction::default(),
            table: Some(Arc::clone(table)),
            before,
            after,
            message: None,
            shaped: None,
            backfill: None,
        }
    }

    #[test]
    fn an_update_of_the_key_has_the_old_and_the_new_one() {
        let table = table(Identity::Default, true);
        let insert =
            |a| change(&table, Op::Insert, Before::Nothing, Some(row([Some(a), Some("x"), None])));
        let (one, two) = (insert("1").keys(), insert("2").keys());
        assert_eq!((one.rows.len(), one.meets(&two)), (1, false));
        let before = Before::Key(row([Some("1"), Some("x"), None]));
        let moved =
            change(&table, Op::Update, before, Some(row([Some("2"), Some("x"), None]))).keys();
        assert_eq!(moved.rows.len(), 2);
        assert!(moved.meets(&one) && moved.meets(&two) && one.meets(&moved));
        let delete =
            change(&table, Op::Delete, Before::Key(row([Some("1"), Some("x"), None])), None);
        assert_eq!(delete.keys(), one);
    }

    #[test]
    fn a_key_value_that_was_not_sent_is_the_old_one() {
        let table = table(Identity::Full, true);
        let before = Before::Full(row([Some("long"), Some("x"), Some("1")]));
        let update =
            change(&table, Op::Update, before, Some(row([Some("?"), Some("x"), Some("2")])));
        assert_eq!(update.keys().rows.len(), 1);
    }

    #[test]
    fn a_truncate_and_a_table_without_a_key_meet_every_change_of_the_table() {
        let keyed = table(Identity::Default, true);
        let insert =
            change(&keyed, Op::Insert, Before::Nothing, Some(row([Some("1"), None, None])));
        let truncate = change(&keyed, Op::Truncate, Before::Nothing, None);
        assert!(truncate.keys().is_whole() && truncate.keys().meets(&insert.keys()));
        let bare = table(Identity::Full, false);
        let insert = change(&bare, Op::Insert, Before::Nothing, Some(row([Some("1"), None, None])));
        assert!(insert.keys().is_whole());
    }

    #[test]
    fn values_that_only_look_alike_when_joined_are_different_keys() {
        let table = table(Identity::Default, true);
        let key =
            |a, b| change(&table, Op::Insert, Before::Nothing, Some(row([a, b, None]))).keys().rows;
        assert_ne!(key(Some("1"), Some("23")), key(Some("12"), Some("3")));
        assert_ne!(key(Some("n"), Some("")), key(None, Some("n")));
    }
}
