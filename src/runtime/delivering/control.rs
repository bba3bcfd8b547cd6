//! What people do to a sink while it runs: each written down with who and why.

use std::sync::PoisonError;

use serde::{Deserialize, Serialize};
use tokio::{sync::MutexGuard, time::timeout};
use tracing::info;

use super::{Delivering, INTERRUPT_GRACE};
use crate::{
    catalog::By,
    change::Change,
    config::From,
    error::{Error, Result},
    parking::{Place, Query},
    sink::Sink,
};

/// Where a sink is moved to: a place of the journal.
pub type To = From;

/// A sink that was moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moved {
    /// The offset that it had.
    pub from: u64,
    /// The offset that it has.
    pub to: u64,
    /// The epoch that began with it.
    pub epoch: u64,
}

impl Delivering {
    /// Ends the attempt, after the write in flight where that is not too long, and keeps the loop
    /// from another as long as the guard is held.
    async fn interrupt(&self) -> MutexGuard<'_, Vec<Box<dyn Sink>>> {
        let leave = async {
            self.attempt.lock().unwrap_or_else(PoisonError::into_inner).leave.cancel();
        };
        // The lock is asked for first, so that it is had before the loop begins anew.
        let gently = async { tokio::join!(biased; self.sinks.lock(), leave).0 };
        if let Ok(held) = timeout(INTERRUPT_GRACE, gently).await {
            return held;
        }
        let cut_off = async { self.cut_off() };
        tokio::join!(biased; self.sinks.lock(), cut_off).0
    }

    /// Ends delivery until somebody resumes it; the journal keeps what the sink does not have.
    pub(in crate::runtime) async fn pause(&self, by: &By) -> Result<()> {
        let _held = self.interrupt().await;
        self.catalog.pause(&self.name, true, by).await?;
        info!("sink {} is paused by {by}", self.name);
        self.changed.notify_one();
        Ok(())
    }

    /// Lets a paused sink go on, and one that stopped or waits try again at once.
    pub(in crate::runtime) async fn resume(&self, by: &By) -> Result<()> {
        self.catalog.pause(&self.name, false, by).await?;
        info!("sink {} is resumed by {by}", self.name);
        self.changed.notify_one();
        Ok(())
    }

    /// Delivers again from an earlier place on, in a new epoch. What is parked from there on comes
    /// again, too.
    pub(in crate::runtime) async fn rewind(&self, to: &To, by: &By) -> Result<Moved> {
        let mut held = self.interrupt().await;
        let (from, to) = (self.progress(&mut held).await?.cursor, self.offset_of(to)?);
        if to > from {
            return Err(Error::config(format!(
                "sink {} has offset {from}, so {to} lies ahead of it",
                self.name
            ))
            .remedy("a rewind goes back; `walrace sink skip` goes forward"));
        }
        self.move_to((from, to), by).await
    }

    /// Gives up everything before a later place: it stays on record as lost.
    pub(in crate::runtime) async fn skip_to(&self, to: &To, by: &By) -> Result<Moved> {
        let mut held = self.interrupt().await;
        let (from, to) = (self.progress(&mut held).await?.cursor, self.offset_of(to)?);
        if to < from {
            return Err(Error::config(format!(
                "sink {} has offset {from}, so {to} lies behind it",
                self.name
            ))
            .remedy("a skip goes forward; `walrace sink rewind` goes back"));
        }
        self.move_to((from, to), by).await
    }

    async fn move_to(&self, (from, to): (u64, u64), by: &By) -> Result<Moved> {
        let epoch = self.catalog.move_to(&self.name, (from, to), by).await?;
        info!("sink {} is moved from offset {from} to {to} by {by}", self.name);
        self.stats.begin(to, to);
        self.changed.notify_one();
        Ok(Moved { from, to, epoch })
    }

    /// Makes a dead letter of one change that the sink does not have yet, without an attempt; it
    /// keeps no later change back.
    pub(in crate::runtime) async fn skip(&self, offset: Option<u64>, by: &By) -> Result<u64> {
        let mut held = self.interrupt().await;
        let cursor = self.progress(&mut held).await?.cursor;
        let offset = offset.unwrap_or(cursor);
        if offset < cursor {
            return Err(Error::config(format!(
                "sink {} is past offset {offset}: it has offset {cursor}",
                self.name
            )));
        }
        self.catalog.skip(&self.name, offset, by).await?;
        self.changed.notify_one();
        Ok(offset)
    }

    /// Lets parked changes be tried again at once; how many there are.
    pub(in crate::runtime) async fn retry_parked(&self, query: &Query, by: &By) -> Result<u64> {
        let _held = self.interrupt().await;
        let done = self.parking.retry(query).await?;
        self.note("retry_parked", done, by).await
    }

    /// Gives parked changes up; how many there are.
    pub(in crate::runtime) async fn drop_parked(&self, query: &Query, by: &By) -> Result<u64> {
        let _held = self.interrupt().await;
        let done = self.parking.drop(query).await?;
        self.note("drop_parked", done, by).await
    }

    async fn note(&self, action: &str, done: u64, by: &By) -> Result<u64> {
        let detail = serde_json::json!({"changes": done, "why": by.why}).to_string();
        self.catalog.record_event((&by.who, action), &self.name, &detail).await?;
        self.changed.notify_one();
        Ok(done)
    }

    /// Gives columns of a parked change other values; it is tried again at once.
    pub(in crate::runtime) async fn edit_parked(
        &self,
        place: &Place,
        values: &serde_json::Map<String, serde_json::Value>,
        by: &By,
    ) -> Result<()> {
        let _held = self.interrupt().await;
        let mut transform = self.transform()?;
        let keys = |change: &Change| transform.keys_despite(change);
        self.parking.edit(place, values, (&by.who, keys)).await?;
        let columns: Vec<&String> = values.keys().collect();
        let detail = serde_json::json!({"offset": place.offset, "columns": columns, "why": by.why});
        self.catalog
            .record_event((&by.who, "edit_parked"), &self.name, &detail.to_string())
            .await?;
        self.changed.notify_one();
        Ok(())
    }
}
