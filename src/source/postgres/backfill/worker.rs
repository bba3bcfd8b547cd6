//! A reader of backfills: it reads one part after the other, chunk by chunk, each fenced.
//!
//! Two chunks are on their way at most: while one goes into the journal the next is read.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio_util::sync::CancellationToken;

use super::{
    super::{
        catalog::{Catalog, quote_name, quote_text},
        settings::Settings,
        wire::{Client, Purpose},
    },
    Part, Reading,
    chunk::{Pace, Rows},
    fence::{self, Chunk, Fences, Verdict, not_capturing},
    mark::{Closes, Mark},
    place::Place,
    snapshot::Snapshot,
    spool::Spool,
    table::{self, Seen},
};
use crate::{
    change::{Backfill, WATERMARK_PREFIX},
    error::{Error, Result, ResultExt},
    schema::Table,
};

/// How long a wait may last before the reader looks whether it should stop.
const LOOK: Duration = Duration::from_millis(50);
/// Before a chunk is read again.
const AGAIN: Duration = Duration::from_millis(20);

/// How a part ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// All of it is in the journal.
    Done,
    /// It was told to stop.
    Stopped,
    /// The table was rewritten, and its rows lie elsewhere: it has to be planned anew.
    Rewritten,
}

/// What a reader tells while it reads.
pub trait Progress: Send {
    /// A chunk of the part is in the journal; the part as it is now.
    fn advanced(&mut self, part: &Part) -> Result<()>;
    /// Why it does not get on, or that it does again.
    fn waiting(&mut self, why: Option<&str>);
    /// A chunk was read in vain.
    fn again(&mut self, why: &str);
    /// Whether the next chunk should wait, and why.
    fn hold(&mut self) -> Option<String>;
}

/// A connection that reads parts.
pub struct Worker {
    client: Client,
    catalog: Catalog,
    fences: Arc<Fences>,
    publications: Vec<String>,
    version: u32,
    reading: Reading,
    stop: CancellationToken,
    /// The table of the last chunk, and what it was made of.
    table: Option<(Seen, Arc<Table>)>,
    /// The memory of commits under which the part's table was found free of older writers.
    memory: Option<u64>,
}

/// A chunk whose end is in the source's log.
struct Sent {
    fence: u64,
    /// Where the part stood before it.
    before: Place,
    after: Place,
    rows: u64,
    bytes: u64,
    done: bool,
}

impl Worker {
    /// Connects a reader.
    pub(super) fn connect(
        settings: &Settings,
        fences: Arc<Fences>,
        reading: Reading,
        stop: CancellationToken,
    ) -> Result<Self> {
        let mut client = Client::connect(&settings.target, Purpose::Sql)?;
        // A chunk is read in the order of its blocks, whatever the statistics say; its marks wait
        // for this server's disk alone.
        client.query(
            "set synchronous_commit = local; set enable_seqscan = off; set enable_indexscan = off;
             set enable_indexonlyscan = off; set enable_bitmapscan = off; set jit = off;
             set max_parallel_workers_per_gather = 0; set statement_timeout = 0;
             set idle_in_transaction_session_timeout = 0; set lock_timeout = '10s'",
        )?;
        let version = client
            .value("select current_setting('server_version_num')::int / 10000")?
            .and_then(|text| text.parse().ok())
            .unwrap_or(0);
        Ok(Self {
            client,
            catalog: Catalog::new(settings.target.clone()),
            fences,
            publications: vec![settings.publication.clone(), settings.inserts.clone()],
            version,
            reading,
            stop,
            table: None,
            memory: None,
        })
    }

    /// Reads what is left of a part.
    pub fn read(&mut self, part: &mut Part, progress: &mut dyn Progress) -> Result<Ended> {
        (self.table, self.memory) = (None, None);
        if !table::is_published(&mut self.client, part.published, &self.publications)? {
            return Err(Error::config(format!("{} is not published any more", part.table)).remedy(
                "add it to the publication again and resume the backfill, or cancel that",
            ));
        }
        let mut sent = VecDeque::new();
        let outcome = match part.whole {
            false => self.read_chunks(part, &mut sent, progress),
            true => self.read_whole(part, &mut sent, progress),
        };
        // What is passed on already comes into the journal: it must not be read again.
        while !sent.is_empty() {
            self.settle(part, &mut sent, progress, true)?;
        }
        let context = || format!("while reading {} for backfill {}", part.table, part.backfill);
        outcome.context(context)
    }

    fn read_chunks(
        &mut self,
        part: &mut Part,
        sent: &mut VecDeque<Sent>,
        progress: &mut dyn Progress,
    ) -> Result<Ended> {
        let mut pace = Pace::new(self.reading.chunk_bytes, self.reading.chunk_time);
        let mut fence = None;
        loop {
            let room = !sent.back().is_some_and(|chunk| chunk.done) && sent.len() < 2;
            let stop = self.stop.is_cancelled();
            if !room || stop {
                let settled = self.settle(part, sent, progress, stop)?;
                if part.done || stop && sent.is_empty() {
                    break;
                }
                if settled == Settled::No {
                    fence = self.withdraw(fence);
                }
                continue;
            }
            if self.hold(progress) {
                continue;
            }
            let begin = match fence.take() {
                Some(fence) => fence,
                None => match self.open(part, sent, progress)? {
                    Some(fence) => fence,
                    None => continue, // told to stop while it waited
                },
            };
            let at = sent.back().map_or(part.next, |chunk| chunk.after);
            let next =
                self.fences.register(part.published, Some(begin)).ok_or_else(not_capturing)?;
            match self.read_one(part, (begin, next), at, &mut pace) {
                Ok(Some(chunk)) => {
                    sent.push_back(chunk);
                    fence = Some(next);
                }
                Ok(None) => {
                    self.withdraw(Some(begin));
                    self.withdraw(Some(next));
                    return Ok(Ended::Rewritten);
                }
                Err(error) => {
                    self.withdraw(Some(begin));
                    self.withdraw(Some(next));
                    return Err(error);
                }
            }
        }
        self.withdraw(fence);
        Ok(if part.done { Ended::Done } else { Ended::Stopped })
    }

    /// Reads a table in one transaction, and again as a whole where that does not do.
    fn read_whole(
        &mut self,
        part: &mut Part,
        sent: &mut VecDeque<Sent>,
        progress: &mut dyn Progress,
    ) -> Result<Ended> {
        while !self.stop.is_cancelled() {
            if self.hold(progress) {
                continue;
            }
            let Some(fence) = self.open(part, sent, progress)? else { continue };
            let read = self.scan(part, fence);
            if !matches!(read, Ok(Some(_))) {
                self.withdraw(Some(fence));
            }
            match read {
                Ok(Some(chunk)) => sent.push_back(chunk),
                Ok(None) => return Ok(Ended::Rewritten),
                Err(_) if self.stop.is_cancelled() => break,
                Err(error) => return Err(error),
            }
            while !sent.is_empty() {
                self.settle(part, sent, progress, false)?;
            }
            if part.done {
                return Ok(Ended::Done);
            }
        }
        Ok(Ended::Stopped)
    }

    /// Reads all rows onto the disk; `None` where the table was rewritten.
    fn scan(&mut self, part: &Part, fence: u64) -> Result<Option<Sent>> {
        self.client.query("begin isolation level repeatable read")?;
        let Some((seen, name)) = self.look(part)? else {
            self.client.query("rollback")?;
            return Ok(None);
        };
        let snapshot: Snapshot = seen.snapshot.parse()?;
        self.fences.show(fence, &snapshot);
        let filter = seen.filter.clone();
        let table = self.describe(seen)?;
        let sql = self.select(filter.as_ref(), &table, ["'(0,1)'", &name, "true"])?;
        let mut spool = Spool::create(&self.reading.spool)?;
        let (mut one, stop) = (Rows::default(), self.stop.clone());
        self.client.each_row(&sql, &mut |body| {
            one.push(body)?;
            one.rows.drain(..).try_for_each(|row| spool.push(&row))?;
            match stop.is_cancelled() {
                true => Err(Error::retry("the backfill was told to stop")),
                false => Ok(true),
            }
        })?;
        let (rows, bytes) = spool.size();
        if u32::try_from(rows).is_err() {
            return Err(Error::config(format!("{} has {rows} rows and no key", part.table))
                .remedy("give it a primary key: more than 4 billion rows are read in parts only"));
        }
        let end = Place::before(part.until);
        let closes = Closes { fence, to: end, rows, bytes, done: true };
        let mark = self.mark(part, Some(closes), None);
        let backfill = Backfill { id: part.backfill, audience: self.reading.audience };
        let rows_of = fence::Rows::Spooled(spool);
        self.fences.offer(fence, Chunk { table, backfill, snapshot, rows: rows_of });
        self.client.query(&format!("{}; commit", emit(&mark)?))?;
        Ok(Some(Sent { fence, before: part.next, after: end, rows, bytes, done: true }))
    }

    fn withdraw(&self, fence: Option<u64>) -> Option<u64> {
        fence.into_iter().for_each(|fence| self.fences.withdraw(fence));
        None
    }

    /// Whether somebody wants it to wait; then it has waited a little.
    fn hold(&self, progress: &mut dyn Progress) -> bool {
        let why = progress.hold();
        progress.waiting(why.as_deref());
        if why.is_some() {
            std::thread::sleep(LOOK);
        }
        why.is_some()
    }

    /// Opens a fence by a mark of its own, once no transaction is left that may have committed
    /// before commits were remembered and is not visible yet.
    fn open(
        &mut self,
        part: &Part,
        sent: &VecDeque<Sent>,
        progress: &mut dyn Progress,
    ) -> Result<Option<u64>> {
        if !self.fences.wait_for_capture(LOOK) {
            progress.waiting(Some("the source is not captured now"));
            return Ok(None);
        }
        let memory = self.fences.remember();
        if self.memory != Some(memory) {
            if !self.wait_for_writers(part, progress)? {
                return Ok(None);
            }
            self.memory = Some(memory);
        }
        let after = sent.back().map(|chunk| chunk.fence);
        let fence = self.fences.register(part.published, after).ok_or_else(not_capturing)?;
        let mark = self.mark(part, None, Some(fence));
        let emitted = self.client.query(&emit(&mark)?);
        emitted.map_err(|failure| {
            self.fences.withdraw(fence);
            Error::from(failure)
        })?;
        Ok(Some(fence))
    }

    /// Waits for the transactions that have written to the table; false where it was told to stop.
    /// They hold their locks until what they did is visible.
    fn wait_for_writers(&mut self, part: &Part, progress: &mut dyn Progress) -> Result<bool> {
        let writers = |only: &str| {
            format!(
                "select l.virtualtransaction, coalesce(l.pid, 0) from pg_locks l
                 where l.locktype = 'relation' and l.relation = {} and l.granted
                   and l.database = (select oid from pg_database where datname = current_database())
                   and l.mode in ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock',
                                  'AccessExclusiveLock') {only}
                 limit 1000",
                part.leaf
            )
        };
        let rows = self.client.query(&writers(""))?;
        let list: Vec<_> = rows
            .iter()
            .filter_map(|row| row.first().cloned().flatten())
            .map(|name| quote_text(&name))
            .collect();
        while !list.is_empty() {
            let only = format!("and l.virtualtransaction in ({})", list.join(", "));
            let left = self.client.query(&writers(&only))?;
            let Some(first) = left.first() else { break };
            let pid = first.get(1).cloned().flatten().unwrap_or_default();
            progress.waiting(Some(&format!(
                "{} is written to by a transaction that was there before (pid {pid} of the server)",
                part.table
            )));
            if self.stop.is_cancelled() {
                return Ok(false);
            }
            std::thread::sleep(LOOK);
        }
        progress.waiting(None);
        Ok(true)
    }

    /// Reads one chunk behind `at` and puts its end into the source's log; `None` where the table
    /// was rewritten.
    fn read_one(
        &mut self,
        part: &Part,
        (fence, next): (u64, u64),
        at: Place,
        pace: &mut Pace,
    ) -> Result<Option<Sent>> {
        let begun = Instant::now();
        self.client.query("begin isolation level repeatable read")?;
        let read = self.read_rows(part, at, pace);
        let (rows, table, snapshot, end) = match read {
            Ok(Some(read)) => read,
            Ok(None) => {
                self.client.query("rollback")?;
                return Ok(None);
            }
            Err(error) => {
                let _ = self.client.query("rollback");
                return Err(error);
            }
        };
        let blocks = (end.block - at.block).max(1);
        pace.learn(blocks, rows.bytes, begun.elapsed());
        let done = end >= Place::before(part.until);
        let count = rows.rows.len() as u64;
        let bytes = rows.bytes as u64;
        let closes = Closes { fence, to: end, rows: count, bytes, done };
        let mark = self.mark(part, Some(closes), Some(next).filter(|_| !done));
        let backfill = Backfill { id: part.backfill, audience: self.reading.audience };
        let chunk = Chunk {
            table,
            backfill,
            snapshot: snapshot.parse()?,
            rows: fence::Rows::Here(rows.rows),
        };
        // The rows before the mark: it may be in the stream as soon as it is committed.
        self.fences.offer(fence, chunk);
        self.client.query(&format!("{}; commit", emit(&mark)?))?;
        crate::failpoint::reach("backfill::after_mark");
        Ok(Some(Sent { fence, before: at, after: end, rows: count, bytes, done }))
    }

    /// The rows of the chunk, its table, its snapshot, and up to where it goes.
    #[expect(clippy::type_complexity, reason = "the four parts of one answer")]
    fn read_rows(
        &mut self,
        part: &Part,
        at: Place,
        pace: &Pace,
    ) -> Result<Option<(Rows, Arc<Table>, String, Place)>> {
        let Some((seen, name)) = self.look(part)? else { return Ok(None) };
        let (snapshot, filter) = (seen.snapshot.clone(), seen.filter.clone());
        let until = Place::before(at.block.saturating_add(pace.blocks()).min(part.until));
        let range = format!("ctid > '{at}' and ctid < '{until}'");
        let table = self.describe(seen)?;
        let sql = self.select(filter.as_ref(), &table, ["ctid", &name, &range])?;
        let (mut rows, mut cut) = (Rows::default(), false);
        let bytes_max = pace.bytes.saturating_mul(2);
        self.client.each_row(&sql, &mut |body| {
            rows.push(body)?;
            cut = rows.bytes >= bytes_max;
            Ok(!cut)
        })?;
        let end = rows.last.filter(|_| cut).unwrap_or(until);
        Ok(Some((rows, table, snapshot, end)))
    }

    /// The table under a lock, and its name; `None` where it was rewritten or is gone.
    fn look(&mut self, part: &Part) -> Result<Option<(Seen, String)>> {
        let Some(name) = table::name_of(&mut self.client, part.leaf)? else { return Ok(None) };
        let seen = table::look(
            &mut self.client,
            (part.leaf, &name),
            part.published,
            (&self.publications, self.version),
        )?;
        let seen = seen.filter(|seen| seen.filenode == part.filenode);
        Ok(seen.map(|seen| (seen, name)))
    }

    /// The columns as `, a, b, null`: one that was not asked for is null, so that rows keep the
    /// table's form.
    fn columns(&self, table: &Table) -> Result<String> {
        let names = || table.columns.iter().map(|column| column.name.as_str());
        let Some(chosen) = &self.reading.columns else {
            return Ok(names().map(|name| format!(", {}", quote_name(name))).collect());
        };
        let key = table.key_columns();
        if key.is_empty() {
            return Err(Error::config(format!("{table} has no key: all of its columns are read"))
                .remedy("leave `columns` out for it, or give it a primary key"));
        }
        if let Some(unknown) = chosen.iter().find(|chosen| !names().any(|name| name == *chosen)) {
            return Err(Error::config(format!("{table} has no column `{unknown}`")));
        }
        let select = |(index, name): (usize, &str)| match chosen.iter().any(|chosen| chosen == name)
            || key.contains(&index)
        {
            true => format!(", {}", quote_name(name)),
            false => ", null".to_owned(),
        };
        Ok(names().enumerate().map(select).collect())
    }

    fn select(&self, filter: Option<&String>, table: &Table, what: [&str; 3]) -> Result<String> {
        let [place, name, range] = what;
        let filters = [filter, self.reading.filter.as_ref()].into_iter().flatten();
        let filters: String = filters.map(|filter| format!(" and ({filter})")).collect();
        let columns = self.columns(table)?;
        Ok(format!("select {place}{columns} from only {name} where {range}{filters}"))
    }

    /// The table as changes carry it; asked for again only when something about it is new.
    fn describe(&mut self, seen: Seen) -> Result<Arc<Table>> {
        if let Some((known, table)) = &self.table
            && known.relation == seen.relation
        {
            return Ok(Arc::clone(table));
        }
        let table = Arc::new(self.catalog.resolve(&seen.relation)?);
        self.table = Some((seen, Arc::clone(&table)));
        Ok(table)
    }

    fn mark(&self, part: &Part, closes: Option<Closes>, opens: Option<u64>) -> Mark {
        Mark {
            lineage: self.fences.lineage(),
            backfill: part.backfill,
            part: part.number,
            table: part.table.clone(),
            closes,
            opens,
        }
    }

    /// Waits for the oldest chunk that is on its way, and takes it into the part, or has all of
    /// them read again. Who has to `leave` does not wait for marks that are still to come.
    fn settle(
        &mut self,
        part: &mut Part,
        sent: &mut VecDeque<Sent>,
        progress: &mut dyn Progress,
        leave: bool,
    ) -> Result<Settled> {
        let Some(chunk) = sent.front() else { return Ok(Settled::Yes) };
        let verdict = loop {
            match self.fences.verdict(chunk.fence, LOOK) {
                Some(verdict) => break verdict,
                None if leave || self.stop.is_cancelled() => self.fences.give_up(chunk.fence),
                None => {}
            }
        };
        match verdict {
            Verdict::Appended => {
                (part.next, part.done) = (chunk.after, chunk.done);
                part.rows += chunk.rows;
                part.bytes += chunk.bytes;
                if let Some(chunk) = sent.pop_front() {
                    self.fences.withdraw(chunk.fence);
                }
                progress.advanced(part)?;
                return Ok(Settled::Yes);
            }
            Verdict::Again(why) => {
                progress.again(&why);
                std::thread::sleep(AGAIN);
            }
            Verdict::Lost => {}
        }
        part.next = chunk.before;
        for chunk in sent.drain(..) {
            self.fences.withdraw(chunk.fence);
        }
        Ok(Settled::No)
    }
}

#[derive(PartialEq, Eq)]
enum Settled {
    /// The oldest chunk is in the journal.
    Yes,
    /// Everything on its way has to be read again.
    No,
}

fn emit(mark: &Mark) -> Result<String> {
    let content = serde_json::to_string(mark)
        .map_err(|error| Error::bug("cannot write a mark as JSON").caused_by(error))?;
    Ok(format!(
        "select pg_logical_emit_message(true, {}, {})",
        quote_text(WATERMARK_PREFIX),
        quote_text(&content)
    ))
}
