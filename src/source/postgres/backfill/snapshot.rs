//! Which transactions a chunk has seen: `pg_current_snapshot()`
//! (<https://www.postgresql.org/docs/current/functions-info.html#FUNCTIONS-INFO-SNAPSHOT>).

use std::{collections::BTreeSet, str::FromStr};

use crate::error::{Error, Result};

/// A snapshot: all below `end` is seen but for the ones that were in progress.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    end: u64,
    in_progress: BTreeSet<u32>,
}

impl Snapshot {
    /// Whether it shows what the transaction did. The stream counts transactions in 32 bits, so
    /// the one that is meant is the one nearest to the snapshot.
    pub fn sees(&self, xid: u32) -> bool {
        #[expect(clippy::cast_possible_truncation, reason = "the low half is what the stream has")]
        let ahead = xid.wrapping_sub(self.end as u32).cast_signed() >= 0;
        !ahead && !self.in_progress.contains(&xid)
    }
}

impl FromStr for Snapshot {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let unreadable = || Error::retry(format!("`{text}` is no snapshot of transactions"));
        let mut parts = text.split(':').skip(1);
        let end = parts.next().and_then(|end| end.parse().ok()).ok_or_else(unreadable)?;
        let list = parts.next().ok_or_else(unreadable)?.split(',').filter(|xid| !xid.is_empty());
        let in_progress = list.map(|xid| {
            let xid: u64 = xid.parse().map_err(|_| unreadable())?;
            #[expect(clippy::cast_possible_truncation, reason = "as the stream counts")]
            Ok(xid as u32)
        });
        Ok(Self { end, in_progress: in_progress.collect::<Result<_>>()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_in_progress_or_came_later_is_not_seen() {
        let snapshot: Snapshot = "795:800:796,798".parse().unwrap();
        let seen: Vec<_> = (793..802).filter(|xid| snapshot.sees(*xid)).collect();
        assert_eq!(seen, [793, 794, 795, 797, 799]);
        assert!("795".parse::<Snapshot>().is_err());
    }

    #[test]
    fn transactions_are_told_apart_across_the_end_of_32_bits() {
        let end = (1_u64 << 32) + 5;
        let snapshot: Snapshot = format!("{}:{end}:{}", end - 10, end - 2).parse().unwrap();
        assert!(snapshot.sees(u32::MAX - 1), "a little before the wrap");
        assert!(!snapshot.sees(3), "in progress");
        assert!(snapshot.sees(4));
        assert!(!snapshot.sees(5));
    }
}
