//! What is proved at the end: the file has every committed change once, and replayed it gives the
//! tables, row for row.

use std::{
    collections::{BTreeMap, HashSet},
    fs::File,
    io::{BufRead, BufReader},
    path::Path,
};

use serde::Deserialize;
use serde_json::{Map, Value};

use super::{
    booking::{TABLES, Undone},
    cluster,
};
use crate::{
    change::Lsn,
    error::{Class, Classify, Error, Result, ResultExt},
};

/// More differences than this are counted, not listed.
const LISTED_MAX: usize = 5;

type Record = Map<String, Value>;

/// A line of the file sink, as far as the proof reads it (docs/formats.md, `native`).
#[derive(Debug, Deserialize)]
struct Line {
    op: String,
    source_table: String,
    before: Option<Record>,
    after: Option<Record>,
    #[serde(default)]
    unchanged: Vec<String>,
    source_position: Place,
}

#[derive(Debug, Deserialize)]
struct Place {
    lsn: String,
    tx_id: u32,
    index: u32,
}

/// The changes of the file sink, replayed.
#[derive(Debug, Default)]
pub(super) struct Replay {
    /// Lines of the file.
    pub(super) delivered: u64,
    /// Lines whose position, from which the idempotency key is made, came before.
    pub(super) twice: u64,
    /// Lines whose position is below that of the line before.
    pub(super) disordered: u64,
    /// Changes of what was rolled back.
    pub(super) undone: u64,
    /// Changes that do not fit to the rows before them.
    pub(super) misfits: u64,
    tables: BTreeMap<String, BTreeMap<String, Record>>,
    seen: HashSet<(Lsn, u32)>,
    last: (Lsn, u32),
}

impl Replay {
    /// Reads the file to its end.
    pub(super) fn of(path: &Path, undone: &Undone) -> Result<Self> {
        let failed = || format!("cannot read {}", path.display());
        let file = BufReader::new(File::open(path).class(Class::Damaged, failed)?);
        let mut replay = Self::default();
        for (number, line) in file.lines().enumerate() {
            let line = line.class(Class::Damaged, failed)?;
            let line = serde_json::from_str(&line).map_err(Error::from_line);
            let context = || format!("in line {} of {}", number + 1, path.display());
            replay.add(line.context(context)?, undone).context(context)?;
        }
        Ok(replay)
    }

    fn add(&mut self, line: Line, undone: &Undone) -> Result<()> {
        self.delivered += 1;
        let position = (line.source_position.lsn.parse()?, line.source_position.index);
        self.disordered += u64::from(position < self.last);
        self.last = position;
        if !self.seen.insert(position) {
            self.twice += 1;
            return Ok(());
        }
        self.undone += u64::from(is_of(undone, &line));
        self.misfits += u64::from(!self.apply(line));
        Ok(())
    }

    /// Applies it; whether there was what it changes, and nothing where it inserts.
    fn apply(&mut self, line: Line) -> bool {
        let table = self.tables.entry(line.source_table.clone()).or_default();
        let key = |row: &Record| key_of(&line.source_table, row);
        match (line.op.as_str(), line.before, line.after) {
            ("c", _, Some(after)) => table.insert(key(&after), after).is_none(),
            ("u", before, Some(mut after)) => {
                let Some(mut old) = table.remove(&key(before.as_ref().unwrap_or(&after))) else {
                    return false;
                };
                for column in line.unchanged {
                    let value = old.remove(&column).unwrap_or_default();
                    after.insert(column, value);
                }
                table.insert(key(&after), after).is_none()
            }
            ("d", Some(before), _) => table.remove(&key(&before)).is_some(),
            _ => false,
        }
    }

    /// Different changes.
    pub(super) fn once(&self) -> u64 {
        self.delivered - self.twice
    }

    /// Compares with the tables as they are now; the replayed rows are used up by it.
    pub(super) fn compare(&mut self, url: &str) -> Result<Comparison> {
        let mut session = cluster::connect(url)?;
        let mut found = Comparison::default();
        for (table, _) in TABLES {
            let replayed = self.tables.remove(table).unwrap_or_default();
            let rows = session.execute(&format!("select to_jsonb(t) from {table} t"))?;
            compare_table(&mut found, (table, replayed), &rows)?;
        }
        for (table, rows) in self.tables.iter().filter(|(_, rows)| !rows.is_empty()) {
            found.differ(rows.len() as u64, || format!("{table} is no table of the demo"));
        }
        Ok(found)
    }
}

/// How the replayed rows compare with the tables.
#[derive(Debug, Default)]
pub(super) struct Comparison {
    /// Rows that are equal in both.
    pub(super) equal: u64,
    /// Rows that differ, or that only one of the two has.
    pub(super) different: u64,
    /// The first of those.
    pub(super) examples: Vec<String>,
}

impl Comparison {
    fn differ(&mut self, rows: u64, what: impl FnOnce() -> String) {
        self.different += rows;
        if self.examples.len() < LISTED_MAX {
            self.examples.push(what());
        }
    }
}

fn compare_table(
    found: &mut Comparison,
    (table, mut replayed): (&str, BTreeMap<String, Record>),
    rows: &[Vec<Option<String>>],
) -> Result<()> {
    for row in rows {
        let text = row.first().and_then(Option::as_deref).unwrap_or_default();
        let row: Record = serde_json::from_str(text).map_err(Error::from_line)?;
        let key = key_of(table, &row);
        match replayed.remove(&key) {
            Some(same) if same == row => found.equal += 1,
            Some(_) => found.differ(1, || format!("{table} {key} has other values in the replay")),
            None => found.differ(1, || format!("{table} {key} is missing in the replay")),
        }
    }
    for key in replayed.keys() {
        found.differ(1, || format!("{table} {key} is only in the replay"));
    }
    Ok(())
}

impl Error {
    fn from_line(cause: serde_json::Error) -> Self {
        Error::damaged("it is not a change in the native format").caused_by(cause)
    }
}

fn is_of(undone: &Undone, line: &Line) -> bool {
    let row = line.after.as_ref().or(line.before.as_ref());
    let payment = row.and_then(|row| row.get("payment_id")).and_then(Value::as_i64);
    undone.transactions.contains(&line.source_position.tx_id)
        || payment.is_some_and(|payment| undone.payments.contains(&payment))
}

/// The values of the table's key, as one text.
fn key_of(table: &str, row: &Record) -> String {
    let columns = TABLES.iter().find(|(name, _)| *name == table).map_or(&[][..], |(_, key)| *key);
    let values = columns.iter().map(|column| row.get(*column).unwrap_or(&Value::Null).to_string());
    values.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;

    use super::*;

    fn line(op: &str, position: (&str, u32), rows: &str) -> String {
        let (lsn, index) = position;
        format!(
            r#"{{"op":"{op}","source_table":"payments","source_schema":"public",{rows},"offset":7,
            "source_position":{{"lsn":"{lsn}","tx_id":700,"index":{index}}}}}"#
        )
        .replace('\n', "")
    }

    fn replay(lines: &[String], undone: &Undone) -> Replay {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("changes.jsonl");
        let mut text = String::new();
        lines.iter().for_each(|line| writeln!(text, "{line}").unwrap());
        std::fs::write(&path, text).unwrap();
        Replay::of(&path, undone).unwrap()
    }

    fn compare(replay: &mut Replay, rows: &[&str]) -> Comparison {
        let rows: Vec<_> = rows.iter().map(|row| vec![Some((*row).to_owned())]).collect();
        let mut found = Comparison::default();
        let replayed = replay.tables.remove("payments").unwrap_or_default();
        compare_table(&mut found, ("payments", replayed), &rows).unwrap();
        found
    }

    fn history() -> Vec<String> {
        vec![
            line("c", ("0/10", 0), r#""after":{"payment_id":1,"status":"a","long":"x"}"#),
            line("c", ("0/10", 1), r#""after":{"payment_id":2,"status":"a","long":"y"}"#),
            line(
                "u",
                ("0/20", 0),
                r#""before":null,"after":{"payment_id":1,"status":"b"},"unchanged":["long"]"#,
            ),
            line("d", ("0/30", 0), r#""before":{"payment_id":2}"#),
        ]
    }

    #[test]
    fn a_replay_that_equals_the_table_is_found_equal() {
        let mut replay = replay(&history(), &Undone::default());
        assert_eq!((replay.delivered, replay.twice, replay.disordered), (4, 0, 0));
        assert_eq!((replay.undone, replay.misfits), (0, 0));
        let found = compare(&mut replay, &[r#"{"payment_id":1,"status":"b","long":"x"}"#]);
        assert_eq!((found.equal, found.different), (1, 0));
    }

    #[test]
    fn a_lost_change_shows_in_the_rows() {
        let mut lines = history();
        lines.remove(2);
        let mut replay = replay(&lines, &Undone::default());
        let found = compare(&mut replay, &[r#"{"payment_id":1,"status":"b","long":"x"}"#]);
        assert_eq!((found.equal, found.different), (0, 1));
        assert_eq!(found.examples, ["payments 1 has other values in the replay"]);
    }

    #[test]
    fn a_row_that_only_one_side_has_is_named() {
        let mut replay = replay(&history(), &Undone::default());
        let found = compare(&mut replay, &[r#"{"payment_id":9}"#]);
        assert_eq!(found.different, 2);
        let missing = ["payments 9 is missing in the replay", "payments 1 is only in the replay"];
        assert_eq!(found.examples, missing);
    }

    #[test]
    fn a_change_that_came_twice_is_counted_and_not_applied_again() {
        let mut lines = history();
        lines.push(lines[3].clone());
        let replay = replay(&lines, &Undone::default());
        assert_eq!((replay.delivered, replay.twice, replay.misfits), (5, 1, 0));
    }

    #[test]
    fn changes_out_of_order_and_without_their_row_are_counted() {
        let mut lines = history();
        lines.swap(0, 2);
        let replay = replay(&lines, &Undone::default());
        assert_eq!((replay.disordered, replay.misfits), (2, 1));
    }

    #[test]
    fn what_was_rolled_back_is_recognized_by_its_transaction_or_its_row() {
        let transactions = Undone { transactions: [700].into(), ..Undone::default() };
        assert_eq!(replay(&history(), &transactions).undone, 4);
        let payments = Undone { payments: [2].into(), ..Undone::default() };
        assert_eq!(replay(&history(), &payments).undone, 2);
    }
}
