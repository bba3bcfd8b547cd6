//! Parked changes and dead letters: what a target or a rule refused, and what waits behind it.
//!
//! ```text
//!            refused                    attempts used up, or a rule failed
//!  change ───────────► parked (retried) ─────────────────────────────────► dead letter
//!     └─ shares a key with one that waits ─► parked (behind it)             │  │  │
//!                          delivered in order, once that one is ◄── retry ──┘  │  └─ drop
//!                                                                       edit ──┘
//! ```
//!
//! One SQLite file in `dlq_path` holds them whole, for all sinks: the journal may go. Each sink's
//! loop owns a [`Lot`], its part of the file with an index in memory.

mod edit;
mod index;
mod letter;
mod lot;
mod stored;

use std::path::Path;

use sqlx::{Row, sqlite::SqlitePool};

pub use self::{
    index::{Due, State},
    letter::{Letter, Place, Query},
    lot::{Lot, Policy, Stand, Why, within},
};
use crate::{
    change::{Change, Keys, Timestamp},
    error::{Class, Classify, Error, Result},
    sqlite::{self, Named, integer, unsigned},
};

/// The file's name within `dlq_path`.
pub const FILE: &str = "dead-letters.sqlite";

const NAMED: Named = Named { what: "the dead letters", setting: "dlq_path" };
const STEPS: [&str; 1] = [include_str!("0001_parked.sql")];

fn failed(action: &str, object: &str, error: sqlx::Error) -> Error {
    sqlite::failed(NAMED, action, object, error)
}

/// The file of all sinks. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Parking {
    pool: SqlitePool,
}

impl Parking {
    /// Opens or creates the file in `directory`, which is created too.
    pub async fn open(directory: &Path) -> Result<Self> {
        let shown = directory.display();
        std::fs::create_dir_all(directory)
            .class(Class::Config, || format!("cannot create the directory of dead letters {shown}"))
            .map_err(|error| error.remedy("set dlq_path to a directory that can be written"))?;
        let pool = sqlite::open(&directory.join(FILE), NAMED, &STEPS).await?;
        Ok(Self { pool })
    }

    /// Opens the file in `directory` without changing it; `None` where there is none.
    pub async fn inspect(directory: &Path) -> Result<Option<Self>> {
        let pool = sqlite::inspect(&directory.join(FILE), NAMED, &STEPS).await?;
        Ok(pool.map(|pool| Self { pool }))
    }

    /// What `query` asks for, by sink and offset, without the changes themselves.
    pub async fn list(&self, query: &Query) -> Result<Vec<Letter>> {
        let failed = |error| failed("list", "what is parked", error);
        let rows = query.fetch(&self.pool).await.map_err(failed)?;
        let letters = rows.iter().map(letter::from_row).collect::<sqlx::Result<Vec<_>>>();
        let limit = usize::try_from(query.limit).unwrap_or(usize::MAX);
        Ok(letters.map_err(failed)?.into_iter().filter(|l| query.matches(l)).take(limit).collect())
    }

    /// One with its change.
    pub async fn show(&self, place: &Place) -> Result<(Letter, Change)> {
        let name = place.to_string();
        let failed = |error| failed("read", &name, error);
        let row = sqlx::query("SELECT * FROM parked WHERE sink = ? AND offset = ?")
            .bind(&place.sink)
            .bind(integer(place.offset))
            .fetch_optional(&self.pool)
            .await
            .map_err(failed)?;
        let row = row.ok_or_else(|| place.unknown())?;
        let text: String = row.try_get("change").map_err(failed)?;
        Ok((letter::from_row(&row).map_err(failed)?, stored::from_text(&text)?))
    }

    /// Lets those of `query` be tried again at once, each one more time; how many there are.
    pub async fn retry(&self, query: &Query) -> Result<u64> {
        let now = Timestamp::now().0;
        self.each(query, "retry", "UPDATE parked SET state = 'parked', next_at = ?1", now).await
    }

    /// Gives those of `query` up; how many there are.
    pub async fn drop(&self, query: &Query) -> Result<u64> {
        self.each(query, "drop", "DELETE FROM parked", 0).await
    }

    async fn each(&self, query: &Query, action: &str, sql: &str, now: i64) -> Result<u64> {
        let letters = self.list(&Query { limit: u64::MAX, ..query.clone() }).await?;
        let failed = |error| failed(action, "dead letters", error);
        let mut transaction = self.pool.begin().await.map_err(failed)?;
        let sql = format!("{sql} WHERE sink = ?2 AND offset = ?3");
        let mut done = 0;
        for letter in &letters {
            let statement = sqlx::query(sqlx::AssertSqlSafe(sql.clone()));
            let statement = statement.bind(now).bind(&letter.sink).bind(integer(letter.offset));
            done += statement.execute(&mut *transaction).await.map_err(failed)?.rows_affected();
        }
        transaction.commit().await.map_err(failed)?;
        Ok(done)
    }

    /// Replaces values of the new row (of a delete the old one) by `values`, a JSON object of
    /// columns; the change is tried again at once. It keeps its order by the keys that it had, and
    /// by those that `keys` tells of it now.
    pub async fn edit(
        &self,
        place: &Place,
        values: &serde_json::Map<String, serde_json::Value>,
        (who, keys): (&str, impl FnOnce(&Change) -> Keys),
    ) -> Result<()> {
        let (_, change) = self.show(place).await?;
        let change = edit::apply(change, values)?;
        let mut joined = self.keys(place).await?;
        joined.join(keys(&change));
        let name = place.to_string();
        let failed = |error| failed("edit", &name, error);
        let done = sqlx::query(
            "UPDATE parked SET change = ?, keys = ?, edited_by = ?, state = 'parked', next_at = ?,
                 retry_seq = NULL
             WHERE sink = ? AND offset = ?",
        )
        .bind(stored::to_text(&change)?)
        .bind(joined.to_bytes())
        .bind(who)
        .bind(Timestamp::now().0)
        .bind(&place.sink)
        .bind(integer(place.offset))
        .execute(&self.pool)
        .await
        .map_err(failed)?;
        if done.rows_affected() == 0 { Err(place.unknown()) } else { Ok(()) }
    }

    async fn keys(&self, place: &Place) -> Result<Keys> {
        let name = place.to_string();
        let failed = |error| failed("read", &name, error);
        let row = sqlx::query("SELECT room, keys FROM parked WHERE sink = ? AND offset = ?")
            .bind(&place.sink)
            .bind(integer(place.offset))
            .fetch_optional(&self.pool)
            .await
            .map_err(failed)?;
        lot::keys(&row.ok_or_else(|| place.unknown())?).map_err(failed)
    }

    /// Removes the changes of `sink` that are `gone`, and forgets what was sent and not taken.
    async fn tidy(&self, sink: &str, gone: &[u64], open: &[u64]) -> Result<()> {
        let failed = |error| failed("tidy up", sink, error);
        let removed = gone.iter().map(|offset| ("DELETE FROM parked", *offset));
        let forgotten = open.iter().map(|offset| ("UPDATE parked SET retry_seq = NULL", *offset));
        let deeds: Vec<_> = removed.chain(forgotten).collect();
        if deeds.is_empty() {
            return Ok(());
        }
        let mut transaction = self.pool.begin().await.map_err(failed)?;
        for (sql, offset) in deeds {
            let sql = format!("{sql} WHERE sink = ? AND offset = ?");
            sqlx::query(sqlx::AssertSqlSafe(sql))
                .bind(sink)
                .bind(integer(offset))
                .execute(&mut *transaction)
                .await
                .map_err(failed)?;
        }
        transaction.commit().await.map_err(failed)
    }

    /// How many changes of `sink` are parked, and how many of them are dead letters.
    pub async fn count(&self, sink: &str) -> Result<(u64, u64)> {
        let failed = |error| failed("count", sink, error);
        let row = sqlx::query(
            "SELECT count(*), count(*) FILTER (WHERE state = 'dead') FROM parked WHERE sink = ?",
        )
        .bind(sink)
        .fetch_one(&self.pool)
        .await
        .map_err(failed)?;
        let number = |index: usize| row.try_get::<i64, _>(index).map(unsigned).map_err(failed);
        Ok((number(0)?, number(1)?))
    }

    /// Closes the file.
    pub async fn close(&self) {
        self.pool.close().await;
    }
}
