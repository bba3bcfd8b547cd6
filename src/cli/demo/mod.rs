//! `walrace demo`: all of it in a temporary folder, and at the end the proof.
//!
//! ```text
//!  load ──► PostgreSQL (private) ──► Walrace (in this process) ──► changes.jsonl ──► replay ─┐
//!   │                                            └──► queue ──► live tail, latency           │
//!   └── counts what the server acknowledged ────────────► compare ◄── tables, row for row ◄──┘
//! ```

mod booking;
mod cluster;
mod interrupt;
mod load;
mod proof;
mod screen;
mod server_files;
mod show;
mod tally;
mod verdict;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use self::{
    cluster::Cluster,
    interrupt::Interrupt,
    proof::Replay,
    screen::{Screen, Tone},
    show::{Played, Show},
    verdict::Verdict,
};
use super::{Global, log};
use crate::{
    config::{Config, Environment, Log, escape},
    error::{Class, Classify, Result},
    runtime::Walrace,
};

/// The code of a command that a signal ended before it had anything to say.
const INTERRUPTED: u8 = 130;

/// The names in the configuration.
const SOURCE: &str = "harbor";
const FILE_SINK: &str = "changes";
const QUEUE_SINK: &str = "tail";

/// The arguments of `walrace demo`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
It needs no configuration and no database: it starts a PostgreSQL of its own, and takes it away \
again. The exit code is 0 only if every committed change arrived once and the replayed changes \
equal the tables.

Examples:
  walrace demo
  walrace demo --seconds 20 --rate 500
  walrace demo --seconds 5 --keep      # then look at changes.jsonl and the journal")]
pub struct Args {
    /// End after this many seconds [default: at Ctrl-C]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub seconds: Option<u64>,
    /// Transactions a second
    #[arg(long, value_name = "TX_PER_SECOND", default_value_t = 150)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub rate: u32,
    /// Keep the folder with the changes, the journal and the database
    #[arg(long)]
    pub keep: bool,
}

/// Runs the demo to its end, and cleans up however that comes.
pub async fn run(args: Args, global: &Global) -> Result<ExitCode> {
    let level = log::level_of(global.verbose).unwrap_or("error");
    let format = global.log_format.unwrap_or_default();
    log::start(&Log { level: Some(level.to_owned()), format })?;
    let interrupt = Interrupt::listen()?;
    let mut screen = Screen::new();
    screen.doing("starting a private PostgreSQL ...");
    let keep = args.keep;
    let cluster = tokio::select! {
        cluster = blocking(move || Cluster::start(keep)) => cluster?,
        () = interrupt.asked() => return Ok(ExitCode::from(INTERRUPTED)),
    };
    let outcome = in_cluster(&args, &cluster, (&mut screen, &interrupt)).await;
    screen.doing("stopping PostgreSQL ...");
    let folder = cluster.path().to_owned();
    blocking(move || {
        drop(cluster);
        Ok(())
    })
    .await?;
    screen.end_status();
    if keep {
        screen.say(&format!("\n  kept in {}:", folder.display()));
        screen
            .say("    changes.jsonl  walrace.toml  data/ (the journal)  postgres/ (the database)");
    }
    outcome
}

async fn in_cluster(
    args: &Args,
    cluster: &Cluster,
    (screen, interrupt): (&mut Screen, &Interrupt),
) -> Result<ExitCode> {
    let url = cluster.url();
    blocking(move || booking::create(&url)).await?;
    let walrace = Walrace::start(configure(cluster)?).await?;
    introduce(screen, cluster, args);
    let mut show = Show::new(screen, &walrace, (cluster.url(), args.rate));
    let played = tokio::select! {
        played = show.play(args.seconds, interrupt) => played,
        () = interrupt.insisted() => Ok(None),
    };
    walrace.stop().await;
    let Some(played) = played? else {
        screen.say("  ended before there was anything to prove");
        return Ok(ExitCode::from(INTERRUPTED));
    };
    screen.doing("replaying changes.jsonl and comparing it with the tables ...");
    let verdict = prove(cluster, played).await?;
    screen.end_status();
    for line in verdict.lines(screen) {
        screen.say(&line);
    }
    Ok(if verdict.holds() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Writes the configuration as a user would, beside the data, and loads it; variables of this
/// process, meant for a real one, have no part in it.
fn configure(cluster: &Cluster) -> Result<Config> {
    let folder = cluster.path();
    let text = |value: &str| serde_json::Value::from(escape(value)).to_string();
    let path = |name: &str| text(&folder.join(name).display().to_string());
    let toml = format!(
        r#"data_dir = {data_dir}

[source.{SOURCE}]
kind = "postgres"
url = {url}
tables = ["public.*"]

[sink.{FILE_SINK}]
kind = "file"
path = {file}

[sink.{QUEUE_SINK}]
kind = "queue"

# Small, for a demo: no more of the journal is kept than the sinks need.
[journal]
age_ms_max = 10000
segment_bytes_max = 8388608
reserve_bytes = 16777216

[http]
listen = ""
"#,
        data_dir = path("data"),
        url = text(&cluster.url()),
        file = path(&format!("{FILE_SINK}.jsonl")),
    );
    let file = folder.join("walrace.toml");
    std::fs::write(&file, &toml)
        .class(Class::Config, || format!("cannot write {}", file.display()))?;
    Config::parse_in(&toml, &file.display().to_string(), &Environment::default())
}

fn introduce(screen: &mut Screen, cluster: &Cluster, args: &Args) {
    screen.end_status();
    let end = match args.seconds {
        Some(seconds) => format!("ends after {seconds} s, or at Ctrl-C"),
        None => "Ctrl-C ends it".to_owned(),
    };
    let row = |name: &str, text: String| format!("  {}  {text}", screen.paint(Tone::Dim, name));
    let lines = [
        screen.paint(Tone::Bold, "Walrace demo: the booking desk of a cruise line"),
        row(
            "database",
            format!("PostgreSQL {}, private, in a temporary folder", cluster.version()),
        ),
        row(
            "load    ",
            format!("{} transactions a second over {} tables", args.rate, booking::TABLES.len()),
        ),
        row("sinks   ", "changes.jsonl for the proof, a queue for what you see here".to_owned()),
        row("end     ", format!("{end}; then comes the proof")),
        String::new(),
    ];
    for line in lines {
        screen.say(&line);
    }
}

/// Replays the file and compares: what was lost, what came twice, what should not have come.
async fn prove(cluster: &Cluster, played: Played) -> Result<Verdict> {
    let (url, file) = (cluster.url(), changes_file(cluster.path()));
    let version = cluster.version().to_owned();
    blocking(move || {
        let mut replay = Replay::of(&file, &played.undone)?;
        let comparison = replay.compare(&url)?;
        Ok(Verdict { version, played, replay, comparison })
    })
    .await
}

fn changes_file(folder: &Path) -> PathBuf {
    folder.join(format!("{FILE_SINK}.jsonl"))
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work).await.class(Class::Bug, || "a task of the demo died")?
}
