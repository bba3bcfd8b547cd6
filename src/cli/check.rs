//! `walrace check`: proves the set-up before it starts.

use std::process::ExitCode;

use anstyle::{AnsiColor, Style};

use super::{Global, print};
use crate::{
    config::{self, Config},
    disk::{Disk, RealDisk},
    error::Result,
    source::postgres::{Finding, Level, preflight},
};

/// Prints every finding, each with the SQL that mends it. Exit code 0 when nothing stands in the
/// way, 1 when something does; warnings do not count.
pub async fn run(global: &Global) -> Result<ExitCode> {
    let config = global.load()?;
    let mut errors = 0;
    for (name, source) in &config.source {
        let config::Source::Postgres(postgres) = source;
        let mut findings = preflight(name, postgres).await;
        findings.push(disk(&config));
        print(&format!("source {name}\n"))?;
        for finding in &findings {
            print(&line(finding))?;
        }
        errors += findings.iter().filter(|finding| finding.level == Level::Error).count();
    }
    print(&match errors {
        0 => "\nReady: start it with `walrace run`.\n".to_owned(),
        1 => "\n1 thing stands in the way.\n".to_owned(),
        count => format!("\n{count} things stand in the way.\n"),
    })?;
    Ok(if errors == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Whether the volume of data_dir has room for a journal.
fn disk(config: &Config) -> Finding {
    let existing = config.data_dir.ancestors().find(|path| path.exists() && path.is_dir());
    let free = RealDisk.free_bytes(existing.unwrap_or(std::path::Path::new(".")));
    let needs = config.journal.reserve_bytes.saturating_add(config.journal.segment_bytes_max);
    let (level, text) = match free {
        Err(error) => (Level::Error, format!("its volume cannot be read: {error}")),
        Ok(free) if free < needs => (
            Level::Error,
            format!(
                "only {} free; journal.reserve_bytes and one segment need {}",
                super::lag::bytes_text(free),
                super::lag::bytes_text(needs)
            ),
        ),
        Ok(free) => (Level::Ok, format!("{} free", super::lag::bytes_text(free))),
    };
    Finding { level, subject: format!("data_dir {}", config.data_dir.display()), text, sql: None }
}

fn line(finding: &Finding) -> String {
    let (mark, style) = match finding.level {
        Level::Ok => ("ok     ", Style::new().fg_color(Some(AnsiColor::Green.into()))),
        Level::Warning => ("warning", Style::new().fg_color(Some(AnsiColor::Yellow.into()))),
        Level::Error => ("error  ", Style::new().fg_color(Some(AnsiColor::Red.into())).bold()),
    };
    let mut text = format!("  {style}{mark}{style:#} {}: {}\n", finding.subject, finding.text);
    for sql in finding.sql.iter().flat_map(|sql| sql.lines()) {
        text.push_str(&format!("            {sql}\n"));
    }
    text
}
