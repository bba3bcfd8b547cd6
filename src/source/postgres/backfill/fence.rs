//! Where chunks and the stream meet: a chunk's rows enter the stream at the watermark that closes
//! its fence, without those that changed since the watermark that opened it.
//!
//! ```text
//!  stream   ── mark: opens ── change of k1 ── change of k7 ── mark: closes ── k2 k3 k4 k5 k6 ──►
//!                   │                                               ▲
//!  reader           └─► snapshot ─► k1 k2 k3 k4 k5 k6 ─► offer ─► commit
//! ```
//!
//! A commit is in the log before it is visible: where one from before the opening mark is not in
//! the snapshot, the chunk shows an older state than the journal has, and is read again
//! (docs/adr/0006-backfill-by-blocks.md).
//!
//! States of a fence: *registered*, *open* (its first mark has passed), *offered* (its rows are
//! here), then one [`Verdict`].

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use uuid::Uuid;

use super::{
    copies::Copies,
    mark::Mark,
    snapshot::Snapshot,
    spool::{Spool, Spooled},
};
use crate::{
    change::{Backfill, Batch, Before, Change, Key, Lsn, Op, Position, Row, Transaction},
    error::{Error, Result},
    schema::Table,
    source::Source,
};

/// A row was taken away by a transaction that shows, and added by an earlier one that does not.
const UNORDERED: &str = "transactions became visible in another order than they were committed";
/// Rows that are on disk are passed on in batches of this size.
const SPOOLED_BYTES: usize = 4 << 20;
/// Keys that change inside one fence: beyond this the chunk is read again, later.
const KEYS_MAX: usize = 500_000;
/// Transactions whose commit was seen and which a snapshot may lack: beyond this their memory
/// begins anew, and readers wait for those that write to their table.
const COMMITTED_MAX: usize = 1_000_000;

/// Rows of one chunk.
#[derive(Debug)]
pub struct Chunk {
    /// The table as it was when they were read.
    pub table: Arc<Table>,
    /// The backfill that they belong to.
    pub backfill: Backfill,
    /// What they show.
    pub snapshot: Snapshot,
    /// The rows.
    pub rows: Rows,
}

/// Where the rows of a chunk are.
#[derive(Debug)]
pub enum Rows {
    /// In memory.
    Here(Vec<Row>),
    /// On disk: all rows of a table that has no key.
    Spooled(Spool),
}

/// What became of a chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is in the journal, durably.
    Appended,
    /// It has to be read again, and why.
    Again(String),
    /// Capture ended, or began anew, before it was there: read it again.
    Lost,
}

/// The fences of one source, shared by its capture loop and the readers of its backfills.
#[derive(Debug)]
pub struct Fences {
    lineage: Uuid,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Whether a capture loop passes its batches.
    capturing: bool,
    /// The number of the next fence.
    next: u64,
    fences: HashMap<u64, Fence>,
    /// Chunks whose rows were passed on and are not durable yet, by the LSN of their mark.
    passed: Vec<(Lsn, u64)>,
    /// Commits since the memory began, where it is kept.
    committed: Option<HashMap<u32, Lsn>>,
    /// Counts the memories.
    memory: u64,
    /// A snapshot that was judged, and the next fence's number when it came.
    judged: Option<(u64, Snapshot)>,
}

#[derive(Debug)]
struct Fence {
    table: u32,
    /// The chunk of the same part that must be there before.
    after: Option<u64>,
    /// The memory of commits under which it was registered.
    memory: u64,
    opened: Option<Lsn>,
    keys: HashSet<Key>,
    /// Where the table has no key: copies of whole rows.
    copies: Copies,
    /// Tables as changes inside it have them.
    tables: Vec<Arc<Table>>,
    /// Something concerned the table as a whole, or too many of its rows.
    whole: Option<&'static str>,
    chunk: Option<Chunk>,
    verdict: Option<Verdict>,
}

impl Fences {
    /// Of the source whose journal has this lineage.
    pub fn new(lineage: Uuid) -> Self {
        // Marks of an earlier process come again; their numbers must not be those of a new fence.
        let state = State { next: fastrand::u64(..) >> 12, ..State::default() };
        Self { lineage, state: Mutex::new(state), changed: Condvar::new() }
    }

    /// The journal's lineage, which marks carry.
    pub fn lineage(&self) -> Uuid {
        self.lineage
    }

    /// Has the batches of `source` pass here on their way to the journal.
    pub fn attach(self: &Arc<Self>, source: Box<dyn Source>) -> Box<dyn Source> {
        let mut state = self.lock();
        state.lose();
        state.capturing = true;
        drop(state);
        self.changed.notify_all();
        Box::new(Fenced { source, fences: Arc::clone(self), draining: None })
    }

    /// Remembers commits from now on; the number of that memory. A reader that meets a new number
    /// waits for the transactions that write to its table at that time: they may have committed
    /// before.
    pub fn remember(&self) -> u64 {
        let mut state = self.lock();
        if state.committed.is_none() {
            state.committed = Some(HashMap::new());
            state.memory += 1;
        }
        state.memory
    }

    /// Ends the memory of commits: nothing is being read.
    pub fn forget(&self) {
        let mut state = self.lock();
        (state.committed, state.judged) = (None, None);
    }

    /// Registers a fence for rows that are published as table `table`, behind the chunk of the
    /// fence `after`; its number. `None` while nothing is captured.
    pub fn register(&self, table: u32, after: Option<u64>) -> Option<u64> {
        let mut state = self.lock();
        if !state.capturing {
            return None;
        }
        let number = state.next;
        state.next += 1;
        let fence = Fence {
            table,
            after,
            memory: state.memory,
            opened: None,
            keys: HashSet::new(),
            copies: Copies::default(),
            tables: Vec::new(),
            whole: None,
            chunk: None,
            verdict: None,
        };
        state.fences.insert(number, fence);
        Some(number)
    }

    /// Tells which transactions the rows of a fence show, long before they are all here.
    pub fn show(&self, fence: u64, snapshot: &Snapshot) {
        if let Some(fence) = self.lock().fences.get_mut(&fence) {
            fence.copies.show(snapshot);
        }
    }

    /// Brings the rows of a fence; before its closing mark is committed.
    pub fn offer(&self, fence: u64, chunk: Chunk) {
        if let Some(fence) = self.lock().fences.get_mut(&fence) {
            fence.chunk = Some(chunk);
        }
    }

    /// Waits for what becomes of a chunk; `None` where that takes longer than `limit`.
    pub fn verdict(&self, fence: u64, limit: Duration) -> Option<Verdict> {
        let deadline = Instant::now() + limit;
        let mut state = self.lock();
        loop {
            match state.fences.get(&fence).map(|fence| &fence.verdict) {
                None => return Some(Verdict::Lost),
                Some(Some(verdict)) => return Some(verdict.clone()),
                Some(None) => {}
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Has a chunk that was not passed on yet read again, whatever becomes of its marks.
    pub fn give_up(&self, fence: u64) {
        let mut state = self.lock();
        let passed = state.passed.iter().any(|(_, passed)| *passed == fence);
        if let Some(fence) = state.fences.get_mut(&fence).filter(|f| f.verdict.is_none() && !passed)
        {
            fence.verdict = Some(Verdict::Lost);
        }
    }

    /// Takes a fence away; its marks mean nothing any more.
    pub fn withdraw(&self, fence: u64) {
        self.lock().fences.remove(&fence);
    }

    /// Waits until something is captured, at most `limit`.
    pub fn wait_for_capture(&self, limit: Duration) -> bool {
        let waited = self.changed.wait_timeout_while(self.lock(), limit, |state| !state.capturing);
        waited.unwrap_or_else(PoisonError::into_inner).0.capturing
    }

    /// Adds the rows of each chunk that a mark closes. Where these are on disk, the batch ends
    /// there, and what is left of it comes back for later.
    fn pass(&self, batch: Batch) -> Result<(Batch, Option<Draining>)> {
        let mut state = self.lock();
        if state.committed.is_none() && !batch.changes.iter().any(Change::is_watermark) {
            return Ok((batch, None));
        }
        let mut passed = Vec::with_capacity(batch.changes.len());
        let (mut judged, mut spooled) = (false, None);
        let mut changes = batch.changes.into_iter();
        for change in changes.by_ref() {
            if change.closes_transaction {
                state.remember(change.transaction);
            }
            match Mark::of(&change).filter(|mark| mark.lineage == self.lineage) {
                None => {
                    state.note(&change);
                    passed.push(change);
                }
                Some(mark) => {
                    judged |= mark.closes.is_some();
                    spooled = state.mark(mark, change, &mut passed)?;
                }
            }
            if spooled.is_some() {
                break;
            }
        }
        drop(state);
        if judged {
            self.changed.notify_all();
        }
        let rest = Batch { changes: changes.collect(), position: batch.position };
        Ok(match spooled {
            Some((rows, next)) => {
                let draining = Draining { rows, next, rest };
                (Batch { changes: passed, position: None }, Some(draining))
            }
            None => (Batch { changes: passed, position: rest.position }, None),
        })
    }

    /// All below `position` is durable.
    fn settle(&self, position: Position) {
        let mut state = self.lock();
        if state.passed.is_empty() {
            return;
        }
        let State { passed, fences, .. } = &mut *state;
        passed.retain(|(mark, fence)| {
            let durable = *mark < position.lsn;
            if let Some(fence) = fences.get_mut(fence).filter(|_| durable) {
                fence.verdict = Some(Verdict::Appended);
            }
            !durable
        });
        drop(state);
        self.changed.notify_all();
    }

    fn end(&self) {
        let mut state = self.lock();
        state.lose();
        state.capturing = false;
        drop(state);
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// What is on its way has to be read again.
    fn lose(&mut self) {
        self.passed.clear();
        for fence in self.fences.values_mut().filter(|fence| fence.verdict.is_none()) {
            fence.verdict = Some(Verdict::Lost);
        }
    }

    fn remember(&mut self, transaction: Transaction) {
        let Some(committed) = &mut self.committed else { return };
        committed.insert(transaction.xid, transaction.commit_lsn);
        if committed.len() > COMMITTED_MAX {
            committed.clear();
            self.memory += 1;
        }
    }

    /// Notes whose rows a change concerns.
    fn note(&mut self, change: &Change) {
        let Some(table) = &change.table else { return };
        let mut keys = None;
        let open = |fence: &&mut Fence| fence.table == table.oid && fence.opened.is_some();
        for fence in self.fences.values_mut().filter(open) {
            if fence.whole.is_some() || fence.verdict.is_some() {
                continue;
            }
            let keys = keys.get_or_insert_with(|| change.row_keys());
            if change.op == Op::Truncate {
                fence.whole = Some("its table was truncated");
            } else if keys.is_whole() {
                fence.copies.note(change);
            }
            fence.keys.extend(&keys.rows);
            if fence.keys.len() + fence.copies.len() > KEYS_MAX {
                fence.whole = Some("too many rows of its table changed meanwhile");
            }
            if !fence.tables.iter().any(|known| Arc::ptr_eq(known, table)) {
                fence.tables.push(Arc::clone(table));
            }
        }
    }

    /// Passes a mark on, with the rows of the chunk that it closes, or gives those that are on
    /// disk. A mark that closes a chunk in the journal means that the chunk is there.
    fn mark(
        &mut self,
        mut mark: Mark,
        mut change: Change,
        passed: &mut Vec<Change>,
    ) -> Result<Option<(Spooled, Change)>> {
        let closes = mark.closes.as_ref().map(|closes| closes.fence);
        let accepted = closes.and_then(|fence| self.close(fence, change.transaction));
        if let Some(fence) = mark.opens.and_then(|fence| self.fences.get_mut(&fence)) {
            fence.opened = Some(change.transaction.commit_lsn);
        }
        if closes.is_some() && accepted.is_none() {
            mark.closes = None;
            change.message = change.message.map(|message| {
                let content = serde_json::to_vec(&mark).unwrap_or_default().into();
                Arc::new(crate::change::Message { content, ..(*message).clone() })
            });
        }
        let (transaction, index) = (change.transaction, change.index + 1);
        passed.push(change);
        let Some((chunk, keys, gone)) = accepted else { return Ok(None) };
        let like = Change { index, ..read(&chunk, transaction) };
        match chunk.rows {
            Rows::Here(rows) => {
                passed.extend(reads(&like, without_changed(rows, &like, &keys)));
                Ok(None)
            }
            Rows::Spooled(spool) => Ok(Some((spool.read(gone)?, like))),
        }
    }

    /// Judges the chunk of a fence; what is to be passed on, if it may be.
    fn close(&mut self, number: u64, transaction: Transaction) -> Option<Accepted> {
        let before = self.fences.get(&number)?.after;
        let follows = before.is_none_or(|before| self.is_accepted(before));
        let fence = self.fences.get_mut(&number)?;
        if fence.verdict.is_some() {
            return None;
        }
        let chunk = fence.chunk.take();
        let committed = self.committed.as_ref().filter(|_| fence.memory == self.memory);
        let again = match (&chunk, fence.opened) {
            _ if !follows => Some("the chunk before it has to be read again".to_owned()),
            (None, _) | (_, None) => Some("its marks came without its rows".to_owned()),
            (Some(chunk), Some(opened)) => fence
                .whole
                .map(str::to_owned)
                .or_else(|| fence.other_key(&chunk.table))
                .or_else(|| unseen(committed, &chunk.snapshot, opened))
                .or_else(|| fence.copies.left_out().is_none().then(|| UNORDERED.to_owned())),
        };
        if let Some(why) = again {
            fence.verdict = Some(Verdict::Again(why));
            return None;
        }
        let chunk = chunk?;
        let (keys, gone) =
            (std::mem::take(&mut fence.keys), fence.copies.left_out().unwrap_or_default());
        self.prune(&chunk.snapshot);
        self.passed.push((transaction.commit_lsn, number));
        Some((chunk, keys, gone))
    }

    fn is_accepted(&self, fence: u64) -> bool {
        let passed = self.passed.iter().any(|(_, passed)| *passed == fence);
        let fence = self.fences.get(&fence);
        passed || fence.is_some_and(|fence| fence.verdict == Some(Verdict::Appended))
    }

    /// Forgets commits that every snapshot to come shows: those in one that was taken before any
    /// fence was registered that is not judged yet.
    fn prune(&mut self, snapshot: &Snapshot) {
        let open = self.fences.iter().filter(|(_, fence)| fence.verdict.is_none());
        let oldest = open.map(|(number, _)| *number).min().unwrap_or(u64::MAX);
        let usable = self.judged.take_if(|(number, _)| *number <= oldest);
        if let (Some((_, seen)), Some(committed)) = (usable, &mut self.committed) {
            committed.retain(|xid, _| !seen.sees(*xid));
        }
        if self.judged.is_none() {
            self.judged = Some((self.next, snapshot.clone()));
        }
    }
}

/// A chunk whose rows may be passed on, the keys that changed inside its fence, and whole rows that
/// are to be left out.
type Accepted = (Chunk, HashSet<Key>, HashMap<Key, u32>);

impl Fence {
    /// Whether changes inside the fence had another key than the chunk's table.
    fn other_key(&self, table: &Table) -> Option<String> {
        let key = names(table);
        let other = self.tables.iter().any(|seen| names(seen) != key);
        other.then(|| "the key of its table changed meanwhile".to_owned())
    }
}

fn names(table: &Table) -> Vec<&str> {
    let columns = table.key_columns().into_iter();
    columns.filter_map(|index| Some(table.columns.get(index)?.name.as_str())).collect()
}

/// Whether a transaction that the journal had before the fence is not in the snapshot.
fn unseen(
    committed: Option<&HashMap<u32, Lsn>>,
    snapshot: &Snapshot,
    opened: Lsn,
) -> Option<String> {
    let Some(committed) = committed else { return Some("commits were not remembered".to_owned()) };
    let late = committed.iter().find(|(xid, lsn)| **lsn < opened && !snapshot.sees(**xid))?;
    Some(format!("transaction {} is committed and not visible yet", late.0))
}

/// The rows but for those whose keys changed inside the fence: their changes are newer.
fn without_changed(mut rows: Vec<Row>, like: &Change, keys: &HashSet<Key>) -> Vec<Row> {
    if !keys.is_empty() {
        let mut probe = like.clone();
        rows.retain(|row| {
            probe.after = Some(row.clone());
            !probe.row_keys().rows.iter().any(|key| keys.contains(key))
        });
    }
    rows
}

fn read(chunk: &Chunk, transaction: Transaction) -> Change {
    Change {
        offset: 0,
        op: Op::Read,
        index: 0,
        closes_transaction: true,
        transaction,
        table: Some(Arc::clone(&chunk.table)),
        before: Before::Nothing,
        after: None,
        message: None,
        shaped: None,
        backfill: Some(chunk.backfill),
    }
}

/// The rows as changes of the mark's transaction, behind it. Each ends it: who leaves out the rows
/// of a backfill must not wait for an end among them.
fn reads(like: &Change, rows: Vec<Row>) -> impl Iterator<Item = Change> {
    rows.into_iter().zip(like.index..).map(|(row, index)| Change {
        index,
        after: Some(row),
        ..like.clone()
    })
}

/// Rows on disk that are passed on, and what comes behind them.
struct Draining {
    rows: Spooled,
    next: Change,
    rest: Batch,
}

/// A source whose batches pass the fences.
struct Fenced {
    source: Box<dyn Source>,
    fences: Arc<Fences>,
    draining: Option<Draining>,
}

#[async_trait]
impl Source for Fenced {
    async fn next(&mut self) -> Result<Batch> {
        let batch = match self.draining.take() {
            None => self.source.next().await?,
            Some(mut draining) => match draining.rows.next(SPOOLED_BYTES)? {
                None => draining.rest,
                Some(rows) => {
                    let changes: Vec<_> = reads(&draining.next, rows).collect();
                    draining.next.index += u32::try_from(changes.len()).unwrap_or(u32::MAX);
                    self.draining = Some(draining);
                    return Ok(Batch { changes, position: None });
                }
            },
        };
        let (batch, draining) = self.fences.pass(batch)?;
        self.draining = draining;
        Ok(batch)
    }

    async fn confirm(&mut self, position: Position) -> Result<()> {
        self.fences.settle(position);
        self.source.confirm(position).await
    }
}

impl Drop for Fenced {
    fn drop(&mut self) {
        self.fences.end();
    }
}

/// That nothing is captured now.
pub(super) fn not_capturing() -> Error {
    Error::retry("the backfill waits for the source, which is not captured now")
}

#[cfg(test)]
mod tests {
    use super::{super::mark::Closes, *};
    use crate::{
        change::{Message, Value},
        schema::{Column, Identity, Type},
        source::postgres::backfill::Place,
    };

    const TABLE: u32 = 7;

    fn table(key: &str) -> Arc<Table> {
        let column = |name: &str| Column {
            name: name.into(),
            ty: Type::base(25, -1),
            primary_key: name == key,
            identity: name == key,
            nullable: None,
        };
        let columns = vec![column("id"), column("v")];
        let (schema, name) = ("public".into(), "t".into());
        Arc::new(Table { oid: TABLE, schema, name, identity: Identity::Default, columns })
    }

    fn row(id: &str) -> Row {
        Row::from_values([Value::Text(id.as_bytes()), Value::Null])
    }

    /// A change of a transaction of its own: `lsn` is the commit's, and the xid as well.
    fn change(lsn: u32, id: &str) -> Change {
        let xid = lsn;
        let transaction =
            Transaction { xid, commit_lsn: Lsn(lsn.into()), ..Transaction::default() };
        let chunk = chunk(&[], "1:1:");
        Change { op: Op::Update, after: Some(row(id)), backfill: None, ..read(&chunk, transaction) }
    }

    fn chunk(ids: &[&str], snapshot: &str) -> Chunk {
        Chunk {
            table: table("id"),
            backfill: Backfill { id: 1, audience: 0 },
            snapshot: snapshot.parse().unwrap(),
            rows: Rows::Here(ids.iter().map(|id| row(id)).collect()),
        }
    }

    fn mark(fences: &Fences, lsn: u32, closes: Option<u64>, opens: Option<u64>) -> Change {
        let closes = closes.map(|fence| Closes {
            fence,
            to: Place::before(9),
            rows: 0,
            bytes: 0,
            done: false,
        });
        let (backfill, part, table) = (1, 1, "public.t".to_owned());
        let mark = Mark { lineage: fences.lineage(), backfill, part, table, closes, opens };
        let content = serde_json::to_vec(&mark).unwrap().into();
        let prefix = crate::change::WATERMARK_PREFIX.to_owned();
        let message = Message { prefix, content, transactional: true };
        let op = Op::Message;
        Change { op, table: None, after: None, message: Some(Arc::new(message)), ..change(lsn, "") }
    }

    /// What comes out of a batch: the ids of rows that were read, and whether a mark says that a
    /// chunk is there.
    fn pass(fences: &Fences, changes: Vec<Change>) -> (Vec<String>, bool) {
        let position = Some(Position { lsn: Lsn(1000), ..Position::default() });
        let (batch, _) = fences.pass(Batch { changes, position }).unwrap();
        fences.settle(Position { lsn: Lsn(1000), ..Position::default() });
        let reads = batch.changes.iter().filter(|change| change.op == Op::Read);
        let id = |change: &Change| match change.after.as_ref().unwrap().value(0) {
            Some(Value::Text(text)) => String::from_utf8(text.to_vec()).unwrap(),
            other => panic!("{other:?}"),
        };
        let closed = batch.changes.iter().filter_map(Mark::of).any(|mark| mark.closes.is_some());
        (reads.map(id).collect(), closed)
    }

    fn capturing() -> Fences {
        let fences = Fences::new(Uuid::nil());
        fences.lock().capturing = true;
        fences.remember();
        fences
    }

    fn verdict(fences: &Fences, fence: u64) -> Verdict {
        fences.verdict(fence, Duration::ZERO).unwrap()
    }

    #[test]
    fn a_row_that_changes_inside_the_fence_is_left_to_its_change() {
        let fences = capturing();
        let fence = fences.register(TABLE, None).unwrap();
        fences.offer(fence, chunk(&["1", "2", "3"], "1:100:"));
        let stream = vec![
            change(10, "1"), // before the fence: the chunk shows it
            mark(&fences, 11, None, Some(fence)),
            change(12, "2"),
            mark(&fences, 13, Some(fence), None),
            change(14, "3"),
        ];
        assert_eq!(pass(&fences, stream), (vec!["1".into(), "3".into()], true));
        assert_eq!(verdict(&fences, fence), Verdict::Appended);
    }

    #[test]
    fn a_chunk_that_lacks_a_commit_from_before_its_fence_is_read_again_and_what_follows_it_too() {
        let fences = capturing();
        let first = fences.register(TABLE, None).unwrap();
        let second = fences.register(TABLE, Some(first)).unwrap();
        fences.offer(first, chunk(&["1"], "10:100:10")); // 10 is committed and not seen
        fences.offer(second, chunk(&["2"], "11:100:"));
        let stream = vec![
            change(10, "1"),
            mark(&fences, 11, None, Some(first)),
            mark(&fences, 12, Some(first), Some(second)),
            mark(&fences, 13, Some(second), None),
        ];
        assert_eq!(pass(&fences, stream), (vec![], false));
        let Verdict::Again(why) = verdict(&fences, first) else { panic!("it was passed on") };
        assert!(why.contains("transaction 10"), "{why}");
        assert!(matches!(verdict(&fences, second), Verdict::Again(_)));
        // Where the commit lies inside the fence, its change is in the stream behind it.
        let third = fences.register(TABLE, None).unwrap();
        fences.offer(third, chunk(&["1", "2"], "21:100:21"));
        let stream = vec![
            mark(&fences, 20, None, Some(third)),
            change(21, "1"),
            mark(&fences, 22, Some(third), None),
        ];
        assert_eq!(pass(&fences, stream), (vec!["2".into()], true));
    }

    #[test]
    fn marks_of_an_earlier_process_and_a_changed_key_pass_nothing_on() {
        let fences = capturing();
        assert_eq!(pass(&fences, vec![mark(&fences, 5, Some(1), None)]), (vec![], false));
        let fence = fences.register(TABLE, None).unwrap();
        fences.offer(fence, chunk(&["1"], "1:100:"));
        let rekeyed = Change { table: Some(table("v")), ..change(12, "9") };
        let stream = vec![
            mark(&fences, 11, None, Some(fence)),
            rekeyed,
            mark(&fences, 13, Some(fence), None),
        ];
        assert_eq!(pass(&fences, stream), (vec![], false));
        assert!(matches!(verdict(&fences, fence), Verdict::Again(_)));
    }

    #[test]
    fn the_memory_of_commits_is_kept_short_and_never_shorter_than_an_open_fence_needs() {
        let fences = capturing();
        let mut before = None;
        for lsn in (10..200).step_by(10) {
            let fence = fences.register(TABLE, before).unwrap();
            fences.offer(fence, chunk(&["1"], &format!("1:{}:", lsn + 1)));
            let stream = vec![
                change(lsn, "8"),
                mark(&fences, lsn + 1, None, Some(fence)),
                mark(&fences, lsn + 2, Some(fence), None),
            ];
            assert_eq!(pass(&fences, stream).0, ["1"]);
            before = Some(fence);
        }
        let kept = fences.lock().committed.as_ref().unwrap().len();
        assert!(kept < 12, "{kept} commits are remembered");
        let lost = fences.register(TABLE, None).unwrap();
        fences.end();
        assert_eq!(verdict(&fences, lost), Verdict::Lost);
        assert_eq!(fences.register(TABLE, None), None, "nothing is captured");
    }
}
