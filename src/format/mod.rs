//! change -> bytes.
