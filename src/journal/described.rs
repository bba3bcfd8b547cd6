//! Which part of a journal may hold a descriptor that somebody does not know, without reading it.

use super::{Journal, store::Segment};
use crate::{error::Result, schema::Table};

impl Journal {
    /// The first offset at or after `from` at which a change may carry a table that is not known;
    /// `None` where none does, up to the end as it is at the call. A segment begins with no table
    /// and describes each before its first use, so its list says it. Blocks for a look at the block
    /// headers of sealed segments.
    pub fn unknown_from(
        &self,
        from: u64,
        is_known: impl Fn(&Table) -> bool,
    ) -> Result<Option<u64>> {
        let segments: Vec<Segment> = {
            let view = self.store.view();
            let after = view.segments.partition_point(|segment| segment.base <= from);
            view.segments.iter().skip(after.saturating_sub(1)).cloned().collect()
        };
        for segment in segments {
            let tables = match self.store.seek(&segment, segment.base) {
                Ok((_, tables)) => tables,
                Err(_) if self.start() > segment.base => continue, // trimmed meanwhile
                Err(error) => return Err(error),
            };
            if tables.iter().any(|table| !is_known(table)) {
                return Ok(Some(from.max(segment.base)));
            }
        }
        Ok(None)
    }
}
