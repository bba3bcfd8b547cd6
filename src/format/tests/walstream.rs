//! The records of WalStream.

use std::sync::Arc;

use super::{bookings, change, column, message, names, row};
use crate::{
    change::{Before, Change, Op},
    config::Format,
    format::{self, Encoder},
};

/// WalStream's record as its own readers know it.
#[derive(Clone, PartialEq, Eq, prost::Message)]
struct OldRecord {
    #[prost(string, tag = "1")]
    lsn: String,
    #[prost(int64, tag = "2")]
    commit_time: i64,
    #[prost(string, tag = "3")]
    table: String,
    #[prost(string, tag = "4")]
    operation: String,
    #[prost(map = "string, string", tag = "5")]
    old: std::collections::HashMap<String, String>,
    #[prost(map = "string, string", tag = "6")]
    new: std::collections::HashMap<String, String>,
}

#[test]
fn walstream_reads_its_record_and_nulls_are_told_beside_it() {
    use prost::Message as _;
    let mut table = (*bookings()).clone();
    table.columns[1] = column("status", 16, false);
    let values = [Some("8841"), Some("t"), None, Some("2200.00"), Some("a")];
    let change = Change {
        table: Some(Arc::new(table)),
        ..change(Op::Update, Before::Nothing, Some(row(values)))
    };
    let mut out = Vec::new();
    let mut encoder = Encoder::new(Format::Walstream, &names());
    assert!(encoder.encode(&change, &mut out).unwrap());
    let old = OldRecord::decode(out.as_slice()).unwrap();
    assert_eq!((old.lsn.as_str(), old.commit_time), ("23816848", 1_775_466_862_000));
    assert_eq!((old.table.as_str(), old.operation.as_str()), ("public.bookings", "UPDATE"));
    assert_eq!(old.old, [("booking_id".to_owned(), "8841".to_owned())].into());
    assert_eq!(old.new["status"], "True");
    assert_eq!(old.new["amount"], "2200.00");
    assert!(!old.new.contains_key("confirmed_at"));
    let new = format::ChangeRecord::decode(out.as_slice()).unwrap();
    assert_eq!(new.new_nulls, ["confirmed_at"]);
    assert_eq!(new.idempotency_key, change.idempotency_key());
    let mut key = Vec::new();
    assert!(encoder.encode_key(&change, &mut key).unwrap());
    assert_eq!(key, b"public.bookings");
    assert!(!encoder.encode(&message(b"x"), &mut Vec::new()).unwrap());
}
