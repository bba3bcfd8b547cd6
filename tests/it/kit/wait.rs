//! Waiting for a condition, never for a time.

use std::time::{Duration, Instant};

/// Polls `probe` until it gives a value; after `timeout` it fails with what `describe` says.
pub(crate) async fn wait_for<T>(
    timeout: Duration,
    mut probe: impl AsyncFnMut() -> Option<T>,
    describe: impl FnOnce() -> String,
) -> T {
    let begin = Instant::now();
    loop {
        let asked = Instant::now();
        if let Some(value) = probe().await {
            return value;
        }
        assert!(begin.elapsed() < timeout, "after {timeout:?}: {}", describe());
        // A probe that is dear (a long file, read again each time) is asked less often.
        let pause = (asked.elapsed() * 3).clamp(Duration::from_millis(5), Duration::from_secs(1));
        tokio::time::sleep(pause).await;
    }
}

/// The last `lines` lines of a text, for the message of a failure.
pub(crate) fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
