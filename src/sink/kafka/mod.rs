//! Topics of Apache Kafka. With transactions each change is there once for those who read
//! committed records only: the progress is a record of the same Kafka transaction, and a second
//! writer is shut out by the transactional id.
//!
//! ```text
//! open:   producer -> topics known
//!         -> init_transactions (ends what was left open, shuts out others)
//!         -> the last progress record is read -> partition counts compared
//! write:  begin -> records -> progress record -> all delivered -> commit
//! ```
//!
//! After a commit whose outcome is unknown the producer is dropped, and `open` reads what holds.

#[cfg(not(feature = "kafka"))]
mod absent;
#[cfg(feature = "kafka")]
mod client;
#[cfg(feature = "kafka")]
mod message;
#[cfg(feature = "kafka")]
mod progress;
#[cfg(feature = "kafka")]
mod topics;
#[cfg(feature = "kafka")]
mod writer;

#[cfg(not(feature = "kafka"))]
pub(super) use absent::Kafka;
#[cfg(feature = "kafka")]
pub(super) use present::Kafka;

#[cfg(feature = "kafka")]
mod present;
