//! When the journal grew, so that a sink's lag can be told in seconds.

use std::sync::{Mutex, PoisonError};

use crate::change::Timestamp;

/// Samples kept at most; when they are full, every other one goes.
const SAMPLES_MAX: usize = 4096;

/// The journal's end at past moments, by our own clock.
#[derive(Debug, Default)]
pub(super) struct Pulse(Mutex<Vec<(Timestamp, u64)>>);

impl Pulse {
    /// Remembers that the journal ends at `end` now.
    pub(super) fn note(&self, now: Timestamp, end: u64) {
        let mut samples = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if samples.last().is_some_and(|(_, last)| *last == end) && samples.len() > 1 {
            // Nothing came: the last sample moves on, so that what comes next is not thought old.
            if let Some(last) = samples.last_mut() {
                last.0 = now;
            }
            return;
        }
        if samples.len() >= SAMPLES_MAX {
            let mut odd = false;
            samples.retain(|_| {
                odd = !odd;
                odd
            });
        }
        samples.push((now, end));
    }

    /// How long ago the change at `offset` was appended, in milliseconds: at least, where it was
    /// before the first sample.
    pub(super) fn age_ms(&self, now: Timestamp, offset: u64) -> u64 {
        let samples = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let first = samples.partition_point(|(_, end)| *end <= offset);
        // It came between the sample before and this one; the earlier moment is the safer answer.
        let at = samples.get(first.saturating_sub(1)).map_or(now, |(at, _)| *at);
        u64::try_from(now.0 - at.0).unwrap_or(0) / 1000
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn second(second: i64) -> Timestamp {
        Timestamp(second * 1_000_000)
    }

    #[test]
    fn the_age_of_a_change_is_counted_from_the_sample_before_it() {
        let pulse = Pulse::default();
        for (at, end) in [(0, 0), (1, 10), (2, 10), (3, 10), (4, 50)] {
            pulse.note(second(at), end);
        }
        let now = second(10);
        assert_eq!(pulse.age_ms(now, 5), 10_000);
        assert_eq!(pulse.age_ms(now, 10), 7_000, "it came after the third second");
        assert_eq!(pulse.age_ms(now, 49), 7_000);
        assert_eq!(pulse.age_ms(now, 50), 6_000, "not seen yet: since the last sample");
    }

    #[test]
    fn samples_are_bounded() {
        let pulse = Pulse::default();
        for at in 0..20_000 {
            pulse.note(second(at), at as u64);
        }
        assert!(pulse.0.lock().unwrap().len() <= SAMPLES_MAX);
        assert!(pulse.age_ms(second(20_000), 10_000).abs_diff(10_000_000) < 20_000);
    }
}
