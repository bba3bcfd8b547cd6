//! What somebody else does to the publications: while we read, and while we were away.
//!
//! The server sends what is published, and says nothing of what is not. A table that is taken out
//! just falls silent, so its membership is looked at.

use std::collections::BTreeSet;

use super::{
    catalog::{Cells, quote_text},
    checks::{Look, Missing, Obstacle},
    publication::{self, Candidate},
    settings::Settings,
    wire::{Client, TextRow},
};
use crate::{
    change::{Member, Origin, Position},
    config::WithoutIdentity,
    error::{Error, Result},
};

/// More tables are not remembered across restarts (the journal's identity file is small); while we
/// read, all are watched.
const REMEMBERED_MAX: usize = 700;

/// Reads the members of the publications `names`.
pub(super) fn members(client: &mut Client, names: &[String]) -> Result<Vec<Member>> {
    if names.is_empty() {
        return Ok(Vec::new()); // the plugin reads no publication
    }
    let list: Vec<_> = names.iter().map(|name| quote_text(name)).collect();
    let rows = client.query(&format!(
        "select r.prrelid, r.prpubid, r.oid
         from pg_publication_rel r join pg_publication p on p.oid = r.prpubid
         where p.pubname in ({}) order by 1, 2",
        list.join(",")
    ))?;
    let member = |row: TextRow| {
        let mut row = Cells(row.into_iter());
        Ok(Member { table: row.number()?, publication: row.number()?, oid: row.number()? })
    };
    rows.into_iter().map(member).collect()
}

/// The tables of `then` that were taken out since, whether or not somebody put them back. One that
/// is in the other publication now was moved there by ourselves, in one transaction.
fn left(then: &[Member], now: &[Member]) -> BTreeSet<u32> {
    let stayed = |member: &&Member| {
        now.iter().any(|other| {
            other.table == member.table
                && (other.oid == member.oid || other.publication != member.publication)
        })
    };
    then.iter().filter(|member| !stayed(member)).map(|member| member.table).collect()
}

/// Notes in `origin` what is published now, to be compared on the next connect.
pub(super) fn remember(
    client: &mut Client,
    names: &[String],
    origin: &mut Origin,
) -> Result<Vec<Member>> {
    origin.publications.clear();
    for name in names {
        if let Some(found) = publication::read(client, name)? {
            origin.publications.push((found.name, found.oid));
        }
    }
    let members = members(client, names)?;
    let few = members.len() <= REMEMBERED_MAX;
    origin.published = if few { members.clone() } else { Vec::new() };
    Ok(members)
}

/// Compares the publications with those that the journal was filled through.
pub(super) fn compare(
    client: &mut Client,
    look: &Look<'_>,
    progress: Position,
) -> Result<std::result::Result<(), Obstacle>> {
    let Some(origin) = &look.known.origin else { return Ok(Ok(())) };
    let settings = look.settings;
    for (name, oid) in &origin.publications {
        if *name != settings.publication && *name != settings.inserts {
            continue; // another one is configured now
        }
        let now = publication::read(client, name)?.map(|publication| publication.oid);
        if now != Some(*oid) {
            return Ok(Err(gone(name, now.is_some(), progress)));
        }
    }
    let taken_out = taken_out(client, settings, origin)?;
    match taken_out.as_slice() {
        [] => Ok(Ok(())),
        names => Ok(Err(unpublished(&names.join(", "), progress))),
    }
}

fn gone(name: &str, made_anew: bool, progress: Position) -> Obstacle {
    let what = if made_anew { "was dropped and made anew" } else { "was dropped" };
    undecodable(name, what, progress)
}

/// The publication was made after a part of the log that the slot still has.
pub(super) fn written_without(name: &str, progress: Position) -> Obstacle {
    undecodable(name, "was not there yet when this part of the log was written", progress)
}

fn undecodable(name: &str, what: &str, progress: Position) -> Obstacle {
    Obstacle::gap(Missing {
        renew: true,
        remedy: Some("nobody else may drop it".into()),
        ..Missing::new(
            format!(
                "the publication `{name}` {what}: the server cannot decode the log that was \
                 written without it"
            ),
            format!("{} to now", progress.lsn),
        )
    })
}

fn unpublished(tables: &str, progress: Position) -> Obstacle {
    Obstacle::gap(Missing {
        to: Some(progress),
        ..Missing::new(
            format!("somebody took {tables} out of the publication"),
            format!("changes of {tables} from when it was taken out until it is put back"),
        )
    })
}

/// Tables that were published when the journal was last filled, are still there and still wanted,
/// and are not published any more.
fn taken_out(client: &mut Client, settings: &Settings, origin: &Origin) -> Result<Vec<String>> {
    let Some(main) = publication::read(client, &settings.publication)? else {
        return Ok(Vec::new());
    };
    let names = [settings.publication.clone(), settings.inserts.clone()];
    let members = members(client, &names)?;
    let gone = left(&origin.published, &members);
    if gone.is_empty() {
        return Ok(Vec::new());
    }
    let managed = publication::is_managed(settings, &main);
    let wanted = wanted(client, settings)?;
    let gone: Vec<_> = wanted.iter().filter(|table| gone.contains(&table.oid)).collect();
    let names: Vec<String> = gone.into_iter().map(Candidate::full_name).collect();
    if !managed {
        warn(settings, &names);
        return Ok(Vec::new()); // its owner may
    }
    Ok(names)
}

fn warn(settings: &Settings, tables: &[String]) {
    let (source, publication) = (&settings.name, &settings.publication);
    for table in tables {
        tracing::warn!(
            %source, %publication, %table,
            "the owner of the publication took the table out: its changes are not captured any more"
        );
    }
}

fn tell(settings: &Settings, tables: &[String]) {
    let (source, publication) = (&settings.name, &settings.publication);
    for table in tables {
        tracing::info!(
            %source, %publication, %table,
            "the owner of the publication put the table in: its changes are captured from now"
        );
    }
}

/// The tables that should be published.
fn wanted(client: &mut Client, settings: &Settings) -> Result<Vec<Candidate>> {
    let inserts = publication::read(client, &settings.inserts)?.is_some();
    let refuse = settings.config.without_identity == WithoutIdentity::Refuse;
    let mut wanted = publication::wanted(client, settings)?;
    if inserts && !refuse {
        wanted.whole.append(&mut wanted.inserts);
    }
    Ok(wanted.whole)
}

/// What is looked at while we read.
pub(super) struct Watch {
    names: Vec<String>,
    managed: bool,
    members: Vec<Member>,
}

impl Watch {
    /// Of the publications `names` with the members that they have now.
    pub(super) fn new(names: Vec<String>, managed: bool, members: Vec<Member>) -> Self {
        Self { names, managed, members }
    }

    /// Whether Walrace keeps the publications up to date.
    pub(super) fn is_managed(&self) -> bool {
        self.managed
    }

    /// The error that stops the source when somebody else took something out since the last look.
    /// What we took out ourselves is not wanted any more.
    pub(super) fn look(
        &mut self,
        client: &mut Client,
        settings: &Settings,
    ) -> Result<Option<Error>> {
        for name in &self.names {
            if publication::read(client, name)?.is_none() {
                let what = format!("the publication `{name}` was dropped while it was read");
                return Ok(Some(stop(settings, what, "what is committed without it")));
            }
        }
        let now = members(client, &self.names)?;
        let (gone, new) = (left(&self.members, &now), left(&now, &self.members));
        if gone.is_empty() && (self.managed || new.is_empty()) {
            self.members = now;
            return Ok(None);
        }
        let wanted = wanted(client, settings)?;
        let names = |of: &BTreeSet<u32>| -> Vec<String> {
            let chosen = wanted.iter().filter(|table| of.contains(&table.oid));
            chosen.map(Candidate::full_name).collect()
        };
        let gone = names(&gone);
        self.members = now; // not before all that is told of it is known
        if !self.managed {
            warn(settings, &gone);
            tell(settings, &names(&new));
            return Ok(None);
        }
        if gone.is_empty() {
            return Ok(None);
        }
        let tables = gone.join(", ");
        let what = format!("somebody took {tables} out of the publication");
        Ok(Some(stop(settings, what, &format!("changes of {tables} until it is put back"))))
    }
}

fn stop(settings: &Settings, what: String, range: &str) -> Error {
    Obstacle::gap(Missing::new(what, range.to_owned())).into_error(&settings.name)
}
