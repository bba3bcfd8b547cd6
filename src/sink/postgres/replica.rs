//! The target as a copy of the source, for those who compare the two: how its tables are named and
//! which columns they have, what they hold, its progress, and single rows that are put right.

use std::{sync::Arc, time::Duration};

use tokio::time::timeout;
use tokio_postgres::SimpleQueryMessage;

use super::{
    connect::Target,
    failure,
    progress::Kept,
    session::Session,
    step::Step,
    table::{Naming, Plan, Plans, Policy},
};
use crate::{
    change::{Before, Change, Op, Row, Transaction},
    config::{self, MissingColumns, MissingTable},
    error::{Error, Result},
    format::Names,
    schema::Table,
    sink::Progress,
};

/// Under these a value has one text on every server; `search_path` is the user's own, since the
/// operators of extensions are found by it.
const SETTINGS: &str = "set timezone = 'UTC'; set extra_float_digits = 3; \
                        set bytea_output = 'hex'; set lc_monetary = 'C'; \
                        set statement_timeout = '50s'";

/// A statement that takes longer has lost its server.
const ANSWER_MAX: Duration = Duration::from_secs(60);

/// The target of a `postgres` sink.
pub struct Replica {
    target: Target,
    naming: Naming,
    kept: Kept,
    policy: Policy,
    session: Option<Session>,
    names: Names,
}

/// How the rows of one table stand in the target.
#[derive(Clone, Debug)]
pub struct Mapped {
    plan: Arc<Plan>,
    /// The target's table, quoted.
    pub name: String,
    /// The columns that the sink writes.
    pub columns: Vec<MappedColumn>,
    /// The places of the key among them.
    pub key: Vec<usize>,
}

/// A column that the sink writes.
#[derive(Clone, Debug)]
pub struct MappedColumn {
    /// Its place in the rows that come from the rules.
    pub place: usize,
    /// Its name, quoted.
    pub name: String,
    /// Its type below domains, without a length.
    pub ty: String,
}

/// What becomes of a row of the target.
#[derive(Clone, Debug)]
pub enum Mending {
    /// It gets these values, or comes to be.
    Put(Row),
    /// The row of this key goes.
    Remove(Row),
}

impl Replica {
    /// The target of the sink that `names` tells of; nothing is connected yet.
    pub fn new(options: &config::PostgresTarget, names: &Names) -> Result<Self> {
        let columns = match options.missing_columns {
            MissingColumns::Ignore => MissingColumns::Ignore,
            // To compare is never to alter.
            MissingColumns::Refuse | MissingColumns::Add => MissingColumns::Refuse,
        };
        Ok(Self {
            target: Target::new(options)?,
            naming: Naming::new(&options.table, names)?,
            kept: Kept::new(&options.progress_table, &names.sink)?,
            policy: Policy { columns, table: MissingTable::Refuse },
            session: None,
            names: names.clone(),
        })
    }

    /// Connects anew.
    pub async fn connect(&mut self) -> Result<()> {
        self.session = None;
        let session = Session::new(self.target.connect().await?);
        self.session.insert(session).run(SETTINGS).await
    }

    /// Where the target is, without the login.
    pub fn address(&self) -> &str {
        &self.target.address
    }

    /// How the rows of a table stand in the target, after the rules have been applied to it.
    pub async fn map(&self, table: &Arc<Table>) -> Result<Mapped> {
        let [insert, delete] = [Op::Insert, Op::Delete].map(|op| bare(table, op));
        let (name, of_delete) = (self.naming.target(&insert), self.naming.target(&delete));
        let named = match (name, of_delete) {
            (Ok(name), Ok(of_delete)) if name == of_delete => name,
            _ => {
                return Err(Error::config(format!(
                    "{table} cannot be compared: `table` of sink {} sends its rows to several",
                    self.names.sink
                )));
            }
        };
        let client = self.session()?.client();
        let plan = Plans::default().make(&client, (table, named), self.policy).await?;
        let column = |column: &super::table::Column| MappedColumn {
            place: column.source,
            name: column.name.clone(),
            ty: column.ty.clone(),
        };
        let columns = plan.columns.iter().map(column).collect();
        Ok(Mapped { name: plan.name.clone(), key: plan.key.clone(), columns, plan })
    }

    /// Runs statements without parameters: the rows of all, as text.
    pub async fn query(&self, sql: &str) -> Result<Vec<Vec<Option<String>>>> {
        let client = self.session()?.client();
        let answer = timeout(ANSWER_MAX, client.simple_query(sql)).await;
        let answer = answer.map_err(|_| {
            let (address, seconds) = (self.address(), ANSWER_MAX.as_secs());
            Error::retry(format!("{address} takes longer than {seconds} s to answer"))
        })?;
        let messages = answer.map_err(|error| failure::of(&error))?;
        let rows = messages.into_iter().filter_map(|message| match message {
            SimpleQueryMessage::Row(row) => {
                let cell = |at| row.get(at).map(str::to_owned);
                Some((0..row.len()).map(cell).collect())
            }
            _ => None,
        });
        Ok(rows.collect())
    }

    /// How far the sink has written; within a transaction, as that sees it.
    pub async fn progress(&self) -> Result<Option<Progress>> {
        self.kept.read(&self.session()?.client()).await
    }

    /// Begins a transaction that keeps the sink from committing, until
    /// [`commit`](Self::commit) or [`roll_back`](Self::roll_back): it holds the row of its
    /// progress, which is returned.
    ///
    /// The sink may hold rows that it has not committed, and wait for us: no lock is waited for as
    /// long as it takes the server to call that a deadlock.
    pub async fn hold(&mut self) -> Result<Option<Progress>> {
        let lock = self.kept.lock_sql();
        let session = self.session.as_mut().ok_or_else(absent)?;
        // Its statements are known by the number of a plan, which is that of one mapping only: with
        // those of another table a row would be written to that.
        session.roll_back().await?;
        session.begin().await?;
        session.run(&format!("set local lock_timeout = 500; {lock}")).await?;
        self.kept.read(&session.client()).await
    }

    /// Puts rows of one table right, as the sink itself would write them, in the transaction that
    /// [`hold`](Self::hold) began for them.
    pub async fn mend(&mut self, mapped: &Mapped, mendings: Vec<Mending>) -> Result<()> {
        let session = self.session.as_mut().ok_or_else(absent)?;
        for mending in mendings {
            let step = match mending {
                Mending::Put(row) => Step::Put { row, is_new: false },
                Mending::Remove(row) => Step::Remove { row },
            };
            session.add(&mapped.plan, step).await?;
        }
        session.flush().await
    }

    /// Ends what [`hold`](Self::hold) began.
    pub async fn commit(&mut self) -> Result<()> {
        self.session.as_mut().ok_or_else(absent)?.commit().await
    }

    /// Gives up what [`hold`](Self::hold) began.
    pub async fn roll_back(&mut self) -> Result<()> {
        self.session.as_mut().ok_or_else(absent)?.roll_back().await
    }

    fn session(&self) -> Result<&Session> {
        self.session.as_ref().ok_or_else(absent)
    }
}

fn absent() -> Error {
    Error::retry("there is no connection to the target")
}

/// A change without a row: a name that asks for more than the table is no name of one.
fn bare(table: &Arc<Table>, op: Op) -> Change {
    Change {
        offset: 0,
        op,
        index: 0,
        closes_transaction: true,
        transaction: Transaction::default(),
        table: Some(Arc::clone(table)),
        before: Before::Nothing,
        after: None,
        message: None,
        shaped: None,
        backfill: None,
    }
}
