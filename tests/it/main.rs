//! Walrace through its public surface. One binary.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a test that meets the unexpected fails at once, and says where"
)]

mod sink;
