//! `walrace tail`: committed changes as they come.

use std::{io::IsTerminal, process::ExitCode};

use super::{Global, instance::Instance};
use crate::{
    config::Config,
    error::{Error, Result},
};

/// Shows committed changes as they come, in colour, until Ctrl-C.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  walrace tail --table 'public.book*' --op update\n  \
                        walrace tail --from start --json | jq .after")]
pub struct Args {
    /// The source; needed only where there are several.
    #[arg(long)]
    source: Option<String>,
    /// Only tables that match this glob over schema.table; may be repeated, `!` takes away.
    #[arg(long = "table", value_name = "GLOB")]
    tables: Vec<String>,
    /// Only these operations: insert, update, delete, read, truncate, message.
    #[arg(long = "op", value_name = "OPERATION", value_delimiter = ',')]
    operations: Vec<String>,
    /// Where to begin: now, start, an offset or a resume token.
    #[arg(long, default_value = "now")]
    from: String,
    /// JSON Lines in the native format instead of lines for people.
    #[arg(long)]
    json: bool,
}

/// Copies the stream to stdout until it ends, the pipe closes or Ctrl-C.
pub async fn run(args: Args, global: &Global) -> Result<ExitCode> {
    let config = &global.load()?;
    let source = only_source(config, args.source.as_deref())?;
    let instance = Instance::find(config).await?;
    let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let style = match (args.json, colour) {
        (true, _) => "json",
        (false, true) => "colour",
        (false, false) => "plain",
    };
    let query = [
        ("from", args.from),
        ("tables", args.tables.join(",")),
        ("operations", args.operations.join(",")),
        ("style", style.to_owned()),
    ];
    let path = format!("/sources/{source}/changes");
    let mut out = std::io::stdout();
    tokio::select! {
        ended = instance.stream(&path, &query, &mut out) => ended.map(|_| ExitCode::SUCCESS),
        _ = tokio::signal::ctrl_c() => Ok(ExitCode::SUCCESS),
    }
}

/// The source that was named, or the only one.
pub fn only_source<'a>(config: &'a Config, named: Option<&'a str>) -> Result<&'a str> {
    let known = || config.source.keys().cloned().collect::<Vec<_>>().join(", ");
    match named {
        Some(name) if config.source.contains_key(name) => Ok(name),
        Some(name) => Err(Error::config(format!("there is no source {name}"))
            .remedy(format!("one of: {}", known()))),
        None if config.source.len() == 1 => Ok(config.source.keys().next().map_or("", |n| n)),
        None => Err(Error::config("there are several sources")
            .remedy(format!("name one with --source: {}", known()))),
    }
}
