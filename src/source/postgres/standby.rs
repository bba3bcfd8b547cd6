//! A standby as source: what it can decode since PostgreSQL 16, what only its primary can do, and
//! the timeline that it is on while it is promoted.

use std::time::{Duration, Instant};

use super::{
    catalog::{Cells, quote_text},
    checks::{self, Server},
    settings::Settings,
    slot,
    url::Target,
    wire::{Client, Purpose},
};
use crate::{
    change::Lsn,
    error::{Error, Result},
};

/// The first version that decodes on a standby.
const VERSION_MIN: u32 = 16;
/// How long the standby may take to replay what was made at the primary.
const REPLAY_MAX: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(50);
/// The primary is asked this often to log what a new slot waits for.
const NUDGE_INTERVAL: Duration = Duration::from_millis(250);

/// That a standby can be a source at all.
pub(super) fn check(server: &Server) -> Result<()> {
    if server.in_recovery { check_version(server.version) } else { Ok(()) }
}

/// That a standby of this major version can be one.
pub(super) fn check_version(version: u32) -> Result<()> {
    match version < VERSION_MIN {
        true => Err(Error::config(format!(
            "the url leads to a standby, and PostgreSQL {version} cannot decode on one; \
             {VERSION_MIN} and later can"
        ))
        .remedy("let the source's url lead to the primary")),
        false => Ok(()),
    }
}

/// A session that may write: on the primary where the source is a standby.
pub(super) fn writer(settings: &Settings, server: &Server) -> Result<Option<Client>> {
    match (&settings.primary, server.in_recovery) {
        (Some(primary), true) => Client::connect(primary, Purpose::Sql).map(Some),
        _ => Ok(None),
    }
}

/// What cannot be made on a standby, and nobody was named who could.
pub(super) fn read_only(settings: &Settings, what: &str) -> Error {
    Error::config(format!("{what} is missing, and cannot be made on a standby")).remedy(format!(
        "set `primary_url` of source.{} to the url of the primary; or make it there by hand",
        settings.name
    ))
}

/// Waits until the standby has replayed the publications that were made at the primary.
pub(super) fn wait_for_publications(client: &mut Client, names: &[String]) -> Result<()> {
    let list: Vec<_> = names.iter().map(|name| quote_text(name)).collect();
    let sql = format!("select count(*) from pg_publication where pubname in ({})", list.join(","));
    let begin = Instant::now();
    loop {
        let count = client.value(&sql)?.and_then(|count| count.parse().ok());
        if count == Some(names.len()) {
            return Ok(());
        }
        if begin.elapsed() > REPLAY_MAX {
            let what = "the standby has not replayed the publications that its primary has";
            return Err(Error::retry(what)
                .remedy("does it follow the primary of `primary_url`? pg_stat_replication shows"));
        }
        std::thread::sleep(POLL);
    }
}

/// Creates the slot on the standby. It begins at a record of the running transactions, which the
/// primary is asked for meanwhile; an idle one writes none by itself.
pub(super) fn create_slot(client: &mut Client, settings: &Settings, server: &Server) -> Result<()> {
    let (done, ended) = std::sync::mpsc::sync_channel::<()>(1);
    let primary = settings.primary.clone();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            if let Some(primary) = primary {
                nudge(&primary, &ended);
            }
        });
        let created = slot::create(client, settings, server.slot_version());
        drop(done);
        created
    })
    .map_err(|error| match settings.primary {
        Some(_) => error,
        None => error.remedy(
            "at the primary: select pg_log_standby_snapshot(); or set `primary_url`, so that \
             walrace does it",
        ),
    })
}

/// Until the other end is dropped. What fails here only makes the slot wait for longer.
fn nudge(primary: &Target, ended: &std::sync::mpsc::Receiver<()>) {
    let Ok(mut client) = Client::connect(primary, Purpose::Sql) else { return };
    loop {
        if let Err(failure) = client.query("select pg_log_standby_snapshot()") {
            let error = Error::from(failure);
            tracing::debug!(%error, "the primary does not log its running transactions");
            return;
        }
        match ended.recv_timeout(NUDGE_INTERVAL) {
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {}
            _ => return,
        }
    }
}

/// The timeline of what a standby sends. Decoding goes on while it is promoted, or follows a new
/// primary, and the stream does not say so: a position would keep the old timeline behind the
/// point where that ended, and look like another history on the next connect. So the server is
/// asked after each batch has arrived: a timeline that it is still on then, it was on before.
pub(super) struct Timelines {
    settings: Settings,
    client: Option<Client>,
    /// The timeline, and where it began.
    known: Vec<(Lsn, u32)>,
    /// A primary stays on its timeline.
    settled: bool,
}

impl Timelines {
    /// Those of a server that is in recovery; `None` for a primary.
    pub(super) fn new(settings: &Settings, server: &Server) -> Option<Self> {
        server.in_recovery.then(|| Self {
            settings: settings.clone(),
            client: None,
            known: vec![(Lsn(0), server.timeline)],
            settled: false,
        })
    }

    /// The timeline of what has arrived and ends at `lsn`. Blocks.
    pub(super) fn of(&mut self, lsn: Lsn) -> Result<u32> {
        if !self.settled {
            self.ask()?;
        }
        let of = self.known.iter().rev().find(|(begin, _)| *begin < lsn);
        let first = self.known.first().map_or(0, |(_, timeline)| *timeline);
        Ok(of.map_or(first, |(_, timeline)| *timeline))
    }

    fn ask(&mut self) -> Result<()> {
        let target = &self.settings.target;
        let client = match self.client.take() {
            Some(client) => self.client.insert(client),
            None => self.client.insert(Client::connect(target, Purpose::Replication)?),
        };
        let rows = client.query("IDENTIFY_SYSTEM")?;
        let mut row = Cells(rows.into_iter().next().unwrap_or_default().into_iter());
        let (_, timeline): (String, u32) = (row.text()?, row.number()?);
        let last = self.known.last().map_or(timeline, |(_, timeline)| *timeline);
        if timeline != last {
            let switch = checks::timeline_switch(client, timeline, last)?
                .ok_or_else(|| Error::retry(format!("timeline {timeline} is not known yet")))?;
            let source = &self.settings.name;
            let what = format!("the server went from timeline {last} to {timeline} at {switch}");
            tracing::info!(%source, "{what}");
            self.known.push((switch, timeline));
            self.settled = client.value("select pg_is_in_recovery()")?.as_deref() == Some("f");
        }
        Ok(())
    }
}
