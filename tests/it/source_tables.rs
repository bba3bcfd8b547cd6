//! Which tables are captured: globs, publications, identities; creating and dropping a source.

use std::time::Duration;

use walrace::{
    change::Op,
    config::{Postgres, WithoutIdentity},
    error::Class,
    source::{Known, postgres},
};

use crate::{
    kit::{Cluster, wait_for},
    source::{PATIENCE, Reading, config},
};

fn quick(cluster: &Cluster, tables: &[&str]) -> Postgres {
    let tables = tables.iter().map(|glob| (*glob).to_owned()).collect();
    Postgres { tables, reconcile_ms: 100, ..config(&cluster.unix_url()) }
}

async fn published(cluster: &Cluster, publication: &str) -> String {
    let query = format!(
        "select coalesce(string_agg(schemaname || '.' || tablename, ' ' order by 1), '')
         from (select distinct schemaname, tablename from pg_publication_tables
               where pubname = '{publication}') t(schemaname, tablename)"
    );
    cluster
        .value(&query.replace("order by 1", "order by schemaname, tablename"))
        .await
        .as_str()
        .unwrap()
        .to_owned()
}

async fn holds(cluster: &Cluster, publication: &str, tables: &str) {
    let same = async || (published(cluster, publication).await == tables).then_some(());
    wait_for(PATIENCE, same, || format!("{publication} never holds {tables}")).await;
}

#[tokio::test]
async fn a_table_without_identity_stays_updatable_and_its_inserts_arrive() {
    let cluster = Cluster::start().await;
    cluster.sql("create table bare (id int); create table t (id int primary key)").await;
    let mut reading = Reading::begin(&cluster).await;
    cluster
        .sql(
            "insert into bare values (1);
             update bare set id = 2;
             delete from bare;
             truncate bare;
             insert into t values (1)",
        )
        .await;
    let changes = reading.take(3).await;
    let ops: Vec<_> = changes.iter().map(|change| change.op).collect();
    assert_eq!(ops, [Op::Insert, Op::Truncate, Op::Insert]);
    assert_eq!(published(&cluster, "walrace_app").await, "public.t");
    assert_eq!(published(&cluster, "walrace_app_inserts").await, "public.bare");
}

#[tokio::test]
async fn a_table_without_identity_is_refused_by_name_where_that_is_asked_for() {
    let cluster = Cluster::start().await;
    cluster.sql("create table bare (id int)").await;
    let config =
        Postgres { without_identity: WithoutIdentity::Refuse, ..config(&cluster.unix_url()) };
    let error = Reading::open(&config, Known::default()).await.err().expect("refused");
    assert_eq!(error.class(), Class::Config);
    assert!(error.to_string().contains("public.bare"), "{error}");
    assert!(error.to_string().contains("REPLICA IDENTITY FULL"), "{error}");
    assert_eq!(cluster.value("select count(*) from pg_replication_slots").await, 0);
}

#[tokio::test]
async fn tables_come_and_go_as_the_globs_and_identities_say() {
    let cluster = Cluster::start().await;
    cluster
        .sql("create table keep (id int primary key); create table audit_1 (id int primary key)")
        .await;
    let config = quick(&cluster, &["public.*", "!public.audit_*"]);
    let mut reading = Reading::open(&config, Known::default()).await.unwrap();
    assert_eq!(published(&cluster, "walrace_app").await, "public.keep");
    cluster
        .sql(
            "create table later (id int primary key);
             create table audit_2 (id int);
             create table bare (id int)",
        )
        .await;
    holds(&cluster, "walrace_app", "public.keep public.later").await;
    holds(&cluster, "walrace_app_inserts", "public.bare").await;
    cluster
        .sql(
            "insert into later values (1);
             insert into audit_2 values (1);
             insert into bare values (1)",
        )
        .await;
    let names: Vec<_> =
        reading.take(2).await.iter().map(|c| c.table.as_ref().unwrap().name.clone()).collect();
    assert_eq!(names, ["later", "bare"]);
    cluster
        .sql("alter table bare add primary key (id); alter table later drop constraint later_pkey")
        .await;
    holds(&cluster, "walrace_app", "public.bare public.keep").await;
    holds(&cluster, "walrace_app_inserts", "public.later").await;
    cluster
        .sql("update bare set id = 2; update later set id = 2; insert into later values (3)")
        .await;
    let ops: Vec<_> = reading.take(2).await.iter().map(|change| change.op).collect();
    assert_eq!(ops, [Op::Update, Op::Insert]);
    cluster
        .sql(r#"alter table keep rename to audit_3; create table "od d%s""q" (id int primary key)"#)
        .await;
    holds(&cluster, "walrace_app", r#"public.bare public.od d%s"q"#).await;
    cluster.sql(r#"alter table "od d%s""q" rename to "audit_%s""x""#).await;
    holds(&cluster, "walrace_app", "public.bare").await;
}

#[tokio::test]
async fn partitions_arrive_under_their_root_or_as_themselves() {
    let cluster = Cluster::start().await;
    cluster
        .sql(
            "create table p (id int primary key, v int) partition by range (id);
              create table p1 partition of p for values from (0) to (10)",
        )
        .await;
    for (root, expected) in [(true, ["p", "p"]), (false, ["p1", "p2"])] {
        let config = Postgres { publish_via_partition_root: root, ..config(&cluster.unix_url()) };
        let mut reading = Reading::open(&config, Known::default()).await.unwrap();
        // A partition that comes later is captured from its first row.
        cluster
            .sql(
                "create table p2 partition of p for values from (10) to (20);
             insert into p values (1, 1), (11, 1)",
            )
            .await;
        let changes = reading.take(2).await;
        let names: Vec<_> =
            changes.iter().map(|c| c.table.as_ref().unwrap().name.as_str()).collect();
        assert_eq!(names, expected);
        drop(reading);
        let dropped = async || postgres::drop("app", &config).await.ok();
        wait_for(PATIENCE, dropped, || "not dropped".into()).await;
        cluster.sql("drop table p2; delete from p").await;
    }
}

#[tokio::test]
async fn a_publication_of_somebody_else_is_read_and_never_changed() {
    let cluster = Cluster::start().await;
    cluster
        .sql(
            "create table a (id int primary key);
             create table b (id int primary key);
             create publication theirs for table a",
        )
        .await;
    let config = Postgres { publication: Some("theirs".into()), ..quick(&cluster, &[]) };
    let mut reading = Reading::open(&config, Known::default()).await.unwrap();
    cluster.sql("insert into b values (1); insert into a values (1)").await;
    let changes = reading.take(1).await;
    assert_eq!(changes[0].table.as_ref().unwrap().name, "a");
    tokio::time::sleep(Duration::from_millis(400)).await; // several rounds of comparing
    assert_eq!(published(&cluster, "theirs").await, "public.a");
    drop(reading);
    let dropped = async || postgres::drop("app", &config).await.ok();
    wait_for(PATIENCE, dropped, || "not dropped".into()).await;
    assert_eq!(cluster.value("select count(*) from pg_publication").await, 1);
}

#[tokio::test]
async fn without_leave_to_create_the_sql_is_printed_and_works() {
    let cluster = Cluster::start().await;
    cluster.sql("create table t (id int primary key); create table bare (id int)").await;
    let config = Postgres { create: false, ..config(&cluster.unix_url()) };
    for _ in 0..2 {
        let error = Reading::open(&config, Known::default()).await.err().expect("refused");
        assert_eq!(error.class(), Class::Config);
        let remedy = error.remedy_text().unwrap();
        let sql = remedy.split_once(": ").unwrap().1;
        cluster.sql(sql).await;
    }
    let mut reading = Reading::open(&config, Known::default()).await.unwrap();
    cluster.sql("insert into t values (1); insert into bare values (1)").await;
    reading.take(2).await;
}

#[tokio::test]
async fn create_status_and_drop_leave_nothing_behind_and_may_be_repeated() {
    let cluster = Cluster::start().await;
    cluster.sql("create table t (id int primary key)").await;
    let config = config(&cluster.unix_url());
    for _ in 0..2 {
        let status = postgres::create("app", &config).await.unwrap();
        assert_eq!(status.publications.len(), 2);
        assert_eq!(status.publications[0].tables, ["public.t"]);
    }
    cluster.sql("insert into t select generate_series(1, 1000)").await;
    let status = postgres::status("app", &config).await.unwrap();
    let slot = status.slot.unwrap();
    assert!(slot.behind_bytes > 10_000 && slot.retained_bytes >= slot.behind_bytes);
    assert_eq!(slot.active_pid, None);
    let mut reading = Reading::open(&config, Known::default()).await.unwrap();
    assert_eq!(reading.take(1000).await.len(), 1000, "the slot remembers what came after create");
    let error = postgres::drop("app", &config).await.unwrap_err();
    assert_eq!(error.class(), Class::Retry, "{error}");
    assert!(error.to_string().contains("in use"), "{error}");
    drop(reading);
    let dropped = async || postgres::drop("app", &config).await.ok();
    wait_for(PATIENCE, dropped, || "not dropped".into()).await;
    postgres::drop("app", &config).await.unwrap();
    let left = "select (select count(*) from pg_publication)
                + (select count(*) from pg_replication_slots)";
    assert_eq!(cluster.value(left).await, 0);
}

#[tokio::test]
async fn a_publication_that_vanished_beside_its_slot_is_not_made_anew_in_silence() {
    let cluster = Cluster::start().await;
    cluster.sql("create table t (id int primary key)").await;
    let config = config(&cluster.unix_url());
    postgres::create("app", &config).await.unwrap();
    cluster.sql("drop publication walrace_app").await;
    let error = Reading::open(&config, Known::default()).await.err().expect("refused");
    assert_eq!(error.class(), Class::Config, "{error}");
    assert!(error.to_string().contains("publication `walrace_app` is missing"), "{error}");
}

#[tokio::test]
async fn a_slot_made_by_hand_without_the_second_publication_never_leaves_a_table_out_in_silence() {
    let cluster = Cluster::start().await;
    cluster
        .sql(
            "create table t (id int primary key); create table bare (id int);
             create publication walrace_app for table t",
        )
        .await;
    cluster.sql("select pg_create_logical_replication_slot('walrace_app', 'pgoutput')").await;
    let error =
        Reading::open(&quick(&cluster, &[]), Known::default()).await.err().expect("refused");
    assert_eq!(error.class(), Class::Config, "{error}");
    assert!(error.to_string().contains("public.bare"), "{error}");
    let config = quick(&cluster, &["!public.bare"]);
    let mut reading = Reading::open(&config, Known::default()).await.unwrap();
    cluster.sql("create table later (id int primary key)").await;
    holds(&cluster, "walrace_app", "public.later public.t").await;
    cluster.sql("insert into t values (1); insert into later values (1)").await;
    reading.take(2).await;
}

#[tokio::test]
async fn a_database_is_inspected_for_init() {
    let cluster = Cluster::start().await;
    cluster
        .sql(
            "create table t (id int primary key);
             create table bare (id int);
             insert into t select generate_series(1, 500);
             analyze t",
        )
        .await;
    let url = walrace::config::Secret::new(cluster.unix_url());
    let inspection = postgres::inspect(&url).await.unwrap();
    let tables: Vec<_> =
        inspection.tables.iter().map(|t| (t.name.as_str(), t.rows, t.has_identity)).collect();
    assert_eq!(tables, [("bare", 0, false), ("t", 500, true)]);
    assert_eq!(
        (inspection.database.as_str(), inspection.wal_level.as_str()),
        ("postgres", "logical")
    );
}
