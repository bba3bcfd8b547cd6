//! The routes of Sequin's API that its consumers use, below `/api`: receive, ack and nack, and the
//! sinks, read only. `docs/sinks/http_pull.md` says where they differ.

mod input;
mod pull;
mod sinks;

use std::{net::SocketAddr, sync::Arc};

use axum::{
    Json, Router,
    body::Body,
    extract::State,
    http::{HeaderMap, Request, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde_json::json;
use sha2::{Digest, Sha256};
use tracing::warn;
use uuid::Uuid;

use crate::{
    config::{Config, Sink},
    error::{Class, Error},
    format,
    runtime::Walrace,
};

/// The routes; `address` is where they are served.
pub(super) fn router(walrace: &Arc<Walrace>, address: SocketAddr) -> Router<Arc<Walrace>> {
    let guard = Guard::new(walrace.config(), address);
    let mut routes = Router::new();
    for prefix in ["/sequin_streams/{id_or_name}", "/http_pull_consumers/{id_or_name}"] {
        routes = routes
            .route(&format!("{prefix}/receive"), get(pull::receive).post(pull::receive))
            .route(&format!("{prefix}/ack"), post(pull::ack))
            .route(&format!("{prefix}/nack"), post(pull::nack));
    }
    routes
        .route("/sinks", get(sinks::list).post(sinks::create))
        .route("/sinks/{id_or_name}", get(sinks::show))
        .route("/sources/{source}/schema", get(super::schema::versions))
        .route_layer(middleware::from_fn_with_state(Arc::new(guard), admit))
        .fallback(no_route)
        .method_not_allowed_fallback(no_route)
}

/// Who is let in.
struct Guard {
    digests: Vec<[u8; 32]>,
    /// Nobody but this machine can reach the listener.
    alone: bool,
}

impl Guard {
    fn new(config: &Config, address: SocketAddr) -> Self {
        let digest = |token: &crate::config::ApiToken| digest(token.token.expose().as_bytes());
        Self {
            digests: config.api_tokens.iter().map(digest).collect(),
            alone: address.ip().is_loopback(),
        }
    }

    fn check(&self, headers: &HeaderMap) -> Result<(), Failure> {
        if self.digests.is_empty() {
            return match self.alone {
                true => Ok(()),
                false => Err(Failure::unauthorized(
                    "this server has no API tokens: add [[api_tokens]] to its configuration",
                )),
            };
        }
        let mut values = headers.get_all(header::AUTHORIZATION).iter();
        let sentence = match (values.next(), values.next()) {
            (None, _) => "no `authorization` header; it must be `Bearer` and an API token",
            (_, Some(_)) => "several `authorization` headers; one is needed",
            (Some(value), None) => match value.as_bytes().strip_prefix(b"Bearer ") {
                None => "the `authorization` header does not begin with `Bearer `",
                Some(token) if self.knows(&digest(token)) => return Ok(()),
                Some(_) => "this API token is not known here",
            },
        };
        Err(Failure::unauthorized(sentence))
    }

    /// Looks at every byte of every digest, so that the time tells nothing.
    fn knows(&self, given: &[u8; 32]) -> bool {
        let differs = |own: &[u8; 32]| own.iter().zip(given).fold(0, |all, (a, b)| all | (a ^ b));
        self.digests.iter().fold(false, |found, own| found | (differs(own) == 0))
    }
}

fn digest(token: &[u8]) -> [u8; 32] {
    Sha256::digest(token).into()
}

/// Lets a request through that has a token and, where it may have a body, says that it is JSON.
async fn admit(
    State(guard): State<Arc<Guard>>,
    request: Request<Body>,
    next: Next,
) -> Result<Response, Failure> {
    guard.check(request.headers())?;
    let content = request.headers().get(header::CONTENT_TYPE);
    let is_json = content
        .and_then(|value| value.to_str().ok())
        .is_some_and(|value| value.to_ascii_lowercase().contains("application/json"));
    if request.method() == axum::http::Method::POST && !is_json {
        return Err(Failure::bad("the header `content-type: application/json` is missing"));
    }
    Ok(next.run(request).await)
}

async fn no_route() -> Response {
    (StatusCode::NOT_FOUND, Json(json!({"errors": {"detail": "Not Found"}}))).into_response()
}

/// The sink of this id, where it is a UUID, or else of this name.
fn find<'a>(config: &'a Config, id_or_name: &str) -> Result<(&'a str, &'a Sink), Failure> {
    let same = |name: &str| match Uuid::try_parse(id_or_name) {
        Ok(id) => format::id("sink", name) == id,
        Err(_) => name == id_or_name,
    };
    let found = config.sink.iter().find(|(name, _)| same(name));
    found.map(|(name, sink)| (name.as_str(), sink)).ok_or_else(Failure::no_sink)
}

/// An error as Sequin's clients read it: `{"summary": ...}`.
#[derive(Debug)]
struct Failure {
    status: StatusCode,
    summary: String,
}

impl Failure {
    fn bad(summary: impl Into<String>) -> Self {
        Self { status: StatusCode::BAD_REQUEST, summary: summary.into() }
    }

    fn unauthorized(summary: impl Into<String>) -> Self {
        Self { status: StatusCode::UNAUTHORIZED, summary: summary.into() }
    }

    fn no_sink() -> Self {
        let summary = "Not found: No sink consumer found matching the provided ID or name";
        Self { status: StatusCode::NOT_FOUND, summary: summary.into() }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        warn!("a consumer's request failed: {error}");
        let status = match error.class() {
            Class::Retry => StatusCode::SERVICE_UNAVAILABLE,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self { status, summary: error.to_string() }
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (self.status, Json(json!({"summary": self.summary}))).into_response()
    }
}
