//! What stands here in a build without librdkafka.

use std::convert::Infallible;

use async_trait::async_trait;

use crate::{
    change::Batch,
    config,
    error::{Error, Result},
    sink::{Capabilities, Progress, Sink, With, Written},
};

/// Never made.
pub(in crate::sink) struct Kafka(Infallible);

impl Kafka {
    pub(in crate::sink) fn new(_options: &config::Kafka, _with: With) -> Result<Self> {
        Err(Error::config("this build of Walrace has no `kafka` sink")
            .remedy("use one that is built with the cargo feature `kafka`"))
    }
}

#[async_trait]
impl Sink for Kafka {
    fn capabilities(&self) -> Capabilities {
        match self.0 {}
    }

    async fn open(&mut self) -> Result<Option<Progress>> {
        match self.0 {}
    }

    async fn write(&mut self, _batch: &Batch, _progress: &Progress) -> Result<Written> {
        match self.0 {}
    }

    async fn close(&mut self) -> Result<()> {
        match self.0 {}
    }
}
