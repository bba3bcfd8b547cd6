//! Tables that change while they are written, with kills in the middle: each change arrives once,
//! with the columns and values that its row had when it was made.
//!
//! The oracle is the database: a trigger writes each row, as `to_jsonb` sees it at that moment, into
//! a table of its own. That table is captured too, so within a transaction the change and what the
//! trigger said of it stand side by side.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::kit::{Cluster, FileRecorder, Recorder, Server, source_toml, wait_for};

const PATIENCE: Duration = Duration::from_secs(60);

/// What remembers each row; nothing but the tables under test has the trigger.
const ORACLE: &str = "
create table oracle (no bigserial primary key, tbl text, op text, old jsonb, new jsonb);
create function remember() returns trigger language plpgsql as $$ begin
  insert into oracle (tbl, op, old, new) values (coalesce(tg_argv[0], tg_table_name), lower(left(tg_op, 1)),
    case when tg_op <> 'INSERT' then to_jsonb(old) end,
    case when tg_op <> 'DELETE' then to_jsonb(new) end);
  return null; end $$;
create publication everything for all tables with (publish_via_partition_root = true);
";

fn oracle_of(table: &str) -> String {
    format!(
        "create trigger remember after insert or update or delete on {table}
         for each row execute function remember();"
    )
}

/// A server that captures everything into a file.
struct Lake {
    cluster: Cluster,
    server: Server,
    file: FileRecorder,
}

impl Lake {
    async fn new(schema: &str, source: &str) -> Self {
        let cluster = Cluster::start().await;
        cluster.sql(schema).await;
        let url = source_toml("app", &cluster.unix_url());
        let server = Server::new(&format!(
            "{url}{source}\n[sink.lake]\nkind = \"file\"\npath = \"lake.jsonl\"\n"
        ));
        let file = FileRecorder::new(server.path("lake.jsonl"));
        let mut lake = Self { cluster, server, file };
        lake.server.start_ready().await;
        lake
    }

    async fn with_oracle(tables: &str) -> Self {
        Self::new(&format!("{ORACLE}{tables}"), "publication = \"everything\"\n").await
    }

    async fn restart(&mut self) {
        self.server.kill();
        self.server.start_ready().await;
    }

    /// Everything that was captured, once the last row of the oracle is there.
    async fn all(&self) -> Vec<Value> {
        self.cluster.sql("insert into oracle (tbl, op) values ('end', 'i')").await;
        let ended = |seen: &[Value]| seen.iter().any(|change| change["after"]["tbl"] == "end");
        self.file.wait_until(PATIENCE, ended).await
    }

    /// Everything that was captured, each change compared with what the oracle says of it.
    async fn all_as_the_oracle_says(&self) -> Vec<Value> {
        let changes = self.all().await;
        compare(&changes);
        let told = changes.iter().filter(|change| change["source_table"] == "oracle").count();
        let rows = self.cluster.value("select count(*) from oracle").await;
        assert_eq!(json!(told), rows, "a row of the oracle did not arrive, or twice");
        changes
    }
}

/// Within each transaction the changes and the words of the oracle are the same, in their order.
fn compare(changes: &[Value]) {
    let mut transactions: BTreeMap<&str, (Vec<&Value>, Vec<&Value>)> = BTreeMap::new();
    for change in changes {
        let lsn = change["source_position"]["lsn"].as_str().unwrap();
        let both = transactions.entry(lsn).or_default();
        match change["source_table"] == "oracle" {
            true if change["after"]["tbl"] == "end" => {}
            true => both.1.push(&change["after"]),
            false => both.0.push(change),
        }
    }
    for (changes, told) in transactions.into_values() {
        assert_eq!(changes.len(), told.len(), "{changes:#?}\nthe oracle: {told:#?}");
        for (change, told) in changes.into_iter().zip(told) {
            let op = if change["op"] == "c" { "i" } else { change["op"].as_str().unwrap() };
            assert_eq!(op, told["op"], "{change}\nthe oracle: {told}");
            assert_eq!(change["source_table"], told["tbl"], "{change}\nthe oracle: {told}");
            assert_eq!(change["after"], told["new"], "{change}\nthe oracle: {told}");
            for (column, value) in change["before"].as_object().into_iter().flatten() {
                assert_eq!(value, &told["old"][column], "{change}\nthe oracle: {told}");
            }
            let row = if op == "d" { &told["old"] } else { &told["new"] };
            for (column, value) in change["key"].as_object().into_iter().flatten() {
                assert_eq!(value, &row[column], "{change}\nthe oracle: {told}");
            }
        }
    }
}

/// Sessions that write to `t` by columns that every version of it has.
struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    sessions: JoinSet<()>,
}

impl Load {
    fn on(cluster: &Cluster, sessions: u64) -> Self {
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut tasks = JoinSet::new();
        for session in 0..sessions {
            let mut config = tokio_postgres::Config::new();
            config.host_path(cluster.socket_dir()).port(cluster.port());
            config.user("postgres").dbname("postgres");
            let (stop, done) = (Arc::clone(&stop), Arc::clone(&done));
            tasks.spawn(async move {
                let client = crate::kit::Session::open(&config).await.expect("a session");
                let mut no = 0;
                while !stop.load(Ordering::Relaxed) {
                    no += 1;
                    let id = session * 1_000_000 + no;
                    let gone = id.saturating_sub(5);
                    let sql = format!(
                        "begin; insert into t (id) values ({id}), (-{id});
                         update t set touched = touched + 1 where id in ({id}, {gone});
                         delete from t where id = -{gone}; commit"
                    );
                    match client.batch_execute(&sql).await {
                        Ok(()) => done.fetch_add(1, Ordering::Relaxed),
                        // a deadlock with the one who alters the table
                        Err(_) => client.batch_execute("rollback").await.map_or(0, |()| 0),
                    };
                }
            });
        }
        Self { stop, done, sessions: tasks }
    }

    /// Until so many more transactions were committed.
    async fn goes_on(&self) {
        let until = self.done.load(Ordering::Relaxed) + 10;
        let more = async || (self.done.load(Ordering::Relaxed) >= until).then_some(());
        wait_for(PATIENCE, more, || "the load stands still".into()).await;
    }

    async fn end(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        while self.sessions.join_next().await.is_some() {}
    }
}

/// Runs each statement under load; Walrace is killed before some, and stays down over others.
async fn alter_under_load(lake: &mut Lake, statements: &[&str]) {
    let load = Load::on(&lake.cluster, 2);
    load.goes_on().await;
    for (number, statement) in statements.iter().enumerate() {
        if number % 3 == 1 {
            lake.server.kill();
        }
        lake.cluster.sql(statement).await;
        load.goes_on().await;
        match number % 3 {
            2 => lake.server.start_ready().await, // over two changes it was down
            1 => {}
            _ if number % 2 == 0 => lake.restart().await,
            _ => {}
        }
    }
    if !lake.server.is_running() {
        lake.server.start_ready().await;
    }
    load.goes_on().await;
    load.end().await;
}

const TABLE: &str = "create table t (id bigint primary key, touched int not null default 0,
    note text default md5(random()::text));";

#[tokio::test]
async fn columns_come_go_and_change_their_names_and_types_under_load_and_kills() {
    let mut lake = Lake::with_oracle(&format!("{TABLE}{}", oracle_of("t"))).await;
    let statements = [
        "alter table t add column a int default 7",
        "alter table t add column b text not null default md5(random()::text)",
        "alter table t rename column a to amount",
        "alter table t alter column amount type numeric(12, 3) using amount + 0.125",
        "alter table t drop column b",
        "alter table t alter column amount type text using 'about ' || amount,
             alter column amount set default 'none'",
        "alter table t add column b boolean default random() < 0.5",
        "alter table t rename column note to b2; alter table t rename column b to note;
         alter table t rename column b2 to b",
        "alter table t add column tags text[] default array['x', null, '\"']",
        "alter table t alter column tags set default null, drop column amount",
    ];
    alter_under_load(&mut lake, &statements).await;
    let changes = lake.all_as_the_oracle_says().await;
    let shapes: std::collections::BTreeSet<Vec<String>> = changes
        .iter()
        .filter(|change| change["source_table"] == "t")
        .filter_map(|change| Some(change["after"].as_object()?.keys().cloned().collect()))
        .collect();
    assert!(shapes.len() >= 6, "{shapes:?}");
}

#[tokio::test]
async fn keys_and_identities_change_under_load_and_kills() {
    let mut lake = Lake::with_oracle(&format!(
        "{TABLE} alter table t add column uid uuid not null default gen_random_uuid();
         create unique index t_uid on t (uid); {}",
        oracle_of("t")
    ))
    .await;
    let statements = [
        "alter table t replica identity full",
        "alter table t replica identity using index t_uid",
        "alter table t replica identity default",
        "alter table t drop constraint t_pkey, add primary key (uid); create index on t (id)",
        "alter table t replica identity full",
        "alter table t drop constraint t_pkey",
        "alter table t add primary key (id, uid)",
        "alter table t replica identity default",
        "alter table t drop constraint t_pkey, add primary key (id)",
    ];
    alter_under_load(&mut lake, &statements).await;
    let changes = lake.all_as_the_oracle_says().await;
    let keys: std::collections::BTreeSet<Vec<String>> = changes
        .iter()
        .filter(|change| change["source_table"] == "t" && change["op"] == "d")
        .filter_map(|change| Some(change["key"].as_object()?.keys().cloned().collect()))
        .collect();
    assert!(keys.contains(&vec!["id".to_owned()]), "{keys:?}");
    assert!(keys.contains(&vec!["uid".to_owned()]), "{keys:?}");
}

#[tokio::test]
async fn tables_are_renamed_dropped_and_made_again_under_load_and_kills() {
    let oracle = oracle_of("t");
    let mut lake = Lake::with_oracle(&format!("{TABLE}{oracle}")).await;
    let again = |how: &str, columns: &str| {
        format!(
            "begin; {how}; create table t (id bigint primary key, {columns},
                 touched int not null default 0); {oracle} commit"
        )
    };
    let statements = [
        again("alter table t rename to t_first", "note int default 3"),
        again("drop table t", "price numeric default 1.50"),
        "truncate t_first".to_owned(),
        again("alter table t rename to t_second", "note timestamptz default now()"),
        again("create schema other; alter table t set schema other", "v json default '{\"a\": 1}'"),
        again("drop table t", "v point default '(1,2)'"),
    ];
    let statements: Vec<&str> = statements.iter().map(String::as_str).collect();
    alter_under_load(&mut lake, &statements).await;
    let mut changes = lake.all().await;
    let truncates = changes.iter().filter(|change| change["op"] == "t").count();
    assert_eq!(truncates, 1);
    changes.retain(|change| change["op"] != "t");
    compare(&changes);
}

#[tokio::test]
async fn an_enum_gets_new_values_and_a_composite_new_fields() {
    let mut lake = Lake::with_oracle(&format!(
        "create type mood as enum ('ok'); create type place as (city text, zip int);
         create domain sure as int check (value > 0);
         create table t (id bigint primary key, touched int not null default 0, m mood default 'ok',
             ms mood[] default '{{ok}}', p place default row('Ä', 1), s sure default 1);
         {}",
        oracle_of("t")
    ))
    .await;
    let statements = [
        "alter type mood add value 'so ''so'' \"x\"'",
        "alter table t alter m set default 'so ''so'' \"x\"'",
        "alter type mood rename value 'ok' to 'fine'; update t set touched = 0 where id < 9",
        "alter type place add attribute country text",
        "alter table t alter p set default row('B', 2, 'de')",
        "alter type place rename attribute zip to postcode",
        "alter type place drop attribute city",
        "alter type mood rename to temper",
        "alter domain sure drop constraint sure_check",
    ];
    alter_under_load(&mut lake, &statements).await;
    let changes = lake.all().await;
    let told = changes.iter().filter(|change| change["source_table"] == "oracle").count();
    assert_eq!(json!(told), lake.cluster.value("select count(*) from oracle").await);
    let texts: Vec<Value> = changes.iter().map(|change| change["after"]["m"].clone()).collect();
    for value in ["ok", "so 'so' \"x\"", "fine"] {
        assert!(texts.contains(&json!(value)), "{value} never came");
    }
    // PostgreSQL does not describe a table anew whose types were altered: until it does, a value
    // that no longer fits comes as PostgreSQL's own text, and is never dropped or misread.
    for change in changes.iter().filter(|change| change["source_table"] == "t") {
        let place = &change["after"]["p"];
        assert!(change["op"] == "d" || place.is_object() || place.is_string(), "{change}");
    }
}

#[tokio::test]
async fn partitions_are_attached_and_detached_under_load_and_kills() {
    let mut lake = Lake::with_oracle(
        "create table t (id bigint primary key, touched int not null default 0)
             partition by range (id);
         create table t_low partition of t for values from (minvalue) to (0);
         create table t_one partition of t for values from (0) to (1000000);
         create table t_two partition of t for values from (1000000) to (2000000);
         create trigger remember after insert or update or delete on t
             for each row execute function remember('t');",
    )
    .await;
    let statements = [
        "create table t_new (id bigint primary key, touched int not null default 0,
             check (id >= 2000000 and id < 3000000));
         create trigger early after insert or update or delete on t_new
             for each row execute function remember('t_new');
         insert into t_new values (2000001, 1)",
        "begin; drop trigger early on t_new;
         alter table t attach partition t_new for values from (2000000) to (3000000); commit",
        "insert into t values (2000002, 1); update t set touched = 9 where id >= 2000000",
        "begin; alter table t detach partition t_new;
         create trigger late after insert or update or delete on t_new
             for each row execute function remember('t_new'); commit",
        "update t_new set touched = touched + 1; delete from t_new where id = 2000001",
        "alter table t add column late text default 'x'",
    ];
    // PostgreSQL 14 goes on to send a detached partition under its root, until the next connection.
    let version = lake.cluster.value("select current_setting('server_version_num')::int").await;
    let tells = version.as_u64() >= Some(150_000);
    let kept = |number: usize| tells || number != 4;
    let statements: Vec<&str> =
        statements.into_iter().enumerate().filter(|(n, _)| kept(*n)).map(|(_, sql)| sql).collect();
    alter_under_load(&mut lake, &statements).await;
    let changes = lake.all_as_the_oracle_says().await;
    let of = |table: &str| changes.iter().filter(|c| c["source_table"] == table).count();
    assert_eq!(of("t_new"), if tells { 1 + 3 } else { 1 });
    assert_eq!(of("t_one") + of("t_two") + of("t_low"), 0);
}

/// The ids of the rows of `t` that came, by operation.
fn ids(changes: &[Value], op: &str) -> Vec<u64> {
    let of = changes.iter().filter(|change| change["source_table"] == "t" && change["op"] == op);
    of.filter_map(|change| change["key"]["id"].as_u64()).collect()
}

#[tokio::test]
async fn a_publication_of_somebody_else_changes_and_what_it_leaves_out_is_told() {
    let mut lake = Lake::new(
        "create table t (id int primary key, v int default 1, w text default 'w');
         create table oracle (no serial primary key, tbl text, op text);
         create publication theirs for table t, oracle",
        "publication = \"theirs\"\nreconcile_ms = 100\n",
    )
    .await;
    let sql = async |sql: &str| lake.cluster.sql(sql).await;
    let logged = async |text: &str| {
        let found = async || lake.server.log().contains(text).then_some(());
        wait_for(PATIENCE, found, || format!("`{text}` is not in {}", lake.server.log())).await;
    };
    sql("insert into t values (1)").await;
    sql("alter publication theirs drop table t").await;
    sql("insert into t values (2); insert into oracle (tbl) values ('between')").await;
    logged("the owner of the publication took the table out").await;
    sql("alter publication theirs add table t").await;
    sql("insert into t values (3)").await;
    logged("the owner of the publication put the table in").await;
    sql("alter publication theirs set (publish = 'insert, delete')").await;
    sql("update t set v = 9; delete from t where id = 1; insert into t values (4)").await;
    sql("alter publication theirs set (publish = 'insert, update, delete, truncate')").await;
    sql("update t set v = 10 where id = 4").await;
    let version = lake.cluster.value("select current_setting('server_version_num')::int").await;
    let narrows = version.as_u64() >= Some(150_000);
    if narrows {
        sql("alter publication theirs set table t (id, v), oracle").await;
        sql("insert into t values (5, 5, 'hidden')").await;
        sql("alter publication theirs set table t where (id > 100), oracle").await;
        sql("insert into t values (6), (106); update t set w = 'seen' where id = 106").await;
        sql("update t set id = 7 where id = 106; update t set id = 107 where id = 6").await;
    }
    lake.restart().await;
    lake.cluster.sql("insert into t values (200)").await;
    let changes = lake.all().await;
    let told: Vec<_> = changes.iter().filter(|c| c["source_table"] == "oracle").collect();
    assert_eq!(told.len(), 2);
    let mut inserted = vec![1, 3, 4];
    if narrows {
        inserted.extend([5, 106, 107]);
        let five = changes.iter().find(|change| change["key"]["id"] == 5).unwrap();
        assert_eq!(five["after"], json!({"id": 5, "v": 5}));
        let seen = changes.iter().find(|c| c["op"] == "u" && c["key"]["id"] == 106).unwrap();
        assert_eq!(seen["after"], json!({"id": 106, "v": 1, "w": "seen"}));
        assert_eq!(ids(&changes, "d"), [1, 106]);
    } else {
        assert_eq!(ids(&changes, "d"), [1]);
    }
    inserted.push(200);
    assert_eq!(ids(&changes, "c"), inserted);
    assert_eq!(ids(&changes, "u"), if narrows { vec![4, 106] } else { vec![4] });
}

#[tokio::test]
async fn a_row_that_waits_under_its_old_key_is_not_passed_by_itself_under_the_new_one() {
    let cluster = Cluster::start().await;
    cluster.sql("create table t (id int primary key, uid int unique not null, v text)").await;
    let target = Recorder::start().await;
    target.refuse(|change| change["after"]["v"] == "bad");
    for lanes in [1, 4] {
        let server = format!(
            "{}[sink.hook]\nkind = \"webhook\"\nurl = \"{}\"\nlanes = {lanes}\nretry_ms_max = 500\n",
            source_toml("app", &cluster.unix_url()),
            target.url()
        );
        let mut server = Server::new(&server);
        server.start_ready().await;
        let before = target.changes().len();
        cluster.sql("insert into t values (1, 11, 'bad'), (2, 12, 'fine')").await;
        target.wait_until(|seen| seen.len() > before).await;
        cluster.sql("alter table t drop constraint t_pkey, add primary key (uid)").await;
        cluster.sql("update t set v = 'good' where uid = 11").await;
        cluster
            .sql("create table if not exists u (id int primary key); insert into u values (1)")
            .await;
        let parked = async || {
            let output = server.run(&["dlq", "list", "--sink", "hook", "--json"]);
            let text = String::from_utf8(output.stdout).unwrap();
            (text.lines().count() == 2).then_some(())
        };
        wait_for(PATIENCE, parked, || format!("{:?}", target.changes())).await;
        target.refuse_nothing();
        target.wait_until(|seen| seen.len() >= before + 3).await;
        let values: Vec<Value> = target.changes()[before..]
            .iter()
            .filter(|change| change["source_table"] == "t" && change["after"]["v"] != "fine")
            .map(|change| change["after"]["v"].clone())
            .collect();
        assert_eq!(values, ["bad", "good"]);
        server.stop().await;
        target.refuse(|change| change["after"]["v"] == "bad");
        cluster.sql("drop table t, u; create table t (id int primary key, uid int unique not null, v text)").await;
        cluster.sql("select pg_drop_replication_slot('walrace_app'); drop publication walrace_app, walrace_app_inserts").await;
    }
}
