//! The two loops, and nothing else moves a change.
//!
//! ```text
//!   capture                                        deliver, one for each sink
//!   source.next ──► journal.append ──► (durable) ──► read ──► transform ──► sink.write
//!        ▲                │                                                     │
//!        └── confirm ◄────┘                                     advance ◄───────┘
//! ```
//!
//! Before `confirm` the source still has a change; after it the journal does. Either loop may die
//! between any two lines: the source sends again what was not confirmed, and a sink gets again what
//! its progress has not passed. Errors leave through the top; `runtime` decides by their class.

use std::{sync::Arc, time::Duration};

use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::{
    catalog::Catalog,
    change::Batch,
    error::{Class, Error, Result},
    failpoint,
    journal::{Journal, Limits, Reader},
    sink::{Outcome, Progress, Sink, SinkStats, Written},
    source::Source,
    transform::Filter,
};

/// Moves changes from the source to the journal until `stop`.
pub async fn capture(
    source: &mut dyn Source,
    journal: &Journal,
    stop: &CancellationToken,
) -> Result<()> {
    loop {
        let batch = tokio::select! {
            biased;
            () = stop.cancelled() => return Ok(()),
            batch = source.next() => batch?,
        };
        let position = batch.position;
        show_captured(&batch);
        failpoint::reach("capture::before_append");
        journal.append(batch).await?;
        failpoint::reach("capture::before_confirm");
        if let Some(position) = position {
            source.confirm(position).await?;
        }
        failpoint::reach("capture::after_confirm");
    }
}

/// Moves changes from the journal to one sink until `stop`.
pub async fn deliver(delivery: &mut Delivery<'_>, stop: &CancellationToken) -> Result<()> {
    while let Some(batch) = delivery.read(stop).await? {
        let cursor = batch.end().unwrap_or(delivery.progress.cursor);
        failpoint::reach("deliver::before_transform");
        let batch = delivery.transform(batch);
        failpoint::reach("deliver::before_write");
        delivery.write(batch, cursor).await?;
        failpoint::reach("deliver::after_write");
    }
    delivery.record().await?;
    delivery.sink.close().await
}

/// One line a change for those who ask for it with `log.level = "debug"`.
fn show_captured(batch: &Batch) {
    if !tracing::enabled!(tracing::Level::DEBUG) {
        return;
    }
    for change in &batch.changes {
        let table = change.table.as_ref().map(|table| table.full_name());
        let (op, lsn) = (change.op.word(), change.transaction.commit_lsn);
        debug!("captured {op} on {} (LSN: {lsn})", table.as_deref().unwrap_or("no table"));
    }
}

/// How a sink's batches are cut.
#[derive(Clone, Copy, Debug)]
pub struct Cut {
    /// Changes and bytes at most.
    pub limits: Limits,
    /// A batch that is not full waits this long for more.
    pub linger: Duration,
}

/// One sink with all that its loop needs.
pub struct Delivery<'a> {
    /// The sink's name.
    pub name: String,
    /// Where the changes come from; stands at the progress' cursor.
    pub reader: Reader,
    /// What this sink wants to see.
    pub filter: Filter,
    /// The target, open.
    pub sink: &'a mut dyn Sink,
    /// Where progress is kept for those targets that cannot.
    pub catalog: Catalog,
    /// What the sink has; runs ahead of what is recorded only over filtered changes and over
    /// targets that keep their progress themselves.
    pub progress: Progress,
    /// How batches are cut.
    pub cut: Cut,
    /// Counters for people.
    pub stats: Arc<SinkStats>,
    /// When progress was last recorded in the catalog.
    pub recorded_at: Instant,
    /// The cursor that the target holds or, where it holds none, the catalog.
    pub written: u64,
}

/// Progress that no write carries (filtered changes, targets that keep their own) is recorded this
/// often.
const RECORD_EVERY: Duration = Duration::from_secs(1);

impl Delivery<'_> {
    /// Waits for changes; `None` at a stop.
    async fn read(&mut self, stop: &CancellationToken) -> Result<Option<Batch>> {
        loop {
            let due = self.sink.not_before().unwrap_or_else(Instant::now);
            let unrecorded = self.stats.recorded() < self.progress.cursor;
            let batch = tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(None),
                batch = read_after(due, &mut self.reader, self.cut.limits) => batch?,
                () = sleep_until(self.recorded_at + RECORD_EVERY), if unrecorded => {
                    self.record().await?;
                    continue;
                }
            };
            return self.linger(batch, stop).await.map(Some);
        }
    }

    /// Fills up a batch that is not full, for as long as this sink likes to wait and nobody stops.
    async fn linger(&mut self, mut batch: Batch, stop: &CancellationToken) -> Result<Batch> {
        if self.cut.linger.is_zero() {
            return Ok(batch);
        }
        let deadline = Instant::now() + self.cut.linger;
        loop {
            let Limits { changes_max, bytes_max } = self.cut.limits;
            let left = Limits {
                changes_max: changes_max.saturating_sub(batch.changes.len()),
                bytes_max: bytes_max.saturating_sub(batch.bytes()),
            };
            if left.changes_max == 0 || left.bytes_max == 0 {
                return Ok(batch);
            }
            tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(batch),
                () = sleep_until(deadline) => return Ok(batch),
                more = self.reader.next(left) => batch.changes.extend(more?.changes),
            }
        }
    }

    /// Leaves to the sink what it wants to see, and counts the rest.
    fn transform(&mut self, batch: Batch) -> Batch {
        let read = batch.changes.len();
        let batch = self.filter.apply(batch);
        self.stats.filter(read - batch.changes.len());
        batch
    }

    /// Writes a batch; one that is refused as a whole is halved until the bad change stands alone.
    async fn write(&mut self, batch: Batch, cursor: u64) -> Result<()> {
        if batch.changes.is_empty() {
            self.progress.cursor = cursor;
            return if self.is_record_due() { self.record().await } else { Ok(()) };
        }
        let mut parts = vec![batch];
        while let Some(mut part) = parts.pop() {
            let end = part.end().filter(|_| !parts.is_empty()).unwrap_or(cursor);
            let progress = Progress { cursor: end, ..self.progress };
            match self.sink.write(&part, &progress).await {
                Ok(Written::All) => self.pass(&part, end).await?,
                Ok(Written::Until(durable)) => self.pass(&part, durable).await?,
                Ok(Written::Each(outcomes)) => self.pass_until_refused(part, outcomes, end).await?,
                Err(error) if error.class() == Class::Data && part.changes.len() > 1 => {
                    let second = part.changes.split_off(part.changes.len() / 2);
                    parts.push(Batch { changes: second, position: part.position.take() });
                    parts.push(part);
                }
                Err(error) => return Err(place(error, &part)),
            }
        }
        Ok(())
    }

    /// Moves past the changes before the first that is not durable, and says why it is not.
    async fn pass_until_refused(
        &mut self,
        mut batch: Batch,
        outcomes: Vec<Outcome>,
        end: u64,
    ) -> Result<()> {
        let asked = batch.changes.len();
        if outcomes.len() != asked {
            let (name, told) = (&self.name, outcomes.len());
            return Err(Error::bug(format!("sink {name} told {told} outcomes of {asked} changes")));
        }
        let first = outcomes.into_iter().enumerate().find(|(_, o)| !matches!(o, Outcome::Durable));
        let Some((index, outcome)) = first else { return self.pass(&batch, end).await };
        let rest = Batch { changes: batch.changes.split_off(index.min(asked)), position: None };
        if let Some(end) = batch.end() {
            self.pass(&batch, end).await?;
        }
        Err(match outcome {
            Outcome::Refused(error) => place(error, &rest),
            _ => Error::retry(format!(
                "sink {} did not say what became of {} of {asked} changes",
                self.name,
                rest.changes.len()
            )),
        })
    }

    /// Counts a delivered run and moves the progress to `cursor`.
    async fn pass(&mut self, batch: &Batch, cursor: u64) -> Result<()> {
        self.progress.cursor = cursor;
        self.written = cursor;
        self.stats.delivered(batch, cursor);
        let lazy = self.sink.capabilities().transactional_progress;
        if lazy && !self.is_record_due() {
            return Ok(());
        }
        failpoint::reach("deliver::before_advance");
        self.record().await
    }

    fn is_record_due(&self) -> bool {
        self.recorded_at.elapsed() >= RECORD_EVERY || self.stats.is_record_wanted()
    }

    /// Makes the progress durable in the catalog, and before that at a target that keeps its own.
    async fn record(&mut self) -> Result<()> {
        if self.stats.recorded() >= self.progress.cursor {
            return Ok(());
        }
        if self.sink.capabilities().transactional_progress && self.written < self.progress.cursor {
            self.sink.write(&Batch::default(), &self.progress).await?;
            self.written = self.progress.cursor;
        }
        self.catalog.advance(&self.name, &self.progress).await?;
        self.recorded_at = Instant::now();
        self.stats.record(self.progress.cursor);
        Ok(())
    }
}

async fn read_after(due: Instant, reader: &mut Reader, limits: Limits) -> Result<Batch> {
    sleep_until(due).await;
    reader.next(limits).await
}

/// Says which change a refusal is about.
fn place(error: Error, batch: &Batch) -> Error {
    let Some(change) = batch.changes.first() else { return error };
    let table = change.table.as_ref().map_or_else(|| "a message".to_owned(), |t| t.full_name());
    let what = format!("{} of {table} at offset {}", change.op.word(), change.offset);
    error.context(format!("while delivering {what}"))
}
