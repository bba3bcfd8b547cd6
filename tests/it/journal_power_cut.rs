//! Power cuts and crashes at every step, over a disk that forgets what was not synced.
//!
//! The model is a list of commits. After any cut the journal opens, and holds every commit that was
//! acknowledged, perhaps those that were on their way, and nothing else.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test may panic"
)]

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use walrace::{
    change::{Batch, Timestamp},
    error::Class,
    journal::{Gap, Journal, Origin, Retention},
};

use crate::{
    journal::{block_on, committed, options, position, read_all, table, transaction},
    kit::power_cut::{Faults, PowerCut},
};

const SEGMENT_BYTES: u64 = 1_000;

/// What was asked of the journal, and what it acknowledged.
#[derive(Clone, Debug, Default)]
struct Model {
    /// The commits in order: number, changes.
    commits: Vec<(u64, u32)>,
    /// How many of them were acknowledged.
    acknowledged: usize,
    /// The last commit's position may be one of a batch without changes.
    start: u64,
    gaps: usize,
    origin: bool,
    number: u64,
}

impl Model {
    /// The changes of the first `count` commits.
    fn changes(&self, count: usize) -> u64 {
        self.commits[..count].iter().map(|(_, changes)| u64::from(*changes)).sum()
    }

    /// Compares the journal with it; `Err` says what is wrong. Afterwards the model is what the
    /// journal holds.
    fn check(&mut self, journal: &Journal) -> Result<(), String> {
        let end = journal.end();
        let progress = journal.progress();
        let held = (self.acknowledged..=self.commits.len()).find(|count| {
            let last = count.checked_sub(1).map(|last| position(self.commits[last].0));
            self.changes(*count) == end && progress == last
        });
        let Some(held) = held else {
            return Err(format!("ends at {end}, {progress:?}, but was acknowledged: {self:?}"));
        };
        if journal.start() < self.start {
            return Err(format!(
                "begins at {}, but was trimmed to {}",
                journal.start(),
                self.start
            ));
        }
        let info = journal.info();
        if info.gaps.len() < self.gaps || self.origin && info.origin.is_none() {
            return Err(format!("lost a gap or its origin: {info:?}"));
        }
        let read = block_on(read_all(journal, journal.start()));
        let mut expected = Vec::new();
        for (number, count) in &self.commits[..held] {
            expected.extend(transaction(*number, *count, &table("orders")));
        }
        for (offset, change) in expected.iter_mut().enumerate() {
            change.offset = offset as u64;
        }
        if read != expected[journal.start() as usize..] {
            return Err(format!("holds {} other changes than were committed", read.len()));
        }
        journal.verify().map_err(|error| format!("does not verify: {error}"))?;
        self.commits.truncate(held);
        self.acknowledged = held;
        self.start = journal.start();
        self.gaps = info.gaps.len();
        Ok(())
    }
}

/// A journal under the script; every step says what it asks before it asks.
struct Run {
    disk: PowerCut,
    journal: Journal,
    model: Model,
}

type Step = Result<(), walrace::error::Error>;

impl Run {
    async fn commit(&mut self, count: u32) -> Step {
        self.model.number += 1;
        let number = self.model.number;
        self.model.commits.push((number, count));
        self.journal.append(committed(number, count, &table("orders"))).await?;
        self.model.acknowledged = self.model.commits.len();
        Ok(())
    }

    /// A transaction in several batches; abandoned, or committed with the last.
    async fn pieces(&mut self, pieces: u32, commit: bool) -> Step {
        self.model.number += 1;
        let number = self.model.number;
        let changes = transaction(number, pieces * 3, &table("orders"));
        for (place, piece) in changes.chunks(3).enumerate() {
            let last = place as u32 + 1 == pieces;
            if last && commit {
                self.model.commits.push((number, pieces * 3));
            }
            let position = (last && commit).then(|| position(number));
            self.journal.append(Batch { changes: piece.to_vec(), position }).await?;
        }
        if !commit {
            return self.journal.abandon().await;
        }
        self.model.acknowledged = self.model.commits.len();
        Ok(())
    }

    /// A commit for which there is no room; the journal stays as it was.
    async fn full(&mut self) -> Step {
        let before = self.model.clone();
        self.disk.fill(Some(200));
        let result = self.commit(9).await;
        self.disk.fill(None);
        match result {
            Err(error) if error.class() == Class::Retry && error.to_string().contains("full") => {
                let number = self.model.number;
                self.model = Model { number, ..before };
                Ok(())
            }
            other => other,
        }
    }

    async fn gap(&mut self) -> Step {
        let (from, to) = (position(self.model.number), position(self.model.number));
        self.journal.record_gap(Gap { from, to, reason: "a test".into() }).await?;
        self.model.gaps += 1;
        Ok(())
    }

    async fn origin(&mut self) -> Step {
        let name = |text: &str| text.to_owned();
        let origin = Origin {
            system: name("1"),
            database: name("app"),
            slot: name("walrace"),
            ..Origin::default()
        };
        self.journal.set_origin(origin).await?;
        self.model.origin = true;
        Ok(())
    }

    async fn trim(&mut self, keep: usize) -> Step {
        let keep_from = self.model.changes(self.model.acknowledged.min(keep));
        let retention = Retention { keep_from, appended_before: Timestamp(i64::MAX), bytes_max: 0 };
        self.journal.trim(retention).await?;
        self.model.start = self.journal.start();
        self.model.gaps = self.journal.info().gaps.len();
        Ok(())
    }

    /// Everything a journal does, over many small segments.
    async fn script(&mut self) -> Step {
        self.origin().await?;
        for _ in 0..6 {
            self.commit(0).await?; // positions alone, until the first segment is full of them
        }
        for count in [2, 1, 0, 7, 3, 0, 2] {
            self.commit(count).await?;
        }
        self.pieces(2, true).await?;
        self.pieces(8, false).await?;
        self.commit(2).await?;
        self.commit(1).await?;
        self.pieces(8, true).await?;
        self.full().await?;
        self.trim(8).await?;
        self.pieces(1, false).await?;
        self.commit(4).await?;
        self.gap().await?;
        self.pieces(7, false).await?;
        self.commit(5).await?;
        self.trim(usize::MAX).await
    }

    /// A little more, after a restart.
    async fn more(&mut self) -> Step {
        self.commit(2).await?;
        self.pieces(4, false).await?;
        self.commit(1).await?;
        self.commit(0).await?;
        self.commit(3).await
    }
}

/// Runs `script` on `disk`, opening first, until it ends or the process dies.
fn run(disk: &PowerCut, mut model: Model, more: bool) -> Result<Model, String> {
    let journal = match Journal::open(options(disk, SEGMENT_BYTES)) {
        Ok(journal) => journal,
        Err(error) if error.class() == Class::Damaged => return Err(error.to_string()),
        Err(_) => return Ok(model), // the process died
    };
    if more {
        model.check(&journal)?;
    }
    let mut run = Run { disk: disk.clone(), journal, model };
    let ended = block_on(async { if more { run.more().await } else { run.script().await } });
    let _ = ended; // an error is the death of the process: nothing follows
    Ok(run.model)
}

/// Opens after a cut and compares.
fn survives(disk: &PowerCut, mut model: Model) -> Result<(), String> {
    disk.set(Faults::default());
    let journal = Journal::open(options(disk, SEGMENT_BYTES))
        .map_err(|error| format!("does not open: {error}"))?;
    model.check(&journal)?;
    // And it must be whole enough to go on.
    let mut run = Run { disk: disk.clone(), journal, model };
    block_on(run.more()).map_err(|error| format!("does not go on: {error}"))?;
    drop(run.journal);
    let journal = Journal::open(options(disk, SEGMENT_BYTES))
        .map_err(|error| format!("does not open the second time: {error}"))?;
    run.model.check(&journal)
}

fn seeds(count: u64) -> impl Iterator<Item = Option<u64>> {
    std::iter::once(None).chain((0..count).map(Some))
}

/// Calls that the whole script makes.
fn script_calls() -> u64 {
    let disk = PowerCut::default();
    run(&disk, Model::default(), false).unwrap();
    disk.calls()
}

/// The script, dead after `calls`, without a power cut.
fn crashed(calls: u64) -> (PowerCut, Model) {
    let disk = PowerCut::default();
    disk.set(Faults { stop_after: Some(calls), ..Faults::default() });
    let model = run(&disk, Model::default(), false).unwrap();
    (disk, model)
}

#[test]
fn a_power_cut_at_any_step_loses_nothing_that_was_acknowledged() {
    for calls in 0..=script_calls() {
        for seed in seeds(4) {
            let (disk, model) = crashed(calls);
            disk.cut(seed);
            if let Err(why) = survives(&disk, model) {
                panic!("cut after {calls} calls, seed {seed:?}: {why}");
            }
        }
    }
}

#[test]
fn a_crash_and_then_a_power_cut_lose_nothing_that_was_acknowledged() {
    for calls in 0..=script_calls() {
        for seed in seeds(1) {
            let after = fastrand::Rng::with_seed(calls * 7 + seed.unwrap_or(99)).u64(0..20);
            let (disk, model) = crashed(calls);
            disk.set(Faults { stop_after: Some(after), ..Faults::default() });
            let result = run(&disk, model, true).and_then(|model| {
                disk.cut(seed);
                survives(&disk, model)
            });
            if let Err(why) = result {
                panic!("crash after {calls} calls, cut {after} later, seed {seed:?}: {why}");
            }
        }
    }
}

#[test]
fn what_was_seen_after_a_failed_sync_survives_a_power_cut() {
    let disk = PowerCut::default();
    run(&disk, Model::default(), false).unwrap();
    for sync in 1..=disk.syncs() {
        let disk = PowerCut::default();
        disk.set(Faults { fail_sync: Some(sync), ..Faults::default() });
        let mut model = run(&disk, Model::default(), false).unwrap();
        // The page cache still shows what the disk does not have.
        disk.set(Faults::default());
        let journal = Journal::open(options(&disk, SEGMENT_BYTES)).unwrap();
        model.check(&journal).unwrap();
        drop(journal);
        disk.cut(None);
        if let Err(why) = survives(&disk, model) {
            panic!("sync {sync} failed, then a cut: {why}");
        }
    }
}

/// A run in which one sync can be left out: the script, or what follows a crash of it.
#[derive(Clone, Copy, Debug)]
struct Case {
    crashed_after: Option<u64>,
    sync: u64,
}

impl Case {
    /// The disk and the model before the run.
    fn prepare(self) -> (PowerCut, Model) {
        match self.crashed_after {
            Some(calls) => crashed(calls),
            None => (PowerCut::default(), Model::default()),
        }
    }

    /// Whether leaving the sync out is noticed after a cut at some step.
    fn is_noticed(self) -> bool {
        let more = self.crashed_after.is_some();
        let (disk, model) = self.prepare();
        disk.set(Faults::default());
        run(&disk, model, more).unwrap();
        (0..=disk.calls()).any(|calls| {
            seeds(6).any(|seed| {
                let (disk, model) = self.prepare();
                let ignore_sync = Some(self.sync);
                disk.set(Faults { stop_after: Some(calls), ignore_sync, ..Faults::default() });
                let result = run(&disk, model, more).and_then(|model| {
                    disk.cut(seed);
                    survives(&disk, model)
                });
                result.is_err()
            })
        })
    }
}

/// Every call of a sync in the journal's source, as `file.rs:line`.
fn sync_calls() -> BTreeSet<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/journal");
    let mut calls = BTreeSet::new();
    for file in std::fs::read_dir(folder).unwrap() {
        let path = file.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let text = std::fs::read_to_string(&path).unwrap();
        for (number, line) in text.lines().enumerate() {
            if line.contains("file.sync()") || line.contains("disk.sync_dir(") {
                calls.insert(format!("{name}:{}", number + 1));
            }
        }
    }
    calls
}

#[test]
fn every_single_sync_is_needed() {
    let mut cases: BTreeMap<String, Vec<Case>> = BTreeMap::new();
    let crashes = (1..=script_calls()).step_by(2).map(Some);
    for crashed_after in std::iter::once(None).chain(crashes) {
        let (disk, model) = Case { crashed_after, sync: 0 }.prepare();
        disk.set(Faults::default());
        disk.trace();
        run(&disk, model, crashed_after.is_some()).unwrap();
        for (place, site) in disk.sites().into_iter().enumerate() {
            cases.entry(site).or_default().push(Case { crashed_after, sync: place as u64 + 1 });
        }
    }
    let control = Case { crashed_after: None, sync: u64::MAX };
    assert!(!control.is_noticed(), "with every sync in place there is nothing to notice");
    let called: BTreeSet<String> = cases.keys().cloned().collect();
    assert_eq!(called, sync_calls(), "the script must reach every sync of the source");
    let needless: Vec<&String> = cases
        .iter()
        .filter(|(_, cases)| !cases.iter().any(|case| case.is_noticed()))
        .map(|(site, _)| site)
        .collect();
    assert!(needless.is_empty(), "nothing notices when these are left out: {needless:?}");
}
