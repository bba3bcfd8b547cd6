//! What a backfill will read: tables, their parts, and how much that is.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{
    super::{
        blocking,
        catalog::Cells,
        settings::Settings,
        wire::{Client, Purpose},
    },
    Part, Place, table,
};
use crate::{
    config::{self, Globs},
    error::{Error, Result, ResultExt},
};

/// A rehearsal reads so many blocks of each table.
const SAMPLE_BLOCKS: u32 = 256;
/// Of nearly every server; an estimate needs no more.
const BLOCK_BYTES: u64 = 8192;
/// Parts are not smaller than this many blocks.
const PART_BLOCKS_MIN: u32 = 1 << 12;
/// Nor larger than this: 1 GiB of the usual blocks.
const PART_BLOCKS_MAX: u32 = 1 << 17;

/// The tables that a backfill reads.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// By name.
    pub tables: Vec<PlannedTable>,
    /// Their parts, numbered from 1.
    #[serde(skip)]
    pub parts: Vec<Part>,
}

/// A table of a [`Plan`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedTable {
    /// `schema.name`.
    pub name: String,
    /// PostgreSQL's estimate of its rows.
    pub rows: u64,
    /// Bytes on the server's disk, without what is stored out of line.
    pub bytes: u64,
    /// Bytes that are stored out of line.
    pub toast_bytes: u64,
    /// Parts that can be read side by side.
    pub parts: usize,
    /// Seconds that it would take at the rate at which its first blocks came, where they were read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds: Option<u64>,
    /// Why it is read in one long transaction instead of many short ones, where it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub whole_because: Option<String>,
}

/// A table, or a partition of one, that holds rows.
struct Leaf {
    name: String,
    published: u32,
    oid: u32,
    filenode: u32,
    rows: u64,
    bytes: u64,
    toast_bytes: u64,
    block_bytes: u64,
    /// Why its rows cannot be read in parts.
    obstacle: Option<&'static str>,
}

/// As `plan`, with the time that it would take: the first blocks of each table are read.
pub async fn rehearse(source: (&str, &config::Postgres), globs: &[String]) -> Result<Plan> {
    let mut plan = plan(source, globs, 1).await?;
    let settings = Settings::new(source.0, source.1)?;
    blocking(move || {
        let mut client = Client::connect(&settings.target, Purpose::Sql)?;
        client.query("set enable_seqscan = off; set statement_timeout = '10s'")?;
        for planned in &mut plan.tables {
            let largest = plan.parts.iter().filter(|part| part.table == planned.name);
            if let Some(part) = largest.max_by_key(|part| part.until - part.from) {
                let blocks = planned.bytes / BLOCK_BYTES;
                planned.seconds = Some(sample(&mut client, part)?.seconds_for(blocks));
            }
        }
        Ok(plan)
    })
    .await
}

/// Blocks that were read, and how long that took.
struct Sample {
    blocks: u32,
    time: Duration,
}

impl Sample {
    fn seconds_for(&self, blocks: u64) -> u64 {
        let us = u64::try_from(self.time.as_micros()).unwrap_or(u64::MAX);
        us.saturating_mul(blocks) / u64::from(self.blocks.max(1)) / 1_000_000
    }
}

fn sample(client: &mut Client, part: &Part) -> Result<Sample> {
    let blocks = (part.until - part.from).min(SAMPLE_BLOCKS);
    let end = Place::before(part.from + blocks);
    let Some(name) = table::name_of(client, part.leaf)? else {
        return Ok(Sample { blocks: 0, time: Duration::ZERO });
    };
    let begun = Instant::now();
    let sql = format!("select * from only {name} where ctid < '{end}'");
    client.each_row(&sql, &mut |_| Ok(true))?;
    Ok(Sample { blocks, time: begun.elapsed() })
}

/// Plans a backfill of the tables of source `name` that `globs` choose: those that it captures.
pub async fn plan(
    (name, config): (&str, &config::Postgres),
    globs: &[String],
    workers: u32,
) -> Result<Plan> {
    let settings = Settings::new(name, config)?;
    if config.plugin != config::Plugin::Pgoutput {
        let plugin = config.plugin.name();
        return Err(Error::config(format!("the source `{name}` reads {plugin}"))
            .remedy("a backfill needs plugin = \"pgoutput\", with a slot of its own"));
    }
    let globs = globs.to_vec();
    blocking(move || {
        let context = || format!("while planning a backfill of the source `{}`", settings.name);
        let mut client = Client::connect(&settings.target, Purpose::Sql).context(context)?;
        if client.value("select pg_is_in_recovery()")?.as_deref() == Some("t") {
            return Err(Error::config(format!(
                "the source `{}` is a standby, where no watermark can be written",
                settings.name
            ))
            .remedy("backfill through a source that leads to the primary"));
        }
        let leaves = leaves(&mut client, &settings, &globs).context(context)?;
        if leaves.is_empty() {
            let chosen = globs.join(", ");
            return Err(Error::config(format!("no captured table fits `{chosen}`")).remedy(
                format!(
                    "`walrace source status {}` lists the tables that are captured",
                    settings.name
                ),
            ));
        }
        Ok(divide(&leaves, workers))
    })
    .await
}

fn leaves(client: &mut Client, settings: &Settings, globs: &[String]) -> Result<Vec<Leaf>> {
    let names = [settings.publication.clone(), settings.inserts.clone()];
    let rows = client.query(&format!(
        "with published as (
           select c.oid, n.nspname, c.relname,
                  bool_and(p.pubinsert and p.pubupdate and p.pubdelete) as whole
           from pg_publication_tables v
           join pg_publication p on p.pubname = v.pubname
           join pg_namespace n on n.nspname = v.schemaname
           join pg_class c on c.relname = v.tablename and c.relnamespace = n.oid
           where v.pubname in ({}) group by 1, 2, 3)
         select t.nspname, t.relname, t.oid, l.relid::oid,
                coalesce(pg_relation_filenode(l.relid), 0), greatest(c.reltuples, 0)::bigint,
                pg_relation_size(l.relid), coalesce(pg_total_relation_size(c.reltoastrelid), 0),
                current_setting('block_size'), t.whole,
                coalesce(a.amname, '') = 'heap',
                exists (select from pg_index i where i.indrelid = t.oid and
                        (i.indisprimary or i.indisreplident))
         from published t
         cross join lateral (select relid from pg_partition_tree(t.oid) where isleaf
                             union select t.oid where not exists (
                               select from pg_partition_tree(t.oid))) l
         join pg_class c on c.oid = l.relid and c.relkind = 'r'
         left join pg_am a on a.oid = c.relam
         order by 1, 2, 4",
        table::list(&names)
    ))?;
    let globs = Globs::new(globs);
    let mut leaves = Vec::new();
    for row in rows {
        let mut row = Cells(row.into_iter());
        let (schema, name) = (row.text()?, row.text()?);
        if !globs.choose(&schema, &name) {
            continue;
        }
        let name = format!("{schema}.{name}");
        let (published, oid, filenode) = (row.number()?, row.number()?, row.number()?);
        let (rows, bytes, toast_bytes) = (row.number()?, row.number()?, row.number()?);
        let block_bytes = row.number()?;
        let (whole, heap, key) = (row.flag()?, row.flag()?, row.flag()?);
        let obstacle = match (whole, heap, key) {
            (true, true, true) => None,
            (false, ..) => Some("its updates and deletes are not published"),
            (_, false, _) => Some("its rows are not stored in a heap"),
            (.., false) => Some("it has no key"),
        };
        #[rustfmt::skip]
        leaves.push(Leaf { name, published, oid, filenode, rows, bytes, toast_bytes, block_bytes,
            obstacle });
    }
    Ok(leaves)
}

fn divide(leaves: &[Leaf], workers: u32) -> Plan {
    let mut plan = Plan::default();
    for leaf in leaves {
        let blocks = u32::try_from(leaf.bytes / leaf.block_bytes.max(1)).unwrap_or(u32::MAX);
        let length = match leaf.obstacle {
            None => blocks.div_ceil(workers.max(1) * 4).clamp(PART_BLOCKS_MIN, PART_BLOCKS_MAX),
            Some(_) => blocks.max(1),
        };
        let mut from = 0;
        let before = plan.parts.len();
        while from < blocks || from == 0 {
            let until = from.saturating_add(length).min(blocks);
            plan.parts.push(part(leaf, plan.parts.len(), (from, until)));
            from = until.max(1);
        }
        let parts = plan.parts.len() - before;
        match plan.tables.last_mut().filter(|table| table.name == leaf.name) {
            Some(table) => {
                table.rows += leaf.rows;
                table.bytes += leaf.bytes;
                table.toast_bytes += leaf.toast_bytes;
                table.parts += parts;
            }
            None => plan.tables.push(PlannedTable {
                name: leaf.name.clone(),
                rows: leaf.rows,
                bytes: leaf.bytes,
                toast_bytes: leaf.toast_bytes,
                parts,
                seconds: None,
                whole_because: leaf.obstacle.map(str::to_owned),
            }),
        }
    }
    plan
}

fn part(leaf: &Leaf, before: usize, (from, until): (u32, u32)) -> Part {
    Part {
        backfill: 0,
        number: u32::try_from(before + 1).unwrap_or(u32::MAX),
        table: leaf.name.clone(),
        published: leaf.published,
        leaf: leaf.oid,
        filenode: leaf.filenode,
        from,
        until,
        next: Place::before(from),
        rows: 0,
        bytes: 0,
        done: false,
        whole: leaf.obstacle.is_some(),
        offset: 0,
    }
}
