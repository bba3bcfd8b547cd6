//! Whether rows that looked different are: docs/adr/0007-verify.md has the argument.
//!
//! ```text
//!   source S1, position L1 ─► target has all up to L1 ─► target T1 ─► no writer of T1's time is
//!   left ─► source S2, position L2 ─► (where the source lacks it: target has all up to L2 ─► T2)
//! ```

use std::{collections::HashMap, time::Duration};

use super::{
    Setting,
    pace::{Pace, Reached},
    pair::{Key, Pair},
    report::Kind,
    side::Texts,
};
use crate::error::Result;

/// A row that moves is looked at so often.
const ATTEMPTS_MAX: u32 = 6;

/// So long is waited for the transactions that write to a table, each time.
const WRITERS_MAX: Duration = Duration::from_secs(5);

/// The first wait before another attempt; it doubles.
const PAUSE: Duration = Duration::from_millis(100);

const MOVES: &str = "it changes too often to be compared";

/// A row as one snapshot has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    /// Another after each write.
    pub(super) version: String,
    /// A hash of each column; `None` is NULL.
    pub(super) digests: Vec<Option<String>>,
}

/// What became of a suspect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Equal,
    Differs(Found),
    /// Why it could not be told.
    Unsettled(String),
}

/// A row that differs at one position.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) kind: Kind,
    /// The places of the columns that differ, of a row that both sides have.
    pub(super) columns: Vec<usize>,
    /// The version of the target's row, where there is one.
    pub(super) copy: Option<String>,
}

/// One key, looked at from both sides.
#[derive(Debug, Default)]
pub(super) struct Look {
    first: Option<Seen>,
    copy: Option<Seen>,
    second: Option<Seen>,
    /// The copy again, for a row that the source lacks.
    copy_again: Option<Seen>,
}

impl Look {
    /// `None`: it moved between the looks.
    fn verdict(&self) -> Option<Verdict> {
        match (&self.second, &self.copy) {
            (None, None) => Some(Verdict::Equal),
            (Some(row), Some(copy)) if row.digests == copy.digests => Some(Verdict::Equal),
            // The version of the first look stands still: at each position between, the one of the
            // target among them, the row was this one.
            (Some(row), copy) if self.first.as_ref().is_some_and(|f| f.version == row.version) => {
                Some(Verdict::Differs(match copy {
                    None => Found { kind: Kind::Missing, columns: Vec::new(), copy: None },
                    Some(copy) => Found {
                        kind: Kind::Changed,
                        columns: differing(row, copy),
                        copy: Some(copy.version.clone()),
                    },
                }))
            }
            (Some(_), _) => None,
            (None, Some(copy)) => match &self.copy_again {
                None => Some(Verdict::Equal),
                // A row that the source had at the target's first position and then lost was
                // removed from the target in between.
                Some(again) if again.version == copy.version => {
                    let (columns, copy) = (Vec::new(), Some(copy.version.clone()));
                    Some(Verdict::Differs(Found { kind: Kind::Extra, columns, copy }))
                }
                Some(_) => None,
            },
        }
    }
}

fn differing(row: &Seen, copy: &Seen) -> Vec<usize> {
    let pairs = row.digests.iter().zip(&copy.digests).enumerate();
    pairs.filter(|(_, (a, b))| a != b).map(|(at, _)| at).collect()
}

/// Tells of each suspect whether it differs, in the order of the keys.
pub(super) async fn confirm(
    setting: &Setting<'_>,
    pace: &Pace,
    pair: &Pair,
    keys: Vec<Key>,
) -> Result<Vec<(Key, Verdict)>> {
    let mut told = Vec::with_capacity(keys.len());
    let mut left = keys;
    let mut reason = MOVES.to_owned();
    for attempt in 0..ATTEMPTS_MAX {
        if left.is_empty() {
            break;
        }
        if attempt > 0 {
            tokio::time::sleep(PAUSE * 2_u32.pow(attempt)).await;
        }
        match look(setting, pace, pair, &left).await? {
            Round::Seen(looks) => {
                reason = MOVES.to_owned();
                let mut moving = Vec::new();
                for (key, look) in left.into_iter().zip(looks) {
                    match look.verdict() {
                        Some(verdict) => told.push((key, verdict)),
                        None => moving.push(key),
                    }
                }
                left = moving;
            }
            Round::Again(why) => reason = why,
            Round::Behind(why) => {
                reason = why;
                break; // the limit of waiting has passed already
            }
        }
    }
    told.extend(left.into_iter().map(|key| (key, Verdict::Unsettled(reason.clone()))));
    Ok(told)
}

enum Round {
    Seen(Vec<Look>),
    Again(String),
    Behind(String),
}

async fn look(setting: &Setting<'_>, pace: &Pace, pair: &Pair, keys: &[Key]) -> Result<Round> {
    let of_source = pair.source.look_up(keys);
    let (rows, position) = setting.origin.read(&of_source).await?;
    let first = seen(rows, keys.len());
    let offset = match reach(setting, pace, position).await? {
        Reached::Yes(offset) => offset,
        Reached::No(why) => return Ok(Round::Behind(why)),
    };
    let Some(copy) = copies(setting, pair, (keys, offset)).await? else {
        return Ok(Round::Again("the sink was rewound meanwhile".to_owned()));
    };
    let writers = setting.origin.wait_for_writers(pair.table.oid, WRITERS_MAX).await?;
    if let Some(why) = writers {
        return Ok(Round::Again(why));
    }
    let (rows, position) = setting.origin.read(&of_source).await?;
    let second = seen(rows, keys.len());
    let mut again = vec![None; keys.len()];
    if second.iter().zip(&copy).any(|(row, copy)| row.is_none() && copy.is_some()) {
        let offset = match reach(setting, pace, position).await? {
            Reached::Yes(offset) => offset,
            Reached::No(why) => return Ok(Round::Behind(why)),
        };
        let Some(copies) = copies(setting, pair, (keys, offset)).await? else {
            return Ok(Round::Again("the sink was rewound meanwhile".to_owned()));
        };
        again = copies;
    }
    let looks = first.into_iter().zip(copy).zip(second).zip(again);
    let looks =
        looks.map(|(((first, copy), second), copy_again)| Look { first, copy, second, copy_again });
    Ok(Round::Seen(looks.collect()))
}

/// Waits until the target has all up to a position of the source.
pub(super) async fn reach(
    setting: &Setting<'_>,
    pace: &Pace,
    position: crate::change::Lsn,
) -> Result<Reached<u64>> {
    let offset = match pace.offset_of(setting, position).await? {
        Reached::Yes(offset) => offset,
        Reached::No(why) => return Ok(Reached::No(why)),
    };
    Ok(match pace.target_at(setting, offset).await? {
        Reached::Yes(()) => Reached::Yes(offset),
        Reached::No(why) => Reached::No(why),
    })
}

/// The target's rows in one snapshot with its progress; `None` where that is before `offset`.
async fn copies(
    setting: &Setting<'_>,
    pair: &Pair,
    (keys, offset): (&[Key], u64),
) -> Result<Option<Vec<Option<Seen>>>> {
    setting.replica.query("begin isolation level repeatable read read only").await?;
    let read = with_progress(setting, &pair.target.look_up(keys)).await;
    setting.replica.query("rollback").await?;
    let (cursor, rows) = read?;
    Ok((cursor >= offset).then(|| seen(rows, keys.len())))
}

async fn with_progress(setting: &Setting<'_>, sql: &str) -> Result<(u64, Texts)> {
    let cursor = setting.cursor().await?;
    Ok((cursor, setting.replica.query(sql).await?))
}

/// The rows by the numbers of their keys.
pub(super) fn seen(rows: Texts, keys: usize) -> Vec<Option<Seen>> {
    let mut found = HashMap::new();
    for row in rows {
        let mut cells = row.into_iter();
        let number = cells.next().flatten().and_then(|text| text.parse::<usize>().ok());
        if let (Some(number), Some(Some(version))) = (number, cells.next()) {
            found.insert(number, Seen { version, digests: cells.collect() });
        }
    }
    (1..=keys).map(|number| found.remove(&number)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(version: &str, value: &str) -> Option<Seen> {
        Some(Seen { version: version.into(), digests: vec![Some(value.into()), None] })
    }

    fn look(first: Option<Seen>, copy: Option<Seen>, second: Option<Seen>) -> Look {
        Look { first, copy, second, copy_again: None }
    }

    #[test]
    fn a_row_differs_only_if_the_source_did_not_write_it_between_the_looks() {
        let (kind, copy) = (Kind::Changed, Some("x".to_owned()));
        let changed = Verdict::Differs(Found { kind, columns: vec![0], copy });
        let (kind, columns) = (Kind::Missing, Vec::new());
        let missing = Verdict::Differs(Found { kind, columns, copy: None });
        let verdict = |first, copy, second| look(first, copy, second).verdict();
        assert_eq!(verdict(row("1", "a"), row("x", "b"), row("1", "a")), Some(changed));
        assert_eq!(verdict(row("1", "a"), None, row("1", "a")), Some(missing));
        assert_eq!(verdict(row("1", "a"), row("x", "a"), row("1", "a")), Some(Verdict::Equal));
        // Written twice, back to the old value: the target may have what was between.
        assert_eq!(verdict(row("1", "a"), row("x", "b"), row("3", "a")), None);
        assert_eq!(verdict(None, None, row("1", "a")), None);
    }

    #[test]
    fn a_row_that_the_source_lacks_is_extra_only_if_the_sink_left_it_alone() {
        let (columns, copy) = (Vec::new(), Some("x".to_owned()));
        let extra = Verdict::Differs(Found { kind: Kind::Extra, columns, copy });
        let mut seen = look(None, row("x", "b"), None);
        assert_eq!(seen.verdict(), Some(Verdict::Equal), "it went meanwhile");
        seen.copy_again = row("x", "b");
        assert_eq!(seen.verdict(), Some(extra));
        seen.copy_again = row("y", "b");
        assert_eq!(seen.verdict(), None, "it was written anew");
    }

    #[test]
    fn a_key_without_a_row_has_no_version() {
        let text = |text: &str| Some(text.to_owned());
        let rows = vec![vec![text("1"), None, None], vec![text("2"), text("v"), text("d")]];
        let seen = seen(rows, 3);
        assert_eq!(seen[0], None);
        assert_eq!(seen[1].as_ref().unwrap().digests, [text("d")]);
        assert_eq!(seen[2], None);
    }
}
