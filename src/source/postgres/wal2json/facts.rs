//! What the catalog knows, by name, of a table that a line names. It knows the present; the line
//! shows the past.

use super::super::catalog::{Catalog, Cells, quote_text};
use crate::{
    change::Timestamp,
    error::{Result, ResultExt},
    schema::Identity,
};

/// A table now, and the tables that it is a partition of.
#[derive(Clone, Debug)]
pub(super) struct Facts {
    /// The server's clock when it was asked.
    pub(super) at: Timestamp,
    /// The transaction that was the last to define one of them anew.
    pub(super) changed_by: u32,
    /// The table itself, its parent, and so on to the root.
    pub(super) chain: Vec<Link>,
}

/// A table of a [`Facts::chain`].
#[derive(Clone, Debug)]
pub(super) struct Link {
    pub(super) oid: u32,
    pub(super) schema: String,
    pub(super) name: String,
    pub(super) partitioned: bool,
    /// A table whose changes are logged, and not, say, a materialized view.
    pub(super) capturable: bool,
    pub(super) identity: Identity,
}

/// A column of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Attribute {
    pub(super) number: u16,
    pub(super) name: String,
    pub(super) type_oid: u32,
    pub(super) modifier: i32,
    /// Generated columns are not replicated.
    pub(super) generated: bool,
    /// Of a type whose large values are stored aside.
    pub(super) toastable: bool,
    /// Part of the replica identity.
    pub(super) key: bool,
}

impl Catalog {
    /// The table of that name and those above it; `None` where there is none any more.
    pub(super) fn facts(&mut self, schema: &str, table: &str) -> Result<Option<Facts>> {
        let rows = self
            .query(&format!(
                "with self as (
                   select c.oid from pg_class c join pg_namespace n on n.oid = c.relnamespace
                   where n.nspname = {} and c.relname = {})
                 select (extract(epoch from clock_timestamp()) * 1000000)::bigint,
                   c.oid, n.nspname, c.relname, c.relkind = 'p',
                   c.relkind in ('r', 'p') and c.relpersistence = 'p'
                     and n.nspname not in ('pg_catalog', 'information_schema'), c.relreplident,
                   c.xmin
                 from (select oid as relid, 0 as level from self union all
                       select t.relid, t.level from self, lateral
                         pg_partition_ancestors(self.oid) with ordinality t (relid, level)
                       where t.relid <> self.oid) chain
                 join pg_class c on c.oid = chain.relid
                 join pg_namespace n on n.oid = c.relnamespace
                 order by chain.level",
                quote_text(schema),
                quote_text(table)
            ))
            .context(|| format!("while looking for {schema}.{table}"))?;
        let chain = Vec::with_capacity(rows.len());
        let mut facts = Facts { at: Timestamp(0), changed_by: 0, chain };
        for row in rows {
            let mut row = Cells(row.into_iter());
            facts.at = Timestamp(row.number()?);
            facts.chain.push(Link {
                oid: row.number()?,
                schema: row.text()?,
                name: row.text()?,
                partitioned: row.flag()?,
                capturable: row.flag()?,
                identity: match row.text()?.as_str() {
                    "f" => Identity::Full,
                    "i" => Identity::Index,
                    "n" => Identity::Nothing,
                    _ => Identity::Default,
                },
            });
            let changed_by: u32 = row.number()?;
            // ids go round
            if changed_by.wrapping_sub(facts.changed_by).cast_signed() > 0 || facts.chain.len() == 1
            {
                facts.changed_by = changed_by;
            }
        }
        Ok((!facts.chain.is_empty()).then_some(facts))
    }

    /// The columns of the table `oid`, in their order.
    pub(super) fn attributes(&mut self, oid: u32) -> Result<Vec<Attribute>> {
        let rows = self
            .query(&format!(
                "select a.attnum, a.attname, a.atttypid, a.atttypmod, a.attgenerated <> '',
                   a.attlen = -1, c.relreplident = 'f' or coalesce(a.attnum = any(i.indkey), false)
                 from pg_class c
                 join pg_attribute a on a.attrelid = c.oid
                 left join pg_index i on i.indrelid = c.oid and i.indisvalid
                   and (c.relreplident = 'd' and i.indisprimary and i.indimmediate
                        or c.relreplident = 'i' and i.indisreplident)
                 where c.oid = {oid} and a.attnum > 0 and not a.attisdropped
                 order by a.attnum"
            ))
            .context(|| format!("while reading the columns of the table {oid}"))?;
        rows.into_iter()
            .map(|row| {
                let mut row = Cells(row.into_iter());
                Ok(Attribute {
                    number: row.number()?,
                    name: row.text()?,
                    type_oid: row.number()?,
                    modifier: row.number()?,
                    generated: row.flag()?,
                    toastable: row.flag()?,
                    key: row.flag()?,
                })
            })
            .collect()
    }
}
