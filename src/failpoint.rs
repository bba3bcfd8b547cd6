//! Named points at which a test kills the process, as `kill -9` would.
//!
//! Built only with the feature `failpoints`; otherwise [`reach`] is empty. The environment
//! variable `WALRACE_FAILPOINT=name:3` kills the process when it reaches `name` the third time.

/// Passes the point `name`, unless a test asked to die here.
#[cfg(not(feature = "failpoints"))]
#[inline(always)]
pub fn reach(_name: &str) {}

/// Passes the point `name`, unless a test asked to die here.
#[cfg(feature = "failpoints")]
pub fn reach(name: &str) {
    use std::sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    };

    static ARMED: OnceLock<Option<(String, AtomicU32)>> = OnceLock::new();
    let armed = ARMED.get_or_init(|| {
        let text = std::env::var("WALRACE_FAILPOINT").ok()?;
        let counted = text.rsplit_once(':').and_then(|(point, n)| Some((point, n.parse().ok()?)));
        let (point, count) = counted.unwrap_or((&text, 1));
        Some((point.to_owned(), AtomicU32::new(count)))
    });
    let Some((point, left)) = armed else { return };
    if point == name && left.fetch_sub(1, Ordering::Relaxed) == 1 {
        let own = rustix::process::getpid();
        let _ = rustix::process::kill_process(own, rustix::process::Signal::KILL);
        std::process::abort();
    }
}
