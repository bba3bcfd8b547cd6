//! Walrace through its public surface, against real servers. One binary; `kit` is what the tests
//! stand on.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::cast_possible_truncation,
    reason = "a test that meets the unexpected fails at once, and says where"
)]

mod audit;
mod backfill;
mod capture;
mod chaos;
mod chaos_sinks;
mod config_cdc;
mod crowd;
mod demo;
mod diagnosis;
mod features;
mod format_debezium;
mod format_wal2json;
mod full_disk;
mod gaps;
mod journal;
mod journal_damage;
mod journal_fixture;
mod journal_model;
mod journal_power_cut;
mod kit;
mod large_change;
mod latency;
mod operation;
mod parking;
mod progress;
mod pull_dead_letters;
mod rules;
mod schema_breaches;
mod schema_changes;
mod schema_history;
mod sequin_api;
mod sequin_clients;
mod sink;
mod source;
mod source_history;
mod source_login;
mod source_tables;
mod source_wal2json;
mod source_wal2json_life;
mod streaming;
mod tokens;
mod types;
mod verify;
mod wal_guard;
