//! The parking lot of one sink, as its loop uses it.

use std::time::{Duration, Instant};

use sqlx::{Row, sqlite::SqliteConnection};

use super::{
    Parking, failed,
    index::{Due, Entry, Index, State},
    stored,
};
use crate::{
    change::{Change, Keys, Timestamp},
    error::{Error, Result},
    journal::Limits,
    sqlite::{integer, unsigned},
};

/// A look at what is due takes longer the more is parked: no more than one part in so many of the
/// time goes into looks that find little.
const LOOKS: u32 = 10;

/// An alarm sounds at this part of a limit, in percent.
const ALARM: u64 = 80;

/// What a sink's configuration says about its lot.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// A change is a dead letter after so many attempts, the first counted.
    pub attempts_max: u32,
    /// Whether a dead letter keeps later changes of its keys back.
    pub hold: bool,
    /// The first wait before another attempt; it doubles up to `wait_max`.
    pub wait_min: Duration,
    /// The longest wait before another attempt.
    pub wait_max: Duration,
    /// So many changes at most; then the sink blocks.
    pub changes_max: u64,
    /// So many bytes of rows at most; then the sink blocks.
    pub bytes_max: u64,
}

/// Why a change is parked.
#[derive(Clone, Debug)]
pub enum Why {
    /// It shares a key with one that waits.
    Behind,
    /// The target refused it.
    Refused(String),
    /// A rule failed on it: attempts cannot help.
    Failed(String),
    /// Its schema breaks what readers need; it waits until somebody accepts that.
    Held(String),
    /// A person gave it up; it keeps nothing back.
    Skipped(String),
    /// The target gave it up after so many attempts.
    GivenUp(u32, String),
    /// The target has it, as if sent with this retry, and later changes of its keys wait behind it.
    SetAside(u64),
}

/// Where a sink stands whose lot is opened.
#[derive(Clone, Copy, Debug)]
pub struct Stand<'a> {
    /// What is parked from there on comes again, and is judged again.
    pub cursor: u64,
    /// The last retry that the sink has for certain.
    pub retry_seq: u64,
    /// Beyond the cursor, but done: from an offset to the one after the last. What is parked of it
    /// stays.
    pub done: &'a [(u64, u64)],
    /// Retried changes that the target has taken, and that wait for its verdict; in order.
    pub out: &'a [u64],
}

/// The next attempt of a change that the target has.
const NEVER: Timestamp = Timestamp(i64::MAX);

/// The parked changes of one sink. What it does in memory is durable after [`Lot::save`], which
/// comes before any progress that passes it.
#[derive(Debug)]
pub struct Lot {
    sink: String,
    parking: Parking,
    policy: Policy,
    index: Index,
    unsaved: Vec<Parked>,
    passed: Vec<(u64, u64)>,
    refused: Vec<Refused>,
    /// When something may be due; `None`: nothing will be, by itself.
    wake: Option<Timestamp>,
}

#[derive(Debug)]
struct Parked {
    change: Change,
    keys: Keys,
    state: State,
    attempts: u32,
    error: String,
    at: Timestamp,
    next_at: Timestamp,
    retry_seq: Option<u64>,
}

/// Another refusal of a parked change.
#[derive(Debug)]
struct Refused {
    offset: u64,
    state: State,
    attempts: u32,
    error: String,
    at: Timestamp,
    next_at: Timestamp,
}

impl Lot {
    /// The lot of `sink`.
    pub async fn open(
        parking: &Parking,
        sink: &str,
        policy: Policy,
        stand: Stand<'_>,
    ) -> Result<Self> {
        let failed = |error| failed("read", sink, error);
        let rows = sqlx::query(
            "SELECT offset, state, room, keys, attempts, next_at, bytes, superseded, retry_seq
             FROM parked WHERE sink = ?",
        )
        .bind(sink)
        .fetch_all(&parking.pool)
        .await
        .map_err(failed)?;
        let (mut index, mut gone, mut open) = (Index::default(), Vec::new(), Vec::new());
        for row in &rows {
            let (offset, entry) = entry(row, policy.hold).map_err(failed)?;
            let sent: Option<i64> = row.try_get("retry_seq").map_err(failed)?;
            let done = within(stand.done, offset);
            match sent.map(unsigned) {
                _ if offset >= stand.cursor && !done => gone.push(offset),
                Some(sent) if sent <= stand.retry_seq => {
                    match stand.out.binary_search(&offset).is_ok() {
                        true => index.insert(offset, Entry { next_at: NEVER, ..entry }),
                        false => gone.push(offset),
                    }
                }
                sent => {
                    open.extend(sent.map(|_| offset));
                    index.insert(offset, entry);
                }
            }
        }
        // Nothing is written where nothing is to be: the disk may be full.
        parking.tidy(sink, &gone, &open).await?;
        Ok(Self {
            sink: sink.to_owned(),
            parking: parking.clone(),
            policy,
            index,
            unsaved: Vec::new(),
            passed: Vec::new(),
            refused: Vec::new(),
            wake: Some(Timestamp(0)),
        })
    }

    /// Whether nothing keeps any change back, so that no key needs to be looked at.
    pub fn is_idle(&self) -> bool {
        self.index.is_idle()
    }

    /// Whether a dead letter keeps later changes of its keys back.
    pub fn is_holding(&self) -> bool {
        self.policy.hold
    }

    /// Whether the change at `offset` is parked.
    pub fn contains(&self, offset: u64) -> bool {
        self.index.get(offset).is_some()
    }

    /// Of changes that a target has for another attempt, those of which the lot knows nothing, or
    /// that somebody edited since.
    pub fn unknown(&self, out: &[u64]) -> Vec<u64> {
        let is_out =
            |offset: u64| self.index.get(offset).is_some_and(|entry| entry.next_at == NEVER);
        out.iter().copied().filter(|offset| !is_out(*offset)).collect()
    }

    /// How many changes are parked, how many of them are dead letters, and their bytes.
    pub fn counts(&self) -> (u64, u64, u64) {
        (self.index.len() as u64, self.index.dead() as u64, self.index.bytes())
    }

    /// Whether the lot is so full that people should know.
    pub fn alarms(&self) -> bool {
        let (changes, _, bytes) = self.counts();
        let near = |level: u64, limit: u64| level.saturating_mul(100) >= limit * ALARM;
        near(changes, self.policy.changes_max) || near(bytes, self.policy.bytes_max)
    }

    /// Whether a change with these keys must wait behind one that is parked.
    pub fn blocks(&self, keys: &Keys) -> bool {
        self.index.blocks(keys)
    }

    /// Notes that a change with these keys goes past the released dead letters of its keys.
    pub fn passes(&mut self, keys: &Keys, offset: u64) {
        for dead in self.index.passed_by(keys) {
            self.index.supersede(dead);
            self.passed.push((dead, offset));
        }
    }

    /// Parks a change, which keeps its order by `keys`. A full lot is an error of class `Retry`:
    /// the sink waits until somebody makes room.
    pub fn park(&mut self, change: Change, keys: Keys, why: Why) -> Result<()> {
        let bytes = change.bytes() as u64;
        self.check_room(bytes)?;
        let now = Timestamp::now();
        let (skipped, held) = (matches!(why, Why::Skipped(_)), matches!(why, Why::Held(_)));
        let retry_seq = if let Why::SetAside(seq) = why { Some(seq) } else { None };
        let (state, attempts, error) = match why {
            Why::Behind => (State::Parked, 0, "waits behind an earlier change of its key".into()),
            Why::Refused(error) if self.policy.attempts_max <= 1 => (State::Dead, 1, error),
            Why::Refused(error) => (State::Parked, 1, error),
            Why::Failed(error) => (State::Dead, 1, error),
            Why::Held(error) => (State::Parked, 0, error),
            Why::Skipped(error) => (State::Dead, 0, error),
            Why::GivenUp(attempts, error) => (State::Dead, attempts, error),
            Why::SetAside(_) => (State::Parked, 0, "has no end yet, and others wait for it".into()),
        };
        let wait = match attempts {
            _ if held => self.policy.wait_max,
            0 => Duration::ZERO,
            attempts => self.wait(attempts),
        };
        let next_at = if retry_seq.is_some() { NEVER } else { after(now, wait) };
        let entry = Entry {
            keys: keys.clone(),
            state,
            attempts,
            next_at,
            bytes,
            holds: state == State::Parked || self.policy.hold && !skipped,
            superseded: false,
        };
        self.index.insert(change.offset, entry);
        if (attempts > 0 || held) && state == State::Parked {
            self.wake_at(next_at);
        }
        let at = now;
        self.unsaved.push(Parked { change, keys, state, attempts, error, at, next_at, retry_seq });
        Ok(())
    }

    fn check_room(&self, bytes: u64) -> Result<()> {
        let (changes, _, held) = self.counts();
        let Policy { changes_max, bytes_max, .. } = self.policy;
        if changes < changes_max && (held == 0 || held + bytes <= bytes_max) {
            return Ok(());
        }
        Err(Error::retry(format!(
            "sink {} has {changes} parked changes of {held} bytes; parked_changes_max is \
             {changes_max} and parked_bytes_max {bytes_max}",
            self.sink
        ))
        .remedy(format!(
            "see why with `walrace dlq list --sink {}`, then retry or drop them, or raise it",
            self.sink
        )))
    }

    /// Whether everything is durable.
    pub fn is_saved(&self) -> bool {
        self.unsaved.is_empty() && self.passed.is_empty() && self.refused.is_empty()
    }

    /// Makes durable what was parked, passed and refused again.
    pub async fn save(&mut self) -> Result<()> {
        if self.is_saved() {
            return Ok(());
        }
        let failed = |error| failed("park changes of", &self.sink, error);
        let mut transaction = self.parking.pool.begin().await.map_err(failed)?;
        for parked in &self.unsaved {
            sqlx::query(
                "INSERT INTO parked (sink, offset, state, room, keys, table_name, op, bytes, change,
                     attempts, error, first_at, last_at, next_at, retry_seq)
                 VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
                 ON CONFLICT (sink, offset) DO UPDATE SET state = excluded.state,
                     keys = excluded.keys,
                     attempts = excluded.attempts, error = excluded.error,
                     last_at = excluded.last_at, next_at = excluded.next_at,
                     retry_seq = excluded.retry_seq",
            )
            .bind(&self.sink)
            .bind(integer(parked.change.offset))
            .bind(parked.state.word())
            .bind(parked.keys.room.to_be_bytes().to_vec())
            .bind(parked.keys.to_bytes())
            .bind(parked.change.table.as_ref().map(|table| table.full_name()))
            .bind(parked.change.op.word())
            .bind(integer(parked.change.bytes() as u64))
            .bind(stored::to_text(&parked.change)?)
            .bind(parked.attempts)
            .bind(&parked.error)
            .bind(parked.at.0)
            .bind(parked.at.0)
            .bind(parked.next_at.0)
            .bind(parked.retry_seq.map(integer))
            .execute(&mut *transaction)
            .await
            .map_err(failed)?;
        }
        for (dead, by) in &self.passed {
            sqlx::query("UPDATE parked SET superseded = ? WHERE sink = ? AND offset = ?")
                .bind(integer(*by))
                .bind(&self.sink)
                .bind(integer(*dead))
                .execute(&mut *transaction)
                .await
                .map_err(failed)?;
        }
        for refused in &self.refused {
            refused.save(&self.sink, &mut transaction).await.map_err(failed)?;
        }
        transaction.commit().await.map_err(failed)?;
        self.unsaved.clear();
        self.passed.clear();
        self.refused.clear();
        Ok(())
    }

    /// When something may be due.
    pub fn wake(&self) -> Option<Timestamp> {
        self.wake
    }

    fn wake_at(&mut self, at: Timestamp) {
        self.wake = Some(self.wake.map_or(at, |wake| wake.min(at)));
    }

    /// Has nothing be due for a while.
    pub fn put_off(&mut self, wait: Duration) {
        self.wake = Some(after(Timestamp::now(), wait));
    }

    /// The offsets of the changes whose turn it is, `limits` at most.
    pub fn due(&mut self, limits: Limits) -> Due {
        let now = Timestamp::now();
        if self.wake.is_none_or(|wake| wake > now) {
            return Due::default();
        }
        let began = Instant::now();
        let (due, next) = self.index.due(now, limits);
        let rested = after(now, began.elapsed() * LOOKS);
        self.wake = match due.is_empty() {
            _ if due.more => Some(now),
            true => next.map(|next| next.max(rested)),
            false => Some(rested), // who knows what becomes of them
        };
        due
    }

    /// The changes at these offsets, in their order.
    pub async fn load(&self, offsets: &[u64]) -> Result<Vec<Change>> {
        let failed = |error| failed("read", &self.sink, error);
        let mut changes = Vec::with_capacity(offsets.len());
        for offset in offsets {
            let row = sqlx::query("SELECT change FROM parked WHERE sink = ? AND offset = ?")
                .bind(&self.sink)
                .bind(integer(*offset))
                .fetch_one(&self.parking.pool)
                .await
                .map_err(failed)?;
            let text: String = row.try_get(0).map_err(failed)?;
            changes.push(stored::from_text(&text)?);
        }
        Ok(changes)
    }

    /// The keys by which the change at `offset` keeps its order.
    pub fn keys(&self, offset: u64) -> Option<&Keys> {
        self.index.get(offset).map(|entry| &entry.keys)
    }

    /// Adds to the keys of every parked change those that it has by the rules of today, as `keys`
    /// tells them: what was parked under other rules keeps its order by both.
    pub async fn add_keys(&mut self, mut keys: impl FnMut(&Change) -> Keys) -> Result<()> {
        let offsets: Vec<u64> = self.index.offsets().collect();
        for offset in offsets {
            let Some(change) = self.load(&[offset]).await?.pop() else { continue };
            let Some(entry) = self.index.get(offset).cloned() else { continue };
            let mut joined = entry.keys.clone();
            joined.join(keys(&change));
            if joined == entry.keys {
                continue;
            }
            sqlx::query("UPDATE parked SET keys = ? WHERE sink = ? AND offset = ?")
                .bind(joined.to_bytes())
                .bind(&self.sink)
                .bind(integer(offset))
                .execute(&self.parking.pool)
                .await
                .map_err(|error| failed("write down the keys of", &self.sink, error))?;
            self.index.insert(offset, Entry { keys: joined, ..entry });
        }
        Ok(())
    }

    /// Whether a later change of its key was delivered already.
    pub fn is_superseded(&self, offset: u64) -> bool {
        self.index.get(offset).is_some_and(|entry| entry.superseded)
    }

    /// Writes down, before it is sent, which retry these go with.
    pub async fn intend(&self, offsets: &[u64], retry_seq: u64) -> Result<()> {
        let failed = |error| failed("write down a retry of", &self.sink, error);
        let mut transaction = self.parking.pool.begin().await.map_err(failed)?;
        for offset in offsets {
            sqlx::query("UPDATE parked SET retry_seq = ? WHERE sink = ? AND offset = ?")
                .bind(integer(retry_seq))
                .bind(&self.sink)
                .bind(integer(*offset))
                .execute(&mut *transaction)
                .await
                .map_err(failed)?;
        }
        transaction.commit().await.map_err(failed)
    }

    /// Takes back what `intend` wrote: the target has refused the run as a whole.
    pub async fn forget_sent(&self, offsets: &[u64]) -> Result<()> {
        self.parking.tidy(&self.sink, &[], offsets).await
    }

    /// These were sent to a target that tells later what becomes of them.
    pub async fn sent(&mut self, offsets: &[u64]) -> Result<()> {
        self.set_next(offsets, "UPDATE parked SET next_at = ?", NEVER).await
    }

    /// The target has let go of it without an outcome: it is tried again in its turn.
    pub async fn recall(&mut self, offset: u64) -> Result<()> {
        let now = Timestamp::now();
        self.set_next(&[offset], "UPDATE parked SET retry_seq = NULL, next_at = ?", now).await?;
        self.wake_at(now);
        Ok(())
    }

    async fn set_next(&mut self, offsets: &[u64], sql: &str, next_at: Timestamp) -> Result<()> {
        let failed = |error| failed("write down where they are of", &self.sink, error);
        let sql = format!("{sql} WHERE sink = ? AND offset = ?");
        let mut transaction = self.parking.pool.begin().await.map_err(failed)?;
        for offset in offsets {
            sqlx::query(sqlx::AssertSqlSafe(sql.clone()))
                .bind(next_at.0)
                .bind(&self.sink)
                .bind(integer(*offset))
                .execute(&mut *transaction)
                .await
                .map_err(failed)?;
        }
        transaction.commit().await.map_err(failed)?;
        for offset in offsets {
            if let Some(entry) = self.index.get(*offset).cloned() {
                self.index.insert(*offset, Entry { next_at, ..entry });
            }
        }
        Ok(())
    }

    /// These are delivered, or left out by a rule: they leave the lot.
    pub async fn delivered(&mut self, offsets: &[u64]) -> Result<()> {
        if offsets.is_empty() {
            return Ok(());
        }
        let failed = |error| failed("remove delivered changes of", &self.sink, error);
        let mut transaction = self.parking.pool.begin().await.map_err(failed)?;
        for offset in offsets {
            sqlx::query("DELETE FROM parked WHERE sink = ? AND offset = ?")
                .bind(&self.sink)
                .bind(integer(*offset))
                .execute(&mut *transaction)
                .await
                .map_err(failed)?;
        }
        transaction.commit().await.map_err(failed)?;
        for offset in offsets {
            self.index.remove(*offset);
        }
        self.wake_at(Timestamp::now());
        Ok(())
    }

    /// The change at `offset` was refused again, or a rule failed on it: it waits longer, or is a
    /// dead letter.
    pub fn refused(&mut self, offset: u64, why: Why) {
        let Some(entry) = self.index.get(offset).cloned() else { return };
        let held = matches!(why, Why::Held(_));
        let (attempts, dead, error) = match why {
            Why::Behind | Why::SetAside(_) => return,
            Why::GivenUp(attempts, error) => (entry.attempts + attempts, true, error),
            Why::Held(error) => (entry.attempts, false, error),
            Why::Failed(error) | Why::Skipped(error) => (entry.attempts + 1, true, error),
            Why::Refused(error) => {
                (entry.attempts + 1, entry.attempts + 1 >= self.policy.attempts_max, error)
            }
        };
        let now = Timestamp::now();
        let wait = if held { self.policy.wait_max } else { self.wait(attempts) };
        let next_at = after(now, wait);
        let state = if dead { State::Dead } else { State::Parked };
        self.refused.push(Refused { offset, state, attempts, error, at: now, next_at });
        let released = dead && !self.policy.hold;
        let holds = entry.holds && !released;
        self.index.insert(offset, Entry { state, attempts, next_at, holds, ..entry });
        self.wake_at(if released { now } else { next_at });
    }

    fn wait(&self, attempts: u32) -> Duration {
        let doubled = self.policy.wait_min.saturating_mul(1 << attempts.saturating_sub(1).min(20));
        doubled.min(self.policy.wait_max)
    }
}

impl Refused {
    async fn save(&self, sink: &str, connection: &mut SqliteConnection) -> sqlx::Result<()> {
        sqlx::query(
            "UPDATE parked SET state = ?, attempts = ?, error = ?, last_at = ?, next_at = ?,
                 retry_seq = NULL
             WHERE sink = ? AND offset = ?",
        )
        .bind(self.state.word())
        .bind(self.attempts)
        .bind(&self.error)
        .bind(self.at.0)
        .bind(self.next_at.0)
        .bind(sink)
        .bind(integer(self.offset))
        .execute(connection)
        .await
        .map(|_| ())
    }
}

/// Whether one of the ranges, which are in order, holds `offset`.
pub fn within(ranges: &[(u64, u64)], offset: u64) -> bool {
    let after = ranges.partition_point(|(from, _)| *from <= offset);
    let last = after.checked_sub(1).and_then(|index| ranges.get(index));
    last.is_some_and(|(_, to)| offset < *to)
}

fn after(now: Timestamp, wait: Duration) -> Timestamp {
    let wait = i64::try_from(wait.as_micros()).unwrap_or(i64::MAX);
    Timestamp(now.0.saturating_add(wait))
}

fn entry(row: &sqlx::sqlite::SqliteRow, hold: bool) -> sqlx::Result<(u64, Entry)> {
    let dead = row.try_get::<String, _>("state")? == State::Dead.word();
    let superseded = row.try_get::<Option<i64>, _>("superseded")?.is_some();
    let entry = Entry {
        keys: keys(row)?,
        state: if dead { State::Dead } else { State::Parked },
        attempts: row.try_get("attempts")?,
        next_at: Timestamp(row.try_get("next_at")?),
        bytes: unsigned(row.try_get("bytes")?),
        holds: !superseded && (!dead || hold),
        superseded,
    };
    Ok((unsigned(row.try_get("offset")?), entry))
}

/// The keys of a row of the file.
pub(super) fn keys(row: &sqlx::sqlite::SqliteRow) -> sqlx::Result<Keys> {
    let (room, keys): (Vec<u8>, Vec<u8>) = (row.try_get("room")?, row.try_get("keys")?);
    let room = room.first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes));
    Ok(Keys::from_bytes(room, &keys))
}
