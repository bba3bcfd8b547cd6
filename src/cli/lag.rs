//! `walrace lag`: how far each stage is behind the one before it.

use std::process::ExitCode;

use comfy_table::{Cell, CellAlignment, Table, presets::UTF8_HORIZONTAL_ONLY};

use super::{Global, backfill, instance::Instance, offline::Offline};
use crate::{
    error::Result,
    runtime::{SinkStatus, SourceStatus, Status},
};

/// Shows how far each source and each sink is behind, in changes, bytes and seconds.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// JSON, as `GET /status` has it.
    #[arg(long)]
    json: bool,
}

/// Prints the state of the running Walrace; of one that is not running, what its catalog, its
/// journals and the databases tell.
pub async fn run(args: Args, global: &Global) -> Result<ExitCode> {
    let config = &global.load()?;
    let status = match Instance::running(config).await? {
        Some(instance) => instance.status().await?,
        None => Offline::open(config).await?.status().await?,
    };
    if args.json {
        let text = serde_json::to_string_pretty(&status).unwrap_or_default();
        anstream::println!("{text}");
    } else {
        anstream::println!("{}", render(&status));
    }
    Ok(ExitCode::SUCCESS)
}

/// The tables for people, with the reason of each part that is not running.
pub fn render(status: &Status) -> String {
    let mut sources =
        table(&["source", "state", "WAL behind", "WAL retained", "journal", "changes"]);
    for source in &status.sources {
        sources.add_row(source_row(source));
    }
    let mut sinks =
        table(&["sink", "state", "changes behind", "bytes behind", "behind", "delivered"]);
    for sink in &status.sinks {
        sinks.add_row(sink_row(sink));
    }
    let mut text = format!("{sources}\n\n{sinks}");
    let open = status.backfills.iter().filter(|backfill| !backfill.state.has_ended());
    let open: Vec<_> = open.cloned().collect();
    if !open.is_empty() {
        text.push_str(&format!("\n\n{}", backfill::render(&open)));
    }
    if status.sinks.iter().any(|sink| sink.behind_changes > 0) {
        let what = "\n  behind counts all changes of the journal that are not passed, before \
                    filters and rules; `walrace missing` lists those that a sink is to get";
        text.push_str(what);
    }
    for reason in status.unready() {
        text.push_str(&format!("\n! {reason}"));
    }
    for sink in status.sinks.iter().filter(|sink| !sink.state.is_stopped()) {
        if let Some(reason) = sink.state.reason() {
            text.push_str(&format!("\n! sink {} waits: {reason}", sink.name));
        }
    }
    text
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_HORIZONTAL_ONLY).set_header(header);
    for column in table.column_iter_mut().skip(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn source_row(source: &SourceStatus) -> Vec<Cell> {
    let bytes = |bytes: Option<u64>| bytes.map_or_else(|| "?".to_owned(), bytes_text);
    vec![
        Cell::new(&source.name),
        Cell::new(source.state.word()),
        Cell::new(bytes(source.behind_bytes)),
        Cell::new(bytes(source.retained_wal_bytes)),
        Cell::new(bytes_text(source.journal.bytes)),
        Cell::new(source.journal.end - source.journal.start),
    ]
}

fn sink_row(sink: &SinkStatus) -> Vec<Cell> {
    vec![
        Cell::new(&sink.name),
        Cell::new(sink.state.word()),
        Cell::new(sink.behind_changes),
        Cell::new(bytes_text(sink.behind_bytes)),
        Cell::new(format!("{:.1} s", sink.behind_ms as f64 / 1000.0)),
        Cell::new(sink.totals.changes),
    ]
}

/// Bytes for people: `1.5 MiB`.
pub fn bytes_text(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut units = UNITS.iter();
    let mut unit = units.next();
    while value >= 1024.0 {
        let Some(larger) = units.next() else { break };
        value /= 1024.0;
        unit = Some(larger);
    }
    let unit = unit.unwrap_or(&"B");
    if *unit == "B" { format!("{bytes} B") } else { format!("{value:.1} {unit}") }
}

#[cfg(test)]
mod tests {
    use super::bytes_text;

    #[test]
    fn bytes_are_shown_in_the_unit_that_reads_best() {
        assert_eq!(bytes_text(0), "0 B");
        assert_eq!(bytes_text(1023), "1023 B");
        assert_eq!(bytes_text(1536), "1.5 KiB");
        assert_eq!(bytes_text(3 << 30), "3.0 GiB");
    }
}
