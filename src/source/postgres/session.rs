//! Plain statements, for commands that work on a database beside its stream.

use super::{
    url::Target,
    wire::{Client, Purpose, TextRow},
};
use crate::{config::Secret, error::Result};

/// A blocking session; use it on a thread that may block.
pub struct Session(Client);

impl Session {
    /// Connects as the URL of a source says.
    pub fn connect(url: &str) -> Result<Self> {
        let target = Target::parse(&Secret::new(url))?;
        Ok(Self(Client::connect(&target, Purpose::Sql)?))
    }

    /// Runs one statement, or several separated by `;`: the rows of all, as text, `None` for NULL.
    pub fn execute(&mut self, sql: &str) -> Result<Vec<TextRow>> {
        Ok(self.0.query(sql)?)
    }
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Session")
    }
}
