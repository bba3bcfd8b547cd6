//! `walrace sink`: what a sink gets next.

use std::process::ExitCode;

use clap::Subcommand;
use serde_json::Value;

use super::{
    Global,
    instance::{Instance, Method},
    lag, print,
};
use crate::{
    api::{Move, Reason},
    error::Result,
    runtime::{Moved, To},
};

/// The commands of `walrace sink`.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Show each sink with its state and how far it is behind
    List,
    /// End delivery to a sink until it is resumed; the journal keeps what it does not have
    Pause(Named),
    /// Let a paused sink go on, and one that has stopped or waits try again at once
    Resume(Named),
    /// Deliver again from an earlier place of the journal on
    Rewind(Rewind),
    /// Give up one change (it becomes a dead letter), or everything before a later place
    Skip(Skip),
    /// Show what was done to a sink, by whom and why
    Events(Name),
}

/// Which sink.
#[derive(Clone, Debug, clap::Args)]
pub struct Name {
    /// The sink
    pub sink: String,
}

/// Which sink, and what for.
#[derive(Clone, Debug, clap::Args)]
pub struct Named {
    /// The sink
    pub sink: String,
    /// The reason, which is written down
    #[arg(long)]
    pub why: Option<String>,
}

/// The arguments of `walrace sink rewind`.
#[derive(Clone, Debug, clap::Args)]
pub struct Rewind {
    /// The sink and the reason
    #[command(flatten)]
    pub named: Named,
    /// `start`, an offset, a time such as 2026-04-06T09:14:22Z, or a resume token
    #[arg(long)]
    pub to: To,
}

/// The arguments of `walrace sink skip`.
#[derive(Clone, Debug, clap::Args)]
pub struct Skip {
    /// The sink and the reason
    #[command(flatten)]
    pub named: Named,
    /// This change alone [default: the next one]
    #[arg(long)]
    pub offset: Option<u64>,
    /// Everything before: `now`, an offset, a time or a resume token; it is on record as lost
    #[arg(long, conflicts_with = "offset")]
    pub to: Option<To>,
}

/// Runs one of them on the Walrace that runs on `data_dir`.
pub async fn run(command: Command, global: &Global) -> Result<ExitCode> {
    let instance = Instance::find(&global.load()?).await?;
    let text = match command {
        Command::List => lag::render(&instance.status().await?),
        Command::Pause(named) => {
            post::<Value>(&instance, &named, "pause", &reason(&named)).await?;
            format!("sink {} is paused", named.sink)
        }
        Command::Resume(named) => {
            post::<Value>(&instance, &named, "resume", &reason(&named)).await?;
            format!("sink {} goes on", named.sink)
        }
        Command::Rewind(Rewind { named, to }) => {
            let body = Move { to: Some(to), offset: None, reason: reason(&named) };
            let Moved { from, to, .. } = post(&instance, &named, "rewind", &body).await?;
            let changes = from - to;
            format!(
                "sink {} goes back from offset {from} to {to}: {changes} come again",
                named.sink
            )
        }
        Command::Skip(Skip { named, offset, to }) => {
            skip(&instance, &named, Move { to, offset, reason: reason(&named) }).await?
        }
        Command::Events(Name { sink }) => {
            let events: Vec<Event> = instance.read(&format!("/sinks/{sink}/events"), &[]).await?;
            let line = |event: &Event| {
                format!("{}  {:<12} {}  {}", event.at(), event.action, event.who, event.detail)
            };
            events.iter().map(line).collect::<Vec<_>>().join("\n")
        }
    };
    print(&format!("{text}\n"))?;
    Ok(ExitCode::SUCCESS)
}

async fn skip(instance: &Instance, named: &Named, body: Move) -> Result<String> {
    let reply: Value = post(instance, named, "skip", &body).await?;
    let number = |name: &str| reply.get(name).and_then(Value::as_u64).unwrap_or_default();
    if body.to.is_none() {
        let offset = number("offset");
        return Ok(format!(
            "offset {offset} becomes a dead letter, {}:{offset}, when sink {} comes to it",
            named.sink, named.sink
        ));
    }
    let (from, to) = (number("from"), number("to"));
    Ok(format!(
        "sink {} goes on at offset {to}; {} changes from {from} on are on record as lost",
        named.sink,
        to - from
    ))
}

#[derive(Debug, serde::Deserialize)]
struct Event {
    at: crate::change::Timestamp,
    who: String,
    action: String,
    detail: String,
}

impl Event {
    fn at(&self) -> String {
        self.at.to_string()
    }
}

async fn post<T: serde::de::DeserializeOwned>(
    instance: &Instance,
    named: &Named,
    action: &str,
    body: &impl serde::Serialize,
) -> Result<T> {
    instance.ask(Method::POST, &format!("/sinks/{}/{action}", named.sink), body).await
}

fn reason(named: &Named) -> Reason {
    Reason { who: Some(user()), why: named.why.clone() }
}

/// The name of the person at the terminal, as the system knows it.
pub(super) fn user() -> String {
    let names =
        ["SUDO_USER", "USER", "LOGNAME"].into_iter().filter_map(|name| std::env::var(name).ok());
    names.into_iter().find(|name| !name.is_empty()).unwrap_or_else(|| "cli".to_owned())
}
