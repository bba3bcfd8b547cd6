//! Batch -> Batch, without I/O: what a sink wants to see of a change.

pub use filter::Filter;

mod filter;
