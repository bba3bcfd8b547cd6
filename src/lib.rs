//! Walrace: the change log of a database, made into a product.
//!
//! The modules, in the order of a change's life: a [`source`] reads it, the [`journal`] keeps it, a
//! transform shapes it, a [`format`] writes it down and a [`sink`] delivers it; the two loops that
//! join them are in `pipeline`.

pub mod api;
pub mod catalog;
pub mod change;
pub mod cli;
pub mod config;
pub mod disk;
pub mod error;
pub mod failpoint;
pub mod format;
pub mod journal;
pub mod metrics;
pub mod parking;
pub mod pipeline;
pub mod runtime;
pub mod schema;
pub mod sink;
pub mod source;
mod sqlite;
mod tls;
pub mod transform;
