//! The plugin `wal2json`: its lines become the messages that pgoutput would have sent.
//!
//! ```text
//!  line ──► parse ──► Specials ──► Shape (catalog, line) ──► Message ──► Assembler
//! ```
//!
//! A line names its table and columns but no replica identity, no root of a partition and nothing
//! of a column that it leaves out, so each table has a [`Shape`]: what the catalog says, corrected
//! by the lines. The catalog is asked again when a line disagrees, when the tree of partitions has
//! changed, and now and then.

use std::{
    collections::{HashMap, VecDeque},
    time::{Duration, Instant},
};

use bytes::Bytes;

use super::{
    assemble::Assembler,
    catalog::Catalog,
    pgoutput::{Message, Relation},
    settings::Settings,
};
use crate::{
    change::{Op, Timestamp},
    config::Globs,
    error::{Error, Result},
    schema::Identity,
};

mod facts;
mod json;
mod line;
mod server;
mod shape;
mod special;
mod tree;

pub use line::{Cell, Event, Marker, RowChange, parse};
pub(super) use server::{begin, is_installed, missing};

use facts::{Facts, Link};
use shape::{Fit, Shape, Sources};
use special::Specials;
use tree::Tree;

/// How long it is believed that a column which a line left out is still there.
const LEFT_OUT_TRUST: Duration = Duration::from_secs(1);
/// Tables that are remembered at one time.
const TABLES_MAX: usize = 10_000;
/// Transactions that are remembered.
const BEGUN_MAX: usize = 1_024;

/// The schema and name of a table, as a line has them.
type Name = (String, String);

/// Decodes the lines of one connection.
#[derive(Debug)]
pub(super) struct Decoder {
    globs: Globs,
    via_root: bool,
    /// How long the catalog's answers are believed.
    refresh: Duration,
    tables: HashMap<Name, Entry>,
    /// What the assembler was told of each captured table, and when.
    told: HashMap<u32, (Relation, Instant)>,
    /// Where the plugin writes special values as null.
    specials: Option<Specials>,
    tree: Tree,
    /// The open transaction, and when it was committed.
    xid: u32,
    time: Timestamp,
    /// The last transactions that began, the newest at the back.
    begun: VecDeque<u32>,
}

/// What is known of a name.
#[derive(Debug)]
struct Entry {
    read: Instant,
    /// Of the tree, when it was read.
    version: u64,
    /// The look at the tree after which it has to be read again: it was no table.
    fleeting: Option<u64>,
    /// `None`: the globs do not choose it.
    chosen: Option<Chosen>,
    /// The catalog, when it was asked at this time, was ahead of the stream by this transaction,
    /// and did not choose it any more.
    until: Option<(u32, Timestamp)>,
}

/// A table that is captured.
#[derive(Debug)]
struct Chosen {
    shape: Shape,
    /// Whether its own truncates count, and not those of its root or of its partitions.
    truncates: bool,
}

impl Decoder {
    fn new(settings: &Settings, announces_specials: bool) -> Self {
        Self {
            globs: Globs::new(&settings.config.tables),
            via_root: settings.config.publish_via_partition_root,
            refresh: Duration::from_millis(settings.config.reconcile_ms),
            tables: HashMap::new(),
            told: HashMap::new(),
            specials: announces_specials.then(Specials::default),
            tree: Tree::default(),
            xid: 0,
            time: Timestamp::default(),
            begun: VecDeque::with_capacity(BEGUN_MAX),
        }
    }

    /// Decodes and assembles one line of the stream.
    pub(super) fn feed(
        &mut self,
        assembler: &mut Assembler,
        line: &Bytes,
        catalog: &mut Catalog,
    ) -> Result<()> {
        for event in parse(line)? {
            for message in self.messages(event, catalog)?.into_iter().flatten() {
                let size = if matches!(message, Message::Relation(_)) { 0 } else { line.len() };
                assembler.accept(message, size, &mut |relation| catalog.resolve(relation))?;
            }
        }
        if let Some(specials) = &mut self.specials {
            specials.clear();
        }
        Ok(())
    }

    /// Takes a NoticeResponse of the stream.
    pub(super) fn notice(&mut self, body: &[u8]) -> Result<()> {
        self.specials.as_mut().map_or(Ok(()), |specials| specials.notice(body))
    }

    /// The messages that pgoutput sends for the same: at most a relation, and one more.
    fn messages(
        &mut self,
        event: Event<'_>,
        catalog: &mut Catalog,
    ) -> Result<[Option<Message>; 2]> {
        let message = match event {
            Event::Begin(marker) => self.begin(marker)?,
            Event::Commit(marker) => Message::Commit {
                commit_lsn: marker.lsn.ok_or_else(|| lacks("lsn", "include-lsn"))?,
                end_lsn: marker.next.ok_or_else(|| lacks("nextlsn", "include-lsn"))?,
            },
            Event::Message { transactional, lsn, prefix, content } => Message::Logical {
                transactional,
                lsn: lsn.ok_or_else(|| lacks("lsn", "include-lsn"))?,
                prefix,
                content: Bytes::copy_from_slice(&content),
            },
            Event::Truncate { schema, table } => {
                return self.truncate(&(schema, table), catalog);
            }
            Event::Row(line) => return self.row(line, catalog),
        };
        Ok([Some(message), None])
    }

    fn begin(&mut self, marker: Marker) -> Result<Message> {
        let commit_time = marker.time.ok_or_else(|| lacks("timestamp", "include-timestamp"))?;
        let xid = marker.xid.ok_or_else(|| lacks("xid", "include-xids"))?;
        (self.xid, self.time) = (xid, commit_time);
        if self.begun.len() >= BEGUN_MAX {
            self.begun.pop_front();
        }
        self.begun.push_back(xid);
        Ok(Message::Begin {
            commit_lsn: marker.lsn.ok_or_else(|| lacks("lsn", "include-lsn"))?,
            commit_time,
            xid,
        })
    }

    fn truncate(&mut self, name: &Name, catalog: &mut Catalog) -> Result<[Option<Message>; 2]> {
        self.learn(name, None, catalog)?;
        let entry = self.tables.get(name);
        let chosen = entry.and_then(|entry| entry.chosen.as_ref()).filter(|table| table.truncates);
        let Some(Chosen { shape, .. }) = chosen else { return Ok([None, None]) };
        let relation = tell(&mut self.told, &shape.relation, self.refresh);
        Ok([relation, Some(Message::Truncate { relations: vec![shape.relation.oid] })])
    }

    fn row(
        &mut self,
        mut line: RowChange<'_>,
        catalog: &mut Catalog,
    ) -> Result<[Option<Message>; 2]> {
        let name = (line.schema.clone(), line.table.clone());
        self.learn(&name, Some(&line), catalog)?;
        let entry = self.tables.get(&name);
        let Some(Chosen { shape, .. }) = entry.and_then(|entry| entry.chosen.as_ref()) else {
            return Ok([None, None]);
        };
        if let Some(specials) = &mut self.specials {
            specials.restore(&mut line)?;
        }
        let relation = shape.relation.oid;
        let message = match (line.op, shape.rows(&line)) {
            (Op::Insert, (_, Some(after))) => Message::Insert { relation, after },
            (Op::Update, (before, Some(after))) => Message::Update { relation, before, after },
            (_, (before, _)) => Message::Delete { relation, before },
        };
        Ok([tell(&mut self.told, &shape.relation, self.refresh), Some(message)])
    }

    /// Asks the catalog where what is known of a name is old, or does not explain the line.
    fn learn(
        &mut self,
        name: &Name,
        line: Option<&RowChange<'_>>,
        catalog: &mut Catalog,
    ) -> Result<()> {
        self.tree.follow(self.xid, catalog)?;
        let fresh = |entry: &&Entry| {
            entry.read.elapsed() < self.refresh
                && entry.version == self.tree.version
                && !entry.until.is_some_and(|until| self.has_passed(until))
                && entry.fleeting.is_none_or(|look| look == self.tree.looks)
        };
        let known = self.tables.get(name).filter(fresh);
        let known = known.is_some_and(|entry| match (&entry.chosen, line) {
            (None, _) => true,
            (Some(_), None) => true,
            (Some(table), Some(line)) => match table.shape.fit(line) {
                Fit::Whole => true,
                Fit::Partial => entry.read.elapsed() < LEFT_OUT_TRUST,
                Fit::Not => false,
            },
        });
        if known {
            return Ok(());
        }
        let mut previous = self.tables.remove(name);
        if self.tables.len() >= TABLES_MAX {
            self.tables.clear();
            self.told.clear();
        }
        let facts = catalog.facts(&name.0, &name.1)?;
        let is_table = |facts: &Facts| facts.chain.first().is_some_and(|own| own.capturable);
        let fleeting = facts.as_ref().is_some_and(|facts| !is_table(facts));
        let until = facts.as_ref().and_then(|facts| self.ahead(facts, previous.as_ref()));
        let chosen = match facts {
            // It was detached from its root, say. What it did before that is still to come.
            Some(_) if until.is_some() => {
                let chosen = previous.take().and_then(|previous| previous.chosen);
                chosen.map(|chosen| keep(chosen, line))
            }
            Some(facts) => self.choose(&facts, line, (previous, catalog))?,
            None => self.choose_gone(name, line, previous),
        };
        let entry = Entry {
            read: Instant::now(),
            version: self.tree.version,
            fleeting: fleeting.then_some(self.tree.looks),
            chosen,
            until,
        };
        self.tables.insert(name.clone(), entry);
        Ok(())
    }

    fn choose(
        &self,
        facts: &Facts,
        line: Option<&RowChange<'_>>,
        (previous, catalog): (Option<Entry>, &mut Catalog),
    ) -> Result<Option<Chosen>> {
        let Some((own, table)) = self.captured_as(&facts.chain) else { return Ok(None) };
        let previous = previous.and_then(|entry| entry.chosen);
        let attributes = catalog.attributes(table.oid)?;
        let previous = previous.filter(|previous| previous.shape.relation.oid == table.oid);
        let sources = Sources {
            relation: Relation {
                oid: table.oid,
                schema: table.schema.clone(),
                name: table.name.clone(),
                identity: table.identity,
                columns: Vec::new(),
            },
            own,
            attributes: Some(&attributes),
            previous: previous.as_ref().map(|previous| &previous.shape),
        };
        let truncates = own && (self.via_root || !table.partitioned);
        Ok(Some(Chosen { shape: Shape::new(sources, line), truncates }))
    }

    /// Where the catalog does not choose a captured table any more, but the stream has not come
    /// that far: the transaction that is to come first, and when the catalog was asked.
    fn ahead(&self, facts: &Facts, previous: Option<&Entry>) -> Option<(u32, Timestamp)> {
        let previous = previous.filter(|entry| entry.chosen.is_some())?;
        if self.captured_as(&facts.chain).is_some() {
            return None;
        }
        let until = previous.until.unwrap_or((facts.changed_by, facts.at));
        (!self.has_passed(until)).then_some(until)
    }

    /// Whether the open transaction came after the given one, which was seen at the given time.
    fn has_passed(&self, (xid, seen): (u32, Timestamp)) -> bool {
        (xid != self.xid && self.begun.contains(&xid)) || self.time > seen
    }

    /// The catalog has no such table any more, or not by this name.
    fn choose_gone(
        &self,
        (schema, table): &Name,
        line: Option<&RowChange<'_>>,
        previous: Option<Entry>,
    ) -> Option<Chosen> {
        match previous {
            Some(Entry { chosen: Some(previous), .. }) => Some(keep(previous, line)),
            Some(Entry { chosen: None, .. }) => None,
            None if self.globs.choose(schema, table) => {
                let relation = Relation {
                    oid: 0,
                    schema: schema.clone(),
                    name: table.clone(),
                    identity: Identity::Nothing,
                    columns: Vec::new(),
                };
                let sources = Sources { relation, own: true, attributes: None, previous: None };
                let shape = Shape::new(sources, line);
                Some(Chosen { shape, truncates: true })
            }
            None => {
                tracing::info!(
                    table = %format!("{schema}.{table}"),
                    "changes of a table that is gone, and that no glob names, are passed over"
                );
                None
            }
        }
    }

    /// The table under whose name changes of the first one are captured, and whether that is its
    /// own. As with a publication, a table is chosen by its own name or by that of one above it.
    fn captured_as<'a>(&self, chain: &'a [Link]) -> Option<(bool, &'a Link)> {
        let own = chain.first()?;
        if !own.capturable || self.globs.takes_away(&own.schema, &own.name) {
            return None;
        }
        let chosen = |link: &Link| link.capturable && self.globs.choose(&link.schema, &link.name);
        match chain.iter().rposition(chosen)? {
            top if top > 0 && self.via_root => chain.get(top).map(|link| (false, link)),
            _ => Some((true, own)),
        }
    }
}

/// A table that is not in the catalog as it was, with what `line` says that is new.
fn keep(previous: Chosen, line: Option<&RowChange<'_>>) -> Chosen {
    let Some(line) = line.filter(|line| previous.shape.fit(line) == Fit::Not) else {
        return previous;
    };
    let relation = Relation { columns: Vec::new(), ..previous.shape.relation.clone() };
    let sources = Sources {
        relation,
        own: previous.shape.own,
        attributes: None,
        previous: Some(&previous.shape),
    };
    Chosen { shape: Shape::new(sources, Some(line)), ..previous }
}

/// The relation, where the assembler does not have it as it is, or has had it for long: its types
/// may have changed.
fn tell(
    told: &mut HashMap<u32, (Relation, Instant)>,
    relation: &Relation,
    refresh: Duration,
) -> Option<Message> {
    let known = told.get(&relation.oid);
    if known.is_some_and(|(known, at)| at.elapsed() < refresh && known == relation) {
        return None;
    }
    told.insert(relation.oid, (relation.clone(), Instant::now()));
    Some(Message::Relation(relation.clone()))
}

fn lacks(what: &str, option: &str) -> Error {
    Error::data(format!("a line of wal2json has no {what}: it was written without {option}"))
}

/// The table of a line of which only the beginning has arrived, for people.
pub(super) fn table_of(begun: &[u8]) -> Option<String> {
    let text = |name: &[u8]| {
        let at = memchr::memmem::find(begun, name)? + name.len();
        json::Json::new(begun.get(at..)?).text().ok()
    };
    Some(format!("{}.{}", text(b",\"schema\":")?, text(b",\"table\":")?))
}
