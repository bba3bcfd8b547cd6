//! What a person asks of a source from the command line: its state, its creation and its removal.

use std::time::{Duration, Instant};

use serde::Serialize;

use super::{
    blocking,
    catalog::Cells,
    checks::{self, Server},
    publication::{self, Candidate},
    settings::Settings,
    slot,
    wire::{Client, Purpose},
};
use crate::{
    change::Lsn,
    config::{self, Plugin, Secret},
    error::{Class, Result},
};

/// A walsender that was told to end has ended by then.
const DROP_PATIENCE: Duration = Duration::from_secs(10);

/// The state of a source at the server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Status {
    /// The database's name.
    pub database: String,
    /// The server's major version.
    pub version: u32,
    /// The end of the server's log.
    pub server_end: Lsn,
    /// The slot; `None` where there is none.
    pub slot: Option<SlotStatus>,
    /// The publications that exist.
    pub publications: Vec<PublicationStatus>,
}

/// The state of a replication slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SlotStatus {
    /// Its name.
    pub name: String,
    /// The server's process that reads it.
    pub active_pid: Option<u32>,
    /// All below it is confirmed.
    pub confirmed: Option<Lsn>,
    /// The log is kept from here on.
    pub restart: Option<Lsn>,
    /// Bytes of log from `confirmed` to the server's end.
    pub behind_bytes: u64,
    /// Bytes of log that the slot keeps on the server's disk.
    pub retained_bytes: u64,
    /// `reserved`, `extended`, `unreserved` or `lost`.
    pub wal_status: Option<String>,
    /// Why the server gave it up, where it did.
    pub invalidation: Option<String>,
}

/// The state of a publication.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PublicationStatus {
    /// Its name.
    pub name: String,
    /// `FOR ALL TABLES`.
    pub all_tables: bool,
    /// Made by Walrace, which keeps it up to date with the globs.
    pub managed: bool,
    /// The tables that it publishes, as `schema.table`, sorted.
    pub tables: Vec<String>,
}

/// The state of the source `name` at its server.
pub async fn status(name: &str, config: &config::Postgres) -> Result<Status> {
    let settings = Settings::new(name, config)?;
    blocking(move || {
        let mut client = Client::connect(&settings.target, Purpose::Sql)?;
        read_status(&mut client, &settings)
    })
    .await
}

pub(super) fn read_status(client: &mut Client, settings: &Settings) -> Result<Status> {
    let row = client.query(
        "select current_database(), current_setting('server_version_num')::int / 10000,
                case when pg_is_in_recovery() then pg_last_wal_receive_lsn()
                     else pg_current_wal_lsn() end",
    )?;
    let mut row = Cells(row.into_iter().next().unwrap_or_default().into_iter());
    let (database, version) = (row.text()?, row.number()?);
    let server_end: Lsn = row.maybe().map_or(Ok(Lsn(0)), |text| text.parse())?;
    let slot = slot::read(client, &settings.slot)?;
    let distance = |lsn: Option<Lsn>| lsn.map_or(0, |lsn| server_end.0.saturating_sub(lsn.0));
    let slot = slot.map(|slot| SlotStatus {
        name: settings.slot.clone(),
        active_pid: slot.active_pid,
        behind_bytes: distance(slot.confirmed),
        retained_bytes: distance(slot.restart),
        confirmed: slot.confirmed,
        restart: slot.restart,
        wal_status: slot.wal_status,
        invalidation: slot.invalidation,
    });
    let mut publications = Vec::new();
    let names = match settings.config.plugin {
        Plugin::Pgoutput => &[&settings.publication, &settings.inserts][..],
        Plugin::Wal2json => &[],
    };
    for name in names {
        if let Some(found) = publication::read(client, name)? {
            publications.push(PublicationStatus {
                all_tables: found.all_tables,
                managed: publication::is_managed(settings, &found),
                tables: publication::published(client, name)?,
                name: found.name,
            });
        }
    }
    Ok(Status { database, version, server_end, slot, publications })
}

/// Creates the publications and the slot where they are missing, and changes nothing else.
pub async fn create(name: &str, config: &config::Postgres) -> Result<Status> {
    let mut settings = Settings::new(name, config)?;
    settings.config.create = true; // it is what was asked for
    blocking(move || {
        let mut walsender = Client::connect(&settings.target, Purpose::Replication)?;
        let server = Server::identify(&mut walsender)?;
        checks::check_server(&server)?;
        let mut client = Client::connect(&settings.target, Purpose::Sql)?;
        let (slot, _) = checks::ensure_slot(&mut client, &settings, &server)?;
        slot::check_kind(&slot, &settings, &server.database)?;
        read_status(&mut client, &settings)
    })
    .await
}

/// Drops the slot, then the publications that Walrace made. What is gone already is no error;
/// a slot that is being read is.
pub async fn drop(name: &str, config: &config::Postgres) -> Result<()> {
    let settings = Settings::new(name, config)?;
    blocking(move || {
        let mut client = Client::connect(&settings.target, Purpose::Sql)?;
        slot::drop(&mut client, &settings.slot)?;
        publication::drop(&mut super::connect_writer(&settings)?, &settings)
    })
    .await
}

/// Drops the slot alone, once nobody reads it; waits a little for a reader that is ending.
pub async fn drop_slot(name: &str, config: &config::Postgres) -> Result<()> {
    let settings = Settings::new(name, config)?;
    blocking(move || {
        let mut client = Client::connect(&settings.target, Purpose::Sql)?;
        let deadline = Instant::now() + DROP_PATIENCE;
        loop {
            match slot::drop(&mut client, &settings.slot) {
                Err(error) if error.class() == Class::Retry && Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(50));
                }
                outcome => return outcome,
            }
        }
    })
    .await
}

/// What a database holds, for `walrace init`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Inspection {
    /// The database's name.
    pub database: String,
    /// The server's version, as it calls itself.
    pub version: String,
    /// `wal_level`.
    pub wal_level: String,
    /// Its tables, sorted by schema and name.
    pub tables: Vec<InspectedTable>,
}

/// A table of an [`Inspection`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct InspectedTable {
    /// The schema's name.
    pub schema: String,
    /// The table's name.
    pub name: String,
    /// PostgreSQL's estimate; 0 where it was never analysed.
    pub rows: i64,
    /// Whether its updates and deletes can be published.
    pub has_identity: bool,
}

/// Looks at the database that `url` leads to.
pub async fn inspect(url: &Secret) -> Result<Inspection> {
    let target = super::url::Target::parse(url)?;
    blocking(move || {
        let mut client = Client::connect(&target, Purpose::Sql)?;
        let rows = client.query(
            "select current_database(), current_setting('server_version'),
                    current_setting('wal_level')",
        )?;
        let mut row = Cells(rows.into_iter().next().unwrap_or_default().into_iter());
        let (database, version, wal_level) = (row.text()?, row.text()?, row.text()?);
        let tables = publication::choose(publication::candidates(&mut client)?, &[]);
        let inspected = |Candidate { schema, name, rows, has_identity, .. }| InspectedTable {
            schema,
            name,
            rows,
            has_identity,
        };
        let tables = tables.into_iter().map(inspected).collect();
        Ok(Inspection { database, version, wal_level, tables })
    })
    .await
}
