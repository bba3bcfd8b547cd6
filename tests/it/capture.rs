//! What is captured, from a real PostgreSQL to the lines of the file sink, through the real binary.

use std::time::Duration;

use serde_json::{Value, json};

use crate::kit::{Cluster, FileRecorder, Server, Setup, source_toml, wait_for};

const PATIENCE: Duration = Duration::from_secs(30);

/// A server that captures `source` into `lake.jsonl`.
struct Lake {
    cluster: Cluster,
    server: Server,
    file: FileRecorder,
}

impl Lake {
    async fn of(setup: Setup, schema: &str, source: &str, sink: &str) -> Self {
        let cluster = Cluster::with(setup).await;
        cluster.sql(schema).await;
        let url = source_toml("app", &cluster.unix_url());
        let server = Server::new(&format!(
            "{url}{source}\n\n[sink.lake]\nkind = \"file\"\npath = \"lake.jsonl\"\n{sink}"
        ));
        let file = FileRecorder::new(server.path("lake.jsonl"));
        let mut lake = Self { cluster, server, file };
        lake.server.start_ready().await;
        lake
    }

    async fn new(schema: &str) -> Self {
        Self::of(Setup::default(), schema, "", "").await
    }

    async fn wait(&self, count: usize) -> Vec<Value> {
        self.file.wait_until(PATIENCE, |seen| seen.len() >= count).await
    }
}

fn ops(changes: &[Value]) -> Vec<&str> {
    changes.iter().map(|change| change["op"].as_str().unwrap()).collect()
}

fn position(change: &Value) -> (u64, u64) {
    let at = &change["source_position"];
    let lsn: walrace::change::Lsn = at["lsn"].as_str().unwrap().parse().unwrap();
    (lsn.0, at["index"].as_u64().unwrap())
}

#[tokio::test]
async fn inserts_updates_and_deletes_of_a_published_table_are_each_captured() {
    let lake = Lake::new("create table containers (id int primary key, name text)").await;
    lake.cluster.sql("insert into containers values (1, 'a')").await;
    lake.cluster.sql("update containers set name = 'Test CDC' where id = 1").await;
    lake.cluster.sql("delete from containers").await;
    let changes = lake.wait(3).await;
    assert_eq!(ops(&changes), ["c", "u", "d"]);
    assert_eq!(changes[1]["after"], json!({"id": 1, "name": "Test CDC"}));
    assert_eq!(changes[2]["key"], json!({"id": 1}));
}

#[tokio::test]
async fn each_event_names_its_table_operation_rows_transaction_and_a_position_that_only_grows() {
    let schema = "create table t (id int primary key, v text); alter table t replica identity full";
    let mut lake = Lake::new(schema).await;
    for id in 0..20 {
        lake.cluster.sql(&format!("insert into t values ({id}, 'x'); update t set v = 'y'")).await;
        if id == 10 {
            lake.wait(22).await;
            lake.server.kill();
            lake.server.start_ready().await;
        }
    }
    let end = lake.cluster.value("select count(*) from t").await;
    assert_eq!(end, 20);
    let expected = 20 + (1..=20).sum::<usize>();
    let changes = lake.wait(expected).await;
    assert_eq!(changes.len(), expected);
    assert!(changes.is_sorted_by(|a, b| position(a) < position(b)), "positions grow strictly");
    let offsets: Vec<_> = changes.iter().map(|change| change["offset"].as_u64().unwrap()).collect();
    assert!(offsets.is_sorted_by(|a, b| a + 1 == *b), "offsets have no hole");
    for change in &changes {
        assert_eq!(
            (&change["source_schema"], &change["source_table"]),
            (&json!("public"), &json!("t"))
        );
        assert!(change["source_position"]["tx_id"].as_u64().unwrap() > 0);
        if change["op"] == "u" {
            assert!(change["before"]["v"].is_string() && change["after"]["v"] == "y");
        }
    }
}

#[tokio::test]
async fn the_three_table_booking_transaction_gives_three_events_of_one_transaction() {
    let lake = Lake::new(
        "create table bookings (booking_id int primary key, status text, confirmed_at timestamptz);
         create table payments (payment_id serial primary key, booking_id int, amount_cents int, status text);
         create table cabin_inventory (sailing_id date, cabin_id text, reserved bool, primary key (sailing_id, cabin_id));
         insert into bookings values (8841, 'pending', null);
         insert into cabin_inventory values ('2026-07-14', 'S12', false)",
    )
    .await;
    lake.cluster
        .sql(
            "begin;
             update bookings set status = 'confirmed', confirmed_at = now() where booking_id = 8841;
             insert into payments (booking_id, amount_cents, status) values (8841, 220000, 'authorized');
             update cabin_inventory set reserved = true where sailing_id = '2026-07-14' and cabin_id = 'S12';
             commit",
        )
        .await;
    let changes = lake.wait(3).await;
    let tables: Vec<_> =
        changes.iter().map(|change| change["source_table"].as_str().unwrap()).collect();
    assert_eq!(tables, ["bookings", "payments", "cabin_inventory"]);
    let (lsns, xids): (Vec<_>, Vec<_>) = changes
        .iter()
        .map(|c| (c["source_position"]["lsn"].clone(), c["source_position"]["tx_id"].clone()))
        .unzip();
    assert!(lsns.iter().all(|lsn| *lsn == lsns[0]) && xids.iter().all(|xid| *xid == xids[0]));
    let indexes: Vec<_> = changes.iter().map(|c| c["source_position"]["index"].clone()).collect();
    assert_eq!(indexes, [0, 1, 2]);
}

#[tokio::test]
async fn a_rolled_back_transaction_produces_nothing() {
    let lake = Lake::new("create table t (id int primary key)").await;
    lake.cluster
        .sql(
            "begin; insert into t values (1); rollback;
             begin; insert into t values (2); savepoint s; insert into t values (3);
             rollback to s; insert into t values (4); commit",
        )
        .await;
    let changes = lake.wait(2).await;
    let ids: Vec<_> = changes.iter().map(|change| change["after"]["id"].clone()).collect();
    assert_eq!(ids, [2, 4]);
}

#[tokio::test]
async fn a_thousand_rows_changed_while_it_was_stopped_all_arrive_in_order() {
    let mut lake = Lake::new("create table t (id int primary key)").await;
    assert!(lake.server.stop().await.success());
    for block in 0..10 {
        let ids = format!("generate_series({}, {})", block * 100, block * 100 + 99);
        lake.cluster.sql(&format!("insert into t select {ids}")).await;
    }
    lake.server.start_ready().await;
    let changes = lake.wait(1000).await;
    let ids: Vec<_> =
        changes.iter().map(|change| change["after"]["id"].as_u64().unwrap()).collect();
    assert_eq!(ids, (0..1000).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_committed_row_arrives_although_no_statement_of_ours_names_its_table() {
    let settings = "shared_preload_libraries = 'pg_stat_statements'".to_owned();
    let setup = Setup { settings, ..Setup::default() };
    let schema = "create extension pg_stat_statements; create table job_runs (id int primary key)";
    let lake = Lake::of(setup, schema, "", "").await;
    lake.cluster.sql("insert into job_runs values (1)").await;
    lake.wait(1).await;
    let reads = "select count(*) from pg_stat_statements where query ~* '(from|join|copy)\\s+(public\\.)?job_runs'";
    assert_eq!(lake.cluster.value(reads).await, 0);
}

#[tokio::test]
async fn capture_adds_no_trigger_and_no_table_and_writes_nothing_to_the_captured_ones() {
    let schema = "create table t (id int primary key)";
    let count = "select count(*) from pg_class where relnamespace = 'public'::regnamespace";
    let lake = Lake::new(schema).await;
    lake.cluster.sql("insert into t select generate_series(1, 50)").await;
    lake.wait(50).await;
    assert_eq!(lake.cluster.value("select count(*) from pg_trigger").await, 0);
    assert_eq!(lake.cluster.value(count).await, 2, "the table and its key");
    let writes =
        "select n_tup_ins + n_tup_upd + n_tup_del from pg_stat_user_tables where relname = 't'";
    let settled = async || (lake.cluster.value(writes).await == 50).then_some(());
    wait_for(PATIENCE, settled, || "the write count is not 50".to_owned()).await;
    assert_eq!(lake.cluster.value("select count(*) from pg_stat_user_tables").await, 1);
}

#[tokio::test]
async fn the_slot_and_publication_of_sequin_are_adopted_and_a_table_added_later_streams() {
    let schema = "create table containers (id int primary key, name text);
        create table analyses (id int primary key); create table later (id int primary key);
        create publication sequin_cdc_publication for table containers, analyses
            with (publish = 'insert,update,delete')";
    let source = "slot = \"sequin_slot\"\npublication = \"sequin_cdc_publication\"";
    let settings = "max_replication_slots = 4\nmax_wal_senders = 4".to_owned();
    let lake = Lake::of(Setup { settings, ..Setup::default() }, schema, source, "").await;
    let slot =
        "select plugin || ' ' || active from pg_replication_slots where slot_name = 'sequin_slot'";
    assert_eq!(lake.cluster.value(slot).await, "pgoutput true");
    let used = "select (select count(*) from pg_replication_slots) <= 1
        and (select count(*) from pg_stat_replication) <= 1";
    assert_eq!(lake.cluster.value(used).await, true, "no more slots and senders than it needs");
    let tables = lake.cluster.rows(
        "select tablename from pg_publication_tables where pubname = 'sequin_cdc_publication' order by 1",
    );
    assert_eq!(
        tables.await,
        [json!({"tablename": "analyses"}), json!({"tablename": "containers"})]
    );
    let shown = lake.server.run(&["source", "status"]);
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert!(shown.contains("public.containers") && shown.contains("public.analyses"), "{shown}");

    lake.cluster.sql("insert into containers values (1, 'a')").await;
    lake.wait(1).await;
    lake.cluster.sql("alter publication sequin_cdc_publication add table later").await;
    lake.cluster.sql("insert into later values (7)").await;
    let changes = lake.wait(2).await;
    assert_eq!(changes[1]["after"], json!({"id": 7}));
}

#[tokio::test]
async fn schema_table_and_operation_filters_combine() {
    let schema = "create schema other; create table a (id int primary key);
        create table b (id int primary key); create table other.a (id int primary key)";
    let sink = "schemas = [\"public\"]\ntables = [\"*.a\"]\noperations = [\"delete\"]\n";
    let lake = Lake::of(Setup::default(), schema, "", sink).await;
    let load = "insert into {t} values (1); delete from {t}; insert into {t} values (2)";
    for table in ["other.a", "b", "a"] {
        lake.cluster.sql(&load.replace("{t}", table)).await;
    }
    let changes = lake.wait(1).await;
    assert_eq!(ops(&changes), ["d"]);
    assert_eq!(changes[0]["source_table"], "a");
    assert_eq!(changes[0]["source_schema"], "public");
}

#[tokio::test]
async fn only_the_chosen_tables_are_published_and_a_new_one_that_matches_streams_by_itself() {
    let schema =
        "create table keep (id int primary key); create table audit_log (id int primary key)";
    let source = "tables = [\"public.*\", \"!public.audit_*\"]\nreconcile_ms = 200\n";
    let lake = Lake::of(Setup::default(), schema, source, "").await;
    lake.cluster.sql("insert into audit_log values (1); insert into keep values (1)").await;
    lake.wait(1).await;
    lake.cluster.sql("create table keep_too (id int primary key)").await;
    let published = "select count(*) from pg_publication_tables where tablename = 'keep_too'";
    let added = async || (lake.cluster.value(published).await == 1).then_some(());
    wait_for(PATIENCE, added, || "the new table is not published".to_owned()).await;
    lake.cluster.sql("insert into keep_too values (5)").await;
    let changes = lake.wait(2).await;
    assert_eq!(changes[0]["source_table"], "keep");
    assert_eq!(changes[1]["source_table"], "keep_too");
}

#[tokio::test]
async fn a_failing_statement_of_the_application_is_never_our_doing() {
    let lake = Lake::new("create table loose (id int, v text)").await;
    lake.cluster.sql("insert into loose values (1, 'a')").await;
    lake.cluster.sql("update loose set v = 'b'; delete from loose; truncate loose").await;
    let changes = lake.wait(2).await;
    assert_eq!(ops(&changes), ["c", "t"], "updates without identity cannot be published");
}

#[tokio::test]
async fn the_log_shows_each_captured_change_when_asked() {
    let lake = Lake::of(
        Setup::default(),
        "create table events (id int primary key)",
        "\n[log]\nlevel = \"debug\"\n",
        "",
    )
    .await;
    lake.cluster.sql("insert into events values (1)").await;
    lake.wait(1).await;
    assert!(lake.server.log().contains("captured insert on public.events (LSN: "));
}
