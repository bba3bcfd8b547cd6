//! The two loops, and nothing else moves a change.
//!
//! ```text
//!   capture                                        deliver, one for each sink
//!   source.next ──► journal.append ──► (durable) ──► read ──► transform ──► sink.write
//!        ▲                │                                                     │
//!        └── confirm ◄────┘                              parking ◄───┤          │
//!                                                          └──retry──►┘ advance ◄─┘
//! ```
//!
//! Before `confirm` the source still has a change; after it the journal does. Either loop may die
//! between any two lines: the source sends again what was not confirmed, and a sink gets again what
//! its progress has not passed. Errors leave through the top; `runtime` decides by their class.

mod breach;
mod delivery;
mod lanes;
mod retry;
mod run;
mod verdicts;
mod write;

use tokio_util::sync::CancellationToken;
use tracing::debug;

pub use self::{
    breach::{Judge, NOT_ACCEPTED, Terms, not_accepted, unmet_of},
    delivery::{Cut, Delivery},
    lanes::Lanes,
};
use crate::{change::Batch, error::Result, failpoint, journal::Journal, source::Source};

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
        let cursor = delivery.reader.offset();
        failpoint::reach("deliver::before_transform");
        let run = delivery.transform(batch).await?;
        failpoint::reach("deliver::before_write");
        delivery.write(run, cursor).await?;
        failpoint::reach("deliver::after_write");
    }
    delivery.close().await
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
