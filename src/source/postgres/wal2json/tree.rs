//! Which tables are partitions of which, now: a change of it may choose a table that was passed
//! over, or put it under another name, and no line says so.

use std::{collections::HashSet, time::Duration};

use super::super::catalog::{Catalog, Cells};
use crate::error::{Error, Result, ResultExt};

/// How long a transaction may be in the log and not yet be seen.
const UNSEEN_MAX: Duration = Duration::from_secs(5);
const UNSEEN_WAIT: Duration = Duration::from_micros(200);

/// The tree of partitions as of a snapshot.
#[derive(Debug, Default)]
pub(super) struct Tree {
    seen: Snapshot,
    /// Stands for the whole tree with its names.
    hash: String,
    /// Rises with each change of the tree.
    pub(super) version: u64,
    /// Rises with each look at it.
    pub(super) looks: u64,
}

/// What a query saw: transactions below `end` but for those of `open`.
#[derive(Debug, Default, PartialEq, Eq)]
struct Snapshot {
    end: Option<u32>,
    open: HashSet<u32>,
}

impl Tree {
    /// Makes it at least as new as the transaction `xid`. A transaction is in the log a moment
    /// before other sessions see what it did, and longer where it waits for a standby.
    pub(super) fn follow(&mut self, xid: u32, catalog: &mut Catalog) -> Result<()> {
        let mut waited = Duration::ZERO;
        let mut wait = UNSEEN_WAIT;
        while !self.seen.includes(xid) {
            if waited > UNSEEN_MAX {
                return Err(Error::retry(format!(
                    "the transaction {xid} is in the log, but the server does not show it yet"
                ))
                .remedy(
                    "it waits for a synchronous standby: bring that one back; and take Walrace \
                     out of synchronous_standby_names, for it cannot be one with this plugin",
                ));
            }
            if self.seen.end.is_some() && waited > Duration::ZERO {
                std::thread::sleep(wait);
            }
            waited += wait;
            wait = (wait * 2).min(Duration::from_millis(50));
            self.look(catalog)?;
        }
        Ok(())
    }

    fn look(&mut self, catalog: &mut Catalog) -> Result<()> {
        let rows = catalog
            .query(
                "select pg_current_snapshot(), coalesce(sum(hashtextextended(
                   i.inhrelid || ':' || c.oid || ':' || n.nspname || '.' || c.relname, 0)), 0)
                 from pg_inherits i join pg_class c on c.oid = i.inhparent
                 join pg_namespace n on n.oid = c.relnamespace",
            )
            .context(|| "while looking at the partitions".to_owned())?;
        let mut row = Cells(rows.into_iter().next().unwrap_or_default().into_iter());
        self.seen = Snapshot::parse(&row.text()?)
            .ok_or_else(|| Error::retry("the server describes its snapshot in another form"))?;
        let hash = row.text()?;
        self.looks += 1;
        if hash != self.hash {
            self.hash = hash;
            self.version += 1;
        }
        Ok(())
    }
}

impl Snapshot {
    /// `xmin:xmax:xip_list`, in 64 bits
    /// (<https://www.postgresql.org/docs/current/functions-info.html#FUNCTIONS-PG-SNAPSHOT-PARTS>).
    fn parse(text: &str) -> Option<Self> {
        // The log has the lower half of an id.
        let short = |id: &str| u32::try_from(id.parse::<u64>().ok()? & 0xFFFF_FFFF).ok();
        let mut parts = text.split(':').skip(1);
        let end = short(parts.next()?)?;
        let open = parts.next()?.split(',').filter(|id| !id.is_empty()).map(short);
        Some(Self { end: Some(end), open: open.collect::<Option<_>>()? })
    }

    /// Whether the transaction had ended; ids go round.
    fn includes(&self, xid: u32) -> bool {
        self.end.is_some_and(|end| xid.wrapping_sub(end).cast_signed() < 0)
            && !self.open.contains(&xid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_includes_what_had_ended_also_where_ids_go_round() {
        let seen = Snapshot::parse("10:20:12,15").unwrap();
        assert_eq!(
            [9, 11, 12, 15, 19, 20, 25].map(|xid| seen.includes(xid)),
            [true, true, false, false, true, false, false]
        );
        let round = Snapshot::parse("4294967290:4294967299:4294967298").unwrap();
        assert!(round.includes(u32::MAX) && round.includes(1));
        assert!(!round.includes(2) && !round.includes(3));
        assert!(!Snapshot::default().includes(5), "nothing was seen yet");
        assert!(Snapshot::parse("1:2").is_none() && Snapshot::parse("a:b:c").is_none());
    }
}
