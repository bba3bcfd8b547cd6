//! PostgreSQL as a source: logical replication with `pgoutput`, or with `wal2json`.
//!
//! ```text
//!  open(): url ─► wire (auth, tls) ─► checks ─► publication ─► slot ─► stream
//! ```

use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::Duration,
};

use async_trait::async_trait;

use super::{Known, Opened, Source, SpoolOptions};
use crate::{
    change::{Batch, Gap, Origin, Position},
    config,
    error::{Class, Classify, Error, Result, ResultExt},
};

mod assemble;
mod auth;
pub mod backfill;
mod catalog;
mod checks;
mod compared;
mod described;
mod failure;
mod history;
mod operate;
mod outline;
pub mod pgoutput;
mod preflight;
mod publication;
mod rehearse;
mod session;
mod settings;
mod shared;
mod slot;
mod spool;
mod standby;
mod stats;
mod stream;
mod streamed;
mod tls;
mod url;
pub mod wal2json;
mod watch;
mod wire;

pub use compared::{Compared, compared, uncaptured};
pub use described::described;
pub use operate::{
    InspectedTable, Inspection, PublicationStatus, SlotStatus, Status, create, drop, drop_slot,
    inspect, status,
};
pub use outline::tables;
pub use preflight::{Finding, Level, preflight};
pub use rehearse::{Rehearsal, rehearse};
pub use session::Session;
pub use stats::Stats;

use catalog::{Catalog, quote_name, quote_text};
use checks::{Look, Server};
use publication::Published;
use settings::Settings;
use shared::Shared;
use spool::Spool;
use standby::Timelines;
use stream::Reader;
use streamed::Streamed;
use watch::Watch;
use wire::{Client, Frames, Purpose, Socket, Stream};

/// How long a source that is dropped waits for its thread to end.
const FAREWELL_WAIT: Duration = Duration::from_millis(500);

/// The server refuses less as `logical_decoding_work_mem`.
const DECODING_KILOBYTES_MIN: u64 = 64;

/// An open PostgreSQL source. Dropping it ends its threads and frees the slot.
pub struct Postgres {
    shared: Arc<Shared>,
    socket: Socket,
    reconciler: Option<Reconciler>,
    /// Of a standby, whose timeline may change while it is read.
    timelines: Option<Arc<Mutex<Timelines>>>,
    /// Taken from the queue, and not yet returned.
    held: Option<Batch>,
}

#[async_trait]
impl Source for Postgres {
    async fn next(&mut self) -> Result<Batch> {
        let Some(timelines) = self.timelines.clone() else { return self.shared.next().await };
        if self.held.is_none() {
            self.held = Some(self.shared.next().await?);
        }
        let lsn = self.held.as_ref().and_then(|batch| batch.position).map(|at| at.lsn);
        let timeline = match lsn {
            Some(lsn) => Some(blocking(move || lock(&timelines).of(lsn)).await?),
            None => None,
        };
        let mut batch = self.held.take().unwrap_or_default();
        if let (Some(position), Some(timeline)) = (&mut batch.position, timeline) {
            position.timeline = timeline;
        }
        Ok(batch)
    }

    async fn confirm(&mut self, position: Position) -> Result<()> {
        self.shared.confirm(position.lsn);
        Ok(())
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.shared.stop();
        self.socket.end_reads();
        // It says farewell, which frees the slot; a server that hangs is not waited for.
        self.shared.wait_for_end(FAREWELL_WAIT);
        self.reconciler = None;
    }
}

/// Connects, checks the history, creates what is missing, and begins to read. Transactions that are
/// still open are kept in `spool`.
pub async fn open(
    name: &str,
    config: &config::Postgres,
    known: Known,
    spool: SpoolOptions,
) -> Result<Opened> {
    let settings = Settings::new(name, config)?;
    blocking(move || open_blocking(&settings, &known, spool)).await
}

/// A gap that a person has accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Accepted {
    /// What the journal is to record, before the source is opened from its end.
    pub gap: Gap,
    /// The database that the journal is filled from after it.
    pub origin: Origin,
}

/// Accepts that history is missing: makes the slot usable again and returns the gap. `cluster` is
/// the system identifier of another cluster that continues the same database.
pub async fn accept_gap(
    name: &str,
    config: &config::Postgres,
    known: Known,
    cluster: Option<String>,
) -> Result<Accepted> {
    let mut settings = Settings::new(name, config)?;
    settings.config.create = true; // it is what was asked for
    blocking(move || {
        let (verdict, (mut client, server, slot)) = compare(&settings, &known)?;
        let look =
            Look { settings: &settings, known: &known, server: &server, slot: slot.as_ref() };
        let obstacle = match further(verdict, &mut client, &look)? {
            Ok(()) => {
                let what = format!("there is no gap in the source `{}`", settings.name);
                return Err(Error::config(what).remedy("`walrace run` goes on where it was"));
            }
            Err(obstacle @ checks::Obstacle::Cluster { .. })
                if cluster.as_ref() != Some(&server.system) =>
            {
                return Err(obstacle.into_error(&settings.name));
            }
            Err(obstacle) => obstacle,
        };
        let gap = checks::accept(&mut client, &look, obstacle)?;
        let mut origin = settings.origin(&server);
        let names = [settings.publication.clone(), settings.inserts.clone()];
        watch::remember(&mut client, &names, &mut origin)?;
        Ok(Accepted { gap, origin })
    })
    .await
}

/// Why the source would stop, with cause, range and remedy, for who asks without starting it;
/// `None` where it would go on. Changes nothing.
pub async fn obstacle(
    name: &str,
    config: &config::Postgres,
    known: Known,
) -> Result<Option<Error>> {
    let settings = Settings::new(name, config)?;
    blocking(move || {
        let (verdict, (mut client, server, slot)) = compare(&settings, &known)?;
        let look =
            Look { settings: &settings, known: &known, server: &server, slot: slot.as_ref() };
        let verdict = further(verdict, &mut client, &look)?;
        Ok(verdict.err().map(|obstacle| obstacle.into_error(&settings.name)))
    })
    .await
}

/// Looks at what the stream itself would run into.
fn further(
    verdict: checks::Verdict,
    client: &mut Client,
    look: &Look<'_>,
) -> Result<checks::Verdict> {
    match (verdict, look.known.progress) {
        (Ok(()), Some(progress)) if history::is_refused(client, look, progress)? => {
            Ok(Err(watch::written_without(&look.settings.publication, progress)))
        }
        (verdict, _) => Ok(verdict),
    }
}

type Found = (Client, Server, Option<slot::Slot>);

fn compare(settings: &Settings, known: &Known) -> Result<(checks::Verdict, Found)> {
    let mut walsender = Client::connect(&settings.target, Purpose::Replication)?;
    let server = Server::identify(&mut walsender)?;
    checks::check_server(&server)?;
    let mut client = Client::connect(&settings.target, Purpose::Sql)?;
    let slot = slot::read(&mut client, &settings.slot)?;
    if let Some(slot) = &slot {
        slot::check(slot, settings, &server.database)?;
    }
    let look = Look { settings, known, server: &server, slot: slot.as_ref() };
    let verdict = checks::compare(&mut walsender, &mut client, &look)?;
    Ok((verdict, (client, server, slot)))
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work).await.class(Class::Bug, || "a task of the source died")?
}

fn open_blocking(settings: &Settings, known: &Known, spool: SpoolOptions) -> Result<Opened> {
    let context = || format!("while opening the source `{}`", settings.name);
    try_open(settings, known, spool).context(context)
}

fn try_open(settings: &Settings, known: &Known, spool: SpoolOptions) -> Result<Opened> {
    let (verdict, (mut client, server, _)) = compare(settings, known)?;
    verdict.map_err(|obstacle| obstacle.into_error(&settings.name))?;
    let (slot, published) = checks::ensure_slot(&mut client, settings, &server)?;
    slot::check_valid(&slot, &settings.slot)?;
    if let Some(progress) = known.progress {
        // Again: what was taken out since the comparison is put back by now, as if it were new.
        let look = Look { settings, known, server: &server, slot: Some(&slot) };
        watch::compare(&mut client, &look, progress)?
            .map_err(|obstacle| obstacle.into_error(&settings.name))?;
    }
    let lsn = known.progress.map(|at| at.lsn).or(slot.confirmed).unwrap_or(server.flush);
    let start = Position { timeline: server.timeline, lsn, index: 0 };
    let mut origin = settings.origin(&server);
    origin.comparable = known.origin.as_ref().and_then(|origin| origin.comparable);
    let members = watch::remember(&mut client, &published.names, &mut origin)?;
    let watch = Watch::new(published.names.clone(), published.managed, members);
    let stats = Arc::<Stats>::default();
    let spool = Spool::new(spool, Arc::clone(&stats))?;
    let pgoutput = settings.config.plugin == config::Plugin::Pgoutput;
    let streamed = (pgoutput && settings.config.streaming).then(|| Streamed::new(spool));
    let begun = (start, Arc::clone(&stats));
    let mut source = start_reading((settings, &server, &published), begun, streamed)?;
    source.reconciler = Some(Reconciler::start(settings.clone(), watch, &source.shared)?);
    Ok(Opened { source: Box::new(source), origin, start, stats })
}

fn start_reading(
    (settings, server, published): (&Settings, &Server, &Published),
    (start, stats): (Position, Arc<Stats>),
    streamed: Option<Streamed>,
) -> Result<Postgres> {
    let mut walsender = Client::connect(&settings.target, Purpose::Replication)?;
    set_decoding_memory(&mut walsender, settings.config.decoding_bytes_max)?;
    let (connection, decoder) = match settings.config.plugin {
        config::Plugin::Wal2json => {
            let (connection, decoder) = wal2json::begin(walsender, settings, start.lsn)?;
            (connection, Some(decoder))
        }
        config::Plugin::Pgoutput => {
            let begun = (start, published, streamed.is_some());
            (begin_pgoutput(walsender, settings, begun)?, None)
        }
    };
    let cannot = || "cannot set up the connection";
    let socket = connection.0.socket().try_clone().class(Class::Retry, cannot)?;
    let shared = Arc::new(Shared::new(start.lsn, stats));
    let catalog = Catalog::new(settings.target.clone());
    let reader = Reader::new(connection, start, catalog, Arc::clone(&shared))
        .class(Class::Retry, cannot)?
        .with_sender_timeout(Duration::from_millis(server.sender_timeout_ms))
        .with_change_bytes_max(settings.config.change_bytes_max)
        .with_streamed(streamed)
        .with_wal2json(decoder);
    let ended = Arc::clone(&shared);
    thread(format!("read {}", settings.name), move || {
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| reader.run()));
        if outcome.is_err() {
            ended.end(Some(Error::bug("the thread that reads the stream died")));
        }
    })?;
    let timelines = Timelines::new(settings, server).map(|of| Arc::new(Mutex::new(of)));
    Ok(Postgres { shared, socket, reconciler: None, timelines, held: None })
}

fn begin_pgoutput(
    walsender: Client,
    settings: &Settings,
    (start, published, streamed): (Position, &Published, bool),
) -> Result<(Stream, Frames)> {
    let protocol = match streamed {
        true => "proto_version '2', streaming 'on'",
        false => "proto_version '1'",
    };
    let names: Vec<_> = published.names.iter().map(|name| quote_name(name)).collect();
    Ok(walsender.start_copy(&format!(
        "START_REPLICATION SLOT {} LOGICAL {} ({protocol}, publication_names {}, messages 'true')",
        quote_name(&settings.slot),
        start.lsn,
        quote_text(&names.join(","))
    ))?)
}

/// How much of open transactions the server gathers before it sends them, or writes them to its own
/// disk. Set on the connection that decodes, and on no other.
fn set_decoding_memory(walsender: &mut Client, bytes: u64) -> Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    let kilobytes = bytes.div_ceil(1024).clamp(DECODING_KILOBYTES_MIN, i32::MAX as u64);
    walsender.query(&format!("set logical_decoding_work_mem = '{kilobytes}kB'"))?;
    Ok(())
}

fn thread(name: String, work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name(name)
        .spawn(work)
        .class(Class::Retry, || "cannot start a thread for the source")
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Compares the globs with the tables that exist, and the publications with what they were, now and
/// then, on a thread and a connection of its own, so that a slow catalog never holds up the stream.
struct Reconciler {
    stop: Arc<(Mutex<bool>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

impl Reconciler {
    fn start(settings: Settings, watch: Watch, shared: &Arc<Shared>) -> Result<Self> {
        let stop = Arc::new((Mutex::new(false), Condvar::new()));
        let name = format!("tables {}", settings.name);
        let (ended, stream) = (Arc::clone(&stop), Arc::clone(shared));
        let thread = thread(name, move || reconcile_until(&settings, watch, &ended, &stream))?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Reconciler {
    fn drop(&mut self) {
        let (stopped, wake) = &*self.stop;
        *stopped.lock().unwrap_or_else(PoisonError::into_inner) = true;
        wake.notify_all();
        // It may be in the middle of a statement, which nobody has to wait for.
        self.thread = None;
    }
}

fn reconcile_until(
    settings: &Settings,
    mut watch: Watch,
    (stopped, wake): &(Mutex<bool>, Condvar),
    stream: &Shared,
) {
    let interval = Duration::from_millis(settings.config.reconcile_ms.max(100));
    let mut client = None;
    let mut last_error = String::new();
    loop {
        let guard = stopped.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = wake.wait_timeout_while(guard, interval, |stopped| !*stopped);
        if *waited.unwrap_or_else(PoisonError::into_inner).0 {
            return;
        }
        let error = match reconcile_once(settings, &mut watch, &mut client) {
            Ok(None) => String::new(),
            Ok(Some(taken_out)) => return stream.fail(taken_out),
            Err(error) => {
                client = None;
                error.to_string()
            }
        };
        // Said once: it would repeat every few seconds.
        if !error.is_empty() && error != last_error {
            let source = &settings.name;
            tracing::warn!(%source, %error, "the tables that exist are not all captured");
        }
        last_error = error;
    }
}

/// The error that stops the source, where somebody took away what is read.
fn reconcile_once(
    settings: &Settings,
    watch: &mut Watch,
    client: &mut Option<Client>,
) -> Result<Option<Error>> {
    let client = match client.take() {
        Some(connected) => client.insert(connected),
        None => client.insert(connect_writer(settings)?),
    };
    if let Some(taken_out) = watch.look(client, settings)? {
        return Ok(Some(taken_out));
    }
    if watch.is_managed() {
        let reconciled = publication::reconcile(client, settings);
        // What was taken out since the first look was put back just now, as if it were new.
        if let Some(taken_out) = watch.look(client, settings)? {
            return Ok(Some(taken_out));
        }
        reconciled?;
    }
    Ok(None)
}

/// The source itself, once it was promoted, or never was a standby; else its primary.
fn connect_writer(settings: &Settings) -> Result<Client> {
    let mut client = Client::connect(&settings.target, Purpose::Sql)?;
    match settings.primary.is_some()
        && client.value("select pg_is_in_recovery()")?.as_deref() == Some("t")
    {
        true => Client::connect(settings.primary(), Purpose::Sql),
        false => Ok(client),
    }
}
