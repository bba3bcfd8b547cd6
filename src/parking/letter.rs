//! A parked change or dead letter as people ask for it and see it.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use sqlx::{
    QueryBuilder, Row, Sqlite,
    sqlite::{SqlitePool, SqliteRow},
};

use super::State;
use crate::{
    change::Timestamp,
    config::Globs,
    error::{Error, Result},
    sqlite::{integer, unsigned},
};

/// Which one: `sink:offset`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The sink that it is parked for.
    pub sink: String,
    /// Its offset in the journal.
    pub offset: u64,
}

impl Place {
    pub(super) fn unknown(&self) -> Error {
        Error::config(format!("nothing is parked as {self}"))
            .remedy("`walrace dlq list` shows what is")
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.sink, self.offset)
    }
}

impl FromStr for Place {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let parts = text.rsplit_once(':');
        let place = parts.and_then(|(sink, offset)| {
            Some(Self { sink: sink.to_owned(), offset: offset.parse().ok()? })
        });
        place.ok_or_else(|| {
            Error::config(format!("`{text}` names no dead letter"))
                .remedy("write sink:offset, as `walrace dlq list` shows it")
        })
    }
}

/// What is known of a parked change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Letter {
    /// `sink:offset`.
    pub id: String,
    /// The sink.
    pub sink: String,
    /// Its offset in the journal.
    pub offset: u64,
    /// `parked` (it is tried again by itself) or `dead`.
    pub state: String,
    /// `schema.table`; none for a message.
    pub table: Option<String>,
    /// The operation.
    pub op: String,
    /// How often it was tried; 0 for one that waits behind another.
    pub attempts: u32,
    /// Why it is here.
    pub error: String,
    /// When it was parked.
    pub first_at: Timestamp,
    /// When it was last tried.
    pub last_at: Timestamp,
    /// When it is tried next, where it is.
    pub next_at: Option<Timestamp>,
    /// The offset of a later change of its key that was delivered before it.
    pub superseded: Option<u64>,
    /// Who edited it, where somebody did.
    pub edited_by: Option<String>,
    /// Bytes of its rows.
    pub bytes: u64,
}

pub(super) fn from_row(row: &SqliteRow) -> sqlx::Result<Letter> {
    let number = |name| row.try_get::<i64, _>(name);
    let (sink, offset): (String, u64) = (row.try_get("sink")?, unsigned(number("offset")?));
    let state: String = row.try_get("state")?;
    let next_at = Timestamp(number("next_at")?);
    let next_at = (state == "parked" && next_at.0 < i64::MAX).then_some(next_at);
    Ok(Letter {
        id: Place { sink: sink.clone(), offset }.to_string(),
        sink,
        offset,
        state,
        table: row.try_get("table_name")?,
        op: row.try_get("op")?,
        attempts: u32::try_from(number("attempts")?).unwrap_or(u32::MAX),
        error: row.try_get("error")?,
        first_at: Timestamp(number("first_at")?),
        last_at: Timestamp(number("last_at")?),
        next_at,
        superseded: row.try_get::<Option<i64>, _>("superseded")?.map(unsigned),
        edited_by: row.try_get("edited_by")?,
        bytes: unsigned(number("bytes")?),
    })
}

/// Which parked changes: all that every given rule fits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Query {
    /// Of this sink.
    pub sink: Option<String>,
    /// These alone.
    pub places: Vec<Place>,
    /// Only dead letters, or only those that are still tried.
    pub state: Option<State>,
    /// Of tables that fit this glob over `schema.table`.
    pub table: Option<String>,
    /// Whose error holds this text.
    pub error: Option<String>,
    /// Parked at or after this time, and before that.
    pub since: Option<Timestamp>,
    /// See `since`.
    pub until: Option<Timestamp>,
    /// So many at most.
    pub limit: u64,
}

impl Query {
    /// Exactly one.
    pub fn one(place: Place) -> Self {
        Self { places: vec![place], limit: 1, ..Self::default() }
    }

    /// What SQL can decide; the rest is left to [`Query::matches`].
    pub(super) async fn fetch(&self, pool: &SqlitePool) -> sqlx::Result<Vec<SqliteRow>> {
        let mut sql = QueryBuilder::<Sqlite>::new(
            "SELECT sink, offset, state, table_name, op, attempts, error, first_at, last_at, \
             next_at, superseded, edited_by, bytes FROM parked WHERE true",
        );
        if let Some(sink) = &self.sink {
            sql.push(" AND sink = ").push_bind(sink.clone());
        }
        if let Some(state) = self.state {
            sql.push(" AND state = ").push_bind(state.word());
        }
        if let Some(since) = self.since {
            sql.push(" AND first_at >= ").push_bind(since.0);
        }
        if let Some(until) = self.until {
            sql.push(" AND first_at < ").push_bind(until.0);
        }
        for (count, place) in self.places.iter().enumerate() {
            sql.push(if count == 0 { " AND (" } else { " OR " });
            sql.push("(sink = ").push_bind(place.sink.clone());
            sql.push(" AND offset = ").push_bind(integer(place.offset)).push(")");
        }
        if !self.places.is_empty() {
            sql.push(")");
        }
        sql.push(" ORDER BY sink, offset");
        sql.build().fetch_all(pool).await
    }

    pub(super) fn matches(&self, letter: &Letter) -> bool {
        let table = self.table.as_ref().is_none_or(|glob| {
            let parts = letter.table.as_deref().and_then(|table| table.split_once('.'));
            parts.is_some_and(|(schema, name)| {
                Globs::new(std::slice::from_ref(glob)).choose(schema, name)
            })
        });
        table && self.error.as_ref().is_none_or(|text| letter.error.contains(text.as_str()))
    }
}

impl State {
    /// The word of the file and of `walrace dlq`.
    pub fn word(self) -> &'static str {
        match self {
            State::Parked => "parked",
            State::Dead => "dead",
        }
    }
}

impl FromStr for State {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "parked" => Ok(State::Parked),
            "dead" => Ok(State::Dead),
            _ => Err(Error::config(format!("`{text}` is no state")).remedy("parked or dead")),
        }
    }
}
