//! `walrace backfill`: rows that tables have already, read as changes.

use std::{io::IsTerminal, process::ExitCode, time::Duration};

use clap::Subcommand;
use comfy_table::{CellAlignment, Table, presets::UTF8_HORIZONTAL_ONLY};
use serde_json::Value;

use super::{
    Global,
    instance::{Instance, Method},
    lag::bytes_text,
    print,
    sink::user,
};
use crate::{
    api::{Asked, Reason},
    catalog::BackfillState,
    error::{Error, Result},
    runtime::BackfillStatus,
    source::postgres::backfill::PlannedTable,
};

/// The commands of `walrace backfill`.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Read the rows of tables; the stream goes on meanwhile
    Start(Start),
    /// List backfills with how far they are
    List(List),
    /// Follow one until it ends
    Watch(One),
    /// Stop reading; `resume` goes on where it was
    Pause(Named),
    /// Go on with one that is paused or has failed
    Resume(Named),
    /// Give one up for good; what was read stays in the journal
    Cancel(Named),
}

/// The arguments of `walrace backfill start`.
#[derive(Clone, Debug, clap::Args)]
pub struct Start {
    /// Globs over schema.table; a leading `!` takes away [default: every table that is captured]
    pub tables: Vec<String>,
    /// The source [default: that of the sink, or the only one]
    #[arg(long)]
    pub source: Option<String>,
    /// For this sink alone [default: for every sink]
    #[arg(long)]
    pub sink: Option<String>,
    /// Only rows that fulfil this SQL condition
    #[arg(long = "where", value_name = "SQL")]
    pub filter: Option<String>,
    /// Only these columns, separated by commas; the others are null
    #[arg(long, value_delimiter = ',')]
    pub columns: Option<Vec<String>>,
    /// Say what would be read, and read nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Follow it until it ends
    #[arg(long, conflicts_with = "dry_run")]
    pub watch: bool,
    /// The reason, which is written down
    #[arg(long)]
    pub why: Option<String>,
}

/// The arguments of `walrace backfill list`.
#[derive(Clone, Debug, clap::Args)]
pub struct List {
    /// JSON, as `GET /backfills` has it
    #[arg(long)]
    pub json: bool,
}

/// Which backfill.
#[derive(Clone, Debug, clap::Args)]
pub struct One {
    /// Its number
    pub id: u64,
}

/// Which backfill, and what for.
#[derive(Clone, Debug, clap::Args)]
pub struct Named {
    /// Its number
    pub id: u64,
    /// The reason, which is written down
    #[arg(long)]
    pub why: Option<String>,
}

/// How often `watch` looks.
const LOOK: Duration = Duration::from_millis(250);

/// Runs one of them on the Walrace that runs on `data_dir`.
pub async fn run(command: Command, global: &Global) -> Result<ExitCode> {
    let instance = Instance::find(&global.load()?).await?;
    match command {
        Command::Start(args) => start(&instance, args).await,
        Command::List(List { json }) => {
            let all: Vec<BackfillStatus> = instance.read("/backfills", &[]).await?;
            let text = match json {
                true => serde_json::to_string_pretty(&all).unwrap_or_default(),
                false => render(&all),
            };
            print(&format!("{text}\n"))?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Watch(One { id }) => watch(&instance, id).await,
        Command::Pause(named) => change(&instance, &named, "pause").await,
        Command::Resume(named) => change(&instance, &named, "resume").await,
        Command::Cancel(named) => change(&instance, &named, "cancel").await,
    }
}

async fn start(instance: &Instance, args: Start) -> Result<ExitCode> {
    let Start { tables, source, sink, filter, columns, dry_run, watch: follow, why } = args;
    let reason = Reason { who: Some(user()), why };
    let asked = Asked { source, sink, tables, filter, columns, reason };
    if dry_run {
        let planned: Vec<PlannedTable> =
            instance.ask(Method::POST, "/backfills/plan", &asked).await?;
        print(&format!("{}\n", render_plan(&planned)))?;
        return Ok(ExitCode::SUCCESS);
    }
    let reply: Value = instance.ask(Method::POST, "/backfills", &asked).await?;
    let id = reply.get("id").and_then(Value::as_u64).unwrap_or_default();
    print(&format!("backfill {id} begins\n"))?;
    if follow {
        return watch(instance, id).await;
    }
    print(&format!("  `walrace backfill watch {id}` follows it\n"))?;
    Ok(ExitCode::SUCCESS)
}

async fn change(instance: &Instance, named: &Named, action: &str) -> Result<ExitCode> {
    let reason = Reason { who: Some(user()), why: named.why.clone() };
    let path = format!("/backfills/{}/{action}", named.id);
    let _: Value = instance.ask(Method::POST, &path, &reason).await?;
    let what = match action {
        "pause" => "is paused",
        "resume" => "goes on",
        _ => "is cancelled",
    };
    print(&format!("backfill {} {what}\n", named.id))?;
    Ok(ExitCode::SUCCESS)
}

/// Follows a backfill: on a terminal by a bar, else by a line whenever a tenth more is done.
async fn watch(instance: &Instance, id: u64) -> Result<ExitCode> {
    let terminal = std::io::stderr().is_terminal();
    let mut told = None;
    loop {
        let status: BackfillStatus = instance.read(&format!("/backfills/{id}"), &[]).await?;
        let tenth = share(&status) / 10;
        let ended = !matches!(status.state, BackfillState::Queued | BackfillState::Running);
        if terminal {
            anstream::eprint!("\r\x1b[2K{}", bar(&status));
        } else if told != Some(tenth) || ended {
            anstream::eprintln!("{}", bar(&status));
        }
        told = Some(tenth);
        if ended {
            if terminal {
                anstream::eprintln!();
            }
            return match status.state {
                BackfillState::Done => Ok(ExitCode::SUCCESS),
                state => {
                    let reason = status.reason.unwrap_or_default();
                    let what = format!("backfill {id} is {}: {reason}", state.word());
                    Err(Error::config(what)
                        .remedy(format!("`walrace backfill resume {id}` goes on with it")))
                }
            };
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Hundredths of the blocks that are done.
fn share(status: &BackfillStatus) -> u64 {
    match (status.blocks, status.state) {
        (_, BackfillState::Done) => 100,
        (0, _) => 0,
        (blocks, _) => status.blocks_done * 100 / blocks,
    }
}

/// One line: how far it is, how fast, and how long it will take.
fn bar(status: &BackfillStatus) -> String {
    const WIDTH: u64 = 24;
    let share = share(status);
    let full = usize::try_from(share * WIDTH / 100).unwrap_or(0);
    let empty = usize::try_from(WIDTH).unwrap_or(0).saturating_sub(full);
    let mut line = format!(
        "backfill {}  {}{} {share:>3} %  {} rows, {}",
        status.id,
        "█".repeat(full),
        "░".repeat(empty),
        status.rows,
        bytes_text(status.bytes),
    );
    if status.state == BackfillState::Running {
        if let Some(rate) = status.rows_per_second.filter(|rate| *rate > 0) {
            line.push_str(&format!(", {rate} rows/s"));
        }
        if let Some(left) = status.seconds_left {
            line.push_str(&format!(", {} left", time_text(left)));
        }
    }
    match &status.reason {
        Some(reason) => format!("{line}  {}: {reason}", status.state.word()),
        None => line,
    }
}

/// Seconds for people: `4 min 10 s`.
fn time_text(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
    }
}

/// A table of backfills for people.
pub fn render(all: &[BackfillStatus]) -> String {
    if all.is_empty() {
        return "no backfill was asked for; `walrace backfill start` begins one".to_owned();
    }
    let mut table = Table::new();
    let head = ["backfill", "source", "for", "tables", "state", "done", "rows", "bytes", "left"];
    table.load_style(UTF8_HORIZONTAL_ONLY).set_header(head);
    for column in table.column_iter_mut().skip(5) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    for status in all {
        let tables = match status.asked.tables.as_slice() {
            [] => "all".to_owned(),
            tables => tables.join(" "),
        };
        table.add_row([
            status.id.to_string(),
            status.asked.source.clone(),
            status.asked.sink.clone().unwrap_or_else(|| "every sink".to_owned()),
            tables,
            status.state.word().to_owned(),
            format!("{} %", share(status)),
            status.rows.to_string(),
            bytes_text(status.bytes),
            status.seconds_left.map(time_text).unwrap_or_default(),
        ]);
    }
    let mut text = table.to_string();
    for status in all.iter().filter(|status| !status.state.has_ended()) {
        if let Some(reason) = &status.reason {
            let (id, state) = (status.id, status.state.word());
            text.push_str(&format!("\n! backfill {id} is {state}: {reason}"));
        }
    }
    text
}

/// What would be read.
fn render_plan(planned: &[PlannedTable]) -> String {
    let mut table = Table::new();
    let head = ["table", "rows (estimate)", "on disk", "out of line", "parts", "time"];
    table.load_style(UTF8_HORIZONTAL_ONLY).set_header(head);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    for one in planned {
        table.add_row([
            one.name.clone(),
            one.rows.to_string(),
            bytes_text(one.bytes),
            bytes_text(one.toast_bytes),
            one.parts.to_string(),
            one.seconds.map(time_text).unwrap_or_default(),
        ]);
    }
    let bytes: u64 = planned.iter().map(|table| table.bytes + table.toast_bytes).sum();
    let rows: u64 = planned.iter().map(|table| table.rows).sum();
    let whole = planned.iter().filter_map(|one| Some((one, one.whole_because.as_ref()?)));
    let whole: String = whole
        .map(|(one, why)| format!("\n! {} is read in one long transaction: {why}", one.name))
        .collect();
    let seconds = planned.iter().filter_map(|table| table.seconds).sum();
    let bytes = bytes_text(bytes);
    format!(
        "{table}{whole}\n\n  about {rows} rows in {bytes}; some {} at the rate at which their \
         first blocks came, one after the other. Nothing was kept.",
        time_text(seconds)
    )
}
