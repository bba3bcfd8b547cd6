//! The sinks as Sequin shows them, read only.

use std::sync::Arc;

use axum::{
    Json,
    body::Bytes,
    extract::{Path, State},
    http::StatusCode,
    response::{IntoResponse, Response},
};
use serde_json::{Map, Value, json};

use super::{Failure, find};
use crate::{
    change::Op,
    config::{Config, Sink, SinkKind},
    format,
    runtime::{SinkStatus, State as Doing, Status, Walrace},
};

/// `GET /api/sinks`.
pub(super) async fn list(State(walrace): State<Arc<Walrace>>) -> Result<Json<Value>, Failure> {
    let status = crate::api::status_of(Arc::clone(&walrace)).await?;
    let config = walrace.config();
    let sinks = config.sink.iter().map(|(name, sink)| object(config, (name, sink), &status));
    Ok(Json(json!({"data": sinks.collect::<Vec<_>>()})))
}

/// `GET /api/sinks/{id_or_name}`.
pub(super) async fn show(
    State(walrace): State<Arc<Walrace>>,
    Path(id_or_name): Path<String>,
) -> Result<Json<Value>, Failure> {
    let (name, sink) = find(walrace.config(), &id_or_name)?;
    let status = crate::api::status_of(Arc::clone(&walrace)).await?;
    Ok(Json(object(walrace.config(), (name, sink), &status)))
}

/// `POST /api/sinks`. Sinks are made in the configuration: a client that makes sure of its own
/// learns that it is there, or that it cannot make it.
pub(super) async fn create(
    State(walrace): State<Arc<Walrace>>,
    body: Bytes,
) -> Result<Response, Failure> {
    let body: Map<String, Value> = serde_json::from_slice(&body)
        .map_err(|error| Failure::bad(format!("the body is not a JSON object: {error}")))?;
    let name = body.get("name").and_then(Value::as_str).unwrap_or_default();
    let problem = match walrace.config().sink.contains_key(name) {
        true => "has already been taken",
        false if name.is_empty() => "can't be blank",
        false => "is not in the configuration of this server, where sinks are made",
    };
    let errors = json!({"name": [problem]});
    let reply = json!({"summary": "Validation failed", "validation_errors": errors});
    Ok((StatusCode::UNPROCESSABLE_ENTITY, Json(reply)).into_response())
}

fn object(config: &Config, (name, sink): (&str, &Sink), status: &Status) -> Value {
    let own = status.sinks.iter().find(|status| status.name == name);
    let is_paused = own.is_some_and(|own| own.state.word() == "paused");
    let tables = included(&sink.tables);
    let shown = tables.iter().flatten().filter(|table| !table.contains('*'));
    let mut object = json!({
        "id": format::id("sink", name),
        "name": name,
        "database": config.source_of(sink),
        "status": if is_paused { "paused" } else { "active" },
        "source": {
            "include_schemas": Some(&sink.schemas).filter(|schemas| !schemas.is_empty()),
            "exclude_schemas": null,
            "include_tables": &tables,
            "exclude_tables": excluded(&sink.tables),
        },
        "tables": shown.map(|name| json!({"name": name})).collect::<Vec<_>>(),
        "actions": actions(&sink.operations),
        "destination": destination(&sink.kind),
        "batch_size": sink.batch_changes_max.min(1000),
        "filter": "none",
        "transform": "none",
        "routing": "none",
        "enrichment": "none",
        "timestamp_format": "iso8601",
        "active_backfills": [],
        "max_retry_count": null,
        "load_shedding_policy": "pause_on_full",
        "message_grouping": true,
        "annotations": {},
        "health": health(config.source_of(sink), own, status),
    });
    if let (SinkKind::HttpPull(pull), Some(object)) = (&sink.kind, object.as_object_mut()) {
        object.insert("message_grouping".into(), pull.message_grouping.into());
        object.insert("ack_wait_ms".into(), pull.ack_wait_ms.into());
        object.insert("max_deliver".into(), pull.max_deliver.into());
        let retries = pull.max_deliver.map(|deliveries| deliveries.saturating_sub(1));
        object.insert("max_retry_count".into(), retries.into());
        object.insert("max_ack_pending".into(), pull.max_ack_pending.into());
        object.insert("max_waiting".into(), pull.max_waiting.into());
    }
    object
}

fn included(globs: &[String]) -> Option<Vec<&str>> {
    let plain = globs.iter().map(String::as_str).filter(|glob| !glob.starts_with('!'));
    Some(plain.collect::<Vec<_>>()).filter(|globs| !globs.is_empty())
}

fn excluded(globs: &[String]) -> Option<Vec<&str>> {
    let taken = globs.iter().filter_map(|glob| glob.strip_prefix('!'));
    Some(taken.collect::<Vec<_>>()).filter(|globs| !globs.is_empty())
}

/// Those that Sequin has words for.
fn actions(operations: &[Op]) -> Vec<&'static str> {
    let wanted = |op: &Op| operations.is_empty() || operations.contains(op);
    let known = [Op::Insert, Op::Update, Op::Delete];
    known.into_iter().filter(|op| wanted(op)).map(Op::word).collect()
}

/// The kind by Sequin's name; nothing that could be a secret.
fn destination(kind: &SinkKind) -> Value {
    match kind {
        SinkKind::HttpPull(_) => json!({"type": "sequin_stream"}),
        SinkKind::Webhook(webhook) => json!({"type": "webhook", "batch": webhook.batch}),
        other => {
            let name = serde_json::to_value(other).ok();
            let name = name.as_ref().and_then(|value| value.get("kind")).cloned();
            json!({"type": name})
        }
    }
}

/// The worst of its checks: of the sink itself, and of the source that it reads.
fn health(source: &str, own: Option<&SinkStatus>, status: &Status) -> Value {
    let source = status.sources.iter().find(|status| status.name == source);
    let reading = source.map_or(&Doing::Starting, |source| &source.state);
    let delivering = own.map_or(&Doing::Starting, |own| &own.state);
    let is_new = own.is_none_or(|own| own.cursor == 0);
    let delivery = match word(delivering) {
        "healthy" if is_new => "waiting",
        word => word,
    };
    let configured = if delivering.is_stopped() { "error" } else { "healthy" };
    let checks = [
        check("Sink configuration", configured, delivering.reason()),
        check("Message filtering", "healthy", None),
        check("Message ingestion", word(reading), reading.reason()),
        check("Messages pending delivery", "healthy", None),
        check("Message delivery", delivery, delivering.reason()),
    ];
    let rank = |check: &Value| RANKS.iter().position(|rank| check["status"] == *rank).unwrap_or(0);
    let worst = checks.iter().map(rank).max().and_then(|rank| RANKS.get(rank));
    json!({"name": "Consumer health", "status": worst, "checks": checks})
}

/// From good to bad.
const RANKS: [&str; 6] = ["healthy", "waiting", "initializing", "warning", "error", "paused"];

fn word(state: &Doing) -> &'static str {
    match state.word() {
        "running" => "healthy",
        "starting" => "initializing",
        "paused" => "paused",
        "waiting" => "warning",
        _ => "error",
    }
}

fn check(name: &str, status: &str, reason: Option<String>) -> Value {
    match reason.filter(|_| status != "healthy") {
        Some(reason) => json!({"name": name, "status": status, "error": {"message": reason}}),
        None => json!({"name": name, "status": status}),
    }
}
