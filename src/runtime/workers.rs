//! The threads of the sinks, apart from those of capture: a sink that computes or blocks for long
//! takes neither a thread nor the processor from the loop that confirms the source.

use tokio::runtime::{Builder, Handle, Runtime};

use crate::error::{Class, Classify, Result};

/// How far the sinks stand back (`nice`) where both want the same core. A walsender whose socket is
/// full stands still until the reader runs, so each wait of the reader costs capture its length.
const NICE: i32 = 10;

/// A runtime of its own, which ends with its last owner.
#[derive(Debug)]
pub(super) struct Workers {
    handle: Handle,
    runtime: Option<Runtime>,
}

impl Workers {
    pub(super) fn start() -> Result<Self> {
        let runtime = Builder::new_multi_thread()
            .enable_all()
            .thread_name("deliver")
            .on_thread_start(stand_back)
            .build()
            .class(Class::Retry, || "cannot start the threads of the sinks")?;
        Ok(Self { handle: runtime.handle().clone(), runtime: Some(runtime) })
    }

    /// Where the tasks of the sinks are spawned.
    pub(super) fn handle(&self) -> &Handle {
        &self.handle
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        // Whatever blocks is left behind: a runtime must not wait for threads inside another.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// On Linux a priority belongs to a thread; elsewhere it would be that of the process.
fn stand_back() {
    #[cfg(target_os = "linux")]
    let _ = rustix::process::nice(NICE);
}
