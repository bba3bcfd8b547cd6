//! What can be told of a Walrace that is not running: from its catalog, its journals, the targets
//! that keep their own progress, and the databases. Nothing is changed.

use std::io::{self, BufWriter, Write};

use super::lag::bytes_text;
use crate::{
    catalog::{self, Catalog},
    change::{Batch, Timestamp},
    config::{self, Config, From},
    error::{Class, Classify, Error, Result},
    format::{Encoder, Names},
    journal::Inspection,
    parking::Parking,
    runtime::{
        BackfillStatus, SinkStatus, SourceStatus, State, Status, backfill_status, journal_options,
    },
    sink::{self, Totals},
    source::postgres::{self, backfill::Part},
    transform::{Filter, Transform},
};

/// A data_dir at rest.
pub(super) struct Offline<'a> {
    config: &'a Config,
    catalog: Catalog,
}

impl<'a> Offline<'a> {
    /// Looks at `config.data_dir`, which must have been used before.
    pub(super) async fn open(config: &'a Config) -> Result<Self> {
        let catalog = Catalog::inspect(&config.data_dir).await?;
        let catalog = catalog.ok_or_else(|| {
            let data_dir = config.data_dir.display();
            Error::config(format!("no walrace ever ran on data_dir {data_dir}"))
                .remedy("start it with `walrace run`")
        })?;
        Ok(Self { config, catalog })
    }

    /// What `GET /status` would say, with every part stopped.
    pub(super) async fn status(&self) -> Result<Status> {
        let (mut sources, mut sinks) = (Vec::new(), Vec::new());
        for (name, source) in &self.config.source {
            sources.push(self.source(name, source).await?);
        }
        for name in self.config.sink.keys() {
            sinks.push(self.sink(name).await?);
        }
        Ok(Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            started_at: Timestamp::now(),
            sources,
            sinks,
            backfills: self.backfills().await?,
        })
    }

    async fn backfills(&self) -> Result<Vec<BackfillStatus>> {
        let mut all = Vec::new();
        for row in self.catalog.backfills().await? {
            let parts: Vec<Part> = self.catalog.backfill_parts(row.id).await?;
            all.push(backfill_status(row, &parts));
        }
        Ok(all)
    }

    async fn source(&self, name: &str, source: &config::Source) -> Result<SourceStatus> {
        let config::Source::Postgres(postgres) = source;
        let journal = self.inspect(name).await?.info();
        let asked = postgres::status(name, postgres).await;
        let (server, slot, state) = match asked {
            Ok(status) if status.slot.is_none() => {
                let gone =
                    "it is not running, and its slot is gone: what was committed since is lost";
                (Some(status.server_end), None, stopped(gone.to_owned()))
            }
            Ok(status) => (Some(status.server_end), status.slot, not_running()),
            Err(error) => {
                (None, None, stopped(format!("its database cannot be asked either: {error}")))
            }
        };
        Ok(SourceStatus {
            name: name.to_owned(),
            state,
            since: Timestamp::now(),
            server,
            confirmed: slot.as_ref().and_then(|slot| slot.confirmed),
            behind_bytes: slot.as_ref().map(|slot| slot.behind_bytes),
            retained_wal_bytes: slot.as_ref().map(|slot| slot.retained_bytes),
            wal_retained_bytes_max: postgres.wal_retained_bytes_max,
            stalled_seconds: 0,
            captured_changes: 0,
            journal,
            journal_bytes_max: self.config.journal.bytes_max,
            journal_reserve_bytes: self.config.journal.reserve_bytes,
            journal_free_bytes: None,
            spool_bytes: 0,
        })
    }

    async fn sink(&self, name: &str) -> Result<SinkStatus> {
        let at = self.place(name).await?;
        let (journal, cursor) = (self.inspect(&at.source).await?, at.cursor);
        let end = journal.info().end;
        let (parked_changes, dead_letters) = self.parked(name).await?;
        let lag = blocking(move || journal.lag(cursor)).await?;
        let age = |at: Timestamp| (Timestamp::now().0 - at.0).max(0).unsigned_abs() / 1000;
        Ok(SinkStatus {
            name: name.to_owned(),
            source: at.source,
            state: if at.known { not_running() } else { stopped("it never ran".into()) },
            since: Timestamp::now(),
            cursor,
            recorded: cursor,
            behind_changes: end.saturating_sub(cursor),
            behind_bytes: lag.map_or(0, |lag| lag.bytes),
            behind_ms: lag.map_or(0, |lag| age(lag.appended)),
            lost_changes: at.lost,
            parked_changes,
            dead_letters,
            parked_bytes: 0,
            parked_changes_max: self.configured(name)?.parked_changes_max,
            unmatched_columns: 0,
            filtered_changes: 0,
            totals: Totals::default(),
        })
    }

    /// How many changes are parked, and how many of them are dead letters.
    async fn parked(&self, name: &str) -> Result<(u64, u64)> {
        match Parking::inspect(&self.config.dead_letters()).await? {
            Some(parking) => parking.count(name).await,
            None => Ok((0, 0)),
        }
    }

    /// Writes the changes of the journal that a sink does not have and that its rules let through
    /// to stdout; how many there are, and a note of what this cannot tell.
    pub(super) async fn missing(
        &self,
        name: &str,
        mut encoder: Encoder,
    ) -> Result<(usize, String)> {
        let at = self.place(name).await?;
        let config = self.configured(name)?;
        let mut filter = Filter::new(config).reads(config.reads);
        let mut rules = Transform::new(name, config)?;
        let (journal, cursor) = (self.inspect(&at.source).await?, at.cursor);
        let count = blocking(move || {
            let mut out = BufWriter::new(io::stdout().lock());
            let mut count = 0;
            for change in journal.dump(cursor) {
                let batch = filter.apply(Batch { changes: vec![change?], position: None });
                for change in batch.changes.iter().filter(|change| rules.wants(change)) {
                    count += 1;
                    let mut line = Vec::new();
                    encoder.encode(change, &mut line)?;
                    line.push(b'\n');
                    match out.write_all(&line) {
                        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                            return Ok(count);
                        }
                        written => written.class(Class::Config, || "cannot write to stdout")?,
                    }
                }
            }
            let _ = out.flush(); // a reader that has left, as `head` does, is no failure
            Ok(count)
        });
        let count = count.await?;
        let mut note = self.note(&at).await;
        if let Some(parked) = super::missing::parked(name, self.parked(name).await?.0) {
            note.push_str(&format!("; {parked}"));
        }
        Ok((count, note))
    }

    /// What is committed at the database and not in the journal cannot be listed; it is measured.
    async fn note(&self, at: &Place) -> String {
        let mut text = "walrace is not running: this is what its journal holds".to_owned();
        if let Some(config::Source::Postgres(postgres)) = self.config.source.get(&at.source) {
            text.push_str(&match postgres::status(&at.source, postgres).await {
                Ok(postgres::Status { slot: Some(slot), .. }) => {
                    format!(
                        "; {} of the server's log is not captured",
                        bytes_text(slot.behind_bytes)
                    )
                }
                Ok(_) => "; the slot is gone, so what was committed since is lost".to_owned(),
                Err(error) => format!("; what was committed since cannot be asked: {error}"),
            });
        }
        for note in super::missing::holes(at.lost, at.gaps) {
            text.push_str(&format!("; {note}"));
        }
        text
    }

    async fn place(&self, name: &str) -> Result<Place> {
        let config = self.configured(name)?;
        let source = self.config.source_of(config).to_owned();
        let info = self.inspect(&source).await?.info();
        let Some(registered) = self.catalog.sink(name).await? else {
            let cursor = if config.from == From::Now { info.end } else { info.start };
            return Ok(Place { source, cursor, lost: 0, gaps: info.gaps.len(), known: false });
        };
        let context = sink::Context::new(&self.config.data_dir, Names::default(), info.lineage);
        let mut target = sink::open(name, config, &context)?;
        let keeps = target.capabilities().transactional_progress;
        let progress = catalog::reconcile(name, &registered, target.peek().await?, keeps)?;
        let lost = self.catalog.lost_ranges(name).await?;
        let lost = lost.iter().map(|range| range.to - range.from).sum();
        let gaps = info.gaps.len();
        Ok(Place { source, cursor: progress.cursor, lost, gaps, known: true })
    }

    fn configured(&self, name: &str) -> Result<&config::Sink> {
        let sink = self.config.sink.get(name);
        sink.ok_or_else(|| Error::config(format!("there is no sink {name}")))
    }

    async fn inspect(&self, source: &str) -> Result<Inspection> {
        let options = journal_options(self.config, source);
        blocking(move || Inspection::open(options)).await
    }
}

/// Where a sink is.
struct Place {
    source: String,
    cursor: u64,
    /// Changes that the journal dropped before the sink had read them.
    lost: u64,
    /// Gaps that the journal records.
    gaps: usize,
    /// Whether the catalog knows it.
    known: bool,
}

fn not_running() -> State {
    stopped("walrace is not running".to_owned())
}

fn stopped(reason: String) -> State {
    State::Stopped { reason, remedy: Some("start it with `walrace run`".to_owned()) }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work).await.class(Class::Bug, || "reading a journal panicked")?
}
