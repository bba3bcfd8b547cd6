//! One source at run time: connects, captures, and connects again.

use std::{
    sync::{Arc, Mutex, PoisonError, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use tokio_util::sync::CancellationToken;
use tracing::{debug, error};

use super::{
    part::{Backoff, Next, Part, State},
    status::SourceStatus,
};
use crate::{
    change::{Batch, Lsn, Mark},
    config::{self, WalRetainedPolicy},
    error::{Class, Error, Result},
    format::Names,
    journal::{Inspection, Journal},
    pipeline::{self, Terms},
    source::{
        self, Known, Past, SpoolOptions,
        postgres::{Stats, backfill::Fences},
    },
};

const RECONNECT_MIN: Duration = Duration::from_millis(200);
const RECONNECT_MAX: Duration = Duration::from_secs(15);

/// How soon a paused capture looks for room again, at most.
const LOOK_AGAIN_MAX: Duration = Duration::from_secs(2);

/// How often the server is asked what WAL it keeps for the slot.
const ASK_EVERY: Duration = Duration::from_secs(10);

/// How often we look whether there is a server to ask.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// One source with its journal.
#[derive(Debug)]
pub(super) struct Capturing {
    name: String,
    config: config::Source,
    pub(super) journal: Journal,
    part: Part,
    first_offset: u64,
    stats: Mutex<Option<Arc<Stats>>>,
    asked: Mutex<Option<Asked>>,
    movement: Mutex<Movement>,
    gate: Mutex<Gate>,
    spool: SpoolOptions,
    limits: config::Journal,
    free_bytes: Mutex<Option<u64>>,
    /// Where the rows of backfills meet the stream.
    pub(super) fences: Arc<Fences>,
}

/// Why capture must wait although the source would send, and what ends that.
#[derive(Clone, Debug)]
pub(super) struct Pause {
    pub(super) reason: String,
    pub(super) remedy: String,
}

/// Whether capture may run, and the token that ends a running loop.
#[derive(Debug, Default)]
struct Gate {
    /// By the journal's limit.
    pause: Option<Pause>,
    /// The slot is being dropped, which no reader may hold.
    dropping: bool,
    running: CancellationToken,
}

/// What the server said of its log and our slot when it was last asked.
#[derive(Clone, Debug)]
struct Asked {
    server: Lsn,
    confirmed: Option<Lsn>,
    retained_bytes: Option<u64>,
    /// Why the server has given the slot up, where it has.
    invalidation: Option<String>,
}

/// When the slot last moved, or had no reason to.
#[derive(Debug)]
struct Movement {
    confirmed: Lsn,
    server: Lsn,
    at: Instant,
}

impl Capturing {
    pub(super) fn new(
        name: &str,
        config: config::Source,
        journal: Journal,
        whole: &config::Config,
    ) -> Self {
        Self {
            name: name.to_owned(),
            config,
            part: Part::new("source", name),
            first_offset: journal.end(),
            fences: Arc::new(Fences::new(journal.lineage())),
            journal,
            stats: Mutex::default(),
            asked: Mutex::default(),
            movement: Mutex::new(Movement {
                confirmed: Lsn(0),
                server: Lsn(0),
                at: Instant::now(),
            }),
            gate: Mutex::default(),
            spool: super::spool_options(whole, name),
            limits: whole.journal.clone(),
            free_bytes: Mutex::default(),
        }
    }

    /// Stops capture, or lets it go on. The slot keeps what is not in the journal.
    pub(super) fn pause(&self, pause: Option<Pause>) {
        let mut gate = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
        if pause.is_some() && gate.pause.is_none() {
            gate.running.cancel();
        }
        gate.pause = pause;
    }

    fn keep_off_slot(&self, dropping: bool) {
        let mut gate = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
        gate.dropping = dropping;
        if dropping {
            gate.running.cancel();
        }
    }

    /// Notes what is free on the journal's volume.
    pub(super) fn see_free(&self, bytes: u64) {
        *self.free_bytes.lock().unwrap_or_else(PoisonError::into_inner) = Some(bytes);
    }

    /// A token for one attempt, unless capture must wait. Room is looked for before the source is
    /// asked, so that a full disk does not make the server send the same again and again.
    async fn begin(&self, stop: &CancellationToken) -> Result<CancellationToken> {
        self.journal.abandon().await?;
        self.journal.check_room().await?;
        let mut gate = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
        if gate.dropping {
            let what = "capture is paused: the slot is being dropped to save the primary";
            return Err(Error::retry(what));
        }
        if let Some(Pause { reason, remedy }) = &gate.pause {
            return Err(Error::retry(format!("capture is paused: {reason}")).remedy(remedy));
        }
        gate.running = stop.child_token();
        Ok(gate.running.clone())
    }

    /// Captures until `stop`, or until a person must act.
    pub(super) async fn run(self: Arc<Self>, stop: CancellationToken) {
        let mut backoff = Backoff::new(RECONNECT_MIN, RECONNECT_MAX);
        let mut look_again = Backoff::new(RECONNECT_MIN, LOOK_AGAIN_MAX);
        loop {
            let before = self.journal.progress();
            let (outcome, backoff) = match self.begin(&stop).await {
                Ok(running) => (self.attempt(&running).await, &mut backoff),
                Err(paused) => (Err(paused), &mut look_again),
            };
            if stop.is_cancelled() {
                return;
            }
            let Err(error) = outcome else { continue }; // paused: the next round says why
            if self.journal.progress() != before {
                backoff.reset();
            }
            if self.part.failed(&error, backoff, &stop).await == Next::Stop {
                return;
            }
        }
    }

    async fn attempt(&self, stop: &CancellationToken) -> Result<()> {
        let known = known(&self.journal);
        let opened = tokio::select! {
            () = stop.cancelled() => return Ok(()),
            opened = source::open(&self.name, &self.config, known, self.spool.clone()) => opened?,
        };
        let mut origin = opened.origin;
        if self.journal.progress().is_none() {
            let (offset, lsn) = (self.journal.end(), opened.start.lsn);
            origin.comparable = Some(Mark { offset, lsn });
        }
        self.journal.set_origin(origin).await?;
        if self.journal.progress().is_none() {
            let start = Batch { changes: Vec::new(), position: Some(opened.start) };
            self.journal.append(start).await?;
        }
        *self.stats.lock().unwrap_or_else(PoisonError::into_inner) = Some(opened.stats);
        self.part.running();
        let mut source = self.fences.attach(opened.source);
        pipeline::capture(source.as_mut(), &self.journal, stop).await
    }

    /// Asks the server now and then how much WAL it keeps for the slot, most of all while nothing
    /// is captured: then it grows. A login that was refused is not tried again before capture runs.
    pub(super) async fn watch(self: Arc<Self>, stop: CancellationToken) {
        let mut refused = false;
        loop {
            // Set by the first connect that succeeded, however soon capture was paused after it.
            let connected = self.stats.lock().unwrap_or_else(PoisonError::into_inner).is_some();
            refused &= !self.part.state().0.is_running();
            let welcome = connected && !refused;
            if welcome {
                refused = !self.ask().await;
            }
            // Looked at here too: what it says must not depend on how often somebody asks.
            let (server, confirmed) = self.ends();
            self.stalled(server.unwrap_or_default(), confirmed.unwrap_or_default());
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(if welcome { ASK_EVERY } else { LOOK_EVERY }) => {}
            }
        }
    }

    /// Whether it makes sense to ask again.
    async fn ask(&self) -> bool {
        let config::Source::Postgres(config) = &self.config;
        let answer = source::postgres::status(&self.name, config).await;
        let asked = answer.as_ref().ok().map(|status| Asked {
            server: status.server_end,
            confirmed: status.slot.as_ref().and_then(|slot| slot.confirmed),
            retained_bytes: status.slot.as_ref().map(|slot| slot.retained_bytes),
            invalidation: status.slot.as_ref().and_then(|slot| slot.invalidation.clone()),
        });
        let over = |asked: &Option<Asked>| {
            let bytes = asked.as_ref().and_then(|asked| asked.retained_bytes).unwrap_or(0);
            config.wal_retained_bytes_max > 0 && bytes > config.wal_retained_bytes_max
        };
        let before = {
            let mut known = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *known, asked.clone())
        };
        let lost = |asked: &Option<Asked>| asked.as_ref().and_then(|a| a.invalidation.clone());
        if let (Some(cause), None) = (lost(&asked), lost(&before)) {
            error!("{}", self.lost(&cause));
        }
        if over(&asked) && !over(&before) {
            self.guard(config).await;
        }
        match answer {
            Ok(_) => true,
            Err(error) => {
                debug!("cannot ask what WAL is kept for {}: {error}", self.name);
                error.class() == Class::Retry
            }
        }
    }

    /// What has happened to a slot that nobody reads, as capture itself finds out only once it may
    /// go on.
    fn lost(&self, cause: &str) -> String {
        format!(
            "the slot of source {0} was invalidated by the server ({cause}): what was committed \
             since is missing from the journal, and once capture may run, `walrace source create \
             {0} --accept-gap` goes on",
            self.name
        )
    }

    /// Does what the configuration says once the server keeps too much log for our slot.
    async fn guard(&self, config: &config::Postgres) {
        error!(
            "the server keeps more log for the slot of source {} than wal_retained_bytes_max = {}: \
             its disk fills",
            self.name, config.wal_retained_bytes_max
        );
        if config.wal_retained_policy == WalRetainedPolicy::Alert {
            return;
        }
        error!("the slot of source {} is dropped, as wal_retained_policy says", self.name);
        self.keep_off_slot(true);
        if let Err(error) = source::postgres::drop_slot(&self.name, config).await {
            error!("cannot drop the slot of source {}: {error}", self.name);
            *self.asked.lock().unwrap_or_else(PoisonError::into_inner) = None; // then again
        }
        self.keep_off_slot(false);
    }

    /// The names that the messages of `sink` may carry.
    pub(super) fn names(&self, sink: &str) -> Names {
        names(&self.name, &self.config, sink)
    }

    pub(super) fn postgres(&self) -> &config::Postgres {
        let config::Source::Postgres(config) = &self.config;
        config
    }

    /// Why the journal should not be given more than the stream itself, where it should not.
    pub(super) fn is_short(&self) -> Option<String> {
        let (bytes, limit) = (self.journal.info().bytes, self.limits.bytes_max);
        if limit > 0 && bytes > limit / 10 * 8 {
            return Some(format!("the journal has {bytes} of the {limit} bytes that it may take"));
        }
        let free = *self.free_bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let reserve = self.limits.reserve_bytes;
        let free = free.filter(|free| *free < reserve.saturating_mul(2))?;
        Some(format!("the journal's volume has {free} bytes left, {reserve} of them in reserve"))
    }

    /// What `sink` and this source say about schemas.
    pub(super) fn terms(&self, sink: &str, config: &config::Sink) -> Terms {
        terms(&self.name, &self.config, (sink, config))
    }

    /// Its name and what was written of it.
    pub(super) fn config(&self) -> (&str, &config::Source) {
        (&self.name, &self.config)
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn status(&self) -> SourceStatus {
        let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let (mut state, since) = self.part.state();
        let lost = asked.as_ref().and_then(|asked| asked.invalidation.as_deref());
        if let (State::Waiting { reason, .. }, Some(cause)) = (&mut state, lost) {
            reason.push_str(&format!("; and {}", self.lost(cause)));
        }
        let (server, confirmed) = self.ends();
        let config::Source::Postgres(config) = &self.config;
        let journal = self.journal.info();
        let free = *self.free_bytes.lock().unwrap_or_else(PoisonError::into_inner);
        SourceStatus {
            name: self.name.clone(),
            state,
            since,
            server,
            confirmed,
            behind_bytes: server.zip(confirmed).map(|(s, c)| s.0.saturating_sub(c.0)),
            retained_wal_bytes: asked.and_then(|asked| asked.retained_bytes),
            wal_retained_bytes_max: config.wal_retained_bytes_max,
            stalled_seconds: self
                .stalled(server.unwrap_or_default(), confirmed.unwrap_or_default()),
            captured_changes: journal.end.saturating_sub(self.first_offset),
            journal,
            journal_bytes_max: self.limits.bytes_max,
            journal_reserve_bytes: self.limits.reserve_bytes,
            journal_free_bytes: free,
            spool_bytes: self.spool_bytes(),
        }
    }

    fn spool_bytes(&self) -> u64 {
        let stats = self.stats.lock().unwrap_or_else(PoisonError::into_inner);
        stats.as_ref().map_or(0, |stats| stats.spool_bytes.load(Relaxed))
    }

    /// The end of the server's WAL, and what is confirmed. A stream that has fallen silent says
    /// nothing of WAL that moves, so the server's own word counts too.
    fn ends(&self) -> (Option<Lsn>, Option<Lsn>) {
        let stats = self.stats.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let server = asked.as_ref().map(|asked| asked.server);
        match stats.filter(|_| self.part.state().0.is_running()) {
            Some(stats) => (
                server.max(Some(Lsn(stats.server_end.load(Relaxed)))),
                Some(Lsn(stats.confirmed.load(Relaxed))),
            ),
            None => (server, asked.and_then(|asked| asked.confirmed)),
        }
    }

    /// Seconds for which the server's WAL has moved and the slot has not.
    fn stalled(&self, server: Lsn, confirmed: Lsn) -> u64 {
        let mut movement = self.movement.lock().unwrap_or_else(PoisonError::into_inner);
        let moved = confirmed > movement.confirmed || confirmed >= server;
        if moved || server == movement.server && movement.confirmed == Lsn(0) {
            *movement = Movement { confirmed, server, at: Instant::now() };
        }
        movement.server = server;
        movement.at.elapsed().as_secs()
    }
}

/// What `journal` knows of its source.
pub fn known(journal: &Journal) -> Known {
    let past = journal.clone();
    Known {
        progress: journal.progress(),
        origin: journal.origin(),
        has_changes: journal.end() > 0,
        past: Past::new(move |lsn| past.recent(lsn)),
    }
}

/// What a journal that another process may have open knows of its source.
pub fn known_to(journal: Inspection) -> Known {
    let info = journal.info();
    Known {
        progress: info.progress,
        origin: info.origin,
        has_changes: info.end > 0,
        past: Past::new(move |lsn| journal.recent(lsn)),
    }
}

/// What a sink and its source `name` say about schemas.
pub(super) fn terms(name: &str, source: &config::Source, sink: (&str, &config::Sink)) -> Terms {
    let config::Source::Postgres(postgres) = source;
    Terms {
        sink: sink.0.to_owned(),
        source: name.to_owned(),
        contracts: sink.1.contract.clone(),
        on_breach: sink.1.on_breach,
        compatibility: postgres.compatibility.clone(),
    }
}

/// The names that the messages of `sink` may carry, which reads the source `name`.
pub(super) fn names(name: &str, source: &config::Source, sink: &str) -> Names {
    let config::Source::Postgres(postgres) = source;
    let url = url::Url::parse(postgres.url.expose()).ok();
    let part = |part: Option<&str>| part.unwrap_or_default().to_owned();
    Names {
        source: name.to_owned(),
        database: part(url.as_ref().map(|url| url.path().trim_start_matches('/'))),
        hostname: part(url.as_ref().and_then(|url| url.host_str())),
        sink: sink.to_owned(),
    }
}
