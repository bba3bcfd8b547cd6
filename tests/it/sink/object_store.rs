use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::TryStreamExt;
use object_store::{
    ObjectStore as _, ObjectStoreExt as _, aws::AmazonS3Builder, path::Path as Name,
};
use parquet::{
    file::reader::{FileReader, SerializedFileReader},
    record::{Field, Row as ParquetRow},
};
use serde_json::{Value as Json, json};
use tempfile::TempDir;
use uuid::Uuid;
use walrace::{
    change::{Batch, Before, Change, Message, Op, Row, Timestamp, Value},
    error::{Class, Result},
    sink::{Progress, Sink, Written},
};

use super::{batch, conformance::conforms, delivers, fails, offsets, open, target::Target, write};
use crate::kit::Moto;

/// The sink `object_store` over a local folder, for the conformance suite.
pub(crate) struct FolderTarget {
    folder: TempDir,
}

impl FolderTarget {
    pub(crate) fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn away(&self) -> PathBuf {
        self.folder.path().with_extension("away")
    }
}

fn run(command: &mut std::process::Command) {
    assert!(command.status().unwrap().success(), "{command:?}");
}

#[async_trait]
impl Target for FolderTarget {
    fn config(&self) -> Json {
        local(&self.folder, json!({"roll_ms_max": 0}))
    }

    /// Between `stop` and `start` a sink that tries again may make the folder anew.
    fn is_durable(&self) -> bool {
        false
    }

    /// Nobody can write in a folder that is not one.
    async fn stop(&mut self) {
        run(std::process::Command::new("mv").args([self.folder.path(), &self.away()]));
        fs::write(self.folder.path(), "").unwrap();
    }

    async fn start(&mut self) {
        fs::remove_file(self.folder.path()).unwrap();
        run(std::process::Command::new("mv").args([&self.away(), self.folder.path()]));
    }

    async fn content(&mut self) -> Vec<Json> {
        lines_of(&folder_objects(self.folder.path()))
    }
}

/// The sink `object_store` over S3's protocol, for the conformance suite. The store keeps its
/// objects in memory: an outage is one of its connections.
pub(crate) struct S3Target {
    moto: Moto,
}

impl S3Target {
    pub(crate) async fn new() -> Self {
        Self { moto: Moto::start().await }
    }
}

#[async_trait]
impl Target for S3Target {
    fn config(&self) -> Json {
        s3(&self.moto, json!({"roll_ms_max": 0}))
    }

    fn wrong_login(&self) -> Option<Json> {
        Some(s3(&self.moto, json!({"access_key_id": "AKIAWRONG", "roll_ms_max": 0})))
    }

    async fn stop(&mut self) {
        self.moto.proxy.refuse(true);
        self.moto.proxy.cut();
    }

    async fn start(&mut self) {
        self.moto.proxy.refuse(false);
    }

    async fn content(&mut self) -> Vec<Json> {
        lines_of(&s3_objects(&self.moto).await)
    }
}

#[expect(clippy::needless_pass_by_value, reason = "every caller makes it in place")]
fn local(folder: &TempDir, more: Json) -> Json {
    let url = format!("file://{}", folder.path().display());
    let mut config = json!({"kind": "object_store", "url": url});
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    config
}

#[expect(clippy::needless_pass_by_value, reason = "every caller makes it in place")]
fn s3(moto: &Moto, more: Json) -> Json {
    let mut config = json!({
        "kind": "object_store",
        "url": "s3://bucket/cdc",
        "endpoint": moto.endpoint(),
        "access_key_id": moto.access_key_id,
        "secret_access_key": moto.secret_access_key,
        "allow_http": true,
        "timeout_ms": 5000,
    });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    config
}

pub(super) type Objects = Vec<(String, Bytes)>;

/// What readers see: every object but the ledger's, by name.
fn folder_objects(folder: &Path) -> Objects {
    let mut objects = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(folder).unwrap().display().to_string();
            if path.is_dir() {
                folders.push(path);
            } else if !name.starts_with("_walrace") {
                objects.push((name, fs::read(&path).unwrap().into()));
            }
        }
    }
    objects.sort();
    objects
}

pub(super) async fn s3_objects(moto: &Moto) -> Objects {
    let store = AmazonS3Builder::new()
        .with_bucket_name("bucket")
        .with_region("us-east-1")
        .with_endpoint(moto.endpoint())
        .with_access_key_id(&moto.access_key_id)
        .with_secret_access_key(&moto.secret_access_key)
        .with_allow_http(true)
        .build()
        .unwrap();
    let prefix = Name::from("cdc");
    let found: Vec<_> = store.list(Some(&prefix)).try_collect().await.unwrap();
    let mut objects = Vec::new();
    for meta in found {
        let name = meta.location.as_ref().strip_prefix("cdc/").unwrap().to_owned();
        if !name.starts_with("_walrace") {
            let bytes = store.get(&meta.location).await.unwrap().bytes().await.unwrap();
            objects.push((name, bytes));
        }
    }
    objects.sort();
    objects
}

fn lines(bytes: &[u8]) -> Vec<Json> {
    let text = std::str::from_utf8(bytes).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

pub(super) fn lines_of(objects: &Objects) -> Vec<Json> {
    let mut all: Vec<_> = objects.iter().flat_map(|(_, bytes)| lines(bytes)).collect();
    all.sort_by_key(|line| line["offset"].as_u64());
    all
}

fn name(hour: &str, (first, last): (u64, u64), flush: u64) -> String {
    format!("public.t/{hour}/{first:020}-{last:020}-{flush:010}.jsonl")
}

fn progress(epoch: u64, cursor: u64, retry_seq: u64) -> Progress {
    Progress { lineage: Uuid::from_u128(7), epoch, cursor, retry_seq }
}

async fn waits(sink: &mut dyn Sink, batch: &Batch, durable: u64) {
    let written = write(sink, batch).await.unwrap();
    assert!(matches!(written, Written::Until(until) if until == durable), "{written:?}");
}

/// What a sink delivers in both stores, small enough to be read.
async fn delivers_runs(config: Json) -> Result<()> {
    let mut sink = open(config).unwrap();
    assert_eq!(sink.peek().await?, None);
    assert_eq!(sink.open().await?, None);
    waits(&mut *sink, &batch(3..5), 3).await;
    let mut hour_later = batch(5..7);
    hour_later.changes[1].transaction.commit_time = Timestamp(1_775_470_462_000_123);
    waits(&mut *sink, &hour_later, 3).await;
    let nothing = sink.write(&Batch::default(), &progress(1, 8, 0)).await?;
    assert!(matches!(nothing, Written::All), "{nothing:?}");
    assert_eq!(sink.peek().await?, Some(progress(1, 8, 0)));
    waits(&mut *sink, &batch(8..9), 8).await;
    sink.close().await?;
    assert_eq!(sink.open().await?, Some(progress(1, 9, 0)));
    Ok(())
}

fn are_the_runs(objects: &Objects) {
    let found: Vec<_> =
        objects.iter().map(|(name, bytes)| (name.clone(), offsets(&lines(bytes)))).collect();
    let expected = [
        (name("2026-04-06T09", (3, 5), 1), vec![3, 4, 5]),
        (name("2026-04-06T09", (8, 8), 2), vec![8]),
        (name("2026-04-06T10", (6, 6), 1), vec![6]),
    ];
    assert_eq!(found, expected);
    assert_eq!(lines(&objects[0].1)[0]["after"], json!({"id": 3, "v": "ü \"quoted\""}));
}

#[tokio::test]
async fn a_run_is_one_object_for_each_table_and_hour_in_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    delivers_runs(local(&folder, json!({}))).await.unwrap();
    are_the_runs(&folder_objects(folder.path()));
    let staged: Vec<_> =
        fs::read_dir(folder.path().join("_walrace/hook/staged")).unwrap().collect();
    assert!(staged.is_empty(), "{staged:?}");
}

/// One test, for one server.
#[tokio::test]
async fn a_bucket_of_s3_has_the_same_objects_and_refuses_a_wrong_key_and_comes_back() {
    let moto = Moto::start().await;
    delivers_runs(s3(&moto, json!({}))).await.unwrap();
    are_the_runs(&s3_objects(&moto).await);

    let wrong = [
        json!({"access_key_id": "AKIAWRONG"}),
        json!({"secret_access_key": "hunter2"}),
        json!({"url": "s3://nowhere"}),
    ];
    for wrong in wrong {
        let mut sink = open(s3(&moto, wrong.clone())).unwrap();
        let error = sink.open().await.unwrap_err();
        assert_eq!(error.class(), Class::Config, "{wrong}: {error}");
        assert!(!error.to_string().contains("hunter2"), "{error}");
    }

    let mut sink = open(s3(&moto, json!({"roll_ms_max": 0, "timeout_ms": 1000}))).unwrap();
    sink.open().await.unwrap();
    moto.proxy.refuse(true);
    moto.proxy.cut();
    assert_eq!(fails(&mut *sink, &batch(9..12)).await.class(), Class::Retry);
    assert_eq!(sink.open().await.unwrap_err().class(), Class::Retry);
    moto.proxy.refuse(false);
    moto.proxy.stall(true);
    assert_eq!(sink.open().await.unwrap_err().class(), Class::Retry);
    moto.proxy.stall(false);
    assert_eq!(sink.open().await.unwrap(), Some(progress(1, 9, 0)));
    delivers(&mut *sink, &batch(9..12)).await;
    let expected = [3, 4, 5, 6, 8, 9, 10, 11];
    assert_eq!(offsets(&lines_of(&s3_objects(&moto).await)), expected);

    let mut second = open(s3(&moto, json!({"roll_ms_max": 0}))).unwrap();
    second.open().await.unwrap();
    let error = fails(&mut *sink, &batch(12..14)).await;
    assert!(error.to_string().contains("another walrace"), "{error}");
    delivers(&mut *second, &batch(12..14)).await;
    assert_eq!(offsets(&lines_of(&s3_objects(&moto).await)).len(), 10);
}

#[tokio::test]
async fn a_folder_that_was_away_goes_on() {
    let mut target = FolderTarget::new();
    let mut sink = open(target.config()).unwrap();
    sink.open().await.unwrap();
    delivers(&mut *sink, &batch(0..2)).await;
    target.stop().await;
    assert_eq!(fails(&mut *sink, &batch(2..4)).await.class(), Class::Retry);
    assert_eq!(sink.open().await.unwrap_err().class(), Class::Retry);
    target.start().await;
    assert_eq!(sink.open().await.unwrap(), Some(progress(1, 2, 0)));
    delivers(&mut *sink, &batch(2..4)).await;
    assert_eq!(offsets(&target.content().await), [0, 1, 2, 3]);
}

#[tokio::test]
async fn objects_are_written_when_they_are_large_or_old_enough() {
    let folder = tempfile::tempdir().unwrap();
    let mut sink = open(local(&folder, json!({"roll_bytes_max": 2000}))).unwrap();
    sink.open().await.unwrap();
    waits(&mut *sink, &batch(0..2), 0).await;
    delivers(&mut *sink, &batch(2..9)).await;
    assert_eq!(folder_objects(folder.path()).len(), 1);
    let mut sink = open(local(&folder, json!({"roll_ms_max": 0}))).unwrap();
    sink.open().await.unwrap();
    for from in [9, 11] {
        delivers(&mut *sink, &batch(from..from + 2)).await;
    }
    assert_eq!(folder_objects(folder.path()).len(), 3);
}

#[tokio::test]
async fn what_waited_comes_again_after_a_crash_and_is_there_once() {
    let folder = tempfile::tempdir().unwrap();
    let mut sink = open(local(&folder, json!({}))).unwrap();
    sink.open().await.unwrap();
    waits(&mut *sink, &batch(0..5), 0).await;
    drop(sink);
    let mut sink = open(local(&folder, json!({}))).unwrap();
    assert_eq!(sink.open().await.unwrap(), None);
    waits(&mut *sink, &batch(0..7), 0).await;
    sink.close().await.unwrap();
    assert_eq!(offsets(&lines_of(&folder_objects(folder.path()))), [0, 1, 2, 3, 4, 5, 6]);
}

#[tokio::test]
async fn progress_only_grows_and_a_retry_is_stored_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let mut sink = open(local(&folder, json!({}))).unwrap();
    sink.open().await.unwrap();
    sink.write(&Batch::default(), &progress(2, 5, 0)).await.unwrap();
    let late = sink.write(&batch(3..4), &progress(2, 5, 1)).await.unwrap();
    assert!(matches!(late, Written::All), "{late:?}");
    assert_eq!(sink.peek().await.unwrap(), Some(progress(2, 5, 1)));
    let again = sink.write(&batch(3..4), &progress(2, 4, 1)).await.unwrap_err();
    assert_eq!(again.class(), Class::Retry);
    let old = sink.write(&Batch::default(), &progress(1, 9, 0)).await.unwrap_err();
    assert_eq!(old.class(), Class::Retry);
    sink.write(&batch(0..2), &progress(3, 2, 0)).await.unwrap();
    sink.close().await.unwrap();
    assert_eq!(sink.peek().await.unwrap(), Some(progress(3, 2, 0)));
    assert_eq!(offsets(&lines_of(&folder_objects(folder.path()))), [0, 1, 3]);
}

#[tokio::test]
async fn a_change_that_has_no_form_refuses_its_batch_and_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let mut sink = open(local(&folder, json!({"roll_ms_max": 0}))).unwrap();
    sink.open().await.unwrap();
    let mut bad = batch(0..3);
    bad.changes[1].after = Some(Row::from_values([Value::Text(b"1"), Value::Text(b"\xff")]));
    assert_eq!(fails(&mut *sink, &bad).await.class(), Class::Data);
    delivers(&mut *sink, &batch(0..1)).await;
    bad.changes.remove(1);
    bad.changes.remove(0);
    delivers(&mut *sink, &bad).await;
    assert_eq!(offsets(&lines_of(&folder_objects(folder.path()))), [0, 2]);
}

#[tokio::test]
async fn an_object_of_somebody_else_is_not_taken_for_ours() {
    let folder = tempfile::tempdir().unwrap();
    let mut sink = open(local(&folder, json!({"roll_ms_max": 0}))).unwrap();
    sink.open().await.unwrap();
    let path = folder.path().join(name("2026-04-06T09", (0, 1), 1));
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, "mine").unwrap();
    let error = fails(&mut *sink, &batch(0..2)).await;
    assert_eq!(error.class(), Class::Config);
    assert_eq!(sink.open().await.unwrap_err().class(), Class::Config);
    fs::remove_file(&path).unwrap();
    assert_eq!(sink.open().await.unwrap(), Some(progress(1, 2, 0)));
    assert_eq!(offsets(&lines_of(&folder_objects(folder.path()))), [0, 1]);
}

#[tokio::test]
async fn lines_can_be_compressed() {
    let folder = tempfile::tempdir().unwrap();
    let mut sink = open(local(&folder, json!({"roll_ms_max": 0, "compression": "zstd"}))).unwrap();
    sink.open().await.unwrap();
    delivers(&mut *sink, &batch(0..50)).await;
    let objects = folder_objects(folder.path());
    assert!(objects[0].0.ends_with(".jsonl.zst"), "{}", objects[0].0);
    let plain = zstd::decode_all(&objects[0].1[..]).unwrap();
    assert_eq!(offsets(&lines(&plain)), (0..50).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_parquet_file_has_the_types_of_its_table() {
    let folder = tempfile::tempdir().unwrap();
    let mut sink = open(local(&folder, json!({"layout": "parquet"}))).unwrap();
    sink.open().await.unwrap();
    let mut mixed = batch(0..4);
    let key = Row::from_values([Value::Text(b"2"), Value::Null]);
    mixed.changes[2] = Change {
        op: Op::Delete,
        before: Before::Key(key),
        after: None,
        ..mixed.changes[2].clone()
    };
    mixed.changes[3].op = Op::Update;
    mixed.changes[3].after = Some(Row::from_values([Value::Text(b"3"), Value::Unchanged]));
    mixed.changes.push(Change {
        op: Op::Message,
        table: None,
        after: None,
        message: Some(Arc::new(Message {
            prefix: "audit".into(),
            content: Bytes::from_static(b"\x00\xff"),
            transactional: true,
        })),
        ..batch(4..5).changes.remove(0)
    });
    waits(&mut *sink, &mixed, 0).await;
    sink.close().await.unwrap();
    let objects = folder_objects(folder.path());
    assert_eq!(objects.len(), 2);
    assert!(objects[0].0.starts_with("messages/audit/2026-04-06T09/"), "{}", objects[0].0);
    let reader = SerializedFileReader::new(objects[1].1.clone()).unwrap();
    let types: Vec<_> = reader
        .metadata()
        .file_metadata()
        .schema_descr()
        .columns()
        .iter()
        .take(4)
        .map(|column| format!("{} {}", column.name(), column.physical_type()))
        .collect();
    assert_eq!(types, ["id INT64", "v BYTE_ARRAY", "_op BYTE_ARRAY", "_offset INT64"]);
    let rows: Vec<Json> =
        reader.get_row_iter(None).unwrap().map(|row| json_of(&row.unwrap())).collect();
    assert_eq!(rows.len(), 4);
    assert_eq!((&rows[0]["id"], &rows[0]["v"]), (&json!(0), &json!("ü \"quoted\"")));
    let ops: Vec<_> = rows.iter().map(|row| row["_op"].as_str().unwrap()).collect();
    assert_eq!(ops, ["c", "c", "d", "u"]);
    assert_eq!((&rows[2]["id"], &rows[2]["v"]), (&json!(2), &Json::Null));
    assert_eq!(rows[3]["_unchanged"], "[\"v\"]");
    assert_eq!(rows[1]["_lsn"], "0/1");
}

fn json_of(row: &ParquetRow) -> Json {
    let value = |field: &Field| match field {
        Field::Null => Json::Null,
        Field::Int(number) => json!(number),
        Field::Long(number) => json!(number),
        Field::Str(text) => json!(text),
        other => json!(other.to_string()),
    };
    row.get_column_iter().map(|(name, field)| (name.clone(), value(field))).collect()
}

#[test]
fn options_that_cannot_work_are_for_a_person() {
    let folder = tempfile::tempdir().unwrap();
    for wrong in [
        json!({"url": "gs://bucket"}),
        json!({"url": "s3://bucket", "access_key_id": "a"}),
        json!({"url": "s3://bucket", "endpoint": "http://localhost:1"}),
        json!({"name": "{table}.{ext}"}),
        json!({"name": "{tabel}/{flush}"}),
    ] {
        let error = open(local(&folder, wrong.clone())).unwrap_err();
        assert_eq!(error.class(), Class::Config, "{wrong}: {error}");
    }
}

const CRASHED: &str = "WALRACE_TEST_CRASHED_FOLDER";

/// Run by the test below in a process of its own, which is killed at a fail point.
#[tokio::test]
async fn crashed_object_store_child() {
    let Ok(folder) = std::env::var(CRASHED) else { return };
    let config =
        json!({"kind": "object_store", "url": format!("file://{folder}"), "roll_ms_max": 0});
    let mut sink = open(config).unwrap();
    let from = sink.open().await.unwrap().map_or(0, |progress| progress.cursor);
    delivers(&mut *sink, &batch(from..from + 3)).await;
    delivers(&mut *sink, &batch(from + 3..from + 7)).await;
}

#[cfg(feature = "failpoints")]
#[tokio::test]
async fn a_change_is_in_one_object_wherever_the_process_dies() {
    use std::process::Stdio;

    use tokio::process::Command;

    for point in ["finished", "claimed", "staged", "entered", "object", "published"] {
        let folder = tempfile::tempdir().unwrap();
        for count in [1, 1, 2, 2, 1] {
            let status = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "sink::object_store::crashed_object_store_child"])
                .env(CRASHED, folder.path())
                .env("WALRACE_FAILPOINT", format!("object_store::{point}:{count}"))
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status()
                .await
                .unwrap();
            let opening = matches!(point, "finished" | "claimed");
            assert!(!status.success() || (opening && count == 2), "{point}:{count}");
            let seen = offsets(&lines_of(&folder_objects(folder.path())));
            let expected: Vec<u64> = (0..seen.len() as u64).collect();
            assert_eq!(seen, expected, "after {point}:{count}");
        }
        let mut sink = open(local(&folder, json!({"roll_ms_max": 0}))).unwrap();
        let end = sink.open().await.unwrap().map_or(0, |progress| progress.cursor);
        let seen = offsets(&lines_of(&folder_objects(folder.path())));
        assert_eq!(seen, (0..end).collect::<Vec<_>>(), "{point}");
    }
}

#[tokio::test]
async fn the_object_store_sink_over_a_folder_conforms() {
    conforms(&mut FolderTarget::new()).await;
}

#[tokio::test]
async fn the_object_store_sink_over_s3_conforms() {
    conforms(&mut S3Target::new().await).await;
}
