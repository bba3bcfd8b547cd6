//! What is compared on every connect, before a single byte is read: is this still the history that
//! the journal holds the beginning of?

use super::{
    catalog::Cells,
    failure::Failure,
    history,
    publication::{self, Published},
    settings::Settings,
    slot::{self, Slot},
    standby, watch,
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
    pub(super) database_oid: u32,
    /// A standby: it follows a primary, and its end is what it has received.
    pub(super) in_recovery: bool,
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
        let wal_level = setting("wal_level")?.unwrap_or_default();
        let sender_timeout_ms = number(setting("wal_sender_timeout")?).unwrap_or(60_000);
        let rows = client.query(
            "select oid, pg_is_in_recovery() from pg_database where datname = current_database()",
        )?;
        let mut row = Cells(rows.into_iter().next().unwrap_or_default().into_iter());
        Ok(Self {
            database_oid: row.number()?,
            in_recovery: row.flag()?,
            system,
            timeline,
            flush,
            database,
            version: u32::try_from(version).unwrap_or(0),
            wal_level,
            sender_timeout_ms,
        })
    }

    fn at(&self, lsn: Lsn) -> Position {
        Position { timeline: self.timeline, lsn, index: 0 }
    }

    /// The version by which a slot is made: on a standby it cannot be one for failover.
    pub(super) fn slot_version(&self) -> u32 {
        if self.in_recovery { self.version.min(16) } else { self.version }
    }
}

/// What is compared: what we know, and what is found.
#[derive(Clone, Copy)]
pub(super) struct Look<'a> {
    pub(super) settings: &'a Settings,
    pub(super) known: &'a Known,
    pub(super) server: &'a Server,
    pub(super) slot: Option<&'a Slot>,
}

/// A reason not to continue, and whether a person may accept the loss.
#[derive(Debug)]
pub(super) enum Obstacle {
    /// Another database: nothing of it may follow what the journal holds.
    Foreign(Error),
    /// Another cluster. A person may say that it continues the same database.
    Cluster { then: String, now: String },
    /// History is missing; it can be accepted as a recorded gap.
    Gap(Box<Missing>),
}

/// What the journal may lack, and why.
#[derive(Debug, Default)]
pub(super) struct Missing {
    /// What the journal has for certain; `None`: all up to its progress.
    pub(super) from: Option<Position>,
    /// Where the journal goes on; `None`: where the slot is, or begins.
    pub(super) to: Option<Position>,
    /// The slot is of no use any more: it is made anew.
    pub(super) renew: bool,
    pub(super) reason: String,
    pub(super) range: String,
    /// What keeps it from happening again.
    pub(super) remedy: Option<String>,
}

impl Missing {
    pub(super) fn new(reason: String, range: String) -> Self {
        Self { reason, range, ..Self::default() }
    }
}

impl Obstacle {
    pub(super) fn gap(missing: Missing) -> Self {
        Obstacle::Gap(Box::new(missing))
    }

    /// The error that stops the source.
    pub(super) fn into_error(self, name: &str) -> Error {
        let accept = format!("walrace source create {name} --accept-gap");
        match self {
            Obstacle::Foreign(error) => error,
            Obstacle::Cluster { then, now } => Error::config(format!(
                "the journal was filled from the cluster with the system identifier `{then}`, but \
                 this source leads to `{now}`"
            ))
            .remedy(format!(
                "correct the source's url; if that cluster continues the same database \
                 (pg_upgrade; dump and restore), `{accept} --cluster {now}` goes on with it and \
                 records the gap; to begin a new journal, give the source a new name"
            )),
            Obstacle::Gap(missing) => {
                let hint = missing.remedy.map(|hint| format!("; {hint}")).unwrap_or_default();
                Error::config(format!(
                    "{}; missing from the journal: {}",
                    missing.reason, missing.range
                ))
                .remedy(format!(
                    "`{accept}` goes on and records the gap; nothing is skipped before you say \
                     so{hint}"
                ))
            }
        }
    }
}

/// Nothing stands in the way, or what does.
pub(super) type Verdict = std::result::Result<(), Obstacle>;

/// Compares what the journal knows with the server, the slot and the publications.
pub(super) fn compare(
    walsender: &mut Client,
    client: &mut Client,
    look: &Look<'_>,
) -> Result<Verdict> {
    let Look { settings, known, server, slot } = *look;
    if let Err(obstacle) = compare_origin(settings, known.origin.as_ref(), server) {
        return Ok(Err(obstacle));
    }
    let Some(progress) = known.progress else {
        let lost = (known.has_changes && slot.is_none()).then(|| missing_slot(settings, None));
        return Ok(lost.map_or(Ok(()), Err));
    };
    let history = match server.timeline == progress.timeline {
        true => None,
        false => Some(timeline_switch(walsender, server.timeline, progress.timeline)?),
    };
    if server.in_recovery && server.flush < progress.lsn {
        return Err(behind(progress, server));
    }
    let verdict = compare_history(progress, server, history)
        .and_then(|()| compare_slot(settings, progress, server, slot));
    if verdict.is_err() {
        return Ok(verdict);
    }
    let verdict = watch::compare(client, look, progress)?;
    if verdict.is_err() {
        return Ok(verdict);
    }
    let difference = history::compare(client, look, progress)?;
    Ok(difference.map_or(Ok(()), |difference| Err(put_back(look, progress, difference))))
}

/// A standby that has just started, or lags, is no other history: it comes to our progress.
fn behind(progress: Position, server: &Server) -> Error {
    Error::retry(format!(
        "the standby has the log up to {} only, and the journal up to {}: waiting until it follows",
        server.flush, progress.lsn
    ))
    .remedy("does it follow its primary? pg_stat_wal_receiver shows")
}

fn compare_origin(settings: &Settings, origin: Option<&Origin>, server: &Server) -> Verdict {
    let Some(origin) = origin else { return Ok(()) };
    if origin.system != server.system {
        let (then, now) = (origin.system.clone(), server.system.clone());
        return Err(Obstacle::Cluster { then, now });
    }
    if origin.slot != settings.slot {
        return Err(foreign("the slot", &origin.slot, &settings.slot));
    }
    match (origin.database_oid, origin.database == server.database) {
        // A renamed database is the same one.
        (Some(oid), _) if oid == server.database_oid => Ok(()),
        (None, true) => Ok(()),
        (Some(oid), true) => Err(Obstacle::gap(Missing::new(
            format!(
                "the database `{}` was dropped and made anew (its oid was {oid}, and is {})",
                server.database, server.database_oid
            ),
            "all that was committed in the new database before now".into(),
        ))),
        (_, false) => Err(foreign("the database", &origin.database, &server.database)),
    }
}

fn foreign(what: &str, then: &str, now: &str) -> Obstacle {
    Obstacle::Foreign(
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
fn compare_history(progress: Position, server: &Server, switch: Option<Option<Lsn>>) -> Verdict {
    let gap = |reason, range| Err(Obstacle::gap(Missing::new(reason, range)));
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
) -> Verdict {
    let Some(slot) = slot else { return Err(missing_slot(settings, Some(progress))) };
    if let Some(cause) = &slot.invalidation {
        return Err(invalidated(settings, cause, progress));
    }
    match slot.confirmed {
        Some(confirmed) if confirmed > progress.lsn => Err(Obstacle::gap(Missing {
            to: Some(server.at(confirmed)),
            ..Missing::new(
                format!(
                    "the slot `{}` was moved ahead to {confirmed}, by another reader or by hand, \
                     or made anew, and the journal ends at {}",
                    settings.slot, progress.lsn
                ),
                format!("{} to {confirmed}", progress.lsn),
            )
        })),
        _ => Ok(()),
    }
}

fn invalidated(settings: &Settings, cause: &str, progress: Position) -> Obstacle {
    let hint = match cause {
        "wal_removed" => "to keep more log, raise max_slot_wal_keep_size",
        "idle_timeout" => "to keep idle slots for longer, raise idle_replication_slot_timeout",
        "rows_removed" | "conflict" => {
            "to keep the standby's slots, set hot_standby_feedback = on there, with a physical \
             slot of its own in primary_slot_name"
        }
        "wal_level_insufficient" => "keep wal_level = logical at the primary",
        _ => "the server's log says why it gave the slot up",
    };
    Obstacle::gap(Missing {
        renew: true,
        remedy: Some(hint.into()),
        ..Missing::new(
            format!(
                "the slot `{}` was invalidated by the server ({cause}): the log or the rows that \
                 it needs are gone",
                settings.slot
            ),
            format!("{} to now", progress.lsn),
        )
    })
}

fn missing_slot(settings: &Settings, progress: Option<Position>) -> Obstacle {
    let from = progress.map_or("the journal's end".into(), |at| at.lsn.to_string());
    Obstacle::gap(Missing::new(
        format!(
            "the slot `{}` is gone: it was dropped, alone or with its database, or the server \
             failed over to a standby that does not have it",
            settings.slot
        ),
        format!("{from} to now"),
    ))
}

fn put_back(look: &Look<'_>, progress: Position, difference: history::Difference) -> Obstacle {
    let history::Difference { agreed, what } = difference;
    Obstacle::gap(Missing {
        from: Some(Position { timeline: progress.timeline, lsn: agreed, index: 0 }),
        to: look.slot.and_then(|slot| slot.confirmed).map(|lsn| look.server.at(lsn)),
        ..Missing::new(
            format!(
                "the server was put back (restored) and has written another history since, or it \
                 is a copy that went its own way: {what}"
            ),
            format!(
                "what the server wrote after {agreed}; the journal's {agreed} to {} did not happen \
                 there",
                progress.lsn
            ),
        )
    })
}

/// Where the history of `timeline` left `ancestor`; `None` where it never was on it.
pub(super) fn timeline_switch(
    client: &mut Client,
    timeline: u32,
    ancestor: u32,
) -> Result<Option<Lsn>> {
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
    standby::check(server)?;
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
/// it. On a standby the publications are made at the primary.
pub(super) fn ensure_slot(
    client: &mut Client,
    settings: &Settings,
    server: &Server,
) -> Result<(Slot, Published)> {
    let found = slot::read(client, &settings.slot)?;
    let published = ensure_published(client, settings, server)?;
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

fn ensure_published(
    client: &mut Client,
    settings: &Settings,
    server: &Server,
) -> Result<Published> {
    let slot_exists = slot::read(client, &settings.slot)?.is_some();
    if !server.in_recovery {
        return publication::ensure(client, settings, slot_exists);
    }
    match standby::writer(settings, server)? {
        Some(mut primary) => {
            let published = publication::ensure(&mut primary, settings, slot_exists)?;
            standby::wait_for_publications(client, &published.names)?;
            Ok(published)
        }
        None => publication::adopt(client, settings)?.ok_or_else(|| {
            standby::read_only(settings, &format!("the publication `{}`", settings.publication))
        }),
    }
}

fn create_slot(client: &mut Client, settings: &Settings, server: &Server) -> Result<()> {
    if !settings.config.create {
        let sql = slot::create_sql(settings, server.slot_version());
        return Err(Error::config(format!("the slot `{}` is missing", settings.slot))
            .remedy(format!("run: {sql};")));
    }
    match server.in_recovery {
        true => standby::create_slot(client, settings, server),
        false => slot::create(client, settings, server.slot_version()),
    }
}

/// Removes the obstacle by accepting it: the slot is there afterwards, and the gap is returned for
/// the journal to record.
pub(super) fn accept(client: &mut Client, look: &Look<'_>, obstacle: Obstacle) -> Result<Gap> {
    let missing = match obstacle {
        Obstacle::Foreign(error) => return Err(error),
        Obstacle::Cluster { then, now } => Missing::new(
            format!("the cluster {now} continues what the cluster {then} began"),
            String::new(),
        ),
        Obstacle::Gap(missing) => *missing,
    };
    let Missing { from, to, renew, reason, .. } = missing;
    if renew {
        slot::drop(client, &look.settings.slot)?;
    }
    let to = match to {
        Some(to) => to,
        None => {
            let (slot, _) = ensure_slot(client, look.settings, look.server)?;
            look.server.at(slot.confirmed.unwrap_or(look.server.flush))
        }
    };
    let from = from.or(look.known.progress).unwrap_or_default();
    Ok(Gap { from, to, reason })
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
            database_oid: 5,
            in_recovery: false,
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
