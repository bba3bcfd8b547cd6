//! What a comparison of a source with its copy needs to know of it: its tables as rows are read,
//! what its slot has not delivered yet, and who writes to a table at this moment.

use std::sync::Arc;

use super::{
    blocking,
    catalog::{Cells, quote_name, quote_text},
    publication::{self, Candidate},
    settings::Settings,
    wire::{Client, Purpose},
};
use crate::{
    change::Lsn,
    config,
    error::{Error, Result},
    schema::{Column, Identity, Table, Type},
};

/// The type of a column whose structure is not looked at.
const TEXT: u32 = 25;

/// A table of a source whose rows are compared with those of a copy.
#[derive(Clone, Debug)]
pub struct Compared {
    /// The columns that a change of it carries, with the key; the types are known by name alone.
    pub table: Arc<Table>,
    /// The type of each column, as `format_type` prints it without a modifier.
    pub types: Vec<String>,
    /// How SQL names it: `only` where tables that inherit from it are tables of their own.
    pub from: String,
    /// PostgreSQL's estimate of its rows.
    pub rows: u64,
    /// Why not all of its rows are captured, where that is so.
    pub partial: Option<String>,
}

/// The tables that the source `name` chooses, as they are now.
pub async fn compared(name: &str, config: &config::Postgres) -> Result<Vec<Compared>> {
    let settings = Settings::new(name, config)?;
    blocking(move || {
        let mut client = Client::connect(&settings.target, Purpose::Sql)?;
        let candidates = publication::candidates(&mut client)?;
        let chosen = publication::choose(candidates, &settings.config.tables);
        chosen.into_iter().map(|table| read(&mut client, &settings, table)).collect()
    })
    .await
}

/// A generated column is in no change.
fn read(client: &mut Client, settings: &Settings, chosen: Candidate) -> Result<Compared> {
    let rows = client.query(&format!(
        "select a.attname, format_type(a.atttypid, -1), c.relreplident,
                coalesce(a.attnum = any(p.indkey), false), coalesce(a.attnum = any(i.indkey), false)
         from pg_attribute a join pg_class c on c.oid = a.attrelid
         left join pg_index p on p.indrelid = a.attrelid and p.indisprimary
         left join pg_index i on i.indrelid = a.attrelid and i.indisreplident
         where a.attrelid = {} and a.attnum > 0 and not a.attisdropped and a.attgenerated = ''
         order by a.attnum",
        chosen.oid
    ))?;
    let (mut columns, mut types, mut identity) = (Vec::new(), Vec::new(), Identity::Default);
    for row in rows {
        let mut row = Cells(row.into_iter());
        let (name, ty, replica) = (row.text()?, row.text()?, row.text()?);
        let (primary_key, in_index) = (row.flag()?, row.flag()?);
        identity = match replica.as_str() {
            "n" => Identity::Nothing,
            "f" => Identity::Full,
            "i" => Identity::Index,
            _ => Identity::Default,
        };
        let identified = match identity {
            Identity::Nothing => false,
            Identity::Full => true,
            Identity::Index => in_index,
            Identity::Default => primary_key,
        };
        let ty_known = Type::base(TEXT, -1);
        let column =
            Column { name, ty: ty_known, primary_key, identity: identified, nullable: None };
        columns.push(column);
        types.push(ty);
    }
    let partial = partial(client, settings, &chosen)?;
    let only = if chosen.partitioned { "" } else { "only " };
    let from = format!("{only}{}.{}", quote_name(&chosen.schema), quote_name(&chosen.name));
    let Candidate { oid, schema, name, rows, .. } = chosen;
    let table = Arc::new(Table { oid, schema, name, identity, columns });
    Ok(Compared { table, types, from, rows: rows.unsigned_abs(), partial })
}

/// A publication that somebody else made may filter rows or name columns, from version 15 on.
fn partial(client: &mut Client, settings: &Settings, table: &Candidate) -> Result<Option<String>> {
    let rows = client.query(&format!(
        "select p.pubname, r.row #>> '{{prqual}}' is not null
         from pg_publication p join pg_publication_rel l on l.prpubid = p.oid,
              lateral (select to_jsonb(l) as row) r
         where p.pubname in ({}, {}) and l.prrelid = {}
           and (r.row #>> '{{prqual}}' is not null or r.row #>> '{{prattrs}}' is not null)",
        quote_text(&settings.publication),
        quote_text(&settings.inserts),
        table.oid
    ))?;
    let Some(row) = rows.into_iter().next() else { return Ok(None) };
    let mut row = Cells(row.into_iter());
    let (publication, is_filter) = (row.text()?, row.flag()?);
    let what = if is_filter { "filters its rows" } else { "names some of its columns" };
    Ok(Some(format!("publication {publication} {what}")))
}

/// Whether the source committed anything that the journal lacks, whose progress is `from`, up to
/// `to`, as far as it is published. The slot must not be in use; nothing of it is consumed.
pub async fn uncaptured(
    name: &str,
    config: &config::Postgres,
    (from, to): (Lsn, Lsn),
) -> Result<bool> {
    let settings = Settings::new(name, config)?;
    blocking(move || {
        let mut client = Client::connect(&settings.target, Purpose::Sql)?;
        let mut names = Vec::new();
        for name in [&settings.publication, &settings.inserts] {
            if publication::read(&mut client, name)?.is_some() {
                names.push(quote_name(name));
            }
        }
        if names.is_empty() {
            let message = format!("source {} has no publication any more", settings.name);
            return Err(Error::config(message).remedy("`walrace source create`"));
        }
        // `B` and `C` are the begin and the commit of what may be empty; version 14 sends them.
        let answer = client.value(&format!(
            "select exists (select from pg_logical_slot_peek_binary_changes({}, '{to}', null,
                 'proto_version', '1', 'publication_names', {}) group by xid
             having bool_or(get_byte(data, 0) not in (66, 67)) and max(lsn) > '{from}')",
            quote_text(&settings.slot),
            quote_text(&names.join(","))
        ))?;
        Ok(answer.is_some_and(|answer| answer == "t"))
    })
    .await
}
