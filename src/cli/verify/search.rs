//! Finds the rows of a table that look different: hashes of ranges of keys on both sides, cut into
//! smaller ones where they differ, down to single rows.
//!
//! Where both sides sort the key equally, a range is a stretch of its order, found by its index.
//! Else a range is a bucket of the key's own hash; then the table is read from end to end, in runs
//! of blocks, once for the buckets and once more for the rows of those that differ.

use std::collections::HashMap;

use super::{
    Setting,
    pair::{Blocks, Key, Pair, Range, Rows},
    side::Texts,
};
use crate::error::{Error, Result};

/// Rows of a range that is compared at once.
const RANGE_ROWS: u64 = 20_000;
/// Parts that a range is cut into.
const PARTS: u64 = 16;
/// Rows of a range whose rows are listed.
const LEAF_ROWS: u64 = 256;
/// Rows of buckets that are listed at once.
const LISTED_ROWS_MAX: u64 = 50_000;
/// Blocks that one statement reads.
const BLOCKS: u64 = 16_384;
/// Rows that a bucket is to have.
const BUCKET_ROWS: u64 = 64;
const BUCKET_BITS: std::ops::RangeInclusive<u32> = 10..=16;

/// What the search hands out, one after the other.
pub(super) enum Step {
    /// So many rows of the source are equal.
    Equal(u64),
    /// Keys whose rows look different, among so many rows of the source.
    Suspects(Vec<Key>, u64),
}

/// Count and sum of hashes.
type Sum = (u64, i128);

/// A search through one table.
pub(super) struct Search {
    state: State,
    /// Rows that came over the wire one by one, from both sides.
    pub(super) listed: u64,
}

enum State {
    Ordered {
        /// Ranges that differ, to be cut, with the larger count of either side.
        cut: Vec<(Range, u64)>,
        after: Option<Key>,
        ended: bool,
    },
    Buckets(Option<Buckets>),
}

/// Buckets that differ, and what is read to list their rows.
struct Buckets {
    bits: u32,
    blocks: [Vec<Blocks>; 2],
    /// With the larger count of either side, and that of the source.
    differing: Vec<(i64, u64, u64)>,
    /// Rows of the source in those that do not differ, until they are told.
    equal: Option<u64>,
}

impl Search {
    pub(super) fn new(pair: &Pair) -> Self {
        let state = match pair.is_ordered {
            true => State::Ordered { cut: Vec::new(), after: None, ended: false },
            false => State::Buckets(None),
        };
        Self { state, listed: 0 }
    }

    /// The next part of the table; `None` after the last.
    pub(super) async fn next(
        &mut self,
        setting: &Setting<'_>,
        pair: &Pair,
    ) -> Result<Option<Step>> {
        match &mut self.state {
            State::Ordered { cut, after, ended } => match cut.pop() {
                Some((range, count)) => self.divide(setting, pair, (range, count)).await.map(Some),
                None if *ended => Ok(None),
                None => {
                    let range = next_range(setting, pair, after.clone()).await?;
                    (*after, *ended) = (range.upto.clone(), range.upto.is_none());
                    self.compare(setting, pair, range).await.map(Some)
                }
            },
            State::Buckets(found) => {
                if found.is_none() {
                    *found = Some(Buckets::find(setting, pair).await?);
                }
                let Some(found) = found else { return Ok(None) };
                found.next(setting, pair, &mut self.listed).await
            }
        }
    }

    /// Hashes a range on both sides; where they differ it is kept, to be cut.
    async fn compare(&mut self, setting: &Setting<'_>, pair: &Pair, range: Range) -> Result<Step> {
        let [source, target] = sums(setting, pair, &range).await?;
        if source == target {
            return Ok(Step::Equal(source.0));
        }
        if let State::Ordered { cut, .. } = &mut self.state {
            cut.push((range, source.0.max(target.0)));
        }
        Ok(Step::Equal(0))
    }

    /// Lists the rows of a small range, and cuts a larger one.
    async fn divide(
        &mut self,
        setting: &Setting<'_>,
        pair: &Pair,
        (range, count): (Range, u64),
    ) -> Result<Step> {
        if count <= LEAF_ROWS {
            let [source, target] = both(setting, |rows| rows.list(&range), pair).await?;
            self.listed += (source.len() + target.len()) as u64;
            let rows = source.len() as u64;
            return Ok(Step::Suspects(unlike(source, target), rows));
        }
        let step = (count / PARTS).max(LEAF_ROWS);
        let [source, target] = both(setting, |rows| rows.split(&range, step), pair).await?;
        // The side with more rows is the one that has to be cut.
        let bounds = if source.len() >= target.len() { source } else { target };
        let mut equal = 0;
        let mut after = range.after.clone();
        let bounds = bounds.into_iter().map(|row| Some(key_of(row)));
        for upto in bounds.chain([range.upto.clone()]) {
            if upto.is_some() && upto == after {
                continue;
            }
            let part = Range { after: after.clone(), upto: upto.clone() };
            let [source, target] = sums(setting, pair, &part).await?;
            match source == target {
                true => equal += source.0,
                false => {
                    if let State::Ordered { cut, .. } = &mut self.state {
                        cut.push((part, source.0.max(target.0)));
                    }
                }
            }
            after = upto;
        }
        Ok(Step::Equal(equal))
    }
}

/// The range after `after` that has the wanted rows on the side that has more of them.
async fn next_range(setting: &Setting<'_>, pair: &Pair, after: Option<Key>) -> Result<Range> {
    let rest = Range { after: after.clone(), upto: None };
    let [source, target] = both(setting, |rows| rows.bound(&rest, RANGE_ROWS), pair).await?;
    let first = |rows: Texts| rows.into_iter().next().map(key_of);
    let upto = match (first(source), first(target)) {
        (Some(source), Some(target)) if source != target => {
            let sql = pair.source.is_before(&source, &target);
            let answer = setting.origin.query(sql).await?;
            let is_before = answer.into_iter().flatten().next().flatten();
            Some(if is_before.as_deref() == Some("t") { source } else { target })
        }
        (source, target) => source.or(target),
    };
    Ok(Range { after, upto })
}

async fn sums(setting: &Setting<'_>, pair: &Pair, range: &Range) -> Result<[Sum; 2]> {
    let [source, target] = both(setting, |rows| rows.hash(range), pair).await?;
    let sum = |rows: Texts| {
        let row = rows.into_iter().next().unwrap_or_default();
        sum_of(row.into_iter())
    };
    Ok([sum(source)?, sum(target)?])
}

/// Asks both sides at the same time.
async fn both(
    setting: &Setting<'_>,
    sql: impl Fn(&Rows) -> String,
    pair: &Pair,
) -> Result<[Texts; 2]> {
    let target = sql(&pair.target);
    let (source, target) =
        tokio::join!(setting.origin.query(sql(&pair.source)), setting.replica.query(&target));
    Ok([source?, target?])
}

impl Buckets {
    async fn find(setting: &Setting<'_>, pair: &Pair) -> Result<Self> {
        let [source, target] = both(setting, Rows::parts, pair).await?;
        let blocks = [runs(source)?, runs(target)?];
        let wanted = (pair.rows / BUCKET_ROWS).max(1).ilog2();
        let bits = wanted.clamp(*BUCKET_BITS.start(), *BUCKET_BITS.end());
        let [in_source, in_target] = &blocks;
        let (source, target) = tokio::join!(
            buckets_of(in_source, async |blocks: &Blocks| {
                setting.origin.query(pair.source.buckets(blocks, bits)).await
            }),
            buckets_of(in_target, async |blocks: &Blocks| {
                setting.replica.query(&pair.target.buckets(blocks, bits)).await
            }),
        );
        let (source, mut target) = (source?, target?);
        let (mut differing, mut equal) = (Vec::new(), 0);
        for (bucket, sum) in source {
            match target.remove(&bucket) {
                Some(other) if other == sum => equal += sum.0,
                other => {
                    let count = sum.0.max(other.unwrap_or_default().0);
                    differing.push((bucket, count, sum.0));
                }
            }
        }
        differing.extend(target.into_iter().map(|(bucket, sum)| (bucket, sum.0, 0)));
        Ok(Self { bits, blocks, differing, equal: Some(equal) })
    }

    async fn next(
        &mut self,
        setting: &Setting<'_>,
        pair: &Pair,
        listed: &mut u64,
    ) -> Result<Option<Step>> {
        if let Some(equal) = self.equal.take() {
            return Ok(Some(Step::Equal(equal)));
        }
        let (mut chosen, mut rows, mut of_source) = (Vec::new(), 0, 0);
        while let Some((bucket, count, source)) = self.differing.pop() {
            chosen.push(bucket);
            rows += count;
            of_source += source;
            if rows >= LISTED_ROWS_MAX {
                break;
            }
        }
        if chosen.is_empty() {
            return Ok(None);
        }
        let (mut source, mut target) = (Vec::new(), Vec::new());
        let [in_source, in_target] = &self.blocks;
        for blocks in in_source {
            let sql = pair.source.list_buckets(blocks, self.bits, &chosen);
            source.extend(setting.origin.query(sql).await?);
        }
        for blocks in in_target {
            let sql = pair.target.list_buckets(blocks, self.bits, &chosen);
            target.extend(setting.replica.query(&sql).await?);
        }
        *listed += (source.len() + target.len()) as u64;
        Ok(Some(Step::Suspects(unlike(source, target), of_source)))
    }
}

async fn buckets_of(
    blocks: &[Blocks],
    ask: impl AsyncFn(&Blocks) -> Result<Texts>,
) -> Result<HashMap<i64, Sum>> {
    let mut sums: HashMap<i64, Sum> = HashMap::new();
    for blocks in blocks {
        for row in ask(blocks).await? {
            let mut cells = row.into_iter();
            let bucket = cells.next().flatten().and_then(|text| text.parse().ok());
            let (count, sum) = sum_of(cells)?;
            let known = sums.entry(bucket.ok_or_else(unreadable)?).or_default();
            *known = (known.0 + count, known.1 + sum);
        }
    }
    Ok(sums)
}

/// Runs of blocks that cover the tables, with what is added to their ends meanwhile.
fn runs(parts: Texts) -> Result<Vec<Blocks>> {
    let mut runs = Vec::new();
    for row in parts {
        let mut cells = row.into_iter();
        let table = cells.next().flatten().ok_or_else(unreadable)?;
        let blocks: Option<u64> = cells.next().flatten().and_then(|text| text.parse().ok());
        let blocks = blocks.ok_or_else(unreadable)?;
        let mut first = 0;
        while first + BLOCKS < blocks {
            let end = first + BLOCKS;
            runs.push(Blocks { table: table.clone(), first, end: Some(end) });
            first = end;
        }
        runs.push(Blocks { table, first, end: None });
    }
    Ok(runs)
}

fn sum_of(mut cells: impl Iterator<Item = Option<String>>) -> Result<Sum> {
    let count = cells.next().flatten().and_then(|text| text.parse().ok());
    let sum = cells.next().flatten().and_then(|text| text.parse().ok());
    count.zip(sum).ok_or_else(unreadable)
}

fn unreadable() -> Error {
    Error::bug("a hash of rows is no number")
}

fn key_of(row: Vec<Option<String>>) -> Key {
    row.into_iter().map(Option::unwrap_or_default).collect()
}

/// The keys of rows that are not on both sides with the same hash.
fn unlike(source: Texts, target: Texts) -> Vec<Key> {
    let keyed = |mut row: Vec<Option<String>>| {
        let hash = row.pop().flatten();
        (key_of(row), hash)
    };
    let mut copies: HashMap<Key, Option<String>> = target.into_iter().map(keyed).collect();
    let mut found = Vec::new();
    for (key, hash) in source.into_iter().map(keyed) {
        if copies.remove(&key) != Some(hash) {
            found.push(key);
        }
    }
    found.extend(copies.into_keys());
    found.sort();
    found.dedup();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(rows: &[(&str, &str)]) -> Texts {
        rows.iter().map(|(key, hash)| vec![Some((*key).into()), Some((*hash).into())]).collect()
    }

    #[test]
    fn missing_extra_and_changed_rows_are_unlike() {
        let source = rows(&[("1", "a"), ("2", "b"), ("3", "c")]);
        let target = rows(&[("2", "b"), ("3", "x"), ("4", "d")]);
        assert_eq!(unlike(source, target), [["1"], ["3"], ["4"]]);
    }

    #[test]
    fn runs_of_blocks_meet_and_the_last_is_open() {
        let parts = vec![vec![Some("t".into()), Some((BLOCKS * 2 + 5).to_string())]];
        let runs = runs(parts).unwrap();
        assert_eq!(runs.len(), 3);
        assert_eq!(runs[0].end, Some(runs[1].first));
        assert_eq!(runs[1].end, Some(runs[2].first));
        assert_eq!(runs[2].end, None);
    }
}
