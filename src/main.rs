//! The `walrace` command.

use std::{process::ExitCode, time::Duration};

use clap::Parser;
use walrace::{
    cli::{self, Cli},
    error::{Class, Classify, Error, Result},
};

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
    let code = runtime.block_on(cli.run());
    // A write to a pipe that nobody reads would hold its thread, and us, for ever.
    runtime.shutdown_timeout(Duration::from_secs(1));
    code
}
