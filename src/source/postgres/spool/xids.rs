//! A set of transaction ids that stays small: rolled-back subtransactions come by the million, from
//! loops with an exception handler, and their ids lie close together.

use std::collections::HashMap;

/// Ids of one chunk.
const CHUNK_BITS: u32 = 512;

/// The set: a bitmap for each chunk that has a member.
#[derive(Debug, Default)]
pub(super) struct Xids(HashMap<u32, [u64; 8]>);

impl Xids {
    /// Adds `xid`.
    pub(super) fn insert(&mut self, xid: u32) {
        let (word, bit) = place(xid);
        if let Some(word) = self.0.entry(xid / CHUNK_BITS).or_default().get_mut(word) {
            *word |= bit;
        }
    }

    /// Whether `xid` was added.
    pub(super) fn contains(&self, xid: u32) -> bool {
        let (word, bit) = place(xid);
        let chunk = self.0.get(&(xid / CHUNK_BITS));
        chunk.and_then(|words| words.get(word)).is_some_and(|word| word & bit != 0)
    }
}

fn place(xid: u32) -> (usize, u64) {
    let within = xid % CHUNK_BITS;
    ((within / u64::BITS) as usize, 1 << (within % u64::BITS))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_holds_what_was_added_and_nothing_else(
            added in prop::collection::hash_set(prop_oneof![0u32..2_000, any::<u32>()], 0..200),
            asked in prop::collection::vec(prop_oneof![0u32..2_000, any::<u32>()], 0..200),
        ) {
            let mut xids = Xids::default();
            let model: HashSet<u32> = added.iter().copied().collect();
            added.iter().for_each(|xid| xids.insert(*xid));
            for xid in asked.iter().chain(&added) {
                prop_assert_eq!(xids.contains(*xid), model.contains(xid));
            }
        }
    }

    #[test]
    fn a_million_neighbours_take_little() {
        let mut xids = Xids::default();
        (7..1_000_007).for_each(|xid| xids.insert(xid));
        assert!(xids.0.len() <= 1_955, "{} chunks", xids.0.len());
    }
}
