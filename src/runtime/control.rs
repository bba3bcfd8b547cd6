//! What people do to the sinks of a running Walrace.

use std::collections::BTreeSet;

use super::{
    Walrace,
    delivering::{Moved, To},
};
use crate::{
    catalog::{By, Event, Version},
    change::Change,
    error::Result,
    parking::{Letter, Place, Query},
};

impl Walrace {
    /// Ends delivery to a sink until it is resumed.
    pub async fn pause(&self, sink: &str, by: &By) -> Result<()> {
        self.sink(sink)?.pause(by).await
    }

    /// Lets a paused sink go on, and one that stopped or waits try again at once.
    pub async fn resume(&self, sink: &str, by: &By) -> Result<()> {
        self.sink(sink)?.resume(by).await
    }

    /// Delivers again from an earlier place on.
    pub async fn rewind(&self, sink: &str, to: &To, by: &By) -> Result<Moved> {
        self.sink(sink)?.rewind(to, by).await
    }

    /// Gives up everything before a later place.
    pub async fn skip_to(&self, sink: &str, to: &To, by: &By) -> Result<Moved> {
        self.sink(sink)?.skip_to(to, by).await
    }

    /// Makes a dead letter of one change, by default the next; its offset.
    pub async fn skip(&self, sink: &str, offset: Option<u64>, by: &By) -> Result<u64> {
        self.sink(sink)?.skip(offset, by).await
    }

    /// What was done to a sink, newest first.
    pub async fn events(&self, sink: &str) -> Result<Vec<Event>> {
        self.catalog.events(self.sink(sink)?.name()).await
    }

    /// Every version of every table of a source, by name and number.
    pub async fn schema_versions(&self, source: &str) -> Result<Vec<Version>> {
        let lineage = self.journal(source)?.lineage();
        self.catalog.schema_versions(source, lineage).await
    }

    /// Parked changes and dead letters.
    pub async fn parked(&self, query: &Query) -> Result<Vec<Letter>> {
        self.parking.list(query).await
    }

    /// One of them with its change.
    pub async fn parked_change(&self, place: &Place) -> Result<(Letter, Change)> {
        self.parking.show(place).await
    }

    /// Lets parked changes be tried again at once; how many there are.
    pub async fn retry_parked(&self, query: &Query, by: &By) -> Result<u64> {
        let mut done = 0;
        for sink in self.sinks_of(query).await? {
            let own = Query { sink: Some(sink.clone()), ..query.clone() };
            done += match self.sinks.get(&sink) {
                Some(sink) => sink.retry_parked(&own, by).await?,
                None => 0, // its sink is gone from the configuration
            };
        }
        Ok(done)
    }

    /// Gives parked changes up; how many there are.
    pub async fn drop_parked(&self, query: &Query, by: &By) -> Result<u64> {
        let mut done = 0;
        for sink in self.sinks_of(query).await? {
            let own = Query { sink: Some(sink.clone()), ..query.clone() };
            done += match self.sinks.get(&sink) {
                Some(sink) => sink.drop_parked(&own, by).await?,
                None => self.parking.drop(&own).await?,
            };
        }
        Ok(done)
    }

    /// Gives columns of a parked change other values; it is tried again at once.
    pub async fn edit_parked(
        &self,
        place: &Place,
        values: &serde_json::Map<String, serde_json::Value>,
        by: &By,
    ) -> Result<()> {
        self.sink(&place.sink)?.edit_parked(place, values, by).await
    }

    async fn sinks_of(&self, query: &Query) -> Result<BTreeSet<String>> {
        let all = Query { limit: u64::MAX, ..query.clone() };
        let letters = self.parking.list(&all).await?;
        Ok(letters.into_iter().map(|letter| letter.sink).collect())
    }
}
