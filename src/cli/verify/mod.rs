//! `walrace verify`: whether the target of a sink has the rows of its source.
//!
//! ```text
//!   search: hashes of ranges, both sides ─► suspects ─► confirm: at one position ─► differences
//!                                                                └─ repair ─► confirm again
//! ```

use std::{collections::HashMap, process::ExitCode, sync::Arc, time::Duration};

use serde_json::{Map, Value as Json};

use self::{
    confirm::{Found, Verdict, confirm},
    pace::Pace,
    pair::{Key, Pair},
    report::{Compared, Difference, Line, Outcome, Report, Unsettled},
    search::{Search, Step},
    side::Origin,
};
use super::{Global, print};
use crate::{
    change::Op,
    config::{self, Config, Globs, SinkKind},
    error::{Error, Result},
    runtime::names_of,
    sink::{Progress, Replica},
    source::postgres,
    transform::{Filter, Transform},
};

mod confirm;
mod pace;
mod pair;
mod repair;
mod report;
mod search;
mod side;

/// Suspects that are looked at together.
const SUSPECTS: usize = 500;

/// Compares a source with the PostgreSQL that a sink keeps the same, while both move, and lists the
/// rows that differ. Exit code 0: equal; 1: different; 2: it could not be told.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  walrace verify --sink replica\n  \
                        walrace verify --sink replica --table 'public.order*' --repair --json")]
pub struct Args {
    /// The sink, of kind postgres
    #[arg(long)]
    sink: String,
    /// Only tables that match this glob over schema.table; may be repeated, `!` takes away
    #[arg(long = "table", value_name = "GLOB")]
    tables: Vec<String>,
    /// Put each row that differs right, as the sink would have, and look again
    #[arg(long)]
    repair: bool,
    /// JSON instead of lines for people
    #[arg(long)]
    json: bool,
    /// Stop in a table after so many different rows
    #[arg(long, value_name = "ROWS", default_value = "1000")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=100_000))]
    limit: u32,
    /// So long the target may take to catch up with a position of the source, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "60")]
    wait: u32,
}

/// What is compared with what.
struct Setting<'a> {
    config: &'a Config,
    sink: &'a str,
    source: &'a str,
    postgres: &'a config::Postgres,
    origin: Origin,
    replica: Replica,
    wait: Duration,
}

impl Setting<'_> {
    /// How far the target is.
    async fn progress(&self) -> Result<Progress> {
        self.replica.progress().await?.ok_or_else(|| {
            let (sink, address) = (self.sink, self.replica.address());
            Error::config(format!("{address} has no progress of sink {sink}: it never wrote there"))
                .remedy("start it with `walrace run`; its first change brings the progress there")
        })
    }

    /// The offset before which the target has everything.
    async fn cursor(&self) -> Result<u64> {
        Ok(self.progress().await?.cursor)
    }
}

/// Compares, and repairs where that was asked for.
pub async fn run(args: Args, global: &Global) -> Result<ExitCode> {
    match compare(&args, global).await {
        Ok(report) => {
            print(&match args.json {
                true => serde_json::to_string_pretty(&report).unwrap_or_default() + "\n",
                false => report.render(),
            })?;
            Ok(match report.verdict {
                Outcome::Equal => ExitCode::SUCCESS,
                Outcome::Different => ExitCode::from(1),
                Outcome::Unverified => ExitCode::from(2),
            })
        }
        Err(error) => {
            super::report(&error);
            Ok(ExitCode::from(2))
        }
    }
}

async fn compare(args: &Args, global: &Global) -> Result<Report> {
    let config = &global.load()?;
    let (name, sink) = config.sink.get_key_value(&args.sink).ok_or_else(|| {
        let known = config.sink.keys().cloned().collect::<Vec<_>>().join(", ");
        Error::config(format!("there is no sink {}", args.sink)).remedy(format!("one of: {known}"))
    })?;
    let (mut setting, mut rules) = set(config, (name.as_str(), sink), args).await?;
    let pace = Pace::new(&setting).await?;
    let from = setting.origin.position().await?;
    let mut report = Report {
        sink: name.clone(),
        source: setting.source.to_owned(),
        target: setting.replica.address().to_owned(),
        from,
        to: from,
        verdict: Outcome::Equal,
        tables: Vec::new(),
    };
    let line = Line::new();
    for table in chosen(&setting, sink, &args.tables).await? {
        let mut outcome = Compared { table: table.table.full_name(), ..Compared::default() };
        let compared =
            compare_table(&mut setting, &pace, (&mut rules, args, &line), (table, &mut outcome));
        if let Err(error) = compared.await {
            outcome.failed(&error);
        }
        line.clear();
        report.tables.push(outcome);
    }
    report.to = setting.origin.position().await?;
    report.conclude();
    Ok(report)
}

/// Connects to both sides, where the sink is one that keeps rows the same.
async fn set<'a>(
    config: &'a Config,
    (name, sink): (&'a str, &config::Sink),
    args: &Args,
) -> Result<(Setting<'a>, Transform)> {
    let SinkKind::PostgresTarget(options) = &sink.kind else {
        let message = format!("sink {name} is not of kind postgres: its rows cannot be read back");
        return Err(Error::config(message));
    };
    let needed = [Op::Insert, Op::Update, Op::Delete];
    if !sink.operations.is_empty() && needed.iter().any(|op| !sink.operations.contains(op)) {
        let message = format!("sink {name} cannot be compared: `operations` leaves changes out");
        return Err(Error::config(message).remedy("compare a sink that gets every operation"));
    }
    let source = config.source_of(sink);
    let Some((source, config::Source::Postgres(postgres))) = config.source.get_key_value(source)
    else {
        return Err(Error::config(format!("there is no source {source}")));
    };
    let rules = Transform::new(name, sink)?;
    let origin = Origin::connect(postgres.url.expose().to_owned()).await?;
    let mut replica = Replica::new(options, &names_of(config, source, name))?;
    replica.connect().await?;
    let wait = Duration::from_secs(args.wait.into());
    let setting = Setting { config, sink: name, source, postgres, origin, replica, wait };
    Ok((setting, rules))
}

/// The tables that the sink gets, and the command asks for.
async fn chosen(
    setting: &Setting<'_>,
    sink: &config::Sink,
    globs: &[String],
) -> Result<Vec<postgres::Compared>> {
    let mut filter = Filter::new(sink).reads(sink.reads);
    let globs = Globs::new(globs);
    let mut tables = postgres::compared(setting.source, setting.postgres).await?;
    tables.retain(|compared| {
        let table = &compared.table;
        !filter.operations_of(table).is_empty() && globs.choose(&table.schema, &table.name)
    });
    match tables.is_empty() {
        true => Err(Error::config(format!("no table of sink {} is chosen", setting.sink))
            .remedy("`walrace check` lists the tables; correct --table")),
        false => Ok(tables),
    }
}

/// How the table stands in the target; an error says why it cannot be compared.
async fn pair(
    setting: &Setting<'_>,
    rules: &mut Transform,
    compared: postgres::Compared,
) -> Result<Pair> {
    let table = Arc::clone(&compared.table);
    if let Some(why) = &compared.partial {
        return Err(Error::config(format!("{table} cannot be compared: {why}")));
    }
    let projected = rules.projected(&table)?;
    let mapped = setting.replica.map(&projected.table).await?;
    if mapped.key.is_empty() {
        let message =
            format!("{table} cannot be compared: it has no key that tells its rows apart");
        return Err(Error::config(message).remedy(format!(
            "alter table {table} add primary key (...), at the source and at the target"
        )));
    }
    let types: Vec<&str> = mapped.columns.iter().map(|column| column.ty.as_str()).collect();
    let known = setting.origin.known_types(&types).await?;
    let pair = Pair::new(compared, projected, mapped, |ty| known.contains(ty));
    pair.ok_or_else(|| Error::config(format!("{table} cannot be compared: a mask hides its key")))
}

async fn compare_table(
    setting: &mut Setting<'_>,
    pace: &Pace,
    (rules, args, line): (&mut Transform, &Args, &Line),
    (table, outcome): (postgres::Compared, &mut Compared),
) -> Result<()> {
    let pair = pair(setting, rules, table).await?;
    outcome.target = Some(pair.mapped.name.clone());
    outcome.columns_left_out.clone_from(&pair.left_out);
    let mut search = Search::new(&pair);
    let mut waiting: Vec<Key> = Vec::new();
    loop {
        let step = search.next(setting, &pair).await?;
        outcome.rows_listed = search.listed;
        let is_last = step.is_none();
        match step {
            Some(Step::Equal(rows)) => outcome.rows += rows,
            Some(Step::Suspects(keys, rows)) => {
                outcome.rows += rows;
                waiting.extend(keys);
            }
            None => {}
        }
        while waiting.len() >= SUSPECTS || is_last && !waiting.is_empty() {
            let keys = waiting.split_off(waiting.len().saturating_sub(SUSPECTS));
            settle(setting, pace, (&pair, &mut *rules, args), (keys, &mut *outcome)).await?;
            if outcome.differences.len() + outcome.unsettled.len() >= args.limit as usize {
                outcome.is_cut = !is_last || !waiting.is_empty();
                return Ok(());
            }
        }
        if is_last {
            return Ok(());
        }
        line.show(outcome, pair.rows);
    }
}

/// Confirms suspects, and repairs those that differ.
async fn settle(
    setting: &mut Setting<'_>,
    pace: &Pace,
    (pair, rules, args): (&Pair, &mut Transform, &Args),
    (keys, outcome): (Vec<Key>, &mut Compared),
) -> Result<()> {
    let mut found: Vec<(Key, Found)> = Vec::new();
    for (key, verdict) in confirm(setting, pace, pair, keys).await? {
        match verdict {
            Verdict::Equal => {}
            Verdict::Differs(difference) => found.push((key, difference)),
            Verdict::Unsettled(reason) => {
                outcome.unsettled.push(Unsettled { key: named(pair, &key), reason });
            }
        }
    }
    let mut repaired: HashMap<Key, bool> = HashMap::new();
    if args.repair && !found.is_empty() {
        let why = repair::repair(setting, pace, (pair, rules), &found).await?;
        outcome.not_repaired = outcome.not_repaired.take().or(why);
        let keys = found.iter().map(|(key, _)| key.clone()).collect();
        let again = confirm(setting, pace, pair, keys).await?;
        repaired.extend(again.into_iter().map(|(key, verdict)| (key, verdict == Verdict::Equal)));
    }
    for (key, Found { kind, columns, .. }) in found {
        let is_repaired = repaired.get(&key).copied().unwrap_or_default();
        let columns = columns.iter().filter_map(|&at| pair.names.get(at).cloned()).collect();
        let key = named(pair, &key);
        outcome.differences.push(Difference { key, kind, columns, is_repaired });
    }
    Ok(())
}

fn named(pair: &Pair, key: &Key) -> Map<String, Json> {
    pair.key.iter().cloned().zip(key.iter().map(|text| Json::String(text.clone()))).collect()
}
