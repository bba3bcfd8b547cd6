//! The replication slot
//! (<https://www.postgresql.org/docs/current/view-pg-replication-slots.html>).

use super::{
    catalog::{Cells, quote_text},
    failure::Failure,
    settings::Settings,
    wal2json,
    wire::Client,
};
use crate::{
    change::Lsn,
    config::Plugin,
    error::{Error, Result},
};

/// A slot as the server has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    pub(super) plugin: Option<String>,
    pub(super) database: Option<String>,
    pub(super) temporary: bool,
    /// The process that reads it.
    pub(super) active_pid: Option<u32>,
    /// The log is kept from here on.
    pub(super) restart: Option<Lsn>,
    /// All below it is confirmed.
    pub(super) confirmed: Option<Lsn>,
    pub(super) wal_status: Option<String>,
    /// Why the server gave it up, where it did.
    pub(super) invalidation: Option<String>,
}

/// Reads the slot `name`; `None` where there is none.
pub(super) fn read(client: &mut Client, name: &str) -> Result<Option<Slot>> {
    // Newer columns are read through JSON, so that one statement serves every version. Version 16
    // calls a conflicting slot `lost` too.
    let rows = client.query(&format!(
        "select plugin, database, temporary, active_pid, restart_lsn, confirmed_flush_lsn,
                wal_status,
                coalesce(to_jsonb(s)->>'invalidation_reason',
                         case when to_jsonb(s)->>'conflicting' = 'true' then 'conflict' end,
                         case when wal_status = 'lost' then 'wal_removed' end)
         from pg_replication_slots s where slot_name = {}",
        quote_text(name)
    ))?;
    let Some(row) = rows.into_iter().next() else { return Ok(None) };
    let mut row = Cells(row.into_iter());
    let lsn = |text: Option<String>| text.map(|text| text.parse::<Lsn>()).transpose();
    Ok(Some(Slot {
        plugin: row.maybe(),
        database: row.maybe(),
        temporary: row.flag()?,
        active_pid: row.maybe().and_then(|pid| pid.parse().ok()),
        restart: lsn(row.maybe())?,
        confirmed: lsn(row.maybe())?,
        wal_status: row.maybe(),
        invalidation: row.maybe(),
    }))
}

/// The SQL that creates the slot. From version 17 on it survives a failover to a standby.
pub(super) fn create_sql(settings: &Settings, version: u32) -> String {
    let failover = if version >= 17 { ", failover => true" } else { "" };
    format!(
        "select pg_create_logical_replication_slot({}, '{}'{failover})",
        quote_text(&settings.slot),
        settings.config.plugin.name()
    )
}

/// Creates the slot. The server waits for every transaction that is open, within limits.
pub(super) fn create(client: &mut Client, settings: &Settings, version: u32) -> Result<()> {
    let name = &settings.slot;
    client.query("set statement_timeout = '50s'")?;
    let outcome = client.query(&create_sql(settings, version));
    let _ = client.query("set statement_timeout = 0");
    match outcome {
        Ok(_) => Ok(()),
        Err(failure) if failure.code() == "57014" => {
            Err(Error::retry(format!("creating the slot `{name}` waits for an open transaction"))
                .remedy("end it: select pid, xact_start, query from pg_stat_activity order by 2"))
        }
        // a plugin that is built in is always there
        Err(failure) if failure.code() == "58P01" && settings.config.plugin != Plugin::Pgoutput => {
            Err(wal2json::missing().context(format!("while creating the slot `{name}`")))
        }
        Err(failure) => {
            Err(Error::from(failure).context(format!("while creating the slot `{name}`")))
        }
    }
}

/// Drops the slot; one that is not there is dropped already.
pub(super) fn drop(client: &mut Client, name: &str) -> Result<()> {
    match client.query(&format!("select pg_drop_replication_slot({})", quote_text(name))) {
        Ok(_) => Ok(()),
        Err(failure) if failure.code() == "42704" => Ok(()),
        Err(failure @ Failure::Server(_)) if failure.code() == "55006" => {
            Err(Error::retry(format!("the slot `{name}` is in use"))
                .caused_by(Error::from(failure))
                .remedy("stop the process that reads it, then try again"))
        }
        Err(failure) => {
            Err(Error::from(failure).context(format!("while dropping the slot `{name}`")))
        }
    }
}

/// That the slot is one that Walrace can read, and that nobody else reads it now.
pub(super) fn check(slot: &Slot, settings: &Settings, database: &str) -> Result<()> {
    check_kind(slot, settings, database)?;
    let name = &settings.slot;
    match slot.active_pid {
        Some(pid) => Err(Error::retry(format!(
            "the slot `{name}` is read by another process (pid {pid} of the server)"
        ))
        .remedy("stop the other reader; one slot serves one Walrace")),
        None => Ok(()),
    }
}

/// That the slot is one that Walrace can read.
pub(super) fn check_kind(slot: &Slot, settings: &Settings, database: &str) -> Result<()> {
    let (name, plugin) = (&settings.slot, settings.config.plugin.name());
    let wrong = |what: String| {
        Err(Error::config(format!("the slot `{name}` {what}"))
            .remedy("name another one by `slot` in this source, or drop it"))
    };
    match slot.plugin.as_deref() {
        Some(found) if found == plugin => {}
        Some(found) => return Err(other_plugin(name, found, plugin)),
        None => return wrong("is a physical one".into()),
    }
    if slot.database.as_deref() != Some(database) {
        let owner = slot.database.as_deref().unwrap_or("no database");
        return wrong(format!("belongs to the database `{owner}`, not to `{database}`"));
    }
    if slot.temporary {
        return wrong("is a temporary one".into());
    }
    Ok(())
}

/// That the server has not given the slot up; for who has no journal to name what is missing.
pub(super) fn check_valid(slot: &Slot, name: &str) -> Result<()> {
    match &slot.invalidation {
        None => Ok(()),
        Some(reason) => Err(Error::config(format!(
            "the slot `{name}` was invalidated by the server ({reason}): what it needs is gone"
        ))
        .remedy(
            "`walrace source create <name> --accept-gap` begins anew from now and records the \
             gap; to keep more log, raise max_slot_wal_keep_size",
        )),
    }
}

fn other_plugin(slot: &str, found: &str, wanted: &str) -> Error {
    let known = [Plugin::Pgoutput, Plugin::Wal2json].map(Plugin::name).contains(&found);
    let adopt = match known {
        true => format!("to adopt it, set plugin = \"{found}\" in this source; else "),
        false => String::new(),
    };
    Error::config(format!("the slot `{slot}` is of the plugin `{found}`, not of `{wanted}`"))
        .remedy(format!("{adopt}name another one by `slot` in this source, or drop it"))
}
