//! `walrace source`: the databases that are captured, their slots and publications.

use std::process::ExitCode;

use clap::Subcommand;

use super::{Global, lag::bytes_text, print, tail::only_source};
use crate::{
    change::{Batch, Mark},
    config::{self, Config},
    error::{Class, Classify, Error, Result},
    journal::{Inspection, Journal},
    runtime::{journal_options, known, known_to},
    source::postgres::{self, Status},
};

/// The commands of `walrace source`.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Create the publication and the slot, so that the database keeps its changes from now on
    Create(Create),
    /// Remove the slot and the publications; nothing is left at the database
    Drop(Name),
    /// Show the slot and the publications as the database has them
    Status(Name),
    /// List the kinds of database that can be captured
    Kinds,
}

/// Which source.
#[derive(Clone, Debug, clap::Args)]
pub struct Name {
    /// The source; needed only where there are several
    pub name: Option<String>,
}

/// The arguments of `walrace source create`.
#[derive(Clone, Debug, clap::Args)]
pub struct Create {
    /// The source; needed only where there are several
    pub name: Option<String>,
    /// Go on although a part of the history is lost: the range is recorded in the journal
    #[arg(long)]
    pub accept_gap: bool,
    /// The system identifier of another cluster that continues the same database, as after
    /// pg_upgrade or after dump and restore
    #[arg(long, value_name = "ID", requires = "accept_gap")]
    pub cluster: Option<String>,
}

/// Runs one of them.
pub async fn run(command: Command, global: &Global) -> Result<ExitCode> {
    match command {
        Command::Kinds => print(&kinds())?,
        Command::Status(Name { name }) => {
            let config = global.load()?;
            let (name, source) = pick(&config, name.as_deref())?;
            let mut text = render(name, &postgres::status(name, source).await?);
            // While it is read, the process that reads it has compared the two.
            if let Ok(Some(error)) = obstacle(&config, (name, source)).await {
                text.push_str(&format!("! {error}\n"));
            }
            print(&text)?;
        }
        Command::Drop(Name { name }) => {
            let config = global.load()?;
            let (name, source) = pick(&config, name.as_deref())?;
            postgres::drop(name, source).await?;
            print(&format!("source {name}: no slot and no publication of it is left\n"))?;
        }
        Command::Create(args) => {
            let config = global.load()?;
            let (name, source) = pick(&config, args.name.as_deref())?;
            if args.accept_gap {
                accept_gap(&config, (name, source), args.cluster).await?;
            }
            print(&render(name, &postgres::create(name, source).await?))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn pick<'a>(config: &'a Config, named: Option<&'a str>) -> Result<(&'a str, &'a config::Postgres)> {
    let name = only_source(config, named)?;
    match config.source.get(name) {
        Some(config::Source::Postgres(postgres)) => Ok((name, postgres)),
        None => Err(Error::config(format!("there is no source {name}"))),
    }
}

/// Why the source would stop for what its journal has, where that can be told: not before the
/// first run, and not while the slot is read.
pub async fn obstacle(
    config: &Config,
    (name, source): (&str, &config::Postgres),
) -> Result<Option<Error>> {
    let options = journal_options(config, name);
    if !options.directory.exists() {
        return Ok(None);
    }
    let journal = tokio::task::spawn_blocking(move || Inspection::open(options))
        .await
        .class(Class::Bug, || "looking at a journal panicked")??;
    postgres::obstacle(name, source, known_to(journal)).await
}

/// Writes the gap into the journal, which nobody else may have open meanwhile, and moves its
/// progress to where the slot goes on.
async fn accept_gap(
    config: &Config,
    (name, source): (&str, &config::Postgres),
    cluster: Option<String>,
) -> Result<()> {
    let options = journal_options(config, name);
    let journal = tokio::task::spawn_blocking(move || Journal::open(options))
        .await
        .class(Class::Bug, || "the recovery of a journal panicked")??;
    journal.abandon().await?;
    let known = known(&journal);
    let accepted = postgres::accept_gap(name, source, known, cluster).await?;
    let postgres::Accepted { gap, mut origin } = accepted;
    let text =
        format!("source {name}: recorded a gap from {} to {}: {}\n", gap.from, gap.to, gap.reason);
    let gap_end = gap.to;
    let position = Some(gap_end);
    journal.record_gap(gap).await?;
    let lsn = gap_end.lsn;
    journal.append(Batch { changes: Vec::new(), position }).await?;
    // What the journal has before the gap may be of another history.
    origin.comparable = Some(Mark { offset: journal.end(), lsn });
    journal.set_origin(origin).await?;
    print(&text)
}

fn kinds() -> String {
    let line = |(name, doc): (String, String)| format!("{name}  {doc}\n");
    Config::source_kinds().into_iter().map(line).collect()
}

fn render(name: &str, status: &Status) -> String {
    let mut text = format!(
        "source {name}: database {} on PostgreSQL {}, log ends at {}\n",
        status.database, status.version, status.server_end
    );
    match &status.slot {
        None => text.push_str("slot: none\n"),
        Some(slot) => {
            let reader = slot.active_pid.map_or("nobody".to_owned(), |pid| format!("pid {pid}"));
            text.push_str(&format!(
                "slot {}: read by {reader}, {} behind, {} of log retained, wal_status {}\n",
                slot.name,
                bytes_text(slot.behind_bytes),
                bytes_text(slot.retained_bytes),
                slot.wal_status.as_deref().unwrap_or("unknown"),
            ));
            if let Some(invalidation) = &slot.invalidation {
                text.push_str(&format!("  invalidated: {invalidation}\n"));
            }
        }
    }
    for publication in &status.publications {
        let all = if publication.all_tables { " (all tables)" } else { "" };
        text.push_str(&format!("publication {}{all}:\n", publication.name));
        for table in &publication.tables {
            text.push_str(&format!("  {table}\n"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_kinds_are_those_of_the_configuration() {
        assert_eq!(super::kinds(), "postgres  PostgreSQL 14 to 18, by logical replication.\n");
    }
}
