//! `walrace journal`: what a journal holds, and whether a byte of it was altered.

use std::process::ExitCode;

use clap::Subcommand;

use super::Global;
use crate::error::Result;

/// The commands of `walrace journal`.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Show offsets, segments, bytes, progress and gaps
    Info(Which),
    /// Walk every byte: checksums, the chain of hashes, dense offsets
    Verify(Which),
    /// Print changes as JSON Lines
    Dump(Dump),
}

/// Which journal.
#[derive(Clone, Debug, clap::Args)]
pub struct Which {
    /// The source; needed only where there are several
    pub source: Option<String>,
}

/// The arguments of `walrace journal dump`.
#[derive(Clone, Debug, clap::Args)]
pub struct Dump {
    /// The source; needed only where there are several
    pub source: Option<String>,
    /// The first offset
    #[arg(long, default_value_t = 0)]
    pub from: u64,
    /// The offset to end before
    #[arg(long)]
    pub to: Option<u64>,
}

/// Runs one of them.
pub async fn run(_command: Command, _global: &Global) -> Result<ExitCode> {
    Ok(ExitCode::SUCCESS)
}
