//! What must outlive the process beside the journal: the sinks' progress and what operators did.
//!
//! One SQLite file in `data_dir`, in WAL mode with `synchronous = FULL`: a call that returned has
//! survived a power loss.

mod progress;

use std::path::Path;

use sqlx::{
    Row,
    sqlite::{
        SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous,
    },
};
use uuid::Uuid;

pub use self::progress::reconcile;
use crate::{
    change::Timestamp,
    error::{Class, Classify, Error, Result, ResultExt},
    sink::Progress,
};

/// The file's name within `data_dir`.
pub const FILE: &str = "catalog.sqlite";

/// The steps of the schema; only ever added to.
const MIGRATIONS: [&str; 1] = [include_str!("0001_sinks.sql")];

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
        let path = data_dir.join(FILE);
        let options = SqliteConnectOptions::new()
            .filename(&path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true);
        let open = || format!("cannot open the catalog {}", path.display());
        let pool = SqlitePoolOptions::new()
            .max_connections(1) // one writer; readers of this file are few and short
            .connect_with(options)
            .await
            .map_err(|error| unopened(&path, error))?;
        let catalog = Self { pool };
        catalog.migrate().await.context(open)?;
        Ok(catalog)
    }

    /// Opens the catalog in `data_dir` without changing it; `None` where there is none. It may
    /// be in use by a running Walrace.
    pub async fn inspect(data_dir: &Path) -> Result<Option<Self>> {
        let path = data_dir.join(FILE);
        if !path.exists() {
            return Ok(None);
        }
        let options = SqliteConnectOptions::new().filename(&path).read_only(true);
        let open = || format!("cannot read the catalog {}", path.display());
        let pool = SqlitePoolOptions::new()
            .max_connections(1)
            .connect_with(options)
            .await
            .class(Class::Config, open)?;
        let catalog = Self { pool };
        match catalog.version().await.context(open)? {
            version if version == MIGRATIONS.len() => Ok(Some(catalog)),
            version => Err(Error::config(format!(
                "{}: its schema is version {version}, and this walrace knows {}",
                open(),
                MIGRATIONS.len()
            ))
            .remedy("use the walrace that runs on it")),
        }
    }

    async fn version(&self) -> Result<usize> {
        let failed = |error| failed("read the version of", "the schema", error);
        let row = sqlx::query("PRAGMA user_version").fetch_one(&self.pool).await.map_err(failed)?;
        let version: i64 = row.try_get(0).map_err(failed)?;
        Ok(usize::try_from(version).unwrap_or(usize::MAX))
    }

    /// Applies each step that the file has not seen, in a transaction of its own.
    async fn migrate(&self) -> Result<()> {
        let failed = |error| failed("bring up to date", "the schema", error);
        let version = self.version().await?;
        if version > MIGRATIONS.len() {
            return Err(Error::config(format!(
                "its schema is version {version}, and this walrace knows {}",
                MIGRATIONS.len()
            ))
            .remedy("run the newer walrace that wrote it"));
        }
        for (index, step) in MIGRATIONS.iter().enumerate().skip(version) {
            let step = format!("BEGIN; {step}; PRAGMA user_version = {}; COMMIT;", index + 1);
            sqlx::raw_sql(sqlx::AssertSqlSafe(step)).execute(&self.pool).await.map_err(failed)?;
        }
        Ok(())
    }

    /// The sink's row, if it was ever registered.
    pub async fn sink(&self, name: &str) -> Result<Option<Registered>> {
        let row = sqlx::query(
            "SELECT source, lineage, epoch, cursor, retry_seq, started FROM sink WHERE name = ?",
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

    /// Registers a new sink at `progress`. Keeps the row of one that exists.
    pub async fn register(&self, name: &str, source: &str, progress: &Progress) -> Result<()> {
        let now = Timestamp::now().0;
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
        .execute(&self.pool)
        .await
        .map_err(|error| failed("register", name, error))?;
        Ok(())
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

    /// Writes down what `actor` did to `object`.
    pub async fn record_event(&self, actor: &str, action: &str, object: &str) -> Result<()> {
        let failed = |error| failed("record an event of", object, error);
        let mut transaction = self.pool.begin().await.map_err(failed)?;
        insert_event(&mut transaction, (actor, action, object, "{}")).await.map_err(failed)?;
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
    })
}

/// SQLite's primary and extended result codes.
const BUSY: i32 = 5;
const IO_ERROR: i32 = 10;
const FULL: i32 = 13;
const IO_ERROR_SHARED_MEMORY_SIZE: i32 = 4874;

const FULL_REMEDY: &str = "free space on the volume of data_dir";

fn code_of(error: &sqlx::Error) -> i32 {
    let code = error.as_database_error().and_then(|error| error.code()).unwrap_or_default();
    code.parse().unwrap_or_default()
}

/// A start on a full disk finds no room for the file that SQLite's readers share.
fn unopened(path: &Path, error: sqlx::Error) -> Error {
    let path = path.display();
    let code = code_of(&error);
    if code == IO_ERROR_SHARED_MEMORY_SIZE || code & 0xFF == FULL {
        return Error::retry(format!("cannot open the catalog {path}: its disk is full"))
            .caused_by(error)
            .remedy(FULL_REMEDY);
    }
    Error::config(format!("cannot open the catalog {path}")).caused_by(error)
}

/// Busy, slow and full files heal; anything else means that the file is not what we wrote.
fn failed(what: &str, object: &str, error: sqlx::Error) -> Error {
    let primary = code_of(&error) & 0xFF;
    let slow = matches!(error, sqlx::Error::PoolTimedOut | sqlx::Error::Io(_));
    let class = match primary {
        BUSY | IO_ERROR | FULL => Class::Retry,
        _ if slow => Class::Retry,
        _ => Class::Damaged,
    };
    let error =
        Error::new(class, format!("cannot {what} {object} in the catalog")).caused_by(error);
    match primary {
        FULL => error.remedy(FULL_REMEDY),
        _ => error,
    }
}

/// SQLite's integers are signed; offsets stay below 2^53.
fn integer(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn unsigned(value: i64) -> u64 {
    u64::try_from(value).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(epoch: u64, cursor: u64) -> Progress {
        Progress { lineage: Uuid::nil(), epoch, cursor, retry_seq: 0 }
    }

    #[tokio::test]
    async fn progress_survives_reopening_and_never_falls_within_an_epoch() {
        let directory = tempfile::tempdir().unwrap();
        let catalog = Catalog::open(directory.path()).await.unwrap();
        assert_eq!(catalog.sink("lake").await.unwrap(), None);
        catalog.register("lake", "app", &progress(1, 7)).await.unwrap();
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
        catalog.register("lake", "app", &progress(1, 50)).await.unwrap();
        assert_eq!(catalog.begin_epoch("lake", 10, "ana", "replay").await.unwrap(), 2);
        assert!(catalog.advance("lake", &progress(1, 60)).await.is_err());
        catalog.advance("lake", &progress(2, 11)).await.unwrap();
    }

    #[tokio::test]
    async fn a_released_range_stays_on_record() {
        let directory = tempfile::tempdir().unwrap();
        let catalog = Catalog::open(directory.path()).await.unwrap();
        catalog.register("hook", "app", &progress(1, 5)).await.unwrap();
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
