//! Streams of changes as JSON Lines, straight from a journal.

use std::sync::Arc;

use axum::{
    body::{Body, Bytes},
    extract::{Path, Query, State},
    http::header,
    response::IntoResponse,
};
use futures_util::stream;
use serde::Deserialize;

use super::Failure;
use crate::{
    config,
    error::{Error, Result},
    format::{Encoder, Names},
    journal::{Limits, Reader},
    runtime::Walrace,
    transform::Filter,
};

/// What a stream shows.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Show {
    /// `now`, `start`, an offset or a resume token; `now` by default.
    from: Option<String>,
    /// The offset to end before; without it the stream goes on until the client leaves.
    to: Option<u64>,
    /// Globs over schema.table, separated by commas.
    tables: Option<String>,
    /// Operations, separated by commas.
    operations: Option<String>,
    /// How a change is written.
    style: Style,
}

/// How the lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Style {
    /// JSON Lines in the native format.
    #[default]
    Json,
    /// For people.
    Plain,
    /// For people at a terminal.
    Colour,
}

const LIMITS: Limits = Limits { changes_max: 500, bytes_max: 1 << 20 };

/// `GET /sources/{source}/changes?from=&to=&tables=&operations=`: live changes, native format.
pub(super) async fn of_source(
    State(walrace): State<Arc<Walrace>>,
    Path(source): Path<String>,
    Query(show): Query<Show>,
) -> Result<impl IntoResponse, Failure> {
    let journal = walrace.journal(&source)?;
    let from = match show.from.as_deref() {
        None | Some("now") => journal.end(),
        Some("start") => journal.start(),
        Some(text) => match text.parse() {
            Ok(offset) => offset,
            Err(_) => journal.resolve(&text.parse()?)?,
        },
    };
    let filter = filter(&show)?;
    let lines = Lines { reader: journal.reader(from)?, filter, to: show.to, walrace };
    Ok(lines.into_body(show.style))
}

/// `GET /sinks/{sink}/missing`: the committed changes in the journal that the sink does not have.
pub(super) async fn missing(
    State(walrace): State<Arc<Walrace>>,
    Path(name): Path<String>,
    Query(show): Query<Show>,
) -> Result<impl IntoResponse, Failure> {
    let status = walrace.status();
    let sink = status.sinks.into_iter().find(|sink| sink.name == name);
    let sink = sink.ok_or_else(|| Error::config(format!("there is no sink {name}")))?;
    let journal = walrace.journal(&sink.source)?;
    let (reader, end) = (journal.reader(sink.cursor)?, journal.end());
    let filter = walrace.filter_of(&name)?;
    Ok(Lines { reader, filter, to: Some(end), walrace }.into_body(show.style))
}

struct Lines {
    reader: Reader,
    filter: Filter,
    to: Option<u64>,
    walrace: Arc<Walrace>,
}

impl Lines {
    fn into_body(self, style: Style) -> impl IntoResponse + use<> {
        let encoder = match style {
            Style::Json => Encoder::new(config::Format::Native, &Names::default()),
            Style::Plain => Encoder::pretty(false),
            Style::Colour => Encoder::pretty(true),
        };
        let kind = match style {
            Style::Json => "application/x-ndjson",
            Style::Plain | Style::Colour => "text/plain; charset=utf-8",
        };
        let chunks = stream::unfold((self, encoder), |(mut lines, mut encoder)| async move {
            let chunk = lines.chunk(&mut encoder).await?;
            Some((chunk, (lines, encoder)))
        });
        ([(header::CONTENT_TYPE, kind)], Body::from_stream(chunks))
    }

    /// The next lines; `None` at the end. An error ends the body without its proper close, which
    /// the client sees.
    async fn chunk(&mut self, encoder: &mut Encoder) -> Option<Result<Bytes>> {
        if self.to.is_some_and(|to| self.reader.offset() >= to) {
            return None;
        }
        let stop = self.walrace.stopping().clone();
        let batch = tokio::select! {
            () = stop.cancelled() => return None,
            batch = self.reader.next(LIMITS) => batch,
        };
        Some(batch.and_then(|mut batch| {
            let to = self.to.unwrap_or(u64::MAX);
            batch.changes.retain(|change| change.offset < to);
            let batch = self.filter.apply(batch);
            let mut text = Vec::new();
            for change in &batch.changes {
                if encoder.encode(change, &mut text)? {
                    text.push(b'\n');
                }
            }
            Ok(Bytes::from(text))
        }))
    }
}

fn list(text: Option<&str>) -> Vec<String> {
    let words = text.unwrap_or_default().split(',').map(str::trim);
    words.filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

fn filter(show: &Show) -> Result<Filter> {
    let mut rules = config::Sink::of(config::SinkKind::Stdout(config::Stdout::default()));
    rules.tables = list(show.tables.as_deref());
    let operations = list(show.operations.as_deref());
    rules.operations = operations.iter().map(|word| word.parse()).collect::<Result<_>>()?;
    Ok(Filter::new(&rules))
}
