//! Where log lines go: to standard error, for people or as JSON.

use std::io::{self, IsTerminal};

use tracing_subscriber::{EnvFilter, fmt};

use crate::{
    config::{Log, LogFormat},
    error::{Class, Classify, Error, Result},
};

/// What is logged where nobody says. The clients of queues tell of each connection, and one of them
/// shows whole messages.
const INFO: &str = "info,async_nats=warn,lapin=error";
const VERBOSE: &str = "info,walrace=debug,async_nats=warn,lapin=error";

/// Starts logging; once in a process.
pub fn start(log: &Log) -> Result<()> {
    let filter = log.level.as_deref().unwrap_or(INFO);
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
        1 => Some(VERBOSE),
        2 => Some("debug"),
        _ => Some("trace"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_v_asks_for_more_and_all_are_filters() {
        assert_eq!(level_of(0), None);
        for level in [1, 2, 3, 9].map(level_of) {
            EnvFilter::builder().parse(level.unwrap()).unwrap();
        }
    }

    #[test]
    fn a_filter_that_cannot_be_read_is_named() {
        let log = Log { level: Some("walrace=loud".into()), ..Log::default() };
        let error = start(&log).unwrap_err();
        assert_eq!(error.class(), Class::Config);
        assert!(error.to_string().contains("walrace=loud"), "{error}");
    }
}
