//! `walrace check`: everything that could stop a source, found before it starts.

use serde::Serialize;

use super::{
    blocking,
    catalog::{Cells, quote_name},
    checks::{Server, VERSIONS},
    operate::{self, Status},
    publication::{self, Candidate},
    settings::Settings,
    slot, standby,
    url::Host,
    wal2json,
    wire::{Client, Purpose},
};
use crate::{
    config::{self, Plugin, WithoutIdentity},
    error::Result,
    tls::Mode,
};

/// How bad a [`Finding`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// As it should be.
    Ok,
    /// It works, but somebody should know.
    Warning,
    /// The source will not start.
    Error,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How bad it is.
    pub level: Level,
    /// What was looked at: `wal_level`, `public.orders`.
    pub subject: String,
    /// What was found.
    pub text: String,
    /// The SQL that mends it, where SQL does.
    pub sql: Option<String>,
}

/// Looks at all that the source `name` needs, and changes nothing.
pub async fn preflight(name: &str, config: &config::Postgres) -> Vec<Finding> {
    let settings = match Settings::new(name, config) {
        Ok(settings) => settings,
        Err(error) => return vec![error_finding("url", &error)],
    };
    let outcome = blocking(move || Ok(look(&settings))).await;
    outcome.unwrap_or_else(|error| vec![error_finding("check", &error)])
}

fn error_finding(subject: &str, error: &crate::error::Error) -> Finding {
    Finding { level: Level::Error, subject: subject.into(), text: error.to_string(), sql: None }
}

fn look(settings: &Settings) -> Vec<Finding> {
    let mut report = Report::default();
    let mut client = match Client::connect(&settings.target, Purpose::Sql) {
        Ok(client) => client,
        Err(error) => return vec![error_finding("connection", &error)],
    };
    report.ok("connection", format!("{} answers", settings.target.address()));
    look_at_tls(settings, &client, &mut report);
    if let Err(error) = look_at_database(settings, &mut client, &mut report) {
        report.0.push(error_finding("check", &error));
    }
    match Client::connect(&settings.target, Purpose::Replication)
        .and_then(|mut walsender| Server::identify(&mut walsender))
    {
        Ok(_) => report.ok("replication", "the role may replicate".into()),
        Err(error) => report.0.push(error_finding("replication", &error)),
    }
    report.0
}

fn look_at_tls(settings: &Settings, client: &Client, report: &mut Report) {
    match (&settings.target.host, client.is_encrypted()) {
        (Host::Unix(_), _) => report.ok("tls", "a unix socket needs none".into()),
        (_, false) => report.warn("tls", "the connection is not encrypted".into(), None),
        (_, true) if settings.target.tls.mode == Mode::VerifyFull => {
            report.ok("tls", "encrypted, and the server is verified".into());
        }
        (_, true) => {
            let text = "encrypted, but the server's name is not verified; use sslmode=verify-full";
            report.warn("tls", text.into(), None);
        }
    }
}

fn look_at_database(settings: &Settings, client: &mut Client, report: &mut Report) -> Result<()> {
    let status = operate::read_status(client, settings)?;
    match VERSIONS.contains(&status.version) {
        true => report.ok("version", format!("PostgreSQL {}", status.version)),
        false => report.warn(
            "version",
            format!(
                "PostgreSQL {} is not tested; {} to {} are",
                status.version,
                VERSIONS.start(),
                VERSIONS.end()
            ),
            None,
        ),
    }
    look_at_standby(settings, client, &status, report)?;
    look_at_settings(client, &status, report)?;
    look_at_plugin(settings, client, report)?;
    look_at_slot(settings, &status, client, report)?;
    look_at_tables(settings, &status, client, report)
}

/// What a standby can do as a source, and who does for it what it cannot.
fn look_at_standby(
    settings: &Settings,
    client: &mut Client,
    status: &Status,
    report: &mut Report,
) -> Result<()> {
    if client.value("select pg_is_in_recovery()")?.as_deref() != Some("t") {
        return Ok(());
    }
    if let Err(error) = standby::check_version(status.version) {
        report.0.push(error_finding("standby", &error));
        return Ok(());
    }
    match settings.primary.as_ref().map(|primary| Client::connect(primary, Purpose::Sql)) {
        Some(Ok(_)) => report.ok("standby", "its primary answers".into()),
        Some(Err(error)) => report.0.push(error_finding("primary_url", &error)),
        None => report.warn(
            "standby",
            "without `primary_url` the publication is made by hand at the primary".into(),
            None,
        ),
    }
    if client.value("select current_setting('hot_standby_feedback')")?.as_deref() != Some("on") {
        report.warn(
            "hot_standby_feedback",
            "off: a vacuum at the primary may invalidate the slot".into(),
            Some("ALTER SYSTEM SET hot_standby_feedback = on".into()),
        );
    }
    Ok(())
}

fn look_at_settings(client: &mut Client, status: &Status, report: &mut Report) -> Result<()> {
    let rows = client.query(
        "select current_setting('wal_level'), current_setting('max_replication_slots')::int,
                (select count(*) from pg_replication_slots),
                current_setting('max_wal_senders')::int, (select count(*) from pg_stat_replication),
                current_setting('max_slot_wal_keep_size')",
    )?;
    let mut row = Cells(rows.into_iter().next().unwrap_or_default().into_iter());
    match row.text()?.as_str() {
        "logical" => report.ok("wal_level", "logical".into()),
        other => report.error(
            "wal_level",
            format!("`{other}`, but logical replication needs `logical`; restart after the change"),
            Some("ALTER SYSTEM SET wal_level = logical".into()),
        ),
    }
    for (subject, needed) in
        [("max_replication_slots", status.slot.is_none()), ("max_wal_senders", true)]
    {
        let (limit, used): (u64, u64) = (row.number()?, row.number()?);
        let text = format!("{used} of {limit} in use");
        match used < limit || !needed {
            true => report.ok(subject, text),
            false => report.error(
                subject,
                text,
                Some(format!("ALTER SYSTEM SET {subject} = {}", limit + 10)),
            ),
        }
    }
    match row.text()?.as_str() {
        "-1" => report.warn(
            "max_slot_wal_keep_size",
            "without limit: a source that stays down fills the server's disk".into(),
            Some("ALTER SYSTEM SET max_slot_wal_keep_size = '50GB'".into()),
        ),
        limit => report.ok("max_slot_wal_keep_size", limit.to_owned()),
    }
    Ok(())
}

/// pgoutput is always there.
fn look_at_plugin(settings: &Settings, client: &mut Client, report: &mut Report) -> Result<()> {
    if settings.config.plugin != Plugin::Wal2json {
        return Ok(());
    }
    match wal2json::is_installed(client) {
        Some(true) => report.ok("plugin wal2json", "installed".into()),
        Some(false) => report.0.push(error_finding("plugin wal2json", &wal2json::missing())),
        None => report.warn(
            "plugin wal2json",
            "the server does not say whether it is installed".into(),
            None,
        ),
    }
    match client.value("select current_setting('server_encoding')")?.as_deref() {
        Some("UTF8" | "SQL_ASCII") => {}
        other => report.error(
            "encoding",
            format!(
                "{}: the plugin wal2json does not convert it; use plugin = \"pgoutput\"",
                other.unwrap_or("unknown")
            ),
            None,
        ),
    }
    Ok(())
}

fn look_at_slot(
    settings: &Settings,
    status: &Status,
    client: &mut Client,
    report: &mut Report,
) -> Result<()> {
    let subject = format!("slot {}", settings.slot);
    let Some(slot) = slot::read(client, &settings.slot)? else {
        let sql = slot::create_sql(settings, status.version);
        match settings.config.create {
            true => report.ok(&subject, "not there yet; it will be created".into()),
            false => report.error(&subject, "missing".into(), Some(sql)),
        }
        return Ok(());
    };
    if let Err(error) = slot::check_kind(&slot, settings, &status.database) {
        report.0.push(error_finding(&subject, &error));
        return Ok(());
    }
    let retained = status.slot.as_ref().map_or(0, |slot| slot.retained_bytes);
    let text = format!("keeps {retained} bytes of log");
    match slot.active_pid {
        Some(pid) => report.warn(&subject, format!("{text}; read by pid {pid} now"), None),
        None => report.ok(&subject, text),
    }
    Ok(())
}

fn look_at_tables(
    settings: &Settings,
    status: &Status,
    client: &mut Client,
    report: &mut Report,
) -> Result<()> {
    let chosen = publication::choose(publication::candidates(client)?, &settings.config.tables);
    if chosen.is_empty() {
        report.warn("tables", "no table matches the globs".into(), None);
    }
    for table in &chosen {
        look_at_table(settings, table, report);
    }
    if settings.config.plugin != Plugin::Pgoutput {
        report.ok("publication", "the plugin needs none".into());
        return Ok(());
    }
    let subject = format!("publication {}", settings.publication);
    let Some(main) = status.publications.iter().find(|p| p.name == settings.publication) else {
        match settings.config.create {
            true => return look_at_privileges(settings, client, report),
            false => {
                let wanted = publication::wanted(client, settings)?;
                let names = [settings.publication.as_str(), settings.inserts.as_str()];
                let sql = publication::create_sql(settings, &names, &wanted).join(";\n");
                report.error(&subject, "missing".into(), Some(sql));
            }
        }
        return Ok(());
    };
    let published: Vec<&String> =
        status.publications.iter().flat_map(|publication| &publication.tables).collect();
    let missing: Vec<_> = chosen
        .iter()
        .filter(|table| !main.all_tables && !published.contains(&&table.full_name()))
        .collect();
    match (missing.as_slice(), main.managed) {
        ([], _) => report.ok(&subject, format!("{} tables", published.len())),
        (_, true) => report.ok(&subject, format!("{} tables will be added", missing.len())),
        (_, false) => {
            let names: Vec<_> = missing.iter().map(|table| table.full_name()).collect();
            let list: Vec<_> = missing
                .iter()
                .map(|table| format!("{}.{}", quote_name(&table.schema), quote_name(&table.name)))
                .collect();
            let name = quote_name(&settings.publication);
            report.warn(
                &subject,
                format!("it is not ours to change, and lacks {}", names.join(", ")),
                Some(format!("ALTER PUBLICATION {name} ADD TABLE {}", list.join(", "))),
            );
        }
    }
    Ok(())
}

fn look_at_table(settings: &Settings, table: &Candidate, report: &mut Report) {
    let sql = Some(publication::identity_sql(table));
    match (table.has_identity, settings.config.without_identity) {
        (true, _) => report.ok(&table.full_name(), "every change is captured".into()),
        (false, WithoutIdentity::Inserts) => report.warn(
            &table.full_name(),
            "no replica identity: only inserts and truncates are captured".into(),
            sql,
        ),
        (false, WithoutIdentity::Refuse) => {
            report.error(&table.full_name(), "no replica identity".into(), sql);
        }
    }
}

fn look_at_privileges(settings: &Settings, client: &mut Client, report: &mut Report) -> Result<()> {
    let user = quote_name(&settings.target.user);
    let may_create = client
        .value("select has_database_privilege(current_database(), 'create')")?
        .is_some_and(|answer| answer == "t");
    let database = client.value("select current_database()")?.unwrap_or_default();
    match may_create {
        true => report.ok("privileges", "the role may create publications".into()),
        false => report.error(
            "privileges",
            "the role may not create a publication".into(),
            Some(format!("GRANT CREATE ON DATABASE {} TO {user}", quote_name(&database))),
        ),
    }
    let chosen = publication::choose(publication::candidates(client)?, &settings.config.tables);
    for table in chosen {
        let sql = format!(
            "select pg_has_role(relowner, 'usage'), pg_get_userbyid(relowner)
             from pg_class where oid = {}",
            table.oid
        );
        let mut row = Cells(client.query(&sql)?.into_iter().next().unwrap_or_default().into_iter());
        if !row.flag()? {
            let owner = quote_name(&row.maybe().unwrap_or_default());
            report.error(
                &table.full_name(),
                "the role does not own it, so it cannot publish it".into(),
                Some(format!("GRANT {owner} TO {user}")),
            );
        }
    }
    Ok(())
}

#[derive(Default)]
struct Report(Vec<Finding>);

impl Report {
    fn ok(&mut self, subject: &str, text: String) {
        self.0.push(Finding { level: Level::Ok, subject: subject.into(), text, sql: None });
    }

    fn warn(&mut self, subject: &str, text: String, sql: Option<String>) {
        self.0.push(Finding { level: Level::Warning, subject: subject.into(), text, sql });
    }

    fn error(&mut self, subject: &str, text: String, sql: Option<String>) {
        self.0.push(Finding { level: Level::Error, subject: subject.into(), text, sql });
    }
}
