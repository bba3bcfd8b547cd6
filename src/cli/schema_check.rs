//! `walrace schema check`: whom a migration would break.

use std::{collections::BTreeSet, io::Read, path::PathBuf, process::ExitCode, sync::Arc};

use serde_json::json;

use super::{print, tail::only_source};
use crate::{
    config::{self, Config, Secret},
    error::{Class, Classify, Result},
    pipeline::{Terms, unmet_of},
    runtime::terms_of,
    schema::{Table, breaks, differences},
    source::postgres::{self, Rehearsal},
};

/// The arguments of `walrace schema check`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
The migration runs in one transaction that is rolled back: on empty copies of the captured tables, \
as a role that may touch nothing else (the role of the source needs CREATEROLE and may create \
schemas); or, with --database, in a database of yours that has the same structure. It may not hold \
BEGIN, COMMIT or what cannot run in a transaction. Exit code 1 where a reader would break.")]
pub struct Check {
    /// The migration: a file with SQL, or `-` for standard input
    #[arg(long, value_name = "FILE")]
    pub sql: PathBuf,
    /// Try it in this database instead of on copies at the source: postgres://...
    #[arg(long, value_name = "URL", env = "WALRACE_CHECK_DATABASE", hide_env_values = true)]
    pub database: Option<String>,
    /// The source; needed only where there are several
    #[arg(long)]
    pub source: Option<String>,
    /// JSON instead of lines for people
    #[arg(long)]
    pub json: bool,
}

/// Tries the migration and tells what it would change and whom it would break.
pub(super) async fn run(config: &Config, args: &Check) -> Result<ExitCode> {
    let source = only_source(config, args.source.as_deref())?;
    let Some(config::Source::Postgres(postgres)) = config.source.get(source) else {
        return Ok(ExitCode::FAILURE); // `only_source` has found it
    };
    let sql = read(&args.sql)?;
    let database = args.database.as_ref().map(|url| Secret::new(url.clone()));
    let rehearsal = postgres::rehearse(source, postgres, database.as_ref(), &sql).await?;
    let sinks = config.sink.iter().filter(|(_, sink)| config.source_of(sink) == source);
    let terms: Vec<Terms> = sinks.map(|(name, sink)| terms_of(config, name, sink)).collect();
    let rules = Terms { compatibility: postgres.compatibility.clone(), ..Terms::default() };
    let found = Found::of(&rehearsal, &terms, &rules);
    print(&if args.json { found.json() } else { found.text() })?;
    Ok(if found.breaches.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn read(path: &PathBuf) -> Result<String> {
    let shown = || format!("cannot read {}", path.display());
    if path.as_os_str() == "-" {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).class(Class::Config, shown)?;
        return Ok(text);
    }
    std::fs::read_to_string(path).class(Class::Config, shown)
}

/// What a migration changes, and whom it breaks.
struct Found {
    changes: Vec<String>,
    breaches: Vec<String>,
    /// Contracts that are broken already.
    standing: Vec<String>,
}

impl Found {
    fn of(rehearsal: &Rehearsal, terms: &[Terms], rules: &Terms) -> Self {
        let shared = |tables: &[Table]| tables.iter().cloned().map(Arc::new).collect::<Vec<_>>();
        let (before, after) = (shared(&rehearsal.before), shared(&rehearsal.after));
        let standing: BTreeSet<String> = unmet_of(terms, &before).into_iter().collect();
        let mut found = Self { changes: Vec::new(), breaches: Vec::new(), standing: Vec::new() };
        for unmet in unmet_of(terms, &after) {
            match standing.contains(&unmet) {
                true => found.standing.push(unmet),
                false => found.breaches.push(unmet),
            }
        }
        for old in &before {
            let mode = rules.rule_of(old).map(|rule| rule.mode);
            let new = after.iter().find(|new| new.full_name() == old.full_name());
            let Some(new) = new else {
                found.changes.push(format!("{old}: dropped"));
                found.breaches.extend(mode.map(|mode| {
                    format!("{old} is gone, and its compatibility mode is {}", mode.word())
                }));
                continue;
            };
            // A copy is another table than the one that it stands for.
            let new = Table { oid: old.oid, identity: old.identity, ..Table::clone(new) };
            let told = differences(old, &new);
            found.changes.extend(told.iter().map(|difference| format!("{old}: {difference}")));
            if let Some(mode) = mode {
                let broken = breaks(mode, old, &new).into_iter();
                let word = mode.word();
                found.breaches.extend(
                    broken.map(|what| format!("{old} is no longer {word} compatible: {what}")),
                );
            }
        }
        let known: BTreeSet<String> = before.iter().map(|table| table.full_name()).collect();
        let new = after.iter().filter(|table| !known.contains(&table.full_name()));
        found.changes.extend(new.map(|table| format!("{table}: new")));
        found
    }

    fn text(&self) -> String {
        let mut text = String::new();
        let mut part = |title: &str, lines: &[String]| {
            if !lines.is_empty() {
                text.push_str(&format!("{title}\n"));
                lines.iter().for_each(|line| text.push_str(&format!("  {line}\n")));
            }
        };
        part("it changes", &self.changes);
        part("broken already", &self.standing);
        part("it would break", &self.breaches);
        if self.changes.is_empty() {
            text.push_str("it changes no captured table\n");
        }
        if self.breaches.is_empty() {
            text.push_str("it would break nobody\n");
        }
        text
    }

    fn json(&self) -> String {
        let body = json!({
            "changes": self.changes,
            "broken_already": self.standing,
            "breaches": self.breaches,
        });
        serde_json::to_string_pretty(&body).unwrap_or_default() + "\n"
    }
}
