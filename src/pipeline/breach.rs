//! Changes that begin a version of their table.
//!
//! Where the key is another from there on, the order of a row can no longer be told by it: the
//! first change under the new key keeps its order with every change of the table.
//!
//! Changes whose schema breaks what readers need: a sink's contracts, and the compatibility modes
//! of its source's tables. The journal takes them like all others; here they are held back, or
//! become dead letters, until somebody accepts the schema.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use tokio::time::{Duration, Instant};
use uuid::Uuid;

use super::{delivery::Delivery, run::Run};
use crate::{
    catalog::{Catalog, Tracker, Version},
    change::{Batch, Change},
    config::{Compatibility, Contract, Globs, OnBreach},
    error::{Class, Classify, Result},
    journal::{Journal, Limits},
    parking::Why,
    schema::{Mode, Table, breaks, unmet},
};

/// In the reason of each change that is kept back by it; what is accepted is found by that.
pub const NOT_ACCEPTED: &str = "is not accepted";

/// Descriptors that are known to be sound.
const SOUND_MAX: usize = 4096;

/// The catalog is asked again what was accepted, no more often than this.
const ASK_EVERY: Duration = Duration::from_secs(1);

/// What is read at once of changes that the catalog has not seen.
const LIMITS: Limits = Limits { changes_max: 10_000, bytes_max: 1 << 20 };

/// What a sink and its source say about schemas.
#[derive(Clone, Debug, Default)]
pub struct Terms {
    /// The sink.
    pub sink: String,
    /// Its source.
    pub source: String,
    /// What the sink needs.
    pub contracts: Vec<Contract>,
    /// What becomes of changes that lack it.
    pub on_breach: OnBreach,
    /// What new versions of tables must not break.
    pub compatibility: Vec<Compatibility>,
}

impl Terms {
    /// The rule that counts for a table.
    pub fn rule_of(&self, table: &Table) -> Option<&Compatibility> {
        let chooses =
            |rule: &&Compatibility| Globs::new(&rule.tables).choose(&table.schema, &table.name);
        self.compatibility.iter().find(chooses).filter(|rule| rule.mode != Mode::None)
    }

    /// What a descriptor lacks that the sink needs.
    pub fn lacks(&self, table: &Table) -> Vec<String> {
        let name = table.full_name();
        let own = self.contracts.iter().filter(|contract| contract.table == name);
        let unmet = own.flat_map(|contract| unmet(&contract.columns, table));
        unmet.map(|unmet| format!("sink {}: {unmet}", self.sink)).collect()
    }
}

/// Judges the schemas of one sink's changes.
#[derive(Debug)]
pub struct Judge {
    terms: Terms,
    lineage: Uuid,
    catalog: Catalog,
    /// Of every table, by name.
    versions: HashMap<String, Vec<Version>>,
    /// Tables that have another key, of which no change has passed since.
    rekeyed: HashSet<String>,
    tracker: Tracker,
    accepted: BTreeSet<(String, String)>,
    asked_at: Option<Instant>,
    /// Descriptors that break nothing, by address; each is kept alive.
    sound: HashMap<usize, Arc<Table>>,
}

impl Judge {
    /// Stands at `cursor` of the journal: knows the versions that began before it.
    pub async fn open(
        terms: Terms,
        catalog: &Catalog,
        journal: &Journal,
        cursor: u64,
    ) -> Result<Self> {
        let mut judge = Self {
            terms,
            lineage: journal.lineage(),
            catalog: catalog.clone(),
            versions: HashMap::new(),
            rekeyed: HashSet::new(),
            tracker: Tracker::default(),
            accepted: BTreeSet::new(),
            asked_at: None,
            sound: HashMap::new(),
        };
        judge.load(journal, cursor).await?;
        judge.rekeyed.clear();
        Ok(judge)
    }

    /// Whether nobody asks for anything.
    fn is_idle(&self) -> bool {
        self.terms.contracts.is_empty() && self.terms.compatibility.is_empty()
    }

    async fn load(&mut self, journal: &Journal, cursor: u64) -> Result<()> {
        let source = self.terms.source.clone();
        let mut versions = self.catalog.schema_versions(&source, self.lineage).await?;
        versions.retain(|version| version.offset < cursor);
        self.tracker = Tracker::new(&versions);
        versions.into_iter().for_each(|version| self.keep(version));
        let scanned = self.catalog.schema_scanned(&source, self.lineage).await?;
        let from = scanned.max(journal.start());
        if from >= cursor || self.terms.compatibility.is_empty() {
            return Ok(());
        }
        // What the history has not come to yet; mostly there is no new descriptor in it at all.
        let Some(from) = self.unknown_from(journal, from).await? else { return Ok(()) };
        let mut reader = journal.reader(from.max(journal.start()))?;
        while reader.offset() < cursor {
            let batch = reader.try_next(LIMITS).await?;
            if batch.changes.is_empty() {
                break;
            }
            let before = batch.changes.iter().filter(|change| change.offset < cursor);
            before.for_each(|change| self.follow(change));
        }
        Ok(())
    }

    async fn unknown_from(&mut self, journal: &Journal, from: u64) -> Result<Option<u64>> {
        let (journal, tracker) = (journal.clone(), std::mem::take(&mut self.tracker));
        let asked = tokio::task::spawn_blocking(move || {
            let unknown = journal.unknown_from(from, |table| tracker.knows(table));
            (unknown, tracker)
        });
        let (unknown, tracker) =
            asked.await.class(Class::Bug, || "looking through a journal panicked")?;
        self.tracker = tracker;
        unknown
    }

    fn keep(&mut self, version: Version) {
        self.versions.entry(version.table.full_name()).or_default().push(version);
    }

    fn follow(&mut self, change: &Change) {
        let Some(version) = self.tracker.see(change, 0) else { return };
        let name = version.table.full_name();
        let before = self.versions.get(&name).and_then(|versions| versions.last());
        if before.is_some_and(|before| before.table.key_names() != version.table.key_names()) {
            self.rekeyed.insert(name);
        }
        self.keep(version);
    }

    /// Sees every change that is read, those that the sink does not want too.
    pub(super) fn see(&mut self, batch: &Batch) {
        for change in &batch.changes {
            self.follow(change);
        }
    }

    /// Has the first change of a table that has another key keep its order with all before it.
    pub(super) fn order(&mut self, changes: &mut [Change]) {
        if self.rekeyed.is_empty() {
            return;
        }
        for change in changes {
            let name = change.table.as_ref().map(|table| table.full_name());
            if name.is_some_and(|name| self.rekeyed.remove(&name)) {
                change.concern_the_table();
            }
        }
    }

    /// Has what was accepted at hand where a change of the batch may need it.
    pub(super) async fn prepare(&mut self, changes: &[Change]) -> Result<()> {
        if self.is_idle() || !changes.iter().any(|change| self.breach(change).is_some()) {
            return Ok(());
        }
        if self.asked_at.is_none_or(|at| at.elapsed() >= ASK_EVERY) {
            let accepted = self.catalog.accepted_schemas(&self.terms.source).await?;
            self.accepted = accepted.into_keys().collect();
            self.asked_at = Some(Instant::now());
        }
        Ok(())
    }

    /// Why a change is kept back; `None` where nothing is wrong, or it passes all the same.
    pub(super) fn verdict(&mut self, change: &Change) -> Option<(OnBreach, String)> {
        if self.is_idle() {
            return None;
        }
        let (on_breach, what) = self.breach(change)?;
        let table = change.table.as_ref()?;
        if self.accepted.contains(&(table.full_name(), table.digest())) {
            return None;
        }
        Some((on_breach, not_accepted(table, &what)))
    }

    /// What is wrong with the schema of a change, whether somebody accepted it or not.
    fn breach(&mut self, change: &Change) -> Option<(OnBreach, Vec<String>)> {
        let table = change.table.as_ref()?;
        let pointer = Arc::as_ptr(table) as usize;
        let (mut on_breach, mut what) = (OnBreach::Pass, Vec::new());
        if !self.sound.contains_key(&pointer) {
            if self.terms.on_breach != OnBreach::Pass {
                what = self.terms.lacks(table);
            }
            if !what.is_empty() {
                on_breach = self.terms.on_breach;
            } else {
                if self.sound.len() >= SOUND_MAX {
                    self.sound.clear();
                }
                self.sound.insert(pointer, Arc::clone(table));
            }
        }
        if let Some((rule, breaks)) = self.incompatible(change, table) {
            on_breach = on_breach.max(rule);
            what.extend(breaks);
        }
        (on_breach != OnBreach::Pass).then_some((on_breach, what))
    }

    fn incompatible(&self, change: &Change, table: &Table) -> Option<(OnBreach, Vec<String>)> {
        if self.terms.compatibility.is_empty() {
            return None;
        }
        let versions = self.versions.get(&table.full_name()).filter(|all| all.len() > 1)?;
        let after = versions.partition_point(|version| version.offset <= change.offset);
        let (own, before) = (versions.get(after.checked_sub(1)?)?, after.checked_sub(2)?);
        let before = versions.get(before)?;
        let rule = self.terms.rule_of(table).filter(|rule| rule.on_breach != OnBreach::Pass)?;
        let found = breaks(rule.mode, &before.table, &own.table);
        let mode = rule.mode.word();
        (!found.is_empty()).then(|| {
            let found =
                format!("version {} is not {mode} compatible: {}", own.number, found.join("; "));
            (rule.on_breach, vec![found])
        })
    }
}

/// What is told of a schema that breaks something.
pub fn not_accepted(table: &Table, what: &[String]) -> String {
    format!(
        "the schema of {table} {NOT_ACCEPTED}: {}; `walrace schema accept {table}` lets its \
         changes go on",
        what.join("; ")
    )
}

impl Delivery<'_> {
    /// Parks a change whose schema breaks something; gives back one that may go on. The first that
    /// is held keeps the whole table back, and all later ones wait behind it in their order.
    pub(super) fn withhold(&mut self, change: Change, run: &mut Run) -> Result<Option<Change>> {
        let Some((on_breach, reason)) = self.judge.verdict(&change) else {
            return Ok(Some(change));
        };
        let mut keys = self.transform.keys_despite(&change);
        let behind = self.lot.blocks(&keys);
        let why = match on_breach {
            _ if behind => Why::Behind,
            OnBreach::Hold => {
                keys.rows.clear();
                Why::Held(reason)
            }
            _ => Why::Failed(reason),
        };
        run.close_transaction_of(&change);
        self.lot.park(change, keys, why)?;
        if !behind {
            self.stats.park();
        }
        Ok(None)
    }

    /// Why a parked change stays parked for the sake of its schema.
    pub(super) async fn still_withheld(&mut self, change: &Change) -> Result<Option<Why>> {
        self.judge.prepare(std::slice::from_ref(change)).await?;
        Ok(self.judge.verdict(change).map(|(on_breach, reason)| match on_breach {
            OnBreach::Hold => Why::Held(reason),
            _ => Why::Failed(reason),
        }))
    }
}

/// What each contract of each sink lacks of the tables that a source has, and contracts of tables
/// that it does not have at all.
pub fn unmet_of<'a>(
    terms: impl IntoIterator<Item = &'a Terms>,
    tables: &[Arc<Table>],
) -> Vec<String> {
    let by_name: BTreeMap<String, &Arc<Table>> =
        tables.iter().map(|table| (table.full_name(), table)).collect();
    let mut found = Vec::new();
    for terms in terms {
        for contract in &terms.contracts {
            let (sink, name) = (&terms.sink, &contract.table);
            let Some(table) = by_name.get(name) else {
                found.push(format!("sink {sink} needs {name}, which the source does not have"));
                continue;
            };
            for unmet in unmet(&contract.columns, table) {
                found.push(format!("sink {sink}: {name}: {unmet}"));
            }
        }
    }
    found
}
