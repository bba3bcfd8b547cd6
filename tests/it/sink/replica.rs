//! One PostgreSQL kept the same as another by the whole binary, whatever dies on the way.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use serde_json::json;
use tokio::task::JoinSet;

use crate::kit::{Cluster, Ledger, Load, Pace, Server, Stop, source_toml, wait_for};

const PACE: Pace = Pace { seed: 11, sessions: 2, pause: Duration::from_millis(2) };
const PATIENCE: Duration = Duration::from_secs(90);

/// A source, the binary, and the target.
struct Scene {
    source: Cluster,
    target: Cluster,
    server: Server,
}

impl Scene {
    /// Captures `tables`; the sink's further options are `more`.
    async fn set(schema: &str, tables: &str, more: &str) -> Self {
        let (source, target) = (Cluster::start().await, Cluster::start().await);
        source.sql(schema).await;
        let server = Server::new(&format!(
            "{}tables = [\"{tables}\"]\n\n\
             [sink.copy]\nkind = \"postgres\"\nurl = \"{}\"\nretry_ms_min = 10\n\
             retry_ms_max = 200\n{more}\n",
            source_toml("app", &source.unix_url()),
            target.url()
        ));
        Self { source, target, server }
    }

    async fn ledger() -> Self {
        let mut scene = Self::set("select 1", "ledger.*", "missing_table = \"create\"\n").await;
        Ledger::create(&scene.source).await;
        scene.server.start_ready().await; // the slot is there before the first change
        scene.server.kill();
        scene
    }

    /// Waits until the target has a row.
    async fn wait(&self, exists: &str) {
        let query = format!("select from {exists}");
        let there = async || {
            let session = self.target.try_connect().await.ok()?;
            let rows = session.query(&query, &[]).await.ok()?;
            (!rows.is_empty()).then_some(())
        };
        let log = || format!("the target lacks {exists}:\n{}", self.server.log());
        wait_for(PATIENCE, there, log).await;
    }

    /// Runs until the target has everything that was committed, and compares the tables.
    async fn settle(mut self, load: Load) {
        let (committed, aborted) = load.stop().await;
        if !self.server.is_running() {
            self.server.start();
        }
        self.source.sql("insert into ledger.tx values (-1, 0, now())").await;
        self.wait("ledger.tx where no = -1").await;
        assert!(self.server.stop().await.success());
        let source = Ledger::final_state(&self.source).await;
        let target = Ledger::final_state(&self.target).await;
        println!("{committed} transactions, {aborted} rolled back");
        for table in ["tx", "account", "order_line", "entry", "document", "visit"] {
            assert_eq!(source.count(table), target.count(table), "rows of {table}");
        }
        assert_eq!(source, target);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn chaos_of_kills_and_restarts_leaves_the_target_equal_to_the_source() {
    let mut scene = Scene::ledger().await;
    let mut rng = fastrand::Rng::with_seed(42);
    let load = Ledger::load(&scene.source, PACE);
    for kill in 0..6 {
        scene.server.start();
        tokio::time::sleep(Duration::from_millis(rng.u64(200..1500))).await;
        match kill {
            2 => scene.target.restart(Stop::Immediate).await,
            4 => scene.source.restart(Stop::Immediate).await,
            _ => {}
        }
        tokio::time::sleep(Duration::from_millis(rng.u64(0..500))).await;
        scene.server.kill();
    }
    scene.settle(load).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn chaos_at_each_step_of_a_write_leaves_the_target_equal_to_the_source() {
    let mut scene = Scene::ledger().await;
    let load = Ledger::load(&scene.source, PACE);
    for point in [
        "deliver::before_write:2",
        "postgres::after_rows:1",
        "postgres::after_rows:5",
        "postgres::before_commit:1",
        "postgres::before_commit:4",
        "postgres::after_commit:1",
        "postgres::after_commit:3",
        "deliver::after_write:2",
    ] {
        scene.server.start_to_die_at(point);
        println!("to die at {point}");
        scene.server.wait_exit(Duration::from_secs(60)).await;
    }
    scene.settle(load).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_reader_of_the_target_ever_sees_half_a_transaction() {
    let schema = "create table bank (id int primary key, balance bigint not null); \
                  create table run (no int primary key)";
    let mut scene = Scene::set(schema, "public.*", "batch_changes_max = 50\n").await;
    scene.target.sql(schema).await;
    scene.server.start_ready().await;
    scene.source.sql("insert into bank select i, 100 from generate_series(1, 400) i").await;
    let done = Arc::new(AtomicBool::new(false));
    let mut reader = JoinSet::new();
    let (session, ended) = (scene.target.connect().await, Arc::clone(&done));
    reader.spawn(async move {
        let mut seen = std::collections::BTreeSet::new();
        while !ended.load(Ordering::SeqCst) {
            let query = "select count(*), coalesce(sum(balance), 0)::bigint from bank";
            let row = session.query_one(query, &[]).await.unwrap();
            let (count, sum): (i64, i64) = (row.get(0), row.get(1));
            assert!(count == 0 || count == 400, "{count} rows of a transaction of 400");
            assert_eq!(sum, count * 100, "money in flight");
            seen.insert(sum);
        }
        seen.len()
    });
    for round in 0..60 {
        // From 2 changes to 400: within a batch, and over many of them.
        let span = [1, 200, 10][round % 3];
        let transfer = format!(
            "begin; update bank set balance = balance - {round} where id <= {span}; \
             update bank set balance = balance + {round} where id > 400 - {span}; commit"
        );
        scene.source.sql(&transfer).await;
        if round == 30 {
            scene.server.kill();
            scene.server.start_ready().await;
        }
    }
    scene.source.sql("insert into run values (1)").await;
    scene.wait("run").await;
    done.store(true, Ordering::SeqCst);
    assert!(reader.join_next().await.unwrap().unwrap() >= 1);
    let sum = "select json_object_agg(id, balance) from bank";
    assert_eq!(scene.source.value(sum).await, scene.target.value(sum).await);
}

const TYPES: &str = "
create schema app;
create type app.mood as enum ('sad', 'o''k', 'happy');
create domain app.short as varchar(5) check (value <> 'bad');
create type app.pair as (a int, b text);
create table app.t (
    id bigint primary key, small smallint, flag boolean, price numeric(12,2), any_number numeric,
    f4 real, f8 double precision, name varchar(10), code char(4), bits bit(5), vbits bit varying,
    raw bytea, day date, at timestamptz, local timestamp(3), clock time, span interval, uid uuid,
    doc json, docb jsonb, net inet, mac macaddr, place point, sizes int[], words text[][],
    during tstzrange, who app.mood, whos app.mood[], tag app.short, both_of app.pair,
    money_of numeric(4,1)[], many int4multirange, flag1 \"char\", search tsvector, x xml);
create type app.far as enum ('a', 'b');
create domain app.label as varchar(5);
create table app.u (id int primary key, who app.far, whos app.far[], tag app.label);";

const ROWS: &str = "
insert into app.t values (1, -5, true, 12.50, 1e30, 1.5, 0.1, 'ü\t', 'ab', '10101', '1',
    '\\x00ff5c', '2026-02-03', '2026-02-03 04:05:06.789+02', '2026-02-03 04:05:06.789',
    '23:59:59', '1 year -3 days 04:05', gen_random_uuid(), '{\"a\": [1, \"\\\\n\"]}',
    '{\"b\": null}', '10.1.2.0/24', '08:00:2b:01:02:03', '(1.5,-2)', '{1,NULL,3}',
    '{{a,\"b c\"},{\"\\\\\",\"\"}}', '[2026-01-01,)', 'o''k', '{sad,happy}', 'abc',
    row(1, 'x, \"y\"'), '{1.5,-2.5}', '{[1,3),[5,7)}', 'z', 'a:1 b:2', '<a>1</a>');
insert into app.t (id) values (2);
insert into app.t (id, f8, any_number, at, day) values (3, 'NaN', 'NaN', 'infinity', '0044-03-15 BC');
update app.t set price = 0.01, who = 'happy', whos = '{}' where id = 2;
insert into app.u values (1, 'a', '{a,b}', 'abcde'), (2, null, null, null);
insert into app.t (id, name) select i, 'n' || i from generate_series(100, 400) i;";

#[tokio::test(flavor = "multi_thread")]
async fn every_type_arrives_as_it_was_in_tables_that_are_made_by_hand_or_by_the_sink() {
    let mut scene = Scene::set(TYPES, "app.*", "missing_table = \"create\"\n").await;
    let types = TYPES.split("create table").next().unwrap();
    scene.target.sql(types).await;
    scene.server.start_ready().await;
    scene.source.sql(ROWS).await;
    scene.wait("app.t where id = 400").await;
    let columns = "select json_object_agg(attname, format_type(atttypid, atttypmod)) \
                   from pg_attribute where attrelid = 'app.t'::regclass and attnum > 0";
    assert_eq!(scene.source.value(columns).await, scene.target.value(columns).await);
    // As texts: neither NaN nor the length of a char is seen in JSON.
    let rows = "select id, t::text as row from app.t t order by id";
    assert_eq!(scene.source.rows(rows).await, scene.target.rows(rows).await);

    // Types that the target has not are kept as text, or as the type below them.
    let columns = columns.replace("app.t", "app.u");
    let expected =
        json!({"id": "integer", "who": "text", "whos": "text[]", "tag": "character varying(5)"});
    assert_eq!(scene.target.value(&columns).await, expected);
    let rows = "select id, u::text as row from app.u u order by id";
    assert_eq!(scene.source.rows(rows).await, scene.target.rows(rows).await);
}
