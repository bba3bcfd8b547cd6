//! `walrace check`: proves the set-up before it starts.

use std::{process::ExitCode, sync::Arc};

use anstyle::{AnsiColor, Style};

use super::{Global, print};
use crate::{
    config::{self, Config},
    disk::{Disk, RealDisk},
    error::{Error, Result},
    pipeline::unmet_of,
    runtime::{names_of, terms_of},
    schema::Table,
    sink,
    source::postgres::{self, Finding, Level, preflight},
    transform::{Filter, Transform, Unmatched},
};

/// Prints every finding, each with the SQL that mends it. Exit code 0 when nothing stands in the
/// way, 1 when something does; warnings do not count.
pub async fn run(global: &Global) -> Result<ExitCode> {
    let config = global.load()?;
    let mut errors = 0;
    for (name, source) in &config.source {
        let config::Source::Postgres(postgres) = source;
        let mut findings = preflight(name, postgres).await;
        findings.extend(history(&config, (name, postgres)).await);
        findings.push(disk(&config));
        errors += show(&format!("source {name}"), &findings)?;
        // A database that cannot be asked is an error above already.
        let tables = postgres::tables(name, postgres).await.unwrap_or_default();
        let tables: Vec<Arc<Table>> = tables.into_iter().map(Arc::new).collect();
        let described = postgres::described(name, postgres).await;
        let described: Vec<Arc<Table>> =
            described.unwrap_or_default().into_iter().map(Arc::new).collect();
        for (sink, own) in config.sink.iter().filter(|(_, sink)| config.source_of(sink) == name) {
            let mut findings = look_at_sink(&config, (sink, own), &tables);
            if !described.is_empty() {
                findings.extend(contracts(&config, (sink, own), &described));
            }
            errors += show(&format!("sink {sink}"), &findings)?;
        }
    }
    print(&match errors {
        0 => "\nReady: start it with `walrace run`.\n".to_owned(),
        1 => "\n1 thing stands in the way.\n".to_owned(),
        count => format!("\n{count} things stand in the way.\n"),
    })?;
    Ok(if errors == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Prints what was found; how many errors there are.
fn show(title: &str, findings: &[Finding]) -> Result<usize> {
    print(&format!("{title}\n"))?;
    for finding in findings {
        print(&line(finding))?;
    }
    Ok(findings.iter().filter(|finding| finding.level == Level::Error).count())
}

/// Whether the server still has the history that the journal begins.
async fn history(config: &Config, source: (&str, &config::Postgres)) -> Option<Finding> {
    match super::source::obstacle(config, source).await {
        Ok(Some(error)) => Some(failure("history", &error)),
        Ok(None) if config.data_dir.exists() => Some(Finding {
            level: Level::Ok,
            subject: "history".into(),
            text: "the server has what the journal goes on with".into(),
            sql: None,
        }),
        // One that cannot be asked, or whose slot is read, is told above.
        _ => None,
    }
}

/// Whether a sink could start, and its rules fit the tables of its source, where those are known.
fn look_at_sink(
    config: &Config,
    (name, sink): (&str, &config::Sink),
    tables: &[Arc<Table>],
) -> Vec<Finding> {
    let names = names_of(config, config.source_of(sink), name);
    let context = sink::Context::new(&config.data_dir, names, uuid::Uuid::nil());
    let opened = sink::open(name, sink, &context).map(|_| ());
    let mut findings: Vec<Finding> =
        opened.err().map(|error| failure("settings", &error)).into_iter().collect();
    match Transform::new(name, sink) {
        Err(error) => findings.push(failure("rules", &error)),
        Ok(mut rules) => {
            let mut filter = Filter::new(sink).reads(sink.reads);
            for table in tables {
                let operations = filter.operations_of(table);
                if let Err(error) = rules.meet(table, &operations) {
                    findings.push(failure("rules", &error));
                }
            }
            let unmatched = if tables.is_empty() { Vec::new() } else { rules.unmatched() };
            findings.extend(unmatched.iter().map(misnamed));
        }
    }
    if findings.is_empty() {
        findings.push(Finding {
            level: Level::Ok,
            subject: "rules".into(),
            text: "they compile, and every column that a step names is there".into(),
            sql: None,
        });
    }
    findings
}

/// What the contracts of a sink lack of the tables as they are now. Where breaches pass, delivery
/// goes on; else it would not.
fn contracts(
    config: &Config,
    (name, sink): (&str, &config::Sink),
    tables: &[Arc<Table>],
) -> Vec<Finding> {
    let terms = terms_of(config, name, sink);
    let level = match sink.on_breach {
        config::OnBreach::Pass => Level::Warning,
        _ => Level::Error,
    };
    let unmet = unmet_of([&terms], tables).into_iter();
    let finding = |text| Finding { level, subject: "contract".into(), text, sql: None };
    let mut findings: Vec<Finding> = unmet.map(finding).collect();
    if findings.is_empty() && !sink.contract.is_empty() {
        let text = "its tables have every column that it needs".into();
        findings.push(Finding { level: Level::Ok, subject: "contract".into(), text, sql: None });
    }
    findings
}

fn failure(subject: &str, error: &Error) -> Finding {
    Finding { level: Level::Error, subject: subject.into(), text: error.to_string(), sql: None }
}

/// What was to be hidden and is not stands in the way; a name that keeps or renames nothing does
/// not, nor does a glob, which may be there for columns to come.
fn misnamed(unmatched: &Unmatched) -> Finding {
    let level = if unmatched.bares { Level::Error } else { Level::Warning };
    Finding { level, subject: "rules".into(), text: unmatched.to_string(), sql: None }
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
