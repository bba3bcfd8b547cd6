//! Journals of every released format stay readable: a directory that an older version wrote, and
//! what it holds as JSON.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test may panic"
)]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use serde_json::{Value as Json, json};
use walrace::{
    change::{Batch, Before, Change, Message, Op, Row, Value},
    disk::RealDisk,
    journal::{Gap, Inspection, Journal, Options, Origin, Report, Succession},
};

use crate::journal::{block_on, committed, position, read_all, row, table, transaction};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/journal-1")
}

fn options(directory: &Path) -> Options {
    Options {
        directory: directory.to_owned(),
        disk: RealDisk::shared(),
        segment_bytes_max: 1_000,
        ring_bytes_max: 0,
        reserve_bytes: 0,
    }
}

fn describe_value(value: Value<'_>) -> Json {
    match value {
        Value::Null => Json::Null,
        Value::Unchanged => json!({ "unchanged": true }),
        Value::Text(text) => json!(String::from_utf8_lossy(text)),
    }
}

/// Everything that a change carries.
fn describe(change: &Change) -> Json {
    let row = |row: &Row| row.values().map(describe_value).collect::<Vec<_>>();
    let (kind, before) = match &change.before {
        Before::Nothing => ("nothing", None),
        Before::Key(old) => ("key", Some(row(old))),
        Before::Full(old) => ("full", Some(row(old))),
    };
    json!({
        "offset": change.offset,
        "op": change.op,
        "index": change.index,
        "closes_transaction": change.closes_transaction,
        "xid": change.transaction.xid,
        "commit_lsn": change.transaction.commit_lsn.to_string(),
        "commit_time": change.transaction.commit_time.to_string(),
        "table": change.table.as_deref().map(ToString::to_string),
        "before_kind": kind,
        "before": before,
        "after": change.after.as_ref().map(row),
        "message": change.message.as_ref().map(|message| json!({
            "prefix": message.prefix,
            "content": hex::encode(&message.content),
            "transactional": message.transactional,
        })),
    })
}

fn whole(changes: &[Change], info: &walrace::journal::Info, report: &Report) -> Json {
    let tables: BTreeMap<String, _> =
        changes.iter().flat_map(|change| &change.table).map(|t| (t.to_string(), &**t)).collect();
    let described: Vec<Json> = changes.iter().map(describe).collect();
    json!({ "info": info, "report": report, "tables": tables, "changes": described })
}

#[test]
fn a_journal_of_format_1_reads_as_it_was_written() {
    if !folder().exists() && std::env::var_os("WALRACE_GENERATE").is_some() {
        write_the_fixture();
    }
    let expected = fs::read_to_string(folder().join("expected.json")).unwrap();
    let expected: Json = serde_json::from_str(&expected).unwrap();
    let inspection = Inspection::open(options(&folder())).unwrap();
    let dumped: Vec<Change> = inspection.dump(0).collect::<Result<_, _>>().unwrap();
    let report = inspection.verify().unwrap();
    assert_eq!(whole(&dumped, &inspection.info(), &report), expected);

    // And it can be gone on with.
    let copy = tempfile::tempdir().unwrap();
    for file in fs::read_dir(folder()).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), copy.path().join(file.file_name())).unwrap();
    }
    let journal = Journal::open(options(copy.path())).unwrap();
    block_on(journal.append(committed(90, 2, &table("orders")))).unwrap();
    let changes = block_on(read_all(&journal, journal.start()));
    let dumped_before = changes.len() - 2;
    assert_eq!(
        changes[..dumped_before].iter().map(describe).collect::<Vec<_>>()[..],
        expected["changes"].as_array().unwrap()[..]
    );
    journal.verify().unwrap();
}

/// With `WALRACE_GENERATE` set and no fixture there, as once, when the format was made.
fn write_the_fixture() {
    assert!(!folder().exists(), "the fixture of a released format never changes");
    let text = |text: &str| text.to_owned();
    let lineage = uuid::Uuid::from_u128(0x0f1e_2d3c_4b5a_6978_8796_a5b4_c3d2_e1f0);
    let succession = Succession { lineage, incarnation: 3, first_offset: 40 };
    let journal = Journal::open_as(options(&folder()), succession).unwrap();
    let append = |batch| block_on(journal.append(batch)).unwrap();
    let origin = Origin {
        system: text("7301"),
        database: text("app"),
        slot: text("walrace_app"),
        ..Origin::default()
    };
    block_on(journal.set_origin(origin)).unwrap();
    let (orders, lines) = (table("orders"), table("order_lines"));
    append(committed(1, 2, &orders));
    let mut batch = committed(2, 6, &lines);
    let old = row(1, "old");
    let changes = &mut batch.changes;
    (changes[0].op, changes[0].before) = (Op::Update, Before::Full(old.clone()));
    (changes[1].op, changes[1].before) = (Op::Update, Before::Key(old.clone()));
    changes[1].after = Some(Row::from_values([Value::Text(b"1"), Value::Unchanged]));
    (changes[2].op, changes[2].before, changes[2].after) = (Op::Delete, Before::Key(old), None);
    (changes[3].op, changes[3].after) = (Op::Truncate, None);
    changes[4].op = Op::Read;
    changes[4].after = Some(Row::from_values([Value::Null, Value::Text(&[0xC3, 0xA9])]));
    let content = Bytes::from_static(b"\x00\xFF{}");
    let message = Message { prefix: text("outbox"), content, transactional: true };
    (changes[5].op, changes[5].message) = (Op::Message, Some(Arc::new(message)));
    (changes[5].table, changes[5].after) = (None, None);
    append(batch);
    append(Batch { changes: Vec::new(), position: Some(position(3)) });
    let gap = Gap { from: position(3), to: position(4), reason: text("the slot was made anew") };
    block_on(journal.record_gap(gap)).unwrap();
    let long = transaction(5, 30, &orders);
    for (place, piece) in long.chunks(10).enumerate() {
        let position = (place == 2).then(|| position(5));
        append(Batch { changes: piece.to_vec(), position });
    }
    for number in 6..12 {
        append(committed(number, 3, if number % 2 == 0 { &orders } else { &lines }));
    }
    let changes = block_on(read_all(&journal, 40));
    let json = whole(&changes, &journal.info(), &journal.verify().unwrap());
    drop(journal);
    fs::remove_file(folder().join("lock")).unwrap();
    fs::write(folder().join("expected.json"), serde_json::to_string(&json).unwrap()).unwrap();
}
