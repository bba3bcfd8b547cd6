//! `walrace missing`: which committed changes a sink does not have yet.

use std::process::ExitCode;

use super::{Global, instance::Instance};
use crate::error::Result;

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

/// Prints them to stdout, and to stderr how many there are. Exit code 0 when there is none, 3 when
/// there are some.
pub async fn run(args: Args, global: &Global) -> Result<ExitCode> {
    let config = &global.load()?;
    let instance = Instance::find(config).await?;
    let style = if args.json { "json" } else { "plain" };
    let path = format!("/sinks/{}/missing", args.sink);
    let mut out = Count { out: std::io::stdout(), lines: 0 };
    instance.stream(&path, &[("style", style.to_owned())], &mut out).await?;
    anstream::eprintln!("sink {} is missing {} committed changes", args.sink, out.lines);
    Ok(if out.lines == 0 { ExitCode::SUCCESS } else { ExitCode::from(3) })
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
