//! Whatever a server sends, the decoder refuses it or gives events, and never panics.
#![no_main]

use libfuzzer_sys::fuzz_target;
use walrace::source::postgres::wal2json::{Event, parse};

fuzz_target!(|bytes: &[u8]| {
    for event in parse(bytes).unwrap_or_default() {
        if let Event::Row(row) = event {
            // A value is no longer than what stands for it in the line, but for the `\\x`.
            let values = row.columns.iter().filter_map(|cell| cell.value.as_ref());
            assert!(values.map(|value| value.len()).sum::<usize>() <= 2 * bytes.len());
        }
    }
});
