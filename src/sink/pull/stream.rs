//! The consumers' end of an `http_pull` sink.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::time::Instant;
use uuid::Uuid;

use super::{feed::Feed, shared::Shared};
use crate::{
    error::{Error, Result},
    failpoint,
};

/// So long an acknowledgement waits for a sink that is just opening.
const OPENING: Duration = Duration::from_secs(5);

/// One message as a consumer gets it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pulled {
    /// What acknowledges it; the same on every delivery.
    pub ack_id: Uuid,
    /// JSON.
    pub body: Bytes,
}

/// The consumers' end of an `http_pull` sink. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Stream(Arc<Shared>);

impl Stream {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self(shared)
    }

    /// Leases up to `max` messages in the order of their offsets, at most one of each key. Waits
    /// up to `wait` for the first; `None` where too many wait already. What it returns is durably
    /// leased.
    pub async fn receive(&self, max: usize, wait: Duration) -> Result<Option<Vec<Pulled>>> {
        let deadline = Instant::now() + wait;
        let mut permit = None;
        loop {
            let arrived = self.0.arrived.notified();
            let (messages, release) = self.take(max).await?;
            let over = Instant::now() >= deadline || self.0.stop.is_cancelled();
            if !messages.is_empty() || over {
                return Ok(Some(messages));
            }
            if permit.is_none() {
                permit = self.0.waiting.try_acquire().ok();
            }
            if permit.is_none() {
                return Ok(None);
            }
            let until = release.map_or(deadline, |release| release.min(deadline));
            tokio::select! {
                () = arrived => {}
                () = tokio::time::sleep_until(until) => {}
                () = self.0.stop.cancelled() => {}
            }
        }
    }

    /// What can be had now, and when more may be because a lease ends.
    async fn take(&self, max: usize) -> Result<(Vec<Pulled>, Option<Instant>)> {
        let take = |feed: &mut Feed| (feed.take(max), feed.next_release());
        let Some((made, (messages, release))) = self.0.change(take) else {
            return Ok((Vec::new(), None));
        };
        if messages.is_empty() {
            return Ok((Vec::new(), release));
        }
        failpoint::reach("pull::before_lease");
        match self.0.save().await {
            Ok(saved) if saved == Some(made) => {}
            Ok(_) => return Ok((Vec::new(), None)), // opened anew: nobody has them
            Err(error) => {
                let ids: Vec<Uuid> = messages.iter().map(|(id, _)| *id).collect();
                self.0.change(|feed| feed.nack(&ids));
                return Err(error);
            }
        }
        failpoint::reach("pull::after_lease");
        let pulled = |(ack_id, body)| Pulled { ack_id, body };
        Ok((messages.into_iter().map(pulled).collect(), release))
    }

    /// Is done with these messages for good. Unknown ids, and those that are done, are nothing new.
    pub async fn ack(&self, ids: &[Uuid]) -> Result<()> {
        self.settle(|feed| feed.ack(ids)).await
    }

    /// Gives these messages back: anybody may have them at once.
    pub async fn nack(&self, ids: &[Uuid]) -> Result<()> {
        self.settle(|feed| feed.nack(ids)).await
    }

    async fn settle(&self, what: impl Fn(&mut Feed)) -> Result<()> {
        loop {
            self.opened().await?;
            let made = self.0.change(&what).map(|(made, ())| made);
            failpoint::reach("pull::before_ack");
            // Opened anew meanwhile, it knows nothing of this.
            if made.is_some() && self.0.save().await? == made {
                break;
            }
        }
        failpoint::reach("pull::after_ack");
        self.0.arrived.notify_waiters();
        Ok(())
    }

    async fn opened(&self) -> Result<()> {
        let deadline = Instant::now() + OPENING;
        loop {
            let arrived = self.0.arrived.notified();
            if self.0.with(|_| ()).is_some() {
                return Ok(());
            }
            if tokio::time::timeout_at(deadline, arrived).await.is_err() {
                return Err(Error::retry(format!("sink {} is not open yet", self.0.name)));
            }
        }
    }
}
