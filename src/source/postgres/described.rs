//! The tables of a source as the stream would describe them now: for those who ask what a schema
//! breaks before any change carries it.

use super::{
    blocking,
    catalog::{Catalog, Cells},
    pgoutput::{Relation, RelationColumn},
    publication::{self, Candidate},
    settings::Settings,
    wire::{Client, Purpose},
};
use crate::{
    config,
    error::Result,
    schema::{Identity, Table},
};

/// The tables that the source `name` chooses, with their columns, types and keys as they are now.
pub async fn described(name: &str, config: &config::Postgres) -> Result<Vec<Table>> {
    let settings = Settings::new(name, config)?;
    blocking(move || {
        let client = Client::connect(&settings.target, Purpose::Sql)?;
        chosen(&mut Catalog::over(settings.target.clone(), client), &settings.config.tables)
    })
    .await
}

/// The tables that globs choose.
pub(super) fn chosen(catalog: &mut Catalog, globs: &[String]) -> Result<Vec<Table>> {
    let chosen = publication::choose(candidates(catalog)?, globs);
    of(catalog, &chosen)
}

/// Every table that could be captured.
pub(super) fn candidates(catalog: &mut Catalog) -> Result<Vec<Candidate>> {
    publication::candidates(catalog.client()?)
}

/// These tables, in the order of their names.
pub(super) fn of(catalog: &mut Catalog, tables: &[Candidate]) -> Result<Vec<Table>> {
    if tables.is_empty() {
        return Ok(Vec::new());
    }
    let relations = relations(catalog, tables)?;
    relations.iter().map(|relation| catalog.resolve(relation)).collect()
}

/// What the stream would say of the tables: generated columns are not in it.
fn relations(catalog: &mut Catalog, tables: &[Candidate]) -> Result<Vec<Relation>> {
    let oids: Vec<_> = tables.iter().map(|table| table.oid.to_string()).collect();
    let rows = catalog.query(&format!(
        "select c.oid, n.nspname, c.relname, c.relreplident, a.attname, a.atttypid, a.atttypmod,
                case c.relreplident when 'f' then true when 'n' then false
                  when 'd' then coalesce(a.attnum = any(p.indkey), false)
                  else coalesce(a.attnum = any(r.indkey), false) end
         from pg_class c
         join pg_namespace n on n.oid = c.relnamespace
         join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
           and a.attgenerated = ''
         left join pg_index p on p.indrelid = c.oid and p.indisprimary
         left join pg_index r on r.indrelid = c.oid and r.indisreplident
         where c.oid in ({})
         order by n.nspname, c.relname, a.attnum",
        oids.join(",")
    ))?;
    let mut relations: Vec<Relation> = Vec::new();
    for row in rows {
        let mut row = Cells(row.into_iter());
        let (oid, schema, name): (u32, _, _) = (row.number()?, row.text()?, row.text()?);
        let identity = match row.text()?.as_str() {
            "f" => Identity::Full,
            "n" => Identity::Nothing,
            "i" => Identity::Index,
            _ => Identity::Default,
        };
        let (column, type_oid, modifier) = (row.text()?, row.number()?, row.number()?);
        let column = RelationColumn { key: row.flag()?, name: column, type_oid, modifier };
        match relations.last_mut().filter(|last| last.oid == oid) {
            Some(last) => last.columns.push(column),
            None => relations.push(Relation { oid, schema, name, identity, columns: vec![column] }),
        }
    }
    Ok(relations)
}
