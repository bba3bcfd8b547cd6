//! What is compared on every connect, before a single byte is read: is this still the history that
//! the journal holds the beginning of?

use super::{
    catalog::Cells,
    failure::Failure,
    publication::{self, Published},
    settings::Settings,
    slot::{self, Slot},
    wire::Client,
};
use crate::{
    change::{Gap, Lsn, Origin, Position},
    error::{Error, Result},
    source::Known,
};

/// The server at the other end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Server {
    /// The system identifier.
    pub(super) system: String,
    pub(super) timeline: u32,
    /// The end of the log that is on the server's disk.
    pub(super) flush: Lsn,
    pub(super) database: String,
    /// The major version.
    pub(super) version: u32,
    pub(super) wal_level: String,
    /// `wal_sender_timeout` in milliseconds; 0: never.
    pub(super) sender_timeout_ms: u64,
}

/// Oldest and newest major versions that are tested.
pub(super) const VERSIONS: std::ops::RangeInclusive<u32> = 14..=18;

impl Server {
    /// Asks a walsender who it is.
    pub(super) fn identify(client: &mut Client) -> Result<Self> {
        let row = client.query("IDENTIFY_SYSTEM")?.into_iter().next().unwrap_or_default();
        let mut row = Cells(row.into_iter());
        let (system, timeline) = (row.text()?, row.number()?);
        let flush = row.text()?.parse()?;
        let database = row.text()?;
        let number = |text: Option<String>| text.and_then(|text| text.parse::<u64>().ok());
        let mut setting = |name: &str| {
            client
                .value(&format!("select setting from pg_catalog.pg_settings where name = '{name}'"))
        };
        let version = number(setting("server_version_num")?).unwrap_or(0) / 10_000;
        Ok(Self {
            system,
            timeline,
            flush,
            database,
            version: u32::try_from(version).unwrap_or(0),
            wal_level: setting("wal_level")?.unwrap_or_default(),
            sender_timeout_ms: number(setting("wal_sender_timeout")?).unwrap_or(60_000),
        })
    }

    fn at(&self, lsn: Lsn) -> Position {
        Position { timeline: self.timeline, lsn, index: 0 }
    }
}

/// A reason not to continue, and whether a person may accept the loss.
#[derive(Debug)]
pub(super) enum Obstacle {
    /// Another history: nothing of it may follow what the journal holds.
    Foreign(Error),
    /// History is missing; it can be accepted as a recorded gap.
    Gap {
        /// Where the journal goes on; `None`: at a slot that is made anew.
        to: Option<Position>,
        reason: String,
        range: String,
    },
}

impl Obstacle {
    /// The error that stops the source.
    pub(super) fn into_error(self, name: &str) -> Error {
        match self {
            Obstacle::Foreign(error) => error,
            Obstacle::Gap { reason, range, .. } => Error::config(format!(
                "{reason}; missing from the journal: {range}"
            ))
            .remedy(format!(
                "`walrace source create {name} --accept-gap` goes on and records the gap; \
                         nothing is skipped before you say so"
            )),
        }
    }
}

/// Compares what the journal knows with the server and the slot.
pub(super) fn compare(
    client: &mut Client,
    settings: &Settings,
    known: &Known,
    server: &Server,
    slot: Option<&Slot>,
) -> Result<std::result::Result<(), Obstacle>> {
    if let Some(foreign) = compare_origin(settings, known.origin.as_ref(), server) {
        return Ok(Err(Obstacle::Foreign(foreign)));
    }
    let Some(progress) = known.progress else {
        let lost = (known.has_changes && slot.is_none()).then(|| missing_slot(settings, None));
        return Ok(lost.map_or(Ok(()), Err));
    };
    let history = match server.timeline == progress.timeline {
        true => None,
        false => Some(timeline_switch(client, server.timeline, progress.timeline)?),
    };
    Ok(compare_history(progress, server, history)
        .and_then(|()| compare_slot(settings, progress, server, slot)))
}

fn compare_origin(settings: &Settings, origin: Option<&Origin>, server: &Server) -> Option<Error> {
    let origin = origin?;
    let now = [&server.system, &server.database, &settings.slot];
    let then = [&origin.system, &origin.database, &origin.slot];
    let what = ["the cluster with the system identifier", "the database", "the slot"];
    let (index, _) = now.iter().zip(&then).enumerate().find(|(_, (now, then))| now != then)?;
    let (what, then, now) = (what.get(index)?, then.get(index)?, now.get(index)?);
    Some(
        Error::config(format!(
            "the journal was filled from {what} `{then}`, but this source leads to `{now}`"
        ))
        .remedy(
            "correct the source's url or slot; or, to begin a new journal, give the source a new \
             name",
        ),
    )
}

/// `switch`: where the server's history left the timeline of our progress, if it ever was on it.
fn compare_history(
    progress: Position,
    server: &Server,
    switch: Option<Option<Lsn>>,
) -> std::result::Result<(), Obstacle> {
    let gap = |reason: String, range: String| Err(Obstacle::Gap { to: None, reason, range });
    match switch {
        None if server.flush < progress.lsn => gap(
            format!(
                "the server was put back (restored): its log ends at {} and the journal has it up \
                 to {}",
                server.flush, progress.lsn
            ),
            format!("what the server writes from {} on differs from the journal", server.flush),
        ),
        Some(Some(switch)) if switch < progress.lsn => gap(
            format!(
                "the server diverged: timeline {} left timeline {} at {switch}, and the journal \
                 has that one up to {}",
                server.timeline, progress.timeline, progress.lsn
            ),
            format!(
                "the journal's {switch} to {} of timeline {} did not happen there",
                progress.lsn, progress.timeline
            ),
        ),
        Some(None) => gap(
            format!(
                "the server diverged: its timeline {} does not descend from timeline {}, which the \
                 journal has up to {}",
                server.timeline, progress.timeline, progress.lsn
            ),
            "unknown".into(),
        ),
        _ => Ok(()),
    }
}

fn compare_slot(
    settings: &Settings,
    progress: Position,
    server: &Server,
    slot: Option<&Slot>,
) -> std::result::Result<(), Obstacle> {
    let Some(slot) = slot else { return Err(missing_slot(settings, Some(progress))) };
    match slot.confirmed {
        Some(confirmed) if confirmed > progress.lsn => Err(Obstacle::Gap {
            to: Some(server.at(confirmed)),
            reason: format!(
                "the slot `{}` was moved ahead to {confirmed}, by another reader or by hand, and \
                 the journal ends at {}",
                settings.slot, progress.lsn
            ),
            range: format!("{} to {confirmed}", progress.lsn),
        }),
        _ => Ok(()),
    }
}

fn missing_slot(settings: &Settings, progress: Option<Position>) -> Obstacle {
    let from = progress.map_or("the journal's end".into(), |at| at.lsn.to_string());
    Obstacle::Gap {
        to: None,
        reason: format!(
            "the slot `{}` is gone: it was dropped, or the server failed over to a standby that \
             does not have it",
            settings.slot
        ),
        range: format!("{from} to now"),
    }
}

/// Where the history of `timeline` left `ancestor`; `None` where it never was on it.
fn timeline_switch(client: &mut Client, timeline: u32, ancestor: u32) -> Result<Option<Lsn>> {
    let rows = match client.query(&format!("TIMELINE_HISTORY {timeline}")) {
        Ok(rows) => rows,
        // timeline 1 has no history file
        Err(Failure::Server(_)) => return Ok(None),
        Err(failure) => return Err(failure.into()),
    };
    let content = rows.into_iter().next().and_then(|row| row.into_iter().nth(1).flatten());
    Ok(content.as_deref().and_then(|text| parse_history(text, ancestor)))
}

/// A history file: `parent timeline`, tab, `switch point`, tab, `reason`.
fn parse_history(text: &str, ancestor: u32) -> Option<Lsn> {
    text.lines().find_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let parent: u32 = fields.next()?.parse().ok()?;
        (parent == ancestor).then(|| fields.next()?.parse().ok()).flatten()
    })
}

/// That the server can do logical decoding at all.
pub(super) fn check_server(server: &Server) -> Result<()> {
    if server.wal_level != "logical" {
        return Err(Error::config(format!(
            "wal_level is `{}`; logical replication needs `logical`",
            server.wal_level
        ))
        .remedy("ALTER SYSTEM SET wal_level = logical; then restart the server"));
    }
    Ok(())
}

/// Publications first, then the slot: what was logged before a publication cannot be decoded for
/// it.
pub(super) fn ensure_slot(
    client: &mut Client,
    settings: &Settings,
    server: &Server,
) -> Result<(Slot, Published)> {
    let found = slot::read(client, &settings.slot)?;
    let published = publication::ensure(client, settings, found.is_some())?;
    let slot = match found {
        Some(slot) => slot,
        None => {
            create_slot(client, settings, server)?;
            slot::read(client, &settings.slot)?
                .ok_or_else(|| Error::retry("the new slot is gone already"))?
        }
    };
    Ok((slot, published))
}

fn create_slot(client: &mut Client, settings: &Settings, server: &Server) -> Result<()> {
    if !settings.config.create {
        let sql = slot::create_sql(settings, server.version);
        return Err(Error::config(format!("the slot `{}` is missing", settings.slot))
            .remedy(format!("run: {sql};")));
    }
    slot::create(client, settings, server.version)
}

/// Removes the obstacle by accepting it: the slot is there afterwards, and the gap is returned for
/// the journal to record.
pub(super) fn accept(
    client: &mut Client,
    settings: &Settings,
    known: &Known,
    server: &Server,
    obstacle: Obstacle,
) -> Result<Gap> {
    let (to, reason) = match obstacle {
        Obstacle::Foreign(error) => return Err(error),
        Obstacle::Gap { to: Some(to), reason, .. } => (to, reason),
        Obstacle::Gap { to: None, reason, .. } => {
            let (slot, _) = ensure_slot(client, settings, server)?;
            let confirmed = slot.confirmed.unwrap_or(server.flush);
            (server.at(confirmed), reason)
        }
    };
    Ok(Gap { from: known.progress.unwrap_or_default(), to, reason })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(timeline: u32, flush: u64) -> Server {
        Server {
            system: "7".into(),
            timeline,
            flush: Lsn(flush),
            database: "app".into(),
            version: 15,
            wal_level: "logical".into(),
            sender_timeout_ms: 0,
        }
    }

    fn progress(timeline: u32, lsn: u64) -> Position {
        Position { timeline, lsn: Lsn(lsn), index: 0 }
    }

    #[test]
    fn a_history_file_names_each_switch() {
        let text = "1\t0/3000000\tno recovery target specified\n\n2\t0/5000060\tpromoted\n";
        assert_eq!(parse_history(text, 1), Some(Lsn(0x0300_0000)));
        assert_eq!(parse_history(text, 2), Some(Lsn(0x0500_0060)));
        assert_eq!(parse_history(text, 3), None);
    }

    #[test]
    fn a_timeline_continues_only_from_at_or_above_progress() {
        let at = progress(1, 100);
        assert!(compare_history(at, &server(2, 200), Some(Some(Lsn(100)))).is_ok());
        assert!(compare_history(at, &server(2, 200), Some(Some(Lsn(99)))).is_err());
        assert!(compare_history(at, &server(2, 200), Some(None)).is_err());
        assert!(compare_history(at, &server(1, 100), None).is_ok());
        assert!(compare_history(at, &server(1, 99), None).is_err());
    }
}
