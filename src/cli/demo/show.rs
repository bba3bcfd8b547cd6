//! The demo while it runs: the load works, changes arrive, figures move.

use std::{sync::Arc, time::Duration};

use tokio::time::{Instant, interval, sleep, sleep_until};

use super::{
    FILE_SINK, QUEUE_SINK, blocking,
    booking::Undone,
    cluster,
    interrupt::Interrupt,
    load::Load,
    screen::{Screen, Tone, duration_text, grouped},
    tally::{Counts, Latencies, Rate},
};
use crate::{
    change::Timestamp,
    error::{Error, Result},
    format::Encoder,
    runtime::{Status, Walrace},
    sink::{Delivery, Subscription},
    source::postgres::Session,
};

const START_LIMIT: Duration = Duration::from_secs(30);
/// What is on its way may take as long as it likes, but it must move.
const STALL_LIMIT: Duration = Duration::from_secs(10);
const CONFIRM_LIMIT: Duration = Duration::from_secs(2);
/// Changes taken from the queue at once.
const AT_ONCE_MAX: usize = 256;
const POLL: Duration = Duration::from_millis(10);

/// What was played.
#[derive(Debug)]
pub(super) struct Played {
    /// What the server said that it committed and rolled back.
    pub(super) counts: Arc<Counts>,
    /// What nobody may have seen.
    pub(super) undone: Undone,
    /// From commit to the queue, without the transaction that filled the tables: its hundreds of
    /// rows would outweigh a short load.
    pub(super) latencies: Latencies,
    /// How long the load worked.
    pub(super) load: Duration,
    /// How long it took until all of it had arrived, from the beginning of the load.
    pub(super) delivery: Duration,
    /// What the server still kept for the slot at the end.
    pub(super) wal: Wal,
}

/// WAL at the end, in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Wal {
    /// Written and not confirmed by Walrace.
    pub(super) unconfirmed: u64,
    /// Kept on disk because of the slot; PostgreSQL lets go of it at its own pace.
    pub(super) kept: u64,
}

/// Everything that moves.
#[derive(Debug)]
pub(super) struct Show<'a> {
    screen: &'a mut Screen,
    walrace: &'a Walrace,
    url: String,
    rate: u32,
    encoder: Encoder,
    counts: Arc<Counts>,
    arrived: u64,
    filling_xid: Option<u32>,
    latencies: Latencies,
    recent: Latencies,
    committed: Rate,
    delivered: Rate,
    looked_at: Instant,
}

impl<'a> Show<'a> {
    pub(super) fn new(
        screen: &'a mut Screen,
        walrace: &'a Walrace,
        (url, rate): (String, u32),
    ) -> Self {
        let encoder = Encoder::pretty(screen.colour());
        Self {
            screen,
            walrace,
            url,
            rate,
            encoder,
            counts: Arc::default(),
            arrived: 0,
            filling_xid: None,
            latencies: Latencies::default(),
            recent: Latencies::default(),
            committed: Rate::default(),
            delivered: Rate::default(),
            looked_at: Instant::now(),
        }
    }

    /// Plays until the seconds are over or somebody asks for the end, and until what was committed
    /// by then has arrived. Nothing where the end was asked for before it began.
    pub(super) async fn play(
        &mut self,
        seconds: Option<u64>,
        interrupt: &Interrupt,
    ) -> Result<Option<Played>> {
        let mut queue = self.walrace.subscribe(QUEUE_SINK)?;
        tokio::select! {
            ready = self.wait_until_running() => ready?,
            () = interrupt.asked() => return Ok(None),
        }
        let load = Load::start(self.url.clone(), self.rate, Arc::clone(&self.counts))?;
        let begin = Instant::now();
        tokio::select! {
            watched = self.watch(&mut queue) => watched?,
            () = load.ended() => {}
            () = interrupt.asked() => {}
            () = after(seconds) => {}
        }
        let undone = load.stop().await?;
        let worked = begin.elapsed();
        self.screen.doing("waiting for what is on its way ...");
        self.drain(&mut queue).await?;
        let delivery = begin.elapsed();
        let wal = wait_until_confirmed(self.url.clone()).await?;
        self.screen.end_status();
        Ok(Some(Played {
            counts: Arc::clone(&self.counts),
            undone,
            latencies: std::mem::take(&mut self.latencies),
            load: worked,
            delivery,
            wal,
        }))
    }

    /// Waits until the slot is there, so that the load is captured from its first change.
    async fn wait_until_running(&self) -> Result<()> {
        let deadline = Instant::now() + START_LIMIT;
        loop {
            let status = self.walrace.status();
            let sources = status.sources.iter().map(|source| &source.state);
            let mut states: Vec<_> = sources.collect();
            states.extend(status.sinks.iter().map(|sink| &sink.state));
            if states.iter().all(|state| state.is_running()) {
                return Ok(());
            }
            let stopped = states.iter().any(|state| state.is_stopped());
            if stopped || Instant::now() > deadline {
                return Err(Error::config(format!("it does not start: {}", trouble(&status))));
            }
            sleep(POLL).await;
        }
    }

    /// Shows what arrives until nobody looks any more.
    async fn watch(&mut self, queue: &mut Subscription) -> Result<()> {
        let mut ticks = interval(self.screen.status_every());
        while !self.screen.is_closed() {
            tokio::select! {
                delivery = queue.next(AT_ONCE_MAX) => self.receive(delivery.as_ref(), true)?,
                _ = ticks.tick() => self.show_figures(),
            }
        }
        Ok(())
    }

    /// Waits until both sinks have every committed change, or it is clear that they will not.
    async fn drain(&mut self, queue: &mut Subscription) -> Result<()> {
        let committed = self.counts.committed();
        let mut polls = interval(POLL);
        let (mut arrived, mut deadline) = ((0, 0), Instant::now() + STALL_LIMIT);
        loop {
            let now = (self.arrived, self.in_file());
            if now.0.min(now.1) >= committed {
                queue.done();
                return Ok(());
            }
            if now != arrived {
                (arrived, deadline) = (now, Instant::now() + STALL_LIMIT);
            }
            tokio::select! {
                delivery = queue.next(AT_ONCE_MAX) => self.receive(delivery.as_ref(), false)?,
                _ = polls.tick() => {}
                () = sleep_until(deadline) => return Ok(()), // the verdict will say what is lost
            }
        }
    }

    fn receive(&mut self, delivery: Option<&Delivery>, show: bool) -> Result<()> {
        let Some(delivery) = delivery else {
            let status = self.walrace.status();
            return Err(Error::retry(format!("the changes ended: {}", trouble(&status))));
        };
        let now = Timestamp::now().0;
        for change in &delivery.changes {
            let transaction = change.transaction;
            self.arrived += 1;
            if *self.filling_xid.get_or_insert(transaction.xid) != transaction.xid {
                let latency = now - transaction.commit_time.0;
                self.latencies.add(latency);
                self.recent.add(latency);
            }
            if show && self.screen.wants(transaction.xid) {
                let mut line = Vec::new();
                self.encoder.encode(change, &mut line)?;
                self.screen.change(&String::from_utf8_lossy(&line));
            }
        }
        Ok(())
    }

    fn show_figures(&mut self) {
        let interval = self.looked_at.elapsed();
        if interval < Duration::from_millis(500) {
            return; // the first tick comes at once
        }
        self.looked_at = Instant::now();
        let (committed, in_file) = (self.counts.committed(), self.in_file());
        let figure = |number: u64, unit: &str| {
            format!(
                "{} {}",
                self.screen.paint(Tone::Bold, grouped(number)),
                self.screen.paint(Tone::Dim, unit)
            )
        };
        let mut parts = vec![
            figure(self.committed.of(committed, interval), "committed/s"),
            figure(self.delivered.of(in_file, interval), "delivered/s"),
            figure(committed.saturating_sub(in_file), "behind"),
            format!(
                "{} {}",
                self.screen.paint(Tone::Dim, "p99"),
                self.screen.paint(Tone::Bold, duration_text(self.recent.per_mille(990)))
            ),
            figure(self.screen.not_shown(), "not shown"),
        ];
        let trouble = trouble(&self.walrace.status());
        if !trouble.is_empty() {
            parts.push(self.screen.paint(Tone::Bad, trouble));
        }
        self.recent.clear();
        self.screen.status(&format!("  {}", parts.join("   ")));
    }

    /// Changes that the file sink has.
    fn in_file(&self) -> u64 {
        let status = self.walrace.status();
        let file = status.sinks.iter().find(|sink| sink.name == FILE_SINK);
        file.map_or(0, |sink| sink.totals.changes)
    }
}

/// Waits a moment for the last confirmation, and says what WAL is left.
async fn wait_until_confirmed(url: String) -> Result<Wal> {
    blocking(move || {
        let mut session = cluster::connect(&url)?;
        let begin = std::time::Instant::now();
        loop {
            let wal = read_wal(&mut session)?;
            if wal.unconfirmed == 0 || begin.elapsed() > CONFIRM_LIMIT {
                return Ok(wal);
            }
            std::thread::sleep(POLL);
        }
    })
    .await
}

fn read_wal(session: &mut Session) -> Result<Wal> {
    let rows = session.execute(
        "select greatest(pg_current_wal_flush_lsn() - confirmed_flush_lsn, 0)::bigint, \
                greatest(pg_current_wal_flush_lsn() - restart_lsn, 0)::bigint \
         from pg_replication_slots",
    )?;
    let row = rows.into_iter().next().ok_or_else(|| Error::damaged("the slot is gone"))?;
    let mut bytes = row.into_iter().map(|text| text?.parse().ok());
    let mut next = || bytes.next().flatten().ok_or_else(|| Error::bug("the slot has no LSN"));
    Ok(Wal { unconfirmed: next()?, kept: next()? })
}

async fn after(seconds: Option<u64>) {
    match seconds {
        Some(seconds) => sleep(Duration::from_secs(seconds)).await,
        None => std::future::pending().await,
    }
}

/// What is not running, and why.
fn trouble(status: &Status) -> String {
    let sources = status.sources.iter().map(|source| (&source.name, &source.state));
    let parts = sources.chain(status.sinks.iter().map(|sink| (&sink.name, &sink.state)));
    let reasons = parts.filter_map(|(name, state)| {
        let reason = state.reason()?;
        Some(format!("{name} is {}: {reason}", state.word()))
    });
    reasons.collect::<Vec<_>>().join("; ")
}
