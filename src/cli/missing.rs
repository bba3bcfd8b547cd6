//! `walrace missing`: which committed changes a sink does not have yet.

use std::process::ExitCode;

use super::{Global, instance::Instance, offline::Offline};
use crate::{
    config::{Config, Format},
    error::Result,
    format::{Encoder, Names},
    runtime::Status,
};

/// Lists the committed changes in the journal that a sink does not have yet.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The sink.
    #[arg(long)]
    sink: String,
    /// JSON Lines in the native format instead of lines for people.
    #[arg(long)]
    json: bool,
}

/// Prints them to stdout, and to stderr how many there are and what this cannot tell. Exit code 0
/// when there is none, 3 when there are some.
pub async fn run(args: Args, global: &Global) -> Result<ExitCode> {
    let config = &global.load()?;
    let (count, note) = match Instance::running(config).await? {
        Some(instance) => ask(&instance, &args).await?,
        None => look(config, &args).await?,
    };
    anstream::eprintln!("sink {} is missing {count} committed changes", args.sink);
    if !note.is_empty() {
        anstream::eprintln!("note: {note}");
    }
    Ok(if count == 0 { ExitCode::SUCCESS } else { ExitCode::from(3) })
}

async fn ask(instance: &Instance, args: &Args) -> Result<(usize, String)> {
    let style = if args.json { "json" } else { "plain" };
    let path = format!("/sinks/{}/missing", args.sink);
    let mut out = Count { out: std::io::stdout(), lines: 0 };
    instance.stream(&path, &[("style", style.to_owned())], &mut out).await?;
    Ok((out.lines, note(&instance.status().await?, &args.sink)))
}

async fn look(config: &Config, args: &Args) -> Result<(usize, String)> {
    let encoder = match args.json {
        true => Encoder::new(Format::Native, &Names::default()),
        false => Encoder::pretty(false),
    };
    Offline::open(config).await?.missing(&args.sink, encoder).await
}

/// What the journal cannot list: changes that were never captured, and those that it dropped.
fn note(status: &Status, sink: &str) -> String {
    let Some(sink) = status.sinks.iter().find(|status| status.name == sink) else {
        return String::new();
    };
    let source = status.sources.iter().find(|source| source.name == sink.source);
    let waits = source.and_then(|source| Some((&source.name, source.state.reason()?)));
    let mut notes = Vec::new();
    if let Some((source, reason)) = waits {
        notes.push(format!("source {source} is not captured now: {reason}"));
    }
    notes.extend(parked(&sink.name, sink.parked_changes));
    let gaps = source.map_or(0, |source| source.journal.gaps.len());
    notes.extend(holes(sink.lost_changes, gaps));
    notes.join("; ")
}

/// What was read for the sink already, and is not there; its last ones may be listed as well, until
/// progress has passed them.
pub(super) fn parked(sink: &str, changes: u64) -> Option<String> {
    let text = format!("{changes} are parked: `walrace dlq list --sink {sink}` lists them");
    (changes > 0).then_some(text)
}

/// What no reader of the journal can list, because the journal does not have it.
pub(super) fn holes(lost: u64, gaps: usize) -> Vec<String> {
    let mut notes = Vec::new();
    if lost > 0 {
        notes.push(format!("{lost} changes were dropped from the journal before it had read them"));
    }
    if gaps > 0 {
        notes.push(format!("the journal has gaps ({gaps}): `walrace journal info` names them"));
    }
    notes
}

struct Count<W> {
    out: W,
    lines: usize,
}

impl<W: std::io::Write> std::io::Write for Count<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.out.write(bytes)?;
        let passed = bytes.get(..written).unwrap_or_default();
        self.lines += memchr::memchr_iter(b'\n', passed).count();
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.out.flush()
    }
}
