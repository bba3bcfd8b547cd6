//! The history of a source's schemas: follows the journal at a distance and writes each version of
//! a table down, so that it is known when the journal is trimmed. It takes part in neither loop.

use std::{collections::HashSet, sync::Arc, time::Duration};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{
    catalog::{Catalog, Known, Tracker, Version},
    config::{self, OnBreach},
    error::{Class, Classify, Result},
    failpoint,
    journal::{Journal, Limits},
    pipeline::{Terms, unmet_of},
    schema::{breaks, differences},
    source::postgres,
};

/// The journal is looked at no more often than this.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// How soon a look that failed is tried again.
const AGAIN_AFTER: Duration = Duration::from_secs(5);

/// How far was looked is written down this often where nothing was found.
const RECORD_EVERY: Duration = Duration::from_secs(10);

/// What is read at once where something may be found.
const LIMITS: Limits = Limits { changes_max: 10_000, bytes_max: 1 << 20 };

/// One source's history.
#[derive(Debug)]
pub(super) struct History {
    source: String,
    config: config::Source,
    /// What its sinks need.
    terms: Vec<Terms>,
    journal: Journal,
    catalog: Catalog,
    tracker: Tracker,
    /// Up to where the journal was gone through, and up to where the catalog says so.
    scanned: u64,
    recorded: u64,
    recorded_at: Instant,
    loaded: bool,
}

impl History {
    pub(super) fn new(
        (source, config): (&str, &config::Source),
        journal: &Journal,
        catalog: &Catalog,
        terms: Vec<Terms>,
    ) -> Self {
        Self {
            source: source.to_owned(),
            config: config.clone(),
            terms,
            journal: journal.clone(),
            catalog: catalog.clone(),
            tracker: Tracker::default(),
            scanned: 0,
            recorded: 0,
            recorded_at: Instant::now(),
            loaded: false,
        }
    }

    /// Follows the journal until `stop`. A failure is told once, and tried again.
    pub(super) async fn keep(mut self, stop: CancellationToken) {
        let mut end = self.journal.watch_end();
        let mut failed = false;
        loop {
            let outcome = tokio::select! {
                () = stop.cancelled() => break,
                outcome = self.look() => outcome,
            };
            if let Err(error) = &outcome
                && !failed
            {
                warn!("the history of the schemas of source {} waits: {error}", self.source);
            }
            failed = outcome.is_err();
            let rest = if failed { AGAIN_AFTER } else { LOOK_EVERY };
            let scanned = self.scanned;
            let more = async {
                tokio::time::sleep(rest).await;
                // The sender lives as long as the journal, which this holds.
                let _ = end.wait_for(|end| failed || *end > scanned).await;
            };
            tokio::select! {
                () = stop.cancelled() => break,
                () = more => {}
            }
        }
        // What a look that was cut off has found, and not written down, is found again.
        if self.loaded
            && let Err(error) = self.record(&[]).await
        {
            warn!("the history of the schemas of source {} waits: {error}", self.source);
        }
    }

    async fn look(&mut self) -> Result<()> {
        if !self.loaded {
            self.load().await?;
        }
        let end = self.journal.end();
        let start = self.journal.start();
        let late = start > self.scanned;
        let from = self.scanned.max(start);
        if from >= end {
            return Ok(());
        }
        match self.unknown_from(from).await? {
            Some(from) => self.read(from, late).await?,
            None => self.scanned = end,
        }
        if self.recorded_at.elapsed() >= RECORD_EVERY {
            self.record(&[]).await?;
        }
        Ok(())
    }

    async fn load(&mut self) -> Result<()> {
        let of = (self.source.as_str(), self.journal.lineage());
        self.catalog.forget_schemas(of, self.journal.end()).await?;
        let versions = self.catalog.schema_versions(of.0, of.1).await?;
        self.tracker = Tracker::new(&versions);
        self.scanned = self.catalog.schema_scanned(of.0, of.1).await?;
        self.recorded = self.scanned;
        self.loaded = true;
        Ok(())
    }

    async fn unknown_from(&mut self, from: u64) -> Result<Option<u64>> {
        let (journal, tracker) = (self.journal.clone(), std::mem::take(&mut self.tracker));
        self.loaded = false; // until the tracker is back
        let asked = tokio::task::spawn_blocking(move || {
            let unknown = journal.unknown_from(from, |table| tracker.knows(table));
            (unknown, tracker)
        });
        let (unknown, tracker) =
            asked.await.class(Class::Bug, || "looking through a journal panicked")?;
        (self.tracker, self.loaded) = (tracker, true);
        unknown
    }

    /// Goes through the changes from `from` on. Where this is `late`, what lay before is gone, and
    /// a version may have begun in it.
    async fn read(&mut self, from: u64, late: bool) -> Result<()> {
        let oldest = self.journal.start();
        let mut reader = self.journal.reader(from.max(oldest))?;
        let timeline = self.journal.progress().map_or(0, |at| at.timeline);
        let (mut seen, end) = (HashSet::new(), self.journal.end());
        self.loaded = false; // until all that was found is written down
        while reader.offset() < end {
            let batch = reader.try_next(LIMITS).await?;
            let found = batch.changes.iter().filter_map(|change| {
                let version = self.tracker.see(change, timeline)?;
                let later = late && seen.insert(version.table.full_name());
                let known = if later { Known::ObservedLater } else { Known::Observed };
                Some(Version { known, ..version })
            });
            let found: Vec<Version> = found.collect();
            self.scanned = reader.offset();
            if !found.is_empty() || self.recorded_at.elapsed() >= RECORD_EVERY {
                // Rather told twice, after a crash, than never.
                self.tell(&found).await?;
                self.record(&found).await?;
                self.look_for_tables(&found).await;
            }
        }
        self.loaded = true;
        Ok(())
    }

    async fn record(&mut self, found: &[Version]) -> Result<()> {
        self.recorded_at = Instant::now();
        if found.is_empty() && self.recorded == self.scanned {
            return Ok(());
        }
        failpoint::reach("history::before_record");
        let of = (self.source.as_str(), self.journal.lineage());
        self.catalog.record_schemas(of, found, self.scanned).await?;
        failpoint::reach("history::after_record");
        self.recorded = self.scanned;
        Ok(())
    }

    /// One line for each version that follows another, and one for each reader that it breaks.
    async fn tell(&self, found: &[Version]) -> Result<()> {
        if found.is_empty() {
            return Ok(());
        }
        let known = self.catalog.schema_versions(&self.source, self.journal.lineage()).await?;
        for version in found {
            let before = known.iter().chain(found).find(|other| {
                other.number + 1 == version.number
                    && other.table.full_name() == version.table.full_name()
            });
            self.warn(before, version);
            let Some(before) = before else { continue };
            let what = differences(&before.table, &version.table);
            let what: Vec<_> = what.iter().map(ToString::to_string).collect();
            info!(
                "source {}: {} has version {} from offset {} on: {}",
                self.source,
                version.table,
                version.number,
                version.offset,
                what.join("; ")
            );
        }
        Ok(())
    }

    /// Names whom a version breaks, and what becomes of its changes.
    fn warn(&self, before: Option<&Version>, version: &Version) {
        let (table, number) = (&version.table, version.number);
        let say = |what: String, on_breach: OnBreach| {
            let fate = match on_breach {
                OnBreach::Pass => "its changes are delivered all the same",
                OnBreach::Hold => "its changes wait until somebody accepts it",
                OnBreach::DeadLetter => "its changes become dead letters",
            };
            warn!("source {}: {table} version {number}: {what}; {fate}", self.source);
        };
        for terms in &self.terms {
            let lacks = terms.lacks(table);
            if !lacks.is_empty() {
                say(format!("a contract is broken: {}", lacks.join("; ")), terms.on_breach);
            }
        }
        let config::Source::Postgres(postgres) = &self.config;
        let rules = Terms { compatibility: postgres.compatibility.clone(), ..Terms::default() };
        if let (Some(before), Some(rule)) = (before, rules.rule_of(table)) {
            let found = breaks(rule.mode, &before.table, table);
            if !found.is_empty() {
                let mode = rule.mode.word();
                say(format!("it is not {mode} compatible: {}", found.join("; ")), rule.on_breach);
            }
        }
    }

    /// A table that is new may have taken the place of others: who relied on those is named.
    async fn look_for_tables(&self, found: &[Version]) {
        let asked = self.terms.iter().any(|terms| !terms.contracts.is_empty());
        if !asked || found.iter().all(|version| version.number > 1) {
            return;
        }
        let config::Source::Postgres(postgres) = &self.config;
        // What cannot be asked now is asked with the next table that is new.
        let Ok(tables) = postgres::described(&self.source, postgres).await else { return };
        let tables: Vec<_> = tables.into_iter().map(Arc::new).collect();
        for unmet in unmet_of(&self.terms, &tables) {
            warn!("source {}: a contract is broken: {unmet}", self.source);
        }
    }
}
