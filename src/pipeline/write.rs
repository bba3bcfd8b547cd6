//! Writing a run: what is delivered moves the progress, what is refused is parked, and what nobody
//! can say is written again.

use super::{
    delivery::Delivery,
    run::{Run, keys, whole},
};
use crate::{
    change::{Batch, Change},
    error::{Class, Error, Result},
    parking::Why,
    sink::{Outcome, Progress, Written},
};

impl Delivery<'_> {
    /// Writes a run. Progress that passes what was parked is written down at its end, however often
    /// it was halved, and also where the rest of it failed: it would be refused again, and counted
    /// as new. After a failure so is what was delivered, which would come again.
    pub(super) async fn write(&mut self, run: Run, cursor: u64) -> Result<()> {
        self.parked_now = false;
        let written = self.write_runs(run, cursor).await;
        let due = match &written {
            Ok(()) => self.is_record_due(),
            Err(_) => self.is_delivery_unrecorded(),
        };
        let due = due || self.parked_now;
        let recorded = if due { self.record().await } else { Ok(()) };
        written.and(recorded)
    }

    /// One that is refused as a whole is halved until the bad change stands alone, which is parked.
    async fn write_runs(&mut self, run: Run, cursor: u64) -> Result<()> {
        let mut runs = vec![run];
        while let Some(run) = runs.pop() {
            let mut run = self.hold_back(run)?;
            let next = runs.last().and_then(|run| run.batch.changes.first());
            let end = next.map_or(cursor, |next| next.offset);
            if run.is_empty() {
                self.skip_to(end);
                continue;
            }
            let progress = Progress { cursor: end, ..self.progress };
            if self.sink.capabilities().transactional_progress {
                self.save_parked().await?; // before the target's own progress passes it
            }
            match self.sink.write(&run.batch, &progress).await {
                Ok(Written::All) => self.pass(&run.batch, end, None),
                Ok(Written::Until(durable)) => {
                    self.pass(&run.batch, durable, Some(end).filter(|end| *end > durable));
                }
                Ok(Written::Each(outcomes)) => {
                    let rest = self.sort(run, outcomes, end).await?;
                    runs.extend(rest);
                }
                Err(error) if error.class() == Class::Data && run.len() > 1 => {
                    let second = run.split();
                    runs.push(second);
                    runs.push(run);
                }
                Err(error) if error.class() == Class::Data => {
                    let error = place(error, &run.batch).to_string();
                    self.refuse(run.into_units(), &error)?;
                    self.skip_to(end);
                }
                Err(error) => return Err(place(error, &run.batch)),
            }
            if self.taken.is_none() && self.is_delivery_unrecorded() && self.is_record_due() {
                self.record().await?;
            }
        }
        Ok(())
    }

    /// Parks what has to wait behind a change that an earlier part of the same batch left parked.
    fn hold_back(&mut self, run: Run) -> Result<Run> {
        if !self.parked_now {
            return Ok(run);
        }
        let mut kept = Run::default();
        kept.batch.position = run.batch.position;
        for unit in run.into_units() {
            match keys(&unit.1) {
                Some(keys) if self.lot.blocks(&keys) => {
                    if let Some(change) = whole(unit) {
                        kept.close_transaction_of(&change);
                        self.lot.park(change, keys, Why::Behind)?;
                    }
                }
                _ => kept.push_unit(unit),
            }
        }
        Ok(kept)
    }

    /// Parks what was refused.
    fn refuse(&mut self, units: Vec<(Option<Change>, Vec<Change>)>, error: &str) -> Result<()> {
        for unit in units {
            if let (Some(keys), Some(change)) = (keys(&unit.1), whole(unit)) {
                self.lot.park(change, keys, Why::Refused(error.to_owned()))?;
                self.parked_now = true;
                self.stats.park();
            }
        }
        Ok(())
    }

    /// Deals with single outcomes: moves the progress to the first change that nobody can say of,
    /// parks the refused ones, and gives back what is to be written again.
    async fn sort(&mut self, run: Run, outcomes: Vec<Outcome>, end: u64) -> Result<Option<Run>> {
        let (asked, told) = (run.batch.changes.len(), outcomes.len());
        if told != asked {
            let name = &self.name;
            return Err(Error::bug(format!("sink {name} told {told} outcomes of {asked} changes")));
        }
        let units = run.len();
        let judged = judge(&run, outcomes);
        let (mut delivered, mut rest) = (Batch::default(), Run::default());
        for (unit, verdict) in run.into_units().into_iter().zip(judged) {
            match verdict {
                Outcome::Durable => delivered.changes.extend(unit.1),
                Outcome::Unknown => rest.push_unit(unit),
                Outcome::Refused(error) => {
                    let error = place(error, &Batch { changes: unit.1.clone(), position: None });
                    self.refuse(vec![unit], &error.to_string())?;
                }
            }
        }
        let open = rest.batch.changes.first().map(|change| change.offset);
        self.pass(&delivered, open.unwrap_or(end), None);
        if rest.len() == units {
            return Err(Error::retry(format!(
                "sink {} did not say what became of {units} changes",
                self.name
            )));
        }
        Ok(Some(rest).filter(|rest| !rest.is_empty()))
    }

    /// Counts a delivered run and moves the progress to `cursor`; what is `taken` beyond it is not
    /// durable yet.
    fn pass(&mut self, batch: &Batch, cursor: u64, taken: Option<u64>) {
        self.progress.cursor = cursor.max(self.progress.cursor);
        self.taken = taken;
        self.written = self.progress.cursor;
        self.stats.delivered(batch, self.progress.cursor);
    }
}

/// One verdict for each unit: refused when one of its parts is, else unknown when one is.
pub(super) fn judge(run: &Run, outcomes: Vec<Outcome>) -> Vec<Outcome> {
    let mut outcomes = outcomes.into_iter();
    let mut of_unit = |parts: usize| {
        let mut verdict = Outcome::Durable;
        for outcome in outcomes.by_ref().take(parts) {
            match (&verdict, &outcome) {
                (Outcome::Refused(_), _) | (_, Outcome::Durable) => {}
                _ => verdict = outcome,
            }
        }
        verdict
    };
    run.lengths().map(&mut of_unit).collect()
}

/// Says which change a refusal is about.
pub(super) fn place(error: Error, batch: &Batch) -> Error {
    let Some(change) = batch.changes.first() else { return error };
    let table = change.table.as_ref().map_or_else(|| "a message".to_owned(), |t| t.full_name());
    let what = format!("{} of {table} at offset {}", change.op.word(), change.offset);
    error.context(format!("while delivering {what}"))
}
