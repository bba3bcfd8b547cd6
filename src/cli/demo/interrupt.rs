//! Ctrl-C and its like: the first asks for the end, the second insists.

use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

use crate::error::{Class, Classify, Result};

/// What the signals of this process have asked for.
#[derive(Debug)]
pub(super) struct Interrupt {
    asked: CancellationToken,
    insisted: CancellationToken,
    _listener: JoinSet<()>,
}

impl Interrupt {
    /// Listens from now on; none of these signals ends the process by itself any more.
    pub(super) fn listen() -> Result<Self> {
        let listen = |kind| signal(kind).class(Class::Bug, || "no signal handler");
        let mut signals = [
            listen(SignalKind::interrupt())?,
            listen(SignalKind::terminate())?,
            listen(SignalKind::hangup())?,
        ];
        let (asked, insisted) = (CancellationToken::new(), CancellationToken::new());
        let tokens = [asked.clone(), insisted.clone()];
        let mut listener = JoinSet::new();
        listener.spawn(async move {
            for token in tokens {
                any(&mut signals).await;
                token.cancel();
            }
        });
        Ok(Self { asked, insisted, _listener: listener })
    }

    /// Resolves once the end was asked for.
    pub(super) async fn asked(&self) {
        self.asked.cancelled().await;
    }

    /// Resolves once somebody will not wait for what is left to do.
    pub(super) async fn insisted(&self) {
        self.insisted.cancelled().await;
    }
}

async fn any([interrupt, terminate, hangup]: &mut [Signal; 3]) {
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
        _ = hangup.recv() => {}
    }
}
