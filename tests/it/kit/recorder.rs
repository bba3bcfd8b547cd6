//! What arrived at a target: over HTTP, or in a file.

use std::{
    collections::VecDeque,
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    sync::{Arc, LazyLock, Mutex},
    time::{Duration, Instant},
};

use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    runtime::{Builder, Runtime},
    task::JoinSet,
};

use tokio_util::sync::CancellationToken;

use super::wait::wait_for;

/// What the recorder does with a request.
#[derive(Clone, Debug)]
pub(crate) enum Answer {
    /// Stores it and answers 200.
    Accept,
    /// Answers with a status and does not store it.
    Refuse(u16),
    /// Stores it and answers with a status: the reply was lost, the effect was not.
    StoreThenFail(u16),
    /// Stores it and answers with status, further header lines and body.
    Reply { status: u16, headers: Vec<(String, String)>, body: String },
    /// Refuses it with further header lines, such as `retry-after`.
    RefuseWith { status: u16, headers: Vec<(String, String)>, body: String },
    /// Never answers; the connection stays open until the client gives up.
    Hang,
    /// Closes the connection without a reply.
    Disconnect,
    /// Stores it, then closes the connection without a reply.
    StoreThenDisconnect,
}

/// A request that arrived whole and was stored.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) method: String,
    pub(crate) path: String,
    /// Names in lower case.
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    pub(crate) at: Instant,
}

impl Request {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| {
            panic!("the body is not JSON: {error}: {}", String::from_utf8_lossy(&self.body))
        })
    }

    /// The changes of a batch body (`{"data":[...]}`), or the one change of a single body.
    pub(crate) fn changes(&self) -> Vec<Value> {
        match self.json() {
            Value::Object(mut body) if body.contains_key("data") => match body.remove("data") {
                Some(Value::Array(changes)) => changes,
                other => panic!("`data` is not an array: {other:?}"),
            },
            change => vec![change],
        }
    }
}

/// Whether a change is refused.
type Rule = Box<dyn Fn(&Value) -> bool + Send>;

#[derive(Default)]
struct Script {
    next: VecDeque<Answer>,
    always: Option<Answer>,
    refuses: Option<Rule>,
    stored: Vec<Request>,
    /// The changes of `stored`, parsed once: a condition is asked again and again.
    changes: Vec<Value>,
    asked: usize,
}

impl std::fmt::Debug for Script {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} stored of {} asked", self.stored.len(), self.asked)
    }
}

impl Script {
    /// What a request gets, and whether it is stored.
    fn answer(&mut self, request: &Request) -> Answer {
        self.asked += 1;
        if let Some(answer) = self.next.pop_front().or_else(|| self.always.clone()) {
            return answer;
        }
        let refused = self.refuses.as_ref().is_some_and(|refuses| {
            let mut changes = request.changes().into_iter();
            changes.any(|change| refuses(&change))
        });
        if refused { Answer::Refuse(422) } else { Answer::Accept }
    }

    fn store(&mut self, request: Request) {
        if serde_json::from_slice::<serde::de::IgnoredAny>(&request.body).is_ok() {
            self.changes.extend(request.changes());
        }
        self.stored.push(request);
    }
}

/// Where recorders answer from: also while a test waits for a command, which blocks its own thread.
static TARGETS: LazyLock<Runtime> = LazyLock::new(|| {
    Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime")
});

/// An HTTP target that remembers what arrived and fails as a test asks.
#[derive(Debug)]
pub(crate) struct Recorder {
    port: u16,
    script: Arc<Mutex<Script>>,
    server: JoinSet<()>,
    down: CancellationToken,
}

impl Recorder {
    /// Listens on a free port and accepts everything.
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("its address").port();
        let (script, server) = (Arc::default(), JoinSet::new());
        let mut recorder = Self { port, script, server, down: CancellationToken::new() };
        recorder.serve(listener);
        recorder
    }

    fn serve(&mut self, listener: TcpListener) {
        let (script, down) = (Arc::clone(&self.script), CancellationToken::new());
        self.down = down.clone();
        listener.set_nonblocking(true).expect("a socket");
        let answer = async move {
            let listener = tokio::net::TcpListener::from_std(listener).expect("a socket");
            let mut connections = JoinSet::new();
            while let Some(Ok((stream, _))) = down.run_until_cancelled(listener.accept()).await {
                connections.spawn(converse(stream, Arc::clone(&script)));
                while connections.try_join_next().is_some() {}
            }
            drop(listener);
            connections.shutdown().await;
        };
        self.server.spawn_on(answer, TARGETS.handle());
    }

    /// The target goes down: connections break, new ones are refused by the kernel.
    pub(crate) async fn go_down(&mut self) {
        self.down.cancel();
        while self.server.join_next().await.is_some() {}
    }

    /// The target comes back on the same port.
    pub(crate) async fn come_back(&mut self) {
        let listener = TcpListener::bind(("127.0.0.1", self.port)).expect("the same port");
        self.serve(listener);
    }

    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}/hook", self.port)
    }

    /// Answers for the next requests, one each, in order; then as before.
    pub(crate) fn next(&self, answers: impl IntoIterator<Item = Answer>) {
        self.script.lock().unwrap().next.extend(answers);
    }

    /// The answer to every request for which none was queued.
    pub(crate) fn always(&self, answer: Answer) {
        self.script.lock().unwrap().always = Some(answer);
    }

    /// Refuses, with 422, every request that holds a change which fits the rule.
    pub(crate) fn refuse(&self, rule: impl Fn(&Value) -> bool + Send + 'static) {
        self.script.lock().unwrap().refuses = Some(Box::new(rule));
    }

    /// Takes back what `refuse` said.
    pub(crate) fn refuse_nothing(&self) {
        self.script.lock().unwrap().refuses = None;
    }

    /// The requests that were stored.
    pub(crate) fn stored(&self) -> Vec<Request> {
        self.script.lock().unwrap().stored.clone()
    }

    /// The changes of the requests that were stored, where their bodies are JSON.
    pub(crate) fn changes(&self) -> Vec<Value> {
        self.script.lock().unwrap().changes.clone()
    }

    /// How many requests came, stored or not.
    pub(crate) fn asked(&self) -> usize {
        self.script.lock().unwrap().asked
    }

    /// Waits until the stored changes satisfy a condition, and gives them.
    pub(crate) async fn wait_until(&self, condition: impl Fn(&[Value]) -> bool) -> Vec<Value> {
        let probe = async || condition(&self.script.lock().unwrap().changes).then_some(());
        wait_for(Duration::from_secs(30), probe, || self.describe()).await;
        self.changes()
    }

    /// Waits until so many requests came, stored or not.
    pub(crate) async fn wait_until_asked(&self, times: usize) {
        let probe = async || (self.asked() >= times).then_some(());
        wait_for(Duration::from_secs(30), probe, || self.describe()).await;
    }

    fn describe(&self) -> String {
        let script = self.script.lock().unwrap();
        let last = script.changes.last().map(ToString::to_string).unwrap_or_default();
        let (stored, changes) = (script.stored.len(), script.changes.len());
        format!(
            "{} requests came, {stored} were stored with {changes} changes, the last is {last}",
            script.asked
        )
    }
}

/// Serves one connection: request, answer, and again.
async fn converse(mut stream: TcpStream, script: Arc<Mutex<Script>>) {
    let mut buffer = Vec::new();
    while let Some(request) = read_request(&mut stream, &mut buffer).await {
        let answer = {
            let mut script = script.lock().unwrap();
            let answer = script.answer(&request);
            if matches!(
                answer,
                Answer::Accept
                    | Answer::StoreThenFail(_)
                    | Answer::Reply { .. }
                    | Answer::StoreThenDisconnect
            ) {
                script.store(request);
            }
            answer
        };
        let reply = match answer {
            Answer::Accept => reply(200, &[], "{}"),
            Answer::Refuse(status) | Answer::StoreThenFail(status) => reply(status, &[], "refused"),
            Answer::Reply { status, headers, body }
            | Answer::RefuseWith { status, headers, body } => reply(status, &headers, &body),
            Answer::Disconnect | Answer::StoreThenDisconnect => return,
            Answer::Hang => {
                let _ = stream.read(&mut [0]).await; // returns when the client gives up
                return;
            }
        };
        if stream.write_all(reply.as_bytes()).await.is_err() {
            return;
        }
    }
}

fn reply(status: u16, headers: &[(String, String)], body: &str) -> String {
    let mut text = format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\n", body.len());
    for (name, value) in headers {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    text + "\r\n" + body
}

/// Reads one HTTP/1.1 request with a `content-length` body; `None` when the client is gone.
///
/// It is written out here, and not left to a server library, because a library cannot close a
/// connection between the last byte of a request and the first one of its reply.
async fn read_request(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> Option<Request> {
    let head_end = loop {
        if let Some(at) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
            break at;
        }
        (stream.read_buf(buffer).await.ok()? > 0).then_some(())?;
    };
    let head = String::from_utf8(buffer[..head_end].to_vec()).expect("a head in UTF-8");
    let mut lines = head.split("\r\n");
    let mut words = lines.next().unwrap_or_default().split(' ').map(str::to_owned);
    let (method, path) = (words.next()?, words.next()?);
    let headers: Vec<(String, String)> = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_lowercase(), value.trim().to_owned()))
        .collect();
    assert!(
        headers.iter().all(|(name, _)| name != "transfer-encoding"),
        "the recorder wants a content-length"
    );
    let length = headers.iter().find(|(name, _)| name == "content-length");
    let length = length.map_or(0, |(_, value)| value.parse().expect("a length"));
    let body_start = head_end + 4;
    while buffer.len() < body_start + length {
        (stream.read_buf(buffer).await.ok()? > 0).then_some(())?;
    }
    let body = buffer[body_start..body_start + length].to_vec();
    buffer.drain(..body_start + length);
    Some(Request { method, path, headers, body, at: Instant::now() })
}

/// What the file sink wrote: JSON Lines, in one file and those that were rotated away from it.
#[derive(Clone, Debug)]
pub(crate) struct FileRecorder {
    path: PathBuf,
}

impl FileRecorder {
    pub(crate) fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Every change of every file, in the order of offsets; an unfinished line is a failure.
    pub(crate) fn changes(&self) -> Vec<Value> {
        let mut files = self.files();
        files.sort_by_key(|lines| lines.first().and_then(|line| line["offset"].as_u64()));
        files.into_iter().flatten().collect()
    }

    fn files(&self) -> Vec<Vec<Value>> {
        let folder = self.path.parent().expect("a file lies in a folder");
        let stem = self.path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let extension = self.path.extension();
        fs::read_dir(folder)
            .into_iter()
            .flatten()
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.extension() == extension)
            .filter(|path| {
                path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&stem))
            })
            .map(|path| parse(&path, Unfinished::IsAFailure))
            .collect()
    }

    /// The changes of the current file, without a last line that is still being written.
    pub(crate) fn changes_so_far(&self) -> Vec<Value> {
        parse(&self.path, Unfinished::IsLeftOut)
    }

    /// Waits until the current file satisfies a condition, and gives its changes.
    pub(crate) async fn wait_until(
        &self,
        limit: Duration,
        condition: impl Fn(&[Value]) -> bool,
    ) -> Vec<Value> {
        let probe = async || {
            let changes = self.changes_so_far();
            condition(&changes).then_some(changes)
        };
        wait_for(limit, probe, || {
            let changes = self.changes_so_far();
            let last = changes.last().map(ToString::to_string).unwrap_or_default();
            format!("{} has {} changes, the last is {last}", self.path.display(), changes.len())
        })
        .await
    }

    /// Waits until the current file contains a text; cheaper than parsing a long one.
    pub(crate) async fn wait_for_text(&self, limit: Duration, text: &str) {
        let probe = async || {
            let bytes = fs::read(&self.path).unwrap_or_default();
            memchr::memmem::find(&bytes, text.as_bytes()).map(|_| ())
        };
        wait_for(limit, probe, || {
            let changes = self.changes_so_far();
            let last = changes.last().map(ToString::to_string).unwrap_or_default();
            format!("`{text}` is not among {} changes, the last is {last}", changes.len())
        })
        .await;
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unfinished {
    IsAFailure,
    IsLeftOut,
}

fn parse(path: &Path, unfinished: Unfinished) -> Vec<Value> {
    let bytes = fs::read(path).unwrap_or_default();
    let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    assert!(
        unfinished == Unfinished::IsLeftOut || whole == bytes.len(),
        "{} ends within a line: {}",
        path.display(),
        String::from_utf8_lossy(&bytes[whole..])
    );
    let lines = bytes[..whole].split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    let lines = lines.enumerate().map(|(number, line)| {
        serde_json::from_slice(line).unwrap_or_else(|error| {
            let text = String::from_utf8_lossy(line);
            panic!("{}:{}: {error}: {text}", path.display(), number + 1)
        })
    });
    lines.collect()
}
