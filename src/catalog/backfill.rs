//! Backfills in the catalog: what was asked for, and how far each part is.

use std::str::FromStr;

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use sqlx::{Row, SqliteConnection, sqlite::SqliteRow};

use super::{By, Catalog, failed, insert_event};
use crate::{
    change::Timestamp,
    error::{Class, Classify, Error, Result},
    sqlite::{integer, unsigned},
};

/// What a backfill is doing, as the catalog has it.
///
/// ```text
/// queued ──► running ──► done
///    ▲          ├──────► paused, failed ──► queued, once somebody resumes it
///    └──────────┴──────► cancelled
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BackfillState {
    /// Not begun.
    Queued,
    /// At work, also across restarts.
    Running,
    /// Somebody paused it.
    Paused,
    /// All rows are in the journal.
    Done,
    /// Somebody gave it up.
    Cancelled,
    /// It stopped, and a person must act.
    Failed,
}

impl BackfillState {
    /// Every state.
    pub const ALL: [Self; 6] =
        [Self::Queued, Self::Running, Self::Paused, Self::Done, Self::Cancelled, Self::Failed];

    /// The word in tables and in the catalog.
    pub fn word(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Done => "done",
            Self::Cancelled => "cancelled",
            Self::Failed => "failed",
        }
    }

    /// Whether nothing will come of it any more.
    pub fn has_ended(self) -> bool {
        matches!(self, Self::Done | Self::Cancelled)
    }
}

impl FromStr for BackfillState {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|state| state.word() == text);
        found.ok_or_else(|| Error::damaged(format!("the catalog has a backfill that is `{text}`")))
    }
}

/// A backfill that somebody asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewBackfill {
    /// The source.
    pub source: String,
    /// The only sink that wants it; `None`: every one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sink: Option<String>,
    /// Globs over `schema.table`; empty: every table that is captured.
    #[serde(default)]
    pub tables: Vec<String>,
    /// An SQL condition that rows must fulfil.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filter: Option<String>,
    /// The columns that are read; `None`: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub columns: Option<Vec<String>>,
}

/// A backfill as the catalog has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackfillRow {
    /// Its number.
    pub id: u64,
    /// What was asked for.
    pub asked: NewBackfill,
    /// What it is doing.
    pub state: BackfillState,
    /// Why it is not at work, where that needs a word.
    pub reason: Option<String>,
    /// Its tables, as JSON; `None` where it is not planned yet.
    pub plan: Option<String>,
    /// Who asked for it.
    pub by: By,
    /// When.
    pub created_at: Timestamp,
    /// When it was done or given up.
    pub ended_at: Option<Timestamp>,
}

impl Catalog {
    /// Writes down a new backfill; its number.
    pub async fn add_backfill(&self, asked: &NewBackfill, by: &By) -> Result<u64> {
        let failed = |error| failed("write down a backfill of", &asked.source, error);
        let mut transaction = self.pool.begin().await.map_err(failed)?;
        let id = add(&mut transaction, asked, by).await?;
        transaction.commit().await.map_err(failed)?;
        Ok(id)
    }

    /// Every backfill, the oldest first.
    pub async fn backfills(&self) -> Result<Vec<BackfillRow>> {
        let rows = sqlx::query("SELECT * FROM backfill ORDER BY id").fetch_all(&self.pool).await;
        let rows = rows.map_err(|error| failed("read the backfills of", "all sources", error))?;
        rows.iter().map(backfill).collect()
    }

    /// One backfill.
    pub async fn backfill(&self, id: u64) -> Result<BackfillRow> {
        let failed = |error| failed("read the backfill", &id.to_string(), error);
        let row = sqlx::query("SELECT * FROM backfill WHERE id = ?")
            .bind(integer(id))
            .fetch_optional(&self.pool)
            .await
            .map_err(failed)?;
        let none = || {
            Error::config(format!("there is no backfill {id}"))
                .remedy("`walrace backfill list` shows those that there are")
        };
        backfill(&row.ok_or_else(none)?)
    }

    /// Gives a backfill its tables and parts, in place of those that it had.
    pub async fn plan_backfill(
        &self,
        id: u64,
        plan: &impl Serialize,
        parts: &[(u32, impl Serialize)],
    ) -> Result<()> {
        let failed = |error| failed("plan the backfill", &id.to_string(), error);
        let mut transaction = self.pool.begin().await.map_err(failed)?;
        sqlx::query("UPDATE backfill SET plan = ? WHERE id = ?")
            .bind(json(plan)?)
            .bind(integer(id))
            .execute(&mut *transaction)
            .await
            .map_err(failed)?;
        sqlx::query("DELETE FROM backfill_part WHERE backfill = ?")
            .bind(integer(id))
            .execute(&mut *transaction)
            .await
            .map_err(failed)?;
        for (number, part) in parts {
            sqlx::query("INSERT INTO backfill_part (backfill, number, part) VALUES (?, ?, ?)")
                .bind(integer(id))
                .bind(i64::from(*number))
                .bind(json(part)?)
                .execute(&mut *transaction)
                .await
                .map_err(failed)?;
        }
        transaction.commit().await.map_err(failed)
    }

    /// The parts of a backfill, in order.
    pub async fn backfill_parts<T: DeserializeOwned>(&self, id: u64) -> Result<Vec<T>> {
        let failed = |error| failed("read the parts of backfill", &id.to_string(), error);
        let rows = sqlx::query("SELECT part FROM backfill_part WHERE backfill = ? ORDER BY number")
            .bind(integer(id))
            .fetch_all(&self.pool)
            .await
            .map_err(failed)?;
        let part = |row: &SqliteRow| {
            let text: String = row.try_get(0).map_err(failed)?;
            unjson(&text)
        };
        rows.iter().map(part).collect()
    }

    /// Writes down how far parts of a backfill are.
    pub async fn save_parts(&self, id: u64, parts: &[(u32, impl Serialize)]) -> Result<()> {
        let failed = |error| failed("write down the progress of backfill", &id.to_string(), error);
        let mut transaction = self.pool.begin().await.map_err(failed)?;
        for (number, part) in parts {
            sqlx::query("UPDATE backfill_part SET part = ? WHERE backfill = ? AND number = ?")
                .bind(json(part)?)
                .bind(integer(id))
                .bind(i64::from(*number))
                .execute(&mut *transaction)
                .await
                .map_err(failed)?;
        }
        transaction.commit().await.map_err(failed)
    }

    /// Puts a backfill into another state, with who did it. By itself (without `by`) one that
    /// somebody put to rest does not leave that state; whether it did.
    pub async fn set_backfill(
        &self,
        id: u64,
        (state, reason): (BackfillState, Option<&str>),
        by: Option<&By>,
    ) -> Result<bool> {
        let failed = |error| failed("change the backfill", &id.to_string(), error);
        let mut transaction = self.pool.begin().await.map_err(failed)?;
        let row = sqlx::query(
            "UPDATE backfill SET state = ?, reason = ?, ended_at = ?
             WHERE id = ? AND (? OR state IN ('queued', 'running')) RETURNING source",
        )
        .bind(state.word())
        .bind(reason)
        .bind(state.has_ended().then(|| Timestamp::now().0))
        .bind(integer(id))
        .bind(by.is_some())
        .fetch_optional(&mut *transaction)
        .await
        .map_err(failed)?;
        let Some(row) = row else { return Ok(false) };
        if let Some(by) = by {
            let source: String = row.try_get(0).map_err(failed)?;
            let detail = serde_json::json!({"backfill": id, "state": state, "why": by.why});
            let event = (&*by.who, "backfill", &*source, &*detail.to_string());
            insert_event(&mut transaction, event).await.map_err(failed)?;
        }
        transaction.commit().await.map_err(failed)?;
        Ok(true)
    }
}

pub(super) async fn add(
    connection: &mut SqliteConnection,
    asked: &NewBackfill,
    by: &By,
) -> Result<u64> {
    let failed = |error| failed("write down a backfill of", &asked.source, error);
    let columns = asked.columns.as_ref().map(json).transpose()?;
    let row = sqlx::query(
        "INSERT INTO backfill (source, sink, tables, filter, columns, state, who, why, created_at)
         VALUES (?, ?, ?, ?, ?, 'queued', ?, ?, ?) RETURNING id",
    )
    .bind(&asked.source)
    .bind(&asked.sink)
    .bind(json(&asked.tables)?)
    .bind(&asked.filter)
    .bind(columns)
    .bind(&by.who)
    .bind(&by.why)
    .bind(Timestamp::now().0)
    .fetch_one(&mut *connection)
    .await
    .map_err(failed)?;
    let id: i64 = row.try_get(0).map_err(failed)?;
    let detail = serde_json::json!({"backfill": id, "why": by.why}).to_string();
    let event = (&*by.who, "backfill", &*asked.source, &*detail);
    insert_event(connection, event).await.map_err(failed)?;
    Ok(unsigned(id))
}

fn backfill(row: &SqliteRow) -> Result<BackfillRow> {
    let decode = |error| failed("decode", "a backfill", error);
    let tables: String = row.try_get("tables").map_err(decode)?;
    let columns: Option<String> = row.try_get("columns").map_err(decode)?;
    let state: String = row.try_get("state").map_err(decode)?;
    let ended_at: Option<i64> = row.try_get("ended_at").map_err(decode)?;
    Ok(BackfillRow {
        id: unsigned(row.try_get("id").map_err(decode)?),
        asked: NewBackfill {
            source: row.try_get("source").map_err(decode)?,
            sink: row.try_get("sink").map_err(decode)?,
            tables: unjson(&tables)?,
            filter: row.try_get("filter").map_err(decode)?,
            columns: columns.as_deref().map(unjson).transpose()?,
        },
        state: state.parse()?,
        reason: row.try_get("reason").map_err(decode)?,
        plan: row.try_get("plan").map_err(decode)?,
        by: By {
            who: row.try_get("who").map_err(decode)?,
            why: row.try_get("why").map_err(decode)?,
        },
        created_at: Timestamp(row.try_get("created_at").map_err(decode)?),
        ended_at: ended_at.map(Timestamp),
    })
}

fn json(value: &impl Serialize) -> Result<String> {
    serde_json::to_string(value).class(Class::Bug, || "cannot write a part of a backfill as JSON")
}

fn unjson<T: DeserializeOwned>(text: &str) -> Result<T> {
    serde_json::from_str(text)
        .class(Class::Damaged, || "the catalog has a backfill of no known form")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_backfill_survives_reopening_with_its_parts_and_its_state() {
        let directory = tempfile::tempdir().unwrap();
        let catalog = Catalog::open(directory.path()).await.unwrap();
        let by = By { who: "ana".into(), why: None };
        let asked = NewBackfill {
            source: "app".into(),
            sink: Some("lake".into()),
            tables: vec!["public.*".into()],
            filter: Some("id > 7".into()),
            columns: None,
        };
        let id = catalog.add_backfill(&asked, &by).await.unwrap();
        assert_eq!(catalog.backfill(id).await.unwrap().state, BackfillState::Queued);
        catalog.plan_backfill(id, &["orders"], &[(1, "a"), (2, "b")]).await.unwrap();
        assert!(catalog.set_backfill(id, (BackfillState::Running, None), None).await.unwrap());
        catalog.save_parts(id, &[(2, "c")]).await.unwrap();
        catalog.close().await;

        let catalog = Catalog::open(directory.path()).await.unwrap();
        let row = catalog.backfill(id).await.unwrap();
        assert_eq!((row.asked, row.state), (asked, BackfillState::Running));
        assert_eq!(catalog.backfill_parts::<String>(id).await.unwrap(), ["a", "c"]);
        let paused = (BackfillState::Paused, Some("lunch"));
        assert!(catalog.set_backfill(id, paused, Some(&by)).await.unwrap());
        assert!(!catalog.set_backfill(id, (BackfillState::Running, None), None).await.unwrap());
        let row = catalog.backfill(id).await.unwrap();
        assert_eq!((row.state, row.reason.as_deref()), (BackfillState::Paused, Some("lunch")));
        assert_eq!(catalog.backfill(id + 1).await.unwrap_err().class(), Class::Config);
    }
}
