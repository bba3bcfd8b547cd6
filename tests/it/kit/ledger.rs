//! A random workload whose outcome can be checked, row for row.
//!
//! Every transaction that does something also inserts a row of `ledger.tx`, so that "was it
//! committed?" has one answer, the table's, even where the client lost its connection at COMMIT.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use fastrand::Rng;
use tokio::task::JoinSet;

use super::{Cluster, Session, replay::State};

const SCHEMA: &str = "
create schema ledger;
create table ledger.tx (no bigint primary key, messages int not null, at timestamptz not null);
create table ledger.account (id bigint primary key, balance numeric(12,2), note text,
    changed timestamptz not null default clock_timestamp());
create table ledger.order_line (order_id int, line_no int, quantity int not null, tags text[],
    primary key (order_id, line_no));
create table ledger.entry (who text, amount numeric, note text);
alter table ledger.entry replica identity full;
create table ledger.document (id int primary key, version int not null, body text);
alter table ledger.document alter body set storage external;
create table ledger.visit (id bigserial primary key, page text);
";

/// Tables of the ledger with the columns of their keys; no column: the row is its own key.
pub(crate) const KEYS: [(&str, &[&str]); 6] = [
    ("tx", &["no"]),
    ("account", &["id"]),
    ("order_line", &["order_id", "line_no"]),
    ("entry", &[]),
    ("document", &["id"]),
    ("visit", &["id"]),
];

/// The tables of the workload in one server.
#[derive(Debug)]
pub(crate) struct Ledger;

/// How a load is made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    /// The same seed makes the same statements in each session.
    pub(crate) seed: u64,
    /// Sessions that write at once.
    pub(crate) sessions: u64,
    /// A pause after each transaction.
    pub(crate) pause: Duration,
}

impl Ledger {
    /// Creates the tables, empty, in the schema `ledger`.
    pub(crate) async fn create(cluster: &Cluster) {
        cluster.sql(SCHEMA).await;
    }

    /// Every row of every table, as `to_jsonb` makes it.
    pub(crate) async fn final_state(cluster: &Cluster) -> State {
        let mut state = State::default();
        for (table, _) in KEYS {
            for row in cluster.rows(&format!("table ledger.{table}")).await {
                state.insert(table, row);
            }
        }
        state
    }

    /// How many logical messages each committed transaction sent.
    pub(crate) async fn messages(cluster: &Cluster) -> BTreeMap<u64, u64> {
        let rows = cluster.rows("select no, messages from ledger.tx where messages > 0").await;
        let number = |row: &serde_json::Value, name: &str| row[name].as_u64().expect("a number");
        rows.iter().map(|row| (number(row, "no"), number(row, "messages"))).collect()
    }

    /// Starts to write, until [`Load::stop`]; a session that loses its server connects again.
    pub(crate) fn load(cluster: &Cluster, pace: Pace) -> Load {
        let shared = Arc::new(Shared::default());
        let mut sessions = JoinSet::new();
        for number in 0..pace.sessions {
            let (socket_dir, port) = (cluster.socket_dir(), cluster.port());
            let mut config = tokio_postgres::Config::new();
            config.host_path(socket_dir).port(port).user("postgres").dbname("postgres");
            // Sessions deadlock often here, and each deadlock would cost the default of a second.
            config.options("-c deadlock_timeout=10ms");
            let writer = Writer {
                rng: Rng::with_seed(pace.seed.wrapping_mul(1_000).wrapping_add(number)),
                next_no: number * 1_000_000_000,
                pause: pace.pause,
                config,
                shared: Arc::clone(&shared),
            };
            sessions.spawn(writer.write());
        }
        Load { shared, sessions }
    }
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    committed: AtomicU64,
    aborted: AtomicU64,
    disconnected: AtomicU64,
}

/// A load that is being written.
#[derive(Debug)]
pub(crate) struct Load {
    shared: Arc<Shared>,
    sessions: JoinSet<()>,
}

impl Load {
    /// Transactions whose COMMIT was acknowledged, so far.
    pub(crate) fn committed(&self) -> u64 {
        self.shared.committed.load(Ordering::SeqCst)
    }

    /// Transactions that were rolled back, on purpose or for a conflict, so far.
    pub(crate) fn aborted(&self) -> u64 {
        self.shared.aborted.load(Ordering::SeqCst)
    }

    /// Ends each session after its current transaction. The server must be up.
    pub(crate) async fn stop(mut self) -> (u64, u64) {
        self.shared.stop.store(true, Ordering::SeqCst);
        while let Some(ended) = self.sessions.join_next().await {
            ended.expect("a session of the load failed");
        }
        (self.committed(), self.aborted())
    }
}

struct Writer {
    rng: Rng,
    next_no: u64,
    pause: Duration,
    config: tokio_postgres::Config,
    shared: Arc<Shared>,
}

impl Writer {
    async fn write(mut self) {
        while !self.shared.stop.load(Ordering::SeqCst) {
            match Session::open(&self.config).await {
                Ok(session) => self.write_until_it_breaks(&session).await,
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }

    async fn write_until_it_breaks(&mut self, session: &Session) {
        while !self.shared.stop.load(Ordering::SeqCst) {
            let (text, ends_with_commit) = self.transaction();
            let outcome = session.batch_execute(&text).await;
            if session.is_closed() {
                self.shared.disconnected.fetch_add(1, Ordering::SeqCst);
                return;
            }
            let counter = match outcome {
                Ok(()) if ends_with_commit => &self.shared.committed,
                Ok(()) => &self.shared.aborted,
                Err(error) => {
                    assert!(is_conflict(&error), "{error:?}\nin: {text}");
                    let _ = session.batch_execute("rollback").await;
                    &self.shared.aborted
                }
            };
            counter.fetch_add(1, Ordering::SeqCst);
            tokio::time::sleep(self.pause).await;
        }
    }

    /// A whole transaction as one text, and whether it commits.
    fn transaction(&mut self) -> (String, bool) {
        let no = self.next_no;
        self.next_no += 1;
        let mut messages = 0;
        let mut text = String::from("begin;\n");
        let statements = if self.rng.u8(..) < 4 { 300 } else { self.rng.u32(1..10) };
        for _ in 0..statements {
            if self.rng.u8(..) < 20 {
                text += "savepoint s;\n";
                self.statement(&mut text);
                self.statement(&mut text);
                let end = if self.rng.bool() { "rollback to s" } else { "release s" };
                text += &format!("{end};\n");
            } else if self.rng.u8(..) < 12 {
                text += &format!("select pg_logical_emit_message(true, 'ledger', '{no}');\n");
                messages += 1;
            } else {
                self.statement(&mut text);
            }
        }
        let commits = self.rng.u8(..) >= 25;
        text += &format!("insert into ledger.tx values ({no}, {messages}, clock_timestamp());\n");
        text += if commits { "commit" } else { "rollback" };
        (text, commits)
    }

    fn statement(&mut self, text: &mut String) {
        let statement = match self.rng.u32(0..100) {
            0..=29 => self.account(),
            30..=49 => self.order_line(),
            50..=69 => self.entry(),
            70..=84 => self.document(),
            85..=98 => format!("insert into ledger.visit(page) values ('{}')", self.word()),
            _ if self.rng.bool() => "truncate ledger.visit restart identity".into(),
            _ => "truncate ledger.visit, ledger.entry".into(),
        };
        text.push_str(&statement);
        text.push_str(";\n");
    }

    fn account(&mut self) -> String {
        let (id, other) = (self.rng.u32(0..60), self.rng.u32(0..60));
        let amount = f64::from(self.rng.u32(0..1_000_000)) / 100.0;
        match self.rng.u32(0..10) {
            0..=4 => format!(
                "insert into ledger.account values ({id}, {amount}, '{}') on conflict (id) \
                 do update set balance = excluded.balance, changed = clock_timestamp()",
                self.word()
            ),
            5..=6 => format!("update ledger.account set note = null where id = {id}"),
            7..=8 => format!(
                "update ledger.account set id = {other}, balance = {amount} where id = {id} \
                 and not exists (select from ledger.account where id = {other})"
            ),
            _ => format!("delete from ledger.account where id = {id}"),
        }
    }

    fn order_line(&mut self) -> String {
        let (order, line) = (self.rng.u32(0..20), self.rng.u32(0..4));
        let quantity = self.rng.i32(-5..100);
        match self.rng.u32(0..10) {
            0..=5 => format!(
                "insert into ledger.order_line \
                 values ({order}, {line}, {quantity}, '{{a,\"b c\"}}') \
                 on conflict (order_id, line_no) do update set quantity = excluded.quantity"
            ),
            6..=7 => format!(
                "update ledger.order_line o set order_id = {order} where line_no = {line} and \
                 order_id = {quantity} % 20 and not exists (select from ledger.order_line p \
                 where p.order_id = {order} and p.line_no = o.line_no)"
            ),
            _ => format!("delete from ledger.order_line where order_id = {order}"),
        }
    }

    fn entry(&mut self) -> String {
        let who = ["ann", "bob", "cid", "o''hara"][self.rng.usize(0..4)];
        let amount = self.rng.u32(0..5);
        match self.rng.u32(0..10) {
            0..=6 => format!("insert into ledger.entry values ('{who}', {amount}, null)"),
            7 => format!(
                "update ledger.entry set note = '{}' where who = '{who}' and amount = {amount}",
                self.word()
            ),
            _ => format!(
                "delete from ledger.entry where ctid = any(array(select ctid from ledger.entry \
                 where who = '{who}' limit 3))"
            ),
        }
    }

    fn document(&mut self) -> String {
        let (id, version) = (self.rng.u32(0..25), self.rng.u32(0..1_000));
        match self.rng.u32(0..10) {
            0..=3 => {
                let body: String = (0..self.rng.u32(300..1_200)).map(|_| self.word()).collect();
                format!(
                    "insert into ledger.document values ({id}, {version}, '{body}') \
                     on conflict (id) do update set body = excluded.body"
                )
            }
            // The body is out of line and stays as it is: pgoutput does not send it.
            4..=7 => format!("update ledger.document set version = {version} where id = {id}"),
            8 => format!(
                "update ledger.document set id = id + 100 where id = {id} and not exists \
                 (select from ledger.document where id = {id} + 100)"
            ),
            _ => format!("delete from ledger.document where id in ({id}, {id} + 100)"),
        }
    }

    fn word(&mut self) -> &'static str {
        const WORDS: [&str; 8] = [
            "harbor ",
            "point\t",
            "café ",
            "日本 ",
            "\"quoted\" ",
            "back\\slash ",
            "{brace} ",
            "\n",
        ];
        WORDS[self.rng.usize(0..WORDS.len())]
    }
}

/// Two sessions that collide are part of the workload; anything else is a mistake in it.
fn is_conflict(error: &tokio_postgres::Error) -> bool {
    use tokio_postgres::error::SqlState;
    let shutdown = [SqlState::ADMIN_SHUTDOWN, SqlState::CRASH_SHUTDOWN];
    let collisions = [SqlState::UNIQUE_VIOLATION, SqlState::T_R_DEADLOCK_DETECTED];
    match error.code() {
        Some(code) => collisions.contains(code) || shutdown.contains(code),
        None => true, // the connection broke; the caller sees that it is closed
    }
}
