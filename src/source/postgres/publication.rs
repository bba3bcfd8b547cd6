//! Which tables are published, and how
//! (<https://www.postgresql.org/docs/current/logical-replication-publication.html>).
//!
//! Tables that have a replica identity are in the publication itself; those without one are in a
//! second publication of inserts and truncates, because to publish their updates and deletes would
//! make the application's own statements fail.

use std::collections::BTreeSet;

use super::{
    catalog::{Cells, quote_name, quote_text},
    failure::Failure,
    settings::Settings,
    wire::Client,
};
use crate::{
    config::{Globs, WithoutIdentity},
    error::{Error, Result},
};

/// Written on a publication that Walrace made, and may therefore change.
const MARK: &str = "made and kept by walrace";

/// A table of the database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Candidate {
    pub(super) oid: u32,
    pub(super) schema: String,
    pub(super) name: String,
    pub(super) partitioned: bool,
    /// The table above it, for a partition; else itself.
    pub(super) root: u32,
    /// Whether updates and deletes of it, or of all its partitions, can be published.
    pub(super) has_identity: bool,
    /// PostgreSQL's estimate.
    pub(super) rows: i64,
}

impl Candidate {
    /// `schema.name`, for people.
    pub(super) fn full_name(&self) -> String {
        format!("{}.{}", self.schema, self.name)
    }

    fn sql(&self) -> String {
        // ONLY: children by inheritance are tables of their own, chosen by their own names.
        let only = if self.partitioned { "" } else { "only " };
        format!("{only}{}.{}", quote_name(&self.schema), quote_name(&self.name))
    }
}

/// Every table that could be published.
pub(super) fn candidates(client: &mut Client) -> Result<Vec<Candidate>> {
    let rows = client.query(
        "with identified as (
           select c.oid, c.relreplident = 'f' or exists (
             select from pg_index i where i.indrelid = c.oid and i.indisvalid and
               (c.relreplident = 'd' and i.indisprimary and i.indimmediate
                or c.relreplident = 'i' and i.indisreplident)) as ok
           from pg_class c where c.relkind in ('r', 'p'))
         select c.oid, n.nspname, c.relname, c.relkind = 'p',
           coalesce(pg_partition_root(c.oid), c.oid)::oid,
           own.ok and not exists (
             select from pg_partition_tree(c.oid) t join identified leaf on leaf.oid = t.relid
             where c.relkind = 'p' and t.isleaf and not leaf.ok),
           greatest(c.reltuples, 0)::bigint
         from pg_class c
         join pg_namespace n on n.oid = c.relnamespace
         join identified own on own.oid = c.oid
         where c.relpersistence = 'p'
           and n.nspname not in ('pg_catalog', 'information_schema')
           and n.nspname !~ '^pg_(toast|temp)'
         order by 2, 3",
    )?;
    rows.into_iter()
        .map(|row| {
            let mut row = Cells(row.into_iter());
            Ok(Candidate {
                oid: row.number()?,
                schema: row.text()?,
                name: row.text()?,
                partitioned: row.flag()?,
                root: row.number()?,
                has_identity: row.flag()?,
                rows: row.number()?,
            })
        })
        .collect()
}

/// The candidates that the globs choose. A partition whose root is chosen is published through it.
pub(super) fn choose(candidates: Vec<Candidate>, globs: &[String]) -> Vec<Candidate> {
    let globs = Globs::new(globs);
    let (chosen, _): (Vec<_>, Vec<_>) =
        candidates.into_iter().partition(|table| globs.choose(&table.schema, &table.name));
    let oids: BTreeSet<u32> = chosen.iter().map(|table| table.oid).collect();
    chosen
        .into_iter()
        .filter(|table| table.root == table.oid || !oids.contains(&table.root))
        .collect()
}

/// A publication as the server has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Publication {
    pub(super) name: String,
    pub(super) all_tables: bool,
    /// Made by Walrace.
    pub(super) marked: bool,
    /// The tables that are named in it.
    pub(super) tables: BTreeSet<u32>,
}

/// Reads the publication `name`; `None` where there is none.
pub(super) fn read(client: &mut Client, name: &str) -> Result<Option<Publication>> {
    let rows = client.query(&format!(
        "select p.puballtables, coalesce(obj_description(p.oid, 'pg_publication'), ''),
                (select string_agg(r.prrelid::text, ',') from pg_publication_rel r
                 where r.prpubid = p.oid)
         from pg_publication p where pubname = {}",
        quote_text(name)
    ))?;
    let Some(row) = rows.into_iter().next() else { return Ok(None) };
    let mut row = Cells(row.into_iter());
    Ok(Some(Publication {
        name: name.to_owned(),
        all_tables: row.flag()?,
        marked: row.text()? == MARK,
        tables: row
            .maybe()
            .map(|list| list.split(',').filter_map(|oid| oid.parse().ok()).collect())
            .unwrap_or_default(),
    }))
}

/// The tables that a publication publishes, however it names them, as `schema.table`, sorted.
pub(super) fn published(client: &mut Client, name: &str) -> Result<Vec<String>> {
    let rows = client.query(&format!(
        "select schemaname || '.' || tablename from pg_publication_tables
         where pubname = {} order by 1",
        quote_text(name)
    ))?;
    rows.into_iter().map(|row| Cells(row.into_iter()).text()).collect()
}

/// What the two publications should hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Wanted {
    /// Tables that publish everything.
    pub(super) whole: Vec<Candidate>,
    /// Tables without identity: inserts and truncates only.
    pub(super) inserts: Vec<Candidate>,
}

/// Divides the chosen tables.
pub(super) fn wanted(client: &mut Client, settings: &Settings) -> Result<Wanted> {
    let chosen = choose(candidates(client)?, &settings.config.tables);
    let (whole, inserts) = chosen.into_iter().partition(|table| table.has_identity);
    Ok(Wanted { whole, inserts })
}

/// Why tables without identity cannot be captured, where they cannot: the configuration refuses
/// them, or the publication that they belong into is not there.
fn refusal(settings: &Settings, wanted: &Wanted, may_publish: bool) -> Result<()> {
    let [first, ..] = wanted.inserts.as_slice() else { return Ok(()) };
    let names: Vec<_> = wanted.inserts.iter().map(Candidate::full_name).collect();
    let names = names.join(", ");
    let otherwise = match (settings.config.without_identity, may_publish) {
        (WithoutIdentity::Inserts, true) => return Ok(()),
        (WithoutIdentity::Inserts, false) => format!(
            "take the table away by a glob with `!`; or begin anew, with the publication `{}`: \
             `walrace source drop {1}` and `walrace source create {1}`",
            settings.inserts, settings.name
        ),
        (WithoutIdentity::Refuse, _) => {
            "set without_identity = \"inserts\" to capture inserts and truncates only".into()
        }
    };
    Err(Error::config(format!("without a replica identity, and therefore not captured: {names}"))
        .remedy(format!("{}; or {otherwise}", identity_sql(first))))
}

/// The SQL that gives a table an identity.
pub(super) fn identity_sql(table: &Candidate) -> String {
    let name = format!("{}.{}", quote_name(&table.schema), quote_name(&table.name));
    format!("ALTER TABLE {name} REPLICA IDENTITY FULL")
}

/// The SQL that creates the publications `names`, of which both may be missing.
pub(super) fn create_sql(settings: &Settings, names: &[&str], wanted: &Wanted) -> Vec<String> {
    let root = settings.config.publish_via_partition_root;
    let mut statements = Vec::new();
    for name in names {
        let (tables, operations) = match **name == settings.inserts {
            true => (&wanted.inserts, "insert, truncate"),
            false => (&wanted.whole, "insert, update, delete, truncate"),
        };
        let list: Vec<_> = tables.iter().map(Candidate::sql).collect();
        let of =
            if list.is_empty() { String::new() } else { format!("FOR TABLE {} ", list.join(", ")) };
        let name = quote_name(name);
        statements.push(format!(
            "CREATE PUBLICATION {name} {of}WITH (publish = '{operations}', \
             publish_via_partition_root = {root})"
        ));
        statements.push(format!("COMMENT ON PUBLICATION {name} IS '{MARK}'"));
    }
    statements
}

/// Whether Walrace may change the publication.
pub(super) fn is_managed(settings: &Settings, publication: &Publication) -> bool {
    !publication.all_tables && (publication.marked || settings.config.publication.is_none())
}

/// What is read, and whether Walrace keeps it up to date.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Published {
    pub(super) names: Vec<String>,
    pub(super) managed: bool,
    /// What a publication of somebody else held when it was found.
    pub(super) tables: BTreeSet<String>,
}

/// Creates what is missing and brings the rest up to date.
pub(super) fn ensure(
    client: &mut Client,
    settings: &Settings,
    slot_exists: bool,
) -> Result<Published> {
    let main = read(client, &settings.publication)?;
    if let Some(main) = &main
        && !is_managed(settings, main)
    {
        let tables = published(client, &main.name)?.into_iter().collect();
        return Ok(Published { names: vec![main.name.clone()], managed: false, tables });
    }
    let inserts = read(client, &settings.inserts)?;
    let mut names = vec![settings.publication.clone(), settings.inserts.clone()];
    let missing: Vec<&str> = [(&main, &settings.publication), (&inserts, &settings.inserts)]
        .into_iter()
        .filter(|(found, _)| found.is_none())
        .map(|(_, name)| name.as_str())
        .collect();
    match (missing.is_empty(), slot_exists) {
        (true, _) => {}
        (false, false) => {
            let wanted = wanted(client, settings)?;
            refusal(settings, &wanted, true)?;
            create(client, settings, &missing, &wanted)?;
        }
        // The log between the slot and now was written when the publication was not there, and the
        // server refuses to decode it for a publication that was not there yet.
        (false, true) if main.is_none() => return Err(publication_missing(settings)),
        (false, true) => names.truncate(1),
    }
    reconcile(client, settings)?;
    Ok(Published { names, managed: true, tables: BTreeSet::new() })
}

fn publication_missing(settings: &Settings) -> Error {
    Error::config(format!(
        "the publication `{}` is missing although the slot `{}` is there: the server cannot decode \
         the log that was written without it",
        settings.publication, settings.slot
    ))
    .remedy(format!(
        "name the right one by `publication`, or begin anew: `walrace source drop {0}` and \
         `walrace source create {0}`",
        settings.name
    ))
}

fn create(
    client: &mut Client,
    settings: &Settings,
    missing: &[&str],
    wanted: &Wanted,
) -> Result<()> {
    let statements = create_sql(settings, missing, wanted);
    let by_hand = format!("run as the owner of the tables: {};", statements.join("; "));
    if !settings.config.create {
        let message = format!("the publication `{}` is missing", missing.join("` and `"));
        return Err(Error::config(message).remedy(by_hand));
    }
    match client.query(&statements.join("; ")) {
        Ok(_) => Ok(()),
        Err(failure) if failure.code() == "42501" => {
            let Failure::Server(server) = failure else { return Err(failure.into()) };
            Err(Error::config("the role may not create the publication")
                .caused_by(server)
                .remedy(by_hand))
        }
        // a table was dropped meanwhile, or another process was faster: look again
        Err(Failure::Server(server)) if matches!(server.code.as_str(), "42P01" | "42710") => {
            Err(Error::retry("the tables changed while the publication was created")
                .caused_by(server))
        }
        Err(failure) => Err(Error::from(failure).context("while creating the publication")),
    }
}

/// Adds, moves and removes tables until the publications hold what the globs choose; then names the
/// tables that cannot be captured.
pub(super) fn reconcile(client: &mut Client, settings: &Settings) -> Result<()> {
    let Some(main) = read(client, &settings.publication)? else { return Ok(()) };
    if !is_managed(settings, &main) {
        return Ok(());
    }
    let inserts = read(client, &settings.inserts)?;
    let wanted = wanted(client, settings)?;
    let mut statements = alter_sql(&main, &wanted.whole);
    let mut added: Vec<&Candidate> = wanted.whole.iter().collect();
    if let Some(inserts) = &inserts {
        let refuse = settings.config.without_identity == WithoutIdentity::Refuse;
        let chosen = if refuse { &[][..] } else { &wanted.inserts };
        statements.extend(alter_sql(inserts, chosen));
        added.extend(chosen);
    }
    if !statements.is_empty() {
        // One message is one transaction: a table that moves is never in both, nor in neither.
        client.query(&statements.join("; ")).map_err(|failure| {
            let name = &settings.publication;
            Error::from(failure)
                .context(format!("while changing the tables of the publication `{name}`"))
        })?;
    }
    let known = |table: &Candidate| {
        main.tables.contains(&table.oid)
            || inserts.as_ref().is_some_and(|inserts| inserts.tables.contains(&table.oid))
    };
    for table in added.into_iter().filter(|table| !known(table)) {
        let operations = if table.has_identity { "all" } else { "inserts and truncates" };
        let (source, table) = (&settings.name, table.full_name());
        tracing::info!(%source, %table, operations, "a table was found; it is captured from now");
    }
    refusal(settings, &wanted, inserts.is_some())
}

fn alter_sql(publication: &Publication, tables: &[Candidate]) -> Vec<String> {
    let name = quote_name(&publication.name);
    let wanted: BTreeSet<u32> = tables.iter().map(|table| table.oid).collect();
    let added: Vec<_> = tables
        .iter()
        .filter(|table| !publication.tables.contains(&table.oid))
        .map(Candidate::sql)
        .collect();
    let gone: Vec<_> = publication.tables.difference(&wanted).map(u32::to_string).collect();
    let mut statements = Vec::new();
    if !gone.is_empty() {
        // by oid: their names are not known here, and a dropped table has left by itself
        statements.push(format!(
            "do $$ declare t record; begin
               for t in select oid::regclass::text as name from pg_class where oid in ({}) loop
                 execute 'alter publication ' || quote_ident({}) || ' drop table ' || t.name;
               end loop; end $$",
            gone.join(","),
            quote_text(&publication.name)
        ));
    }
    if !added.is_empty() {
        statements.push(format!("ALTER PUBLICATION {name} ADD TABLE {}", added.join(", ")));
    }
    statements
}

/// Drops the publications that Walrace may change; those that are not there are dropped already.
pub(super) fn drop(client: &mut Client, settings: &Settings) -> Result<()> {
    let Some(main) = read(client, &settings.publication)? else {
        return drop_one(client, &settings.inserts);
    };
    match is_managed(settings, &main) {
        true => {
            drop_one(client, &settings.publication)?;
            drop_one(client, &settings.inserts)
        }
        false => Ok(()),
    }
}

fn drop_one(client: &mut Client, name: &str) -> Result<()> {
    let sql = format!("DROP PUBLICATION IF EXISTS {}", quote_name(name));
    client.query(&sql).map(|_| ()).map_err(|failure| {
        Error::from(failure).context(format!("while dropping the publication `{name}`"))
    })
}
