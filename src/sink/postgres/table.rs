//! How the changes of one table are written to the target's: which columns, of which types, found
//! by which key; and what happens where the target lacks some of it.

use std::{collections::HashMap, sync::Arc};

use tokio_postgres::Client;

use super::{failure, sql::quote};
use crate::{
    change::Change,
    config::{MissingColumns, MissingTable},
    error::{Error, Result},
    format::{Names, Template},
    schema::{Identity, Table, Type, TypeKind},
};

/// Oids below this one mean the same type in every server.
const FIRST_OWN_OID: u32 = 16_384;

/// How the changes of one version of a table are written.
#[derive(Debug)]
pub(super) struct Plan {
    /// Tells it from the others of this session.
    pub(super) number: usize,
    /// The target's table, quoted.
    pub(super) name: String,
    /// The columns that are written.
    pub(super) columns: Vec<Column>,
    /// The places of the key among them; empty: a row is found by all of its values.
    pub(super) key: Vec<usize>,
    /// It has rules or triggers, those of foreign keys among them, so the order of its changes and
    /// of other tables' shows.
    pub(super) is_watched: bool,
    /// Rows may come by COPY.
    pub(super) may_copy: bool,
}

/// A column that is written.
#[derive(Debug)]
pub(super) struct Column {
    /// Its place in the source's rows.
    pub(super) source: usize,
    /// Quoted.
    pub(super) name: String,
    /// The type below its domains, without a length.
    pub(super) ty: String,
    /// `generated always as identity`: taken by an insert alone.
    pub(super) is_identity: bool,
    /// Its type has an `=` of its own that tells all values apart, as that of `box` does not; any
    /// other is compared as text.
    pub(super) has_equality: bool,
}

impl Plan {
    /// Whether an UPDATE may set the column.
    pub(super) fn is_settable(&self, at: usize) -> bool {
        self.columns.get(at).is_some_and(|column| !column.is_identity)
    }
}

/// What happens where the target lacks something.
#[derive(Clone, Copy, Debug)]
pub(super) struct Policy {
    pub(super) columns: MissingColumns,
    pub(super) table: MissingTable,
}

/// Where the changes of a table go.
#[derive(Debug)]
pub(super) struct Naming {
    /// The templates of schema and table; `None`: the same names.
    templates: Option<(Template, Template)>,
    names: Names,
}

impl Naming {
    pub(super) fn new(text: &str, names: &Names) -> Result<Self> {
        let templates = match text {
            "{schema}.{table}" => None,
            _ => {
                let (schema, table) = split(text);
                Some((schema.parse()?, table.parse()?))
            }
        };
        Ok(Self { templates, names: names.clone() })
    }

    /// Schema and table; `None`: the source's own.
    pub(super) fn target(&self, change: &Change) -> Result<Option<(String, String)>> {
        if let Some(route) = change.route() {
            let (schema, table) = split(route);
            return Ok(Some((schema.to_owned(), table.to_owned())));
        }
        let Some((schema, table)) = &self.templates else { return Ok(None) };
        Ok(Some((schema.render(change, &self.names)?, table.render(change, &self.names)?)))
    }
}

/// At the first dot that is outside of braces; a name without one lies in `public`.
fn split(text: &str) -> (&str, &str) {
    let mut depth = 0_i32;
    for (at, sign) in text.char_indices() {
        match sign {
            '{' => depth += 1,
            '}' => depth -= 1,
            '.' if depth == 0 => {
                let (schema, table) = text.split_at(at);
                return (schema, table.strip_prefix('.').unwrap_or(table));
            }
            _ => {}
        }
    }
    ("public", text)
}

/// How many versions of tables are known by their address.
const KNOWN_MAX: usize = 10_000;

/// A target's schema and table, where they are not the source's.
pub(super) type Target = Option<(String, String)>;

/// The plans of a session. They last as long as it does: who alters the target has the sink opened
/// anew, or the source's next version of the table.
#[derive(Debug, Default)]
pub(super) struct Plans {
    /// By the address of the version, which is kept alive with it.
    by_address: HashMap<(usize, Target), (Arc<Table>, Arc<Plan>)>,
    by_content: HashMap<(Arc<Table>, Target), Arc<Plan>>,
}

impl Plans {
    /// The plan of a table, if it is known already.
    pub(super) fn get(&mut self, table: &Arc<Table>, target: Target) -> Result<Arc<Plan>, Target> {
        let place = (Arc::as_ptr(table) as usize, target);
        if let Some((_, plan)) = self.by_address.get(&place) {
            return Ok(Arc::clone(plan));
        }
        let content = (Arc::clone(table), place.1);
        let Some(plan) = self.by_content.get(&content) else { return Err(content.1) };
        let plan = Arc::clone(plan);
        self.learn(table, content.1, &plan);
        Ok(plan)
    }

    /// Makes a plan of what the target has, or of what it is given by policy.
    pub(super) async fn make(
        &mut self,
        client: &Client,
        (table, target): (&Arc<Table>, Target),
        policy: Policy,
    ) -> Result<Arc<Plan>> {
        let (schema, name) =
            target.clone().unwrap_or_else(|| (table.schema.clone(), table.name.clone()));
        let number = self.by_content.len();
        let look = Look { client, table, schema, name, policy };
        let plan = Arc::new(look.plan(number).await?);
        self.by_content.insert((Arc::clone(table), target.clone()), Arc::clone(&plan));
        self.learn(table, target, &plan);
        Ok(plan)
    }

    fn learn(&mut self, table: &Arc<Table>, target: Target, plan: &Arc<Plan>) {
        if self.by_address.len() >= KNOWN_MAX {
            self.by_address.clear();
        }
        let place = (Arc::as_ptr(table) as usize, target);
        self.by_address.insert(place, (Arc::clone(table), Arc::clone(plan)));
    }
}

/// The columns by which a change finds its row: those of the old row that the server sends.
fn locating(table: &Table) -> Vec<usize> {
    let own = table.columns.iter().enumerate().filter(|(_, column)| column.identity);
    match table.identity {
        Identity::Index => own.map(|(index, _)| index).collect(),
        _ => table.key_columns(),
    }
}

/// A look into the catalog of the target.
struct Look<'a> {
    client: &'a Client,
    table: &'a Table,
    schema: String,
    name: String,
    policy: Policy,
}

/// A table of the target, as its catalog has it.
struct Found {
    oid: u32,
    is_watched: bool,
    has_row_security: bool,
}

/// A column of the target, as its catalog has it.
struct FoundColumn {
    name: String,
    ty: String,
    has_equality: bool,
    is_generated: bool,
    is_identity: bool,
}

const FIND_TABLE: &str = "
    select c.oid, c.relrowsecurity,
        c.relhasrules or exists (select from pg_trigger t where t.tgrelid = c.oid
            or t.tgrelid in (select relid from pg_partition_tree(c.oid))) as watched
    from pg_class c join pg_namespace n on n.oid = c.relnamespace
    where n.nspname = $1 and c.relname = $2 and c.relkind in ('r', 'p')";

const FIND_COLUMNS: &str = "
    with recursive typed(number, oid, below) as (
        select a.attnum, y.oid, y.typbasetype
        from pg_attribute a join pg_type y on y.oid = a.atttypid
        where a.attrelid = $1 and a.attnum > 0 and not a.attisdropped
        union all
        select t.number, y.oid, y.typbasetype from typed t join pg_type y on y.oid = t.below)
    select a.attname::text, format_type(t.oid, -1) as type,
        exists (select from pg_operator o where o.oprname = '=' and o.oprleft = t.oid
            and o.oprright = t.oid and (o.oprcanhash or o.oprcanmerge)) as equality,
        a.attgenerated <> '' as generated, a.attidentity = 'a' as identity
    from typed t join pg_attribute a on a.attrelid = $1 and a.attnum = t.number
    where t.below = 0 order by a.attnum";

const FIND_KEYS: &str = "
    select array(select a.attname::text
        from unnest(i.indkey::int2[]) with ordinality k(number, place)
        join pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.number
        where k.place <= i.indnkeyatts) as names
    from pg_index i where i.indrelid = $1 and i.indisunique and i.indimmediate and i.indisvalid
        and i.indpred is null and i.indexprs is null";

impl Look<'_> {
    async fn plan(&self, number: usize) -> Result<Plan> {
        let found = match self.find().await? {
            Some(found) => found,
            None => self.create().await?,
        };
        let columns = self.columns(found.oid).await?;
        let key = self.key(&columns)?;
        if !key.is_empty() {
            self.check_unique(found.oid, &key, &columns).await?;
        }
        Ok(Plan {
            number,
            name: self.full_name(),
            columns,
            key,
            is_watched: found.is_watched,
            may_copy: !found.has_row_security,
        })
    }

    fn full_name(&self) -> String {
        format!("{}.{}", quote(&self.schema), quote(&self.name))
    }

    async fn find(&self) -> Result<Option<Found>> {
        let row = self.client.query_opt(FIND_TABLE, &[&self.schema, &self.name]).await;
        let row = row.map_err(|error| self.failed(&error))?;
        row.map(|row| {
            Ok(Found {
                oid: row.try_get("oid")?,
                is_watched: row.try_get("watched")?,
                has_row_security: row.try_get("relrowsecurity")?,
            })
        })
        .transpose()
        .map_err(|error: tokio_postgres::Error| self.failed(&error))
    }

    /// The columns that are written, after those that the target lacks were dealt with.
    async fn columns(&self, oid: u32) -> Result<Vec<Column>> {
        let mut found = self.found_columns(oid).await?;
        let has = |found: &[FoundColumn], name: &str| found.iter().any(|have| have.name == name);
        let lacks = |found: &[FoundColumn]| {
            let columns = self.table.columns.iter().filter(|column| !has(found, &column.name));
            columns.collect::<Vec<_>>()
        };
        let missing = lacks(&found);
        if !missing.is_empty() && self.policy.columns != MissingColumns::Ignore {
            let mut parts = Vec::new();
            for column in missing {
                let ty = self.type_name(&column.ty).await?;
                parts.push(format!("add column {} {ty}", quote(&column.name)));
            }
            let alter = format!("alter table {} {}", self.full_name(), parts.join(", "));
            if self.policy.columns == MissingColumns::Refuse {
                let message =
                    format!("the target's {} lacks columns of {}", self.full_name(), self.table);
                return Err(Error::config(message)
                    .remedy(format!("{alter}; or set missing_columns to \"ignore\" or \"add\"")));
            }
            self.run(&alter).await?;
            found = self.found_columns(oid).await?;
        }
        Ok(self.matched(&found))
    }

    /// Generated columns are the target's own business.
    fn matched(&self, found: &[FoundColumn]) -> Vec<Column> {
        let matched = self.table.columns.iter().enumerate().filter_map(|(source, column)| {
            let found = found.iter().find(|found| found.name == column.name)?;
            (!found.is_generated).then(|| Column {
                source,
                name: quote(&found.name),
                ty: found.ty.clone(),
                is_identity: found.is_identity,
                has_equality: found.has_equality,
            })
        });
        matched.collect()
    }

    async fn found_columns(&self, oid: u32) -> Result<Vec<FoundColumn>> {
        let rows = self.client.query(FIND_COLUMNS, &[&oid]).await;
        let rows = rows.map_err(|error| self.failed(&error))?;
        let column = |row: &tokio_postgres::Row| {
            Ok(FoundColumn {
                name: row.try_get("attname")?,
                ty: row.try_get("type")?,
                has_equality: row.try_get("equality")?,
                is_generated: row.try_get("generated")?,
                is_identity: row.try_get("identity")?,
            })
        };
        let columns = rows.iter().map(column).collect::<Result<_, tokio_postgres::Error>>();
        columns.map_err(|error| self.failed(&error))
    }

    fn key(&self, columns: &[Column]) -> Result<Vec<usize>> {
        let place = |source: usize| {
            columns.iter().position(|column| column.source == source).ok_or_else(|| {
                let name = self.table.columns.get(source).map_or("", |column| &column.name);
                Error::config(format!(
                    "the target's {} lacks column {name} of the key of {}, or generates it",
                    self.full_name(),
                    self.table
                ))
            })
        };
        locating(self.table).into_iter().map(place).collect()
    }

    async fn check_unique(&self, oid: u32, key: &[usize], columns: &[Column]) -> Result<()> {
        let rows = self.client.query(FIND_KEYS, &[&oid]).await;
        let rows = rows.map_err(|error| self.failed(&error))?;
        let mut names: Vec<_> = key.iter().filter_map(|&at| columns.get(at)).collect();
        names.sort_by(|a, b| a.name.cmp(&b.name));
        let names: Vec<&str> = names.iter().map(|column| column.name.as_str()).collect();
        for row in rows {
            let mut index: Vec<String> = row.try_get("names").map_err(|e| self.failed(&e))?;
            index.iter_mut().for_each(|name| *name = quote(name));
            index.sort();
            if index == names {
                return Ok(());
            }
        }
        let (table, key) = (self.full_name(), names.join(", "));
        Err(Error::config(format!("the target's {table} has no unique index on the key ({key})"))
            .remedy(format!("alter table {table} add primary key ({key})")))
    }

    async fn create(&self) -> Result<Found> {
        let mut parts = Vec::new();
        for column in &self.table.columns {
            parts.push(format!("{} {}", quote(&column.name), self.type_name(&column.ty).await?));
        }
        let primary = self.table.columns.iter().filter(|column| column.primary_key);
        let primary = primary.map(|column| quote(&column.name)).collect::<Vec<_>>();
        if !primary.is_empty() {
            parts.push(format!("primary key ({})", primary.join(", ")));
        }
        let key = locating(self.table).into_iter();
        let key = key.filter_map(|index| self.table.columns.get(index));
        let key = key.map(|column| quote(&column.name)).collect::<Vec<_>>();
        if !key.is_empty() && key != primary {
            parts.push(format!("unique ({})", key.join(", ")));
        }
        let create = format!("create table {} ({})", self.full_name(), parts.join(", "));
        if self.policy.table == MissingTable::Refuse {
            let message = format!("the target has no table {}", self.full_name());
            return Err(Error::config(message)
                .remedy(format!("{create}; or set missing_table = \"create\"")));
        }
        let schema = self.client.query_opt(FIND_SCHEMA, &[&self.schema]).await;
        if schema.map_err(|error| self.failed(&error))?.is_none() {
            self.run(&format!("create schema {}", quote(&self.schema))).await?;
        }
        self.run(&create).await?;
        let lost = || Error::retry(format!("the target's {} vanished", self.full_name()));
        self.find().await?.ok_or_else(lost)
    }

    /// The source's type as the target knows it; `text` where it does not.
    async fn type_name(&self, ty: &Type) -> Result<String> {
        let mut ty = ty;
        let mut arrays = String::new();
        loop {
            if let Some(name) = self.known_type(ty).await? {
                return Ok(name + &arrays);
            }
            match &ty.kind {
                TypeKind::Array { element, .. } => {
                    arrays.push_str("[]");
                    ty = element;
                }
                TypeKind::Domain { base } => ty = base,
                _ => return Ok("text".to_owned() + &arrays),
            }
        }
    }

    async fn known_type(&self, ty: &Type) -> Result<Option<String>> {
        let row = if ty.oid < FIRST_OWN_OID {
            let query = "select format_type($1, $2)";
            self.client.query_one(query, &[&ty.oid, &ty.modifier]).await
        } else if ty.name.is_empty() {
            return Ok(None);
        } else {
            self.client.query_one("select to_regtype($1)::text", &[&ty.name]).await
        };
        let row = row.map_err(|error| self.failed(&error))?;
        row.try_get(0).map_err(|error| self.failed(&error))
    }

    async fn run(&self, statement: &str) -> Result<()> {
        let done = self.client.batch_execute(statement).await;
        done.map_err(|error| self.failed(&error).context(format!("while running `{statement}`")))
    }

    fn failed(&self, error: &tokio_postgres::Error) -> Error {
        failure::of(error).context(format!("while preparing the target's {}", self.full_name()))
    }
}

const FIND_SCHEMA: &str = "select from pg_namespace where nspname = $1";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_split_at_its_first_dot_outside_of_braces() {
        assert_eq!(split("replica.{table}"), ("replica", "{table}"));
        assert_eq!(split("t_{record.id}.a.b"), ("t_{record.id}", "a.b"));
        assert_eq!(split("plain"), ("public", "plain"));
    }
}
