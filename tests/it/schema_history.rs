//! `walrace schema`: each version of each table, with where it began, whatever happened meanwhile.

use std::time::Duration;

use serde_json::{Value, json};

use crate::kit::{Cluster, FileRecorder, Server, source_toml, wait_for};

const PATIENCE: Duration = Duration::from_secs(30);

const SINK: &str = "\n[sink.lake]\nkind = \"file\"\npath = \"lake.jsonl\"\n";

fn server(cluster: &Cluster, more: &str) -> Server {
    Server::new(&format!("{}{SINK}{more}", source_toml("app", &cluster.unix_url())))
}

async fn captured(server: &Server, condition: impl Fn(&[Value]) -> bool) -> Vec<Value> {
    FileRecorder::new(server.path("lake.jsonl")).wait_until(PATIENCE, condition).await
}

/// What a command prints, which must succeed.
#[track_caller]
fn told(server: &Server, arguments: &[&str]) -> String {
    let output = server.run(arguments);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

/// Table, number and columns of each version, and where each began.
fn versions(server: &Server) -> Vec<(String, u64, Vec<String>, u64)> {
    let text = told(server, &["schema", "list", "--json"]);
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let version = |line: Value| {
        assert_eq!(line["known"], "observed", "{line}");
        let columns = line["columns"].as_array().unwrap();
        let names = columns.iter().map(|column| column["name"].as_str().unwrap().to_owned());
        (
            line["table"].as_str().unwrap().to_owned(),
            line["version"].as_u64().unwrap(),
            names.collect(),
            line["offset"].as_u64().unwrap(),
        )
    };
    lines.map(version).collect()
}

/// The same with the columns in the order in which JSON has them.
fn sorted(server: &Server) -> Vec<(String, u64, Vec<String>, u64)> {
    let mut found = versions(server);
    found.iter_mut().for_each(|version| version.2.sort());
    found
}

/// What the history must be by the changes that were captured: a version begins where the names of
/// the columns of a table's rows differ from those before.
fn expected(changes: &[Value]) -> Vec<(String, u64, Vec<String>, u64)> {
    let mut found: Vec<(String, u64, Vec<String>, u64)> = Vec::new();
    for change in changes.iter().filter(|change| change["op"] == "c") {
        let table = change["source_table"].as_str().unwrap();
        let table = format!("{}.{table}", change["source_schema"].as_str().unwrap());
        let columns: Vec<String> = change["after"].as_object().unwrap().keys().cloned().collect();
        let last = found.iter().rfind(|version| version.0 == table);
        let number = last.map_or(1, |last| last.1 + 1);
        if last.is_none_or(|last| last.2 != columns) {
            found.push((table, number, columns, change["offset"].as_u64().unwrap()));
        }
    }
    found.sort();
    found
}

#[tokio::test]
async fn versions_are_listed_shown_and_compared_while_it_runs_and_while_it_does_not() {
    let cluster = Cluster::start().await;
    cluster.sql("create table t (id int primary key, a numeric(12, 3), b text not null)").await;
    let mut server = server(&cluster, "");
    server.start_ready().await;
    let sql = async |sql: &str| cluster.sql(sql).await;
    sql("insert into t values (1, 1, 'x'), (2, 2, 'y')").await;
    sql("alter table t rename a to amount; alter table t alter id type bigint").await;
    sql("insert into t values (3, 3, 'z')").await;
    sql("alter table t drop column b, add column c varchar(20)[]").await;
    sql("begin; insert into t values (4, 4); alter table t add d int; insert into t values (5); commit")
        .await;
    sql("alter table t drop column d; insert into t values (6)").await;
    sql("alter table t rename to t_old; insert into t_old values (7)").await;
    captured(&server, |seen| seen.len() >= 7).await;
    let written = async || server.log().contains("public.t has version 5").then_some(());
    wait_for(PATIENCE, written, || server.log()).await;
    let (status, body) = server.get("/api/sources/app/schema?table=public.t").await;
    let body: Value = serde_json::from_str(&body).unwrap();
    assert_eq!((status, body.as_array().unwrap().len()), (200, 5));
    assert_eq!(server.get("/api/sources/nobody/schema").await.0, 400);
    for running in [true, false] {
        if !running {
            server.kill();
        }
        let list = told(&server, &["schema", "list"]);
        assert!(list.contains("public.t_old"), "{list}");
        let names = |number: usize| {
            let found = versions(&server).into_iter().filter(|version| version.0 == "public.t");
            found.map(|version| version.2).nth(number - 1).unwrap()
        };
        assert_eq!(names(1), ["id", "a", "b"]);
        assert_eq!(names(4), ["id", "amount", "c", "d"]);
        assert_eq!(names(5), names(3));
        let diff = told(&server, &["schema", "diff", "t", "--from", "1", "--to", "3"]);
        for line in [
            "- dropped a numeric(12,3)\n",
            "+ added amount numeric(12,3) (may be a under a new name)\n",
            "- dropped b text\n",
            "+ added c character varying(20)[]\n",
            "~ retyped id: integer to bigint\n",
        ] {
            assert!(diff.contains(line), "`{line}` is not in\n{diff}");
        }
        let diff = told(&server, &["schema", "diff", "public.t", "--json"]);
        let diff: Value = serde_json::from_str(&diff).unwrap();
        let dropped =
            json!([{"what": "dropped", "column": "d", "type": "integer", "nullable": null}]);
        assert_eq!(diff["differences"], with_nullable(&diff, dropped), "{diff:#}");
        let show = told(&server, &["schema", "show", "t", "--version", "1"]);
        assert!(show.contains("public.t version 1 of 5, since offset 0"), "{show}");
        assert!(show.contains("numeric(12,3)"), "{show}");
        let show = told(&server, &["schema", "show", "t_old"]);
        assert!(show.contains("the same table was public.t before"), "{show}");
        let refused = server.run(&["schema", "show", "t", "--version", "9"]);
        let error = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(error.contains("public.t has no version 9"), "{error}");
    }
}

/// Nullability is that of the catalog when the table was described, which may have moved on.
fn with_nullable(diff: &Value, mut expected: Value) -> Value {
    expected[0]["nullable"] = diff["differences"][0]["nullable"].clone();
    expected
}

#[tokio::test]
async fn a_kill_at_any_step_neither_loses_a_version_nor_makes_one_up() {
    let cluster = Cluster::start().await;
    cluster
        .sql("create table t (id serial primary key); create table u (id serial primary key)")
        .await;
    let mut server = server(&cluster, "\n[journal]\nsegment_bytes_max = 65536\n");
    server.start_ready().await;
    let mut number = 0_usize;
    for point in [
        "history::before_record",
        "history::after_record",
        "journal::after_write",
        "journal::after_sync",
        "capture::before_confirm",
        "history::before_record:2",
        "history::after_record:2",
    ] {
        server.kill();
        server.start_to_die_at(point);
        for _ in 0..3 {
            number += 1;
            let sql = format!(
                "insert into t default values; alter table t add c{number} int default {number};
                 insert into t default values; insert into u default values;
                 alter table t drop column c{number}; insert into t default values"
            );
            for statement in sql.split(';') {
                cluster.sql(statement).await;
            }
            if number.is_multiple_of(2) {
                cluster.sql(&format!("alter table u add c{number} int")).await;
            }
        }
        server.wait_exit(PATIENCE).await;
    }
    let rows = cluster.value("select (select count(*) from t) + (select count(*) from u)").await;
    server.start_ready().await;
    let all = |seen: &[Value]| json!(seen.len()) == rows;
    let changes = captured(&server, all).await;
    let expected = expected(&changes);
    assert!(expected.len() > 2 * number, "{expected:?}");
    assert_eq!(sorted(&server), expected, "while it runs");
    server.stop().await;
    assert_eq!(sorted(&server), expected, "at rest");
    server.start_ready().await;
    assert_eq!(sorted(&server), expected, "after another start");
    // From the journal alone it is the same.
    server.kill();
    std::fs::remove_file(server.path("data/catalog.sqlite")).unwrap();
    for rest in ["-wal", "-shm"] {
        let _ = std::fs::remove_file(server.path(format!("data/catalog.sqlite{rest}")));
    }
    std::fs::remove_file(server.path("lake.jsonl")).unwrap();
    let again = server.path("lake.jsonl.progress");
    let _ = std::fs::remove_file(again);
    server.start();
    let rebuilt = async || {
        let output = server.run(&["schema", "list", "--json"]);
        (output.status.success() && sorted(&server) == expected).then_some(())
    };
    wait_for(PATIENCE, rebuilt, || format!("{expected:?} instead of {:?}", versions(&server)))
        .await;
}

#[tokio::test]
async fn the_history_outlives_the_segments_of_the_journal() {
    let cluster = Cluster::start().await;
    cluster.sql("create table t (id serial primary key, v text)").await;
    let journal = "\n[journal]\nsegment_bytes_max = 65536\nage_ms_max = 1\n";
    let mut server = server(&cluster, journal);
    server.start_ready().await;
    cluster.sql("insert into t (v) values ('first')").await;
    let bulk = "insert into t (v) select string_agg(md5(random()::text), '')
                from generate_series(1, 3000) n group by n / 30";
    cluster.sql(bulk).await;
    cluster.sql("alter table t add w int").await;
    cluster.sql(bulk).await;
    cluster.sql(bulk).await;
    let trimmed = async || {
        let info = told(&server, &["journal", "info", "--json"]);
        let info: Value = serde_json::from_str(&info).unwrap();
        (info["start"].as_u64() > Some(150)).then_some(())
    };
    wait_for(PATIENCE, trimmed, || "nothing is trimmed".into()).await;
    for _ in 0..2 {
        let found = versions(&server);
        assert_eq!(found.len(), 2, "{found:?}");
        assert_eq!((found[0].3, &found[0].2), (0, &vec!["id".to_owned(), "v".to_owned()]));
        assert_eq!(found[1].3, 1 + 101);
        server.kill();
        server.start_ready().await;
    }
}
