//! Puts rows of the target right, while the sink goes on: what is written is what the sink's own
//! changes led to at the very position that the target has, so that the next ones fit on top.
//!
//! The sink's progress is held meanwhile: it cannot commit, and the target stands still.

use std::{sync::Arc, time::Duration};

use super::{
    Setting,
    confirm::{Found, Seen, reach, seen},
    pace::{Pace, Reached},
    pair::{Key, Pair},
    report::Kind,
};
use crate::{
    change::{Before, Change, Op, Row, Transaction, Value},
    error::{Class, Error, Result},
    sink::Mending,
    transform::Transform,
};

/// Rows that are put right in one transaction.
pub(super) const ROWS_MAX: usize = 50;

const ATTEMPTS_MAX: u32 = 6;

/// The sink waits with its commit for no longer than this.
const HOLD_MAX: Duration = Duration::from_secs(2);

const PAUSE: Duration = Duration::from_millis(100);

/// Puts the rows of some differences right where that is sound at this moment; why not all of them
/// are, where that is so. Which ones are is for the caller to look at.
pub(super) async fn repair(
    setting: &mut Setting<'_>,
    pace: &Pace,
    (pair, rules): (&Pair, &mut Transform),
    found: &[(Key, Found)],
) -> Result<Option<String>> {
    let mut why = None;
    for some in found.chunks(ROWS_MAX) {
        match attempt(setting, pace, (pair, &mut *rules), some).await {
            Err(error) if error.class() == Class::Data => {
                // One by one: that names the row, and the others pass.
                for one in some.chunks(1) {
                    match attempt(setting, pace, (pair, &mut *rules), one).await {
                        Err(error) if error.class() == Class::Data => {
                            let key = one.iter().flat_map(|(key, _)| key).cloned();
                            let key = key.collect::<Vec<_>>().join(", ");
                            let named = error.context(format!("while repairing ({key})"));
                            why.get_or_insert(named.to_string());
                        }
                        outcome => why = why.or(outcome?),
                    }
                }
            }
            outcome => why = why.or(outcome?),
        }
    }
    Ok(why)
}

async fn attempt(
    setting: &mut Setting<'_>,
    pace: &Pace,
    (pair, rules): (&Pair, &mut Transform),
    found: &[(Key, Found)],
) -> Result<Option<String>> {
    let mut why = None;
    for attempt in 0..ATTEMPTS_MAX {
        if attempt > 0 {
            tokio::time::sleep(PAUSE * 2_u32.pow(attempt)).await;
        }
        let keys: Vec<Key> = found.iter().map(|(key, _)| key.clone()).collect();
        let named = pair.table.columns.iter().map(|column| column.name.clone());
        let sql = pair.source.texts(&keys, &named.collect::<Vec<_>>());
        let (rows, position) = setting.origin.read(&sql).await?;
        let rows = seen(rows, keys.len());
        let offset = match reach(setting, pace, position).await? {
            Reached::Yes(offset) => offset,
            Reached::No(why) => return Ok(Some(why)),
        };
        let done = mend(setting, (pair, &mut *rules), (found, &rows), offset).await;
        why = match done {
            Ok(None) => {
                setting.replica.commit().await?;
                return Ok(None);
            }
            Ok(Some(why)) => Some(why),
            Err(error) if error.class() == Class::Retry => Some(error.to_string()),
            Err(error) => {
                setting.replica.roll_back().await?;
                return Err(error);
            }
        };
        setting.replica.roll_back().await?;
    }
    Ok(why)
}

/// Writes in a transaction that is left open; why it cannot be done now, where that is so.
async fn mend(
    setting: &mut Setting<'_>,
    (pair, rules): (&Pair, &mut Transform),
    (found, rows): (&[(Key, Found)], &[Option<Seen>]),
    offset: u64,
) -> Result<Option<String>> {
    let progress = setting.replica.hold().await?;
    if progress.is_none_or(|progress| progress.cursor < offset) {
        return Ok(Some("the sink was rewound meanwhile".to_owned()));
    }
    if let Some(why) = setting.origin.wait_for_writers(pair.table.oid, HOLD_MAX).await? {
        return Ok(Some(why));
    }
    let keys: Vec<Key> = found.iter().map(|(key, _)| key.clone()).collect();
    let (second, _) = setting.origin.read(&pair.source.look_up(&keys)).await?;
    let second = seen(second, keys.len());
    let copies = setting.replica.query(&pair.target.look_up(&keys)).await?;
    let copies = seen(copies, keys.len());
    let mut mendings = Vec::new();
    let mut moved = 0;
    for (((key, found), row), (second, copy)) in
        found.iter().zip(rows).zip(second.iter().zip(&copies))
    {
        let (version, now) = (row.as_ref(), second.as_ref());
        match (version, now) {
            (Some(row), Some(now)) if row.version == now.version => {
                if copy.as_ref().is_none_or(|copy| copy.digests != now.digests) {
                    mendings.push(Mending::Put(shaped(pair, rules, &row.digests)?));
                }
            }
            (None, None) => match copy {
                None => {}
                Some(copy)
                    if found.kind == Kind::Extra && found.copy.as_ref() == Some(&copy.version) =>
                {
                    mendings.push(Mending::Remove(key_row(pair, key)));
                }
                Some(_) => moved += 1,
            },
            _ => moved += 1,
        }
    }
    setting.replica.mend(&pair.mapped, mendings).await?;
    // Those that are done are done; the others are found again by who looks.
    Ok(match moved {
        moved if moved == keys.len() => Some("the source writes the rows meanwhile".to_owned()),
        _ => None,
    })
}

/// A row of the source as the rules leave it.
fn shaped(pair: &Pair, rules: &mut Transform, texts: &[Option<String>]) -> Result<Row> {
    let values = texts.iter().map(|text| match text {
        Some(text) => Value::Text(text.as_bytes()),
        None => Value::Null,
    });
    let change = Change {
        offset: 0,
        op: Op::Read,
        index: 0,
        closes_transaction: true,
        transaction: Transaction::default(),
        table: Some(Arc::clone(&pair.table)),
        before: Before::Nothing,
        after: Some(Row::from_values(values)),
        message: None,
        shaped: None,
        backfill: None,
    };
    let mut made = rules.shape(change)?.into_iter();
    let row = made.next().and_then(|change| change.after);
    row.ok_or_else(|| Error::bug(format!("the rules leave nothing of a row of {}", pair.table)))
}

/// A row that has nothing but its key.
fn key_row(pair: &Pair, key: &Key) -> Row {
    let mut places = vec![Value::Null; pair.projected.table.columns.len()];
    let columns = pair.mapped.columns.iter().enumerate();
    let of_key = columns.filter(|(at, _)| pair.mapped.key.contains(at));
    for ((_, column), text) in of_key.zip(key) {
        if let Some(value) = places.get_mut(column.place) {
            *value = Value::Text(text.as_bytes());
        }
    }
    Row::from_values(places)
}
