//! Where changes come from: one trait, one `match` that opens it.

use async_trait::async_trait;

use crate::{
    change::{Batch, Position},
    error::Result,
};

pub mod postgres;

/// A database that is captured.
///
/// `next` and `confirm` are called from one task, in turn. A source that has failed is dropped and
/// opened anew from the journal's progress; it never repairs itself behind the journal's back.
#[async_trait]
pub trait Source: Send {
    /// Waits for the next run of changes, in commit order, and takes all that has arrived up to the
    /// source's own limits of bytes and time. Cancel-safe: a dropped call loses nothing.
    ///
    /// An idle source returns an empty batch with a position now and then, so that it can be
    /// confirmed and a quiet database does not retain its log.
    async fn next(&mut self) -> Result<Batch>;

    /// Says that all below `position` is durable with us: the source may forget it. Never called
    /// with a position that the journal has not recorded.
    async fn confirm(&mut self, position: Position) -> Result<()>;
}
