//! The plugin wal2json beside pgoutput on one server: the same changes, one by one. Everything that
//! docs/sources/postgres.md does not name as different is equal.

use std::fs;

use walrace::{
    change::{Before, Change, Op, Timestamp, Value},
    config::{Plugin, Postgres},
    error::Class,
    source::{Known, postgres},
};

use crate::{
    kit::{Cluster, Setup, wait_for},
    source::{PATIENCE, Reading, config},
    types::{Table, create_builtin},
};

/// A server of a version for which the plugin is installed.
pub(crate) async fn cluster() -> Cluster {
    Cluster::with(Setup { version: Some(version()), ..Setup::default() }).await
}

pub(crate) fn version() -> u32 {
    let installed = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().filter_map(|entry| {
        let path = entry.ok()?.path();
        let version = path.file_name()?.to_str()?.parse().ok()?;
        path.join("lib/wal2json.so").exists().then_some(version)
    });
    installed.max().expect("wal2json, which `scripts/install.sh test` installs")
}

/// A source of either plugin, with a slot of its own.
pub(crate) fn of(plugin: Plugin, cluster: &Cluster) -> Postgres {
    let slot = Some(format!("by_{}", plugin.name()));
    Postgres { plugin, slot, ..config(&cluster.unix_url()) }
}

/// The changes up to the logical message `end`, and where the source is behind them.
async fn to_end(config: &Postgres) -> Vec<Change> {
    let mut reading = Reading::open(config, Known::default()).await.unwrap();
    let mut changes: Vec<Change> = Vec::new();
    let is_end = |change: &Change| change.message.as_ref().is_some_and(|m| m.prefix == "end");
    while !changes.last().is_some_and(is_end) {
        let next = tokio::time::timeout(PATIENCE, reading.opened.source.next());
        let batch = next.await.expect("changes in time").unwrap();
        changes.extend(batch.changes);
    }
    // A free message has no commit time but that of its arrival.
    for change in changes.iter_mut().filter(|change| change.transaction.xid == 0) {
        change.transaction.commit_time = Timestamp(0);
    }
    changes
}

/// Both slots and the publication, before anything happens.
async fn prepare(configs: &[&Postgres]) {
    for config in configs {
        postgres::create("app", config).await.unwrap();
    }
}

async fn end(cluster: &Cluster) {
    cluster.sql("select pg_logical_emit_message(true, 'end', '')").await;
}

fn describe(change: &Change) -> String {
    let table = change.table.as_ref().map(|table| table.full_name()).unwrap_or_default();
    format!("{} {table} at {}:{}", change.op.word(), change.transaction.commit_lsn, change.index)
}

fn assert_same(expected: &[Change], found: &[Change]) {
    for (expected, found) in expected.iter().zip(found) {
        assert_eq!(describe(expected), describe(found));
        assert_eq!(expected.table, found.table, "{}", describe(expected));
        assert_eq!(expected, found, "{}", describe(expected));
        assert_eq!(expected.idempotency_key(), found.idempotency_key());
    }
    assert_eq!(expected.len(), found.len());
}

/// Runs `workload` after both sources are there, and compares what they give.
async fn compare(cluster: &Cluster, schema: &str, workload: &[&str]) -> Vec<Change> {
    cluster.sql(schema).await;
    let configs = [Plugin::Pgoutput, Plugin::Wal2json].map(|plugin| of(plugin, cluster));
    prepare(&configs.each_ref()).await;
    for statements in workload {
        cluster.sql(statements).await;
    }
    end(cluster).await;
    let [expected, found] = [to_end(&configs[0]).await, to_end(&configs[1]).await];
    assert_same(&expected, &found);
    found
}

const SCHEMA: &str = r#"
    create schema "We ird";
    create type "We ird"."Mo od" as enum ('a', 'b');
    create table plain (id int primary key, a text, b text);
    create table whole (id int primary key, a text, big text); alter table whole replica identity full;
    create table by_index (id int primary key, code text not null unique, b text);
    alter table by_index replica identity using index by_index_code_key;
    create table nothing (id int primary key, v text); alter table nothing replica identity nothing;
    create table loose (v text, n numeric);
    create table toast (id int primary key, long text, n int, made int generated always as (n * 2) stored);
    alter table toast alter long set storage external;
    alter table whole alter big set storage external;
    create table composite (a text, b int, v varchar(10), n numeric(12, 3), primary key (b, a));
    create table "We ird"."Tá.b,l*e 'x\y" ("Id " int primary key, "select" "We ird"."Mo od",
        "A""b" "We ird"."Mo od"[]);
    create table parted (id int, at date, v text, big text, primary key (id, at)) partition by range (at);
    create table part_2020 partition of parted for values from ('2020-01-01') to ('2021-01-01');
    create table part_2021 (v text, at date not null, gone int, id int not null, big text);
    alter table part_2021 drop gone;
    alter table parted attach partition part_2021 for values from ('2021-01-01') to ('2022-01-01');
    alter table part_2021 alter big set storage external;
    create table part_2022 partition of parted for values from ('2022-01-01') to ('2023-01-01')
        partition by list (id);
    create table part_2022_1 partition of part_2022 for values in (1, 2);
    create unlogged table unlogged (id int primary key);
    create materialized view seen as select * from plain;
    create unique index on seen (id);
"#;

const WORKLOAD: &[&str] = &[
    "begin; insert into plain values (1, 'a', null), (2, e'q\"\\\\\\n\\t\\x01é🙂', '');
     update plain set a = 'b' where id = 1; update plain set id = 3 where id = 2;
     update plain set a = null where id = 3; delete from plain where id = 1; commit",
    "insert into whole values (1, 'x', repeat('long', 3000)); update whole set a = 'y';
     update whole set id = 2; update whole set a = null; update whole set big = 'short';
     delete from whole",
    "insert into by_index values (1, 'c', 'v'); update by_index set b = 'w', id = 9;
     update by_index set code = 'd'; delete from by_index",
    "insert into nothing values (1, 'v'); insert into loose values ('v', 1.50), (null, null)",
    "insert into toast (id, long, n) values (1, repeat('x', 20000), 1), (2, null, null);
     update toast set n = 2; update toast set long = null where id = 1;
     update toast set id = 3 where id = 2; update toast set long = repeat('y', 9000) where id = 3;
     update toast set id = 4 where id = 3; delete from toast",
    "insert into composite values ('k', 1, 'v', 1.500); update composite set v = 'w';
     update composite set a = 'l'; delete from composite",
    r#"insert into "We ird"."Tá.b,l*e 'x\y" values (1, 'a', '{a,NULL,b}');
       update "We ird"."Tá.b,l*e 'x\y" set "select" = 'b', "A""b" = null;
       delete from "We ird"."Tá.b,l*e 'x\y""#,
    "insert into parted values (1, '2020-02-02', 'a', 'x'), (2, '2021-02-02', 'b', repeat('z', 9000)),
        (1, '2022-01-01', 'c', null);
     update parted set v = 'd'; update parted set at = '2021-03-03' where at = '2020-02-02';
     update parted set id = 2 where at = '2022-01-01'; delete from parted where id = 1",
    "truncate plain, loose; truncate parted; truncate part_2020; truncate toast cascade",
    "begin; insert into plain values (1, 'x', 'y'); savepoint s; insert into plain values (2, 'gone', '');
     delete from plain; rollback to s; update plain set a = 'z'; savepoint r;
     insert into plain values (4, 'kept', ''); release r; commit",
    "begin; insert into plain values (7, 'never', ''); rollback",
    "begin; insert into plain values (8, '', ''); select pg_logical_emit_message(true, 'in', 'he\"llo\\');
     select pg_logical_emit_message(false, 'free', 'inside'); update plain set b = 'after'; commit;
     select pg_logical_emit_message(false, 'free', e'\\x01 é');
     select pg_logical_emit_message(true, 'bytes', '\\xff80c3'::bytea);",
    "begin; select pg_logical_emit_message(true, 'gone', ''); rollback",
    "refresh materialized view concurrently seen; insert into unlogged values (1)",
    "begin; insert into plain select i, md5(i::text), null from generate_series(100, 600) i;
     update plain set a = 'all'; delete from plain where id > 200; commit",
];

#[tokio::test]
async fn the_changes_of_both_plugins_are_equal_one_by_one() {
    let cluster = cluster().await;
    let changes = compare(&cluster, SCHEMA, WORKLOAD).await;
    for (op, count) in [
        (Op::Insert, 500),
        (Op::Update, 500),
        (Op::Delete, 400),
        (Op::Truncate, 4),
        (Op::Message, 5),
    ] {
        let found = changes.iter().filter(|change| change.op == op).count();
        assert!(found >= count, "{found} of {op:?}");
    }
    let unchanged = |change: &&Change| {
        change.after.iter().any(|row| row.values().any(|value| value == Value::Unchanged))
    };
    assert!(changes.iter().filter(unchanged).count() >= 3);
}

#[tokio::test]
async fn partitions_bear_their_own_names_with_both_plugins_where_that_is_asked() {
    let cluster = cluster().await;
    cluster.sql(SCHEMA).await;
    let configs = [Plugin::Pgoutput, Plugin::Wal2json].map(|plugin| Postgres {
        publish_via_partition_root: false,
        tables: vec!["public.part*".into()],
        ..of(plugin, &cluster)
    });
    prepare(&configs.each_ref()).await;
    for statements in [WORKLOAD[7], WORKLOAD[8]] {
        cluster.sql(statements).await;
    }
    end(&cluster).await;
    let [expected, found] = [to_end(&configs[0]).await, to_end(&configs[1]).await];
    assert_same(&expected, &found);
    let names: Vec<_> =
        found.iter().filter_map(|change| Some(change.table.as_ref()?.name.clone())).collect();
    for name in ["part_2020", "part_2021", "part_2022_1"] {
        assert!(names.iter().any(|found| found == name), "{name} in {names:?}");
    }
}

/// Rows of each type, one for each value at its border, and some random ones. What JSON has no
/// number for has a test of its own.
async fn fill(cluster: &Cluster, tables: &[Table]) {
    for table in tables {
        let name = &table.name;
        let special = |ty: &str| ["numeric", "float4", "float8"].iter().any(|t| ty.starts_with(t));
        let special = |ty: &str| special(ty) && !ty.ends_with("[]");
        let mut statements = String::from("select setseed(0.5);");
        for (i, (ty, edges, _)) in table.columns.iter().enumerate() {
            let edges = edges.iter().filter(|edge| {
                !special(ty) || !(edge.contains("NaN") || edge.to_lowercase().contains("infinity"))
            });
            for edge in edges {
                statements += &format!("insert into {name} (c{i}) values ({edge});");
            }
        }
        let random = |(ty, _, any): &(String, Vec<String>, String)| match special(ty) {
            true => "null".to_owned(),
            false => any.clone(),
        };
        let values: Vec<_> = table.columns.iter().map(random).collect();
        let names: Vec<_> = (0..values.len()).map(|i| format!("c{i}")).collect();
        let (names, values) = (names.join(", "), values.join(", "));
        statements += &format!(
            "insert into {name} ({names}) select {values} from generate_series(1, 20) i;
             update {name} set c0 = c0 where id % 3 = 0; delete from {name} where id % 4 = 0",
        );
        cluster.sql(&statements).await;
    }
}

#[tokio::test]
async fn values_of_every_type_are_the_same_text_as_from_pgoutput() {
    let cluster = cluster().await;
    let tables = create_builtin(&cluster).await;
    for table in &tables {
        cluster.sql(&format!("alter table {} replica identity full", table.name)).await;
    }
    // None of it may depend on what the database or the role prefers.
    cluster
        .sql(
            "alter database postgres set datestyle = 'German';
             alter database postgres set intervalstyle = 'iso_8601';
             alter database postgres set bytea_output = 'escape';
             alter role postgres set extra_float_digits = 0;
             alter role postgres set timezone = 'Asia/Kathmandu'",
        )
        .await;
    let configs = [Plugin::Pgoutput, Plugin::Wal2json].map(|plugin| of(plugin, &cluster));
    prepare(&configs.each_ref()).await;
    fill(&cluster, &tables).await;
    end(&cluster).await;
    let [expected, found] = [to_end(&configs[0]).await, to_end(&configs[1]).await];
    assert_same(&expected, &found);
    assert!(found.len() > 200, "{}", found.len());
}

#[tokio::test]
async fn nan_and_the_infinities_are_never_null() {
    let cluster = cluster().await;
    let schema =
        "create table f (id int primary key, n numeric, f float8 not null, r real, t text);
        create table g (n numeric, f float8); alter table g replica identity full";
    let workload = [
        "insert into f values (1, 'NaN', 'infinity', '-infinity', null), (2, null, 'NaN', null, ''),
            (3, null, 1, null, null), (4, 'Infinity', 2, 'NaN', 'x')",
        "update f set t = 'y'; update f set n = 1.50, r = 0; update f set f = '-infinity'; delete from f",
        "insert into g values ('NaN', '-infinity'); update g set f = 1; update g set n = 0; delete from g",
    ];
    let changes = compare(&cluster, schema, &workload).await;
    let text = |change: &Change, column| match change.after.as_ref().unwrap().value(column) {
        Some(Value::Text(text)) => String::from_utf8(text.to_vec()).unwrap(),
        other => panic!("{other:?}"),
    };
    assert_eq!([1, 2, 3].map(|column| text(&changes[0], column)), ["NaN", "Infinity", "-Infinity"]);
}

#[tokio::test]
async fn a_special_value_that_cannot_be_told_from_null_stops_the_source_and_is_not_invented() {
    let cluster = cluster().await;
    cluster.sql("create table f (id int primary key, n numeric, m numeric)").await;
    let config = of(Plugin::Wal2json, &cluster);
    let mut reading = Reading::open(&config, Known::default()).await.unwrap();
    cluster.sql("insert into f values (1, null, null)").await;
    assert_eq!(reading.take(1).await[0].op, Op::Insert);
    cluster.sql("insert into f values (2, 'NaN', null)").await;
    let error = reading.error().await;
    assert_eq!(error.class(), Class::Config, "{error}");
    let text = error.to_string();
    assert!(text.contains("public.f") && text.contains("columns n, m"), "{text}");
    assert!(error.remedy_text().unwrap().contains("2.6"), "{text}");
}

#[tokio::test]
async fn a_line_is_right_where_the_catalog_is_ahead_of_it() {
    let cluster = cluster().await;
    cluster
        .sql(
            "create table t (id int primary key, a text, b int);
             create table u (id int primary key, a text); create table v (id int primary key, a text);
             create table f (id int primary key, a text); alter table f replica identity full",
        )
        .await;
    let configs = [Plugin::Pgoutput, Plugin::Wal2json].map(|plugin| of(plugin, &cluster));
    prepare(&configs.each_ref()).await;
    for statements in [
        "insert into t values (1, 'x', 2); update t set a = 'y'; update t set id = 5; delete from t",
        "alter table t rename a to z; alter table t drop b; alter table t add c text default 'd'",
        "insert into t values (2, 'q', 'c'); update t set c = 'e'; delete from t",
        "alter table t alter z type int using 7; insert into t values (3, 8, 'x')",
        "insert into u values (1, 'x'); update u set a = 'y'; alter table u rename to w;
         insert into w values (2, 'z'); delete from w",
        "insert into v values (1, 'x'); update v set a = 'y'; update v set id = 2; delete from v;
         drop table v",
        "insert into f values (1, 'x'); update f set a = 'y'; delete from f;
         alter table f add c text; alter table f replica identity default;
         insert into f values (2, 'x', 'c'); update f set a = 'z'; delete from f",
    ] {
        cluster.sql(statements).await;
    }
    end(&cluster).await;
    let [expected, found] = [to_end(&configs[0]).await, to_end(&configs[1]).await];
    let rows = |changes: &[Change]| changes.iter().map(rows).collect::<Vec<_>>();
    let [expected, found] = [rows(&expected), rows(&found)];
    for (expected, found) in expected.iter().zip(&found) {
        assert_eq!(expected, found);
    }
    assert_eq!(expected.len(), found.len());
}

/// A change by the names of its columns, as far as both plugins tell them when the table has changed
/// since: where it is, what it did, the old and the new row.
fn rows(change: &Change) -> (String, Vec<String>, Vec<String>) {
    let named = |row: Option<&walrace::change::Row>| {
        let columns = change.table.iter().flat_map(|table| &table.columns);
        let pairs = columns.zip(row.into_iter().flat_map(|row| row.values()));
        let text = |(column, value): (&walrace::schema::Column, Value<'_>)| match value {
            Value::Text(text) => Some(format!("{}={}", column.name, String::from_utf8_lossy(text))),
            // A key's row has the other columns as null, those that were added since among them.
            Value::Null if matches!(change.before, Before::Key(_)) => None,
            other => Some(format!("{} {other:?}", column.name)),
        };
        pairs.filter_map(text).collect()
    };
    (describe(change), named(change.before.row()), named(change.after.as_ref()))
}

#[tokio::test]
async fn partitions_that_come_and_go_are_captured_exactly_while_they_are_partitions() {
    let cluster = cluster().await;
    cluster
        .sql(
            "create table parted (id int primary key, v text) partition by range (id);
             create table old partition of parted for values from (0) to (10);
             create table side (id int primary key, v text)",
        )
        .await;
    let tables = vec!["public.parted".to_owned()];
    let config = Postgres { tables, ..of(Plugin::Wal2json, &cluster) };
    let mut reading = Reading::open(&config, Known::default()).await.unwrap();
    let steps: &[(&[&str], Op)] = &[
        (&["insert into side values (11, 'no')", "insert into parted values (1, 'a')"], Op::Insert),
        (
            &["begin; update old set v = 'b'; alter table parted detach partition old; commit"],
            Op::Update,
        ),
        (
            &[
                "update old set v = 'no'",
                "update side set v = 'no'",
                "alter table parted attach partition side for values from (10) to (20)",
                "update side set v = 'c'",
            ],
            Op::Update,
        ),
        (
            &["begin; alter table parted attach partition old for values from (0) to (10);
               delete from old; commit"],
            Op::Delete,
        ),
        (
            &["begin; create table fresh (id int primary key, v text);
               insert into fresh values (31, 'd');
               alter table parted attach partition fresh for values from (30) to (40); commit"],
            Op::Insert,
        ),
        (&["alter table parted rename to elsewhere"], Op::Message),
        (&["update fresh set v = 'no'"], Op::Message),
        (&["alter table elsewhere rename to parted", "update fresh set v = 'e'"], Op::Update),
    ];
    for (number, (statements, op)) in steps.iter().enumerate() {
        for statement in *statements {
            cluster.sql(statement).await;
        }
        if *op == Op::Message {
            cluster.sql("select pg_logical_emit_message(true, 'mark', '')").await;
        }
        let change = reading.take(1).await.remove(0);
        assert_eq!(change.op, *op, "in step {number}: {}", describe(&change));
        let name = change.table.as_ref().map(|table| table.full_name());
        assert!(name.is_none_or(|name| name == "public.parted"), "in step {number}");
    }
}

#[tokio::test]
async fn globs_choose_and_take_away_at_both_ends() {
    let cluster = cluster().await;
    cluster
        .sql(
            r#"create schema audit; create schema "We ird";
               create table audit.log (id int primary key); create table kept (id int primary key);
               create table part_1 (id int primary key); create table other (id int primary key);
               create table "We ird"."a,b.c'd\e" (id int primary key);
               create table "We ird"."kept *" (id int primary key);
               create table parted (id int primary key) partition by range (id);
               create table parted_1 partition of parted for values from (0) to (10);
               create table parted_2 partition of parted for values from (10) to (20)"#,
        )
        .await;
    let globs = [
        "public.kept",
        "public.part*",
        "We ird.*",
        "!audit.*",
        "!public.part_?",
        "!public.parted_2",
        "!We ird.a,b.c'd\\e",
        "!nobody.at home, or \\ 'so'",
    ];
    let tables = globs.map(String::from).to_vec();
    let config = Postgres { tables, ..of(Plugin::Wal2json, &cluster) };
    let mut reading = Reading::open(&config, Known::default()).await.unwrap();
    cluster
        .sql(
            r#"insert into audit.log values (1); insert into part_1 values (1);
               insert into other values (1); insert into "We ird"."a,b.c'd\e" values (1);
               insert into parted values (11);
               insert into kept values (1); insert into "We ird"."kept *" values (1);
               insert into parted values (1)"#,
        )
        .await;
    let names: Vec<_> = reading
        .take(3)
        .await
        .iter()
        .map(|change| (change.table.as_ref().unwrap().full_name(), change.index))
        .collect();
    let expected = [("public.kept", 0), ("We ird.kept *", 1), ("public.parted", 2)];
    assert_eq!(names, expected.map(|(name, index)| (name.to_owned(), index)));
}

#[tokio::test]
async fn what_is_not_confirmed_is_sent_again_and_what_is_confirmed_is_not() {
    let cluster = cluster().await;
    cluster.sql("create table t (id int primary key)").await;
    let config = of(Plugin::Wal2json, &cluster);
    let mut reading = Reading::open(&config, Known::default()).await.unwrap();
    let start = reading.opened.start;
    cluster.sql("insert into t values (1), (2)").await;
    let first = reading.take(2).await;
    let origin = Some(reading.opened.origin.clone());
    drop(reading);
    let known = Known { progress: Some(start), origin, has_changes: true, ..Known::default() };
    let again = async || Reading::open(&config, known.clone()).await.ok();
    let mut reading = wait_for(PATIENCE, again, || "not free again".into()).await;
    assert_eq!(reading.take(2).await, first);
    reading.confirm().await;
    let position = reading.position.unwrap();
    let slot = "select confirmed_flush_lsn from pg_replication_slots";
    let moved = async || (crate::source::lsn(&cluster, slot).await >= position.lsn).then_some(());
    wait_for(PATIENCE, moved, || "the slot does not move".into()).await;
    let known = reading.known();
    drop(reading);
    cluster.sql("insert into t values (3)").await;
    let again = async || Reading::open(&config, known.clone()).await.ok();
    let mut reading = wait_for(PATIENCE, again, || "not free again".into()).await;
    let changes = reading.take(1).await;
    assert_eq!(changes[0].after.as_ref().unwrap().value(0), Some(Value::Text(b"3")));
}

#[tokio::test]
async fn an_idle_source_and_filtered_changes_move_the_position() {
    let cluster = cluster().await;
    cluster.sql("create table t (id int primary key); create table o (id int primary key)").await;
    let tables = vec!["public.t".to_owned()];
    let config = Postgres { tables, ..of(Plugin::Wal2json, &cluster) };
    let mut reading = Reading::open(&config, Known::default()).await.unwrap();
    cluster.sql("insert into o select generate_series(1, 1000)").await;
    let end = crate::source::lsn(&cluster, "select pg_current_wal_lsn()").await;
    cluster.sql("checkpoint").await;
    let changes = reading.until(|position| position.lsn >= end).await;
    assert!(changes.is_empty());
}

#[tokio::test]
async fn a_large_transaction_comes_in_pieces_and_a_large_change_is_refused_by_name() {
    let cluster = cluster().await;
    cluster.sql("create table t (id int primary key, body text)").await;
    let config = Postgres { change_bytes_max: 1 << 20, ..of(Plugin::Wal2json, &cluster) };
    let mut reading = Reading::open(&config, Known::default()).await.unwrap();
    let rows = 20_000;
    cluster
        .sql(&format!(
            "insert into t select i, repeat('x', 1000) from generate_series(1, {rows}) i"
        ))
        .await;
    let changes = reading.take(rows).await;
    assert!(changes.iter().enumerate().all(|(i, change)| change.index as usize == i));
    assert_eq!(changes.iter().filter(|change| change.closes_transaction).count(), 1);
    cluster.sql("insert into t values (0, repeat('long', 500000))").await;
    let error = reading.error().await;
    assert!(error.to_string().contains("a change of public.t has"), "{error}");
}
