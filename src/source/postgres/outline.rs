//! The tables of a source by the names of their columns, for those who check rules against them.

use super::{
    blocking,
    catalog::Cells,
    publication,
    settings::Settings,
    wire::{Client, Purpose},
};
use crate::{
    config,
    error::Result,
    schema::{Column, Identity, Table, Type},
};

/// The type of a column that is not looked at.
const TEXT: u32 = 25;

/// The tables that the source `name` chooses, each with the names and the key of its columns as
/// they are now; their types are not asked for.
pub async fn tables(name: &str, config: &config::Postgres) -> Result<Vec<Table>> {
    let settings = Settings::new(name, config)?;
    blocking(move || read(&settings)).await
}

fn read(settings: &Settings) -> Result<Vec<Table>> {
    let mut client = Client::connect(&settings.target, Purpose::Sql)?;
    let candidates = publication::candidates(&mut client)?;
    let mut tables = Vec::new();
    for chosen in publication::choose(candidates, &settings.config.tables) {
        let rows = client.query(&format!(
            "select a.attname, coalesce(a.attnum = any(i.indkey), false)
             from pg_attribute a
             left join pg_index i on i.indrelid = a.attrelid and i.indisprimary
             where a.attrelid = {} and a.attnum > 0 and not a.attisdropped order by a.attnum",
            chosen.oid
        ))?;
        let column = |row: super::wire::TextRow| {
            let mut row = Cells(row.into_iter());
            let (name, primary_key) = (row.text()?, row.flag()?);
            let ty = Type::base(TEXT, -1);
            Ok(Column { name, ty, primary_key, identity: primary_key, nullable: None })
        };
        tables.push(Table {
            oid: chosen.oid,
            schema: chosen.schema,
            name: chosen.name,
            identity: Identity::Default,
            columns: rows.into_iter().map(column).collect::<Result<_>>()?,
        });
    }
    Ok(tables)
}
