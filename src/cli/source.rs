//! `walrace source`: the databases that are captured.

use std::process::ExitCode;

use clap::Subcommand;

use super::{Global, print};
use crate::{config::Config, error::Result};

/// The commands of `walrace source`.
#[derive(Clone, Copy, Debug, Subcommand)]
pub enum Command {
    /// List the kinds of database that can be captured
    Kinds,
}

/// Runs one of them.
pub async fn run(command: Command, _global: &Global) -> Result<ExitCode> {
    match command {
        Command::Kinds => print(&kinds())?,
    }
    Ok(ExitCode::SUCCESS)
}

fn kinds() -> String {
    let line = |(name, doc): (String, String)| format!("{name}  {doc}\n");
    Config::source_kinds().into_iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_kinds_are_those_of_the_configuration() {
        assert_eq!(super::kinds(), "postgres  PostgreSQL 14 to 18, by logical replication.\n");
    }
}
