//! Where log lines go: to standard error, for people or as JSON.

use std::io::{self, IsTerminal};

use tracing_subscriber::{EnvFilter, fmt};

use crate::{
    config::{Log, LogFormat},
    error::{Class, Classify, Error, Result},
};

/// Starts logging; once in a process.
pub fn start(log: &Log) -> Result<()> {
    let filter = log.level.as_deref().unwrap_or("info");
    let filter = EnvFilter::builder()
        .parse(filter)
        .class(Class::Config, || format!("`log.level` is not a filter: {filter}"))?;
    let builder = fmt().with_env_filter(filter).with_writer(io::stderr);
    let started = match log.format {
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
        LogFormat::Human => {
            let colour = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
            builder.with_ansi(colour).with_target(false).try_init()
        }
    };
    started.map_err(|error| Error::bug(format!("cannot start logging: {error}")))
}

/// The filter that a number of `-v` asks for.
pub(crate) fn level_of(verbose: u8) -> Option<&'static str> {
    match verbose {
        0 => None,
        1 => Some("info,walrace=debug"),
        2 => Some("debug"),
        _ => Some("trace"),
    }
}
