//! What every SQLite file of ours has in common: how it is opened, brought up to date, and what its
//! errors mean.

use std::path::Path;

use sqlx::{
    Row,
    sqlite::{
        SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous,
    },
};

use crate::error::{Class, Classify, Error, Result, ResultExt};

/// How a file is called in errors.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Named {
    /// Such as `the catalog`.
    pub(crate) what: &'static str,
    /// The setting that names its directory.
    pub(crate) setting: &'static str,
}

impl Named {
    fn full(self, error: Error) -> Error {
        error.remedy(format!("free space on the volume of {}", self.setting))
    }
}

/// Opens or creates the file, in WAL mode with `synchronous = FULL`: a call that returned has
/// survived a power loss. Applies each of `steps` that it has not seen.
pub(crate) async fn open(path: &Path, named: Named, steps: &[&str]) -> Result<SqlitePool> {
    let options = SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .foreign_keys(true);
    let pool = SqlitePoolOptions::new()
        .max_connections(1) // one writer; readers of these files are few and short
        .connect_with(options)
        .await
        .map_err(|error| unopened(path, named, error))?;
    migrate(&pool, named, steps)
        .await
        .context(|| format!("cannot open {} {}", named.what, path.display()))?;
    Ok(pool)
}

/// Opens the file without changing it; `None` where there is none, or nothing in it yet. It may be
/// in use.
pub(crate) async fn inspect(
    path: &Path,
    named: Named,
    steps: &[&str],
) -> Result<Option<SqlitePool>> {
    if !path.exists() {
        return Ok(None);
    }
    let options = SqliteConnectOptions::new().filename(path).read_only(true);
    let open = || format!("cannot read {} {}", named.what, path.display());
    let pool = SqlitePoolOptions::new()
        .max_connections(1)
        .connect_with(options)
        .await
        .class(Class::Config, open)?;
    match version(&pool, named).await.context(open)? {
        0 => Ok(None), // whoever created it came no further
        version if version == steps.len() => Ok(Some(pool)),
        version => Err(Error::config(format!(
            "{}: its schema is version {version}, and this walrace knows {}",
            open(),
            steps.len()
        ))
        .remedy("use the walrace that runs on it")),
    }
}

async fn version(pool: &SqlitePool, named: Named) -> Result<usize> {
    let failed = |error| failed(named, "read the version of", "the schema", error);
    let row = sqlx::query("PRAGMA user_version").fetch_one(pool).await.map_err(failed)?;
    let version: i64 = row.try_get(0).map_err(failed)?;
    Ok(usize::try_from(version).unwrap_or(usize::MAX))
}

/// Applies each step that the file has not seen, in a transaction of its own.
async fn migrate(pool: &SqlitePool, named: Named, steps: &[&str]) -> Result<()> {
    let failed = |error| failed(named, "bring up to date", "the schema", error);
    let version = version(pool, named).await?;
    if version > steps.len() {
        return Err(Error::config(format!(
            "its schema is version {version}, and this walrace knows {}",
            steps.len()
        ))
        .remedy("run the newer walrace that wrote it"));
    }
    for (index, step) in steps.iter().enumerate().skip(version) {
        let step = format!("BEGIN; {step}; PRAGMA user_version = {}; COMMIT;", index + 1);
        sqlx::raw_sql(sqlx::AssertSqlSafe(step)).execute(pool).await.map_err(failed)?;
    }
    Ok(())
}

/// SQLite's primary and extended result codes.
const BUSY: i32 = 5;
const IO_ERROR: i32 = 10;
const FULL: i32 = 13;
const IO_ERROR_SHARED_MEMORY_SIZE: i32 = 4874;

fn code_of(error: &sqlx::Error) -> i32 {
    let code = error.as_database_error().and_then(|error| error.code()).unwrap_or_default();
    code.parse().unwrap_or_default()
}

/// A start on a full disk finds no room for the file that SQLite's readers share.
fn unopened(path: &Path, named: Named, error: sqlx::Error) -> Error {
    let (path, what) = (path.display(), named.what);
    let code = code_of(&error);
    if code == IO_ERROR_SHARED_MEMORY_SIZE || code & 0xFF == FULL {
        let error =
            Error::retry(format!("cannot open {what} {path}: its disk is full")).caused_by(error);
        return named.full(error);
    }
    Error::config(format!("cannot open {what} {path}")).caused_by(error)
}

/// Busy, slow and full files heal; anything else means that the file is not what we wrote.
pub(crate) fn failed(named: Named, action: &str, object: &str, error: sqlx::Error) -> Error {
    let primary = code_of(&error) & 0xFF;
    let slow = matches!(error, sqlx::Error::PoolTimedOut | sqlx::Error::Io(_));
    let class = match primary {
        BUSY | IO_ERROR | FULL => Class::Retry,
        _ if slow => Class::Retry,
        _ => Class::Damaged,
    };
    let what = named.what;
    let error = Error::new(class, format!("cannot {action} {object} in {what}")).caused_by(error);
    if primary == FULL { named.full(error) } else { error }
}

/// SQLite's integers are signed; offsets stay below 2^53.
pub(crate) fn integer(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

pub(crate) fn unsigned(value: i64) -> u64 {
    u64::try_from(value).unwrap_or_default()
}
