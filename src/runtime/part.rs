//! A part of the process that runs, waits or has stopped: one for each source and each sink.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::{
    change::Timestamp,
    error::{Class, Error},
};

/// What a part is doing.
///
/// ```text
/// starting ──► running ──► waiting (backoff) ──► running ...
///     │          │ └─────► stopped (a person must act) ──► running, once somebody has
///     │          └───────► paused (somebody did) ──► running, once it is resumed
///     └──► stopped, waiting, paused
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum State {
    /// Not connected yet.
    #[default]
    Starting,
    /// At work.
    Running,
    /// Something is down; it tries again by itself.
    Waiting {
        /// Why.
        reason: String,
        /// Failed attempts since it last ran.
        failed_attempts: u32,
    },
    /// Somebody paused it.
    Paused {
        /// Who, and why.
        by: String,
    },
    /// It does not try again by itself.
    Stopped {
        /// Why.
        reason: String,
        /// What mends it.
        remedy: Option<String>,
    },
}

impl State {
    /// At work.
    pub fn is_running(&self) -> bool {
        matches!(self, State::Running)
    }

    /// Down, and trying again by itself.
    pub fn is_waiting(&self) -> bool {
        matches!(self, State::Waiting { .. })
    }

    /// Waiting for a person.
    pub fn is_stopped(&self) -> bool {
        matches!(self, State::Stopped { .. })
    }

    /// One word for tables.
    pub fn word(&self) -> &'static str {
        match self {
            State::Starting => "starting",
            State::Running => "running",
            State::Waiting { .. } => "waiting",
            State::Paused { .. } => "paused",
            State::Stopped { .. } => "stopped",
        }
    }

    /// Why it is not running, with the remedy where one is known.
    pub fn reason(&self) -> Option<String> {
        match self {
            State::Starting | State::Running => None,
            State::Waiting { reason, .. } => Some(reason.clone()),
            State::Paused { by } => Some(format!("paused by {by}")),
            State::Stopped { reason, remedy: None } => Some(reason.clone()),
            State::Stopped { reason, remedy: Some(remedy) } => Some(format!("{reason} ({remedy})")),
        }
    }
}

/// A source or a sink at run time: its name and what it is doing.
#[derive(Debug)]
pub struct Part {
    kind: &'static str,
    name: String,
    state: Mutex<(State, Timestamp)>,
}

/// Whether a failed part tries again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// It waited; now again.
    Again,
    /// It has stopped, or was told to.
    Stop,
}

impl Part {
    /// A part that has not begun; `kind` is `source` or `sink`.
    pub fn new(kind: &'static str, name: &str) -> Self {
        let state = Mutex::new((State::Starting, Timestamp::now()));
        Self { kind, name: name.to_owned(), state }
    }

    /// What it is doing, and since when.
    pub fn state(&self) -> (State, Timestamp) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// It is at work.
    pub fn running(&self) {
        if self.enter(State::Running) {
            info!("{} {} is running", self.kind, self.name);
        }
    }

    /// Somebody paused it.
    pub fn paused(&self, by: &str) {
        self.enter(State::Paused { by: by.to_owned() });
    }

    /// Handles the error that ended an attempt: logs it once, says so in the state and waits, or
    /// stops.
    pub async fn failed(
        &self,
        error: &Error,
        backoff: &mut Backoff,
        stop: &CancellationToken,
    ) -> Next {
        if error.class() != Class::Retry {
            let remedy = error.remedy_text().map(str::to_owned);
            error!("{} {} has stopped: {error}", self.kind, self.name);
            self.enter(State::Stopped { reason: error.summary(), remedy });
            return Next::Stop;
        }
        let wait = backoff.next_wait();
        let failed_attempts = backoff.failures();
        if self.enter(State::Waiting { reason: error.to_string(), failed_attempts }) {
            warn!("{} {} waits and tries again: {error}", self.kind, self.name);
        }
        tokio::select! {
            () = stop.cancelled() => Next::Stop,
            () = tokio::time::sleep(wait) => Next::Again,
        }
    }

    /// Takes a new state; true when it tells people something new.
    fn enter(&self, state: State) -> bool {
        let mut current = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let same = match (&current.0, &state) {
            (State::Waiting { reason: old, .. }, State::Waiting { reason: new, .. }) => old == new,
            (old, new) => old == new,
        };
        let since = if same { current.1 } else { Timestamp::now() };
        *current = (state, since);
        !same
    }
}

/// Exponential backoff with jitter.
#[derive(Clone, Debug)]
pub struct Backoff {
    min: Duration,
    max: Duration,
    failures: u32,
}

impl Backoff {
    /// Waits between `min` and `max`.
    pub fn new(min: Duration, max: Duration) -> Self {
        Self { min, max, failures: 0 }
    }

    /// The next wait: doubled each time, within 20 % of its length by chance.
    pub fn next_wait(&mut self) -> Duration {
        let doubled = self.min.saturating_mul(1 << self.failures.min(20));
        self.failures = self.failures.saturating_add(1);
        doubled.min(self.max).mul_f64(0.8 + 0.4 * fastrand::f64())
    }

    /// Failures since the last success.
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// Something worked: the next failure waits the shortest time again.
    pub fn reset(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_limit_and_fall_back_after_a_success() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(1));
        let waits: Vec<_> = (0..6).map(|_| backoff.next_wait().as_millis()).collect();
        assert!((80..=120).contains(&waits[0]), "{waits:?}");
        assert!((320..=480).contains(&waits[2]), "{waits:?}");
        assert!((800..=1200).contains(&waits[5]), "{waits:?}");
        backoff.reset();
        assert!(backoff.next_wait() <= Duration::from_millis(120));
    }

    #[tokio::test]
    async fn an_outage_waits_and_a_mistake_stops() {
        let part = Part::new("sink", "lake");
        let stop = CancellationToken::new();
        let mut backoff = Backoff::new(Duration::from_millis(1), Duration::from_millis(1));
        let outage = Error::retry("connection refused");
        assert_eq!(part.failed(&outage, &mut backoff, &stop).await, Next::Again);
        assert_eq!(part.state().0.word(), "waiting");
        part.running();
        let mistake = Error::config("wrong password").remedy("ALTER ROLE");
        assert_eq!(part.failed(&mistake, &mut backoff, &stop).await, Next::Stop);
        assert_eq!(part.state().0.reason().unwrap(), "wrong password (ALTER ROLE)");
    }
}
