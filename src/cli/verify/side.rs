//! The source as it is read: rows at a position of its log, and who writes them at this moment.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use crate::{
    change::Lsn,
    error::{Class, Classify, Error, Result},
    source::postgres::Session,
};

const LOOK_EVERY: Duration = Duration::from_millis(20);

/// The log is written out some tenths of a second after the server was asked to.
const FLUSH_MAX: Duration = Duration::from_secs(30);

const SETTINGS: &str = "set standard_conforming_strings = on; set lc_monetary = 'C'; \
                        set statement_timeout = '50s'; set lock_timeout = '10s'";

/// All that a snapshot taken before shows is below it: a commit has its record in the log before
/// it shows. On a standby it shows while it is replayed, after it was received.
const POSITION: &str = "select case when pg_is_in_recovery() \
                        then greatest(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn()) \
                        else pg_current_wal_insert_lsn() end";

/// An empty transaction, which has the log written out; a log that nobody writes out is not sent.
const HAVE_WRITTEN: &str =
    "select case when pg_is_in_recovery() then null else pg_current_xact_id() end";

/// Rows of texts.
pub(super) type Texts = Vec<Vec<Option<String>>>;

/// The database that is captured.
#[derive(Clone)]
pub(super) struct Origin(Arc<Mutex<Session>>);

impl Origin {
    pub(super) async fn connect(url: String) -> Result<Self> {
        let session = tokio::task::spawn_blocking(move || {
            let mut session = Session::connect(&url)?;
            session.execute(SETTINGS)?;
            Ok::<_, Error>(session)
        });
        let session = session.await.class(Class::Bug, || "connecting panicked")??;
        Ok(Self(Arc::new(Mutex::new(session))))
    }

    /// Runs statements: the rows of all.
    pub(super) async fn query(&self, sql: String) -> Result<Texts> {
        let session = Arc::clone(&self.0);
        let answer = tokio::task::spawn_blocking(move || {
            session.lock().unwrap_or_else(PoisonError::into_inner).execute(&sql)
        });
        answer.await.class(Class::Bug, || "a statement to the source panicked")?
    }

    /// The rows of a statement in a snapshot of their own, and a position below which lies
    /// everything that this snapshot shows.
    pub(super) async fn read(&self, sql: &str) -> Result<(Texts, Lsn)> {
        let whole = format!(
            "begin isolation level repeatable read read only; {sql}; {POSITION}; commit; \
             {HAVE_WRITTEN}"
        );
        let answer = self.query(whole).await;
        if answer.is_err() {
            let _ = self.query("rollback".to_owned()).await; // what failed is said already
        }
        let mut rows = answer?;
        rows.pop();
        let position = rows.pop().and_then(|row| row.into_iter().next().flatten());
        let lacks = || Error::retry("the source does not say where its log ends");
        Ok((rows, position.ok_or_else(lacks)?.parse()?))
    }

    /// Where the log ends.
    pub(super) async fn position(&self) -> Result<Lsn> {
        Ok(self.read("select 1").await?.1)
    }

    /// Waits until the log is on the server's disk up to `lsn`.
    pub(super) async fn wait_for_flush(&self, lsn: Lsn) -> Result<()> {
        let deadline = Instant::now() + FLUSH_MAX;
        let sql = format!(
            "select case when pg_is_in_recovery() then true \
             else pg_current_wal_flush_lsn() >= '{lsn}' end"
        );
        while Instant::now() < deadline {
            if is_true(&self.query(sql.clone()).await?) {
                return Ok(());
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        Err(Error::retry(format!("the source does not write its log out up to {lsn}")))
    }

    /// Waits until each transaction that writes to the table now has ended, or was seen not to be
    /// in its commit. After that, everything that was in the log when this was called shows.
    ///
    /// A commit is in the log, and may be at the target, before it shows: with synchronous
    /// replication for as long as a standby takes. But a transaction keeps its locks until it
    /// shows. One that is idle has not begun to commit.
    pub(super) async fn wait_for_writers(
        &self,
        table: u32,
        limit: Duration,
    ) -> Result<Option<String>> {
        let sql = format!(
            "select distinct l.virtualtransaction, coalesce('pid ' || l.pid, 'a prepared one')
             from pg_locks l left join pg_stat_activity a on a.pid = l.pid
             where l.locktype = 'relation' and l.granted
               and l.database = (select oid from pg_database where datname = current_database())
               and (l.relation = {table}
                    or l.relation in (select relid from pg_partition_tree({table})))
               and l.mode in ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock',
                              'AccessExclusiveLock')
               and coalesce(a.state, '') not in
                   ('idle in transaction', 'idle in transaction (aborted)')"
        );
        let deadline = Instant::now() + limit;
        let mut waited: Option<HashSet<String>> = None;
        loop {
            let rows = self.query(sql.clone()).await?;
            let mut holders = rows.into_iter().filter_map(|row| {
                let mut cells = row.into_iter();
                Some((cells.next()??, cells.next()??))
            });
            let left = match &waited {
                None => holders.collect::<Vec<_>>(),
                Some(waited) => holders.by_ref().filter(|(id, _)| waited.contains(id)).collect(),
            };
            let Some((_, who)) = left.first().cloned() else { return Ok(None) };
            if Instant::now() >= deadline {
                return Ok(Some(format!("a transaction holds the table ({who})")));
            }
            waited = Some(left.into_iter().map(|(id, _)| id).collect());
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Which of these types it has.
    pub(super) async fn known_types(&self, types: &[&str]) -> Result<HashSet<String>> {
        let list = types.iter().map(|ty| super::pair::literal(ty)).collect::<Vec<_>>().join(",");
        let sql = format!(
            "select t from unnest(array[{list}]::text[]) t where to_regtype(t) is not null"
        );
        let rows = self.query(sql).await?;
        Ok(rows.into_iter().filter_map(|row| row.into_iter().next().flatten()).collect())
    }
}

fn is_true(rows: &Texts) -> bool {
    rows.first().and_then(|row| row.first()).is_some_and(|cell| cell.as_deref() == Some("t"))
}
