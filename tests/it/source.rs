//! The PostgreSQL source against a real server: what arrives, how, and when it is confirmed.

use std::time::Duration;

use walrace::{
    change::{Before, Change, Lsn, Op, Position, Value},
    config::{Postgres, Secret, Source as SourceConfig},
    disk::RealDisk,
    error::{Error, Result},
    source::{self, Known, Opened, SpoolOptions},
};

use crate::kit::{Cluster, Setup, Stop, wait_for};

pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A source as a person writes it who writes nothing but the url.
pub(crate) fn config(url: &str) -> Postgres {
    toml::from_str(&format!("url = {url:?}")).unwrap()
}

/// Reads from a source and remembers where it is.
pub(crate) struct Reading {
    pub(crate) opened: Opened,
    pub(crate) position: Option<Position>,
    pub(crate) spool: tempfile::TempDir,
}

impl Reading {
    pub(crate) async fn open(config: &Postgres, known: Known) -> Result<Self> {
        let config = SourceConfig::Postgres(config.clone());
        let spool = tempfile::tempdir().unwrap();
        let options = SpoolOptions {
            directory: spool.path().to_owned(),
            disk: RealDisk::shared(),
            reserve_bytes: 0,
        };
        let opened = source::open("app", &config, known, options).await?;
        Ok(Self { position: None, opened, spool })
    }

    pub(crate) async fn begin(cluster: &Cluster) -> Self {
        Self::open(&config(&cluster.unix_url()), Known::default()).await.unwrap()
    }

    /// The next `count` changes; more is a failure.
    pub(crate) async fn take(&mut self, count: usize) -> Vec<Change> {
        let mut changes = Vec::new();
        while changes.len() < count {
            let next = tokio::time::timeout(PATIENCE, self.opened.source.next());
            let batch = next.await.expect("changes in time").unwrap();
            changes.extend(batch.changes);
            self.position = batch.position.or(self.position);
        }
        assert_eq!(changes.len(), count);
        changes
    }

    /// Takes batches until `condition` holds for the position.
    pub(crate) async fn until(&mut self, condition: impl Fn(Position) -> bool) -> Vec<Change> {
        let mut changes = Vec::new();
        while !self.position.is_some_and(&condition) {
            let next = tokio::time::timeout(PATIENCE, self.opened.source.next());
            let batch = next.await.expect("a position in time").unwrap();
            changes.extend(batch.changes);
            self.position = batch.position.or(self.position);
        }
        changes
    }

    /// The error that ends the source.
    pub(crate) async fn error(&mut self) -> Error {
        loop {
            let next = tokio::time::timeout(PATIENCE, self.opened.source.next());
            if let Err(error) = next.await.expect("an end in time") {
                return error;
            }
        }
    }

    pub(crate) async fn confirm(&mut self) {
        self.opened.source.confirm(self.position.unwrap()).await.unwrap();
    }

    /// What a journal would know that has taken everything.
    pub(crate) fn known(&self) -> Known {
        Known {
            progress: self.position,
            origin: Some(self.opened.origin.clone()),
            has_changes: true,
            ..Known::default()
        }
    }
}

pub(crate) async fn lsn(cluster: &Cluster, query: &str) -> Lsn {
    let value = cluster.value(&format!("select ({query})::text")).await;
    value.as_str().unwrap().parse().unwrap()
}

fn texts(row: &walrace::change::Row) -> Vec<String> {
    row.values()
        .map(|value| match value {
            Value::Null => "null".into(),
            Value::Unchanged => "unchanged".into(),
            Value::Text(text) => String::from_utf8_lossy(text).into_owned(),
        })
        .collect()
}

fn after(change: &Change) -> Vec<String> {
    texts(change.after.as_ref().unwrap())
}

fn before(change: &Change) -> (&'static str, Vec<String>) {
    match &change.before {
        Before::Nothing => ("nothing", Vec::new()),
        Before::Key(row) => ("key", texts(row)),
        Before::Full(row) => ("full", texts(row)),
    }
}

fn ops(changes: &[Change]) -> Vec<Op> {
    changes.iter().map(|change| change.op).collect()
}

const LONG: &str = "(select string_agg(md5(i::text), '') from generate_series(1, 400) i)";

#[tokio::test]
async fn every_operation_arrives_with_its_transaction() {
    let cluster = Cluster::start().await;
    cluster.sql("create table t (id int primary key, body text)").await;
    let mut reading = Reading::begin(&cluster).await;
    cluster
        .sql(
            "begin;
             insert into t values (1, 'a'), (2, null);
             update t set body = 'b' where id = 1;
             update t set id = 3 where id = 2;
             delete from t where id = 1;
             commit",
        )
        .await;
    let changes = reading.take(5).await;
    assert_eq!(ops(&changes), [Op::Insert, Op::Insert, Op::Update, Op::Update, Op::Delete]);
    assert_eq!(changes.iter().map(|c| c.index).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
    let closes: Vec<_> = changes.iter().map(|c| c.closes_transaction).collect();
    assert_eq!(closes, [false, false, false, false, true]);
    assert!(changes.iter().all(|c| c.transaction == changes[0].transaction));
    assert_eq!(after(&changes[1]), ["2", "null"]);
    assert_eq!(
        (after(&changes[2]), before(&changes[2]).0),
        (vec!["1".into(), "b".into()], "nothing")
    );
    assert_eq!(before(&changes[3]), ("key", vec!["2".into(), "null".into()]));
    assert_eq!(before(&changes[4]), ("key", vec!["1".into(), "null".into()]));
    let age = walrace::change::Timestamp::now().0 - changes[0].transaction.commit_time.0;
    assert!((0..60_000_000).contains(&age), "the commit time is {age} us old");
    let position = reading.position.unwrap();
    assert!(position.lsn > changes[0].transaction.commit_lsn);
}

#[tokio::test]
async fn each_replica_identity_gives_its_own_old_row() {
    let cluster = Cluster::start().await;
    cluster
        .sql(
            "create table f (id int primary key, a text, b text);
             alter table f replica identity full;
              create table i (id int primary key, code text not null unique, b text);
              alter table i replica identity using index i_code_key",
        )
        .await;
    let mut reading = Reading::begin(&cluster).await;
    cluster
        .sql(
            "begin; insert into f values (1, 'x', 'y'); insert into i values (1, 'c', 'y');
              update f set a = 'z'; delete from f; update i set b = 'n'; update i set code = 'd';
              delete from i; commit",
        )
        .await;
    let changes = reading.take(7).await;
    let old: Vec<_> = changes.iter().map(before).collect();
    let row = |kind, values: [&str; 3]| (kind, values.map(String::from).to_vec());
    assert_eq!(old[2], row("full", ["1", "x", "y"]));
    assert_eq!(old[3], row("full", ["1", "z", "y"]));
    assert_eq!(old[4].0, "nothing");
    assert_eq!(old[5], row("key", ["null", "c", "null"]));
    assert_eq!(old[6], row("key", ["null", "d", "null"]));
    let full = changes[2].table.as_ref().unwrap();
    assert_eq!(full.key_columns(), [0], "the catalog knows the primary key that FULL hides");
    let index = changes[4].table.as_ref().unwrap();
    assert_eq!(index.columns[0].nullable, Some(false));
    assert!(index.columns[1].identity && !index.columns[0].identity);
}

#[tokio::test]
async fn an_unchanged_toast_value_is_never_null_and_is_completed_under_full() {
    let cluster = Cluster::start().await;
    cluster
        .sql(
            "create table t (id int primary key, long text, n int);
              alter table t alter long set storage external;
              create table f (like t including all); alter table f replica identity full",
        )
        .await;
    let mut reading = Reading::begin(&cluster).await;
    for table in ["t", "f"] {
        cluster
            .sql(&format!(
                "insert into {table} values (1, {LONG}, 0);
             update {table} set n = 1;
             update {table} set long = null"
            ))
            .await;
    }
    let changes = reading.take(6).await;
    assert_eq!(after(&changes[1]), ["1", "unchanged", "1"]);
    assert_eq!(after(&changes[2]), ["1", "null", "1"]);
    assert_eq!(
        after(&changes[4]),
        after(&changes[3]).iter().take(2).cloned().chain(["1".into()]).collect::<Vec<_>>()
    );
    assert_eq!(after(&changes[4])[1].len(), 400 * 32);
    assert_eq!(after(&changes[5]), ["1", "null", "1"]);
}

#[tokio::test]
async fn a_truncate_names_each_of_its_tables() {
    let cluster = Cluster::start().await;
    cluster.sql("create table a (id int primary key); create table b (id int primary key)").await;
    let mut reading = Reading::begin(&cluster).await;
    cluster.sql("insert into a values (1); truncate a, b").await;
    let changes = reading.take(3).await;
    assert_eq!(ops(&changes), [Op::Insert, Op::Truncate, Op::Truncate]);
    let mut names: Vec<_> =
        changes[1..].iter().map(|c| c.table.as_ref().unwrap().full_name()).collect();
    names.sort();
    assert_eq!(names, ["public.a", "public.b"]);
    assert_eq!((changes[1].closes_transaction, changes[2].closes_transaction), (false, true));
}

#[tokio::test]
async fn logical_messages_are_changes_inside_and_outside_transactions() {
    let cluster = Cluster::start().await;
    cluster.sql("create table t (id int primary key)").await;
    let mut reading = Reading::begin(&cluster).await;
    cluster
        .sql(
            r"begin;
             insert into t values (1);
             select pg_logical_emit_message(true, 'in', '\x00ff'::bytea);
             commit",
        )
        .await;
    let free = lsn(&cluster, "select pg_logical_emit_message(false, 'out', 'hello')").await;
    cluster
        .sql(
            "begin;
             select pg_logical_emit_message(true, 'gone', 'x');
             rollback;
             insert into t values (2)",
        )
        .await;
    let changes = reading.take(4).await;
    assert_eq!(ops(&changes), [Op::Insert, Op::Message, Op::Message, Op::Insert]);
    let (inside, outside) =
        (changes[1].message.as_ref().unwrap(), changes[2].message.as_ref().unwrap());
    assert_eq!((inside.prefix.as_str(), &inside.content[..]), ("in", &b"\0\xff"[..]));
    assert!(inside.transactional && !outside.transactional);
    assert_eq!((changes[1].index, changes[1].closes_transaction), (1, true));
    assert_eq!((outside.prefix.as_str(), &outside.content[..]), ("out", &b"hello"[..]));
    assert_eq!((changes[2].transaction.xid, changes[2].index), (0, 0));
    // Within its record, which PostgreSQL names by its end: the next may begin right there.
    assert_eq!(changes[2].transaction.commit_lsn, Lsn(free.0 - 1));
}

#[tokio::test]
async fn what_was_rolled_back_leaves_no_trace_and_no_hole() {
    let cluster = Cluster::start().await;
    cluster.sql("create table t (id int primary key)").await;
    let mut reading = Reading::begin(&cluster).await;
    cluster
        .sql(
            "begin; insert into t values (1); rollback;
              begin; insert into t values (2); savepoint s; insert into t values (3);
              rollback to s; insert into t values (4); savepoint r; insert into t values (5);
              release r; commit",
        )
        .await;
    let changes = reading.take(3).await;
    let rows: Vec<_> = changes.iter().map(|c| (c.index, after(c)[0].clone())).collect();
    assert_eq!(rows, [(0, "2".into()), (1, "4".into()), (2, "5".into())]);
}

#[tokio::test]
async fn a_transaction_larger_than_the_queue_comes_in_pieces_and_closes_once() {
    let cluster = Cluster::start().await;
    cluster.sql("create table t (id int primary key, body text)").await;
    let mut reading = Reading::begin(&cluster).await;
    let rows = 60_000;
    cluster
        .sql(&format!(
            "insert into t select i, repeat('x', 1000) from generate_series(1, {rows}) i"
        ))
        .await;
    let (mut count, mut closed, mut pieces) = (0u32, 0, 0);
    while closed == 0 {
        let batch =
            tokio::time::timeout(PATIENCE, reading.opened.source.next()).await.unwrap().unwrap();
        assert!(batch.bytes() < 6 << 20, "a batch of {} bytes", batch.bytes());
        for change in &batch.changes {
            assert_eq!(change.index, count);
            count += 1;
        }
        let closes = batch.changes.iter().filter(|change| change.closes_transaction).count();
        assert_eq!(batch.position.is_some(), closes == 1 || batch.changes.is_empty());
        closed += closes;
        pieces += 1;
    }
    assert_eq!((count, closed), (rows, 1));
    assert!(pieces > 10);
}

#[tokio::test]
async fn confirming_moves_the_slot_and_a_second_open_goes_on_behind_it() {
    let cluster = Cluster::start().await;
    cluster.sql("create table t (id int primary key)").await;
    let mut reading = Reading::begin(&cluster).await;
    cluster.sql("insert into t values (1)").await;
    reading.take(1).await;
    reading.confirm().await;
    let position = reading.position.unwrap();
    let slot = "select confirmed_flush_lsn from pg_replication_slots";
    let moved = async || (lsn(&cluster, slot).await >= position.lsn).then_some(());
    wait_for(PATIENCE, moved, || "the slot does not move".into()).await;
    let known = reading.known();
    drop(reading);
    let active = cluster.value("select active from pg_replication_slots").await;
    cluster.sql("insert into t values (2)").await;
    let again = async || Reading::open(&config(&cluster.url()), known.clone()).await.ok();
    let mut reading = wait_for(PATIENCE, again, || format!("not free again: {active}")).await;
    assert_eq!(reading.opened.start, position);
    assert_eq!(after(&reading.take(1).await[0]), ["2"]);
}

#[tokio::test]
async fn what_is_not_confirmed_is_sent_again_with_the_same_indexes() {
    let cluster = Cluster::start().await;
    cluster.sql("create table t (id int primary key)").await;
    let mut reading = Reading::begin(&cluster).await;
    let start = reading.opened.start;
    cluster.sql("insert into t values (1), (2)").await;
    let first = reading.take(2).await;
    let origin = Some(reading.opened.origin.clone());
    drop(reading);
    let known = Known { progress: Some(start), origin, has_changes: true, ..Known::default() };
    let again = async || Reading::open(&config(&cluster.unix_url()), known.clone()).await.ok();
    let mut reading = wait_for(PATIENCE, again, || "not free again".into()).await;
    assert_eq!(reading.take(2).await, first);
}

#[tokio::test]
async fn an_idle_source_follows_what_other_databases_write() {
    let cluster = Cluster::start().await;
    cluster.sql("create database other").await;
    let mut reading = Reading::begin(&cluster).await;
    let mut other = tokio_postgres::Config::new();
    other.host_path(cluster.socket_dir()).port(cluster.port()).user("postgres").dbname("other");
    let session = crate::kit::Session::open(&other).await.unwrap();
    session.batch_execute("create table t as select generate_series(1, 20000)").await.unwrap();
    let end = lsn(&cluster, "select pg_current_wal_lsn()").await;
    let changes = reading.until(|position| position.lsn >= end).await;
    assert!(changes.is_empty());
    reading.confirm().await;
    let slot = "select confirmed_flush_lsn from pg_replication_slots";
    let moved = async || (lsn(&cluster, slot).await >= end).then_some(());
    wait_for(PATIENCE, moved, || "the idle slot does not move".into()).await;
}

#[tokio::test]
async fn a_consumer_that_stalls_does_not_lose_its_connection() {
    let settings = "wal_sender_timeout = 2s".into();
    let cluster = Cluster::with(Setup { settings, ..Setup::default() }).await;
    cluster.sql("create table t (id int primary key, body text)").await;
    let mut reading = Reading::begin(&cluster).await;
    let rows = 40_000;
    cluster
        .sql(&format!(
            "insert into t select i, repeat('x', 1000) from generate_series(1, {rows}) i"
        ))
        .await;
    // It is the point of this test that time passes.
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert_eq!(reading.take(rows).await.len(), rows);
}

#[tokio::test]
async fn a_restart_of_the_server_is_retried_and_loses_nothing() {
    let mut cluster = Cluster::start().await;
    cluster.sql("create table t (id int primary key)").await;
    let mut reading = Reading::begin(&cluster).await;
    cluster.sql("insert into t values (1)").await;
    reading.take(1).await;
    let known = reading.known();
    cluster.down(Stop::Immediate);
    let error = reading.error().await;
    assert_eq!(error.class(), walrace::error::Class::Retry, "{error}");
    drop(reading);
    let refused = Reading::open(&config(&cluster.unix_url()), known.clone()).await;
    let error = refused.err().expect("nobody listens");
    assert_eq!(error.class(), walrace::error::Class::Retry, "{error}");
    cluster.up().await;
    cluster.sql("insert into t values (2)").await;
    let mut reading = Reading::open(&config(&cluster.unix_url()), known).await.unwrap();
    assert_eq!(after(&reading.take(1).await[0]), ["2"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_orderly_shutdown_of_the_server_is_not_held_up() {
    for caught_up in [true, false] {
        shut_down(caught_up).await;
    }
}

async fn shut_down(caught_up: bool) {
    let mut cluster = Cluster::start().await;
    cluster.sql("create table t (id int primary key)").await;
    let mut reading = Reading::begin(&cluster).await;
    cluster.sql("insert into t select generate_series(1, 20000)").await;
    if caught_up {
        reading.take(20_000).await;
        reading.confirm().await;
    }
    // As capture does: what was taken is confirmed. The server waits until all of it is.
    let consumer = async {
        loop {
            match reading.opened.source.next().await {
                Ok(batch) => {
                    reading.position = batch.position.or(reading.position);
                    if reading.position.is_some() {
                        reading.confirm().await;
                    }
                }
                Err(error) => break error,
            }
        }
    };
    let begun = std::time::Instant::now();
    let down = tokio::task::spawn_blocking(move || {
        cluster.down(Stop::Fast);
        cluster
    });
    let error = tokio::time::timeout(PATIENCE, consumer).await.expect("the stream ends");
    assert_eq!(error.class(), walrace::error::Class::Retry, "{error}");
    drop(down.await.unwrap());
    assert!(begun.elapsed() < PATIENCE, "caught up: {caught_up}, after {:?}", begun.elapsed());
}

#[tokio::test]
async fn types_are_described_to_their_ground() {
    use walrace::schema::TypeKind;
    let cluster = Cluster::start().await;
    cluster
        .sql(
            r#"create type mood as enum ('sad', 'ok');
             create domain posint as int check (value > 0);
              create type pair as (a posint, b text[]); create schema "We ird";
              create table "We ird"."Tá.ble" ("Id " int primary key, m mood[], p pair, r int4range,
                x box[], v varchar(12), o oidvector, n numeric(12,2)[])"#,
        )
        .await;
    let mut reading = Reading::begin(&cluster).await;
    cluster
        .sql(
            r#"insert into "We ird"."Tá.ble" values
              (1, '{ok,null}', row(3, '{x}'), '[1,3)', array['(1,1),(0,0)'::box],
               'v', '1 2', '{1.50}')"#,
        )
        .await;
    let changes = reading.take(1).await;
    let table = changes[0].table.as_ref().unwrap();
    assert_eq!((table.schema.as_str(), table.name.as_str()), ("We ird", "Tá.ble"));
    let kinds: Vec<_> = table.columns.iter().map(|column| &column.ty.kind).collect();
    let TypeKind::Array { element, delimiter: ',' } = kinds[1] else { panic!("{:?}", kinds[1]) };
    assert_eq!((&element.kind, element.name.as_str()), (&TypeKind::Enum, "public.mood"));
    let TypeKind::Composite { fields } = kinds[2] else { panic!("{:?}", kinds[2]) };
    assert_eq!((fields[0].0.as_str(), fields[1].0.as_str()), ("a", "b"));
    assert!(matches!(&fields[0].1.kind, TypeKind::Domain { base } if base.oid == 23));
    assert!(matches!(&fields[1].1.kind, TypeKind::Array { element, .. } if element.oid == 25));
    assert_eq!(kinds[3], &TypeKind::Range);
    assert!(matches!(kinds[4], TypeKind::Array { delimiter: ';', .. }));
    assert_eq!(
        (table.columns[5].ty.name.as_str(), table.columns[5].ty.modifier),
        ("character varying", 16)
    );
    assert_eq!(kinds[6], &TypeKind::Base);
    assert_eq!(table.columns[0].name, "Id ");
    assert_eq!(after(&changes[0])[2], "(3,{x})");
}

#[tokio::test]
async fn a_table_that_changes_while_it_is_read_keeps_the_columns_of_each_change() {
    let cluster = Cluster::start().await;
    cluster.sql("create table t (id int primary key, a text)").await;
    let mut reading = Reading::begin(&cluster).await;
    cluster.sql("insert into t values (1, 'x')").await;
    cluster.sql("alter table t rename a to b; alter table t add c int default 7").await;
    cluster.sql("insert into t values (2, 'y')").await;
    cluster.sql("alter table t drop b; insert into t values (3, 8)").await;
    let changes = reading.take(3).await;
    let names = |change: &Change| {
        let columns = &change.table.as_ref().unwrap().columns;
        columns.iter().map(|column| column.name.clone()).collect::<Vec<_>>().join(",")
    };
    assert_eq!(changes.iter().map(names).collect::<Vec<_>>(), ["id,a", "id,b,c", "id,c"]);
    assert_eq!(after(&changes[2]), ["3", "8"]);
}

#[tokio::test]
async fn the_counters_follow_the_stream() {
    use std::sync::atomic::Ordering::Relaxed;
    let cluster = Cluster::start().await;
    cluster.sql("create table t (id int primary key)").await;
    let mut reading = Reading::begin(&cluster).await;
    cluster.sql("insert into t values (1), (2)").await;
    reading.take(2).await;
    reading.confirm().await;
    let position = reading.position.unwrap();
    let stats = &reading.opened.stats;
    assert_eq!(stats.changes.load(Relaxed), 2);
    assert!(stats.received.load(Relaxed) >= position.lsn.0);
    assert!(stats.bytes.load(Relaxed) > 0);
    let confirmed = async || (stats.confirmed.load(Relaxed) >= position.lsn.0).then_some(());
    wait_for(PATIENCE, confirmed, || "not confirmed".into()).await;
}

#[test]
fn a_password_is_not_shown_by_debug() {
    let config = Postgres { url: Secret::new("postgres://u:hunter2@h/d"), ..config("x") };
    assert!(!format!("{config:?}").contains("hunter2"));
}
