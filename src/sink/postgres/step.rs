//! What one change asks of the target's table.

use super::table::Plan;
use crate::{
    change::{Before, Change, Op, Row, Value},
    error::{Error, Result},
};

/// What a change asks for. The rows are the source's, whole or with values that were not sent.
#[derive(Debug)]
pub(super) enum Step {
    /// The row is there with these values. `is_new`: the source had none of this key.
    Put {
        row: Row,
        is_new: bool,
    },
    /// The row is there already, and gets the values that were sent.
    Patch {
        row: Row,
    },
    /// The row of this key goes.
    Remove {
        row: Row,
    },
    /// The row of the old key gets the new one, and then these values.
    Move {
        old: Row,
        row: Row,
    },
    /// Of a table without a key: one more row.
    Append {
        row: Row,
    },
    /// Of a table without a key: one row that equals this one goes.
    RemoveWhole {
        row: Row,
    },
    /// Of a table without a key: one row that equals the old one gets new values.
    ReplaceWhole {
        old: Row,
        row: Row,
    },
    Truncate,
}

impl Step {
    /// Reads a change of a row or table.
    pub(super) fn of(change: &Change, plan: &Plan) -> Result<Self> {
        let has_key = !plan.key.is_empty();
        match change.op {
            Op::Truncate => Ok(Step::Truncate),
            Op::Insert | Op::Read => {
                let row = change.after.clone().ok_or_else(|| lacks("its row"))?;
                Ok(match has_key {
                    true => Step::Put { row, is_new: true },
                    false => Step::Append { row },
                })
            }
            Op::Update if has_key => update(change, plan),
            Op::Update => {
                let Before::Full(old) = &change.before else { return Err(lacks(WHOLE)) };
                let row = completed(change)?;
                match is_whole(&row, plan) {
                    true => Ok(Step::ReplaceWhole { old: old.clone(), row }),
                    false => Err(lacks("a value")),
                }
            }
            Op::Delete if has_key => {
                let row = change.before.row().cloned().ok_or_else(|| lacks("the key"))?;
                Ok(Step::Remove { row })
            }
            Op::Delete => match &change.before {
                Before::Full(row) => Ok(Step::RemoveWhole { row: row.clone() }),
                _ => Err(lacks(WHOLE)),
            },
            Op::Message => Err(Error::bug("a logical message has no table")),
        }
    }
}

const WHOLE: &str = "the whole old row, which a table without a key needs";

fn update(change: &Change, plan: &Plan) -> Result<Step> {
    let row = completed(change)?;
    let new = key(&row, plan);
    if new.contains(&Value::Unchanged) {
        return Err(lacks("the key"));
    }
    if let Some(old) = change.before.row()
        && key(old, plan) != new
    {
        return Ok(Step::Move { old: old.clone(), row });
    }
    Ok(match is_whole(&row, plan) {
        true => Step::Put { row, is_new: false },
        false => Step::Patch { row },
    })
}

/// The new row, with what was not sent taken from the old one where that has it.
fn completed(change: &Change) -> Result<Row> {
    let row = change.after.as_ref().ok_or_else(|| lacks("its row"))?;
    let Some(old) = change.before.row() else { return Ok(row.clone()) };
    if !row.values().any(|value| value == Value::Unchanged) {
        return Ok(row.clone());
    }
    let columns = change.table.as_ref().map_or(&[][..], |table| &table.columns);
    let is_full = matches!(change.before, Before::Full(_));
    let values = row.values().zip(old.values()).enumerate().map(|(index, (new, old))| {
        let sent = is_full || columns.get(index).is_some_and(|column| column.identity);
        if new == Value::Unchanged && sent { old } else { new }
    });
    Ok(Row::from_values(values))
}

/// The values of the key.
pub(super) fn key<'a>(row: &'a Row, plan: &Plan) -> Vec<Value<'a>> {
    let columns = plan.key.iter().filter_map(|&at| plan.columns.get(at));
    columns.map(|column| row.value(column.source).unwrap_or(Value::Null)).collect()
}

/// Whether each value that is written was sent.
pub(super) fn is_whole(row: &Row, plan: &Plan) -> bool {
    let values: Vec<_> = row.values().collect();
    let sent = |source: usize| values.get(source).is_some_and(|v| *v != Value::Unchanged);
    plan.columns.iter().all(|column| sent(column.source))
}

fn lacks(what: &str) -> Error {
    Error::data(format!("the change does not carry {what}"))
}
