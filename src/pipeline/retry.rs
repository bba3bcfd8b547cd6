//! Parked changes whose time has come: the first of each key, and in its wake those behind it.

use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    delivery::Delivery,
    run::Run,
    write::{judge, place},
};
use crate::{
    change::{Batch, Change, Keys},
    error::{Class, Error, Result},
    failpoint,
    journal::Limits,
    parking::{Due, Why},
    sink::{Outcome, Written},
};

/// Parked changes that are taken up at one time, within the limits of a batch.
const RETRIES_MAX: usize = 500;

/// Refused changes that are tried again in one write at most.
const TOGETHER_MAX: usize = 100;

/// Retries and what comes new take turns: however many are due, the target is asked for so long,
/// and then what comes new has as long.
const TURN: Duration = Duration::from_millis(100);

/// What is due, but must wait for the loop to come to a place, is looked at again after this.
const PUT_OFF: Duration = Duration::from_millis(100);

impl Delivery<'_> {
    /// Hears what became of those that the target has, and tries the parked changes whose time has
    /// come, until there is none, this turn is over, or a stop.
    pub(super) async fn retry(&mut self, stop: &CancellationToken) -> Result<()> {
        let end = Instant::now() + TURN;
        let changes_max = self.cut.limits.changes_max.min(RETRIES_MAX);
        while !stop.is_cancelled() {
            self.hear().await?;
            let mut due = self.lot.due(Limits { changes_max, ..self.cut.limits });
            if due.is_empty() {
                return Ok(());
            }
            // After a restart: earlier changes of its keys may have to be read again.
            due.keep_before(self.reader.offset());
            if due.is_empty() {
                self.lot.put_off(PUT_OFF);
                return Ok(());
            }
            if self.taken.is_some() || self.is_delivery_unrecorded() {
                self.record_and(true).await?;
            }
            if self.taken.is_some() && self.sink.capabilities().atomic {
                self.lot.put_off(PUT_OFF); // within a transaction, whose end comes first
                return Ok(());
            }
            let tried = self.retry_these(&due, end).await;
            let saved = self.lot.save().await;
            self.show_lot();
            tried.and(saved)?;
            if Instant::now() >= end {
                self.lot.put_off(TURN);
                return Ok(());
            }
        }
        Ok(())
    }

    /// What was refused is most likely refused again, and alone costs one write: only where the
    /// target takes one after the other, or answers for each, do more go together.
    async fn retry_these(&mut self, due: &Due, end: Instant) -> Result<()> {
        self.retry_run(&due.fresh).await?;
        let mut rest = due.refused.as_slice();
        while let Some((run, later)) = rest.split_at_checked(self.together.min(rest.len()))
            && !run.is_empty()
        {
            let answered = self.retry_run(run).await?;
            self.together = if answered { (self.together * 2).min(TOGETHER_MAX) } else { 1 };
            rest = if Instant::now() < end { later } else { &[] };
        }
        Ok(())
    }

    /// Tries these changes again, in their order; whether the target refused no run as a whole.
    async fn retry_run(&mut self, due: &[u64]) -> Result<bool> {
        let changes = self.lot.load(due).await?;
        let mut answered = true;
        let mut run = Run::default();
        let (mut gone, mut stay) = (Vec::new(), Vec::<Keys>::new());
        for change in changes {
            let offset = change.offset;
            let keys = self.lot.keys(offset).cloned().unwrap_or_else(|| change.keys());
            if stay.iter().any(|other| other.meets(&keys)) {
                stay.push(keys); // what it waits behind stays parked after all
                continue;
            }
            if let Some(parts) = self.shape_again(change).await? {
                match parts {
                    (None, own) if own.is_empty() => gone.push(offset),
                    (Some(_), parts) if parts.is_empty() => gone.push(offset),
                    unit => run.push_unit(unit),
                }
            } else {
                stay.push(keys);
            }
        }
        if !gone.is_empty() {
            self.stats.filter(gone.len());
            self.lot.delivered(&gone).await?;
        }
        let mut runs = vec![run];
        while let Some(mut run) = runs.pop().filter(|run| !run.is_empty()) {
            match self.send_again(&run).await {
                Ok(written) => {
                    if !self.settle(run, written).await? {
                        runs.clear(); // what waits behind the rest of it is due only after it
                    }
                }
                Err(error) if error.class() == Class::Data && run.len() > 1 => {
                    answered = false;
                    // Or one half, once delivered under this number, would vouch for the other.
                    self.lot.forget_sent(&offsets(&run.batch)).await?;
                    let second = run.split();
                    runs.push(second);
                    runs.push(run);
                }
                Err(error) if error.class() == Class::Data => {
                    answered = false;
                    let error = place(error, &run.batch).to_string();
                    // What waits behind it in the other half is due again only after it.
                    runs.clear();
                    self.settle_refused(&run, &error);
                }
                Err(error) => return Err(place(error, &run.batch)),
            }
        }
        Ok(answered)
    }

    /// The parts of a parked change by the rules as they are now; `None` where it stays parked.
    async fn shape_again(
        &mut self,
        change: Change,
    ) -> Result<Option<(Option<Change>, Vec<Change>)>> {
        let offset = change.offset;
        let late = self.lot.is_superseded(offset);
        let target = self.sink.capabilities();
        if late && target.state_target && !target.supersedes {
            let why = "a later change of its key was delivered, so this state is superseded";
            self.lot.refused(offset, Why::Failed(why.into()));
            return Ok(None);
        }
        let passed = self.filter.apply(Batch { changes: vec![change], position: None });
        let Some(change) = passed.changes.into_iter().next() else {
            return Ok(Some((None, Vec::new())));
        };
        if let Some(why) = self.still_withheld(&change).await? {
            self.lot.refused(offset, why);
            return Ok(None);
        }
        let parts = match self.transform.is_plain() {
            true => Ok(vec![change.clone()]),
            false => self.transform.shape(change.clone()),
        };
        match parts {
            Ok(mut parts) => {
                for part in parts.iter_mut().filter(|_| late) {
                    part.shaped_mut().late = true;
                }
                Ok(Some((Some(change), parts)))
            }
            Err(error) if error.class() != Class::Data => Err(error),
            Err(error) => {
                self.lot.refused(offset, Why::Failed(error.to_string()));
                Ok(None)
            }
        }
    }

    async fn send_again(&mut self, run: &Run) -> Result<Written> {
        let mut progress = self.progress;
        if self.sink.capabilities().transactional_progress {
            progress.retry_seq += 1;
            // What was refused under this number is not taken for sent.
            self.lot.save().await?;
            self.lot.intend(&offsets(&run.batch), progress.retry_seq).await?;
        }
        failpoint::reach("deliver::before_retry");
        let written = self.sink.write(&run.batch, &progress).await?;
        let written = match written {
            // Nothing else is open, so an empty batch makes it durable.
            Written::Until(durable) if durable <= self.progress.cursor => {
                self.sink.write_nothing(&progress).await?
            }
            written => written,
        };
        failpoint::reach("deliver::after_retry");
        self.progress.retry_seq = progress.retry_seq;
        Ok(written)
    }

    /// Takes what was delivered out of the lot; whether that was all of it.
    async fn settle(&mut self, run: Run, written: Written) -> Result<bool> {
        let outcomes = match written {
            Written::All => (0..run.batch.changes.len()).map(|_| Outcome::Durable).collect(),
            Written::Each(outcomes) => outcomes,
            Written::Until(_) => {
                return Err(Error::retry(format!(
                    "sink {} has not made a parked change durable yet",
                    self.name
                )));
            }
        };
        let (asked, told, units) = (run.batch.changes.len(), outcomes.len(), run.len());
        if asked != told {
            let name = &self.name;
            return Err(Error::bug(format!("sink {name} told {told} outcomes of {asked} changes")));
        }
        let (mut delivered, mut unknown) = (Vec::new(), 0);
        // A change leaves the lot when all of its parts are there.
        let judged = judge(&run, outcomes);
        for ((_, parts), outcome) in run.into_units().into_iter().zip(judged) {
            let Some(offset) = parts.first().map(|part| part.offset) else { continue };
            match outcome {
                Outcome::Durable => delivered.push(offset),
                Outcome::Unknown => unknown += 1,
                Outcome::Refused(error) => {
                    let error = place(error, &Batch { changes: parts, position: None }).to_string();
                    self.lot.refused(offset, Why::Refused(error));
                }
            }
        }
        self.lot.save().await?;
        let nothing = delivered.is_empty() && unknown == units;
        if self.sink.capabilities().answers_later {
            self.lot.sent(&delivered).await?;
        } else {
            self.stats.redelivered(delivered.len());
            self.lot.delivered(&delivered).await?;
        }
        if self.sink.capabilities().transactional_progress {
            self.catalog.advance(&self.name, &self.progress).await?;
        }
        if nothing {
            return Err(Error::retry(format!(
                "sink {} did not say what became of {unknown} parked changes",
                self.name
            )));
        }
        Ok(delivered.len() == units)
    }

    fn settle_refused(&mut self, run: &Run, error: &str) {
        for offset in offsets(&run.batch) {
            self.lot.refused(offset, Why::Refused(error.to_owned()));
        }
    }
}

/// The offsets of a batch, each once.
fn offsets(batch: &Batch) -> Vec<u64> {
    let mut offsets: Vec<u64> = batch.changes.iter().map(|change| change.offset).collect();
    offsets.dedup();
    offsets
}
