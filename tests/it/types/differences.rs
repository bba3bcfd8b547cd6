//! The tables of docs/types.md: each of their lines is run on a real server.

use std::{collections::BTreeMap, fs, path::Path, time::Duration};

use serde_json::value::RawValue;

use super::Line;
use crate::kit::{Cluster, Server, source_toml, wait_for};

/// The base type that an extension would bring, with its cast to `json`.
const SPOT: &str = "create type spot;
    create function spot_in(cstring) returns spot language internal immutable strict as 'textin';
    create function spot_out(spot) returns cstring language internal immutable strict as 'textout';
    create type spot (input = spot_in, output = spot_out, like = text);
    create function spot_to_json(spot) returns json language sql immutable
        as $$ select '{\"type\": \"Point\"}'::json $$;
    create cast (spot as json) with function spot_to_json(spot)";

/// The cells between backticks of each line of the table of this name.
fn documented(table: &str) -> Vec<Vec<String>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/types.md");
    let text = fs::read_to_string(path).unwrap();
    let (_, rest) = text.split_once(&format!("<!-- {table} -->")).unwrap();
    let (lines, _) = rest.split_once(&format!("<!-- /{table} -->")).unwrap();
    let cell = |cell: &str| cell.trim().trim_matches('`').to_owned();
    let cells = |line: &str| line.trim_matches('|').split(" | ").map(cell).collect();
    lines.trim().lines().skip(2).map(cells).collect()
}

/// The new row of the one change in a sink's file, column by column, as it is written.
async fn row_in(server: &Server, file: &str) -> BTreeMap<String, Box<RawValue>> {
    let path = server.path(file);
    let whole = async || fs::read_to_string(&path).ok().filter(|text| text.ends_with('\n'));
    let text = wait_for(Duration::from_secs(60), whole, || server.log_tail()).await;
    let line: Line = serde_json::from_str(text.trim()).unwrap();
    serde_json::from_str(line.after.unwrap().get()).unwrap()
}

/// Makes a table with a column for each value, runs sinks of these sections, and inserts the values.
async fn run(cluster: &Cluster, values: &[&String], sinks: &[String]) -> Server {
    let columns = values.iter().enumerate();
    let columns = columns.map(|(n, value)| format!("{value} as c{n}")).collect::<Vec<_>>();
    let select = format!("select {}", columns.join(", "));
    cluster.sql(&format!("create table shown as {select} where false")).await;
    let source = source_toml("app", &cluster.unix_url());
    let mut server = Server::new(&format!("{source}\n{}", sinks.join("\n")));
    server.start_ready().await;
    cluster.sql(&format!("insert into shown {select}")).await;
    server
}

#[tokio::test]
async fn each_documented_difference_from_to_jsonb_is_what_happens() {
    let cluster = Cluster::start().await;
    cluster.sql(SPOT).await;
    let lines = documented("differences");
    assert!(lines.len() > 5, "{lines:?}");
    let values: Vec<_> = lines.iter().map(|line| &line[0]).collect();
    let sink = "[sink.out]\nkind = \"file\"\npath = \"out.jsonl\"\n".to_owned();
    let mut server = run(&cluster, &values, &[sink]).await;
    let row = row_in(&server, "out.jsonl").await;
    let session = cluster.connect().await;
    for (n, line) in lines.iter().enumerate() {
        assert_eq!(row[&format!("c{n}")].get(), line[2], "{}", line[0]);
        let theirs = session.query_one(&format!("select to_jsonb({})::text", line[0]), &[]).await;
        let theirs = theirs.map_or("error".to_owned(), |row| row.get(0));
        assert_eq!(theirs, line[1], "{}", line[0]);
    }
    assert!(server.stop().await.success());
}

#[tokio::test]
async fn each_documented_choice_of_types_is_what_a_sink_writes() {
    let cluster = Cluster::start().await;
    let lines = documented("choices");
    assert!(lines.len() > 10, "{lines:?}");
    let values: Vec<_> = lines.iter().map(|line| &line[1]).collect();
    let sinks = lines.iter().enumerate().map(|(n, line)| {
        format!(
            "[sink.out{n}]\nkind = \"file\"\npath = \"{n}.jsonl\"\n[sink.out{n}.types]\n{}\n",
            line[0]
        )
    });
    let mut server = run(&cluster, &values, &sinks.collect::<Vec<_>>()).await;
    for (n, line) in lines.iter().enumerate() {
        let row = row_in(&server, &format!("{n}.jsonl")).await;
        assert_eq!(row[&format!("c{n}")].get(), line[2], "{} of {}", line[0], line[1]);
    }
    assert!(server.stop().await.success());
}

/// PostgreSQL announces no `ALTER TYPE` of a row type to those who read its changes.
#[tokio::test]
async fn a_row_type_that_grew_is_left_as_text_until_its_table_is_described_anew() {
    let cluster = Cluster::start().await;
    cluster.sql("create type pair as (a int, b text); create table pairs (p pair)").await;
    let mut server = super::deliver(&cluster, "").await;
    for (count, statements) in [
        "insert into pairs values (row(1, 'x'))",
        "alter type pair add attribute c int; insert into pairs values (row(1, 'x', 3))",
        "alter table pairs add n int; insert into pairs values (row(1, 'x', 3))",
    ]
    .into_iter()
    .enumerate()
    {
        cluster.sql(statements).await;
        super::delivered(&server, count + 1).await;
    }
    let text = super::delivered(&server, 3).await;
    let values = text.lines().map(|line| {
        let line: Line = serde_json::from_str(line).unwrap();
        let row: serde_json::Value = serde_json::from_str(line.after.unwrap().get()).unwrap();
        row["p"].to_string()
    });
    let expected = ["{\"a\":1,\"b\":\"x\"}", "\"(1,x,3)\"", "{\"a\":1,\"b\":\"x\",\"c\":3}"];
    assert_eq!(values.collect::<Vec<_>>(), expected);
    assert!(server.stop().await.success());
}
