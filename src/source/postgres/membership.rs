//! Which tables a publication of somebody else holds, and when that changes: the stream says
//! nothing of a table that has left it, and capture of it would end in silence.

use std::collections::BTreeSet;

use super::{
    publication::{self, Published},
    settings::Settings,
    wire::Client,
};
use crate::error::Result;

/// What the publication held when it was last looked at.
#[derive(Clone, Debug)]
pub(super) struct Membership(BTreeSet<String>);

impl Membership {
    /// As the source found it; `None` where Walrace itself keeps the publication up to date.
    pub(super) fn new(published: &Published) -> Option<Self> {
        (!published.managed).then(|| Self(published.tables.clone()))
    }

    /// Looks again, and tells what has come and gone.
    pub(super) fn look(&mut self, client: &mut Client, settings: &Settings) -> Result<()> {
        let (source, name) = (&settings.name, &settings.publication);
        let found: BTreeSet<String> = publication::published(client, name)?.into_iter().collect();
        for table in self.0.difference(&found) {
            tracing::warn!(
                %source,
                "{table} has left the publication `{name}`: its changes are not captured until it \
                 is added again, and what is committed meanwhile never is"
            );
        }
        for table in found.difference(&self.0) {
            tracing::info!(
                %source,
                "{table} has joined the publication `{name}`: it is captured from now"
            );
        }
        self.0 = found;
        Ok(())
    }
}
