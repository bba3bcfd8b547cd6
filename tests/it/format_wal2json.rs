//! The format `wal2json` against the plugin itself: the same changes, object by object.

use std::time::Duration;

use serde_json::{Value, json};

use crate::kit::{Cluster, FileRecorder, Server, source_toml};

const PATIENCE: Duration = Duration::from_secs(60);
const TABLES: &str = include_str!("../fixtures/debezium/tables.sql");
const CHANGES: &str = include_str!("../fixtures/debezium/changes.sql");
const SCHEMA: &str = include_str!("../../docs/schema/wal2json.schema.json");

/// What the plugin says of everything that its slot has, without begin and commit.
async fn of_the_plugin(cluster: &Cluster) -> Vec<Value> {
    let rows = cluster
        .rows(
            "select data from pg_logical_slot_get_changes('plugin', null, null,
                'format-version', '2', 'include-xids', '1', 'include-timestamp', '1',
                'include-types', '1', 'include-schemas', '1', 'include-lsn', '1')",
        )
        .await;
    let parse = |row: &Value| -> Value {
        serde_json::from_str(row["data"].as_str().unwrap()).unwrap_or_else(|e| panic!("{row}: {e}"))
    };
    let all: Vec<Value> = rows.iter().map(parse).collect();
    all.into_iter().filter(|object| !matches!(object["action"].as_str(), Some("B" | "C"))).collect()
}

/// What docs/formats.md names as different is made equal; everything else must be.
fn level(ours: &mut Value, theirs: &mut Value) {
    // The plugin has the LSN of the change, Walrace that of its commit.
    for side in [&mut *ours, &mut *theirs] {
        assert!(side.as_object_mut().unwrap().remove("lsn").unwrap().is_string());
    }
    let columns = ours.get_mut("columns").and_then(Value::as_array_mut);
    let plugins = theirs.get_mut("columns").and_then(Value::as_array_mut);
    for (ours, theirs) in columns.into_iter().flatten().zip(plugins.into_iter().flatten()) {
        // The plugin drops NaN and the infinities.
        let float = matches!(ours["type"].as_str(), Some("real" | "double precision"));
        let endless = matches!(ours["value"].as_str(), Some("NaN" | "Infinity" | "-Infinity"));
        if float && endless && theirs["value"].is_null() {
            ours["value"] = Value::Null;
        }
    }
}

#[tokio::test]
async fn every_object_of_a_real_run_is_what_the_plugin_itself_wrote() {
    let cluster = Cluster::start().await;
    cluster.sql(TABLES).await;
    let sink = "\n[sink.lake]\nkind = \"file\"\npath = \"lake.jsonl\"\nformat = \"wal2json\"\n";
    let mut server = Server::new(&format!("{}{sink}", source_toml("app", &cluster.unix_url())));
    server.start_ready().await;
    cluster.sql("select pg_create_logical_replication_slot('plugin', 'wal2json')").await;
    for statement in CHANGES.split(';').filter(|statement| !statement.trim().is_empty()) {
        // Bytes that are no text come from the plugin as broken JSON.
        cluster.sql(&statement.replace("'\\xff00'::bytea", "'plain'")).await;
    }
    cluster.sql("update keyed set a = 3 where a = 1; update uidx set u = 'u2'").await;
    cluster
        .sql(
            "insert into uidx values (1, 'u', 'v'); update uidx set u = 'u2'; delete from uidx;
             insert into keyed values (5, 'x', 'v', null); update keyed set a = 6 where a = 5;
             delete from keyed where a = 6",
        )
        .await;
    cluster.sql("select pg_logical_emit_message(true, 'end', 'of it')").await;
    let file = FileRecorder::new(server.path("lake.jsonl"));
    let ours = file.wait_until(PATIENCE, |all| all.iter().any(|o| o["prefix"] == "end")).await;
    let theirs = of_the_plugin(&cluster).await;
    assert_eq!(ours.len(), theirs.len());
    let validator = jsonschema::validator_for(&serde_json::from_str(SCHEMA).unwrap()).unwrap();
    for (mut ours, mut theirs) in ours.into_iter().zip(theirs) {
        if let Err(error) = validator.validate(&ours) {
            panic!("{error}\n{ours:#}");
        }
        level(&mut ours, &mut theirs);
        for rows in ["columns", "identity"] {
            let pairs = ours[rows].as_array().into_iter().flatten();
            for (ours, theirs) in pairs.zip(theirs[rows].as_array().into_iter().flatten()) {
                assert_eq!(ours, theirs);
            }
        }
        assert_eq!(ours, theirs);
    }
}

#[tokio::test]
async fn the_schema_of_each_format_is_served() {
    let cluster = Cluster::start().await;
    let mut server = Server::new(&source_toml("app", &cluster.unix_url()));
    server.start_ready().await;
    for format in ["native", "sequin", "debezium", "debezium_schema", "wal2json", "cloudevents"] {
        let (status, body) = server.get(&format!("/schemas/{format}")).await;
        assert_eq!(status, 200, "{format}");
        let schema: Value = serde_json::from_str(&body).unwrap();
        assert!(jsonschema::meta::is_valid(&schema), "{format}");
        assert_eq!(
            schema["$id"],
            json!(format!("https://walrace.dev/schema/{format}.schema.json"))
        );
    }
    let (status, body) = server.get("/schemas/walstream").await;
    assert_eq!(status, 200);
    assert!(body.contains("package walstream.v1;"), "{body}");
    assert_eq!(server.get("/schemas/avro").await.0, 404);
}
