//! A migration that is tried and taken back: what the tables would be like after it.
//!
//! Everything happens in one transaction that is rolled back. The SQL runs inside `DO ... EXECUTE`,
//! where PostgreSQL refuses `COMMIT`, so that it cannot end the transaction. On the source itself
//! it sees copies of the captured tables' structure, in schemas of their own, as a role of its own
//! that may touch nothing else: a table that it names with its real schema is refused, not
//! altered.

use std::collections::HashMap;

use super::{
    blocking,
    catalog::{Catalog, quote_name, quote_text},
    described,
    failure::Failure,
    publication::{self, Candidate},
    settings::Settings,
    url::Target,
    wire::{Client, Purpose},
};
use crate::{
    config::{self, Secret},
    error::{Error, Result},
    schema::Table,
};

/// No statement waits longer for a lock, so that nobody waits long behind it.
const LOCK_WAIT_MS: u32 = 2_000;

/// The whole migration ends within this time; the tables are empty copies, or a database of yours.
const RUN_MS_MAX: u32 = 30_000;

/// What the schemas and the role of the copies begin with.
const SCRATCH: &str = "walrace_scratch";

/// The tables that a source chooses, before a migration and after it.
#[derive(Clone, Debug)]
pub struct Rehearsal {
    /// As they are.
    pub before: Vec<Table>,
    /// As they would be, under their real names.
    pub after: Vec<Table>,
}

/// Tries a migration on copies of the tables of the source `name` or, where a database is given, in
/// that.
pub async fn rehearse(
    name: &str,
    config: &config::Postgres,
    database: Option<&Secret>,
    sql: &str,
) -> Result<Rehearsal> {
    let settings = Settings::new(name, config)?;
    let given = database.map(Target::parse).transpose()?;
    let sql = sql.to_owned();
    blocking(move || {
        let target = given.clone().unwrap_or_else(|| settings.target.clone());
        let client = Client::connect(&target, Purpose::Sql)?;
        let mut trial = Trial { catalog: Catalog::over(target, client), settings: &settings };
        let outcome = trial.run(given.is_none(), &sql);
        // The connection ends in any case; this lets go of the locks at once.
        let ended = trial.execute("rollback");
        let rehearsal = outcome?;
        ended?;
        Ok(rehearsal)
    })
    .await
}

struct Trial<'a> {
    catalog: Catalog,
    settings: &'a Settings,
}

impl Trial<'_> {
    fn run(&mut self, on_copies: bool, sql: &str) -> Result<Rehearsal> {
        self.execute(&format!(
            "begin; set local lock_timeout = {LOCK_WAIT_MS};
             set local statement_timeout = {RUN_MS_MAX}"
        ))?;
        let globs = &self.settings.config.tables;
        let candidates = described::candidates(&mut self.catalog)?;
        let chosen = publication::choose(candidates, globs);
        let before = described::of(&mut self.catalog, &chosen)?;
        let copies = if on_copies { self.copy(&chosen)? } else { Copies::default() };
        self.migrate(on_copies, sql)?;
        let mut after: Vec<Candidate> = described::candidates(&mut self.catalog)?;
        if on_copies {
            after.retain(|table| copies.0.contains_key(&table.schema));
            for table in &mut after {
                table.schema = copies.real(&table.schema);
            }
        }
        let after = publication::choose(after, globs);
        let mut after = described::of(&mut self.catalog, &after)?;
        for table in &mut after {
            table.schema = copies.real(&table.schema);
        }
        Ok(Rehearsal { before, after })
    }

    /// Makes empty copies of the tables, and gives them to a role that owns nothing else.
    fn copy(&mut self, tables: &[Candidate]) -> Result<Copies> {
        let mut copies = Copies::default();
        self.execute(&format!("create role {SCRATCH} nologin; grant {SCRATCH} to current_user"))
            .map_err(|error| {
                error.context("while making a role that may touch nothing but copies").remedy(
                    "give the role of the source CREATEROLE and the right to create schemas, or \
                     name a database with the same structure: --database URL",
                )
            })?;
        let mut paths = Vec::new();
        for table in tables {
            let known = copies.0.iter().find(|(_, real)| **real == table.schema);
            let scratch = match known {
                Some((scratch, _)) => scratch.clone(),
                None => {
                    let scratch = format!("{SCRATCH}_{}", copies.0.len());
                    self.schema(&scratch)?;
                    copies.0.insert(scratch.clone(), table.schema.clone());
                    paths.push((scratch.clone(), table.schema.clone()));
                    scratch
                }
            };
            let (schema, name) = (quote_name(&table.schema), quote_name(&table.name));
            self.execute(&format!(
                "create table {scratch}.{name} (like {schema}.{name} including all);
                 alter table {scratch}.{name} owner to {SCRATCH}"
            ))?;
        }
        if paths.is_empty() {
            self.schema(&format!("{SCRATCH}_0"))?;
            copies.0.insert(format!("{SCRATCH}_0"), "public".to_owned());
            paths.push((format!("{SCRATCH}_0"), "public".to_owned()));
        }
        // As an application sees it: `public` before all others.
        paths.sort_by_key(|(_, real)| (real != "public", real.clone()));
        let real = paths.iter().map(|(_, real)| quote_name(real));
        let path: Vec<_> = paths.iter().map(|(scratch, _)| scratch.clone()).chain(real).collect();
        self.execute(&format!("set local search_path = {}", path.join(", ")))?;
        Ok(copies)
    }

    fn schema(&mut self, scratch: &str) -> Result<()> {
        self.execute(&format!(
            "create schema {scratch}; grant all on schema {scratch} to {SCRATCH}"
        ))
    }

    fn migrate(&mut self, on_copies: bool, sql: &str) -> Result<()> {
        match on_copies {
            true => self.execute(&format!("set local role {SCRATCH}"))?,
            false => self.execute("set local search_path = \"$user\", public")?,
        }
        let script = format!("begin execute {}; end", quote_text(sql));
        let ran = self.catalog.client()?.query(&format!("do {}", quote_text(&script)));
        if let Err(failure) = ran {
            return Err(refused(failure, on_copies));
        }
        if on_copies {
            self.execute("reset role")?;
        }
        // Or types would go by other names than before.
        self.execute("set local search_path to default")
    }

    fn execute(&mut self, sql: &str) -> Result<()> {
        self.catalog.client()?.query(sql)?;
        Ok(())
    }
}

fn refused(failure: Failure, on_copies: bool) -> Error {
    let code = failure.code().to_owned();
    let error = Error::from(failure);
    let remedy = match code.as_str() {
        "42501" if on_copies => {
            "only copies of the captured tables may be altered here: leave the schema out of their \
             names, or name a database with the same structure: --database URL"
        }
        "0A000" | "25001" | "2D000" => {
            "it runs within one transaction that is taken back: leave out BEGIN and COMMIT, and \
             what cannot run in a transaction"
        }
        _ => "it is tried on the tables as they are now, and was taken back",
    };
    Error::config(format!("the migration cannot run: {}", error.summary())).remedy(remedy)
}

/// The schemas of the copies, each with the real one that it stands for.
#[derive(Debug, Default)]
struct Copies(HashMap<String, String>);

impl Copies {
    fn real(&self, schema: &str) -> String {
        self.0.get(schema).cloned().unwrap_or_else(|| schema.to_owned())
    }
}
