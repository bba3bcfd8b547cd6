//! Which segment may be removed: a pure decision.

use std::collections::VecDeque;

use super::{Retention, store::Segment};

/// The oldest segment, where it may go: every change of it lies below `keep_from`, it is sealed and
/// older than the last commit's (`commit_base`), and it is old enough or the journal too large.
pub(super) fn oldest_to_remove(
    segments: &VecDeque<Segment>,
    retention: &Retention,
    commit_base: u64,
) -> Option<Segment> {
    let (oldest, next) = (segments.front()?, segments.get(1)?);
    let bytes: u64 = segments.iter().map(|segment| segment.bytes).sum();
    let old = oldest.summary.times.append_max < retention.appended_before;
    let large = retention.bytes_max > 0 && bytes > retention.bytes_max;
    let free = next.base <= retention.keep_from && oldest.base < commit_base;
    (free && (old || large)).then(|| oldest.clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        change::Timestamp,
        journal::{block::Times, segment::Summary},
    };

    fn segments() -> VecDeque<Segment> {
        let segment = |base: u64| {
            let append_max = Timestamp(i64::try_from(base).unwrap());
            let times = Times { append_max, ..Times::NONE };
            let summary = Summary { times, gaps: false };
            Segment { path: base.to_string().into(), base, bytes: 100, summary }
        };
        [10, 20, 30].map(segment).into()
    }

    #[track_caller]
    fn check(keep_from: u64, appended_before: i64, bytes_max: u64, removed: bool) {
        let appended_before = Timestamp(appended_before);
        let retention = Retention { keep_from, appended_before, bytes_max };
        assert_eq!(oldest_to_remove(&segments(), &retention, 30).is_some(), removed);
    }

    #[test]
    fn a_segment_goes_when_nobody_needs_it_and_it_is_old_or_the_journal_large() {
        check(20, 11, 0, true);
        check(19, 11, 0, false);
        check(20, 10, 0, false);
        check(20, 0, 299, true);
        check(20, 0, 300, false);
        check(19, 0, 1, false);
    }

    #[test]
    fn the_segment_of_the_last_commit_stays() {
        let retention = Retention { keep_from: 99, appended_before: Timestamp(99), bytes_max: 0 };
        assert!(oldest_to_remove(&segments(), &retention, 10).is_none());
    }
}
