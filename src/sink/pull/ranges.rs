//! Ranges of offsets that are done.

use std::collections::BTreeMap;

/// Disjoint ranges, each from an offset to the one after its last.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    pub(super) fn contains(&self, offset: u64) -> bool {
        self.0.range(..=offset).next_back().is_some_and(|(_, to)| offset < *to)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// From an offset to the one after the last, in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, u64)> {
        self.0.iter().map(|(from, to)| (*from, *to))
    }

    /// Adds a range; the one that it became with those that it touches.
    pub(super) fn insert(&mut self, from: u64, to: u64) -> (u64, u64) {
        let (mut from, mut to) = (from, to);
        if let Some((&start, &end)) = self.0.range(..=from).next_back()
            && end >= from
        {
            (from, to) = (start, to.max(end));
        }
        while let Some((&start, &end)) = self.0.range(from..=to).next() {
            self.0.remove(&start);
            to = to.max(end);
        }
        self.0.insert(from, to);
        (from, to)
    }

    /// Drops the ranges that end at `low` or before.
    pub(super) fn forget(&mut self, low: u64) {
        while let Some(first) = self.0.first_entry().filter(|first| *first.get() <= low) {
            first.remove();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn ranges_hold_exactly_what_was_put_in(
            pairs in prop::collection::vec((0u64..60, 1u64..8), 0..30), low in 0u64..70,
        ) {
            let mut ranges = Ranges::default();
            let mut set = std::collections::BTreeSet::new();
            for (from, length) in pairs {
                let (start, end) = ranges.insert(from, from + length);
                set.extend(from..from + length);
                prop_assert!((start..end).all(|offset| set.contains(&offset)));
            }
            for offset in 0..70 {
                prop_assert_eq!(ranges.contains(offset), set.contains(&offset));
            }
            let ends: Vec<_> = ranges.0.iter().collect();
            prop_assert!(ends.windows(2).all(|pair| pair[0].1 < pair[1].0), "{:?}", ends);
            ranges.forget(low);
            for offset in low..70 {
                prop_assert_eq!(ranges.contains(offset), set.contains(&offset));
            }
        }
    }
}
