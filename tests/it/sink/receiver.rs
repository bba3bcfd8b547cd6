//! An HTTP server that answers by a script and keeps every request that it got.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Router,
    body::Bytes,
    extract::State,
    http::{HeaderMap, StatusCode, Uri},
    response::{IntoResponse, Response},
};
use serde_json::Value as Json;
use tokio::{net::TcpListener, task::JoinSet};

/// One answer; without a script it is 200 and nothing.
#[derive(Clone, Debug, Default)]
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) headers: Vec<(&'static str, String)>,
    pub(super) body: String,
    pub(super) delay: Duration,
}

/// A request as it arrived.
#[derive(Clone, Debug)]
pub(super) struct Request {
    pub(super) path: String,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
}

impl Request {
    pub(super) fn json(&self) -> Json {
        serde_json::from_slice(&self.body).unwrap()
    }

    /// The messages of a batch.
    pub(super) fn data(&self) -> Vec<Json> {
        let body = self.json();
        assert_eq!(body.as_object().unwrap().len(), 1, "{body}");
        body["data"].as_array().unwrap().clone()
    }

    pub(super) fn header(&self, name: &str) -> &str {
        self.headers.get(name).unwrap_or_else(|| panic!("no {name}")).to_str().unwrap()
    }
}

#[derive(Debug, Default)]
struct Kept {
    script: VecDeque<Answer>,
    requests: Vec<Request>,
}

/// The running server; it ends when it is dropped.
#[derive(Debug)]
pub(super) struct Receiver {
    pub(super) address: String,
    kept: Arc<Mutex<Kept>>,
    _task: JoinSet<()>,
}

impl Receiver {
    pub(super) async fn start() -> Self {
        let kept = Arc::<Mutex<Kept>>::default();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let router = Router::new().fallback(answer).with_state(Arc::clone(&kept));
        let mut task = JoinSet::new();
        task.spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { address, kept, _task: task }
    }

    pub(super) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub(super) fn will(&self, answer: Answer) {
        self.kept.lock().unwrap().script.push_back(answer);
    }

    pub(super) fn will_answer(&self, status: u16, body: &str) {
        self.will(Answer { status, body: body.into(), ..Answer::default() });
    }

    /// The requests since the last call.
    pub(super) fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.kept.lock().unwrap().requests)
    }
}

async fn answer(
    State(kept): State<Arc<Mutex<Kept>>>,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let answer = {
        let mut kept = kept.lock().unwrap();
        kept.requests.push(Request { path: uri.to_string(), headers, body });
        kept.script.pop_front()
    };
    let answer = answer.unwrap_or(Answer { status: 200, ..Answer::default() });
    tokio::time::sleep(answer.delay).await;
    let status = StatusCode::from_u16(answer.status).unwrap();
    let mut response = (status, answer.body).into_response();
    for (name, value) in answer.headers {
        response.headers_mut().insert(name, value.parse().unwrap());
    }
    response
}
