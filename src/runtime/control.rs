//! What people do to the sinks of a running Walrace.

use std::{collections::BTreeSet, sync::Arc};

use super::{
    Walrace, backfill_status,
    backfilling::Backfilling,
    delivering::{Moved, To},
    status::BackfillStatus,
};
use crate::{
    catalog::{BackfillState, By, Event, NewBackfill, Version},
    change::Change,
    error::{Error, Result},
    parking::{Letter, Place, Query},
    pipeline,
    source::postgres::backfill::PlannedTable,
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

    /// Accepts the newest schema of a table, or another version, whatever it breaks: what waits for
    /// that is tried again. How many changes did.
    pub async fn accept_schema(
        &self,
        source: &str,
        (table, number): (&str, Option<u32>),
        by: &By,
    ) -> Result<(u32, u64)> {
        let versions = self.schema_versions(source).await?;
        let mut of = versions.iter().filter(|version| version.table.full_name() == table);
        let version = match number {
            Some(number) => of.find(|version| version.number == number),
            None => of.next_back(),
        };
        let version = version.ok_or_else(|| {
            let what = number.map_or(String::new(), |number| format!(" has no version {number}"));
            Error::config(match number {
                Some(_) => format!("{table}{what}"),
                None => format!("no change of {table} was captured"),
            })
            .remedy("`walrace schema list` names the tables and how many versions each has")
        })?;
        self.catalog.accept_schema(source, &version.table, by).await?;
        let mut changes = 0;
        for sink in self.sinks.values().filter(|sink| sink.source() == source) {
            let own = Query {
                sink: Some(sink.name().to_owned()),
                table: Some(table.to_owned()),
                error: Some(format!("the schema of {table} {}", pipeline::NOT_ACCEPTED)),
                limit: u64::MAX,
                ..Query::default()
            };
            changes += sink.retry_parked(&own, by).await?;
        }
        Ok((version.number, changes))
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

    /// Asks for a backfill; its number.
    pub async fn backfill(&self, asked: &NewBackfill, by: &By) -> Result<u64> {
        let backfilling = self.backfilling(&asked.source)?;
        if let Some(sink) = &asked.sink {
            let source = self.sink(sink)?.source();
            if source != asked.source {
                return Err(Error::config(format!(
                    "sink {sink} reads the source {source}, not {}",
                    asked.source
                )));
            }
        }
        backfilling.planned(asked).await?; // what cannot be read is told at once
        let id = self.catalog.add_backfill(asked, by).await?;
        backfilling.look();
        Ok(id)
    }

    /// What a backfill would read.
    pub async fn plan_backfill(&self, asked: &NewBackfill) -> Result<Vec<PlannedTable>> {
        self.backfilling(&asked.source)?.rehearsed(asked).await
    }

    /// Every backfill, the oldest first.
    pub async fn backfills(&self) -> Result<Vec<BackfillStatus>> {
        let mut all = Vec::new();
        for row in self.catalog.backfills().await? {
            all.push(match self.backfills.get(&row.asked.source) {
                Some(backfilling) => backfilling.status(row).await?,
                None => backfill_status(row, &[]), // its source is gone from the configuration
            });
        }
        Ok(all)
    }

    /// Pauses, resumes or cancels a backfill.
    pub async fn change_backfill(&self, id: u64, to: BackfillState, by: &By) -> Result<()> {
        let row = self.catalog.backfill(id).await?;
        if row.state.has_ended() {
            return Err(Error::config(format!("backfill {id} is {} already", row.state.word())));
        }
        let backfilling = self.backfilling(&row.asked.source)?;
        match to {
            BackfillState::Queued if row.state == BackfillState::Running => Ok(()),
            BackfillState::Queued => {
                self.catalog.set_backfill(id, (to, None), Some(by)).await?;
                backfilling.look();
                Ok(())
            }
            _ => backfilling.rest(id, (to, by)).await,
        }
    }

    fn backfilling(&self, source: &str) -> Result<&Arc<Backfilling>> {
        let found = self.backfills.get(source);
        found.ok_or_else(|| Error::config(format!("there is no source {source}")))
    }

    async fn sinks_of(&self, query: &Query) -> Result<BTreeSet<String>> {
        let all = Query { limit: u64::MAX, ..query.clone() };
        let letters = self.parking.list(&all).await?;
        Ok(letters.into_iter().map(|letter| letter.sink).collect())
    }
}
