//! `walrace schema`: the versions of each captured table, and what differs between them.

use std::{collections::BTreeMap, process::ExitCode};

use clap::Subcommand;
use comfy_table::{Table, presets::UTF8_HORIZONTAL_ONLY};
use serde_json::json;

use super::{
    Global,
    instance::{Instance, Method},
    print,
    schema_check::{self, Check},
    sink::user,
    tail::only_source,
};
use crate::{
    api::{Accept, Accepted, Reason, ShownVersion},
    catalog::{Catalog, Known, Tracker, Version},
    config::{Config, glob_matches},
    error::{Class, Classify, Error, Result},
    journal::Inspection,
    runtime::journal_options,
    schema::{Difference, differences},
};

/// The commands of `walrace schema`.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// List the tables: how many versions each has, and since when the newest holds
    List(List),
    /// Show the columns of a table, as they are or as they were
    Show(Show),
    /// Tell what differs between two versions of a table
    Diff(Diff),
    /// Accept a version that breaks a contract or a compatibility mode: what waits for it goes on
    Accept(AcceptOne),
    /// Tell whose contracts and which compatibility modes a migration would break
    Check(Check),
}

/// The arguments of `walrace schema accept`.
#[derive(Clone, Debug, clap::Args)]
pub struct AcceptOne {
    /// The table, as schema.table; without a schema it is `public`
    pub table: String,
    /// Which version; by default the newest
    #[arg(long, value_name = "N")]
    pub version: Option<u32>,
    /// The source; needed only where there are several
    #[arg(long)]
    pub source: Option<String>,
    /// The reason, which is written down
    #[arg(long)]
    pub why: Option<String>,
}

/// The arguments of `walrace schema list`.
#[derive(Clone, Debug, clap::Args)]
pub struct List {
    /// Only tables that fit this glob over schema.table
    pub table: Option<String>,
    /// The source; needed only where there are several
    #[arg(long)]
    pub source: Option<String>,
    /// One JSON object a line: each version of each table
    #[arg(long)]
    pub json: bool,
}

/// The arguments of `walrace schema show`.
#[derive(Clone, Debug, clap::Args)]
pub struct Show {
    /// The table, as schema.table; without a schema it is `public`
    pub table: String,
    /// Which version; by default the newest
    #[arg(long, value_name = "N")]
    pub version: Option<u32>,
    /// The source; needed only where there are several
    #[arg(long)]
    pub source: Option<String>,
    /// JSON instead of a table for people
    #[arg(long)]
    pub json: bool,
}

/// The arguments of `walrace schema diff`.
#[derive(Clone, Debug, clap::Args)]
pub struct Diff {
    /// The table, as schema.table; without a schema it is `public`
    pub table: String,
    /// The earlier version; by default the one before the later
    #[arg(long, value_name = "N")]
    pub from: Option<u32>,
    /// The later version; by default the newest
    #[arg(long, value_name = "M")]
    pub to: Option<u32>,
    /// The source; needed only where there are several
    #[arg(long)]
    pub source: Option<String>,
    /// JSON instead of lines for people
    #[arg(long)]
    pub json: bool,
}

/// Runs one of them. Those that only read work while nothing runs, too.
pub async fn run(command: Command, global: &Global) -> Result<ExitCode> {
    let config = global.load()?;
    let text = match command {
        Command::Check(args) => return schema_check::run(&config, &args).await,
        Command::List(args) => list(&history(&config, args.source.as_deref()).await?, &args),
        Command::Show(args) => show(&history(&config, args.source.as_deref()).await?, &args)?,
        Command::Diff(args) => diff(&history(&config, args.source.as_deref()).await?, &args)?,
        Command::Accept(args) => accept(&config, args).await?,
    };
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}

/// The versions of a source: those of the catalog, and those of the changes that nobody has gone
/// through since.
async fn history(config: &Config, source: Option<&str>) -> Result<Vec<Version>> {
    let source = only_source(config, source)?;
    let catalog = Catalog::inspect(&config.data_dir).await?.ok_or_else(|| {
        let data_dir = config.data_dir.display();
        Error::config(format!("no walrace ever ran on data_dir {data_dir}"))
            .remedy("start it with `walrace run`")
    })?;
    let options = journal_options(config, source);
    let inspection = blocking(move || Inspection::open(options)).await?;
    let info = inspection.info();
    let mut versions = catalog.schema_versions(source, info.lineage).await?;
    let scanned = catalog.schema_scanned(source, info.lineage).await?;
    versions.retain(|version| version.offset < info.end);
    let timeline = info.progress.map_or(0, |at| at.timeline);
    blocking(move || {
        let (mut tracker, late) = (Tracker::new(&versions), info.start > scanned);
        for change in inspection.dump(scanned.max(info.start).min(info.end)) {
            if let Some(version) = tracker.see(&change?, timeline) {
                let known = if late { Known::ObservedLater } else { Known::Observed };
                versions.push(Version { known, ..version });
            }
        }
        versions.sort_by_key(|version| (version.table.full_name(), version.number));
        Ok(versions)
    })
    .await
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work).await.class(Class::Bug, || "reading a journal panicked")?
}

fn list(versions: &[Version], args: &List) -> String {
    let glob = args.table.as_deref().unwrap_or("*");
    let chosen = versions.iter().filter(|version| glob_matches(glob, &version.table.full_name()));
    if args.json {
        let line = |version| serde_json::to_string(&ShownVersion::from(version));
        return chosen.filter_map(|version| Some(line(version).ok()? + "\n")).collect();
    }
    let mut newest = BTreeMap::new();
    for version in chosen {
        // The last of each has the highest number.
        newest.insert(version.table.full_name(), version);
    }
    if newest.is_empty() {
        return "no change of a table was captured yet\n".to_owned();
    }
    let mut table = Table::new();
    table.load_style(UTF8_HORIZONTAL_ONLY);
    table.set_header(["table", "versions", "columns", "since", "offset", "known"]);
    for (name, version) in newest {
        table.add_row([
            name,
            version.number.to_string(),
            version.table.columns.len().to_string(),
            version.at.to_string(),
            version.offset.to_string(),
            version.known.word().to_owned(),
        ]);
    }
    format!("{table}\n")
}

fn show(versions: &[Version], args: &Show) -> Result<String> {
    let of = of_table(versions, &args.table)?;
    let version = pick(&of, args.version)?;
    let shown = ShownVersion::from(version);
    if args.json {
        return Ok(serde_json::to_string_pretty(&shown).unwrap_or_default() + "\n");
    }
    let mut table = Table::new();
    table.load_style(UTF8_HORIZONTAL_ONLY);
    table.set_header(["column", "type", "nullable", "key", "identity"]);
    for column in &shown.columns {
        let mark = |is: bool| if is { "yes" } else { "" }.to_owned();
        table.add_row([
            column.name.clone(),
            column.r#type.clone(),
            column
                .nullable
                .map_or("?".to_owned(), |nullable| if nullable { "yes" } else { "no" }.to_owned()),
            mark(column.key),
            mark(column.identity),
        ]);
    }
    let was = before_rename(versions, version);
    Ok(format!(
        "{} version {} of {}, since offset {} ({}, position {}), {}; replica identity {}{}\n\
         {table}\n",
        shown.table,
        shown.version,
        of.len(),
        shown.offset,
        shown.at,
        shown.position,
        shown.known.word(),
        shown.identity.word(),
        was.map_or(String::new(), |was| format!("; the same table was {was} before"))
    ))
}

/// The name that the same table had in an earlier version, where it had another.
fn before_rename(versions: &[Version], version: &Version) -> Option<String> {
    let earlier = versions.iter().filter(|other| other.offset < version.offset);
    let same = earlier.filter(|other| other.table.oid == version.table.oid);
    let last = same.max_by_key(|other| other.offset)?;
    let name = last.table.full_name();
    (name != version.table.full_name()).then_some(name)
}

fn diff(versions: &[Version], args: &Diff) -> Result<String> {
    let of = of_table(versions, &args.table)?;
    let to = pick(&of, args.to)?;
    let from = match args.from {
        None if to.number == 1 => {
            return Err(Error::config(format!("{} has one version alone", to.table))
                .remedy(format!("`walrace schema show {}` shows it", to.table)));
        }
        None => pick(&of, Some(to.number - 1))?,
        some => pick(&of, some)?,
    };
    let found = differences(&from.table, &to.table);
    if args.json {
        let body = json!({
            "table": to.table.full_name(),
            "from": ShownVersion::from(from),
            "to": ShownVersion::from(to),
            "differences": found,
        });
        return Ok(serde_json::to_string_pretty(&body).unwrap_or_default() + "\n");
    }
    let mut text = format!(
        "{} version {} to {}, which began at offset {} ({}, position {})\n",
        to.table, from.number, to.number, to.offset, to.at, to.position
    );
    for difference in &found {
        text.push_str(&format!("  {} {difference}\n", sign(difference)));
    }
    if found.is_empty() {
        text.push_str("  nothing\n");
    }
    Ok(text)
}

fn sign(difference: &Difference) -> char {
    match difference {
        Difference::Added { .. } => '+',
        Difference::Dropped { .. } => '-',
        _ => '~',
    }
}

async fn accept(config: &Config, args: AcceptOne) -> Result<String> {
    let source = only_source(config, args.source.as_deref())?;
    let instance = Instance::find(config).await?;
    let table = full_name(&args.table);
    let reason = Reason { who: Some(user()), why: args.why };
    let body = Accept { table: table.clone(), version: args.version, reason };
    let path = format!("/sources/{source}/schema/accept");
    let Accepted { version, retried } = instance.ask(Method::POST, &path, &body).await?;
    Ok(format!("{table} version {version} is accepted; {retried} changes are tried again\n"))
}

fn full_name(name: &str) -> String {
    if name.contains('.') { name.to_owned() } else { format!("public.{name}") }
}

fn of_table<'a>(versions: &'a [Version], name: &str) -> Result<Vec<&'a Version>> {
    let full = full_name(name);
    let of: Vec<_> = versions.iter().filter(|version| version.table.full_name() == full).collect();
    if of.is_empty() {
        return Err(Error::config(format!("no change of {full} was captured"))
            .remedy("`walrace schema list` names the tables that are known"));
    }
    Ok(of)
}

fn pick<'a>(of: &[&'a Version], number: Option<u32>) -> Result<&'a Version> {
    let found = match number {
        None => of.last(),
        Some(number) => of.iter().find(|version| version.number == number),
    };
    found.copied().ok_or_else(|| {
        let (table, last) = of
            .last()
            .map_or_else(Default::default, |version| (version.table.full_name(), version.number));
        Error::config(format!("{table} has no version {}", number.unwrap_or_default()))
            .remedy(format!("it has the versions 1 to {last}"))
    })
}
