//! What survives a crash: the low-water mark, what is done beyond it, and the leases, in a SQLite
//! file of the sink. A call that returned has survived a power loss.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use sqlx::{
    Row, SqliteConnection,
    sqlite::{SqlitePool, SqliteRow},
};
use uuid::Uuid;

use super::{
    feed::{Lease, Message, Place, Unsaved},
    ranges::Ranges,
};
use crate::{
    change::Keys,
    error::{Class, Classify, Error, Result},
    sink::Progress,
    sqlite::{self, Named, integer, unsigned},
};

const NAMED: Named = Named { what: "the state of the pull sink", setting: "data_dir" };
const STEPS: [&str; 1] = [include_str!("0001_pull.sql")];

/// The open file.
#[derive(Debug)]
pub(super) struct Store {
    path: PathBuf,
    pool: SqlitePool,
}

/// What the file holds beside the progress.
#[derive(Debug, Default)]
pub(super) struct Held {
    pub(super) done: Ranges,
    pub(super) leases: Vec<(Place, Lease)>,
    pub(super) kept: Vec<(Place, Option<Keys>, Bytes)>,
}

impl Store {
    /// Opens or creates the file.
    pub(super) async fn open(path: &Path) -> Result<Self> {
        if let Some(directory) = path.parent() {
            std::fs::create_dir_all(directory)
                .class(Class::Retry, || format!("cannot create {}", directory.display()))?;
        }
        let pool = sqlite::open(path, NAMED, &STEPS).await?;
        Ok(Self { path: path.to_owned(), pool })
    }

    /// The progress in a file that nobody has open, without changing it.
    pub(super) async fn peek(path: &Path) -> Result<Option<Progress>> {
        match sqlite::inspect(path, NAMED, &STEPS).await? {
            Some(pool) => Self { path: path.to_owned(), pool }.progress().await,
            None => Ok(None),
        }
    }

    /// How far the sink is, if it ever began.
    pub(super) async fn progress(&self) -> Result<Option<Progress>> {
        let row = sqlx::query("SELECT lineage, epoch, cursor, retry_seq FROM progress")
            .fetch_optional(&self.pool)
            .await
            .map_err(|error| self.failed("read the progress", error))?;
        let progress = row.as_ref().map(progress_of).transpose();
        progress.map_err(|error| self.failed("decode the progress", error))
    }

    /// Everything else.
    pub(super) async fn held(&self) -> Result<Held> {
        self.read_held().await.map_err(|error| self.failed("read the leases", error))
    }

    async fn read_held(&self) -> sqlx::Result<Held> {
        let mut held = Held::default();
        for row in
            sqlx::query("SELECT from_offset, to_offset FROM acked").fetch_all(&self.pool).await?
        {
            held.done.insert(unsigned(row.try_get(0)?), unsigned(row.try_get(1)?));
        }
        let leases =
            sqlx::query("SELECT \"offset\", part, deliveries, visible_at, acked FROM lease");
        for row in leases.fetch_all(&self.pool).await? {
            let lease = Lease {
                deliveries: row.try_get(2)?,
                visible_at: row.try_get(3)?,
                acked: row.try_get(4)?,
            };
            held.leases.push((place_of(&row)?, lease));
        }
        let kept = sqlx::query("SELECT \"offset\", part, room, keys, body FROM kept ORDER BY 1, 2");
        for row in kept.fetch_all(&self.pool).await? {
            let room: Option<i64> = row.try_get(2)?;
            let keys: &[u8] = row.try_get(3)?;
            let keys = room.map(|room| Keys::from_bytes(room.cast_unsigned(), keys));
            held.kept.push((place_of(&row)?, keys, row.try_get::<Vec<u8>, _>(4)?.into()));
        }
        Ok(held)
    }

    /// Begins an epoch: what is done and leased belongs to the one before. Retried messages below
    /// the place where it begins stay, because nobody brings them again.
    pub(super) async fn begin(&self, progress: &Progress) -> Result<()> {
        let begin = async {
            let mut transaction = self.pool.begin().await?;
            sqlx::raw_sql("DELETE FROM acked; DELETE FROM lease")
                .execute(&mut *transaction)
                .await?;
            sqlx::query("DELETE FROM kept WHERE \"offset\" >= ?")
                .bind(integer(progress.cursor))
                .execute(&mut *transaction)
                .await?;
            set_progress(&mut transaction, progress).await?;
            transaction.commit().await
        };
        begin.await.map_err(|error| self.failed("begin an epoch", error))
    }

    /// Writes down what happened, with the messages to keep, and the low-water mark, in one step.
    pub(super) async fn save(
        &self,
        unsaved: &Unsaved,
        keep: &[&Message],
        progress: &Progress,
    ) -> Result<()> {
        let save = async {
            let mut transaction = self.pool.begin().await?;
            save_leases(&mut transaction, unsaved).await?;
            for message in keep {
                save_message(&mut transaction, message).await?;
            }
            for (from, to) in unsaved.ranges.iter() {
                sqlx::query("DELETE FROM acked WHERE from_offset >= ? AND from_offset < ?")
                    .bind(integer(from))
                    .bind(integer(to))
                    .execute(&mut *transaction)
                    .await?;
                sqlx::query("INSERT INTO acked (from_offset, to_offset) VALUES (?, ?)")
                    .bind(integer(from))
                    .bind(integer(to))
                    .execute(&mut *transaction)
                    .await?;
            }
            set_progress(&mut transaction, progress).await?;
            forget(&mut transaction, progress.cursor).await?;
            transaction.commit().await
        };
        save.await.map_err(|error| self.failed("record acknowledgements", error))
    }

    fn failed(&self, what: &str, error: sqlx::Error) -> Error {
        let code = error.as_database_error().and_then(|error| error.code()).unwrap_or_default();
        let primary = code.parse::<i32>().unwrap_or_default() & 0xFF;
        let file = error.as_database_error().is_none();
        // Busy, slow and full files heal; anything else means that the file is not what we wrote.
        let class = match primary {
            5 | 10 | 13 => Class::Retry,
            _ if file && !matches!(error, sqlx::Error::Decode(_)) => Class::Retry,
            _ => Class::Damaged,
        };
        let error =
            Error::new(class, format!("{} cannot {what}", self.path.display())).caused_by(error);
        if primary == 13 { error.remedy("free space on the volume of data_dir") } else { error }
    }
}

/// Stores a message that the journal's reader will not bring again.
async fn save_message(connection: &mut SqliteConnection, message: &Message) -> sqlx::Result<()> {
    let keys = message.keys.as_ref().map(Keys::to_bytes).unwrap_or_default();
    sqlx::query("INSERT OR REPLACE INTO kept VALUES (?, ?, ?, ?, ?)")
        .bind(integer(message.place.offset))
        .bind(message.place.part)
        .bind(message.keys.as_ref().map(|keys| keys.room.cast_signed()))
        .bind(keys)
        .bind(&message.body[..])
        .execute(connection)
        .await?;
    Ok(())
}

async fn save_leases(connection: &mut SqliteConnection, unsaved: &Unsaved) -> sqlx::Result<()> {
    let (mut set, mut gone) = (Vec::new(), Vec::new());
    for (place, lease) in &unsaved.leases {
        let place = (place.offset, place.part);
        match lease {
            Some(lease) => {
                let acked = i64::from(lease.acked);
                set.push((place.0, place.1, lease.deliveries, lease.visible_at, acked));
            }
            None => gone.push(place),
        }
    }
    let json = |error: serde_json::Error| sqlx::Error::Encode(error.into());
    if !set.is_empty() {
        sqlx::query(
            "INSERT OR REPLACE INTO lease
             SELECT value->>0, value->>1, value->>2, value->>3, value->>4 FROM json_each(?)",
        )
        .bind(serde_json::to_string(&set).map_err(json)?)
        .execute(&mut *connection)
        .await?;
    }
    if !gone.is_empty() {
        let gone = serde_json::to_string(&gone).map_err(json)?;
        for table in ["lease", "kept"] {
            let text = format!(
                "DELETE FROM {table} WHERE (\"offset\", part) IN
                     (SELECT value->>0, value->>1 FROM json_each(?))"
            );
            sqlx::query(sqlx::AssertSqlSafe(text)).bind(&gone).execute(&mut *connection).await?;
        }
    }
    Ok(())
}

/// Drops what lies below the low-water mark.
async fn forget(connection: &mut SqliteConnection, low: u64) -> sqlx::Result<()> {
    sqlx::query("DELETE FROM acked WHERE to_offset <= ?")
        .bind(integer(low))
        .execute(&mut *connection)
        .await?;
    sqlx::query(
        "DELETE FROM lease
         WHERE \"offset\" < ? AND (\"offset\", part) NOT IN (SELECT \"offset\", part FROM kept)",
    )
    .bind(integer(low))
    .execute(connection)
    .await?;
    Ok(())
}

async fn set_progress(connection: &mut SqliteConnection, progress: &Progress) -> sqlx::Result<()> {
    sqlx::query("INSERT OR REPLACE INTO progress VALUES (1, ?, ?, ?, ?)")
        .bind(progress.lineage.to_string())
        .bind(integer(progress.epoch))
        .bind(integer(progress.cursor))
        .bind(integer(progress.retry_seq))
        .execute(connection)
        .await?;
    Ok(())
}

fn progress_of(row: &SqliteRow) -> sqlx::Result<Progress> {
    let lineage: String = row.try_get(0)?;
    Ok(Progress {
        lineage: Uuid::parse_str(&lineage).map_err(|error| sqlx::Error::Decode(error.into()))?,
        epoch: unsigned(row.try_get(1)?),
        cursor: unsigned(row.try_get(2)?),
        retry_seq: unsigned(row.try_get(3)?),
    })
}

fn place_of(row: &SqliteRow) -> sqlx::Result<Place> {
    Ok(Place { offset: unsigned(row.try_get(0)?), part: row.try_get(1)? })
}
