//! The `walrace` command.

use std::{process::ExitCode, time::Duration};

use clap::Parser;
use walrace::{
    cli::{self, Cli},
    error::{Class, Classify, Error, Result},
};

/// How long the end waits for threads that block.
const BLOCKED_MAX: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    run(Cli::parse()).unwrap_or_else(|error| cli::report(&error))
}

fn run(cli: Cli) -> Result<ExitCode> {
    rustls::crypto::ring::default_provider()
        .install_default()
        .map_err(|_| Error::bug("a TLS provider was installed before main"))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .class(Class::Retry, || "cannot start the runtime")?;
    let outcome = runtime.block_on(cli.run());
    // A thread that is stuck, in a pipe that nobody reads or at a server that hangs, must not keep
    // the process: whatever it does may be cut off at any point.
    runtime.shutdown_timeout(BLOCKED_MAX);
    outcome
}
