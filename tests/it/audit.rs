//! The journal as an audit trail: full rows before and after, and no change of it goes unnoticed.

use std::{fs, path::Path, time::Duration};

use serde_json::{Value, json};

use crate::kit::{Cluster, FileRecorder, Server, source_toml};

const PATIENCE: Duration = Duration::from_secs(30);

async fn begin() -> (Cluster, Server, FileRecorder) {
    let cluster = Cluster::start().await;
    cluster
        .sql(
            "create table account (id int primary key, owner text, cents bigint, note text);
             alter table account replica identity full",
        )
        .await;
    let mut server = Server::new(&format!(
        "{}\n[sink.audit]\nkind = \"file\"\npath = \"audit.jsonl\"\n\n\
         [journal]\nsegment_bytes_max = 65536\n",
        source_toml("app", &cluster.unix_url())
    ));
    server.start_ready().await;
    let file = FileRecorder::new(server.path("audit.jsonl"));
    (cluster, server, file)
}

fn verify(server: &Server, more: &[&str]) -> (bool, String) {
    let output = server.run(&[&["journal", "verify"], more].concat());
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    (output.status.success(), text.into_owned())
}

fn head(report: &str) -> String {
    report.lines().find_map(|line| line.strip_prefix("head ")).unwrap().to_owned()
}

#[tokio::test]
async fn every_mutation_has_its_full_rows_before_and_after() {
    let (cluster, _server, file) = begin().await;
    let session = cluster.connect().await;
    let mut rng = fastrand::Rng::with_seed(3);
    let mut table = std::collections::BTreeMap::<u32, Value>::new();
    let mut expected = Vec::new();
    for _ in 0..200 {
        let (id, cents) = (rng.u32(0..20), rng.i64(0..1_000_000));
        let old = table.get(&id).cloned();
        let note = (rng.bool()).then(|| "n".repeat(rng.usize(0..5000)));
        let new = json!({"id": id, "owner": "ä'", "cents": cents, "note": note});
        let note = note.map_or("null".to_owned(), |note| format!("'{note}'"));
        let (statement, after) = match (&old, rng.bool()) {
            (None, _) => {
                (format!("insert into account values ({id}, 'ä''', {cents}, {note})"), Some(new))
            }
            (Some(_), true) => {
                let set = format!("cents = {cents}, note = {note}");
                (format!("update account set {set} where id = {id}"), Some(new))
            }
            (Some(_), false) => (format!("delete from account where id = {id}"), None),
        };
        session.batch_execute(&statement).await.unwrap();
        expected.push((old, after.clone()));
        match after {
            Some(row) => table.insert(id, row),
            None => table.remove(&id),
        };
    }
    let changes = file.wait_until(PATIENCE, |seen| seen.len() >= 200).await;
    for (change, (before, after)) in changes.iter().zip(expected) {
        let row = |row: Option<Value>| row.unwrap_or(Value::Null);
        assert_eq!(
            (&change["before"], &change["after"]),
            (&row(before), &row(after)),
            "{change:#}"
        );
        assert_eq!((&change["before_partial"], &change["unchanged"]), (&json!(false), &json!([])));
        assert!(change["source_position"]["tx_id"].as_u64().unwrap() > 0);
        assert!(change["commit_time"].is_string());
    }
}

#[tokio::test]
async fn an_altered_byte_of_a_sealed_segment_is_noticed() {
    let (cluster, mut server, file) = begin().await;
    fill(&cluster, &file, 0).await;
    assert!(server.stop().await.success());
    let (sound, report) = verify(&server, &[]);
    assert!(sound, "{report}");
    let segments = segments(&server.path("data/journal/app"));
    assert!(segments.len() >= 3, "{segments:?}");
    let mut rng = fastrand::Rng::with_seed(5);
    for _ in 0..30 {
        let path = &segments[rng.usize(0..segments.len() - 1)];
        let bytes = fs::read(path).unwrap();
        let at = rng.usize(0..bytes.len());
        let mut altered = bytes.clone();
        altered[at] ^= 1 << rng.u8(0..8);
        fs::write(path, &altered).unwrap();
        let (sound, report) = verify(&server, &[]);
        assert!(!sound, "byte {at} of {}: {report}", path.display());
        assert!(report.contains("segment"), "it says where: {report}");
        fs::write(path, &bytes).unwrap();
    }
    assert!(verify(&server, &[]).0, "as it was");
}

#[tokio::test]
async fn a_rewritten_tail_is_noticed_by_the_head_that_was_kept_elsewhere() {
    let (cluster, mut server, file) = begin().await;
    fill(&cluster, &file, 0).await;
    assert!(server.stop().await.success());
    let (journal, kept) = (server.path("data/journal/app"), server.path("kept"));
    copy(&journal, &kept);
    server.start_ready().await;
    cluster.sql("update account set cents = -1 where id = 1").await;
    file.wait_until(PATIENCE, |seen| seen.last().is_some_and(|c| c["after"]["cents"] == -1)).await;
    assert!(server.stop().await.success());
    let (sound, report) = verify(&server, &[]);
    let head = head(&report);
    assert!(sound && verify(&server, &["--expect-head", &head]).0, "{report}");
    // Somebody cuts the last entry off: each byte that is left is sound, the head is another.
    fs::remove_dir_all(&journal).unwrap();
    copy(&kept, &journal);
    assert!(verify(&server, &[]).0, "by itself it is sound");
    let (sound, report) = verify(&server, &["--expect-head", &head]);
    assert!(!sound && report.contains(&head), "{report}");
}

/// Enough rows of random text for several segments.
async fn fill(cluster: &Cluster, file: &FileRecorder, from: usize) {
    let note =
        "(select string_agg(md5(random()::text || n * i), '') from generate_series(1, 30) n)";
    for block in 0..5 {
        let ids = format!("generate_series({0}, {0} + 99) i", from + block * 100);
        cluster.sql(&format!("insert into account select i, 'o', i, {note} from {ids}")).await;
    }
    file.wait_until(PATIENCE, |seen| seen.len() == 500).await;
}

fn segments(journal: &Path) -> Vec<std::path::PathBuf> {
    let entries = fs::read_dir(journal).unwrap().map(|entry| entry.unwrap().path());
    let mut segments: Vec<_> =
        entries.filter(|path| path.extension().is_some_and(|e| e == "segment")).collect();
    segments.sort();
    segments
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}
