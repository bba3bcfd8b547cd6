//! What people do to sinks: pause, resume, rewind, skip; and to what is parked: list, show, edit,
//! retry, drop.

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::{Path, Query as Search, State},
    routing::{get, post},
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::Failure;
use crate::{
    catalog::{By, Event},
    change::Timestamp,
    config::Format,
    error::{Class, Classify, Error, Result},
    format::{Encoder, Names},
    parking::{Letter, Place, Query, State as Parked},
    runtime::{Moved, To, Walrace},
};

/// Letters that one reply has at most, where nobody says how many.
const LETTERS: u64 = 100;

pub(super) fn routes() -> Router<Arc<Walrace>> {
    Router::new()
        .route("/sinks/{sink}/pause", post(pause))
        .route("/sinks/{sink}/resume", post(resume))
        .route("/sinks/{sink}/rewind", post(rewind))
        .route("/sinks/{sink}/skip", post(skip))
        .route("/sinks/{sink}/events", get(events))
        .route("/sources/{source}/schema/accept", post(super::schema::accept))
        .route("/dead-letters", get(list))
        .route("/dead-letters/retry", post(retry))
        .route("/dead-letters/drop", post(drop_letters))
        .route("/dead-letters/{id}", get(show).patch(edit))
}

/// Who does it, and what for; part of each body.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Reason {
    /// A user's name; by default `http`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub who: Option<String>,
    /// What for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

impl Reason {
    pub(super) fn by(self) -> By {
        By { who: self.who.unwrap_or_else(|| "http".to_owned()), why: self.why }
    }
}

/// The body of a move.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Move {
    /// `start`, `now`, an offset, a time or a resume token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to: Option<To>,
    /// Of a skip: this change alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// Who and why.
    #[serde(flatten)]
    pub reason: Reason,
}

/// Which parked changes: all rules must fit.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Choice {
    /// Their ids, `sink:offset`, separated by commas.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ids: Option<String>,
    /// Of this sink.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sink: Option<String>,
    /// `parked` or `dead`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<String>,
    /// Of tables that fit this glob over `schema.table`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub table: Option<String>,
    /// Whose error holds this text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Parked at or after this time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since: Option<String>,
    /// Parked before this time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub until: Option<String>,
    /// So many at most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<u64>,
    /// Every one that there is.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub all: bool,
    /// Who, where something is done to them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub who: Option<String>,
    /// What for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

impl Choice {
    /// The query that it stands for.
    pub fn query(&self) -> Result<Query> {
        let time = |text: &Option<String>| -> Result<Option<Timestamp>> {
            let Some(text) = text else { return Ok(None) };
            let time: jiff::Timestamp =
                text.parse().class(Class::Config, || format!("`{text}` is no time"))?;
            Ok(Some(Timestamp(time.as_microsecond())))
        };
        let ids = self.ids.as_deref().unwrap_or_default().split(',').map(str::trim);
        let places = ids.filter(|id| !id.is_empty()).map(str::parse).collect::<Result<_>>()?;
        Ok(Query {
            sink: self.sink.clone(),
            places,
            state: self.state.as_deref().map(str::parse::<Parked>).transpose()?,
            table: self.table.clone(),
            error: self.error.clone(),
            since: time(&self.since)?,
            until: time(&self.until)?,
            limit: self.limit.unwrap_or(LETTERS),
        })
    }

    /// As `query`, for doing something: it must say which, or that it means all.
    fn deed(&self) -> Result<(Query, By)> {
        let chosen = [&self.ids, &self.sink, &self.state, &self.table, &self.error]
            .into_iter()
            .chain([&self.since, &self.until])
            .any(Option::is_some);
        if !chosen && !self.all {
            return Err(Error::config("no rule says which dead letters are meant")
                .remedy("name ids or a filter, or say `all`"));
        }
        let by = Reason { who: self.who.clone(), why: self.why.clone() }.by();
        Ok((Query { limit: self.limit.unwrap_or(u64::MAX), ..self.query()? }, by))
    }
}

async fn pause(
    State(walrace): State<Arc<Walrace>>,
    Path(sink): Path<String>,
    Json(reason): Json<Reason>,
) -> Result<Json<Value>, Failure> {
    walrace.pause(&sink, &reason.by()).await?;
    Ok(Json(json!({"sink": sink, "paused": true})))
}

async fn resume(
    State(walrace): State<Arc<Walrace>>,
    Path(sink): Path<String>,
    Json(reason): Json<Reason>,
) -> Result<Json<Value>, Failure> {
    walrace.resume(&sink, &reason.by()).await?;
    Ok(Json(json!({"sink": sink, "paused": false})))
}

async fn rewind(
    State(walrace): State<Arc<Walrace>>,
    Path(sink): Path<String>,
    Json(wanted): Json<Move>,
) -> Result<Json<Moved>, Failure> {
    let to = wanted.to.ok_or_else(|| Error::config("`to` says where to rewind to"))?;
    Ok(Json(walrace.rewind(&sink, &to, &wanted.reason.by()).await?))
}

/// With `to` everything before it, else one change.
async fn skip(
    State(walrace): State<Arc<Walrace>>,
    Path(sink): Path<String>,
    Json(wanted): Json<Move>,
) -> Result<Json<Value>, Failure> {
    let by = wanted.reason.by();
    if let Some(to) = &wanted.to {
        let moved = walrace.skip_to(&sink, to, &by).await?;
        return Ok(Json(json!({"from": moved.from, "to": moved.to, "epoch": moved.epoch})));
    }
    let offset = walrace.skip(&sink, wanted.offset, &by).await?;
    Ok(Json(json!({"offset": offset})))
}

async fn events(
    State(walrace): State<Arc<Walrace>>,
    Path(sink): Path<String>,
) -> Result<Json<Vec<Event>>, Failure> {
    Ok(Json(walrace.events(&sink).await?))
}

async fn list(
    State(walrace): State<Arc<Walrace>>,
    Search(choice): Search<Choice>,
) -> Result<Json<Vec<Letter>>, Failure> {
    Ok(Json(walrace.parked(&choice.query()?).await?))
}

async fn show(
    State(walrace): State<Arc<Walrace>>,
    Path(id): Path<String>,
) -> Result<Json<Value>, Failure> {
    let (letter, change) = walrace.parked_change(&id.parse::<Place>()?).await?;
    Ok(Json(shown(&letter, &change)?))
}

/// A letter with its change in the native format.
pub fn shown(letter: &Letter, change: &crate::change::Change) -> Result<Value> {
    let mut text = Vec::new();
    Encoder::new(Format::Native, &Names::default()).encode(change, &mut text)?;
    let bug = || "a letter has no JSON form";
    let change: Value = serde_json::from_slice(&text).class(Class::Bug, bug)?;
    let mut letter = serde_json::to_value(letter).class(Class::Bug, bug)?;
    if let Some(letter) = letter.as_object_mut() {
        letter.insert("change".to_owned(), change);
    }
    Ok(letter)
}

/// The body of an edit.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Edit {
    /// Columns and their new values.
    pub values: Map<String, Value>,
    /// Who and why.
    #[serde(flatten)]
    pub reason: Reason,
}

async fn edit(
    State(walrace): State<Arc<Walrace>>,
    Path(id): Path<String>,
    Json(edit): Json<Edit>,
) -> Result<Json<Value>, Failure> {
    let place: Place = id.parse()?;
    walrace.edit_parked(&place, &edit.values, &edit.reason.by()).await?;
    Ok(Json(json!({"edited": place.to_string()})))
}

async fn retry(
    State(walrace): State<Arc<Walrace>>,
    Json(choice): Json<Choice>,
) -> Result<Json<Value>, Failure> {
    let (query, by) = choice.deed()?;
    Ok(Json(json!({"retried": walrace.retry_parked(&query, &by).await?})))
}

async fn drop_letters(
    State(walrace): State<Arc<Walrace>>,
    Json(choice): Json<Choice>,
) -> Result<Json<Value>, Failure> {
    let (query, by) = choice.deed()?;
    Ok(Json(json!({"dropped": walrace.drop_parked(&query, &by).await?})))
}
