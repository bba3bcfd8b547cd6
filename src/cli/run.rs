//! `walrace run`: captures and delivers until it is told to stop.

use std::{process::ExitCode, sync::Arc, time::Duration};

use tokio::signal::unix::{SignalKind, signal};
use tracing::{error, info};

use super::{Global, log};
use crate::{
    api::Listener,
    error::{Class, Classify, Error, Result},
    runtime::{State, Walrace},
};

/// How long a stop waits for replies that are on their way.
const REPLIES: Duration = Duration::from_secs(2);

/// Runs until SIGTERM or SIGINT; a second one ends it at once.
pub async fn run(global: &Global) -> Result<ExitCode> {
    let config = global.load()?;
    log::start(&config.log)?;
    config.create_directories()?;
    let data_dir = config.data_dir.clone();
    let listener = match config.http.listen.as_str() {
        "" => None,
        listen => Some(Listener::bind(listen).await?),
    };
    let walrace = Walrace::start(config).await?;
    let mut serving = tokio::task::JoinSet::new();
    if let Some(listener) = listener {
        listener.announce(&data_dir)?;
        info!("health, metrics and status on http://{}", listener.address);
        let walrace = Arc::clone(&walrace);
        serving.spawn(listener.serve(walrace));
    }
    let mut terminate =
        signal(SignalKind::terminate()).class(Class::Bug, || "no signal handler")?;
    let mut interrupt =
        signal(SignalKind::interrupt()).class(Class::Bug, || "no signal handler")?;
    let refused = tokio::select! {
        _ = terminate.recv() => None,
        _ = interrupt.recv() => None,
        reason = none_could_start(&walrace) => Some(reason),
        Some(Ok(Err(failure))) = serving.join_next() => Some(failure),
    };
    info!("stopping: writes in flight end first");
    tokio::select! {
        () = walrace.stop() => {}
        _ = terminate.recv() => error!("stopped at once; unfinished batches come again"),
        _ = interrupt.recv() => error!("stopped at once; unfinished batches come again"),
    }
    // Those who wait for a reply, such as consumers, get it.
    let _ = tokio::time::timeout(REPLIES, serving.join_next()).await;
    match refused {
        Some(reason) => Err(reason),
        None => Ok(ExitCode::SUCCESS),
    }
}

/// Resolves when no source ever ran and all have stopped: then there is nothing to wait for.
async fn none_could_start(walrace: &Walrace) -> Error {
    loop {
        let sources = walrace.status().sources;
        let stopped = sources.iter().filter_map(|source| match &source.state {
            State::Stopped { reason, remedy } => Some((&source.name, reason, remedy)),
            _ => None,
        });
        let stopped: Vec<_> = stopped.collect();
        let all = stopped.len() == sources.len();
        if let Some((name, reason, remedy)) = stopped.first().filter(|_| all) {
            let error = Error::config(format!("source {name} cannot start: {reason}"));
            return match remedy {
                Some(remedy) => error.remedy(remedy.as_str()),
                None => error,
            };
        }
        if sources.iter().any(|source| source.state.is_running()) {
            return std::future::pending().await;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
