//! A table as its chunk's transaction sees it: its place in the publications, its columns, and
//! whether it was rewritten.

use super::super::{
    catalog::{Cells, quote_text},
    failure::Failure,
    pgoutput::{Relation, RelationColumn},
    wire::Client,
};
use crate::{error::Result, schema::Identity};

/// What a chunk's transaction is told of its table, under the lock that keeps it so.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Seen {
    /// `pg_current_snapshot()`.
    pub(super) snapshot: String,
    /// Changes when the table is rewritten, and rows get other places.
    pub(super) filenode: u32,
    /// What the stream would call it, with the columns that it would send.
    pub(super) relation: Relation,
    /// The publications' row filter.
    pub(super) filter: Option<String>,
}

/// The quoted name of a table; `None` where it was dropped.
pub(super) fn name_of(client: &mut Client, oid: u32) -> Result<Option<String>> {
    Ok(client.value(&format!(
        "select format('%I.%I', n.nspname, c.relname) from pg_class c
         join pg_namespace n on n.oid = c.relnamespace where c.oid = {oid}"
    ))?)
}

/// Locks the table `leaf` against rewrites, and looks at it and at the table `published` under
/// whose name its rows are published; `None` where the name has come to mean another table.
pub(super) fn look(
    client: &mut Client,
    (leaf, name): (u32, &str),
    published: u32,
    (publications, version): (&[String], u32),
) -> std::result::Result<Option<Seen>, Failure> {
    // The lock first: the transaction's snapshot is taken by the first statement after it, so that
    // no rewrite and no truncate lies between the snapshot and the rows.
    client.query(&format!("lock table only {name} in access share mode"))?;
    let rows = client.query(&format!(
        "select pg_current_snapshot()::text, coalesce(pg_relation_filenode({leaf}), 0),
                exists (select from pg_locks where pid = pg_backend_pid() and relation = {leaf}
                        and locktype = 'relation' and granted),
                n.nspname, c.relname, c.relreplident
         from pg_class c join pg_namespace n on n.oid = c.relnamespace
         where c.oid = {published}"
    ))?;
    let Some(row) = rows.into_iter().next() else { return Ok(None) };
    let mut row = Cells(row.into_iter());
    let (snapshot, filenode, locked) = (row.text()?, row.number()?, row.flag()?);
    if !locked {
        return Ok(None);
    }
    let (schema, name) = (row.text()?, row.text()?);
    let identity = match row.text()?.as_str() {
        "f" => Identity::Full,
        "i" => Identity::Index,
        "n" => Identity::Nothing,
        _ => Identity::Default,
    };
    let (listed, filter) = publication(client, published, (publications, version))?;
    let columns = columns(client, (published, identity), listed.as_deref(), version)?;
    let relation = Relation { oid: published, schema, name, identity, columns };
    Ok(Some(Seen { snapshot, filenode, relation, filter }))
}

/// Whether one of the publications has the table.
pub(super) fn is_published(
    client: &mut Client,
    table: u32,
    publications: &[String],
) -> Result<bool> {
    let rows = client.query(&format!(
        "select from pg_publication_tables v
         join pg_namespace n on n.nspname = v.schemaname
         join pg_class c on c.relname = v.tablename and c.relnamespace = n.oid
         where v.pubname in ({}) and c.oid = {table}",
        list(publications)
    ))?;
    Ok(!rows.is_empty())
}

/// The column list and the row filter of the publications.
fn publication(
    client: &mut Client,
    table: u32,
    (publications, version): (&[String], u32),
) -> std::result::Result<(Option<String>, Option<String>), Failure> {
    if version < 15 {
        return Ok((None, None));
    }
    let rows = client.query(&format!(
        "select r.prattrs::text, pg_get_expr(r.prqual, r.prrelid)
         from pg_publication p
         left join pg_publication_rel r on r.prpubid = p.oid and r.prrelid = {table}
         where p.pubname in ({}) and (p.puballtables or r.oid is not null)",
        list(publications)
    ))?;
    let (mut listed, mut filters, mut whole) = (None, Vec::new(), false);
    for row in rows {
        let mut row = Cells(row.into_iter());
        listed = listed.or(row.maybe());
        match row.maybe() {
            Some(filter) => filters.push(format!("({filter})")),
            None => whole = true,
        }
    }
    let filter = (!whole && !filters.is_empty()).then(|| filters.join(" or "));
    Ok((listed, filter))
}

pub(super) fn list(names: &[String]) -> String {
    names.iter().map(|name| quote_text(name)).collect::<Vec<_>>().join(", ")
}

fn columns(
    client: &mut Client,
    (table, identity): (u32, Identity),
    listed: Option<&str>,
    version: u32,
) -> std::result::Result<Vec<RelationColumn>, Failure> {
    let index = match identity {
        Identity::Default => "i.indisprimary",
        Identity::Index => "i.indisreplident",
        Identity::Full | Identity::Nothing => "false",
    };
    let only = match listed {
        Some(numbers) => format!("and a.attnum in ({})", numbers.replace(' ', ",")),
        // Generated columns are sent only where a list names them, from version 18 on.
        None => "and a.attgenerated = ''".to_owned(),
    };
    let only = if version < 18 { format!("{only} and a.attgenerated = ''") } else { only };
    let full = identity == Identity::Full;
    let rows = client.query(&format!(
        "select a.attname, a.atttypid, a.atttypmod, {full} or exists (
             select from pg_index i where i.indrelid = a.attrelid and {index}
             and a.attnum = any (i.indkey))
         from pg_attribute a
         where a.attrelid = {table} and a.attnum > 0 and not a.attisdropped {only}
         order by a.attnum"
    ))?;
    let column = |row: super::super::wire::TextRow| {
        let mut row = Cells(row.into_iter());
        Ok(RelationColumn {
            name: row.text()?,
            type_oid: row.number()?,
            modifier: row.number()?,
            key: row.flag()?,
        })
    };
    let columns: Result<Vec<_>> = rows.into_iter().map(column).collect();
    Ok(columns?)
}
