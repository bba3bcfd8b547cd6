//! HTTP: health, readiness, metrics, status, and the live changes that `walrace tail` shows.

mod backfill;
mod changes;
mod control;
mod schema;
mod sequin;

use std::{net::SocketAddr, path::Path, sync::Arc};

use axum::{
    Json, Router,
    extract::{Path as Segment, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use tokio::net::TcpListener;
use uuid::Uuid;

pub use self::{
    backfill::Asked,
    control::{Choice, Edit, Move, Reason, shown},
    schema::{Accept, Accepted, ShownColumn, ShownVersion},
};
use crate::{
    error::{Class, Classify, Error, Result},
    metrics,
    runtime::{Status, Walrace},
};

/// The file in `data_dir` with the address of a running Walrace and, on a second line, the word by
/// which its `/health` is known: the port of one that was killed may belong to another by now.
pub const ADDRESS_FILE: &str = "http.addr";

/// A bound listener that is not served yet.
#[derive(Debug)]
pub struct Listener {
    listener: TcpListener,
    /// Where it listens, with the port that was taken.
    pub address: SocketAddr,
    instance: Uuid,
}

impl Listener {
    /// Binds `listen` (`host:port`, port 0 for a free one).
    pub async fn bind(listen: &str) -> Result<Self> {
        let mend = || format!("cannot listen on {listen}");
        let listener =
            TcpListener::bind(listen).await.class(Class::Config, mend).map_err(|error| {
                error.remedy("set http.listen to another port, or to \"\" for none")
            })?;
        let address = listener.local_addr().class(Class::Config, mend)?;
        Ok(Self { listener, address, instance: Uuid::new_v4() })
    }

    /// Writes the address where the other commands look for it.
    pub fn announce(&self, data_dir: &Path) -> Result<()> {
        let path = data_dir.join(ADDRESS_FILE);
        std::fs::write(&path, format!("{}\n{}\n", self.address, self.instance))
            .class(Class::Config, || format!("cannot write {}", path.display()))
    }

    /// Serves until Walrace stops.
    pub async fn serve(self, walrace: Arc<Walrace>) -> Result<()> {
        let stop = walrace.stopping().clone();
        axum::serve(self.listener, router(walrace, self.instance, self.address))
            .with_graceful_shutdown(stop.cancelled_owned())
            .await
            .class(Class::Retry, || "the HTTP listener failed")
    }
}

fn router(walrace: Arc<Walrace>, instance: Uuid, address: SocketAddr) -> Router {
    Router::new()
        .route("/health", get(move || health(instance)))
        .route("/ready", get(ready))
        .route("/metrics", get(exposition))
        .route("/status", get(status))
        .route("/schemas/{format}", get(format_schema))
        .route("/sources/{source}/changes", get(changes::of_source))
        .route("/sinks/{sink}/missing", get(changes::missing))
        .merge(backfill::routes())
        .merge(control::routes())
        .nest("/api", sequin::router(&walrace, address))
        .with_state(walrace)
}

/// The process answers; says nothing about its parts.
async fn health(instance: Uuid) -> Json<serde_json::Value> {
    let version = env!("CARGO_PKG_VERSION");
    Json(serde_json::json!({"ok": true, "rev": version, "version": version, "instance": instance}))
}

/// 200 when every part does its work, else 503 with the reasons.
async fn ready(State(walrace): State<Arc<Walrace>>) -> Result<impl IntoResponse, Failure> {
    let reasons = status_of(walrace).await?.unready();
    let code = if reasons.is_empty() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    Ok((code, Json(serde_json::json!({"ready": reasons.is_empty(), "reasons": reasons}))))
}

async fn exposition(State(walrace): State<Arc<Walrace>>) -> Result<impl IntoResponse, Failure> {
    let text = metrics::render(&status_of(walrace).await?);
    Ok(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text))
}

async fn status(State(walrace): State<Arc<Walrace>>) -> Result<Json<Status>, Failure> {
    Ok(Json(status_of(walrace).await?))
}

/// What a format's messages look like: JSON Schema, or the `.proto` of a binary one.
async fn format_schema(Segment(format): Segment<String>) -> Response {
    match crate::format::schema(&format) {
        Some((text, kind)) => ([(header::CONTENT_TYPE, kind)], text).into_response(),
        None => {
            let body = serde_json::json!({
                "error": format!("`{format}` is no format"),
                "remedy": "docs/formats.md lists them: native, sequin, debezium and so on",
            });
            (StatusCode::NOT_FOUND, Json(body)).into_response()
        }
    }
}

/// It looks at the disk, and a disk that hangs must not hold the threads that answer `/health`.
async fn status_of(walrace: Arc<Walrace>) -> Result<Status> {
    let backfills = walrace.backfills().await?;
    let status = tokio::task::spawn_blocking(move || walrace.status());
    let status = status.await.class(Class::Bug, || "a task that asked for the status died")?;
    Ok(Status { backfills, ..status })
}

/// An error as a reply: `{"error": ..., "remedy": ...}`.
enum Failure {
    /// By its class.
    Of(Error),
    /// What was asked for is no longer kept; the oldest offset that is.
    Gone(Error, u64),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Of(error)
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let (error, code, oldest) = match self {
            Self::Gone(error, oldest) => (error, StatusCode::GONE, Some(oldest)),
            Self::Of(error) => match error.class() {
                Class::Config | Class::Data => (error, StatusCode::BAD_REQUEST, None),
                Class::Retry => (error, StatusCode::SERVICE_UNAVAILABLE, None),
                Class::Damaged | Class::Bug => (error, StatusCode::INTERNAL_SERVER_ERROR, None),
            },
        };
        let mut body = serde_json::json!({"error": error.summary(), "remedy": error.remedy_text()});
        if let Some((body, oldest)) = body.as_object_mut().zip(oldest) {
            body.insert("oldest".to_owned(), oldest.into());
        }
        (code, Json(body)).into_response()
    }
}
