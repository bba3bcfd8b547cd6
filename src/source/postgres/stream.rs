//! The reader: one thread that reads the stream, decodes it, answers keepalives, and confirms.
//!
//! ```text
//!             reader thread                                    capture()
//!  socket ──► Frames ──► pgoutput ──► Assembler ──► queue ──► next()
//!    ▲           │ open transactions    ▲           (bytes)
//!    │           └──► Streamed ─► Spool ┘ at their commit
//!    └────── standby status ◄── confirmed (atomic) ◄───────── confirm()
//! ```
//!
//! States: *quiet*, where each read is decoded and handed over at once; *busy*, where commits that
//! follow one another closely are handed over once a millisecond; and *loaded*, where reads begin
//! once in a period. Between reads it sleeps: the walsender writes one message a change and has to
//! wake a reader that waits for it; one that sleeps lets it run (docs/adr/0003).

use std::{
    io::{self, Write},
    ops::RangeInclusive,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use bytes::{Buf, BufMut, Bytes};

use super::{
    assemble::{self, Assembler},
    catalog::Catalog,
    failure::{ServerError, broken, notice},
    pgoutput::StreamCommit,
    shared::Shared,
    spool::Replay,
    streamed::{Streamed, Taken},
    wal2json,
    wire::{Frames, Stream},
};
use crate::{
    change::{Batch, Lsn, Position, Timestamp},
    error::{Error, Result},
};

/// An open transaction is cut at this size.
const OPEN_BYTES_MAX: usize = 2 << 20;
/// Under load the reader hands over at this size, or at `HOLD_MAX`.
const HOLD_BYTES: usize = 1 << 20;
const HOLD_MAX: Duration = Duration::from_millis(8);
/// Under load a read begins this long after the last one; docs/adr/0003 has the figures.
const PERIOD: RangeInclusive<Duration> = Duration::from_micros(100)..=Duration::from_micros(250);
/// Over TCP, where the kernel holds megabytes and fewer acknowledgements mean fewer segments.
const TCP_PERIOD: RangeInclusive<Duration> =
    Duration::from_micros(500)..=Duration::from_micros(500);
/// The period is chosen so that a read finds about this much. A unix socket holds twice that of
/// small messages (it counts some 770 bytes for each), and a walsender that fills it stands still.
const PERIOD_BYTES: u32 = 20 << 10;
/// The rate that counts as load. A load is noticed soon and forgotten late: the walsender pauses
/// between transactions, and a reader that turns eager in each pause wakes for every message.
const LOAD_BYTES_PER_MS: u128 = 12 << 10;
const RISE_WINDOW: Duration = Duration::from_millis(1);
const FALL_WINDOW: Duration = Duration::from_millis(10);
/// Below load, commits that follow one another sooner than this are handed over together: each
/// hand-over costs an fsync, which the database on the same disk waits for too.
const BUSY_PERIOD: Duration = Duration::from_millis(1);
/// A read of less than this has found the end of what there was.
const DRY_BYTES: usize = 4 << 10;
/// A quiet read looks up this often for a stop and for something to confirm.
const QUIET_READ: Duration = Duration::from_millis(50);
/// A read under load that finds nothing ends the load; the system rounds it up to its tick.
const LOADED_READ: Duration = Duration::from_millis(1);
const BUFFER_BYTES: usize = 1 << 20;
/// A server that shuts down asks again as soon as it has an answer.
const ANSWER_INTERVAL: Duration = Duration::from_millis(10);
const CONFIRM_INTERVAL: Duration = Duration::from_millis(100);
const STATUS_INTERVAL_MAX: Duration = Duration::from_secs(10);
/// A position without changes is handed over at most this often.
const IDLE_INTERVAL: Duration = Duration::from_secs(1);
/// A server that takes no byte for this long is gone.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);

/// The thread's own state.
pub(super) struct Reader {
    stream: Stream,
    frames: Frames,
    assembler: Assembler,
    /// Where the server sends transactions that are still open.
    streamed: Option<Streamed>,
    catalog: Catalog,
    /// Where the slot is of that plugin.
    wal2json: Option<wal2json::Decoder>,
    shared: Arc<Shared>,
    change_bytes_max: usize,
    status_interval: Duration,
    last_status: Instant,
    sent_confirmed: u64,
    answer_now: bool,
    last_idle: Option<Instant>,
    load: Load,
    held_since: Option<Instant>,
    last_put: Instant,
    /// The last one came soon after the one before.
    busy: bool,
    last_read: Instant,
    /// Under load, from one read to the next.
    period: Duration,
    periods: RangeInclusive<Duration>,
}

impl Reader {
    /// Takes over a connection in which the stream has begun.
    pub(super) fn new(
        (stream, mut frames): (Stream, Frames),
        start: Position,
        catalog: Catalog,
        shared: Arc<Shared>,
    ) -> io::Result<Self> {
        frames.enlarge(BUFFER_BYTES);
        stream.socket().set_timeouts(Some(WRITE_TIMEOUT))?;
        stream.socket().set_read_timeout(Some(QUIET_READ))?;
        let now = Instant::now();
        let periods = if stream.socket().is_tcp() { TCP_PERIOD } else { PERIOD };
        Ok(Self {
            stream,
            frames,
            assembler: Assembler::new(start),
            streamed: None,
            catalog,
            shared,
            wal2json: None,
            change_bytes_max: usize::MAX,
            status_interval: STATUS_INTERVAL_MAX,
            last_status: now,
            sent_confirmed: 0,
            answer_now: true,
            last_idle: None,
            load: Load { since: now, bytes: 0, high: false },
            held_since: None,
            last_put: now,
            busy: false,
            last_read: now,
            period: *periods.end(),
            periods,
        })
    }

    /// Reports often enough for the server's `wal_sender_timeout` (0: it never times out).
    #[must_use]
    pub(super) fn with_sender_timeout(mut self, timeout: Duration) -> Self {
        if !timeout.is_zero() {
            self.status_interval = (timeout / 4).min(STATUS_INTERVAL_MAX);
        }
        self
    }

    /// Stops at a change of more bytes than this.
    #[must_use]
    pub(super) fn with_change_bytes_max(mut self, bytes: usize) -> Self {
        self.change_bytes_max = bytes;
        self
    }

    /// Decodes lines of wal2json where a decoder for them is given.
    #[must_use]
    pub(super) fn with_wal2json(mut self, decoder: Option<wal2json::Decoder>) -> Self {
        self.wal2json = decoder;
        self
    }

    /// Takes transactions that are sent while they are still open.
    #[must_use]
    pub(super) fn with_streamed(mut self, streamed: Option<Streamed>) -> Self {
        self.streamed = streamed;
        self
    }

    /// Reads until it is stopped or the connection ends.
    pub(super) fn run(mut self) {
        sleep_exactly();
        let outcome = self.serve();
        if outcome.is_ok() {
            // A clean end tells the server what is confirmed, and frees the slot at once.
            let _ = self.report().and_then(|()| self.stream.write_all(FAREWELL));
            let _ = self.stream.flush();
        }
        // The source holds a second handle: without this, a server that shuts down would wait for a
        // reader that is gone.
        self.stream.socket().close();
        let shared = Arc::clone(&self.shared);
        drop(self);
        shared.end(outcome.err());
    }

    fn serve(&mut self) -> Result<()> {
        // What came right behind the answer to START_REPLICATION is here already, and nothing may
        // follow it: a server that refuses stays connected and silent.
        let bytes = self.frames.take_whole()?;
        self.decode(bytes)?;
        while !self.shared.stopped() {
            self.report_if_due()?;
            self.wait_for_room()?;
            self.check_size()?;
            match self.frames.fill(&mut self.stream) {
                Ok(0) if self.shared.stopped() => break,
                Ok(0) => return Err(broken(io::ErrorKind::UnexpectedEof.into())),
                Ok(read) => {
                    self.note(read)?;
                    self.period = next_period(self.period, read, &self.periods);
                    let bytes = self.frames.take_whole()?;
                    self.decode(bytes)?;
                    self.hand_over_or_hold(read < DRY_BYTES);
                    self.rest();
                }
                Err(error) if is_timeout(&error) => {
                    let high = self.load.note(0, Instant::now());
                    self.set_load(high)?;
                    self.hand_over();
                }
                Err(error) => return Err(broken(error)),
            }
        }
        Ok(())
    }

    /// While nobody takes what is here, only the server is kept informed.
    fn wait_for_room(&mut self) -> Result<()> {
        while !self.shared.wait_for_room(CONFIRM_INTERVAL.min(self.status_interval)) {
            self.report_if_due()?;
        }
        Ok(())
    }

    /// Refuses a change for which there is no memory, before it is read.
    fn check_size(&self) -> Result<()> {
        let Some((length, begun)) = self.frames.unfinished() else { return Ok(()) };
        if length <= self.change_bytes_max {
            return Ok(());
        }
        let what = match begun.get(RELATION - 1..) {
            Some(line) if self.wal2json.is_some() => wal2json::table_of(line)
                .map_or_else(|| "a change".to_owned(), |table| format!("a change of {table}")),
            Some([b'M', ..]) => "a logical message".to_owned(),
            Some([_, rest @ ..]) => self
                .table_of(rest)
                .map_or_else(|| "a change".to_owned(), |table| format!("a change of {table}")),
            _ => "a change".to_owned(),
        };
        Err(Error::config(format!(
            "{what} has {length} bytes, more than change_bytes_max ({})",
            self.change_bytes_max
        ))
        .remedy(
            "raise `change_bytes_max` of the source (some four times as much memory is needed); \
             the change waits in the server's log",
        ))
    }

    /// The table of a change whose kind is followed by `rest`.
    fn table_of(&self, rest: &[u8]) -> Option<String> {
        let inside = self.streamed.as_ref().filter(|streamed| streamed.is_inside());
        let rest = if inside.is_some() { rest.get(4..)? } else { rest };
        let oid = u32::from_be_bytes(*rest.first_chunk()?);
        let told = inside.and_then(|streamed| streamed.table_name(oid));
        told.or_else(|| self.assembler.table_name(oid))
    }

    fn note(&mut self, read: usize) -> Result<()> {
        self.last_read = Instant::now();
        let high = self.load.note(read, self.last_read);
        self.shared.stats.bytes.fetch_add(read as u64, Ordering::Relaxed);
        self.set_load(high)
    }

    fn set_load(&mut self, high: bool) -> Result<()> {
        if high != self.load.high {
            self.load.high = high;
            let timeout = if high { LOADED_READ } else { QUIET_READ };
            self.stream.socket().set_read_timeout(Some(timeout)).map_err(broken)?;
        }
        Ok(())
    }

    fn decode(&mut self, mut bytes: Bytes) -> Result<()> {
        while let Some(head) = bytes.first_chunk::<5>()
            && !self.shared.stopped()
        {
            let [tag, length @ ..] = *head;
            // `take_whole` cut at a message's end, so the length lies within the bytes
            let length = (u32::from_be_bytes(length) as usize + 1).min(bytes.len());
            let mut message = bytes.split_to(length);
            message.advance(5);
            match tag {
                b'd' => self.copy_data(message)?,
                b'E' => {
                    let error = super::failure::Failure::Server(ServerError::parse(&message));
                    return Err(Error::from(error).context("while reading the stream"));
                }
                b'c' | b'C' => return Err(Error::retry("the server ended the stream")),
                b'N' => match &mut self.wal2json {
                    Some(decoder) => decoder.notice(&message)?,
                    None => notice(&message)?,
                },
                _ => {}
            }
        }
        Ok(())
    }

    fn copy_data(&mut self, mut message: Bytes) -> Result<()> {
        match message.first() {
            Some(b'w') if message.len() > 25 => {
                message.advance(25); // start, end, and the time of sending
                if let Some(decoder) = &mut self.wal2json {
                    return decoder.feed(&mut self.assembler, &message, &mut self.catalog);
                }
                let taken = match &mut self.streamed {
                    Some(streamed) => streamed.take(message, &mut self.assembler.arrivals)?,
                    None => Taken::Message(message),
                };
                match taken {
                    Taken::Message(message) => {
                        let catalog = &mut self.catalog;
                        assemble::feed(&mut self.assembler, message, &mut |r| catalog.resolve(r))
                    }
                    Taken::Kept => Ok(()),
                    Taken::Committed(commit, replay) => self.replay(&commit, replay),
                }
            }
            Some(b'k') if message.len() == 18 => {
                message.advance(1);
                let wal_end = Lsn(message.get_u64());
                message.advance(8);
                let wants_reply = message.get_u8() == 1;
                self.shared.stats.server_end.fetch_max(wal_end.0, Ordering::Relaxed);
                self.assembler.nothing_below(wal_end);
                if wants_reply {
                    self.answer_now = true;
                    self.last_idle = None;
                }
                Ok(())
            }
            _ => Err(Error::retry("the server sent replication data of an unknown kind")),
        }
    }

    /// Hands over a transaction that was sent while it was open, in batches, as there is room for
    /// them. Meanwhile nothing is read, but the server is kept informed.
    fn replay(&mut self, commit: &StreamCommit, mut replay: Replay) -> Result<()> {
        self.assembler.begin_streamed(commit)?;
        while let Some(records) = replay.next_block()? {
            for record in records {
                let catalog = &mut self.catalog;
                self.assembler.accept_spooled(record, &mut |r| catalog.resolve(r))?;
            }
            if self.assembler.bytes() >= OPEN_BYTES_MAX {
                self.hand_over();
                crate::failpoint::reach("source::replayed");
            }
            self.report_if_due()?;
            self.wait_for_room()?;
            if self.shared.stopped() {
                return Ok(()); // nothing is handed over any more, so it stays without its end
            }
        }
        crate::failpoint::reach("source::read_back");
        self.assembler.end_streamed(commit)
    }

    fn hand_over_or_hold(&mut self, dry: bool) {
        let now = Instant::now();
        let held = *self.held_since.get_or_insert(now);
        let enough = self.assembler.bytes() >= HOLD_BYTES || now - held >= HOLD_MAX;
        if !self.load.high || enough || dry {
            self.hand_over();
        }
    }

    /// Sleeps until the next read is due. What was done meanwhile counts: the server goes on.
    fn rest(&self) {
        let due = match (self.load.high, self.busy) {
            (true, _) => self.last_read + self.period,
            (false, true) => self.last_put + BUSY_PERIOD,
            (false, false) => return,
        };
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }

    fn hand_over(&mut self) {
        self.held_since = None;
        let idle_due = self.last_idle.is_none_or(|last| last.elapsed() >= IDLE_INTERVAL);
        if (self.assembler.has_closed() || (self.assembler.has_moved() && idle_due))
            && let Some(batch) = self.assembler.take_closed()
        {
            if batch.changes.is_empty() {
                self.last_idle = Some(Instant::now());
            }
            self.put(batch);
        }
        if self.assembler.bytes() >= OPEN_BYTES_MAX
            && let Some(batch) = self.assembler.take_open()
        {
            self.put(batch);
        }
    }

    fn put(&mut self, batch: Batch) {
        let now = Instant::now();
        self.busy = now - self.last_put < 2 * BUSY_PERIOD;
        self.last_put = now;
        let stats = &self.shared.stats;
        stats.changes.fetch_add(batch.changes.len() as u64, Ordering::Relaxed);
        stats.last_message_us.store(Timestamp::now().0, Ordering::Relaxed);
        if let Some(position) = batch.position {
            stats.received.fetch_max(position.lsn.0, Ordering::Relaxed);
            stats.server_end.fetch_max(position.lsn.0, Ordering::Relaxed);
        }
        self.shared.put(batch);
    }

    fn report_if_due(&mut self) -> Result<()> {
        let waited = self.last_status.elapsed();
        let news = self.shared.confirmed.load(Ordering::Acquire) > self.sent_confirmed;
        let due = (self.answer_now && waited >= ANSWER_INTERVAL)
            || waited >= self.status_interval
            || (news && waited >= CONFIRM_INTERVAL);
        if due { self.report().map_err(broken) } else { Ok(()) }
    }

    /// `Standby status update`: what is written, flushed and applied is one position.
    fn report(&mut self) -> io::Result<()> {
        let confirmed = self.shared.confirmed.load(Ordering::Acquire);
        let clock = Timestamp::now().0 - 946_684_800_000_000;
        let mut out = Vec::with_capacity(39);
        out.put_u8(b'd');
        out.put_u32(38);
        out.put_u8(b'r');
        out.put_u64(confirmed);
        out.put_u64(confirmed);
        out.put_u64(confirmed);
        out.put_i64(clock);
        out.put_u8(0);
        crate::failpoint::reach("source::before_confirm");
        self.stream.write_all(&out)?;
        self.stream.flush()?;
        crate::failpoint::reach("source::after_confirm");
        self.sent_confirmed = confirmed;
        self.shared.stats.confirmed.fetch_max(confirmed, Ordering::Relaxed);
        self.last_status = Instant::now();
        self.answer_now = false;
        Ok(())
    }
}

/// Where a change's relation stands: behind CopyData's head, XLogData's head and the kind.
const RELATION: usize = 5 + 25 + 1;

/// CopyDone and Terminate.
pub(super) const FAREWELL: &[u8] = b"c\0\0\0\x04X\0\0\0\x04";

/// The period in which a read should find `PERIOD_BYTES`, when in `period` it found `read`.
fn next_period(period: Duration, read: usize, within: &RangeInclusive<Duration>) -> Duration {
    let read = u32::try_from(read).unwrap_or(u32::MAX).max(1);
    (period * PERIOD_BYTES / read).clamp(*within.start(), *within.end())
}

/// Sleeps of this thread end on time, not up to 50 us later, as Linux does it by default.
fn sleep_exactly() {
    #[cfg(target_os = "linux")]
    let _ = rustix::thread::set_current_timer_slack(std::num::NonZero::new(1000));
}

pub(super) fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

/// How much arrives.
struct Load {
    since: Instant,
    bytes: usize,
    high: bool,
}

impl Load {
    /// Counts a read, and says whether the stream is under load.
    fn note(&mut self, read: usize, now: Instant) -> bool {
        self.bytes += read;
        let elapsed = now - self.since;
        if elapsed < if self.high { FALL_WINDOW } else { RISE_WINDOW } {
            return self.high;
        }
        let high = self.bytes as u128 * 1000 >= LOAD_BYTES_PER_MS * elapsed.as_micros();
        self.since = now;
        self.bytes = 0;
        high
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_steady_thousand_changes_a_second_is_no_load_and_a_backlog_is() {
        let start = Instant::now();
        let mut load = Load { since: start, bytes: 0, high: false };
        for tick in 1..=100 {
            assert!(!load.note(250, start + Duration::from_millis(tick)));
        }
        let later = start + Duration::from_millis(100);
        assert!((1..=20).any(|tick| load.note(2_000, later + Duration::from_micros(tick * 100))));
    }

    #[test]
    fn a_load_outlives_the_pause_between_two_transactions_and_ends_soon_after() {
        let start = Instant::now();
        let mut load = Load { since: start, bytes: 1 << 20, high: true };
        assert!(load.note(0, start + Duration::from_millis(5)));
        assert!(load.note(0, start + Duration::from_millis(10)), "much came in this window");
        assert!(!load.note(100, start + Duration::from_millis(20)));
    }

    #[test]
    fn the_period_is_long_for_small_rows_and_short_for_those_that_fill_the_socket() {
        let next = |period, read| next_period(period, read, &PERIOD);
        let (min, max) = PERIOD.into_inner();
        assert_eq!(next(max, 8_000), max);
        assert_eq!(next(max, 2 * PERIOD_BYTES as usize), max / 2);
        assert_eq!(next(min, 1 << 20), min);
        assert!(next(max / 2, 1_000) > max / 2);
    }
}
