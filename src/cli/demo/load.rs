//! The load: a thread that works as the booking desk does, at a steady rate.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use tokio_util::sync::CancellationToken;

use super::{
    booking::{Desk, Undone},
    tally::Counts,
};
use crate::error::{Class, Classify, Result};

/// A rate that the server could not keep is not made up for later than this.
const CATCH_UP_MAX: Duration = Duration::from_millis(500);

/// The running load.
#[derive(Debug)]
pub(super) struct Load {
    thread: JoinHandle<Result<Undone>>,
    stop: Arc<AtomicBool>,
    ended: CancellationToken,
}

impl Load {
    /// Starts `rate` transactions a second.
    pub(super) fn start(url: String, rate: u32, counts: Arc<Counts>) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let ended = CancellationToken::new();
        let (stopping, guard) = (Arc::clone(&stop), ended.clone().drop_guard());
        let work = move || {
            let _guard = guard; // says that the load has ended, however it does
            let desk = Desk::open(&url, counts)?;
            drive(desk, Duration::from_secs(1) / rate.max(1), &stopping)
        };
        let thread = thread::Builder::new().name("demo-load".into()).spawn(work);
        let thread = thread.class(Class::Retry, || "cannot start a thread for the load")?;
        Ok(Self { thread, stop, ended })
    }

    /// Resolves when it ends by itself, which only an error makes it do.
    pub(super) async fn ended(&self) {
        self.ended.cancelled().await;
    }

    /// Ends it after the transaction it is in; what it undid.
    pub(super) async fn stop(self) -> Result<Undone> {
        self.stop.store(true, Relaxed);
        self.ended.cancelled().await;
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

fn drive(mut desk: Desk, interval: Duration, stop: &AtomicBool) -> Result<Undone> {
    let mut due = Instant::now();
    while !stop.load(Relaxed) {
        desk.work()?;
        due += interval;
        let now = Instant::now();
        match due.checked_duration_since(now) {
            Some(early) => thread::sleep(early),
            None if now.duration_since(due) > CATCH_UP_MAX => due = now,
            None => {}
        }
    }
    Ok(desk.into_undone())
}
