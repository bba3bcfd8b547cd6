//! The sink's progress, in a table of the target: it moves in the transaction of the data, and only
//! from where this sink last saw it.

use tokio_postgres::Client;

use super::{failure, session::Session, sql::quote};
use crate::{
    error::{Class, Error, Result},
    sink::Progress,
};

/// Where the progress is kept.
#[derive(Debug)]
pub(super) struct Kept {
    schema: String,
    table: String,
    sink: String,
}

impl Kept {
    pub(super) fn new(table: &str, sink: &str) -> Result<Self> {
        let parts = table.split_once('.').filter(|(schema, table)| {
            !schema.is_empty() && !table.is_empty() && !table.contains('.')
        });
        let (schema, table) = parts.ok_or_else(|| {
            Error::config(format!("`progress_table` `{table}` is not the name of a table"))
                .remedy("schema.table, such as walrace.progress")
        })?;
        Ok(Self { schema: schema.into(), table: table.into(), sink: sink.into() })
    }

    fn name(&self) -> String {
        format!("{}.{}", quote(&self.schema), quote(&self.table))
    }

    /// Creates the table where it is absent.
    pub(super) async fn create(&self, client: &Client) -> Result<()> {
        if self.exists(client).await? {
            return Ok(());
        }
        let schema = "select from pg_namespace where nspname = $1";
        let schema = client.query_opt(schema, &[&self.schema]).await;
        // `if not exists` would ask for the right to create schemas even where there is one.
        let schema = match schema.map_err(|error| self.failed(&error))? {
            Some(_) => String::new(),
            None => format!("create schema {};", quote(&self.schema)),
        };
        let create = format!(
            "{schema} create table {} (sink text primary key, lineage uuid not null, \
             epoch bigint not null, cursor bigint not null, retry_seq bigint not null, \
             updated_at timestamptz not null default now())",
            self.name()
        );
        client.batch_execute(&create).await.map_err(|error| match error.code() {
            Some(code) if ["23505", "42P06", "42P07"].contains(&code.code()) => {
                Error::retry(format!("another sink creates {} at this moment", self.name()))
            }
            _ => self.failed(&error),
        })
    }

    async fn exists(&self, client: &Client) -> Result<bool> {
        let query = "select from pg_class c join pg_namespace n on n.oid = c.relnamespace \
                     where n.nspname = $1 and c.relname = $2";
        let row = client.query_opt(query, &[&self.schema, &self.table]).await;
        row.map(|row| row.is_some()).map_err(|error| self.failed(&error))
    }

    /// What the target has, without changing anything.
    pub(super) async fn read(&self, client: &Client) -> Result<Option<Progress>> {
        if !self.exists(client).await? {
            return Ok(None);
        }
        let query = format!(
            "select lineage::text, epoch, cursor, retry_seq from {} where sink = $1",
            self.name()
        );
        let row = client.query_opt(&query, &[&self.sink]).await;
        let Some(row) = row.map_err(|error| self.failed(&error))? else { return Ok(None) };
        let number = |name| {
            let value: i64 = row.try_get(name).map_err(|error| self.failed(&error))?;
            u64::try_from(value).map_err(|_| self.nonsense())
        };
        let lineage: String = row.try_get("lineage").map_err(|error| self.failed(&error))?;
        Ok(Some(Progress {
            lineage: lineage.parse().map_err(|_| self.nonsense())?,
            epoch: number("epoch")?,
            cursor: number("cursor")?,
            retry_seq: number("retry_seq")?,
        }))
    }

    /// Locks the row of this sink, so that the sink's own transaction waits with its commit.
    pub(super) fn lock_sql(&self) -> String {
        let sink = self.sink.replace('\'', "''");
        format!("select from {} where sink = '{sink}' for update", self.name())
    }

    /// Moves the progress from what this sink last saw, within the transaction that is open.
    pub(super) async fn store(
        &self,
        session: &mut Session,
        seen: Option<&Progress>,
        progress: &Progress,
    ) -> Result<()> {
        if seen.is_some_and(|seen| seen.epoch > progress.epoch) {
            return Err(self.taken());
        }
        let client = session.client();
        let [epoch, cursor, retry_seq] = numbers(progress)?;
        let lineage = progress.lineage.to_string();
        let done = match seen {
            None => {
                let insert = format!(
                    "insert into {} (sink, lineage, epoch, cursor, retry_seq) \
                     values ($1, $2::text::uuid, $3, $4, $5) on conflict (sink) do nothing",
                    self.name()
                );
                client.execute(&insert, &[&self.sink, &lineage, &epoch, &cursor, &retry_seq]).await
            }
            Some(seen) => {
                let statement = match &session.advance {
                    Some(statement) => statement.clone(),
                    None => {
                        let update = self.update();
                        let statement = client.prepare(&update).await;
                        let statement = statement.map_err(|error| self.failed(&error))?;
                        session.advance.insert(statement).clone()
                    }
                };
                let old = numbers(seen)?;
                client
                    .execute(
                        &statement,
                        &[
                            &self.sink,
                            &lineage,
                            &epoch,
                            &cursor,
                            &retry_seq,
                            &seen.lineage.to_string(),
                            &old[0],
                            &old[1],
                            &old[2],
                        ],
                    )
                    .await
            }
        };
        match done.map_err(|error| self.failed(&error))? {
            1 => Ok(()),
            _ => Err(self.taken()),
        }
    }

    fn update(&self) -> String {
        format!(
            "update {} set lineage = $2::text::uuid, epoch = $3, cursor = $4, retry_seq = $5, \
             updated_at = now() where sink = $1 and lineage = $6::text::uuid and epoch = $7 \
             and cursor = $8 and retry_seq = $9",
            self.name()
        )
    }

    fn taken(&self) -> Error {
        let (name, sink) = (self.name(), &self.sink);
        Error::retry(format!("another walrace writes the progress of sink {sink} in {name}"))
            .remedy("run one walrace with this sink at a time")
    }

    fn nonsense(&self) -> Error {
        Error::new(Class::Damaged, format!("{} holds a negative number", self.name()))
    }

    fn failed(&self, error: &tokio_postgres::Error) -> Error {
        failure::of(error).context(format!("while keeping progress in {}", self.name()))
    }
}

fn numbers(progress: &Progress) -> Result<[i64; 3]> {
    let number =
        |value: u64| i64::try_from(value).map_err(|_| Error::bug("a progress is beyond 63 bits"));
    Ok([number(progress.epoch)?, number(progress.cursor)?, number(progress.retry_seq)?])
}
