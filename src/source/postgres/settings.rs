//! A source's configuration with its names settled.

use super::{checks::Server, url::Target};
use crate::{change::Origin, config, error::Result};

/// What the rest of this module needs of the configuration.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    /// The source's name.
    pub(super) name: String,
    pub(super) target: Target,
    /// The primary of `target`, where that is a standby.
    pub(super) primary: Option<Target>,
    pub(super) slot: String,
    pub(super) publication: String,
    /// The second publication, of tables without identity.
    pub(super) inserts: String,
    pub(super) config: config::Postgres,
}

/// PostgreSQL cuts longer names.
const NAME_BYTES_MAX: usize = 63;

impl Settings {
    /// Settles the names of the source `name`.
    pub(super) fn new(name: &str, config: &config::Postgres) -> Result<Self> {
        let default = default_name(name);
        let publication = config.publication.clone().unwrap_or_else(|| default.clone());
        let cut = publication.floor_char_boundary(NAME_BYTES_MAX - INSERTS.len());
        let head = publication.get(..cut).unwrap_or_default();
        Ok(Self {
            name: name.to_owned(),
            target: Target::parse(&config.url)?,
            primary: config.primary_url.as_ref().map(Target::parse).transpose()?,
            slot: config.slot.clone().unwrap_or(default),
            inserts: format!("{head}{INSERTS}"),
            publication,
            config: config.clone(),
        })
    }
}

impl Settings {
    /// The database at the other end, before anything of it is remembered.
    pub(super) fn origin(&self, server: &Server) -> Origin {
        Origin {
            system: server.system.clone(),
            database: server.database.clone(),
            slot: self.slot.clone(),
            database_oid: Some(server.database_oid),
            ..Origin::default()
        }
    }

    /// Where it can be written: publications, and messages as watermarks and heartbeats.
    pub(super) fn primary(&self) -> &Target {
        self.primary.as_ref().unwrap_or(&self.target)
    }
}

const INSERTS: &str = "_inserts";

/// `walrace_<source>` in the characters that a slot's name may have.
fn default_name(source: &str) -> String {
    let plain = source.chars().map(|c| match c.to_ascii_lowercase() {
        c @ ('a'..='z' | '0'..='9' | '_') => c,
        _ => '_',
    });
    "walrace_".chars().chain(plain).take(NAME_BYTES_MAX - INSERTS.len()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_default_name_fits_a_slot() {
        assert_eq!(default_name("Main DB-é"), "walrace_main_db__");
        assert!(default_name(&"x".repeat(99)).len() <= NAME_BYTES_MAX);
    }
}
