//! Whatever a server sends, the decoder refuses it or gives rows of whole values.
#![no_main]

use libfuzzer_sys::fuzz_target;
use walrace::source::postgres::pgoutput::{Message, decode, decode_control, decode_part};

fuzz_target!(|bytes: &[u8]| {
    let _ = decode_control(&bytes.to_vec().into());
    let _ = decode_part(bytes.to_vec().into());
    match decode(bytes.to_vec().into()) {
        Ok(Message::Insert { after, .. } | Message::Update { after, .. }) => {
            assert_eq!(after.values().count(), after.len());
        }
        Ok(_) | Err(_) => {}
    }
});
