//! JSON Lines in a file, each change once whatever crashes: the progress is kept beside the data.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use tokio::time::Instant;

use super::{Capabilities, Carries, Context, Progress, Sink, With, Written};
use crate::{
    change::Batch,
    config,
    error::{Class, Classify, Error, Result},
    format::Encoder,
};
use store::{Lines, Rotation, Store};

mod sidecar;
mod store;
#[cfg(test)]
mod tests;

/// A buffer that grew beyond this is not kept.
const BUFFER_BYTES_MAX: usize = 16 << 20;

/// After a small batch: each is two fsyncs, and a database on the same disk waits behind them.
const PAUSE: Duration = Duration::from_millis(3);
const SMALL_BATCH_BYTES: usize = 64 << 10;

/// The `file` sink.
#[derive(Debug)]
pub(super) struct File {
    encoder: Encoder,
    buffer: Vec<u8>,
    context: Context,
    /// Locked by blocking tasks: one that outlives a cancelled call keeps the next one waiting.
    store: Arc<Mutex<Store>>,
    /// Counts the calls: a task of a cancelled call that has not begun must not begin any more.
    calls: Arc<AtomicU64>,
    not_before: Option<Instant>,
}

impl File {
    pub(in crate::sink) fn new(options: &config::File, with: With) -> Result<Self> {
        let With { format, context, .. } = with;
        let rotation =
            Rotation { bytes_max: options.rotate_bytes_max, ms_max: options.rotate_ms_max };
        let store = Store::new(Arc::clone(&context.disk), options.path.clone(), rotation);
        Ok(Self {
            encoder: with.encoder(format)?,
            buffer: Vec::new(),
            context: context.clone(),
            store: Arc::new(Mutex::new(store)),
            calls: Arc::default(),
            not_before: None,
        })
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Store) -> T + Send + 'static,
    ) -> Result<T> {
        let (store, calls) = (Arc::clone(&self.store), Arc::clone(&self.calls));
        let call = calls.fetch_add(1, Ordering::SeqCst) + 1;
        let task = tokio::task::spawn_blocking(move || {
            // A panic leaves the store closed, so that what a poisoned lock guards is still sound.
            let mut store = store.lock().unwrap_or_else(PoisonError::into_inner);
            let cancelled = calls.load(Ordering::SeqCst) != call;
            if cancelled { None } else { Some(work(&mut store)) }
        });
        let done = task.await.class(Class::Bug, || "a task of the file sink failed")?;
        done.ok_or_else(|| Error::bug("two calls of the file sink at the same time"))
    }

    /// All changes as lines. One that has no form in this format refuses the batch as a whole, so
    /// that it is split until the change stands alone.
    fn encode(&mut self, batch: &Batch) -> Result<Lines> {
        let mut bytes = std::mem::take(&mut self.buffer);
        bytes.clear();
        let mut offsets = None;
        let mut filtered = 0;
        for change in &batch.changes {
            if self.encoder.encode(change, &mut bytes)? {
                bytes.push(b'\n');
                let (first, _) = offsets.unwrap_or((change.offset, change.offset));
                offsets = Some((first, change.offset));
            } else {
                filtered += 1;
            }
        }
        Ok(Lines { bytes, offsets, filtered })
    }
}

impl Drop for File {
    /// Another sink may open the same file next: nothing of ours may write by then.
    fn drop(&mut self) {
        self.calls.fetch_add(1, Ordering::SeqCst);
        drop(self.store.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

#[async_trait]
impl Sink for File {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            transactional_progress: true,
            batches_by_bytes: true,
            carries: Carries::Text,
            ..Capabilities::default()
        }
    }

    fn not_before(&self) -> Option<Instant> {
        self.not_before
    }

    async fn open(&mut self) -> Result<Option<Progress>> {
        self.blocking(Store::open).await?
    }

    async fn write(&mut self, batch: &Batch, progress: &Progress) -> Result<Written> {
        let begun = Instant::now();
        let lines = self.encode(batch)?;
        self.not_before = (lines.bytes.len() < SMALL_BATCH_BYTES).then(|| begun + PAUSE);
        let progress = *progress;
        let (lines, written) = self
            .blocking(move |store| {
                let written = store.write(&lines, progress);
                (lines, written)
            })
            .await?;
        let filtered = lines.filtered;
        if lines.bytes.capacity() <= BUFFER_BYTES_MAX {
            self.buffer = lines.bytes;
        }
        written?;
        self.context.count_filtered(filtered);
        Ok(Written::All)
    }

    async fn peek(&mut self) -> Result<Option<Progress>> {
        self.blocking(|store| store.peek()).await?
    }

    async fn close(&mut self) -> Result<()> {
        self.blocking(Store::close).await
    }
}
