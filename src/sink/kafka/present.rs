//! The sink itself: changes become messages here, and blocking tasks write them.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use tokio_util::sync::CancellationToken;

use super::{
    client::{Call, Cluster},
    message::{Maker, Messages},
    writer::Writer,
};
use crate::{
    change::Batch,
    config,
    error::{Class, Classify, Error, Result},
    sink::{Capabilities, Context, Progress, Sink, With, Written},
};

/// The `kafka` sink.
pub(in crate::sink) struct Kafka {
    maker: Maker,
    /// Locked by blocking tasks: one that outlives a cancelled call keeps the next one waiting, for
    /// as long as it takes to notice.
    writer: Arc<Mutex<Writer>>,
    transactional: bool,
    timeout: Duration,
    context: Context,
}

impl Kafka {
    pub(in crate::sink) fn new(options: &config::Kafka, with: With) -> Result<Self> {
        let cluster = Cluster::new(options)?;
        let lineage = with.context.lineage;
        let id = options.transactional_id.clone();
        let id = id.unwrap_or_else(|| format!("walrace-{lineage}-{}", with.name));
        Ok(Self {
            maker: Maker::new(options, with)?,
            writer: Arc::new(Mutex::new(Writer::new(cluster, options, with.name, id))),
            transactional: options.transactional,
            timeout: Duration::from_millis(options.timeout_ms),
            context: with.context.clone(),
        })
    }

    /// Runs `work` where it may block. When this call is given up, so is the work, soon.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Writer, &Call) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let given_up = CancellationToken::new();
        let _guard = given_up.clone().drop_guard();
        let (writer, timeout) = (Arc::clone(&self.writer), self.timeout);
        let task = tokio::task::spawn_blocking(move || {
            // A panic leaves the writer closed, so that what a poisoned lock guards is still sound.
            let mut writer = writer.lock().unwrap_or_else(PoisonError::into_inner);
            let call = Call::new(timeout, given_up);
            call.check("begin")?;
            work(&mut writer, &call)
        });
        task.await.class(Class::Bug, || "a task of the kafka sink failed")?
    }
}

#[async_trait]
impl Sink for Kafka {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            transactional_progress: self.transactional,
            // One commit costs as much for few changes as for many.
            batches_by_bytes: self.transactional,
            routes: true,
            headers: true,
            ..Capabilities::default()
        }
    }

    async fn open(&mut self) -> Result<Option<Progress>> {
        self.blocking(Writer::open).await
    }

    async fn write(&mut self, batch: &Batch, progress: &Progress) -> Result<Written> {
        let Messages { list, topics, filtered } = self.maker.make(batch)?;
        let progress = *progress;
        self.blocking(move |writer, call| writer.write((list, &topics), progress, call)).await?;
        self.context.count_filtered(filtered);
        Ok(Written::All)
    }

    async fn peek(&mut self) -> Result<Option<Progress>> {
        if !self.transactional {
            return Ok(None);
        }
        self.blocking(|writer, call| writer.peek(call)).await
    }

    async fn close(&mut self) -> Result<()> {
        self.blocking(|writer, _| {
            writer.close();
            Ok(())
        })
        .await
    }
}

/// Another writer has the transactional id by now.
pub(super) fn fenced(id: &str) -> Error {
    Error::retry(format!("another walrace writes as `{id}`, and has shut this one out"))
        .remedy("stop one of them, or give them names or transactional ids of their own")
}
