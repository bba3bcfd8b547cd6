//! JSON Lines in a file, each change once whatever crashes: the progress is kept beside the data.

use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;

use super::{Capabilities, Context, Progress, Sink, Written};
use crate::{
    change::Batch,
    config::{self, Format},
    error::{Class, Classify, Result},
    format::Encoder,
};
use store::{Lines, Rotation, Store};

mod sidecar;
mod store;
#[cfg(test)]
mod tests;

/// A buffer that grew beyond this is not kept.
const BUFFER_BYTES_MAX: usize = 16 << 20;

/// The `file` sink.
#[derive(Debug)]
pub(super) struct File {
    encoder: Encoder,
    buffer: Vec<u8>,
    context: Context,
    /// Locked only by blocking tasks: one that outlives a cancelled call keeps the next one waiting.
    store: Arc<Mutex<Store>>,
}

impl File {
    pub(super) fn new(options: &config::File, format: Format, context: &Context) -> Self {
        let rotation =
            Rotation { bytes_max: options.rotate_bytes_max, ms_max: options.rotate_ms_max };
        let store = Store::new(Arc::clone(&context.disk), options.path.clone(), rotation);
        Self {
            encoder: Encoder::new(format, &context.names),
            buffer: Vec::new(),
            context: context.clone(),
            store: Arc::new(Mutex::new(store)),
        }
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Store) -> T + Send + 'static,
    ) -> Result<T> {
        let store = Arc::clone(&self.store);
        let task = tokio::task::spawn_blocking(move || {
            // A panic leaves the store closed, so that what a poisoned lock guards is still sound.
            work(&mut store.lock().unwrap_or_else(PoisonError::into_inner))
        });
        task.await.class(Class::Bug, || "a task of the file sink ended without a result")
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

#[async_trait]
impl Sink for File {
    fn capabilities(&self) -> Capabilities {
        Capabilities { transactional_progress: true, lanes: false, state_target: false }
    }

    async fn open(&mut self) -> Result<Option<Progress>> {
        self.blocking(Store::open).await?
    }

    async fn write(&mut self, batch: &Batch, progress: &Progress) -> Result<Written> {
        let lines = self.encode(batch)?;
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
