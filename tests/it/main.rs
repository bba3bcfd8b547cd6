//! What Walrace does, through its public surface.

mod journal;
mod journal_damage;
mod journal_fixture;
mod journal_power_cut;
mod kit;
