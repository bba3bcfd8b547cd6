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
use tokio::sync::{Semaphore, SemaphorePermit};

use super::Failure;
use crate::{
    config,
    error::{Error, Result},
    format::{Encoder, Names},
    journal::{Journal, Limits, Reader, Token},
    runtime::Walrace,
    transform::{Filter, Transform},
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
    /// Whether a line `{"resume_token": ...}` follows each run of changes.
    tokens: bool,
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

/// Streams at one time; each holds up to `LIMITS.bytes_max` of rows and its place in the journal.
const STREAMS_MAX: usize = 64;
static STREAMS: Semaphore = Semaphore::const_new(STREAMS_MAX);

fn permit() -> Result<SemaphorePermit<'static>> {
    STREAMS.try_acquire().map_err(|_| {
        Error::retry(format!("{STREAMS_MAX} streams of changes are open, as many as there may be"))
            .remedy("end one (`walrace tail`, `walrace missing`), or read through a sink")
    })
}

/// `GET /sources/{source}/changes?from=&to=&tables=&operations=&tokens=`: live changes, native
/// format.
pub(super) async fn of_source(
    State(walrace): State<Arc<Walrace>>,
    Path(source): Path<String>,
    Query(show): Query<Show>,
) -> Result<impl IntoResponse, Failure> {
    let permit = permit()?;
    let journal = walrace.journal(&source)?;
    let filter = filter(&show)?;
    let mut first = None;
    let from = match show.from.as_deref() {
        None | Some("now") => {
            let token = journal.token_at_end();
            first = Some(token).filter(|_| show.tokens);
            token.offset
        }
        Some("start") => journal.start(),
        Some(text) => match text.parse() {
            Ok(offset) => offset,
            Err(_) => {
                let token: Token = text.parse()?;
                let expired = |error| or_gone(error, token.offset, journal.start());
                journal.resume(&token).map_err(expired)?
            }
        },
    };
    let reader = journal.reader(from).map_err(|error| or_gone(error, from, journal.start()))?;
    let tokens = show.tokens.then(|| Tokens { journal: journal.clone(), first });
    let (to, rules) = (show.to, None);
    let lines = Lines { reader, filter, rules, to, walrace, tokens, _permit: permit };
    Ok(lines.into_body(show.style))
}

/// An offset below the oldest is gone for good, which a client can tell from a mistake of its own.
fn or_gone(error: Error, asked: u64, oldest: u64) -> Failure {
    if asked < oldest { Failure::Gone(error, oldest) } else { Failure::Of(error) }
}

/// `GET /sinks/{sink}/missing`: the committed changes in the journal that the sink does not have
/// and that its rules let through, as they are before any rule.
pub(super) async fn missing(
    State(walrace): State<Arc<Walrace>>,
    Path(name): Path<String>,
    Query(show): Query<Show>,
) -> Result<impl IntoResponse, Failure> {
    let permit = permit()?;
    let status = super::status_of(Arc::clone(&walrace)).await?;
    let sink = status.sinks.into_iter().find(|sink| sink.name == name);
    let sink = sink.ok_or_else(|| Error::config(format!("there is no sink {name}")))?;
    let journal = walrace.journal(&sink.source)?;
    let (reader, end) = (journal.reader(sink.cursor)?, journal.end());
    let (filter, rules) = walrace.rules_of(&name)?;
    let (to, rules) = (Some(end), Some(rules));
    let lines = Lines { reader, filter, rules, to, walrace, tokens: None, _permit: permit };
    Ok(lines.into_body(show.style))
}

struct Lines {
    reader: Reader,
    filter: Filter,
    /// Those of a sink leave out what it will never get.
    rules: Option<Transform>,
    to: Option<u64>,
    walrace: Arc<Walrace>,
    tokens: Option<Tokens>,
    _permit: SemaphorePermit<'static>,
}

/// Where resume tokens come from, for those who asked for them.
struct Tokens {
    journal: Journal,
    /// Told before the first change, to a reader that began with what comes next.
    first: Option<Token>,
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
        if let Some(token) = self.tokens.as_mut().and_then(|tokens| tokens.first.take()) {
            return Some(Ok(Bytes::from(token_line(&token))));
        }
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
            // After what was filtered too: a reader of few tables resumes where it really was.
            let tokens = self.tokens.as_ref().zip(batch.changes.last());
            let token = tokens.map(|(tokens, last)| tokens.journal.token_after(last));
            let mut batch = self.filter.apply(batch);
            if let Some(rules) = &mut self.rules {
                batch.changes.retain(|change| rules.wants(change));
            }
            let mut text = Vec::new();
            for change in &batch.changes {
                if encoder.encode(change, &mut text)? {
                    text.push(b'\n');
                }
            }
            if let Some(token) = token {
                text.extend_from_slice(token_line(&token).as_bytes());
            }
            Ok(Bytes::from(text))
        }))
    }
}

fn token_line(token: &Token) -> String {
    format!("{{\"resume_token\":\"{token}\"}}\n")
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
    Ok(Filter::new(&rules).with_watermarks())
}
