//! What the journals may forget, and the written order when the disk is short.
//!
//! Normally a segment goes once every sink has it and it is older than `journal.age_ms_max`. When
//! disk is short (DESIGN section 6): alarm; what every sink has goes although it is young; at
//! `journal.bytes_max` the sinks that hold the oldest segment are released, unless one of them is
//! `retain = "always"`; only then capture pauses. Below the reserve the journal refuses by itself.
//! A sink that is at work and only behind for a moment is not released for that: capture waits for
//! it, for as long as it moves and not longer than `CATCH_UP`.
//! The slot is safe all the while: nothing is confirmed that is not in the journal.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;
use tracing::{info, warn};

use super::{
    Walrace,
    capturing::{Capturing, Pause},
    delivering::Delivering,
};
use crate::{
    change::Timestamp,
    config::{self, Retain},
    error::{Class, Classify, Result},
    journal::Retention,
};

/// Old segments are looked for this often.
const TRIM_EVERY: Duration = Duration::from_secs(2);

/// Limits are looked at this often; a journal may outgrow its own by what comes in between.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// An alarm sounds at this part of a limit, in percent, and again once it was below `CALM`.
const ALARM: u64 = 80;
const CALM: u64 = 70;

/// For so long capture waits for sinks that catch up, at one time.
const CATCH_UP: Duration = Duration::from_secs(60);

/// A sink that has not moved for so long does not catch up.
const STILL: Duration = Duration::from_secs(2);

/// However often a level rises and falls, its alarm is quiet for so long.
const QUIET: Duration = Duration::from_secs(60);

/// Looks after every journal until the stop.
pub(super) async fn keep(walrace: &Walrace, limits: &config::Journal) {
    let of = |source| Keeper::new(walrace, source, limits);
    let mut keepers: Vec<_> = walrace.sources.values().map(of).collect();
    let mut trimmed: Option<Instant> = None;
    loop {
        let due = trimmed.is_none_or(|at| at.elapsed() >= TRIM_EVERY);
        if due {
            trimmed = Some(Instant::now());
        }
        for keeper in &mut keepers {
            keeper.look(due).await;
        }
        tokio::select! {
            () = walrace.stopping().cancelled() => return,
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
    }
}

/// Looks after one journal.
struct Keeper<'a> {
    source: &'a Arc<Capturing>,
    sinks: Vec<&'a Arc<Delivering>>,
    limits: &'a config::Journal,
    size: Alarm,
    volume: Alarm,
    /// Since when capture waits for sinks that catch up.
    catching_up: Option<Instant>,
    /// The last look failed: what it wanted waits for the next regular one.
    failed: bool,
}

impl<'a> Keeper<'a> {
    fn new(walrace: &'a Walrace, source: &'a Arc<Capturing>, limits: &'a config::Journal) -> Self {
        let reads = |sink: &&Arc<Delivering>| sink.source() == source.name();
        let sinks = walrace.sinks.values().filter(reads).collect();
        let (size, volume) = (Alarm::default(), Alarm::default());
        Self { source, sinks, limits, size, volume, catching_up: None, failed: false }
    }

    async fn look(&mut self, due: bool) {
        if !due && self.failed {
            return;
        }
        let kept = self.keep(due).await;
        self.failed = kept.is_err();
        if let Err(error) = kept {
            warn!("cannot trim the journal of source {}: {error}", self.source.name());
        }
    }

    async fn keep(&mut self, due: bool) -> Result<()> {
        if due {
            self.trim(self.limits.bytes_max).await?;
            self.watch_size().await?;
        }
        self.spare_volume().await?;
        self.shrink().await
    }

    /// Removes what no sink needs, where it is old or the journal takes more than `bytes_max`.
    async fn trim(&self, bytes_max: u64) -> Result<u64> {
        let age = i64::try_from(self.limits.age_ms_max).unwrap_or(i64::MAX).saturating_mul(1000);
        let keep_from = self.sinks.iter().map(|sink| sink.needs()).min().unwrap_or(u64::MAX);
        let appended_before = Timestamp(Timestamp::now().0.saturating_sub(age));
        let retention = Retention { keep_from, appended_before, bytes_max };
        let freed = self.source.journal.trim(retention).await?;
        if freed > 0 {
            info!("the journal of source {} freed {freed} bytes", self.source.name());
        }
        Ok(freed)
    }

    /// Gives history away rather than to let capture pause, and sounds the alarm before the reserve
    /// is reached.
    async fn spare_volume(&mut self) -> Result<()> {
        let (name, reserve) = (self.source.name(), self.limits.reserve_bytes);
        let mut free = self.free_bytes().await?;
        let short = percent(reserve, free) >= ALARM;
        while short && percent(reserve, free) >= CALM {
            let bytes = self.source.journal.info().bytes;
            if self.trim(bytes.saturating_sub(1).max(1)).await? == 0 {
                self.hurry();
                break;
            }
            free = self.free_bytes().await?;
        }
        if self.volume.sounds((reserve, free), Instant::now()) {
            warn!(
                "the volume of the journal of source {name} has {free} bytes left, and there is no \
                 history to give away; capture pauses below journal.reserve_bytes = {reserve}"
            );
        }
        Ok(())
    }

    async fn free_bytes(&self) -> Result<u64> {
        let journal = self.source.journal.clone();
        let free = tokio::task::spawn_blocking(move || journal.free_bytes()).await;
        let free = free.class(Class::Bug, || "a look at a volume panicked")??;
        self.source.see_free(free);
        Ok(free)
    }

    /// Sounds the alarm before a sink is released. What no sink needs does not count: it goes.
    async fn watch_size(&mut self) -> Result<()> {
        let max = self.limits.bytes_max;
        let Some(sink) = self.sinks.iter().min_by_key(|sink| sink.needs()).filter(|_| max > 0)
        else {
            return Ok(());
        };
        let (journal, needs) = (self.source.journal.clone(), sink.needs());
        let lag = tokio::task::spawn_blocking(move || journal.lag(needs)).await;
        let lag = lag.class(Class::Bug, || "a look at a journal panicked")??;
        let bytes = lag.map_or(0, |lag| lag.bytes);
        if self.size.sounds((bytes, max), Instant::now()) {
            warn!(
                "sink {} holds {bytes} bytes of the journal of source {}; the limit is {max}",
                sink.name(),
                self.source.name()
            );
        }
        Ok(())
    }

    /// The size of the journal where it is beyond its limit.
    fn over_limit(&self) -> Option<u64> {
        let bytes = self.source.journal.info().bytes;
        (self.limits.bytes_max > 0 && bytes > self.limits.bytes_max).then_some(bytes)
    }

    /// Brings the journal below its limit at the cost of the sinks, or pauses capture.
    async fn shrink(&mut self) -> Result<()> {
        while let Some(bytes) = self.over_limit() {
            let journal = &self.source.journal;
            // A transaction that is larger than the limit is kept whole: the reserve bounds it.
            let to = journal.second_segment_start().filter(|to| *to <= journal.end());
            let Some(to) = to else { break };
            let holders: Vec<_> = self.sinks.iter().filter(|sink| sink.lacks(to)).collect();
            if let Some(kept) = holders.iter().find(|sink| sink.retain() == Retain::Always) {
                self.source.pause(Some(self.no_release(bytes, kept.name())));
                return Ok(());
            }
            let at_work = holders.iter().all(|sink| sink.moved_within(STILL));
            let since = *self.catching_up.get_or_insert_with(Instant::now);
            if let Some(slow) = holders.first().filter(|_| at_work && since.elapsed() < CATCH_UP) {
                self.source.pause(Some(self.waits_for(bytes, slow.name())));
                return Ok(());
            }
            for sink in &holders {
                let reason = format!("the journal reached bytes_max = {}", self.limits.bytes_max);
                sink.release(to, &reason).await?;
            }
            if self.trim(self.limits.bytes_max).await? == 0 {
                self.hurry();
                break;
            }
        }
        self.source.pause(None);
        if self.over_limit().is_none() {
            self.catching_up = None;
        }
        Ok(())
    }

    /// What every sink has and cannot go waits for one to write down that it has it.
    fn hurry(&self) {
        for sink in &self.sinks {
            sink.hurry();
        }
    }

    fn waits_for(&self, bytes: u64, sink: &str) -> Pause {
        let max = self.limits.bytes_max;
        Pause {
            reason: format!(
                "the journal takes {bytes} bytes, journal.bytes_max is {max}, and capture waits \
                 for sink {sink}, which is at work and catches up"
            ),
            remedy: "capture goes on by itself; raise journal.bytes_max if it happens often".into(),
        }
    }

    fn no_release(&self, bytes: u64, sink: &str) -> Pause {
        let max = self.limits.bytes_max;
        Pause {
            reason: format!(
                "the journal takes {bytes} bytes, journal.bytes_max is {max}, and sink {sink}, \
                 which has not read them, is never released (retain = \"always\")"
            ),
            remedy: format!(
                "bring the target of sink {sink} back, or raise journal.bytes_max; capture goes on \
                 by itself"
            ),
        }
    }
}

/// Sounds once each time that a level rises to [`ALARM`].
#[derive(Debug, Default)]
struct Alarm {
    raised: bool,
    sounded: Option<Instant>,
}

impl Alarm {
    fn sounds(&mut self, (level, limit): (u64, u64), now: Instant) -> bool {
        let percent = percent(level, limit);
        let rises = percent >= ALARM && !self.raised;
        self.raised = percent >= CALM && (self.raised || rises);
        let quiet = self.sounded.is_some_and(|at| now < at + QUIET);
        if !rises || quiet {
            return false;
        }
        self.sounded = Some(now);
        true
    }
}

fn percent(level: u64, limit: u64) -> u64 {
    if level == 0 { 0 } else { level.saturating_mul(100) / limit.max(1) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_alarm_sounds_once_for_each_crossing_and_not_twice_a_minute() {
        let mut alarm = Alarm::default();
        let begin = Instant::now();
        let levels = [0, 79, 80, 99, 75, 85, 69, 75, 81, 69, 120, 69, 82];
        let heard = |(index, level): &(usize, u64)| {
            alarm.sounds((*level, 100), begin + Duration::from_secs(10 * *index as u64))
        };
        let heard: Vec<_> = levels.into_iter().enumerate().filter(heard).collect();
        assert_eq!(heard, [(2, 80), (8, 81)]);
    }

    #[test]
    fn the_reserve_alarms_while_a_quarter_more_than_it_is_left() {
        let now = Instant::now();
        let mut alarm = Alarm::default();
        assert!(!alarm.sounds((100, 126), now), "126 bytes free, 100 reserved");
        assert!(alarm.sounds((100, 125), now));
        assert!(!Alarm::default().sounds((0, 0), now), "without a reserve there is no alarm");
        assert!(Alarm::default().sounds((100, 0), now));
    }
}
