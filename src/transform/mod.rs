//! What a sink's rules make of changes, between the journal and the sink: pure, no I/O.

mod filter;

pub use filter::Filter;

use crate::{change::Change, config, error::Result};

/// The rules of one sink beyond its [`Filter`].
#[derive(Debug)]
pub struct Transform {}

impl Transform {
    /// Compiles the rules of the sink `name`. A mistake in one is an error of class `Config` that
    /// names rule, line and column.
    pub fn new(name: &str, sink: &config::Sink) -> Result<Self> {
        let _ = (name, sink);
        Ok(Self {})
    }

    /// Whether every change passes as it is.
    pub fn is_plain(&self) -> bool {
        true
    }

    /// What becomes of one change: nothing where a rule leaves it out, itself, or the parts that
    /// it explodes into, numbered. An error, of class `Data`, makes a dead letter of the change.
    pub fn shape(&mut self, change: Change) -> Result<Vec<Change>> {
        Ok(vec![change])
    }
}
