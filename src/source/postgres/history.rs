//! Whether the server's history is still the one that the journal begins: what the slot has below
//! our progress is read again, and compared transaction by transaction.
//!
//! A server that was put back and has written more since then has its end beyond our progress, and
//! its identifier and timeline are the same. But its slot was put back with it: it stands where
//! both histories are still one. So whatever differs lies between the slot and our progress, which
//! is exactly what is read here (docs/adr/0008).

use std::{
    io::{self, Write},
    time::{Duration, Instant},
};

use bytes::{Buf, BufMut, Bytes};

use super::{
    catalog::{quote_name, quote_text},
    checks::Look,
    failure::{Failure, ServerError, broken, notice},
    pgoutput::{self, Message},
    publication, slot,
    stream::{FAREWELL, is_timeout},
    wire::{Client, Frames, Purpose, Stream},
};
use crate::{
    change::{Lsn, Position, Recent, Transaction},
    error::{Error, Result},
};

/// The server is asked this often how far it is.
const ASK_INTERVAL: Duration = Duration::from_millis(100);
/// A server that comes no further for this long is gone, or has nothing more.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// How long the server may take to free the slot that was read here.
const RELEASE_MAX: Duration = Duration::from_secs(10);
const RELEASE_POLL: Duration = Duration::from_millis(10);
/// SQLSTATE of a publication that is not there.
const UNDEFINED: &str = "42704";
const BUFFER_BYTES: usize = 256 << 10;

/// What the server has instead of the journal's transactions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Difference {
    /// Both agree up to here.
    pub(super) agreed: Lsn,
    /// The first transaction that is not the same.
    pub(super) what: String,
}

/// Reads again what the slot has below `progress`; `None` where it is what the journal has, or
/// where there is nothing to compare.
pub(super) fn compare(
    client: &mut Client,
    look: &Look<'_>,
    progress: Position,
) -> Result<Option<Difference>> {
    let confirmed = look.slot.and_then(|slot| slot.confirmed);
    let Some(confirmed) = confirmed.filter(|confirmed| *confirmed < progress.lsn) else {
        return Ok(None);
    };
    let recent = look.known.past.since(confirmed)?;
    let Some(from) = recent.complete_from.map(|from| from.max(confirmed)) else { return Ok(None) };
    let names = published_before(client, look)?;
    if names.is_empty() {
        return Ok(None);
    }
    let mut comparison = Comparison::new(recent, from, progress.lsn);
    let outcome = read_again(look, &names, &mut comparison);
    release(client, look)?;
    match outcome {
        Ok(()) => Ok(comparison.difference),
        // A publication was made after the slot: the stream begins behind that, or says it again.
        Err(Failure::Server(error)) if error.code == UNDEFINED => {
            let source = &look.settings.name;
            tracing::warn!(%source, %error, "what the slot still has cannot be compared");
            Ok(None)
        }
        Err(failure) => {
            Err(Error::from(failure).context("while comparing the server with the journal"))
        }
    }
}

/// Whether the server refuses to send what comes next, because a publication was not there when it
/// was written. Reads up to the first row.
pub(super) fn is_refused(client: &mut Client, look: &Look<'_>, progress: Position) -> Result<bool> {
    let names = published_before(client, look)?;
    if names.is_empty() {
        return Ok(false);
    }
    let mut comparison = Comparison::new(Recent::default(), progress.lsn, look.server.flush);
    comparison.until_row = true;
    let outcome = read_again(look, &names, &mut comparison);
    release(client, look)?;
    match outcome {
        Ok(()) => Ok(false),
        Err(Failure::Server(error)) if error.code == UNDEFINED => Ok(true),
        Err(failure) => Err(failure.into()),
    }
}

/// The publications through which the journal was filled, where they are still there and still the
/// ones that are configured.
fn published_before(client: &mut Client, look: &Look<'_>) -> Result<Vec<String>> {
    let mut names = Vec::new();
    // Another plugin sends other messages.
    if look.slot.and_then(|slot| slot.plugin.as_deref()) != Some("pgoutput") {
        return Ok(names);
    }
    let configured = [&look.settings.publication, &look.settings.inserts];
    let then = look.known.origin.iter().flat_map(|origin| &origin.publications);
    for (name, _) in then {
        if !configured.contains(&name) || publication::read(client, name)?.is_none() {
            return Ok(Vec::new());
        }
        names.push(name.clone());
    }
    Ok(names)
}

fn read_again(
    look: &Look<'_>,
    names: &[String],
    comparison: &mut Comparison,
) -> std::result::Result<(), Failure> {
    let names: Vec<_> = names.iter().map(|name| quote_name(name)).collect();
    let walsender = Client::connect(&look.settings.target, Purpose::Replication)?;
    let (mut stream, mut frames) = walsender.start_copy(&format!(
        "START_REPLICATION SLOT {} LOGICAL {} (proto_version '1', publication_names {})",
        quote_name(&look.settings.slot),
        comparison.agreed,
        quote_text(&names.join(","))
    ))?;
    frames.enlarge(BUFFER_BYTES);
    stream.socket().set_read_timeout(Some(ASK_INTERVAL))?;
    let outcome = read_until_done(&mut stream, &mut frames, look, comparison);
    // It frees the slot; where the connection is broken already, that does too.
    let _ = stream.write_all(FAREWELL).and_then(|()| stream.flush());
    stream.socket().close();
    outcome
}

fn read_until_done(
    stream: &mut Stream,
    frames: &mut Frames,
    look: &Look<'_>,
    comparison: &mut Comparison,
) -> std::result::Result<(), Failure> {
    let (mut moved, mut asked) = ((Instant::now(), comparison.reached), None::<Instant>);
    while !comparison.done {
        if asked.is_none_or(|asked| asked.elapsed() >= ASK_INTERVAL) {
            ask(stream)?;
            asked = Some(Instant::now());
        }
        let limit = look.settings.config.change_bytes_max;
        if frames.unfinished().is_some_and(|(length, _)| length > limit) {
            return Err(Error::config(format!(
                "a change that the slot still has is larger than change_bytes_max ({limit})"
            ))
            .remedy("raise `change_bytes_max` of the source")
            .into());
        }
        match frames.fill(stream) {
            Ok(0) => return Err(broken(io::ErrorKind::UnexpectedEof.into()).into()),
            Err(error) if !is_timeout(&error) => return Err(broken(error).into()),
            _ => {}
        }
        while !comparison.done
            && let Some((tag, body)) = frames.next()?
        {
            match tag {
                b'd' => comparison.take(body)?,
                b'E' => return Err(Failure::Server(ServerError::parse(&body))),
                b'N' if notice(&body).is_err() => {
                    let code = UNDEFINED.to_owned();
                    let refused = ServerError { code, ..ServerError::parse(&body) };
                    return Err(Failure::Server(refused));
                }
                b'c' | b'C' => return Err(Error::retry("the server ended the stream").into()),
                _ => {}
            }
        }
        if comparison.reached > moved.1 {
            moved = (Instant::now(), comparison.reached);
        } else if moved.0.elapsed() > SILENCE_MAX {
            let what = format!("the server does not come beyond {}", comparison.agreed);
            return Err(Error::retry(what).into());
        }
    }
    Ok(())
}

/// A status update that confirms nothing and wants an answer, which says how far the server is.
fn ask(stream: &mut Stream) -> io::Result<()> {
    let mut out = Vec::with_capacity(39);
    out.put_u8(b'd');
    out.put_u32(38);
    out.put_u8(b'r');
    out.put_bytes(0, 32);
    out.put_u8(1);
    stream.write_all(&out)?;
    stream.flush()
}

/// Waits until the slot is free again: the stream proper wants it next.
fn release(client: &mut Client, look: &Look<'_>) -> Result<()> {
    let begin = Instant::now();
    loop {
        let found = slot::read(client, &look.settings.slot)?;
        match found.and_then(|slot| slot.active_pid) {
            None => return Ok(()),
            Some(pid) if begin.elapsed() > RELEASE_MAX => {
                let name = &look.settings.slot;
                let what = format!("the server does not free the slot `{name}` (pid {pid})");
                return Err(Error::retry(what));
            }
            Some(_) => std::thread::sleep(RELEASE_POLL),
        }
    }
}

/// The journal's transactions beside those that are sent.
struct Comparison {
    expected: std::iter::Peekable<std::vec::IntoIter<Transaction>>,
    /// What commits from here on is not in the journal yet.
    progress: Lsn,
    agreed: Lsn,
    open: Option<Transaction>,
    /// How far the server has come, and what it has sent of that.
    reached: (u64, u64),
    /// The open one changed a row.
    rows: bool,
    /// The first row ends it.
    until_row: bool,
    done: bool,
    difference: Option<Difference>,
}

impl Comparison {
    fn new(recent: Recent, from: Lsn, progress: Lsn) -> Self {
        Self {
            expected: recent.transactions.into_iter().peekable(),
            progress,
            agreed: from,
            open: None,
            reached: (0, 0),
            rows: false,
            until_row: false,
            done: false,
            difference: None,
        }
    }

    /// Takes the content of one CopyData.
    fn take(&mut self, mut body: Bytes) -> Result<()> {
        match body.first() {
            Some(b'w') if body.len() > 25 => {
                body.advance(25); // start, end, and the time of sending
                self.reached.1 += 1;
                self.message(&pgoutput::decode(body)?);
            }
            Some(b'k') if body.len() == 18 => {
                body.advance(1);
                self.reached.0 = self.reached.0.max(body.get_u64());
                if self.open.is_none() && self.reached.0 >= self.progress.0 {
                    self.finish();
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn message(&mut self, message: &Message) {
        match *message {
            Message::Begin { commit_lsn, .. } if commit_lsn >= self.progress => self.finish(),
            Message::Begin { commit_lsn, commit_time, xid } => {
                self.open = Some(Transaction { xid, commit_lsn, commit_time });
                self.rows = false;
            }
            Message::Insert { .. }
            | Message::Update { .. }
            | Message::Delete { .. }
            | Message::Truncate { .. } => {
                self.rows = true;
                self.done |= self.until_row;
            }
            Message::Commit { .. } => {
                if let Some(sent) = self.open.take().filter(|_| self.rows) {
                    self.compare(sent);
                }
            }
            _ => {}
        }
    }

    fn compare(&mut self, sent: Transaction) {
        match self.expected.next() {
            Some(ours) if ours == sent => self.agreed = sent.commit_lsn,
            Some(ours) => self.differs(format!(
                "the journal has {} where the server has {}",
                describe(ours),
                describe(sent)
            )),
            None => self.differs(format!("the journal lacks {}", describe(sent))),
        }
    }

    /// All below our progress was sent.
    fn finish(&mut self) {
        self.done = true;
        if let Some(ours) = self.expected.next() {
            self.differs(format!("the server lacks {}", describe(ours)));
        }
    }

    fn differs(&mut self, what: String) {
        self.done = true;
        self.difference = Some(Difference { agreed: self.agreed, what });
    }
}

fn describe(Transaction { xid, commit_lsn, commit_time }: Transaction) -> String {
    format!("transaction {xid}, committed at {commit_lsn} ({commit_time})")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::{Row, Timestamp};

    fn transaction(xid: u32) -> Transaction {
        let commit_lsn = Lsn(u64::from(xid) * 10);
        Transaction { xid, commit_lsn, commit_time: Timestamp(7) }
    }

    fn send(comparison: &mut Comparison, sent: Transaction, with_rows: bool) {
        let Transaction { xid, commit_lsn, commit_time } = sent;
        comparison.message(&Message::Begin { commit_lsn, commit_time, xid });
        if comparison.done {
            return;
        }
        if with_rows {
            let after = Row::from_values([]);
            comparison.message(&Message::Insert { relation: 1, after });
        }
        comparison.message(&Message::Commit { commit_lsn, end_lsn: Lsn(commit_lsn.0 + 5) });
    }

    /// What is said of a journal that has 1 to 3, when `sent` comes again and then a new one.
    fn outcome(sent: &[Transaction]) -> Option<Difference> {
        let transactions = vec![transaction(1), transaction(2), transaction(3)];
        let recent = Recent { transactions, complete_from: Some(Lsn(0)) };
        let mut comparison = Comparison::new(recent, Lsn(0), Lsn(35));
        for sent in sent {
            send(&mut comparison, *sent, true);
        }
        send(&mut comparison, transaction(4), true);
        assert!(comparison.done);
        comparison.difference
    }

    #[test]
    fn the_same_transactions_are_no_difference_and_any_other_is() {
        let [one, two, three] = [1, 2, 3].map(transaction);
        assert_eq!(outcome(&[one, two, three]), None);
        let lacking = outcome(&[one, two]).unwrap();
        assert_eq!(lacking.agreed, Lsn(20));
        assert!(lacking.what.contains("the server lacks transaction 3"), "{}", lacking.what);
        let later = Transaction { commit_time: Timestamp(8), ..two };
        assert_eq!(outcome(&[one, later]).unwrap().agreed, Lsn(10));
        let more = Transaction { xid: 9, commit_lsn: Lsn(33), commit_time: Timestamp(7) };
        let more = outcome(&[one, two, three, more]).unwrap();
        assert!(more.what.contains("the journal lacks transaction 9"), "{}", more.what);
    }

    #[test]
    fn transactions_without_rows_are_not_compared_and_a_keepalive_ends_it() {
        let mut comparison = Comparison::new(Recent::default(), Lsn(0), Lsn(35));
        send(&mut comparison, transaction(1), false);
        let keepalive = |lsn: u64| {
            let mut body = vec![b'k'];
            body.put_u64(lsn);
            body.put_bytes(0, 9);
            Bytes::from(body)
        };
        comparison.take(keepalive(34)).unwrap();
        assert!(!comparison.done);
        comparison.take(keepalive(35)).unwrap();
        assert!(comparison.done);
        assert_eq!(comparison.difference, None);
    }
}
