//! Transactions that are sent while they are open. The judge is the same server over a second slot,
//! from which each transaction comes whole, at its commit: both must give the same changes, with
//! the same indexes.

mod binary;
mod random;

use std::{sync::Arc, time::Duration};

use walrace::{
    change::{Change, Lsn, Op, Timestamp},
    config::Postgres,
    schema::Type,
    source::Known,
};

use crate::{
    kit::{Cluster, Session, Setup, Stop, wait_for},
    source::{PATIENCE, Reading, config, lsn},
};

/// The server sends an open transaction when it gathers more than this, the least that it allows.
const LITTLE: u64 = 65_536;

/// Some 200 KiB of rows from `from` on: enough to be sent at once.
fn rows(table: &str, from: u32) -> String {
    format!(
        "insert into {table} (id, body)
         select i, repeat(md5(i::text), 6) from generate_series({from}, {from} + 999) i"
    )
}

/// The same database over two slots.
struct Pair {
    cluster: Cluster,
    streamed: Option<Reading>,
    whole: Reading,
}

fn streamed(cluster: &Cluster) -> Postgres {
    Postgres { decoding_bytes_max: LITTLE, ..config(&cluster.unix_url()) }
}

impl Pair {
    async fn begin(settings: &str, schema: &str) -> Self {
        let cluster = Cluster::with(Setup { settings: settings.into(), ..Setup::default() }).await;
        cluster.sql(schema).await;
        let whole = Postgres {
            streaming: false,
            slot: Some("whole".into()),
            ..config(&cluster.unix_url())
        };
        let streamed = Reading::open(&streamed(&cluster), Known::default()).await.unwrap();
        let whole = Reading::open(&whole, Known::default()).await.unwrap();
        Self { cluster, streamed: Some(streamed), whole }
    }

    /// What both give up to now, which must be the same.
    async fn same(&mut self) -> Vec<Change> {
        let end = lsn(&self.cluster, "select pg_current_wal_lsn()").await;
        let reading = self.streamed.as_mut().unwrap();
        let streamed = timeless(reading.until(|at| at.lsn >= end).await);
        reading.confirm().await;
        let whole = timeless(self.whole.until(|at| at.lsn >= end).await);
        for (number, (left, right)) in streamed.iter().zip(&whole).enumerate() {
            assert_eq!(left.idempotency_key(), right.idempotency_key(), "change {number}");
            assert_eq!(left, right, "change {number}");
        }
        assert_eq!(streamed.len(), whole.len());
        streamed
    }

    /// Begins anew where the journal would.
    async fn reconnect(&mut self) {
        let known = self.streamed.take().unwrap().known();
        self.streamed = Some(again(&self.cluster, &known).await);
    }

    /// How many transactions came while they were open.
    async fn streamed_count(&self) -> u64 {
        let sql =
            "select stream_txns from pg_stat_replication_slots where slot_name = 'walrace_app'";
        self.cluster.value(sql).await.as_u64().unwrap()
    }

    /// Waits until so many transactions were sent while they were open.
    async fn wait_streamed(&self, count: u64) {
        let enough = async || (self.streamed_count().await >= count).then_some(());
        wait_for(PATIENCE, enough, || format!("{count} transactions are not sent while open"))
            .await;
    }
}

/// Without what depends on when it was asked for: a free message has no commit, so its time is that of
/// its arrival; and what the catalog explains of a table is what it shows at that moment.
fn timeless(mut changes: Vec<Change>) -> Vec<Change> {
    for change in &mut changes {
        if change.transaction.xid == 0 {
            change.transaction.commit_time = Timestamp(0);
        }
        for column in change.table.as_mut().into_iter().flat_map(|t| &mut Arc::make_mut(t).columns)
        {
            column.ty = Type::base(column.ty.oid, column.ty.modifier);
            (column.nullable, column.primary_key) = (None, false);
        }
    }
    changes
}

async fn run(session: &Session, statements: &str) {
    let outcome = session.batch_execute(statements).await;
    outcome.unwrap_or_else(|error| panic!("{:?}\nin: {statements}", error.as_db_error()));
}

const SCHEMA: &str = "create table t (id int primary key, body text);
                      create table u (id int primary key, body text)";

#[tokio::test]
async fn open_transactions_that_alternate_with_whole_ones_arrive_each_at_its_commit() {
    let mut pair = Pair::begin("", SCHEMA).await;
    let (a, b) = (pair.cluster.connect().await, pair.cluster.connect().await);
    for session in [&a, &b] {
        run(session, "begin").await;
    }
    for round in 0..3 {
        run(&a, &rows("t", round * 1_000)).await;
        pair.cluster.sql(&format!("insert into u values (-{round} - 1, 'small')")).await;
        run(&b, &rows("t", 100_000 + round * 1_000)).await;
        run(&b, &rows("u", 100_000 + round * 1_000)).await;
        pair.cluster.sql("select pg_logical_emit_message(false, 'free', 'm')").await;
    }
    pair.wait_streamed(2).await;
    let before = pair.same().await;
    assert_eq!(before.len(), 6, "only what has committed is there");
    run(&b, "commit").await;
    run(&a, &rows("u", 10_000)).await;
    pair.cluster.sql("update u set body = 'after' where id = -1").await;
    run(&a, "commit").await;
    pair.cluster.sql("delete from u where id = -2").await;
    let changes = pair.same().await;
    assert_eq!(changes.len(), 6_000 + 1 + 4_000 + 1);
    let closing: Vec<_> = changes
        .iter()
        .filter(|change| change.closes_transaction)
        .map(|change| change.index)
        .collect();
    assert_eq!(closing, [5_999, 0, 3_999, 0]);
}

#[tokio::test]
async fn what_is_rolled_back_at_any_depth_leaves_no_trace_in_the_indexes() {
    let mut pair = Pair::begin("", SCHEMA).await;
    let a = pair.cluster.connect().await;
    let step = |from| rows("t", from);
    run(&a, "begin").await;
    for statement in [
        &step(0),
        "savepoint one",
        &step(1_000),
        "savepoint two",
        &step(2_000),
        "savepoint three",
        &step(3_000),
        "release three",
        &step(4_000),
        "rollback to two",
        &step(5_000),
        "release one",
        "savepoint four",
        "insert into u values (1, 'described inside of what is undone')",
        &step(6_000),
        "rollback to four",
        "insert into u values (2, 'described again')",
        &step(7_000),
    ] {
        run(&a, statement).await;
    }
    pair.wait_streamed(1).await;
    run(&a, "commit").await;
    let changes = pair.same().await;
    assert_eq!(changes.len(), 4_001);
    let indexes = changes.iter().map(|change| change.index);
    assert!(indexes.eq(0..4_001));

    run(&a, &format!("begin; {}; {}", step(20_000), rows("u", 20_000))).await;
    pair.wait_streamed(2).await;
    run(&a, "rollback").await;
    pair.cluster.sql("insert into u values (3, 'after the rollback')").await;
    assert_eq!(pair.same().await.len(), 1);
}

#[tokio::test]
async fn tables_that_change_inside_an_open_transaction_keep_the_columns_of_each_change() {
    let mut pair = Pair::begin("", SCHEMA).await;
    let a = pair.cluster.connect().await;
    pair.cluster.sql("insert into u values (1, 'known before')").await;
    run(&a, &format!("begin; {}", rows("t", 0))).await;
    run(&a, "alter table t add extra int default 7; create type mood as enum ('sad', 'glad')")
        .await;
    run(&a, "create table inner_one (id int primary key, body text, mood mood default 'glad')")
        .await;
    run(&a, &rows("t", 1_000)).await;
    run(&a, &rows("inner_one", 0)).await;
    // Others see their own descriptors meanwhile.
    pair.cluster.sql("update u set body = 'meanwhile' where id = 1").await;
    run(&a, "savepoint s; alter table t drop extra, add other text default 'o'").await;
    run(&a, &rows("t", 2_000)).await;
    run(&a, "rollback to s").await;
    run(&a, &rows("t", 3_000)).await;
    run(&a, "alter table t rename body to corpus").await;
    run(
        &a,
        "insert into t (id, corpus, extra) select i, 'c', 3 from generate_series(4000, 4999) i",
    )
    .await;
    pair.wait_streamed(1).await;
    run(&a, "commit").await;
    pair.cluster
        .sql("insert into t values (-1, 'small', 9); insert into inner_one values (-1)")
        .await;
    let changes = pair.same().await;
    let columns = |at: usize| {
        let table = changes[at].table.as_ref().unwrap();
        table.columns.iter().map(|column| column.name.as_str()).collect::<Vec<_>>().join(",")
    };
    let of_t: Vec<_> = (0..changes.len())
        .filter(|at| changes[*at].table.as_ref().unwrap().name == "t")
        .map(columns)
        .collect();
    let runs: Vec<_> =
        of_t.chunk_by(|a, b| a == b).map(|run| (run[0].as_str(), run.len())).collect();
    assert_eq!(runs, [("id,body", 1_000), ("id,body,extra", 2_000), ("id,corpus,extra", 1_001)]);
}

#[tokio::test]
async fn large_values_messages_and_truncates_come_through_an_open_transaction() {
    let schema = "create table t (id int primary key, body text);
                  create table u (id int primary key, body text);
                  create table f (id int primary key, body text, note text);
                  alter table f replica identity full;
                  alter table t alter body set storage external;
                  alter table f alter body set storage external";
    let mut pair = Pair::begin("", schema).await;
    let a = pair.cluster.connect().await;
    run(&a, "begin").await;
    for statement in [
        "select pg_logical_emit_message(true, 'first', 'of all')",
        "insert into t select i, repeat(md5(i::text), 1000) from generate_series(1, 40) i",
        "insert into f select i, repeat(md5(i::text), 1000), 'n' from generate_series(1, 40) i",
        "update t set id = id + 1000",
        "update f set note = 'changed'",
        "select pg_logical_emit_message(true, 'large', repeat('x', 700000))",
        "truncate u, f",
        "insert into t select i, repeat(md5(i::text), 30000) from generate_series(41, 43) i",
        "delete from t where id > 1010",
    ] {
        run(&a, statement).await;
    }
    pair.wait_streamed(1).await;
    run(&a, "commit").await;
    let changes = pair.same().await;
    let count = |op| changes.iter().filter(|change| change.op == op).count();
    assert_eq!(count(Op::Message), 2);
    assert_eq!(count(Op::Truncate), 2);
    assert_eq!((count(Op::Insert), count(Op::Update), count(Op::Delete)), (83, 80, 30));
}

#[tokio::test]
async fn prepared_transactions_arrive_when_they_commit_and_never_when_they_are_rolled_back() {
    let mut pair = Pair::begin("max_prepared_transactions = 10", SCHEMA).await;
    let a = pair.cluster.connect().await;
    let large = |from| format!("begin; {}; {}", rows("t", from), rows("u", from));
    run(&a, &format!("{}; prepare transaction 'large'", large(0))).await;
    run(&a, &format!("{}; prepare transaction 'gone'", large(10_000))).await;
    run(&a, "begin; insert into t values (-1, 'x'); prepare transaction 'small'").await;
    run(&a, "begin; insert into t values (-2, 'x'); prepare transaction 'small gone'").await;
    pair.wait_streamed(2).await;
    assert_eq!(pair.same().await.len(), 0);
    run(&a, "rollback prepared 'gone'").await;
    run(&a, "rollback prepared 'small gone'").await;
    run(&a, "commit prepared 'small'").await;
    run(&a, "commit prepared 'large'").await;
    let changes = pair.same().await;
    assert_eq!(changes.len(), 2_001);
    assert_eq!(changes[0].table.as_ref().unwrap().name, "t");
    assert_eq!(changes.last().unwrap().index, 1_999);
}

/// Opens once the server has noticed that the last reader is gone.
async fn again(cluster: &Cluster, known: &Known) -> Reading {
    let config = streamed(cluster);
    let open = async || Reading::open(&config, known.clone()).await.ok();
    wait_for(PATIENCE, open, || "it does not open again".into()).await
}

async fn confirmed(cluster: &Cluster, at_least: Lsn) {
    let slot =
        "select confirmed_flush_lsn from pg_replication_slots where slot_name = 'walrace_app'";
    let moved = async || (lsn(cluster, slot).await >= at_least).then_some(());
    wait_for(PATIENCE, moved, || "the slot does not move".into()).await;
}

#[tokio::test]
async fn a_transaction_that_stays_open_over_confirms_reconnects_and_a_restart_is_not_lost() {
    let mut cluster = Cluster::with(Setup {
        settings: "max_prepared_transactions = 2".into(),
        ..Setup::default()
    })
    .await;
    cluster.sql(SCHEMA).await;
    let mut reading = Reading::open(&streamed(&cluster), Known::default()).await.unwrap();
    let a = cluster.connect().await;
    run(&a, &format!("begin; {}", rows("t", 0))).await;
    let mut small = 0;
    for round in 1..4u32 {
        for number in 0..5 {
            cluster.sql(&format!("insert into u values ({round} * 100 + {number}, 'x')")).await;
            // It logs what runs, which moves where the server would begin to decode again.
            cluster.sql("checkpoint").await;
            small += reading.take(1).await.len();
            reading.confirm().await;
        }
        confirmed(&cluster, reading.position.unwrap().lsn).await;
        let known = reading.known();
        drop(reading);
        run(&a, &rows("t", round * 1_000)).await;
        reading = again(&cluster, &known).await;
    }
    run(&a, "prepare transaction 'p'").await;
    drop(a);
    cluster.sql("insert into u values (-1, 'x')").await;
    small += reading.take(1).await.len();
    reading.confirm().await;
    confirmed(&cluster, reading.position.unwrap().lsn).await;
    let known = reading.known();
    cluster.restart(Stop::Immediate).await;
    drop(reading);
    let mut reading = again(&cluster, &known).await;
    cluster.sql("commit prepared 'p'").await;
    let changes = reading.take(4_000).await;
    assert_eq!(small, 16);
    assert!(changes.iter().map(|change| change.index).eq(0..4_000));
    assert!(changes.last().unwrap().closes_transaction);
    reading.confirm().await;
    // A second reader begins behind it.
    let known = reading.known();
    drop(reading);
    let mut reading = again(&cluster, &known).await;
    cluster.sql("insert into u values (-2, 'last')").await;
    assert_eq!(reading.take(1).await[0].index, 0);
}

#[tokio::test]
async fn a_broken_connection_in_the_middle_discards_the_spool_and_gets_everything_again() {
    let cluster = Cluster::start().await;
    cluster.sql(SCHEMA).await;
    let mut reading = Reading::open(&streamed(&cluster), Known::default()).await.unwrap();
    let known = Known {
        progress: Some(reading.opened.start),
        origin: Some(reading.opened.origin.clone()),
        has_changes: false,
        ..Known::default()
    };
    let a = cluster.connect().await;
    run(
        &a,
        &format!("begin; {}", (0..4).map(|n| rows("t", n * 1_000)).collect::<Vec<_>>().join(";")),
    )
    .await;
    let files = |reading: &Reading| std::fs::read_dir(reading.spool.path()).unwrap().count();
    let spooled = async || (files(&reading) > 0).then_some(());
    wait_for(PATIENCE, spooled, || "nothing is spooled".into()).await;
    cluster.sql("select pg_terminate_backend(pid) from pg_stat_replication").await;
    let error = reading.error().await;
    assert_eq!(error.class(), walrace::error::Class::Retry, "{error}");
    let gone = async || (files(&reading) == 0).then_some(());
    wait_for(PATIENCE, gone, || "the spool is still there".into()).await;
    drop(reading);
    let mut reading = again(&cluster, &known).await;
    run(&a, "commit").await;
    let changes = reading.take(4_000).await;
    assert!(changes.iter().map(|change| change.index).eq(0..4_000));
    assert_eq!(files(&reading), 0);
}

#[tokio::test]
async fn what_a_crash_of_the_server_left_open_leaves_the_spool() {
    let mut cluster = Cluster::start().await;
    cluster.sql(SCHEMA).await;
    let mut reading = Reading::open(&streamed(&cluster), Known::default()).await.unwrap();
    cluster.sql("insert into u values (1, 'x')").await;
    reading.take(1).await;
    let known = reading.known();
    let a = cluster.connect().await;
    run(&a, &format!("begin; {}; {}", rows("t", 0), rows("t", 1_000))).await;
    cluster.restart(Stop::Immediate).await;
    drop(reading);
    let mut reading = again(&cluster, &known).await;
    cluster.sql("checkpoint; insert into u values (2, 'x')").await;
    assert_eq!(reading.take(1).await.len(), 1);
    let files = || std::fs::read_dir(reading.spool.path()).unwrap().count();
    let gone = async || (files() == 0).then_some(());
    wait_for(PATIENCE, gone, || "it is still there".into()).await;
}

#[tokio::test]
async fn a_consumer_that_stalls_while_a_transaction_is_read_back_keeps_its_connection() {
    let settings = "wal_sender_timeout = 2s".into();
    let cluster = Cluster::with(Setup { settings, ..Setup::default() }).await;
    cluster.sql(SCHEMA).await;
    let mut reading = Reading::open(&streamed(&cluster), Known::default()).await.unwrap();
    let rows = 60_000;
    cluster
        .sql(&format!(
            "insert into t select i, repeat('x', 1000) from generate_series(1, {rows}) i"
        ))
        .await;
    // It is the point of this test that time passes.
    tokio::time::sleep(Duration::from_secs(6)).await;
    let changes = reading.take(rows).await;
    assert!(changes.iter().map(|change| change.index as usize).eq(0..rows));
    cluster.sql("insert into u values (1, 'x')").await;
    assert_eq!(reading.take(1).await.len(), 1);
}

#[tokio::test]
async fn a_reader_that_leaves_while_a_transaction_is_read_back_gets_all_of_it_the_next_time() {
    let cluster = Cluster::start().await;
    cluster.sql(SCHEMA).await;
    let mut reading = Reading::open(&streamed(&cluster), Known::default()).await.unwrap();
    let known = Known {
        progress: Some(reading.opened.start),
        origin: Some(reading.opened.origin.clone()),
        has_changes: false,
        ..Known::default()
    };
    let rows = 60_000;
    let large = "insert into t select i, repeat('x', 1000) from generate_series(1, 60000) i";
    cluster.sql(large).await;
    let mut taken = 0;
    while taken == 0 {
        let batch = reading.opened.source.next().await.unwrap();
        assert!(batch.changes.is_empty() || batch.position.is_none(), "it is not whole yet");
        taken += batch.changes.len();
    }
    let begun = std::time::Instant::now();
    let Reading { opened, spool, .. } = reading;
    drop(opened);
    assert!(begun.elapsed() < Duration::from_secs(5), "it left after {:?}", begun.elapsed());
    let gone = async || (std::fs::read_dir(spool.path()).unwrap().count() == 0).then_some(());
    wait_for(PATIENCE, gone, || "the spool is still there".into()).await;
    let mut reading = again(&cluster, &known).await;
    let changes = reading.take(rows).await;
    assert!(changes.iter().map(|change| change.index as usize).eq(0..rows));
}

#[tokio::test]
async fn a_change_that_is_too_large_is_named_inside_an_open_transaction_too() {
    let cluster = Cluster::start().await;
    cluster.sql(SCHEMA).await;
    let config = Postgres { change_bytes_max: 1 << 20, ..streamed(&cluster) };
    let mut reading = Reading::open(&config, Known::default()).await.unwrap();
    let a = cluster.connect().await;
    run(&a, &format!("begin; {}", rows("t", 0))).await;
    run(&a, "insert into t values (-1, repeat('x', 9000000))").await;
    run(&a, &rows("t", 1_000)).await;
    let error = reading.error().await;
    assert_eq!(error.class(), walrace::error::Class::Config, "{error}");
    assert!(error.to_string().contains("a change of public.t has 9"), "{error}");
}

#[tokio::test]
async fn the_memory_for_decoding_is_set_on_our_connection_only_and_the_protocol_as_configured() {
    let settings = "log_replication_commands = on\nlog_statement = all".into();
    let cluster = Cluster::with(Setup { settings, ..Setup::default() }).await;
    let mut slot = 0;
    for (streaming, bytes, expected) in [
        (true, 1 << 20, "proto_version '2', streaming 'on'"),
        (true, 1, "proto_version '2', streaming 'on'"),
        (false, 0, "proto_version '1'"),
    ] {
        slot += 1;
        let config = Postgres {
            streaming,
            decoding_bytes_max: bytes,
            slot: Some(format!("slot_{slot}")),
            ..config(&cluster.unix_url())
        };
        let reading = Reading::open(&config, Known::default()).await.unwrap();
        let log = cluster.log();
        let line = log.lines().rfind(|line| line.contains("START_REPLICATION")).unwrap();
        assert!(line.contains(expected), "{line}");
        let set = log
            .lines()
            .filter(|line| line.contains("LOG:  statement: set logical_decoding"))
            .count();
        assert_eq!(set, slot.min(2), "{log}");
        drop(reading);
    }
    assert!(cluster.log().contains("'1024kB'") && cluster.log().contains("'64kB'"));
}
