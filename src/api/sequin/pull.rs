//! Receive, ack and nack.

use std::sync::Arc;

use axum::{
    Json,
    body::Bytes,
    extract::{Path, Query, State},
    http::{StatusCode, header},
    response::IntoResponse,
};
use serde::Deserialize;
use serde_json::{Value, json};
use uuid::Uuid;

use super::{Failure, find, input::Input};
use crate::{
    runtime::Walrace,
    sink::{Pulled, Stream},
};

/// `POST` or `GET .../receive`.
pub(super) async fn receive(
    State(walrace): State<Arc<Walrace>>,
    Path(id_or_name): Path<String>,
    Query(query): Query<Vec<(String, String)>>,
    body: Bytes,
) -> Result<impl IntoResponse, Failure> {
    let (name, stream) = stream(&walrace, &id_or_name)?;
    let input = Input::read(query, &body)?;
    let (max, wait) = (input.batch_size()?, input.wait_for()?);
    let messages = match is_paused(&walrace, name) {
        true => Vec::new(),
        false => stream.receive(max, wait).await?.ok_or_else(|| Failure {
            status: StatusCode::TOO_MANY_REQUESTS,
            summary: format!("sink {name} has as many waiting consumers as `max_waiting` allows"),
        })?,
    };
    Ok(([(header::CONTENT_TYPE, "application/json; charset=utf-8")], reply(&messages)))
}

/// `POST .../ack`.
pub(super) async fn ack(
    State(walrace): State<Arc<Walrace>>,
    Path(id_or_name): Path<String>,
    Query(query): Query<Vec<(String, String)>>,
    body: Bytes,
) -> Result<Json<Value>, Failure> {
    let (_, stream) = stream(&walrace, &id_or_name)?;
    stream.ack(&ids(query, &body)?).await?;
    Ok(Json(json!({"success": true})))
}

/// `POST .../nack`.
pub(super) async fn nack(
    State(walrace): State<Arc<Walrace>>,
    Path(id_or_name): Path<String>,
    Query(query): Query<Vec<(String, String)>>,
    body: Bytes,
) -> Result<Json<Value>, Failure> {
    let (_, stream) = stream(&walrace, &id_or_name)?;
    stream.nack(&ids(query, &body)?).await?;
    Ok(Json(json!({"success": true})))
}

/// The ids of a request, which mostly has nothing else.
fn ids(query: Vec<(String, String)>, body: &Bytes) -> Result<Vec<Uuid>, Failure> {
    #[derive(Deserialize)]
    struct Plain {
        ack_ids: Vec<Uuid>,
    }
    match serde_json::from_slice(body) {
        Ok(Plain { ack_ids }) if !ack_ids.is_empty() => Ok(ack_ids),
        _ => Input::read(query, body)?.ack_ids(),
    }
}

fn stream<'a>(walrace: &'a Walrace, id_or_name: &str) -> Result<(&'a str, Stream), Failure> {
    let (name, _) = find(walrace.config(), id_or_name)?;
    Ok((name, walrace.stream(name).ok_or_else(Failure::no_sink)?))
}

fn is_paused(walrace: &Walrace, name: &str) -> bool {
    walrace.state_of(name).is_some_and(|state| state.word() == "paused")
}

/// Each message nested under `data`, as Sequin's server does and its clients expect.
fn reply(messages: &[Pulled]) -> Vec<u8> {
    let bytes = messages.iter().map(|message| message.body.len() + 64).sum::<usize>();
    let mut text = Vec::with_capacity(bytes + 16);
    let mut id = Uuid::encode_buffer();
    text.extend_from_slice(b"{\"data\":[");
    for (count, Pulled { ack_id, body }) in messages.iter().enumerate() {
        if count > 0 {
            text.push(b',');
        }
        text.extend_from_slice(b"{\"ack_id\":\"");
        text.extend_from_slice(ack_id.as_hyphenated().encode_lower(&mut id).as_bytes());
        text.extend_from_slice(b"\",\"data\":");
        text.extend_from_slice(body);
        text.push(b'}');
    }
    text.extend_from_slice(b"]}");
    text
}
