//! Replays native JSON changes of the ledger and compares the outcome with its tables.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::ledger::KEYS;

const PROBLEMS_MAX: usize = 20;

/// What a sink promises, and so what is a mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Delivery {
    /// Each change once, in the order of commits.
    Once,
    /// A run of changes may come again; a change that came before is left out of the replay.
    AtLeastOnce,
}

/// The rows of each table, as a multiset.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct State(BTreeMap<String, BTreeMap<String, Vec<Value>>>);

impl State {
    pub(crate) fn insert(&mut self, table: &str, row: Value) {
        let key = identity(table, &row);
        self.0.entry(table.to_owned()).or_default().entry(key).or_default().push(row);
    }

    fn remove(&mut self, table: &str, key: &str) -> Option<Value> {
        let rows = self.0.get_mut(table)?;
        let same = rows.get_mut(key)?;
        let row = same.pop();
        if same.is_empty() {
            rows.remove(key);
        }
        row
    }

    fn contains(&self, table: &str, key: &str) -> bool {
        self.0.get(table).is_some_and(|rows| rows.contains_key(key))
    }

    /// The tables of `names` alone; `*` stands for all.
    pub(crate) fn only(mut self, names: &[&str]) -> Self {
        if !names.contains(&"*") {
            self.0.retain(|table, _| names.contains(&table.as_str()));
        }
        self
    }

    /// Every table but `name`.
    pub(crate) fn without(mut self, name: &str) -> Self {
        self.0.remove(name);
        self
    }

    /// Fails with the rows that are in one of them alone.
    #[track_caller]
    pub(crate) fn assert_equal(&self, other: &Self) {
        let (more, less) = (self.minus(other), other.minus(self));
        assert!(more.is_empty() && less.is_empty(), "only here: {more:#?}\nlacking: {less:#?}");
    }

    pub(crate) fn count(&self, table: &str) -> usize {
        self.0.get(table).map_or(0, |rows| rows.values().map(Vec::len).sum())
    }

    /// Rows of `self` that `other` has not, or not as often, or not with the same values.
    fn minus(&self, other: &Self) -> Vec<String> {
        let mut rows = Vec::new();
        for (table, keys) in &self.0 {
            for (key, same) in keys {
                let others = other.0.get(table).and_then(|keys| keys.get(key));
                let canonical = |rows: &[Value]| rows.iter().map(canonical).collect::<Vec<_>>();
                if others.map(|rows| canonical(rows)) != Some(canonical(same)) {
                    let text: String = canonical(same).join(" and ").chars().take(300).collect();
                    rows.push(format!("{table} {text}"));
                }
            }
        }
        rows
    }
}

/// What a check found.
#[derive(Clone, Debug, Default)]
pub(crate) struct Report {
    pub(crate) changes: usize,
    pub(crate) transactions: usize,
    /// Changes that came more than once.
    pub(crate) duplicates: usize,
    /// Everything that is wrong, at most twenty of it.
    pub(crate) problems: Vec<String>,
}

impl Report {
    /// Fails with everything that was found, unless that is nothing.
    #[track_caller]
    pub(crate) fn assert_clean(&self) {
        assert!(
            self.problems.is_empty(),
            "of {} changes in {} transactions, {} twice:\n{}",
            self.changes,
            self.transactions,
            self.duplicates,
            self.problems.join("\n")
        );
    }

    fn problem(&mut self, text: String) {
        if self.problems.len() < PROBLEMS_MAX {
            self.problems.push(text);
        }
    }
}

/// Replays all changes since the ledger was created and compares with its tables: nothing lost,
/// nothing invented, in order, and under [`Delivery::Once`] nothing twice. `messages` is how many
/// logical messages each committed transaction sent.
pub(crate) fn check(
    changes: &[Value],
    tables: &State,
    messages: &BTreeMap<u64, u64>,
    delivery: Delivery,
) -> Report {
    let mut report = Report { changes: changes.len(), ..Report::default() };
    let first = first_deliveries(changes, delivery, &mut report);
    check_order(&first, &mut report);
    let mut replayed = State::default();
    let mut sent = BTreeMap::<u64, u64>::new();
    for change in first {
        if let Err(problem) = apply(change, &mut replayed, &mut sent) {
            report.problem(format!("{problem}: {}", shorten(change)));
        }
    }
    for row in tables.minus(&replayed) {
        report.problem(format!("lost or outdated in the replay: {row}"));
    }
    for row in replayed.minus(tables) {
        report.problem(format!("only in the replay: {row}"));
    }
    if &sent != messages {
        report.problem(format!("messages of the replay {sent:?}, of the tables {messages:?}"));
    }
    report
}

/// The changes without those whose position came before.
fn first_deliveries<'a>(
    changes: &'a [Value],
    delivery: Delivery,
    report: &mut Report,
) -> Vec<&'a Value> {
    let mut seen = BTreeSet::new();
    let mut first = Vec::with_capacity(changes.len());
    for change in changes {
        if seen.insert(position(change)) {
            first.push(change);
            continue;
        }
        report.duplicates += 1;
        if delivery == Delivery::Once {
            report.problem(format!("came twice: {}", shorten(change)));
        }
    }
    first
}

/// Offsets and positions grow, and the indexes of a transaction leave none out.
fn check_order(changes: &[&Value], report: &mut Report) {
    let mut last: Option<(u64, (u64, u64))> = None;
    for change in changes {
        let Some(offset) = change["offset"].as_u64() else {
            report.problem(format!("no offset: {}", shorten(change)));
            continue;
        };
        let (lsn, index) = position(change);
        let begins = last.is_none_or(|(_, (last_lsn, _))| last_lsn != lsn);
        report.transactions += usize::from(begins);
        let expected = match last {
            Some((_, (_, last_index))) if !begins => last_index + 1,
            _ => 0,
        };
        if index != expected {
            report.problem(format!("index {index} instead of {expected}: {}", shorten(change)));
        }
        if last.is_some_and(|last| last.0 >= offset || last.1 >= (lsn, index)) {
            report.problem(format!("out of order after {last:?}: {}", shorten(change)));
        }
        last = Some((offset, (lsn, index)));
    }
}

fn apply(
    change: &Value,
    state: &mut State,
    sent: &mut BTreeMap<u64, u64>,
) -> Result<(), &'static str> {
    let table = change["source_table"].as_str().unwrap_or_default();
    let (before, after) = (&change["before"], &change["after"]);
    match change["op"].as_str().ok_or("no op")? {
        "c" | "r" => {
            let key = identity(table, after);
            if has_key(table) && state.contains(table, &key) {
                return Err("an insert over a row that exists");
            }
            check_key(change, table, after)?;
            state.insert(table, after.clone());
        }
        "u" => {
            let old = if before.is_null() { after } else { before };
            let old = state.remove(table, &identity(table, old)).ok_or("an update of no row")?;
            check_key(change, table, after)?;
            let row = complete(after, &old, &change["unchanged"]);
            let key = identity(table, &row);
            if has_key(table) && state.contains(table, &key) {
                return Err("an update onto a row that exists");
            }
            state.insert(table, row);
        }
        "d" => {
            check_key(change, table, before)?;
            state.remove(table, &identity(table, before)).ok_or("a delete of no row")?;
        }
        "t" => {
            state.0.remove(table);
        }
        "m" => *sent.entry(message_of(change).ok_or("a message of nobody")?).or_default() += 1,
        _ => return Err("an unknown op"),
    }
    Ok(())
}

/// The envelope's own `key` names the same row.
fn check_key(change: &Value, table: &str, row: &Value) -> Result<(), &'static str> {
    let same = !has_key(table) || identity(table, &change["key"]) == identity(table, row);
    same.then_some(()).ok_or("`key` does not name the row")
}

/// The new row, with the values that were not sent taken from the old one.
fn complete(after: &Value, old: &Value, unchanged: &Value) -> Value {
    let mut row = after.clone();
    for column in unchanged.as_array().into_iter().flatten().filter_map(Value::as_str) {
        row[column] = old[column].clone();
    }
    row
}

/// The transaction number that is the content of a ledger's message, whatever it is wrapped in.
fn message_of(change: &Value) -> Option<u64> {
    let message = [&change["message"], &change["after"]].into_iter().find(|m| !m.is_null())?;
    let content = message.get("content").unwrap_or(message);
    content.as_str()?.parse().ok()
}

/// LSN of the commit and index within the transaction.
fn position(change: &Value) -> (u64, u64) {
    let position = &change["source_position"];
    let lsn = position["lsn"].as_str().and_then(|text| {
        let (high, low) = text.split_once('/')?;
        let high = u64::from_str_radix(high, 16).ok()?;
        Some(high << 32 | u64::from_str_radix(low, 16).ok()?)
    });
    let lsn = lsn.unwrap_or_else(|| panic!("no LSN: {}", shorten(change)));
    let index = position["index"].as_u64();
    (lsn, index.unwrap_or_else(|| panic!("no index: {}", shorten(change))))
}

fn has_key(table: &str) -> bool {
    !key_columns(table).is_empty()
}

fn key_columns(table: &str) -> &'static [&'static str] {
    KEYS.iter().find(|(name, _)| *name == table).map_or(&[], |(_, columns)| columns)
}

/// The key of a row as text; the whole row where the table has no key.
fn identity(table: &str, row: &Value) -> String {
    match key_columns(table) {
        [] => canonical(row),
        columns => columns.iter().map(|column| format!("{} ", row[column])).collect(),
    }
}

/// JSON with its members in the order of their names.
fn canonical(row: &Value) -> String {
    match row.as_object() {
        Some(members) => format!("{:?}", members.iter().collect::<BTreeMap<_, _>>()),
        None => row.to_string(),
    }
}

fn shorten(change: &Value) -> String {
    let text = change.to_string();
    text.chars().take(600).collect()
}
