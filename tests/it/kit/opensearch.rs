//! A real OpenSearch, without plugins, in a folder of its own.

use std::{
    fs::{self, File},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::{Value as Json, json};

use super::{
    cluster::{as_postgres, free_port, give_to_postgres},
    scratch::Scratch,
    server::http_client,
    wait::tail,
};

const VERSION: &str = "2.19.4";
/// It takes about 10 s on an idle machine.
const START_LIMIT: Duration = Duration::from_secs(180);

/// A running OpenSearch that dies with the test, however the test ends.
#[derive(Debug)]
pub(crate) struct OpenSearch {
    port: u16,
    child: Option<Child>,
    scratch: Scratch,
    _port_locks: [File; 2],
}

impl OpenSearch {
    /// A running server; with `scripts/install.sh test` it is below `$WALRACE_CACHE`.
    pub(crate) async fn start() -> Self {
        let scratch = Scratch::new("opensearch");
        let (port, lock) = free_port();
        let (transport, second_lock) = free_port();
        let config = scratch.path().join("config");
        for folder in ["config", "data", "logs", "tmp"] {
            fs::create_dir(scratch.path().join(folder)).expect("a folder");
        }
        let log = home().join("config/log4j2.properties");
        fs::copy(log, config.join("log4j2.properties")).expect("its settings");
        // Its own would log the garbage collector into a folder of the installation.
        let options = fs::read_to_string(home().join("config/jvm.options")).expect("its settings");
        let kept = options.lines().filter(|line| !line.contains("logs/"));
        let options = kept.collect::<Vec<_>>().join("\n");
        fs::write(config.join("jvm.options"), options).expect("its settings");
        let folder = scratch.path().display();
        let settings = format!(
            "cluster.name: walrace-test\n\
             node.name: one\n\
             network.host: 127.0.0.1\n\
             http.port: {port}\n\
             transport.port: {transport}\n\
             discovery.type: single-node\n\
             path.data: {folder}/data\n\
             path.logs: {folder}/logs\n\
             cluster.routing.allocation.disk.threshold_enabled: false\n"
        );
        fs::write(config.join("opensearch.yml"), settings).expect("its settings");
        give_to_postgres(scratch.path());
        let mut server = Self { port, child: None, scratch, _port_locks: [lock, second_lock] };
        server.up().await;
        server
    }

    /// Starts it again after [`down`](Self::down), at the same address and with the same data.
    pub(crate) async fn up(&mut self) {
        assert!(self.child.is_none(), "the server runs already");
        let folder = self.scratch.path();
        let log_path = folder.join("out.log");
        let log = File::options().create(true).append(true).open(&log_path).expect("a log");
        let child = as_postgres(home().join("bin/opensearch"))
            .env("OPENSEARCH_PATH_CONF", folder.join("config"))
            .env("OPENSEARCH_JAVA_HOME", java_home())
            .env("OPENSEARCH_JAVA_OPTS", "-Xms512m -Xmx512m")
            .env("OPENSEARCH_TMPDIR", folder.join("tmp"))
            .env("HOME", folder)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a second handle"))
            .stderr(log)
            .process_group(0)
            .spawn()
            .expect("opensearch");
        self.scratch.note("opensearch", child.id());
        self.child = Some(child);
        let begin = Instant::now();
        while !self.is_ready().await {
            let child = self.child.as_mut().expect("it was just started");
            let ended = child.try_wait().expect("its state");
            if ended.is_some() || begin.elapsed() > START_LIMIT {
                let log = fs::read_to_string(&log_path).unwrap_or_default();
                panic!("opensearch is not ready ({ended:?}):\n{}", tail(&log, 30));
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    async fn is_ready(&self) -> bool {
        let health = format!("{}/_cluster/health?wait_for_status=yellow&timeout=1s", self.url());
        let reply = http_client().get(health).send().await;
        reply.is_ok_and(|reply| reply.status().is_success())
    }

    /// `kill -9`.
    pub(crate) fn down(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        let _ = child.kill();
        let _ = child.wait();
        self.scratch.forget("opensearch");
    }

    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Sends a request whose reply must be a success, and gives back its JSON.
    pub(crate) async fn ask(&self, method: &str, path: &str, body: &Json) -> Json {
        let method = method.parse().expect("a method");
        let request = http_client().request(method, format!("{}/{path}", self.url()));
        let reply = match body {
            Json::Null => request.send().await,
            body => request.json(body).send().await,
        };
        let reply = reply.expect("a reply");
        let (status, text) = (reply.status(), reply.text().await.expect("a body"));
        assert!(status.is_success(), "{path}: {status}: {text}");
        serde_json::from_str(&text).unwrap_or(Json::String(text))
    }

    /// Whether there is such an index.
    pub(crate) async fn has_index(&self, name: &str) -> bool {
        let found =
            self.ask("GET", &format!("_cat/indices/{name}*?format=json"), &Json::Null).await;
        found.as_array().is_some_and(|found| found.iter().any(|index| index["index"] == name))
    }

    /// Every document of the indexes that `pattern` matches, with its id, in the order of the ids.
    pub(crate) async fn documents(&self, pattern: &str) -> Vec<(String, Json)> {
        self.ask("POST", &format!("{pattern}/_refresh"), &Json::Null).await;
        let found = self.ask("POST", &format!("{pattern}/_search"), &json!({"size": 10_000})).await;
        let hits = found["hits"]["hits"].as_array().expect("hits");
        let document =
            |hit: &Json| (hit["_id"].as_str().expect("an id").to_owned(), hit["_source"].clone());
        let mut documents: Vec<_> = hits.iter().map(document).collect();
        documents.sort_by(|left, right| left.0.cmp(&right.0));
        documents
    }
}

impl Drop for OpenSearch {
    fn drop(&mut self) {
        self.down();
    }
}

fn home() -> PathBuf {
    let cache = std::env::var_os("WALRACE_CACHE").unwrap_or_else(|| "/var/cache/walrace".into());
    let home = Path::new(&cache).join(format!("opensearch-{VERSION}"));
    let found = home.join("bin/opensearch").exists();
    assert!(found, "no OpenSearch in {}: run scripts/install.sh test", home.display());
    home
}

fn java_home() -> PathBuf {
    let found =
        Command::new("sh").args(["-c", "readlink -f \"$(command -v java)\""]).output().expect("sh");
    let java = PathBuf::from(String::from_utf8_lossy(&found.stdout).trim());
    let home = java.parent().and_then(Path::parent).expect("java: run scripts/install.sh test");
    home.to_owned()
}
