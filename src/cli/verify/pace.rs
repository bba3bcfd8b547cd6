//! How far the target has to be to have all that the source showed, and whether it is.

use std::time::{Duration, Instant};

use super::Setting;
use crate::{
    change::Lsn,
    cli::instance::Instance,
    error::{Class, Classify, Error, Result},
    journal::{Info, Inspection},
    runtime::{SourceStatus, journal_options},
    source::postgres,
};

/// How often is asked for what is waited for.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Whether a position is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Reached<T> {
    Yes(T),
    /// Not within the limit: why, for people.
    No(String),
}

/// Knows the journal: of a running Walrace by asking it, else by looking.
pub(super) struct Pace {
    instance: Option<Instance>,
}

impl Pace {
    /// Checks too that the target's progress counts in the offsets of this journal.
    pub(super) async fn new(setting: &Setting<'_>) -> Result<Self> {
        let instance = Instance::running(setting.config).await?;
        let journal = match &instance {
            Some(instance) => status(instance, setting).await?.journal,
            None => look(setting).await?,
        };
        match setting.progress().await?.lineage == journal.lineage {
            true => Ok(Self { instance }),
            false => Err(Error::config(format!(
                "the target's progress of sink {} is of another journal than that of source {}",
                setting.sink, setting.source
            ))
            .remedy("name the configuration whose data_dir the sink is fed from by --config")),
        }
    }

    /// An offset of the journal before which lies all that was committed up to `lsn`.
    pub(super) async fn offset_of(&self, setting: &Setting<'_>, lsn: Lsn) -> Result<Reached<u64>> {
        match &self.instance {
            Some(instance) => captured(instance, setting, lsn).await,
            None => at_rest(setting, lsn).await,
        }
    }

    /// Waits until the target has all before `offset`.
    pub(super) async fn target_at(
        &self,
        setting: &Setting<'_>,
        offset: u64,
    ) -> Result<Reached<()>> {
        let deadline = Instant::now() + setting.wait;
        loop {
            let cursor = setting.cursor().await?;
            if cursor >= offset {
                return Ok(Reached::Yes(()));
            }
            if self.instance.is_none() || Instant::now() >= deadline {
                let why = self.why(setting).await;
                return Ok(Reached::No(format!(
                    "the target is at offset {cursor} and the journal at {offset}: {why}"
                )));
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    async fn why(&self, setting: &Setting<'_>) -> String {
        let Some(instance) = &self.instance else {
            return "walrace is not running".to_owned();
        };
        let status = instance.status().await.ok();
        let sinks = status.into_iter().flat_map(|status| status.sinks);
        let mut state = sinks.filter(|sink| sink.name == setting.sink).map(|sink| {
            let reason = sink.state.reason().map(|reason| format!(", {reason}"));
            format!("the sink is {}{}", sink.state.word(), reason.unwrap_or_default())
        });
        state.next().unwrap_or_else(|| "the running walrace has no such sink".to_owned())
    }
}

/// Waits until the running Walrace has confirmed what was committed: then its journal has it.
async fn captured(instance: &Instance, setting: &Setting<'_>, lsn: Lsn) -> Result<Reached<u64>> {
    let deadline = Instant::now() + setting.wait;
    loop {
        let source = status(instance, setting).await?;
        if source.confirmed.is_some_and(|confirmed| confirmed >= lsn) {
            // Asked anew: the journal's end must not be older than the confirmation.
            return Ok(Reached::Yes(status(instance, setting).await?.journal.end));
        }
        if Instant::now() >= deadline {
            let (name, word) = (&source.name, source.state.word());
            let reason = source.state.reason().map(|reason| format!(", {reason}"));
            let reason = reason.unwrap_or_default();
            return Ok(Reached::No(format!(
                "source {name} has not captured all up to {lsn}: it is {word}{reason}"
            )));
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

async fn status(instance: &Instance, setting: &Setting<'_>) -> Result<SourceStatus> {
    let status = instance.status().await?;
    let mut sources = status.sources.into_iter();
    sources.find(|source| source.name == setting.source).ok_or_else(|| {
        Error::config(format!("the running walrace has no source {}", setting.source))
            .remedy("name the configuration that it runs with by --config")
    })
}

/// What the journal has of a Walrace that is not running stands still.
async fn at_rest(setting: &Setting<'_>, lsn: Lsn) -> Result<Reached<u64>> {
    let info = look(setting).await?;
    let progress = info.progress.map_or(Lsn(0), |position| position.lsn);
    if progress >= lsn {
        return Ok(Reached::Yes(info.end));
    }
    setting.origin.wait_for_flush(lsn).await?;
    match postgres::uncaptured(setting.source, setting.postgres, (progress, lsn)).await? {
        false => Ok(Reached::Yes(info.end)),
        true => Ok(Reached::No(format!(
            "walrace is not running, and source {} has committed changes that its journal does \
             not have",
            setting.source
        ))),
    }
}

async fn look(setting: &Setting<'_>) -> Result<Info> {
    let options = journal_options(setting.config, setting.source);
    let look = tokio::task::spawn_blocking(move || Inspection::open(options).map(|j| j.info()));
    look.await.class(Class::Bug, || "reading a journal panicked")?
}
