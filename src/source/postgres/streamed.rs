//! Transactions that are sent while they are still open: in blocks, between those of others and
//! between whole transactions
//! (<https://www.postgresql.org/docs/current/protocol-logical-replication.html>).
//!
//! States: *outside* of a block, where each message belongs to a whole transaction; *inside* the
//! block of one transaction, whose messages go to the spool until it commits or is rolled back.

use std::collections::HashMap;

use bytes::Bytes;

use super::{
    pgoutput::{self, Control, Message, Part, StreamCommit},
    spool::{Replay, Spool},
};
use crate::error::{Error, Result};

/// What became of a message.
pub(super) enum Taken {
    /// It belongs to a whole transaction.
    Message(Bytes),
    /// It is kept until its transaction ends.
    Kept,
    /// A transaction has committed, and is to be read back.
    Committed(StreamCommit, Replay),
}

/// The transactions that are open.
pub(super) struct Streamed {
    spool: Spool,
    inside: Option<u32>,
    /// Tables that were described inside blocks, for messages to people.
    names: HashMap<u32, String>,
}

impl Streamed {
    /// Begins outside of any block.
    pub(super) fn new(spool: Spool) -> Self {
        Self { spool, inside: None, names: HashMap::new() }
    }

    /// Whether a block is open.
    pub(super) fn is_inside(&self) -> bool {
        self.inside.is_some()
    }

    /// The name of a table that was described inside a block.
    pub(super) fn table_name(&self, oid: u32) -> Option<String> {
        self.names.get(&oid).cloned()
    }

    /// Takes a message; `arrivals` counts the relations.
    pub(super) fn take(&mut self, message: Bytes, arrivals: &mut u64) -> Result<Taken> {
        match (pgoutput::decode_control(&message)?, self.inside) {
            (None, None) => Ok(Taken::Message(message)),
            (None, Some(top)) => self.keep(top, message, arrivals).map(|()| Taken::Kept),
            (Some(Control::Stop), Some(_)) => {
                self.inside = None;
                Ok(Taken::Kept)
            }
            (Some(control), None) => self.control(control),
            (Some(control), Some(top)) => {
                Err(disorder(&format!("{control:?} came inside a block of the transaction {top}")))
            }
        }
    }

    fn control(&mut self, control: Control) -> Result<Taken> {
        match control {
            Control::Start { xid, first } => {
                if first == self.spool.holds(xid) {
                    return Err(disorder(&format!("the transaction {xid} has no one beginning")));
                }
                self.spool.begin(xid);
                self.inside = Some(xid);
                Ok(Taken::Kept)
            }
            Control::Stop => Err(disorder("a block ended that had not begun")),
            Control::Abort { xid, subxid } => {
                self.spool.abort(xid, subxid);
                Ok(Taken::Kept)
            }
            Control::Commit(commit) if !self.spool.holds(commit.xid) => {
                Err(disorder(&format!("the transaction {} ended before it began", commit.xid)))
            }
            Control::Commit(commit) => Ok(Taken::Committed(commit, self.spool.take(commit.xid)?)),
        }
    }

    fn keep(&mut self, top: u32, message: Bytes, arrivals: &mut u64) -> Result<()> {
        let Some(part) = pgoutput::decode_part(message)? else { return Ok(()) };
        let mut arrival = 0;
        if part.kind == b'R' {
            *arrivals += 1;
            arrival = *arrivals;
            self.learn_name(&part)?;
        }
        self.spool.push(top, &part, arrival)
    }

    fn learn_name(&mut self, part: &Part) -> Result<()> {
        let whole = [&[part.kind], &part.body[..]].concat();
        if let Message::Relation(relation) = pgoutput::decode(whole.into())? {
            self.names.insert(relation.oid, format!("{}.{}", relation.schema, relation.name));
        }
        Ok(())
    }
}

/// The connection is given up, and all comes again on the next one.
fn disorder(what: &str) -> Error {
    Error::retry(format!("the stream of open transactions is out of order: {what}"))
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, atomic::Ordering};

    use super::{
        super::{pgoutput::tests::encode, spool::tests::options, stats::Stats},
        *,
    };
    use crate::change::{Lsn, Timestamp};

    fn commit(xid: u32) -> Bytes {
        let (commit_lsn, end_lsn, commit_time) = (Lsn(100), Lsn(120), Timestamp(5));
        encode::stream_commit(&StreamCommit { xid, commit_lsn, end_lsn, commit_time })
    }

    fn part(xid: u32, text: &str) -> Bytes {
        encode::part(xid, &encode::message(true, 1, text, b""))
    }

    /// The prefixes of the messages that each commit brought.
    fn run(messages: Vec<Bytes>) -> Result<Vec<Vec<String>>> {
        let folder = tempfile::tempdir().unwrap();
        let stats = Arc::<Stats>::default();
        let spool = Spool::new(options(folder.path()), Arc::clone(&stats)).unwrap();
        let mut streamed = Streamed::new(spool);
        let mut committed = Vec::new();
        for message in messages {
            let Taken::Committed(_, mut replay) = streamed.take(message, &mut 0)? else { continue };
            let mut texts = Vec::new();
            while let Some(records) = replay.next_block()? {
                for record in records {
                    match pgoutput::decode(record.message)? {
                        Message::Logical { prefix, .. } => texts.push(prefix),
                        other => panic!("{other:?}"),
                    }
                }
            }
            committed.push(texts);
        }
        drop(streamed);
        assert_eq!(stats.spool_bytes.load(Ordering::Relaxed), 0);
        Ok(committed)
    }

    #[test]
    fn blocks_of_two_transactions_are_kept_apart_until_each_commits() {
        let committed = run(vec![
            encode::start(7, true),
            part(7, "a"),
            encode::stop(),
            encode::start(9, true),
            part(9, "x"),
            encode::stop(),
            encode::start(7, false),
            part(7, "b"),
            encode::stop(),
            commit(9),
            commit(7),
        ]);
        assert_eq!(committed.unwrap(), [vec!["x"], vec!["a", "b"]]);
    }

    #[test]
    fn what_was_rolled_back_is_gone_and_nothing_else() {
        let committed = run(vec![
            encode::start(7, true),
            part(7, "a"),
            part(8, "sub"),
            part(10, "other sub"),
            encode::stop(),
            encode::abort(7, 8),
            encode::start(7, false),
            part(7, "b"),
            encode::stop(),
            encode::start(11, true),
            part(11, "gone"),
            encode::stop(),
            encode::abort(11, 11),
            commit(7),
        ]);
        assert_eq!(committed.unwrap(), [vec!["a", "other sub", "b"]]);
    }

    #[test]
    fn a_stream_that_is_out_of_order_is_given_up() {
        for messages in [
            vec![encode::stop()],
            vec![commit(7)],
            vec![encode::start(7, false)],
            vec![encode::start(7, true), encode::start(8, true)],
            vec![encode::start(7, true), commit(7)],
            vec![encode::start(7, true), encode::stop(), encode::start(7, true)],
            vec![encode::start(7, true), encode::begin(100, 9)],
            vec![encode::start(7, true), encode::stop(), encode::abort(7, 7), commit(7)],
        ] {
            assert!(run(messages.clone()).is_err(), "{messages:?}");
        }
    }
}
