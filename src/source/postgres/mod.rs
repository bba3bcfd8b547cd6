//! PostgreSQL as a source: logical replication with `pgoutput`.
//!
//! ```text
//!  open(): url ─► wire (auth, tls) ─► checks ─► publication ─► slot ─► stream
//! ```

use std::{
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread::JoinHandle,
    time::Duration,
};

use async_trait::async_trait;

use super::{Known, Opened, Source};
use crate::{
    change::{Batch, Gap, Origin, Position},
    config,
    error::{Class, Classify, Error, Result, ResultExt},
};

mod assemble;
mod auth;
mod catalog;
mod checks;
mod described;
mod failure;
mod membership;
mod operate;
mod outline;
pub mod pgoutput;
mod preflight;
mod publication;
mod rehearse;
mod session;
mod settings;
mod slot;
mod stats;
mod stream;
mod tls;
mod url;
mod wire;

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
use checks::Server;
use membership::Membership;
use publication::Published;
use settings::Settings;
use stream::{Reader, Shared};
use wire::{Client, Purpose, Socket};

/// How long a source that is dropped waits for its thread to end.
const FAREWELL_WAIT: Duration = Duration::from_millis(500);

/// An open PostgreSQL source. Dropping it ends its threads and frees the slot.
pub struct Postgres {
    shared: Arc<Shared>,
    socket: Socket,
    reconciler: Option<Reconciler>,
}

#[async_trait]
impl Source for Postgres {
    async fn next(&mut self) -> Result<Batch> {
        self.shared.next().await
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

/// Connects, checks the history, creates what is missing, and begins to read.
pub async fn open(name: &str, config: &config::Postgres, known: Known) -> Result<Opened> {
    let settings = Settings::new(name, config)?;
    blocking(move || open_blocking(&settings, &known)).await
}

/// Accepts that history is missing: makes the slot usable again and returns the gap, which the
/// caller records in the journal before the source is opened from its end.
pub async fn accept_gap(name: &str, config: &config::Postgres, known: Known) -> Result<Gap> {
    let settings = Settings::new(name, config)?;
    blocking(move || {
        let mut walsender = Client::connect(&settings.target, Purpose::Replication)?;
        let mut client = Client::connect(&settings.target, Purpose::Sql)?;
        let server = Server::identify(&mut walsender)?;
        checks::check_server(&server)?;
        let mut found = slot::read(&mut client, &settings.slot)?;
        if found.as_ref().is_some_and(|slot| slot.invalidation.is_some()) {
            slot::drop(&mut client, &settings.slot)?;
            found = None;
        }
        let verdict = checks::compare(&mut walsender, &settings, &known, &server, found.as_ref())?;
        match verdict {
            Err(obstacle) => checks::accept(&mut client, &settings, &known, &server, obstacle),
            Ok(()) => {
                Err(Error::config(format!("there is no gap in the source `{}`", settings.name))
                    .remedy("`walrace run` goes on where it was"))
            }
        }
    })
    .await
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work).await.class(Class::Bug, || "a task of the source died")?
}

fn open_blocking(settings: &Settings, known: &Known) -> Result<Opened> {
    let context = || format!("while opening the source `{}`", settings.name);
    try_open(settings, known).context(context)
}

fn try_open(settings: &Settings, known: &Known) -> Result<Opened> {
    let mut walsender = Client::connect(&settings.target, Purpose::Replication)?;
    let server = Server::identify(&mut walsender)?;
    checks::check_server(&server)?;
    let mut client = Client::connect(&settings.target, Purpose::Sql)?;
    let found = slot::read(&mut client, &settings.slot)?;
    if let Some(slot) = &found {
        slot::check(slot, &settings.slot, &server.database)?;
    }
    checks::compare(&mut walsender, settings, known, &server, found.as_ref())?
        .map_err(|obstacle| obstacle.into_error(&settings.name))?;
    let (slot, published) = checks::ensure_slot(&mut client, settings, &server)?;
    let lsn = known.progress.map(|at| at.lsn).or(slot.confirmed).unwrap_or(server.flush);
    let start = Position { timeline: server.timeline, lsn, index: 0 };
    let origin = Origin {
        system: server.system.clone(),
        database: server.database.clone(),
        slot: settings.slot.clone(),
    };
    let source = start_reading(settings, &server, walsender, (start, &published))?;
    let stats = Arc::clone(&source.shared.stats);
    Ok(Opened { source: Box::new(source), origin, start, stats })
}

fn start_reading(
    settings: &Settings,
    server: &Server,
    walsender: Client,
    (start, published): (Position, &Published),
) -> Result<Postgres> {
    let names: Vec<_> = published.names.iter().map(|name| quote_name(name)).collect();
    let connection = walsender.start_copy(&format!(
        "START_REPLICATION SLOT {} LOGICAL {} (proto_version '1', publication_names {}, \
         messages 'true')",
        quote_name(&settings.slot),
        start.lsn,
        quote_text(&names.join(","))
    ))?;
    let cannot = || "cannot set up the connection";
    let socket = connection.0.socket().try_clone().class(Class::Retry, cannot)?;
    let shared = Arc::new(Shared::new(start.lsn, Arc::default()));
    let catalog = Catalog::new(settings.target.clone());
    let reader = Reader::new(connection, start, catalog, Arc::clone(&shared))
        .class(Class::Retry, cannot)?
        .with_sender_timeout(Duration::from_millis(server.sender_timeout_ms))
        .with_change_bytes_max(settings.config.change_bytes_max);
    let ended = Arc::clone(&shared);
    thread(format!("read {}", settings.name), move || {
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| reader.run()));
        if outcome.is_err() {
            ended.end(Some(Error::bug("the thread that reads the stream died")));
        }
    })?;
    let reconciler = Reconciler::start(settings.clone(), Membership::new(published))?;
    Ok(Postgres { shared, socket, reconciler: Some(reconciler) })
}

fn thread(name: String, work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name(name)
        .spawn(work)
        .class(Class::Retry, || "cannot start a thread for the source")
}

/// Compares the globs with the tables that exist, now and then, on a thread and a connection of its
/// own, so that a slow catalog never holds up the stream. A publication of somebody else is only
/// watched.
struct Reconciler {
    stop: Arc<(Mutex<bool>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

impl Reconciler {
    fn start(settings: Settings, watched: Option<Membership>) -> Result<Self> {
        let stop = Arc::new((Mutex::new(false), Condvar::new()));
        let shared = Arc::clone(&stop);
        let name = format!("tables {}", settings.name);
        let thread = thread(name, move || reconcile_until(&settings, watched, &shared))?;
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
    mut watched: Option<Membership>,
    (stopped, wake): &(Mutex<bool>, Condvar),
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
        let error = match reconcile_once(settings, &mut watched, &mut client) {
            Ok(()) => String::new(),
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

fn reconcile_once(
    settings: &Settings,
    watched: &mut Option<Membership>,
    client: &mut Option<Client>,
) -> Result<()> {
    if client.is_none() {
        *client = Some(Client::connect(&settings.target, Purpose::Sql)?);
    }
    match (client, watched) {
        (Some(client), Some(watched)) => watched.look(client, settings),
        (Some(client), None) => publication::reconcile(client, settings),
        (None, _) => Ok(()),
    }
}
