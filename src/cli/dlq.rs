//! `walrace dlq`: what a target or a rule refused, and what waits behind it.

use std::process::ExitCode;

use clap::Subcommand;
use comfy_table::{Table, presets::UTF8_HORIZONTAL_ONLY};
use serde_json::{Map, Value, json};

use super::{
    Global,
    instance::{Instance, Method},
    print,
    sink::user,
};
use crate::{
    api::{Choice, Edit, Reason, shown},
    config::Config,
    error::{Class, Classify, Error, Result},
    parking::{Letter, Parking, Place},
};

/// The commands of `walrace dlq`.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// List parked changes and dead letters
    List(List),
    /// Show one with its change, as JSON
    Show(One),
    /// Give columns of one other values, and try it again at once
    Edit(EditOne),
    /// Try some again at once
    Retry(These),
    /// Give some up for good
    Drop(These),
}

/// Which ones.
#[derive(Clone, Debug, clap::Args)]
pub struct Filter {
    /// Of this sink
    #[arg(long)]
    pub sink: Option<String>,
    /// `parked` (tried again by itself) or `dead`
    #[arg(long)]
    pub state: Option<String>,
    /// Of tables that fit this glob over schema.table
    #[arg(long)]
    pub table: Option<String>,
    /// Whose error holds this text
    #[arg(long)]
    pub error: Option<String>,
    /// Parked at or after this time, such as 2026-04-06T09:14:22Z
    #[arg(long)]
    pub since: Option<String>,
    /// Parked before this time
    #[arg(long)]
    pub until: Option<String>,
}

/// The arguments of `walrace dlq list`.
#[derive(Clone, Debug, clap::Args)]
pub struct List {
    /// Which ones
    #[command(flatten)]
    pub filter: Filter,
    /// So many at most
    #[arg(long, default_value_t = 100)]
    pub limit: u64,
    /// One JSON object a line
    #[arg(long)]
    pub json: bool,
}

/// One of them.
#[derive(Clone, Debug, clap::Args)]
pub struct One {
    /// Its id, sink:offset, as `walrace dlq list` shows it
    pub id: Place,
}

/// The arguments of `walrace dlq edit`.
#[derive(Clone, Debug, clap::Args)]
pub struct EditOne {
    /// Its id, sink:offset, as `walrace dlq list` shows it
    pub id: Place,
    /// A column and its new value, as JSON or as PostgreSQL's text: --set 'price=12.50'
    #[arg(long = "set", value_name = "COLUMN=VALUE", required = true)]
    pub set: Vec<String>,
    /// The reason, which is written down
    #[arg(long)]
    pub why: Option<String>,
}

/// Some of them, and what for.
#[derive(Clone, Debug, clap::Args)]
pub struct These {
    /// Their ids, sink:offset
    pub ids: Vec<Place>,
    /// Which ones
    #[command(flatten)]
    pub filter: Filter,
    /// Every one that there is
    #[arg(long)]
    pub all: bool,
    /// The reason, which is written down
    #[arg(long)]
    pub why: Option<String>,
}

/// Runs one of them. `list` and `show` work while nothing runs, too.
pub async fn run(command: Command, global: &Global) -> Result<ExitCode> {
    let config = global.load()?;
    let text = match command {
        Command::List(list) => {
            let choice = Choice { limit: list.limit.into(), ..choice(list.filter) };
            let letters = letters(&config, &choice).await?;
            if list.json { lines(&letters) } else { table(&letters) }
        }
        Command::Show(One { id }) => {
            let letter = match Instance::running(&config).await? {
                Some(instance) => instance.read(&format!("/dead-letters/{id}"), &[]).await?,
                None => {
                    let (letter, change) = at_rest(&config).await?.show(&id).await?;
                    shown(&letter, &change)?
                }
            };
            serde_json::to_string_pretty(&letter).class(Class::Bug, || "a letter is no JSON")?
        }
        Command::Edit(edit) => {
            let instance = Instance::find(&config).await?;
            let reason = Reason { who: user().into(), why: edit.why.clone() };
            let body = Edit { values: values(&edit.set)?, reason };
            let path = format!("/dead-letters/{}", edit.id);
            instance.ask::<Value>(Method::PATCH, &path, &body).await?;
            format!("{} is changed, and tried again", edit.id)
        }
        Command::Retry(these) => {
            let count = deed(&config, these, "retry").await?;
            format!("{count} are tried again")
        }
        Command::Drop(these) => {
            let count = deed(&config, these, "drop").await?;
            format!("{count} are dropped")
        }
    };
    print(&format!("{text}\n"))?;
    Ok(ExitCode::SUCCESS)
}

fn choice(filter: Filter) -> Choice {
    let Filter { sink, state, table, error, since, until } = filter;
    Choice { sink, state, table, error, since, until, ..Choice::default() }
}

async fn letters(config: &Config, choice: &Choice) -> Result<Vec<Letter>> {
    match Instance::running(config).await? {
        Some(instance) => {
            let rules = serde_json::to_value(choice).class(Class::Bug, || "a choice is no JSON")?;
            let rules = rules.as_object().cloned().unwrap_or_default();
            let text =
                |value: Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            let rules: Vec<_> =
                rules.into_iter().map(|(name, value)| (name, text(value))).collect();
            let query: Vec<_> = rules.iter().map(|(n, v)| (n.as_str(), v.clone())).collect();
            instance.read("/dead-letters", &query).await
        }
        None => at_rest(config).await?.list(&choice.query()?).await,
    }
}

/// The file of a Walrace that is not running.
async fn at_rest(config: &Config) -> Result<Parking> {
    let directory = config.dead_letters();
    let parking = Parking::inspect(&directory).await?;
    parking.ok_or_else(|| {
        Error::config(format!("there are no dead letters in {}", directory.display()))
            .remedy("walrace makes the file when it first runs; `dlq_path` says where")
    })
}

async fn deed(config: &Config, these: These, action: &str) -> Result<u64> {
    let ids: Vec<String> = these.ids.iter().map(Place::to_string).collect();
    let choice = Choice {
        ids: (!ids.is_empty()).then(|| ids.join(",")),
        all: these.all,
        who: user().into(),
        why: these.why,
        ..choice(these.filter)
    };
    let instance = Instance::find(config).await?;
    let reply: Value =
        instance.ask(Method::POST, &format!("/dead-letters/{action}"), &choice).await?;
    let count = reply.as_object().and_then(|reply| reply.values().next()?.as_u64());
    Ok(count.unwrap_or_default())
}

fn values(set: &[String]) -> Result<Map<String, Value>> {
    let pair = |text: &String| {
        let (column, value) = text.split_once('=').ok_or_else(|| {
            Error::config(format!("`{text}` sets nothing")).remedy("write --set column=value")
        })?;
        let value = serde_json::from_str(value).unwrap_or_else(|_| json!(value));
        Ok((column.to_owned(), value))
    };
    set.iter().map(pair).collect()
}

fn lines(letters: &[Letter]) -> String {
    let line = |letter: &Letter| serde_json::to_string(letter).unwrap_or_default();
    letters.iter().map(line).collect::<Vec<_>>().join("\n")
}

fn table(letters: &[Letter]) -> String {
    if letters.is_empty() {
        return "nothing is parked".to_owned();
    }
    let mut table = Table::new();
    table
        .load_style(UTF8_HORIZONTAL_ONLY)
        .set_header(["id", "state", "change", "attempts", "since", "why"]);
    for letter in letters {
        let what = letter.table.as_deref().unwrap_or("message");
        let mut why = letter.error.clone();
        if let Some(by) = letter.superseded {
            why = format!("{why} (offset {by} of its key went past it)");
        }
        table.add_row([
            letter.id.clone(),
            letter.state.clone(),
            format!("{} {what}", letter.op),
            letter.attempts.to_string(),
            letter.first_at.to_string(),
            why,
        ]);
    }
    table.to_string()
}
