//! Backfills over HTTP: ask for one, look at them, pause, resume and cancel.

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::{Path, State},
    routing::{get, post},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Failure, Reason};
use crate::{
    catalog::{BackfillState, NewBackfill},
    error::{Error, Result},
    runtime::{BackfillStatus, Walrace},
    source::postgres::backfill::PlannedTable,
};

pub(super) fn routes() -> Router<Arc<Walrace>> {
    Router::new()
        .route("/backfills", get(list).post(ask))
        .route("/backfills/plan", post(plan))
        .route("/backfills/{id}", get(show))
        .route("/backfills/{id}/{action}", post(change))
}

/// The body that asks for a backfill.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Asked {
    /// The source; by default that of the sink, or the only one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// The only sink that wants it; by default every one gets it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sink: Option<String>,
    /// Globs over `schema.table`; by default every table that is captured.
    #[serde(default)]
    pub tables: Vec<String>,
    /// An SQL condition that rows must fulfil.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filter: Option<String>,
    /// The columns that are read; the others are null. By default all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub columns: Option<Vec<String>>,
    /// Who and why.
    #[serde(flatten)]
    pub reason: Reason,
}

impl Asked {
    fn of(self, walrace: &Walrace) -> Result<(NewBackfill, Reason)> {
        let config = walrace.config();
        let of_sink = self.sink.as_ref().and_then(|sink| config.sink.get(sink));
        let source = match (self.source, of_sink) {
            (Some(source), _) => source,
            (None, Some(sink)) => config.source_of(sink).to_owned(),
            (None, None) if config.source.len() == 1 => {
                config.source.keys().next().cloned().unwrap_or_default()
            }
            (None, None) => {
                return Err(Error::config("which source is to be backfilled?")
                    .remedy("name it: there are several"));
            }
        };
        let Self { sink, tables, filter, columns, reason, .. } = self;
        Ok((NewBackfill { source, sink, tables, filter, columns }, reason))
    }
}

async fn ask(
    State(walrace): State<Arc<Walrace>>,
    Json(asked): Json<Asked>,
) -> Result<Json<Value>, Failure> {
    let (asked, reason) = asked.of(&walrace)?;
    let id = walrace.backfill(&asked, &reason.by()).await?;
    Ok(Json(json!({"id": id})))
}

async fn plan(
    State(walrace): State<Arc<Walrace>>,
    Json(asked): Json<Asked>,
) -> Result<Json<Vec<PlannedTable>>, Failure> {
    let (asked, _) = asked.of(&walrace)?;
    Ok(Json(walrace.plan_backfill(&asked).await?))
}

async fn list(State(walrace): State<Arc<Walrace>>) -> Result<Json<Vec<BackfillStatus>>, Failure> {
    Ok(Json(walrace.backfills().await?))
}

async fn show(
    State(walrace): State<Arc<Walrace>>,
    Path(id): Path<u64>,
) -> Result<Json<BackfillStatus>, Failure> {
    let all = walrace.backfills().await?;
    let found = all.into_iter().find(|backfill| backfill.id == id);
    Ok(Json(found.ok_or_else(|| Error::config(format!("there is no backfill {id}")))?))
}

async fn change(
    State(walrace): State<Arc<Walrace>>,
    Path((id, action)): Path<(u64, String)>,
    Json(reason): Json<Reason>,
) -> Result<Json<Value>, Failure> {
    let to = match action.as_str() {
        "pause" => BackfillState::Paused,
        "resume" => BackfillState::Queued,
        "cancel" => BackfillState::Cancelled,
        other => {
            return Err(Error::config(format!("a backfill cannot `{other}`"))
                .remedy("one of: pause, resume, cancel")
                .into());
        }
    };
    walrace.change_backfill(id, to, &reason.by()).await?;
    Ok(Json(json!({"id": id, "action": action})))
}
