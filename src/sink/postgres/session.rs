//! A session with the target: its transaction, its statements, and the replies that are awaited.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    pin::{Pin, pin},
    sync::Arc,
    task::Poll,
};

use bytes::Bytes;
use futures_util::SinkExt;
use tokio_postgres::{Client, Statement, error::SqlState};

use super::{
    connect::Connection,
    failure,
    run::{self, Run, Runs, Write},
    sql::Shape,
    step::{self, Step},
    table::{Plan, Plans, Policy, Target},
};
use crate::{
    change::{Row, Transaction},
    error::{Error, Result, ResultExt},
    schema::Table,
};

/// Statements whose replies are awaited at once, at most.
const WAITING_MAX: usize = 256;

/// Prepared statements at most: an update has one for each set of columns that it changes.
const STATEMENTS_MAX: usize = 1_000;

const BEGIN: &str = "begin isolation level read committed";

/// The transaction of the source that is open at the target.
#[derive(Clone, Copy, Debug)]
pub(super) struct Open {
    pub(super) transaction: Transaction,
    /// The offset after its last change.
    pub(super) end: u64,
}

/// A connection with what is known over it.
pub(super) struct Session {
    connection: Connection,
    plans: Plans,
    statements: HashMap<(usize, Shape), Statement>,
    /// Tables of which a row was there already when COPY brought it.
    not_copied: HashSet<String>,
    copy_in_vain: bool,
    runs: Runs,
    truncates: Vec<String>,
    waiting: VecDeque<Waiting>,
    is_begun: bool,
    has_savepoint: bool,
    pub(super) open: Option<Open>,
    /// The statement that moves the progress.
    pub(super) advance: Option<Statement>,
}

type Reply = Pin<Box<dyn Future<Output = Result<u64, tokio_postgres::Error>> + Send>>;

/// A statement that was sent.
struct Waiting {
    plan: Arc<Plan>,
    reply: Sent,
    expected: Option<u64>,
}

enum Sent {
    Awaited(Reply),
    Done(Result<u64, tokio_postgres::Error>),
}

impl Session {
    pub(super) fn new(connection: Connection) -> Self {
        Self {
            connection,
            plans: Plans::default(),
            statements: HashMap::new(),
            not_copied: HashSet::new(),
            copy_in_vain: false,
            runs: Runs::default(),
            truncates: Vec::new(),
            waiting: VecDeque::new(),
            is_begun: false,
            has_savepoint: false,
            open: None,
            advance: None,
        }
    }

    pub(super) fn client(&self) -> Arc<Client> {
        Arc::clone(&self.connection.client)
    }

    /// Runs a statement of the transaction itself.
    pub(super) async fn run(&mut self, statement: &str) -> Result<()> {
        let client = self.client();
        client.batch_execute(statement).await.map_err(|error| failure::of(&error))
    }

    /// Begins the transaction unless it is open.
    pub(super) async fn begin(&mut self) -> Result<()> {
        if !self.is_begun {
            self.run(BEGIN).await?;
            (self.is_begun, self.has_savepoint) = (true, false);
        }
        Ok(())
    }

    /// Marks the place to come back to: the begin of the transaction, or a savepoint in one that is
    /// open already. A savepoint is dear for the target's readers, so most writes have none.
    pub(super) async fn mark(&mut self) -> Result<()> {
        if !self.is_begun {
            return self.begin().await;
        }
        let release = if self.has_savepoint { "release savepoint walrace_write; " } else { "" };
        self.has_savepoint = true;
        self.run(&format!("{release}savepoint walrace_write")).await
    }

    /// Undoes everything since the mark.
    pub(super) async fn undo(&mut self) -> Result<()> {
        self.forget();
        match self.has_savepoint {
            true => self.run("rollback to savepoint walrace_write").await,
            false => self.run(&format!("rollback; {BEGIN}")).await,
        }
    }

    /// From now on tables are written in the order of their changes.
    pub(super) fn keep_order(&mut self) {
        self.runs.in_order = true;
    }

    /// Whether COPY brought a row that was there already, since this was last asked. It is not used
    /// for that table again.
    pub(super) fn was_copy_in_vain(&mut self) -> bool {
        std::mem::take(&mut self.copy_in_vain)
    }

    pub(super) async fn commit(&mut self) -> Result<()> {
        self.is_begun = false;
        self.open = None;
        self.run("commit").await
    }

    pub(super) async fn roll_back(&mut self) -> Result<()> {
        self.forget();
        (self.is_begun, self.open) = (false, None);
        self.run("rollback").await
    }

    /// What was begun is given up; the tables that it created or altered are gone with it.
    fn forget(&mut self) {
        self.waiting.clear();
        self.truncates.clear();
        self.runs.take();
        self.plans = Plans::default();
        self.statements.clear();
    }

    /// The plan of a table.
    pub(super) async fn plan(
        &mut self,
        table: &Arc<Table>,
        target: Target,
        policy: Policy,
    ) -> Result<Arc<Plan>> {
        let target = match self.plans.get(table, target) {
            Ok(plan) => return Ok(plan),
            Err(target) => target,
        };
        self.settle().await?; // a statement that failed would hide behind the next one's error
        let client = self.client();
        self.plans.make(&client, (table, target), policy).await
    }

    /// Takes a change in; it is written with others, by the next [`flush`](Self::flush) at the
    /// latest.
    pub(super) async fn add(&mut self, plan: &Arc<Plan>, step: Step) -> Result<()> {
        if let Step::Truncate = step {
            self.write_runs().await?;
            self.truncates.push(plan.name.clone());
            return Ok(());
        }
        self.write_truncates().await?;
        let Err(step) = self.runs.add(plan, step) else { return Ok(()) };
        self.write_runs().await?;
        match step {
            Step::Move { old, row } => self.change_key(plan, old, row).await,
            Step::RemoveWhole { row } => {
                self.send(plan, Write::new(plan, Shape::DeleteWhole, &[row])?).await
            }
            Step::ReplaceWhole { old, row } => self.replace(plan, &old, row).await,
            step => self.wait(plan, step),
        }
    }

    /// Sends everything that waits, and awaits the replies.
    pub(super) async fn flush(&mut self) -> Result<()> {
        self.write_truncates().await?;
        self.write_runs().await?;
        self.settle().await
    }

    fn wait(&mut self, plan: &Arc<Plan>, step: Step) -> Result<()> {
        let refused = |step| Error::bug(format!("nothing waits, and {step:?} is not taken in"));
        self.runs.add(plan, step).map_err(refused)
    }

    async fn change_key(&mut self, plan: &Arc<Plan>, old: Row, row: Row) -> Result<()> {
        let is_whole = step::is_whole(&row, plan);
        if plan.key.iter().all(|&at| plan.is_settable(at)) {
            self.send(plan, Write::pair(plan, Shape::Clear, &old, &row)?).await?;
            self.send(plan, Write::pair(plan, Shape::Rekey, &old, &row)?).await?;
        } else if is_whole {
            self.send(plan, Write::new(plan, Shape::Delete, &[old])?).await?;
        } else {
            return Err(Error::data(format!(
                "{}: its key is always generated, and the change does not carry the whole row",
                plan.name
            )));
        }
        self.wait(
            plan,
            if is_whole { Step::Put { row, is_new: false } } else { Step::Patch { row } },
        )
    }

    /// A row that is not there is added: it is known whole.
    async fn replace(&mut self, plan: &Arc<Plan>, old: &Row, row: Row) -> Result<()> {
        self.settle().await?;
        let write = Write::pair(plan, Shape::UpdateWhole, old, &row)?;
        let Write::Statement { shape, rows, .. } = write else { return Ok(()) };
        let statement = self.statement(plan, shape).await?;
        let done = self.client().execute_raw(&statement, rows.columns).await;
        match done.map_err(|error| refused(plan, &error))? {
            0 => self.wait(plan, Step::Append { row }),
            _ => Ok(()),
        }
    }

    async fn write_truncates(&mut self) -> Result<()> {
        if self.truncates.is_empty() {
            return Ok(());
        }
        self.settle().await?;
        let tables = std::mem::take(&mut self.truncates).join(", ");
        // One statement: tables that refer to each other can only be truncated together.
        self.run(&format!("truncate {tables}")).await.context(|| format!("truncating {tables}"))
    }

    async fn write_runs(&mut self) -> Result<()> {
        for run in self.runs.take() {
            self.write_run(run).await?;
        }
        Ok(())
    }

    async fn write_run(&mut self, run: Run) -> Result<()> {
        let plan = Arc::clone(&run.plan);
        let may_copy = !self.not_copied.contains(&plan.name);
        for write in run.writes(may_copy)? {
            match write {
                Write::Copy(rows) => self.copy(&plan, &rows).await?,
                write => self.send(&plan, write).await?,
            }
        }
        Ok(())
    }

    /// Sends a statement, without awaiting its reply.
    async fn send(&mut self, plan: &Arc<Plan>, write: Write) -> Result<()> {
        let Write::Statement { shape, rows, expected } = write else { return Ok(()) };
        let statement = self.statement(plan, shape).await?;
        let client = self.client();
        let mut reply: Reply =
            Box::pin(async move { client.execute_raw(&statement, rows.columns).await });
        // The first poll sends it, so statements go out in the order of these calls.
        let reply = match futures_util::poll!(reply.as_mut()) {
            Poll::Ready(done) => Sent::Done(done),
            Poll::Pending => Sent::Awaited(reply),
        };
        self.waiting.push_back(Waiting { plan: Arc::clone(plan), reply, expected });
        match self.waiting.len() > WAITING_MAX {
            true => self.settle_first().await,
            false => Ok(()),
        }
    }

    async fn settle(&mut self) -> Result<()> {
        while !self.waiting.is_empty() {
            self.settle_first().await?;
        }
        Ok(())
    }

    async fn settle_first(&mut self) -> Result<()> {
        let Some(Waiting { plan, reply, expected }) = self.waiting.pop_front() else {
            return Ok(());
        };
        let done = match reply {
            Sent::Done(done) => done,
            Sent::Awaited(reply) => reply.await,
        };
        let found = done.map_err(|error| refused(&plan, &error))?;
        match expected {
            Some(expected) if found < expected => Err(Error::data(format!(
                "{} lacks a row that an update changes, and the update does not carry all of its \
                 values",
                plan.name
            ))
            .remedy(
                "bring the row to the target, or set the source's table to replica identity full",
            )),
            _ => Ok(()),
        }
    }

    async fn statement(&mut self, plan: &Arc<Plan>, shape: Shape) -> Result<Statement> {
        let place = (plan.number, shape);
        if let Some(statement) = self.statements.get(&place) {
            return Ok(statement.clone());
        }
        self.settle().await?; // a statement that failed would hide behind this one's error
        if self.statements.len() >= STATEMENTS_MAX {
            self.statements.clear();
        }
        let sql = place.1.sql(plan);
        let statement = self.client().prepare(&sql).await.map_err(|e| refused(plan, &e))?;
        self.statements.insert(place, statement.clone());
        Ok(statement)
    }

    /// Brings new rows by COPY, which refuses all where one of them is there already.
    async fn copy(&mut self, plan: &Arc<Plan>, rows: &[Row]) -> Result<()> {
        self.settle().await?;
        let mut lines = Vec::new();
        for row in rows {
            run::copy_line(row, plan, &mut lines)?;
        }
        let statement = self.statement(plan, Shape::Copy).await?;
        let done = copy_in(&self.client(), &statement, lines.into()).await;
        if let Err(error) = &done
            && error.code() == Some(&SqlState::UNIQUE_VIOLATION)
            && !plan.key.is_empty()
        {
            self.not_copied.insert(plan.name.clone());
            self.copy_in_vain = true;
        }
        done.map(|_| ()).map_err(|error| refused(plan, &error))
    }
}

async fn copy_in(
    client: &Client,
    statement: &Statement,
    lines: Bytes,
) -> Result<u64, tokio_postgres::Error> {
    let mut copy = pin!(client.copy_in::<Statement, Bytes>(statement).await?);
    let sent = copy.send(lines).await;
    // The server's refusal is in the reply; that it took no more is only what follows from it.
    let done = copy.as_mut().finish().await?;
    sent.map(|()| done)
}

fn refused(plan: &Plan, error: &tokio_postgres::Error) -> Error {
    failure::of(error).context(format!("while writing to {}", plan.name))
}
