//! What the journals may forget, and the written order when the disk is short.
//!
//! Normally a segment goes once every sink has it and it is older than `journal.age_ms_max`. When a
//! journal would outgrow `journal.bytes_max` (DESIGN section 6): alarm; release the sink farthest
//! behind unless it is `retain = "always"`; only then capture pauses, by the journal's refusal to
//! append. The slot is safe all the while: nothing is confirmed that is not in the journal.

use std::{sync::Arc, time::Duration};

use tracing::{error, info, warn};

use super::{Walrace, capturing::Capturing, delivering::Delivering};
use crate::{
    change::Timestamp,
    config::{self, Retain},
    error::Result,
    journal::Retention,
};

const EVERY: Duration = Duration::from_secs(2);

/// Trims every journal now and then, until the stop.
pub(super) async fn keep(walrace: &Walrace, limits: &config::Journal) {
    loop {
        tokio::select! {
            () = walrace.stopping().cancelled() => return,
            () = tokio::time::sleep(EVERY) => {}
        }
        for source in walrace.sources.values() {
            let sinks: Vec<_> =
                walrace.sinks.values().filter(|sink| sink.source() == source.name()).collect();
            if let Err(error) = trim(source, &sinks, limits).await {
                warn!("cannot trim the journal of source {}: {error}", source.name());
            }
        }
    }
}

async fn trim(
    source: &Capturing,
    sinks: &[&Arc<Delivering>],
    limits: &config::Journal,
) -> Result<()> {
    let age = i64::try_from(limits.age_ms_max).unwrap_or(i64::MAX).saturating_mul(1000);
    let keep_from = sinks.iter().map(|sink| sink.needs()).min().unwrap_or(u64::MAX);
    let retention = Retention {
        keep_from,
        appended_before: Timestamp(Timestamp::now().0.saturating_sub(age)),
        bytes_max: limits.bytes_max,
    };
    let freed = source.journal.trim(retention).await?;
    if freed > 0 {
        info!("the journal of source {} freed {freed} bytes", source.name());
    }
    let info = source.journal.info();
    // What every sink has and still cannot go is in the segment that is being written: only more
    // changes seal it, so to pause for its sake would be to pause for ever.
    let held = keep_from < info.end;
    if limits.bytes_max == 0 || info.bytes <= limits.bytes_max || !held {
        source.pause(None);
        return Ok(());
    }
    let to = source.journal.second_segment_start();
    let release = farthest_behind(sinks).zip(to).filter(|(sink, to)| *to > sink.needs());
    let Some((release, to)) = release else {
        let reason = format!(
            "the journal takes {} bytes, journal.bytes_max is {}, and no sink may be released",
            info.bytes, limits.bytes_max
        );
        if source.pause(Some(reason.clone())) {
            error!("capture of source {} is paused: {reason}", source.name());
        }
        return Ok(());
    };
    let reason = format!("the journal reached bytes_max = {}", limits.bytes_max);
    release.release(to, &reason).await
}

/// The sink that holds the most, if it may be released.
fn farthest_behind<'a>(sinks: &[&'a Arc<Delivering>]) -> Option<&'a Arc<Delivering>> {
    let farthest = sinks.iter().min_by_key(|sink| sink.needs())?;
    (farthest.retain() == Retain::Bounded).then_some(*farthest)
}
