//! What must outlive the process beside the journal: the sinks' progress and what operators did.
//!
//! One SQLite file in `data_dir`, in WAL mode with `synchronous = FULL`: a call that returned has
//! survived a power loss.

mod backfill;
mod progress;
mod schema;

use std::{collections::BTreeMap, fmt, path::Path};

use sqlx::{Row, sqlite::SqlitePool};
use uuid::Uuid;

pub use self::{
    backfill::{BackfillRow, BackfillState, NewBackfill},
    progress::reconcile,
    schema::{Known, Tracker, Version},
};
use crate::{
    change::Timestamp,
    error::{Error, Result},
    sink::Progress,
    sqlite::{self, Named, integer, unsigned},
};

/// The file's name within `data_dir`.
pub const FILE: &str = "catalog.sqlite";

/// What errors call it.
const NAMED: Named = Named { what: "the catalog", setting: "data_dir" };

/// The steps of the schema; only ever added to.
const MIGRATIONS: [&str; 4] = [
    include_str!("0001_sinks.sql"),
    include_str!("0002_control.sql"),
    include_str!("0003_backfill.sql"),
    include_str!("0004_schema.sql"),
];

/// The embedded catalog. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Catalog {
    pool: SqlitePool,
}

/// A sink as the catalog knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registered {
    /// The source that it reads.
    pub source: String,
    /// Its progress, as far as the catalog has it.
    pub progress: Progress,
    /// Whether anything was delivered in this epoch.
    pub started: bool,
    /// Why it is paused, where it is: who, and what for.
    pub paused: Option<String>,
}

/// Who does something, and what for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct By {
    /// A user's name.
    pub who: String,
    /// The reason that was given.
    pub why: Option<String>,
}

impl fmt::Display for By {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.why {
            Some(why) => write!(f, "{}: {why}", self.who),
            None => f.write_str(&self.who),
        }
    }
}

/// Something that was done to a sink.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Event {
    /// When.
    pub at: Timestamp,
    /// By whom.
    pub who: String,
    /// What.
    pub action: String,
    /// Details, as JSON.
    pub detail: String,
}

/// A range of offsets that a sink never got.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct LostRange {
    /// The first offset that is lost.
    pub from: u64,
    /// The offset after the last one.
    pub to: u64,
    /// Why.
    pub reason: String,
}

impl Catalog {
    /// Opens or creates the catalog in `data_dir` and brings its schema up to date.
    pub async fn open(data_dir: &Path) -> Result<Self> {
        let pool = sqlite::open(&data_dir.join(FILE), NAMED, &MIGRATIONS).await?;
        Ok(Self { pool })
    }

    /// Opens the catalog in `data_dir` without changing it; `None` where there is none. It may
    /// be in use by a running Walrace.
    pub async fn inspect(data_dir: &Path) -> Result<Option<Self>> {
        let pool = sqlite::inspect(&data_dir.join(FILE), NAMED, &MIGRATIONS).await?;
        Ok(pool.map(|pool| Self { pool }))
    }

    /// The sink's row, if it was ever registered.
    pub async fn sink(&self, name: &str) -> Result<Option<Registered>> {
        let row = sqlx::query(
            "SELECT source, lineage, epoch, cursor, retry_seq, started, paused FROM sink
             WHERE name = ?",
        )
        .bind(name)
        .fetch_optional(&self.pool)
        .await
        .map_err(|error| failed("read the progress of", name, error))?;
        row.map(|row| {
            registered(&row).map_err(|error| failed("decode the progress of", name, error))
        })
        .transpose()
    }

    /// Registers a new sink at `progress`, with the backfill that it begins with. Keeps the row of
    /// one that exists.
    pub async fn register(
        &self,
        (name, source): (&str, &str),
        progress: &Progress,
        backfill: Option<&NewBackfill>,
    ) -> Result<()> {
        let now = Timestamp::now().0;
        let failed = |error| failed("register", name, error);
        let mut transaction = self.pool.begin().await.map_err(failed)?;
        sqlx::query(
            "INSERT INTO sink
                 (name, source, lineage, epoch, cursor, retry_seq, created_at, updated_at)
             VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (name) DO NOTHING",
        )
        .bind(name)
        .bind(source)
        .bind(progress.lineage.to_string())
        .bind(integer(progress.epoch))
        .bind(integer(progress.cursor))
        .bind(integer(progress.retry_seq))
        .bind(now)
        .bind(now)
        .execute(&mut *transaction)
        .await
        .map_err(failed)?;
        if let Some(asked) = backfill {
            let why = Some(format!("sink {name} is new"));
            let by = By { who: "walrace".to_owned(), why };
            backfill::add(&mut transaction, asked, &by).await?;
        }
        transaction.commit().await.map_err(failed)
    }

    /// Moves a sink's progress forward within its epoch; a lower cursor or another epoch is refused
    /// as a bug or a second instance.
    pub async fn advance(&self, name: &str, progress: &Progress) -> Result<()> {
        let done = sqlx::query(
            "UPDATE sink SET cursor = ?, retry_seq = ?, started = 1, updated_at = ?
             WHERE name = ? AND epoch = ? AND lineage = ? AND cursor <= ? AND retry_seq <= ?",
        )
        .bind(integer(progress.cursor))
        .bind(integer(progress.retry_seq))
        .bind(Timestamp::now().0)
        .bind(name)
        .bind(integer(progress.epoch))
        .bind(progress.lineage.to_string())
        .bind(integer(progress.cursor))
        .bind(integer(progress.retry_seq))
        .execute(&self.pool)
        .await
        .map_err(|error| failed("record the progress of", name, error))?;
        match done.rows_affected() {
            1 => Ok(()),
            _ => Err(Error::damaged(format!(
                "the catalog refuses to move sink {name} to offset {} of epoch {}: it is in \
                 another epoch or already beyond",
                progress.cursor, progress.epoch
            ))
            .remedy("another walrace may be running on a copy of data_dir; restart this one")),
        }
    }

    /// Begins a new epoch at `cursor`: the named rewind or release. Written down with who and why.
    pub async fn begin_epoch(
        &self,
        name: &str,
        cursor: u64,
        actor: &str,
        why: &str,
    ) -> Result<u64> {
        let failed = |error| failed("begin a new epoch of", name, error);
        let mut transaction = self.pool.begin().await.map_err(failed)?;
        let epoch = begin_epoch(&mut transaction, (name, cursor), actor, why).await;
        let epoch = epoch.map_err(failed)?;
        transaction.commit().await.map_err(failed)?;
        Ok(epoch)
    }

    /// Pauses a sink, or lets it go on; written down with who and why.
    pub async fn pause(&self, name: &str, paused: bool, by: &By) -> Result<()> {
        let action = if paused { "pause" } else { "resume" };
        let failed = |error| failed(action, name, error);
        let mut transaction = self.pool.begin().await.map_err(failed)?;
        sqlx::query("UPDATE sink SET paused = ?, updated_at = ? WHERE name = ?")
            .bind(paused.then(|| by.to_string()))
            .bind(Timestamp::now().0)
            .bind(name)
            .execute(&mut *transaction)
            .await
            .map_err(failed)?;
        let detail = serde_json::json!({"why": by.why}).to_string();
        insert_event(&mut transaction, (&by.who, action, name, &detail)).await.map_err(failed)?;
        transaction.commit().await.map_err(failed)
    }

    /// Moves a sink to `cursor` in a new epoch, where somebody asked for it, with who and why; what
    /// it leaves out is on record as lost.
    pub async fn move_to(&self, name: &str, (from, to): (u64, u64), by: &By) -> Result<u64> {
        let failed = |error| failed("move", name, error);
        let mut transaction = self.pool.begin().await.map_err(failed)?;
        if from < to {
            let lost = LostRange { from, to, reason: format!("skipped by {by}") };
            insert_lost_range(&mut transaction, name, &lost).await.map_err(failed)?;
        } else {
            // What was skipped is still in the journal, and comes again.
            sqlx::query(
                "DELETE FROM lost_range
                 WHERE sink = ? AND from_offset >= ? AND reason LIKE 'skipped by %'",
            )
            .bind(name)
            .bind(integer(to))
            .execute(&mut *transaction)
            .await
            .map_err(failed)?;
        }
        let why = by.why.as_deref().unwrap_or("no reason given");
        let epoch = begin_epoch(&mut transaction, (name, to), &by.who, why).await;
        let epoch = epoch.map_err(failed)?;
        transaction.commit().await.map_err(failed)?;
        Ok(epoch)
    }

    /// Has one change of a sink made a dead letter when its loop comes to it.
    pub async fn skip(&self, name: &str, offset: u64, by: &By) -> Result<()> {
        let failed = |error| failed("write down a skip of", name, error);
        let mut transaction = self.pool.begin().await.map_err(failed)?;
        sqlx::query("INSERT OR REPLACE INTO skip (sink, offset, by) VALUES (?, ?, ?)")
            .bind(name)
            .bind(integer(offset))
            .bind(by.to_string())
            .execute(&mut *transaction)
            .await
            .map_err(failed)?;
        let detail = serde_json::json!({"offset": offset, "why": by.why}).to_string();
        insert_event(&mut transaction, (&by.who, "skip", name, &detail)).await.map_err(failed)?;
        transaction.commit().await.map_err(failed)
    }

    /// The changes of a sink that somebody skipped, each with who and why.
    pub async fn skips(&self, name: &str) -> Result<BTreeMap<u64, String>> {
        let failed = |error| failed("read the skips of", name, error);
        let rows = sqlx::query("SELECT offset, by FROM skip WHERE sink = ?")
            .bind(name)
            .fetch_all(&self.pool)
            .await
            .map_err(failed)?;
        let skip = |row: &sqlx::sqlite::SqliteRow| Ok((unsigned(row.try_get(0)?), row.try_get(1)?));
        rows.iter().map(skip).collect::<sqlx::Result<_>>().map_err(failed)
    }

    /// What was done to `object` by whom, newest first.
    pub async fn events(&self, object: &str) -> Result<Vec<Event>> {
        let failed = |error| failed("read the events of", object, error);
        let rows = sqlx::query(
            "SELECT at, actor, action, detail FROM event WHERE object = ? ORDER BY id DESC
             LIMIT 1000",
        )
        .bind(object)
        .fetch_all(&self.pool)
        .await
        .map_err(failed)?;
        let event = |row: &sqlx::sqlite::SqliteRow| {
            Ok(Event {
                at: Timestamp(row.try_get(0)?),
                who: row.try_get(1)?,
                action: row.try_get(2)?,
                detail: row.try_get(3)?,
            })
        };
        rows.iter().map(event).collect::<sqlx::Result<_>>().map_err(failed)
    }

    /// Gives up a range for a sink, because the disk is short, and moves it behind in a new epoch,
    /// both or neither; the range stays on record, as one with the range that it continues.
    pub async fn release(&self, name: &str, lost: &LostRange) -> Result<u64> {
        let failed = |error| failed("record a lost range of", name, error);
        let mut transaction = self.pool.begin().await.map_err(failed)?;
        insert_lost_range(&mut transaction, name, lost).await.map_err(failed)?;
        let epoch = begin_epoch(&mut transaction, (name, lost.to), "walrace", &lost.reason).await;
        let epoch = epoch.map_err(failed)?;
        transaction.commit().await.map_err(failed)?;
        Ok(epoch)
    }

    /// The ranges that a sink never got, oldest first.
    pub async fn lost_ranges(&self, name: &str) -> Result<Vec<LostRange>> {
        let failed = |error| failed("read the lost ranges of", name, error);
        let rows = sqlx::query(
            "SELECT from_offset, to_offset, reason FROM lost_range WHERE sink = ? ORDER BY id",
        )
        .bind(name)
        .fetch_all(&self.pool)
        .await
        .map_err(failed)?;
        let range = |row: &sqlx::sqlite::SqliteRow| {
            Ok(LostRange {
                from: unsigned(row.try_get(0)?),
                to: unsigned(row.try_get(1)?),
                reason: row.try_get(2)?,
            })
        };
        rows.iter().map(range).collect::<sqlx::Result<_>>().map_err(failed)
    }

    /// Writes down what `actor` did to `object`; `detail` is JSON.
    pub async fn record_event(
        &self,
        (actor, action): (&str, &str),
        object: &str,
        detail: &str,
    ) -> Result<()> {
        let failed = |error| failed("record an event of", object, error);
        let mut transaction = self.pool.begin().await.map_err(failed)?;
        insert_event(&mut transaction, (actor, action, object, detail)).await.map_err(failed)?;
        transaction.commit().await.map_err(failed)
    }

    /// Closes the file, with its write-ahead log folded in.
    pub async fn close(&self) {
        self.pool.close().await;
    }
}

async fn begin_epoch(
    connection: &mut sqlx::SqliteConnection,
    (name, cursor): (&str, u64),
    actor: &str,
    why: &str,
) -> sqlx::Result<u64> {
    let row = sqlx::query(
        "UPDATE sink SET epoch = epoch + 1, cursor = ?, updated_at = ?
         WHERE name = ? RETURNING epoch",
    )
    .bind(integer(cursor))
    .bind(Timestamp::now().0)
    .bind(name)
    .fetch_one(&mut *connection)
    .await?;
    let epoch: i64 = row.try_get(0)?;
    let detail = serde_json::json!({"epoch": epoch, "cursor": cursor, "why": why}).to_string();
    insert_event(connection, (actor, "begin_epoch", name, &detail)).await?;
    Ok(unsigned(epoch))
}

async fn insert_lost_range(
    connection: &mut sqlx::SqliteConnection,
    name: &str,
    lost: &LostRange,
) -> sqlx::Result<()> {
    let now = Timestamp::now().0;
    let longer = sqlx::query(
        "UPDATE lost_range SET to_offset = ?, at = ?
         WHERE sink = ? AND to_offset = ? AND reason = ?",
    )
    .bind(integer(lost.to))
    .bind(now)
    .bind(name)
    .bind(integer(lost.from))
    .bind(&lost.reason)
    .execute(&mut *connection)
    .await?;
    if longer.rows_affected() > 0 {
        return Ok(());
    }
    sqlx::query(
        "INSERT INTO lost_range (sink, from_offset, to_offset, reason, at) VALUES (?, ?, ?, ?, ?)",
    )
    .bind(name)
    .bind(integer(lost.from))
    .bind(integer(lost.to))
    .bind(&lost.reason)
    .bind(now)
    .execute(connection)
    .await?;
    Ok(())
}

async fn insert_event(
    connection: &mut sqlx::SqliteConnection,
    (actor, action, object, detail): (&str, &str, &str, &str),
) -> sqlx::Result<()> {
    sqlx::query("INSERT INTO event (at, actor, action, object, detail) VALUES (?, ?, ?, ?, ?)")
        .bind(Timestamp::now().0)
        .bind(actor)
        .bind(action)
        .bind(object)
        .bind(detail)
        .execute(connection)
        .await?;
    Ok(())
}

fn registered(row: &sqlx::sqlite::SqliteRow) -> sqlx::Result<Registered> {
    let lineage: String = row.try_get("lineage")?;
    let lineage = Uuid::parse_str(&lineage).map_err(|error| sqlx::Error::Decode(error.into()))?;
    Ok(Registered {
        source: row.try_get("source")?,
        progress: Progress {
            lineage,
            epoch: unsigned(row.try_get("epoch")?),
            cursor: unsigned(row.try_get("cursor")?),
            retry_seq: unsigned(row.try_get("retry_seq")?),
        },
        started: row.try_get::<i64, _>("started")? != 0,
        paused: row.try_get("paused")?,
    })
}

fn failed(action: &str, object: &str, error: sqlx::Error) -> Error {
    sqlite::failed(NAMED, action, object, error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Class;

    fn progress(epoch: u64, cursor: u64) -> Progress {
        Progress { lineage: Uuid::nil(), epoch, cursor, retry_seq: 0 }
    }

    #[tokio::test]
    async fn progress_survives_reopening_and_never_falls_within_an_epoch() {
        let directory = tempfile::tempdir().unwrap();
        let catalog = Catalog::open(directory.path()).await.unwrap();
        assert_eq!(catalog.sink("lake").await.unwrap(), None);
        catalog.register(("lake", "app"), &progress(1, 7), None).await.unwrap();
        assert!(!catalog.sink("lake").await.unwrap().unwrap().started);
        catalog.advance("lake", &progress(1, 9)).await.unwrap();
        let back = catalog.advance("lake", &progress(1, 8)).await.unwrap_err();
        assert_eq!(back.class(), Class::Damaged);
        catalog.close().await;

        let catalog = Catalog::open(directory.path()).await.unwrap();
        let row = catalog.sink("lake").await.unwrap().unwrap();
        assert_eq!((row.progress, row.started), (progress(1, 9), true));
    }

    #[tokio::test]
    async fn a_rewind_begins_an_epoch_that_shuts_out_the_old_one() {
        let directory = tempfile::tempdir().unwrap();
        let catalog = Catalog::open(directory.path()).await.unwrap();
        catalog.register(("lake", "app"), &progress(1, 50), None).await.unwrap();
        assert_eq!(catalog.begin_epoch("lake", 10, "ana", "replay").await.unwrap(), 2);
        assert!(catalog.advance("lake", &progress(1, 60)).await.is_err());
        catalog.advance("lake", &progress(2, 11)).await.unwrap();
    }

    #[tokio::test]
    async fn a_released_range_stays_on_record() {
        let directory = tempfile::tempdir().unwrap();
        let catalog = Catalog::open(directory.path()).await.unwrap();
        catalog.register(("hook", "app"), &progress(1, 5), None).await.unwrap();
        let lost = LostRange { from: 5, to: 90, reason: "the disk is short".into() };
        catalog.release("hook", &lost).await.unwrap();
        assert_eq!(catalog.lost_ranges("hook").await.unwrap(), std::slice::from_ref(&lost));
        assert_eq!(catalog.sink("hook").await.unwrap().unwrap().progress, progress(2, 90));
        let next = LostRange { from: 90, to: 95, ..lost.clone() };
        let later = LostRange { from: 99, to: 120, ..lost.clone() };
        catalog.release("hook", &next).await.unwrap();
        catalog.release("hook", &later).await.unwrap();
        let ranges = catalog.lost_ranges("hook").await.unwrap();
        assert_eq!(ranges, [LostRange { to: 95, ..lost }, later], "what continues is one range");
        assert_eq!(catalog.sink("hook").await.unwrap().unwrap().progress, progress(4, 120));
    }
}
