//! Tables of another PostgreSQL, kept the same: each transaction of the source is part of one
//! transaction of the target, which holds the progress too.
//!
//! ```text
//!   changes of a write ──► step ──► run ──► COPY or statements, many at once ─┐
//!        │  (a table's plan: columns, types, key)                             ▼
//!        └── refused? undo, then one by one, to name the row ──► progress ──► commit
//! ```
//!
//! A write may end within a transaction of the source: it stays open at the target until a later
//! write brings its end.

use async_trait::async_trait;
use tokio::time::timeout;

use super::{Capabilities, Context, Progress, Sink, With, Written};
use crate::{
    change::{Batch, Change, Op, Value},
    config::{self, OnRefusal, OnTruncate},
    error::{Class, Error, Result},
    failpoint,
};
use connect::Target;
use progress::Kept;
use session::{Open, Session};
use step::Step;
use table::{Naming, Policy};

mod connect;
mod failure;
mod progress;
mod replica;
mod run;
mod session;
mod sql;
mod step;
mod table;
mod texts;

pub use replica::{Mapped, MappedColumn, Mending, Replica};

/// The `postgres` sink.
pub(super) struct Postgres {
    target: Target,
    naming: Naming,
    policy: Policy,
    on_refusal: OnRefusal,
    on_truncate: OnTruncate,
    kept: Kept,
    context: Context,
    /// Gone after each failure; a cancelled write takes it along.
    session: Option<Session>,
    /// The progress that the target had when this sink last looked.
    seen: Option<Progress>,
}

impl Postgres {
    pub(in crate::sink) fn new(options: &config::PostgresTarget, with: With) -> Result<Self> {
        let With { name, context, .. } = with;
        with.refuse_types()?;
        Ok(Self {
            target: Target::new(options)?,
            naming: Naming::new(&options.table, &context.names)?,
            policy: Policy { columns: options.missing_columns, table: options.missing_table },
            on_refusal: options.on_refusal,
            on_truncate: options.on_truncate,
            kept: Kept::new(&options.progress_table, name)?,
            context: context.clone(),
            session: None,
            seen: None,
        })
    }

    async fn write_within(
        &mut self,
        session: &mut Session,
        batch: &Batch,
        progress: &Progress,
    ) -> Result<Written> {
        let changes = batch.changes.as_slice();
        if changes.is_empty() || self.on_refusal == OnRefusal::Park {
            self.apply(session, changes).await?;
            self.commit(session, progress).await?;
            return Ok(Written::All);
        }
        let (closed, rest) = changes.split_at(closed(changes));
        if let Some(last) = closed.last() {
            let cursor = if rest.is_empty() { progress.cursor } else { last.offset + 1 };
            self.apply(session, closed).await?;
            self.commit(session, &Progress { cursor, ..*progress }).await?;
        }
        let (Some(first), Some(last)) = (rest.first(), rest.last()) else {
            return Ok(Written::All);
        };
        let opens = Open { transaction: first.transaction, end: last.offset + 1 };
        match session.open {
            // What would have closed it was filtered out.
            Some(open) if open.transaction != opens.transaction => {
                self.commit(session, &Progress { cursor: open.end, ..*progress }).await?;
            }
            _ => {}
        }
        let durable = self.durable(session, first.offset, progress).await?;
        self.apply(session, rest).await?;
        session.open = Some(opens);
        Ok(Written::Until(durable))
    }

    /// The cursor that the target holds while a transaction is open. Where it holds none of this
    /// epoch, the transaction's begin is written first, so that nobody knows of more than it has.
    async fn durable(
        &mut self,
        session: &mut Session,
        begin: u64,
        progress: &Progress,
    ) -> Result<u64> {
        match self.seen {
            Some(seen) if seen.epoch == progress.epoch => Ok(seen.cursor),
            _ => {
                self.commit(session, &Progress { cursor: begin, ..*progress }).await?;
                Ok(begin)
            }
        }
    }

    /// Writes the changes to the open transaction: together, and where the target refuses some of
    /// them, one by one. That names the row, and passes where only their grouping was refused.
    async fn apply(&mut self, session: &mut Session, changes: &[Change]) -> Result<()> {
        if changes.is_empty() {
            return Ok(());
        }
        session.mark().await?;
        let filtered = loop {
            match self.apply_together(session, changes).await {
                Err(error) if error.class() != Class::Data => return Err(error),
                Err(_) if session.was_copy_in_vain() => session.undo().await?,
                Err(_) => {
                    session.undo().await?;
                    session.keep_order();
                    break self.apply_singly(session, changes).await?;
                }
                Ok(filtered) => break filtered,
            }
        };
        failpoint::reach("postgres::after_rows");
        self.context.count_filtered(filtered);
        Ok(())
    }

    async fn apply_together(&mut self, session: &mut Session, changes: &[Change]) -> Result<u64> {
        let mut filtered = 0;
        for change in changes {
            filtered += u64::from(!self.add(session, change).await?);
        }
        session.flush().await?;
        Ok(filtered)
    }

    async fn apply_singly(&mut self, session: &mut Session, changes: &[Change]) -> Result<u64> {
        let mut filtered = 0;
        let mut changes = changes.iter().peekable();
        while let Some(change) = changes.next() {
            let added = self.add(session, change).await;
            let truncates = |change: &Change| change.op == Op::Truncate;
            // Tables that were truncated together may refer to each other.
            let goes_on = truncates(change) && changes.peek().is_some_and(|next| truncates(next));
            let done = match added {
                Ok(taken) if goes_on => Ok(taken),
                Ok(taken) => session.flush().await.map(|()| taken),
                Err(error) => Err(error),
            };
            filtered += u64::from(!done.map_err(|error| named(error, change))?);
        }
        Ok(filtered)
    }

    /// `false`: the change is nothing to this target.
    async fn add(&mut self, session: &mut Session, change: &Change) -> Result<bool> {
        let Some(table) = &change.table else { return Ok(false) };
        if change.op == Op::Truncate && self.on_truncate == OnTruncate::Ignore {
            return Ok(false);
        }
        let target = self.naming.target(change)?;
        let plan = session.plan(table, target, self.policy).await?;
        let step = Step::of(change, &plan)?;
        session.add(&plan, step).await?;
        Ok(true)
    }

    async fn commit(&mut self, session: &mut Session, progress: &Progress) -> Result<()> {
        session.begin().await?;
        self.kept.store(session, self.seen.as_ref(), progress).await?;
        failpoint::reach("postgres::before_commit");
        session.commit().await?;
        failpoint::reach("postgres::after_commit");
        self.seen = Some(*progress);
        Ok(())
    }

    /// A refusal is for a person where transactions stay whole.
    fn explained(&self, error: Error) -> Error {
        let error = error.context(format!("while writing to {}", self.target.address));
        if error.class() != Class::Data || self.on_refusal == OnRefusal::Park {
            return error;
        }
        let message = format!("the target refuses a row: {}", error.summary());
        let remedy = "mend what it names at the target; or pass the change with \
                      `walrace sink skip`; or set on_refusal = \"park\", which commits the rest \
                      of its transaction without it";
        Error::config(message).remedy(match error.remedy_text() {
            Some(first) => format!("{first}; {remedy}"),
            None => remedy.to_owned(),
        })
    }
}

/// How many of the changes belong to transactions that have ended.
fn closed(changes: &[Change]) -> usize {
    let next = changes.iter().skip(1).map(|change| Some(change.transaction)).chain([None]);
    let ends = changes.iter().zip(next).map(|(change, next)| {
        change.closes_transaction || next.is_some_and(|next| next != change.transaction)
    });
    ends.enumerate().filter(|(_, ends)| *ends).last().map_or(0, |(index, _)| index + 1)
}

/// Says which row a refusal is about.
fn named(error: Error, change: &Change) -> Error {
    let Some(table) = &change.table else { return error };
    let row = change.before.row().filter(|_| change.op == Op::Delete).or(change.key_row());
    let keys = table.key_columns();
    let values = row.map(|row| row.values().collect::<Vec<_>>()).unwrap_or_default();
    let pairs = keys.iter().filter_map(|&index| {
        let (column, value) = (table.columns.get(index)?, values.get(index)?);
        match value {
            Value::Text(text) => Some(format!("{}={}", column.name, String::from_utf8_lossy(text))),
            Value::Null | Value::Unchanged => None,
        }
    });
    let key = pairs.collect::<Vec<_>>().join(", ");
    let (op, offset) = (change.op.word(), change.offset);
    let place = format!("{op} of {table} ({key}) at offset {offset}");
    error.context(format!("while applying the {place} of transaction {}", change.transaction.xid))
}

#[async_trait]
impl Sink for Postgres {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            transactional_progress: true,
            atomic: self.on_refusal == OnRefusal::Block,
            state_target: true,
            routes: true,
            ..Capabilities::default()
        }
    }

    async fn open(&mut self) -> Result<Option<Progress>> {
        self.session = None;
        let session = Session::new(self.target.connect().await?);
        let client = session.client();
        self.kept.create(&client).await?;
        self.seen = self.kept.read(&client).await?;
        self.session = Some(session);
        Ok(self.seen)
    }

    async fn write(&mut self, batch: &Batch, progress: &Progress) -> Result<Written> {
        let Some(mut session) = self.session.take() else {
            let address = &self.target.address;
            return Err(Error::retry(format!("there is no connection to {address}")));
        };
        let limit = self.target.limit;
        let written = timeout(limit, self.write_within(&mut session, batch, progress)).await;
        let error = match written {
            Ok(Ok(written)) => {
                self.session = Some(session);
                return Ok(written);
            }
            Ok(Err(error)) => self.explained(error),
            Err(_) => {
                let (address, ms) = (&self.target.address, limit.as_millis());
                return Err(Error::retry(format!("{address} takes longer than {ms} ms to write")));
            }
        };
        // The batch comes again in halves, without another `open`.
        if error.class() == Class::Data
            && matches!(timeout(limit, session.roll_back()).await, Ok(Ok(())))
        {
            self.session = Some(session);
        }
        Err(error)
    }

    async fn peek(&mut self) -> Result<Option<Progress>> {
        let connection = self.target.connect().await?;
        self.kept.read(&connection.client).await
    }

    async fn close(&mut self) -> Result<()> {
        self.session = None;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{super::testing, *};
    use crate::config::{PostgresTarget, Secret};

    #[test]
    fn a_transaction_is_closed_by_its_last_change_or_by_the_next_transaction() {
        let mut changes = testing::batch(0..4).changes;
        let ends = |changes: &mut [Change], xids: [u32; 4], closes: [bool; 4]| {
            for (change, (xid, closes)) in changes.iter_mut().zip(xids.into_iter().zip(closes)) {
                change.transaction = crate::change::Transaction { xid, ..Default::default() };
                change.closes_transaction = closes;
            }
            closed(changes)
        };
        let (no, yes) = (false, true);
        assert_eq!(ends(&mut changes, [1, 1, 1, 1], [no, no, no, no]), 0);
        assert_eq!(ends(&mut changes, [1, 1, 2, 2], [no, yes, no, no]), 2);
        assert_eq!(ends(&mut changes, [1, 1, 1, 2], [no, no, no, no]), 3);
        assert_eq!(ends(&mut changes, [1, 2, 3, 3], [yes, yes, no, yes]), 4);
        assert_eq!(closed(&[]), 0);
    }

    #[test]
    fn only_a_sink_that_blocks_keeps_transactions_whole() {
        let context = testing::context();
        let mut options = PostgresTarget::to(Secret::new("postgres://u@h/d"));
        let sink = |options: &_| Postgres::new(options, testing::with(&context)).unwrap();
        assert!(sink(&options).capabilities().atomic);
        options.on_refusal = OnRefusal::Park;
        assert!(!sink(&options).capabilities().atomic);
    }
}
