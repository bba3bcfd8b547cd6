//! What a target tells later of changes that it took: they leave the lot, or enter it.

use std::collections::BTreeMap;

use super::delivery::Delivery;
use crate::{
    change::Change,
    error::{Error, Result},
    failpoint,
    journal::{Journal, Limits},
    parking::Why,
    sink::Verdict,
};

/// Changes of the journal between two that are wanted, up to which reading on is cheaper than
/// looking for the place.
const READ_ON: u64 = 1000;

impl Delivery<'_> {
    /// Parks what the target gives back, and lets go of what it has for good. Durable in the lot
    /// before the target follows: a crash between the two has the target give the verdict again.
    pub(super) async fn hear(&mut self) -> Result<()> {
        if !self.sink.capabilities().answers_later {
            return Ok(());
        }
        let told = self.sink.verdicts(self.lot.is_holding()).await?;
        if told.is_empty() {
            return Ok(());
        }
        let (durable, others): (Vec<_>, Vec<_>) =
            told.iter().cloned().partition(|(_, verdict)| *verdict == Verdict::Durable);
        let durable: Vec<u64> = durable.into_iter().map(|(offset, _)| offset).collect();
        self.stats.redelivered(durable.len());
        self.lot.delivered(&durable).await?;
        let new = others.iter().map(|(offset, _)| *offset);
        let new: Vec<u64> = new.filter(|offset| !self.lot.contains(*offset)).collect();
        let bytes_max = self.cut.limits.bytes_max;
        let mut changes = changes_at(&self.journal, &new, bytes_max).await?;
        for (offset, verdict) in others {
            match changes.remove(&offset) {
                Some(change) => self.park_given_back(change, verdict)?,
                None => self.take_back(offset, verdict).await?,
            }
        }
        failpoint::reach("deliver::before_park");
        self.lot.save().await?;
        failpoint::reach("deliver::after_park");
        self.sink.settle(&told).await?;
        self.show_lot();
        Ok(())
    }

    fn park_given_back(&mut self, change: Change, verdict: Verdict) -> Result<()> {
        let keys = self.transform.keys_despite(&change);
        match verdict {
            Verdict::Durable => Ok(()),
            Verdict::Behind => self.lot.park(change, keys, Why::Behind),
            Verdict::SetAside => {
                self.lot.park(change, keys, Why::SetAside(self.progress.retry_seq))
            }
            Verdict::GivenUp { attempts, why, next } => {
                self.lot.park(change, keys.clone(), Why::GivenUp(attempts, why))?;
                self.stats.park();
                if let Some(next) = next {
                    self.lot.passes(&keys, next);
                }
                Ok(())
            }
        }
    }

    /// One that was parked before, and that the target had for another attempt.
    async fn take_back(&mut self, offset: u64, verdict: Verdict) -> Result<()> {
        match verdict {
            Verdict::Durable | Verdict::SetAside => Ok(()),
            Verdict::Behind => self.lot.recall(offset).await,
            Verdict::GivenUp { attempts, why, .. } => {
                self.stats.park();
                self.lot.refused(offset, Why::GivenUp(attempts, why));
                Ok(())
            }
        }
    }
}

/// The changes at these offsets, which are in order, as the journal has them.
async fn changes_at(
    journal: &Journal,
    offsets: &[u64],
    bytes_max: usize,
) -> Result<BTreeMap<u64, Change>> {
    let mut found = BTreeMap::new();
    let Some(first) = offsets.first() else { return Ok(found) };
    let mut reader = journal.reader(*first)?;
    for &offset in offsets {
        if offset > reader.offset() + READ_ON {
            reader = journal.reader(offset)?;
        }
        while reader.offset() <= offset {
            let ahead = usize::try_from(offset - reader.offset()).unwrap_or(0);
            let batch = reader.try_next(Limits { changes_max: ahead + 1, bytes_max }).await?;
            if batch.changes.is_empty() {
                break;
            }
            let wanted = |change: &Change| offsets.binary_search(&change.offset).is_ok();
            let changes = batch.changes.into_iter().filter(wanted);
            found.extend(changes.map(|change| (change.offset, change)));
        }
        if !found.contains_key(&offset) {
            return Err(Error::damaged(format!(
                "a sink gives back offset {offset}, which the journal does not hold"
            )));
        }
    }
    Ok(found)
}
