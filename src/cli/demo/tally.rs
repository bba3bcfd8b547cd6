//! What is counted while the demo runs: by the load, by those who receive, by the clock.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

/// What the server said that it has committed, or rolled back. The load writes, the screen reads.
#[derive(Debug, Default)]
pub(super) struct Counts {
    /// Changes of transactions whose commit the server has acknowledged.
    pub(super) changes: AtomicU64,
    /// Those transactions.
    pub(super) transactions: AtomicU64,
    /// Changes of the first transaction, which fills the tables and is no part of the load.
    pub(super) filling: AtomicU64,
    /// Transactions that were rolled back.
    pub(super) rollbacks: AtomicU64,
    /// Savepoints that a committed transaction went back to.
    pub(super) savepoints: AtomicU64,
}

impl Counts {
    /// One more transaction is committed, with so many changes; one without any is not seen.
    pub(super) fn commit(&self, changes: u64) {
        self.changes.fetch_add(changes, Relaxed);
        self.transactions.fetch_add(u64::from(changes > 0), Relaxed);
    }

    /// The changes committed so far.
    pub(super) fn committed(&self) -> u64 {
        self.changes.load(Relaxed)
    }
}

/// Bits that a latency keeps: buckets are at most 1/64 of their value wide.
const PRECISION: u32 = 7;
const HALF: usize = 1 << (PRECISION - 1);

/// The distribution of latencies, in constant memory: within 1.6 % of the true percentiles.
#[derive(Clone, Debug, Default)]
pub(super) struct Latencies {
    buckets: Vec<u64>,
    count: u64,
    max: u64,
}

impl Latencies {
    /// Adds one, in microseconds; a clock that was set back counts as none.
    pub(super) fn add(&mut self, microseconds: i64) {
        let value = u64::try_from(microseconds).unwrap_or(0);
        let bucket = bucket_of(value);
        if bucket >= self.buckets.len() {
            self.buckets.resize(bucket + 1, 0);
        }
        if let Some(count) = self.buckets.get_mut(bucket) {
            *count += 1;
        }
        self.count += 1;
        self.max = self.max.max(value);
    }

    /// The latency that so many of a thousand stay within; zero where there is none.
    pub(super) fn per_mille(&self, share: u64) -> Duration {
        let rank = (self.count * share).div_ceil(1000).max(1);
        let mut seen = 0;
        for (bucket, count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return Duration::from_micros(last_of(bucket).min(self.max));
            }
        }
        Duration::ZERO
    }

    /// The longest.
    pub(super) fn max(&self) -> Duration {
        Duration::from_micros(self.max)
    }

    /// Begins anew, and keeps the memory.
    pub(super) fn clear(&mut self) {
        self.buckets.fill(0);
        self.count = 0;
        self.max = 0;
    }
}

fn bucket_of(value: u64) -> usize {
    let bits = u64::BITS - value.leading_zeros();
    let shift = bits.saturating_sub(PRECISION);
    // At most 7 bits are left, so it fits whatever a usize is.
    let mantissa = usize::try_from(value >> shift).unwrap_or(usize::MAX);
    shift as usize * HALF + mantissa
}

/// The largest value of a bucket.
fn last_of(bucket: usize) -> u64 {
    let shift = (bucket / HALF).saturating_sub(1);
    let mantissa = (bucket - shift * HALF) as u64;
    (((u128::from(mantissa) + 1) << shift) - 1).try_into().unwrap_or(u64::MAX)
}

/// How often something happened in the last interval.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Rate {
    last: u64,
}

impl Rate {
    /// Per second since the last call, from a count that only grows.
    pub(super) fn of(&mut self, total: u64, interval: Duration) -> u64 {
        let new = total.saturating_sub(self.last);
        self.last = total;
        per_second(new, interval)
    }
}

/// Rounded to a whole number.
pub(super) fn per_second(count: u64, interval: Duration) -> u64 {
    let microseconds = interval.as_micros().max(1);
    let rounded = (u128::from(count) * 1_000_000 + microseconds / 2) / microseconds;
    u64::try_from(rounded).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn percentiles_of_a_thousand_latencies_are_where_they_should_be() {
        let mut latencies = Latencies::default();
        for value in (1..=1000).rev() {
            latencies.add(value * 100);
        }
        let within = |share: u64, expected: u128| {
            let found = latencies.per_mille(share).as_micros();
            assert!((expected..=expected + expected / 60).contains(&found), "{share}: {found}");
        };
        within(500, 50_000);
        within(990, 99_000);
        assert_eq!(latencies.per_mille(1000), Duration::from_millis(100));
        assert_eq!(latencies.max(), Duration::from_millis(100));
    }

    #[test]
    fn one_outlier_in_two_hundred_is_not_in_the_p99_but_in_the_max() {
        let mut latencies = Latencies::default();
        (0..199).for_each(|_| latencies.add(10));
        latencies.add(5_000_000);
        assert_eq!(latencies.per_mille(990), Duration::from_micros(10));
        assert_eq!(latencies.max(), Duration::from_secs(5));
        latencies.clear();
        assert_eq!(latencies.per_mille(990), Duration::ZERO);
    }

    #[test]
    fn a_clock_that_was_set_back_counts_as_no_time() {
        let mut latencies = Latencies::default();
        latencies.add(-3);
        assert_eq!((latencies.count, latencies.max()), (1, Duration::ZERO));
    }

    #[test]
    fn a_rate_counts_what_is_new_since_the_last_look() {
        let mut rate = Rate::default();
        assert_eq!(rate.of(500, Duration::from_secs(1)), 500);
        assert_eq!(rate.of(800, Duration::from_millis(500)), 600);
        assert_eq!(rate.of(800, Duration::from_secs(1)), 0);
        assert_eq!(per_second(1, Duration::ZERO), 1_000_000);
    }

    proptest! {
        #[test]
        fn a_bucket_ends_at_most_a_64th_above_each_of_its_values(value: u64) {
            let last = last_of(bucket_of(value));
            prop_assert!(last >= value);
            prop_assert!(last - value <= value / 64);
        }
    }
}
