//! What survives a crash: the low-water mark, what is done beyond it, and the leases, in a SQLite
//! file of the sink. A call that returned has survived a power loss.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use serde_json::json;
use sqlx::{
    Row, SqliteConnection,
    sqlite::{SqlitePool, SqliteRow},
};
use uuid::Uuid;

use super::{
    feed::{Message, Place},
    leases::Stored,
    ranges::Ranges,
};
use crate::{
    change::Keys,
    error::{Class, Classify, Error, Result},
    sink::Progress,
    sqlite::{self, Named, integer, unsigned},
};

const NAMED: Named = Named { what: "the state of the pull sink", setting: "data_dir" };
const STEPS: [&str; 2] = [include_str!("0001_pull.sql"), include_str!("0002_leases.sql")];

/// The open file.
#[derive(Debug)]
pub(super) struct Store {
    path: PathBuf,
    connection: SqliteConnection,
    /// A transaction may be open that was left in the middle.
    unsure: bool,
}

/// What the file holds beside the progress.
#[derive(Debug, Default)]
pub(super) struct Held {
    pub(super) done: Ranges,
    pub(super) leases: Vec<Stored>,
    pub(super) kept: Vec<Message>,
}

/// What is to be written in one step.
#[derive(Debug)]
pub(super) struct Snapshot {
    pub(super) leases: Vec<Stored>,
    /// Numbers of leases that go.
    pub(super) over: BTreeSet<u64>,
    /// Ranges that are done, each with those that it touches.
    pub(super) done: Vec<(u64, u64)>,
    pub(super) keep: Vec<Message>,
    pub(super) unkept: BTreeSet<Place>,
    pub(super) progress: Progress,
}

impl Store {
    /// Opens or creates the file.
    pub(super) async fn open(path: &Path) -> Result<Self> {
        if let Some(directory) = path.parent() {
            std::fs::create_dir_all(directory)
                .class(Class::Retry, || format!("cannot create {}", directory.display()))?;
        }
        Self::of(path, &sqlite::open(path, NAMED, &STEPS).await?).await
    }

    /// Its one connection: to look after it as a pool does takes as long as a small write.
    async fn of(path: &Path, pool: &SqlitePool) -> Result<Self> {
        let connection = pool.acquire().await.map_err(|error| failed(path, "connect", error))?;
        Ok(Self { path: path.to_owned(), connection: connection.detach(), unsure: false })
    }

    /// The progress in a file that nobody has open, without changing it.
    pub(super) async fn peek(path: &Path) -> Result<Option<Progress>> {
        match sqlite::inspect(path, NAMED, &STEPS).await? {
            Some(pool) => Self::of(path, &pool).await?.progress().await,
            None => Ok(None),
        }
    }

    /// How far the sink is, if it ever began.
    pub(super) async fn progress(&mut self) -> Result<Option<Progress>> {
        self.roll_back().await;
        let row = sqlx::query("SELECT lineage, epoch, cursor, retry_seq FROM progress")
            .fetch_optional(&mut self.connection)
            .await
            .map_err(|error| self.failed("read the progress", error))?;
        let progress = row.as_ref().map(progress_of).transpose();
        progress.map_err(|error| self.failed("decode the progress", error))
    }

    /// Everything else.
    pub(super) async fn held(&mut self) -> Result<Held> {
        self.read_held().await.map_err(|error| self.failed("read the leases", error))
    }

    async fn read_held(&mut self) -> sqlx::Result<Held> {
        self.roll_back().await;
        let mut held = Held::default();
        for row in sqlx::query("SELECT from_offset, to_offset FROM acked")
            .fetch_all(&mut self.connection)
            .await?
        {
            held.done.insert(unsigned(row.try_get(0)?), unsigned(row.try_get(1)?));
        }
        let leases = sqlx::query("SELECT id, visible_at, acked, runs FROM leases ORDER BY id");
        for row in leases.fetch_all(&mut self.connection).await? {
            held.leases.push(Stored {
                id: unsigned(row.try_get(0)?),
                visible_at: row.try_get(1)?,
                acked: row.try_get(2)?,
                runs: serde_json::from_str(row.try_get(3)?)
                    .map_err(|error| sqlx::Error::Decode(error.into()))?,
            });
        }
        let kept = sqlx::query("SELECT \"offset\", part, room, keys, body FROM kept ORDER BY 1, 2");
        for row in kept.fetch_all(&mut self.connection).await? {
            let room: Option<i64> = row.try_get(2)?;
            let keys: &[u8] = row.try_get(3)?;
            held.kept.push(Message {
                place: Place { offset: unsigned(row.try_get(0)?), part: row.try_get(1)? },
                keys: room.map(|room| Keys::from_bytes(room.cast_unsigned(), keys)),
                body: row.try_get::<Vec<u8>, _>(4)?.into(),
                kept: true,
            });
        }
        Ok(held)
    }

    /// Begins an epoch: what is done and leased belongs to the one before. Retried messages below
    /// the place where it begins stay, because nobody brings them again.
    pub(super) async fn begin(&mut self, progress: &Progress) -> Result<()> {
        let statements = format!(
            "DELETE FROM acked; DELETE FROM leases; DELETE FROM kept WHERE \"offset\" >= {};\n{}",
            progress.cursor,
            set(progress)
        );
        let begun = self.write(&[], &statements).await;
        begun.map_err(|error| self.failed("begin an epoch", error))
    }

    /// Writes down what happened, in one step.
    pub(super) async fn save(&mut self, snapshot: &Snapshot) -> Result<()> {
        let saved = self.write(&snapshot.keep, &snapshot.statements()).await;
        saved.map_err(|error| self.failed("record acknowledgements", error))
    }

    /// Ends what a caller who went away, or an error, left in the middle.
    async fn roll_back(&mut self) {
        if self.unsure {
            // Fails where nothing was left open.
            let _ = sqlx::raw_sql("ROLLBACK").execute(&mut self.connection).await;
        }
    }

    /// One transaction, in one trip to SQLite's thread: that costs more than most statements do.
    async fn write(&mut self, keep: &[Message], statements: &str) -> sqlx::Result<()> {
        self.roll_back().await;
        self.unsure = true;
        if keep.is_empty() {
            let statements = sqlx::AssertSqlSafe(format!("BEGIN;\n{statements}\nCOMMIT;"));
            sqlx::raw_sql(statements).execute(&mut self.connection).await?;
        } else {
            sqlx::raw_sql("BEGIN").execute(&mut self.connection).await?;
            for message in keep {
                save_message(&mut self.connection, message).await?;
            }
            let statements = sqlx::AssertSqlSafe(format!("{statements}\nCOMMIT;"));
            sqlx::raw_sql(statements).execute(&mut self.connection).await?;
        }
        self.unsure = false;
        Ok(())
    }

    fn failed(&self, what: &str, error: sqlx::Error) -> Error {
        failed(&self.path, what, error)
    }
}

fn failed(path: &Path, what: &str, error: sqlx::Error) -> Error {
    let code = error.as_database_error().and_then(|error| error.code()).unwrap_or_default();
    let primary = code.parse::<i32>().unwrap_or_default() & 0xFF;
    let file = error.as_database_error().is_none();
    // Busy, slow and full files heal; anything else means that the file is not what we wrote.
    let class = match primary {
        5 | 10 | 13 => Class::Retry,
        _ if file && !matches!(error, sqlx::Error::Decode(_)) => Class::Retry,
        _ => Class::Damaged,
    };
    let error = Error::new(class, format!("{} cannot {what}", path.display())).caused_by(error);
    if primary == 13 { error.remedy("free space on the volume of data_dir") } else { error }
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

impl Snapshot {
    /// All but the messages to keep: it is made of numbers.
    fn statements(&self) -> String {
        let mut text = String::new();
        for Place { offset, part } in &self.unkept {
            text += &format!("DELETE FROM kept WHERE \"offset\" = {offset} AND part = {part};\n");
        }
        for lease in &self.leases {
            let Stored { id, visible_at, acked, .. } = lease;
            let (acked, runs) = (u8::from(*acked), json!(lease.runs));
            text += &format!(
                "INSERT OR REPLACE INTO leases VALUES ({id}, {visible_at}, {acked}, '{runs}');\n"
            );
        }
        for id in &self.over {
            text += &format!("DELETE FROM leases WHERE id = {id};\n");
        }
        for (from, to) in &self.done {
            text += &format!(
                "DELETE FROM acked WHERE from_offset >= {from} AND from_offset < {to};\n\
                 INSERT INTO acked VALUES ({from}, {to});\n"
            );
        }
        let progress = &self.progress;
        text += &format!("DELETE FROM acked WHERE to_offset <= {};\n", progress.cursor);
        text + &set(progress)
    }
}

fn set(Progress { lineage, epoch, cursor, retry_seq }: &Progress) -> String {
    format!(
        "INSERT OR REPLACE INTO progress VALUES (1, '{lineage}', {epoch}, {cursor}, {retry_seq});"
    )
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::Timestamp;

    #[tokio::test]
    async fn leases_of_an_older_file_are_taken_over() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sqlite");
        let pool = sqlite::open(&path, NAMED, &STEPS[..1]).await.unwrap();
        let later = Timestamp::now().0 + 3_600_000_000;
        let rows = format!("INSERT INTO lease VALUES (5, 0, 2, {later}, 0), (6, 1, 1, 0, 1)");
        sqlx::raw_sql(sqlx::AssertSqlSafe(rows)).execute(&pool).await.unwrap();
        pool.close().await;
        let held = Store::open(&path).await.unwrap().held().await.unwrap();
        let leases: Vec<_> =
            held.leases.iter().map(|lease| (lease.visible_at, lease.acked, &lease.runs)).collect();
        assert_eq!(leases, [(later, false, &vec![(5, 1, 0, 2)]), (0, true, &vec![(6, 1, 1, 1)])]);
    }

    #[tokio::test]
    async fn a_transaction_that_failed_in_the_middle_leaves_nothing_and_stops_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let mut store = Store::open(&directory.path().join("a.sqlite")).await.unwrap();
        let begun = Progress { lineage: Uuid::nil(), epoch: 1, cursor: 4, retry_seq: 0 };
        store.begin(&begun).await.unwrap();
        store
            .write(&[], "DELETE FROM progress; INSERT INTO nothing VALUES (1);")
            .await
            .unwrap_err();
        let done = Progress { cursor: 9, ..begun };
        let snapshot = Snapshot {
            leases: Vec::new(),
            over: BTreeSet::new(),
            done: vec![(20, 22)],
            keep: Vec::new(),
            unkept: BTreeSet::new(),
            progress: done,
        };
        assert_eq!(store.progress().await.unwrap(), Some(begun));
        store.save(&snapshot).await.unwrap();
        assert_eq!(store.progress().await.unwrap(), Some(done));
        assert_eq!(store.held().await.unwrap().done.iter().collect::<Vec<_>>(), [(20, 22)]);
    }
}
