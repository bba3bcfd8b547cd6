//! `walrace verify`: a source and its copy in another database, compared while both move.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use serde_json::{Value, json};

use crate::kit::{Cluster, Server, Session, source_toml, wait_for};

const PATIENCE: Duration = Duration::from_secs(60);

/// A database, its copy in the database `copy` of the same cluster, and a Walrace between them.
struct Scene {
    cluster: Cluster,
    server: Server,
    copy: Session,
}

/// What one run of `walrace verify --json` said.
#[derive(Debug)]
struct Said {
    code: i32,
    report: Value,
    stderr: String,
}

impl Scene {
    /// `tables` are made on both sides; `rules` are added to the sink.
    async fn set(tables: &str, rules: &str) -> Self {
        Self::set_apart(tables, tables, rules).await
    }

    async fn set_apart(of_source: &str, of_copy: &str, rules: &str) -> Self {
        let cluster = Cluster::start().await;
        cluster.sql(of_source).await;
        cluster.sql("create database copy").await;
        let url = copy_url(&cluster);
        let copy = Session::open(&url.parse().unwrap()).await.unwrap();
        copy.batch_execute(of_copy).await.unwrap();
        let source = source_toml("app", &cluster.unix_url());
        let mut server = Server::new(&format!(
            "{source}\n[sink.copy]\nkind = \"postgres\"\nurl = \"{url}\"\nretry_ms_max = 300\n{rules}\n"
        ));
        server.start_ready().await;
        let scene = Self { cluster, server, copy };
        scene.wait_until_written().await;
        scene
    }

    /// The sink has its progress at the target, which its first change brings there.
    async fn wait_until_written(&self) {
        self.cluster.sql("select pg_logical_emit_message(true, 'begun', '')").await;
        let probe = async || {
            let found = self.copy.query("select from walrace.progress", &[]).await;
            found.ok().filter(|rows| !rows.is_empty())
        };
        wait_for(PATIENCE, probe, || self.server.log_tail()).await;
    }

    fn verify(&self, more: &[&str]) -> Said {
        let mut arguments = vec!["verify", "--sink", "copy", "--json"];
        arguments.extend(more);
        let output = tokio::task::block_in_place(|| self.server.run(&arguments));
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        Said {
            code: output.status.code().unwrap_or(-1),
            report: serde_json::from_slice(&output.stdout).unwrap_or(Value::Null),
            stderr,
        }
    }

    /// Writes to the target behind the sink's back.
    async fn plant(&self, statements: &str) {
        self.copy.batch_execute(statements).await.unwrap();
    }

    async fn wait_for_copy(&self, query: &str, expected: i64) {
        let probe = async || {
            let found: i64 = self.copy.query_one(query, &[]).await.ok()?.get(0);
            (found == expected).then_some(())
        };
        wait_for(PATIENCE, probe, || format!("{query} != {expected}\n{}", self.server.log_tail()))
            .await;
    }
}

impl Said {
    fn table(&self, name: &str) -> &Value {
        let tables = self.report["tables"].as_array().unwrap_or_else(|| panic!("{self:?}"));
        tables.iter().find(|table| table["table"] == name).unwrap_or_else(|| panic!("{self:?}"))
    }

    /// `kind key` of each difference of a table.
    fn differences(&self, name: &str) -> BTreeSet<String> {
        let one = |difference: &Value| {
            let key = difference["key"].as_object().unwrap().values();
            let key: Vec<_> = key.map(|text| text.as_str().unwrap()).collect();
            format!("{} {}", difference["kind"].as_str().unwrap(), key.join("/"))
        };
        self.table(name)["differences"].as_array().unwrap().iter().map(one).collect()
    }

    fn is_equal(&self) {
        assert_eq!((self.code, &self.report["verdict"]), (0, &json!("equal")), "{self:?}");
    }
}

fn copy_url(cluster: &Cluster) -> String {
    let url = cluster.url();
    let (server, _) = url.rsplit_once('/').unwrap();
    format!("{server}/copy")
}

fn set(texts: &[&str]) -> BTreeSet<String> {
    texts.iter().map(|&text| text.to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn planted_differences_of_each_kind_are_found_and_repaired() {
    let scene = Scene::set(
        "create table t (id int primary key, v text, n numeric, at timestamptz, b bytea, f float8)",
        "",
    )
    .await;
    let insert = "insert into t select i, case when i % 7 > 0 then 'v' || i end, i / 3.0, \
                  '2026-04-06 09:14:22+02'::timestamptz + i * interval '1 s', \
                  decode(md5(i::text), 'hex'), i / 7.0 from generate_series(1, 3000) i";
    scene.cluster.sql(insert).await;
    scene.wait_for_copy("select count(*) from t", 3000).await;
    let said = scene.verify(&[]);
    said.is_equal();
    assert_eq!(said.table("public.t")["rows"], 3000);
    assert_eq!(said.table("public.t")["rows_listed"], 0, "what is equal is never listed");

    scene
        .plant(
            "delete from t where id = 17; insert into t values (0, 'x'), (9999, null); \
             update t set v = null where id = 1500; update t set n = 1, f = 'NaN' where id = 3000",
        )
        .await;
    let said = scene.verify(&[]);
    assert_eq!((said.code, &said.report["verdict"]), (1, &json!("different")), "{said:?}");
    let wanted = ["missing 17", "extra 0", "extra 9999", "changed 1500", "changed 3000"];
    assert_eq!(said.differences("public.t"), set(&wanted));
    let all = said.table("public.t")["differences"].as_array().unwrap();
    let last = all.iter().find(|difference| difference["key"]["id"] == "3000").unwrap();
    assert_eq!(last["columns"], json!(["n", "f"]));

    let said = scene.verify(&["--repair"]);
    said.is_equal();
    let all = said.table("public.t")["differences"].as_array().unwrap();
    assert!(all.len() == 5 && all.iter().all(|one| one["is_repaired"] == true), "{said:?}");
    let said = scene.verify(&[]);
    said.is_equal();
    assert_eq!(said.differences("public.t"), set(&[]));
    // The sink goes on over what was repaired.
    scene.cluster.sql("update t set v = 'after'; delete from t where id = 17").await;
    scene.wait_for_copy("select count(*) from t where v = 'after'", 2999).await;
    scene.verify(&[]).is_equal();
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_are_told_apart_by_keys_of_every_kind() {
    let tables = "
        create type mood as enum ('sad', 'ok');
        create table pair (a int, b text collate \"C\", v int, primary key (a, b));
        create table word (k text collate \"und-x-icu\" primary key, v int);
        create table plain (k text primary key, v int);
        create table ids (k uuid primary key, v int);
        create table moments (k timestamptz, d date, v int, primary key (d, k));
        create table sums (k numeric primary key, v int);
        create table moods (k mood, n bigint, v int, primary key (k, n));
        create table bytes (k bytea primary key, v int);
        create table wide (v int, \"K \"\" k\" int primary key, \"select\" text);
        create table index_only (v int, k int not null);
        create unique index one on index_only (k);
        alter table index_only replica identity using index one;
        create table parts (k int, v int, primary key (k)) partition by range (k);
        create table parts_1 partition of parts for values from (0) to (200);
        create table parts_2 partition of parts for values from (200) to (10000);";
    let scene = Scene::set(tables, "").await;
    // Texts whose order depends on the collation, with what SQL and rows quote.
    let word = "(array['a', 'B', 'ä', 'z''', E'\\\\', '\"', 'a b', '', '(,)', 'é'])[1 + i % 10]";
    scene
        .cluster
        .sql(&format!(
            "insert into pair select i % 30, {word} || i, i from generate_series(1, 500) i;
             insert into word select {word} || i, i from generate_series(1, 500) i;
             insert into plain select {word} || i, i from generate_series(1, 500) i;
             insert into ids select md5(i::text)::uuid, i from generate_series(1, 500) i;
             insert into moments select '2026-01-01'::timestamptz + i * interval '1 h 1 us',
                 '4714-11-24 BC'::date + i % 9, i from generate_series(1, 500) i;
             insert into sums select i / 8.0, i from generate_series(1, 500) i;
             insert into sums values ('NaN', 501);
             insert into moods select (array['ok', 'sad'])[1 + i % 2]::mood, i, i
                 from generate_series(1, 500) i;
             insert into bytes select decode(md5(i::text), 'hex'), i from generate_series(1, 500) i;
             insert into wide select i, i, {word} from generate_series(1, 500) i;
             insert into index_only select i, i from generate_series(1, 500) i;
             insert into parts select i, i from generate_series(1, 500) i"
        ))
        .await;
    scene.verify(&[]).is_equal();
    let tables = [
        "pair",
        "word",
        "plain",
        "ids",
        "moments",
        "sums",
        "moods",
        "bytes",
        "wide",
        "index_only",
        "parts",
    ];
    for table in tables {
        scene.plant(&format!("delete from {table} where v = 250")).await;
        scene.plant(&format!("update {table} set v = -1 where v in (1, 500)")).await;
    }
    let said = scene.verify(&[]);
    assert_eq!(said.code, 1, "{said:?}");
    for table in tables {
        let name = format!("public.{table}");
        let kinds: Vec<_> = said.table(&name)["differences"].as_array().unwrap().iter().collect();
        let missing = kinds.iter().filter(|one| one["kind"] == "missing").count();
        assert_eq!((kinds.len(), missing), (3, 1), "{name}: {kinds:?}");
    }
    scene.verify(&["--repair"]).is_equal();
    scene.verify(&[]).is_equal();
    for table in tables {
        let left = "select count(*) from @ where v in (1, 250, 500)".replace('@', table);
        scene.wait_for_copy(&left, 3).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_table_with_few_differences_is_not_fetched() {
    let tables = "create table t (id int primary key, v text);
                  create table w (k text primary key, v text)";
    let scene = Scene::set(tables, "").await;
    scene
        .cluster
        .sql(
            "insert into t select i, md5(i::text) from generate_series(1, 50000) i;
             insert into w select 'k' || i, md5(i::text) from generate_series(1, 50000) i; analyze",
        )
        .await;
    scene.wait_for_copy("select count(*) from w", 50_000).await;
    for (table, key) in [("t", "id"), ("w", "k")] {
        let one = |number: u32| match key {
            "k" => format!("'k{number}'"),
            _ => number.to_string(),
        };
        scene
            .plant(&format!(
                "delete from {table} where {key} = {}; update {table} set v = 'x' where {key} = {}; \
                 insert into {table} values ({}, 'y')",
                one(1234),
                one(49_999),
                one(70_000)
            ))
            .await;
    }
    let said = scene.verify(&[]);
    assert_eq!(
        said.differences("public.t"),
        set(&["missing 1234", "changed 49999", "extra 70000"])
    );
    assert_eq!(
        said.differences("public.w"),
        set(&["missing k1234", "changed k49999", "extra k70000"])
    );
    for table in ["public.t", "public.w"] {
        let table = said.table(table);
        assert_eq!(table["rows"], 50_000, "each row is compared");
        let listed = table["rows_listed"].as_u64().unwrap();
        assert!((1..3_000).contains(&listed), "{listed} rows of {} were fetched", table["table"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_without_a_key_is_refused_with_the_reason_and_the_others_are_compared() {
    let tables = "create table t (id int primary key); create table loose (v int);
                  alter table loose replica identity full";
    let scene = Scene::set(tables, "").await;
    scene.cluster.sql("insert into t values (1); insert into loose values (1), (1)").await;
    let said = scene.verify(&[]);
    assert_eq!((said.code, &said.report["verdict"]), (2, &json!("unverified")), "{said:?}");
    let error = said.table("public.loose")["error"].as_str().unwrap();
    assert!(error.contains("it has no key"), "{error}");
    assert_eq!(said.table("public.t")["rows"], 1);
    scene.verify(&["--table", "public.t"]).is_equal();
    let said = scene.verify(&["--table", "public.nothing"]);
    assert!(said.code == 2 && said.stderr.contains("no table"), "{said:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn columns_that_rules_rename_drop_and_mask_are_compared_as_the_sink_writes_them() {
    let of_source = "create table t (id int primary key, name text, secret text, junk int);
                     create table moved (id int primary key, v int)";
    let of_copy = "create schema other; create table other.t (secret text, title text, \
                   number bigint primary key); create table other.moved (v numeric, id int \
                   primary key)";
    let rules = "table = \"other.{table}\"\n\
                 [[sink.copy.transform]]\ntables = [\"public.t\"]\n\
                 rename = { id = \"number\", name = \"title\" }\n\
                 [[sink.copy.transform]]\ntables = [\"public.t\"]\ndrop = [\"junk\"]\n\
                 [[sink.copy.transform]]\nmask = { secret = \"redact\" }\n";
    let scene = Scene::set_apart(of_source, of_copy, rules).await;
    scene
        .cluster
        .sql(
            "insert into t select i, 'n' || i, 'hush', i from generate_series(1, 400) i;
             insert into moved select i, i from generate_series(1, 400) i",
        )
        .await;
    scene.wait_for_copy("select count(*) from other.moved", 400).await;
    scene
        .plant(
            "update other.t set title = 'x' where number = 7; delete from other.t where number = 8;
             update other.moved set v = 3.5 where id = 9",
        )
        .await;
    let only = ["--table", "public.t", "--table", "public.moved"];
    let said = scene.verify(&only);
    assert_eq!(said.differences("public.t"), set(&["changed 7", "missing 8"]));
    assert_eq!(said.differences("public.moved"), set(&["changed 9"]));
    let table = said.table("public.t");
    assert_eq!(table["columns_left_out"], json!(["secret", "junk"]));
    assert_eq!(table["target"], "\"other\".\"t\"");
    let columns = &table["differences"][0]["columns"];
    assert_eq!(columns, &json!(["title"]));
    scene.verify(&[&only[..], &["--repair"]].concat()).is_equal();
    let masked = "select count(*) from other.t where number = 8 and secret = '***'";
    scene.wait_for_copy(masked, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rule_that_reshapes_rows_is_named_and_its_table_is_not_compared() {
    let tables = "create table t (id int primary key, v int); \
                  create table u (id int primary key, v int)";
    let rules =
        "[[sink.copy.transform]]\ntables = [\"public.t\"]\nset = { v = \"record.v + 1\" }\n";
    let scene = Scene::set(tables, rules).await;
    let said = scene.verify(&["--table", "public.t", "--table", "public.u"]);
    assert_eq!(said.code, 2);
    let error = said.table("public.t")["error"].as_str().unwrap();
    assert!(error.contains("transform[0]"), "{error}");
    assert_eq!(said.table("public.u")["error"], Value::Null);
}

/// Writers that insert, update and delete rows without pause, and write some back to what they
/// were.
struct Load {
    stop: Arc<AtomicBool>,
    count: Arc<AtomicU64>,
    writers: Vec<tokio::task::JoinHandle<()>>,
}

impl Load {
    async fn on(cluster: &Cluster) -> Self {
        let (stop, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut writers = Vec::new();
        for writer in 0..3_u64 {
            let session = cluster.connect().await;
            let (stop, count) = (Arc::clone(&stop), Arc::clone(&count));
            #[expect(clippy::disallowed_methods, reason = "the test awaits it")]
            writers.push(tokio::spawn(async move {
                let mut at = writer;
                while !stop.load(Ordering::Relaxed) {
                    at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(writer + 1);
                    let row = (at >> 33) % 4000;
                    let sql = format!(
                        "update t set v = 'other' where id = {row}; commit; \
                         update t set v = 'v{row}' where id = {row}; commit; \
                         begin; delete from t where id = {0}; \
                         delete from w where k = 'k{0}'; commit; \
                         insert into t values ({0}, 'v{0}') on conflict do nothing; \
                         insert into w values ('k{0}', 'v') on conflict do nothing; \
                         insert into t values (100000 + {row}, 'gone') on conflict do nothing; \
                         delete from t where id = 100000 + {row}",
                        (row + 1) % 4000
                    );
                    let sql = sql.replacen("update t", "begin; update t", 1);
                    // Two writers may wait for each other; the server ends one of them.
                    if session.batch_execute(&sql).await.is_err() {
                        let _ = session.batch_execute("rollback").await;
                    }
                    count.fetch_add(1, Ordering::Relaxed);
                    // The sink is to keep up, on a machine that does much else.
                    tokio::time::sleep(Duration::from_millis(4)).await;
                }
            }));
        }
        Self { stop, count, writers }
    }

    async fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        for writer in self.writers {
            writer.await.unwrap();
        }
        self.count.load(Ordering::Relaxed)
    }
}

const LOADED: &str = "create table t (id int primary key, v text);
                      create table w (k text primary key, v text)";

async fn loaded() -> Scene {
    let scene = Scene::set(LOADED, "").await;
    scene
        .cluster
        .sql(
            "insert into t select i, 'v' || i from generate_series(0, 3999) i;
             insert into t select i, 'v' || i from generate_series(200000, 230000) i;
             insert into w select 'k' || i, 'v' from generate_series(0, 30000) i",
        )
        .await;
    scene.wait_for_copy("select count(*) from w", 30_001).await;
    scene
}

#[tokio::test(flavor = "multi_thread")]
async fn under_a_load_nothing_is_reported_that_does_not_differ() {
    let scene = loaded().await;
    let load = Load::on(&scene.cluster).await;
    let (mut suspects, mut rounds) = (0, 0);
    while rounds < 4 || suspects == 0 && rounds < 40 {
        rounds += 1;
        let said = scene.verify(&["--table", "public.t", "--table", "public.w"]);
        assert_ne!(said.code, 1, "{said:?}");
        for table in ["public.t", "public.w"] {
            assert_eq!(said.differences(table), set(&[]), "{said:?}");
            suspects += said.table(table)["rows_listed"].as_u64().unwrap();
        }
    }
    let written = load.stop().await;
    assert!(written > 100, "only {written} rounds were written");
    assert!(suspects > 0, "no row was looked at twice: the load moved nothing");
    scene.verify(&["--table", "public.t", "--table", "public.w"]).is_equal();
}

#[tokio::test(flavor = "multi_thread")]
async fn under_a_load_each_planted_difference_is_found_and_repaired_for_good() {
    let scene = loaded().await;
    let load = Load::on(&scene.cluster).await;
    scene
        .plant(
            "delete from t where id = 200007; update t set v = 'x' where id = 215000; \
             insert into t values (150000, 'x'); delete from w where k = 'k20007'; \
             update w set v = 'x' where k = 'k25000'; insert into w values ('none', 'x')",
        )
        .await;
    let only = ["--table", "public.t", "--table", "public.w"];
    let said = scene.verify(&only);
    assert_eq!(said.code, 1, "{said:?}");
    let of_t = ["missing 200007", "changed 215000", "extra 150000"];
    let of_w = ["missing k20007", "changed k25000", "extra none"];
    assert_eq!(said.differences("public.t"), set(&of_t), "{said:?}");
    assert_eq!(said.differences("public.w"), set(&of_w), "{said:?}");
    let said = scene.verify(&[&only[..], &["--repair"]].concat());
    for (table, planted) in [("public.t", of_t), ("public.w", of_w)] {
        assert_eq!(said.differences(table), set(&planted), "{said:?}");
        let all = said.table(table)["differences"].as_array().unwrap();
        assert!(all.iter().all(|one| one["is_repaired"] == true), "{said:?}");
    }
    load.stop().await;
    scene.verify(&only).is_equal();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_the_target_has_before_the_source_shows_it_is_no_difference() {
    let scene = Scene::set("create table t (id int primary key, v text)", "").await;
    scene.cluster.sql("insert into t values (1, 'old'), (2, 'kept')").await;
    scene.wait_for_copy("select count(*) from t", 2).await;
    // A standby that never comes: commits are in the log, and sent, and do not show.
    // All others, those that write to the copy among them, wait for nobody.
    for setting in ["synchronous_commit = 'local'", "synchronous_standby_names = 'nobody'"] {
        scene.cluster.sql(&format!("alter system set {setting}")).await;
        scene.cluster.sql("select pg_reload_conf()").await;
    }
    let waiting = scene.cluster.connect().await;
    let pid: i32 = waiting.query_one("select pg_backend_pid()", &[]).await.unwrap().get(0);
    #[expect(clippy::disallowed_methods, reason = "the test awaits it")]
    let commit = tokio::spawn(async move {
        let sql = "set synchronous_commit = on; begin; update t set v = 'new' where id = 1; \
                   delete from t where id = 2; insert into t values (3, 'added'); commit";
        waiting.batch_execute(sql).await
    });
    scene.wait_for_copy("select count(*) from t where id = 3", 1).await;
    let value = scene.cluster.value("select v from t where id = 1").await;
    assert_eq!(value, "old", "the source shows it already: this test tests nothing");
    let said = scene.verify(&["--wait", "5", "--table", "public.t", "--repair"]);
    assert_eq!((said.code, said.differences("public.t")), (2, set(&[])), "{said:?}");
    let unsettled = said.table("public.t")["unsettled"].as_array().unwrap();
    assert_eq!(unsettled.len(), 3, "{said:?}");
    let reason = unsettled[0]["reason"].as_str().unwrap();
    assert!(reason.contains(&format!("pid {pid}")), "{reason}");
    let session = scene.cluster.connect().await;
    session.batch_execute("alter system reset synchronous_standby_names").await.unwrap();
    session.batch_execute("select pg_reload_conf()").await.unwrap();
    commit.await.unwrap().unwrap();
    scene.verify(&["--table", "public.t"]).is_equal();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_that_stays_open_hides_no_difference() {
    let scene = Scene::set("create table t (id int primary key, v text)", "").await;
    scene.cluster.sql("insert into t select i, 'v' from generate_series(1, 9) i").await;
    scene.wait_for_copy("select count(*) from t", 9).await;
    let open = scene.cluster.connect().await;
    open.batch_execute("begin; update t set v = 'later' where id = 1").await.unwrap();
    scene.plant("delete from t where id = 5").await;
    let said = scene.verify(&["--table", "public.t"]);
    assert_eq!(said.differences("public.t"), set(&["missing 5"]), "{said:?}");
    assert_eq!(said.table("public.t")["unsettled"], json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_walrace_that_is_stopped_what_is_behind_is_said_and_not_called_different() {
    let mut scene = Scene::set("create table t (id int primary key, v text)", "").await;
    scene.cluster.sql("insert into t select i, 'v' from generate_series(1, 900) i").await;
    scene.wait_for_copy("select count(*) from t", 900).await;
    assert!(scene.server.stop().await.success());
    let only = ["--table", "public.t"];
    scene.verify(&only).is_equal();
    scene.plant("delete from t where id = 5").await;
    let said = scene.verify(&only);
    assert_eq!(said.differences("public.t"), set(&["missing 5"]), "{said:?}");
    scene.verify(&["--table", "public.t", "--repair"]).is_equal();

    scene.cluster.sql("update t set v = 'new' where id = 7").await;
    let said = scene.verify(&only);
    assert_eq!((said.code, said.differences("public.t")), (2, set(&[])), "{said:?}");
    let reason = said.table("public.t")["unsettled"][0]["reason"].as_str().unwrap();
    assert!(reason.contains("walrace is not running"), "{reason}");
    // What is not published does not hold it up.
    scene.server.start_ready().await;
    scene.wait_for_copy("select count(*) from t where v = 'new'", 1).await;
    scene.verify(&only).is_equal();
    let said = scene.server.run(&["verify", "--sink", "nothing"]);
    assert_eq!(said.status.code(), Some(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sink_that_is_paused_is_named_as_the_reason() {
    let scene = Scene::set("create table t (id int primary key, v text)", "").await;
    scene.cluster.sql("insert into t values (1, 'v')").await;
    scene.wait_for_copy("select count(*) from t", 1).await;
    let paused = scene.server.run(&["sink", "pause", "copy"]);
    assert!(paused.status.success());
    scene.cluster.sql("insert into t values (2, 'v')").await;
    let said = scene.verify(&["--table", "public.t", "--wait", "1"]);
    assert_eq!((said.code, said.differences("public.t")), (2, set(&[])), "{said:?}");
    let reason = said.table("public.t")["unsettled"][0]["reason"].as_str().unwrap();
    assert!(reason.contains("paused"), "{reason}");
}
