//! `walrace journal`: what a journal holds, and whether a byte of it was altered.
//!
//! These commands only read, so they work while `walrace run` has the journal open; they see it up
//! to its last commit at the time.

use std::{
    io::{self, BufWriter, Write},
    process::ExitCode,
};

use clap::Subcommand;

use super::{Global, lag::bytes_text, print, tail::only_source};
use crate::{
    config::{Config, Format},
    error::{Class, Classify, Error, Result},
    format::{Encoder, Names},
    journal::{Info, Inspection},
    runtime::journal_options,
};

/// The commands of `walrace journal`.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Show offsets, segments, bytes, progress and gaps
    Info(Which),
    /// Read every byte: checksums, the chain of hashes, offsets without holes
    Verify(Verify),
    /// Print changes as JSON Lines in the native format
    Dump(Dump),
}

/// Which journal.
#[derive(Clone, Debug, clap::Args)]
pub struct Which {
    /// The source; needed only where there are several
    pub source: Option<String>,
    /// JSON instead of lines for people
    #[arg(long)]
    pub json: bool,
}

/// The arguments of `walrace journal verify`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
The head is the hash of the whole chain. Whoever can rewrite the directory can rewrite the chain \
too: keep the head elsewhere, and compare it later with --expect-head on a copy of that age.")]
pub struct Verify {
    /// The source; needed only where there are several
    pub source: Option<String>,
    /// Fail unless the chain ends with this hash
    #[arg(long, value_name = "HASH")]
    pub expect_head: Option<String>,
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
pub async fn run(command: Command, global: &Global) -> Result<ExitCode> {
    let config = global.load()?;
    let work = move || match command {
        Command::Info(which) => info(&config, &which),
        Command::Verify(args) => verify(&config, &args),
        Command::Dump(args) => dump(&config, &args),
    };
    tokio::task::spawn_blocking(work).await.class(Class::Bug, || "reading a journal panicked")?
}

fn open(config: &Config, source: Option<&str>) -> Result<Inspection> {
    Inspection::open(journal_options(config, only_source(config, source)?))
}

fn info(config: &Config, which: &Which) -> Result<ExitCode> {
    let info = open(config, which.source.as_deref())?.info();
    print(&match which.json {
        true => serde_json::to_string_pretty(&info).unwrap_or_default() + "\n",
        false => render(&info),
    })?;
    Ok(ExitCode::SUCCESS)
}

fn render(info: &Info) -> String {
    let progress = info.progress.map_or("none yet".to_owned(), |at| at.to_string());
    let mut text = format!(
        "lineage      {} (incarnation {})\noffsets      {} to {} ({} changes)\non disk      {} in \
         {} segments\nprogress     {progress}\n",
        info.lineage,
        info.incarnation,
        info.start,
        info.end,
        info.end - info.start,
        bytes_text(info.bytes),
        info.segments,
    );
    if let Some(origin) = &info.origin {
        text.push_str(&format!(
            "filled from  database {} of cluster {} by slot {}\n",
            origin.database, origin.system, origin.slot
        ));
    }
    for gap in &info.gaps {
        text.push_str(&format!("GAP          {} to {}: {}\n", gap.from, gap.to, gap.reason));
    }
    text
}

fn verify(config: &Config, args: &Verify) -> Result<ExitCode> {
    let report = open(config, args.source.as_deref())?.verify()?;
    print(&format!(
        "sound: {} changes (offsets {} to {}) in {} blocks, {} segments, {}\nhead {}\n",
        report.changes,
        report.start,
        report.end,
        report.blocks,
        report.segments,
        bytes_text(report.bytes),
        report.head
    ))?;
    match &args.expect_head {
        Some(expected) if !expected.eq_ignore_ascii_case(&report.head) => Err(Error::damaged(
            format!("the chain does not end with {expected}"),
        )
        .remedy("it grew since that head was kept, or it was rewritten: compare with a copy")),
        _ => Ok(ExitCode::SUCCESS),
    }
}

fn dump(config: &Config, args: &Dump) -> Result<ExitCode> {
    let inspection = open(config, args.source.as_deref())?;
    let mut encoder = Encoder::new(Format::Native, &Names::default());
    let mut out = BufWriter::new(io::stdout().lock());
    let (mut line, to) = (Vec::new(), args.to.unwrap_or(u64::MAX));
    for change in inspection.dump(args.from) {
        let change = change?;
        if change.offset >= to {
            break;
        }
        line.clear();
        encoder.encode(&change, &mut line)?;
        line.push(b'\n');
        match out.write_all(&line) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => break,
            written => written.class(Class::Config, || "cannot write to standard output")?,
        }
    }
    let _ = out.flush(); // a reader that has left, as `head` does, is no failure
    Ok(ExitCode::SUCCESS)
}
