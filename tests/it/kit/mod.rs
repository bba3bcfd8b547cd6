//! What the tests stand on.

pub(crate) mod power_cut;
