//! Sequin's pull API, end to end: what its published clients send and read, and what survives a
//! kill.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::kit::{Cluster, Scratch, Server, http_client, source_toml, wait_for};

const PATIENCE: Duration = Duration::from_secs(30);
pub(crate) const TOKEN: &str = "t0ken-of-the-tests";
const TABLE: &str = "create table orders (id int primary key, status text, note text);
    alter table orders replica identity full";

/// A PostgreSQL, a Walrace whose sink `orders` is pulled, and a client of it.
pub(crate) struct Pulled {
    pub(crate) cluster: Cluster,
    pub(crate) server: Server,
    client: reqwest::Client,
}

impl Pulled {
    pub(crate) async fn start(options: &str) -> Self {
        let cluster = Cluster::start().await;
        cluster.sql(TABLE).await;
        let mut server = Server::new(&format!(
            "{}\n[[api_tokens]]\nname = \"tests\"\ntoken = \"{TOKEN}\"\n
             [sink.orders]\nkind = \"sequin_stream\"\n{options}\n
             [sink.lake]\nkind = \"file\"\npath = \"lake.jsonl\"\n",
            source_toml("app", &cluster.unix_url())
        ));
        server.start_ready().await;
        Self { cluster, server, client: http_client() }
    }

    pub(crate) async fn insert(&self, ids: std::ops::Range<u32>) {
        let (from, to) = (ids.start, ids.end - 1);
        let rows = format!("select i, 'new', 'n' || i from generate_series({from}, {to}) i");
        self.cluster.sql(&format!("insert into orders {rows}")).await;
    }

    fn request(&self, method: &str, path: &str) -> reqwest::RequestBuilder {
        let url = format!("http://{}{path}", self.server.address().unwrap());
        self.client.request(method.parse().unwrap(), url).timeout(Duration::from_secs(60))
    }

    pub(crate) async fn get(&self, path: &str) -> (u16, Value) {
        reply(self.request("GET", path).bearer_auth(TOKEN)).await
    }

    pub(crate) async fn post(&self, path: &str, body: Value) -> (u16, Value) {
        reply(self.request("POST", path).bearer_auth(TOKEN).json(&body)).await
    }

    /// As `post`, where the server may die of it.
    pub(crate) async fn try_post(&self, path: &str, body: Value) {
        let _ = self.request("POST", path).bearer_auth(TOKEN).json(&body).send().await;
    }

    /// Up to `max` messages, waiting for the first.
    pub(crate) async fn receive(&self, max: u32) -> Vec<Value> {
        let body = json!({"batch_size": max, "wait_for": 20_000});
        let (status, reply) = self.post("/api/sequin_streams/orders/receive", body).await;
        assert_eq!(status, 200, "{reply}");
        reply["data"].as_array().unwrap().clone()
    }

    pub(crate) async fn receive_now(&self, max: u32) -> Vec<Value> {
        let body = json!({"batch_size": max});
        let (_, reply) = self.post("/api/sequin_streams/orders/receive", body).await;
        reply["data"].as_array().unwrap().clone()
    }

    /// Exactly `count` messages, over as many calls as it takes.
    pub(crate) async fn receive_all(&self, count: usize) -> Vec<Value> {
        let mut messages = Vec::new();
        while messages.len() < count {
            let more = self.receive(1000).await;
            assert!(!more.is_empty(), "{} of {count} arrived", messages.len());
            messages.extend(more);
        }
        messages
    }

    pub(crate) async fn settle(&self, how: &str, messages: &[Value]) {
        let ids: Vec<_> = messages.iter().map(|message| &message["ack_id"]).collect();
        let path = format!("/api/sequin_streams/orders/{how}");
        let reply = self.post(&path, json!({"ack_ids": ids})).await;
        assert_eq!(reply, (200, json!({"success": true})));
    }

    pub(crate) async fn kill_and_start(&mut self) {
        self.server.kill();
        self.server.start_ready().await;
    }
}

async fn reply(request: reqwest::RequestBuilder) -> (u16, Value) {
    let reply = request.send().await.unwrap();
    let (status, text) = (reply.status().as_u16(), reply.text().await.unwrap());
    (status, serde_json::from_str(&text).unwrap_or_else(|_| panic!("not JSON: {text:?}")))
}

pub(crate) fn id(message: &Value) -> u64 {
    message["data"]["record"]["id"].as_u64().unwrap()
}

pub(crate) fn ids(messages: &[Value]) -> Vec<u64> {
    messages.iter().map(id).collect()
}

#[tokio::test]
async fn part_is_acknowledged_and_part_comes_again() {
    let pulled = Pulled::start("").await;
    pulled.insert(1..7).await;
    let messages = pulled.receive_all(6).await;
    assert_eq!(ids(&messages), [1, 2, 3, 4, 5, 6]);
    pulled.settle("ack", &messages[..3]).await;
    pulled.settle("ack", &messages[..3]).await;
    pulled.settle("nack", &messages[4..]).await;
    let again = pulled.receive_all(2).await;
    assert_eq!(again, messages[4..], "the same messages under the same ids");
    pulled.settle("ack", &again).await;
    pulled.settle("nack", &messages[..3]).await;
    assert!(pulled.receive_now(10).await.is_empty(), "4 is out, the others are done");
    pulled.settle("nack", &messages[3..4]).await;
    assert_eq!(ids(&pulled.receive(10).await), [4]);
}

#[tokio::test]
async fn a_message_has_action_record_old_values_and_metadata() {
    let pulled = Pulled::start("").await;
    pulled.insert(1..2).await;
    pulled.cluster.sql("update orders set status = 'paid'; delete from orders").await;
    let mut seen = Vec::new();
    for _ in 0..3 {
        let message = pulled.receive(10).await;
        assert_eq!(message.len(), 1, "one of a key at a time");
        pulled.settle("ack", &message).await;
        seen.extend(message);
    }
    let part = |name: &str| seen.iter().map(|m| m["data"][name].clone()).collect::<Vec<_>>();
    assert_eq!(part("action"), ["insert", "update", "delete"]);
    let row = |status: &str| json!({"id": 1, "status": status, "note": "n1"});
    assert_eq!(part("record"), [row("new"), row("paid"), row("paid")]);
    assert_eq!(part("changes"), [Value::Null, json!({"status": "new"}), Value::Null]);
    let (_, sink) = pulled.get("/api/sinks/orders").await;
    for metadata in part("metadata") {
        assert_eq!(metadata["table_schema"], "public");
        assert_eq!(metadata["table_name"], "orders");
        assert!(metadata["commit_timestamp"].as_str().unwrap().ends_with('Z'));
        assert!(metadata["commit_lsn"].is_u64() && metadata["commit_idx"].is_u64());
        assert_eq!(metadata["consumer"]["id"], sink["id"]);
    }
}

#[tokio::test]
async fn acknowledgements_leases_and_groups_survive_a_kill() {
    let mut pulled = Pulled::start("ack_wait_ms = 4000").await;
    pulled.insert(1..4).await;
    pulled.cluster.sql("update orders set status = 'paid' where id = 2").await;
    let messages = pulled.receive_all(3).await;
    pulled.settle("ack", &messages[..1]).await;
    pulled.kill_and_start().await;
    // Acknowledged with an id of before, whether or not it was read again by now.
    pulled.settle("ack", &messages[2..]).await;
    let begin = Instant::now();
    let again = pulled.receive(10).await;
    assert_eq!(again, messages[1..2], "once its lease is over, before the later one of its key");
    assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
    pulled.settle("ack", &again).await;
    let last = pulled.receive(10).await;
    assert_eq!((ids(&last), &last[0]["data"]["action"]), (vec![2], &json!("update")));
    pulled.settle("ack", &last).await;
    pulled.kill_and_start().await;
    pulled.insert(9..10).await;
    assert_eq!(ids(&pulled.receive(10).await), [9], "nothing that was acknowledged");
}

#[tokio::test]
async fn a_kill_at_any_step_of_a_reply_neither_loses_nor_returns_what_was_acknowledged() {
    let mut pulled = Pulled::start("ack_wait_ms = 500").await;
    pulled.insert(1..3).await;
    let first = pulled.receive_all(2).await;
    pulled.settle("ack", &first[..1]).await;
    for point in ["pull::before_lease", "pull::after_lease", "pull::before_ack", "pull::after_ack"]
    {
        pulled.server.kill();
        pulled.server.start_to_die_at(point);
        wait_for(PATIENCE, async || pulled.server.address(), || "no address".into()).await;
        // The connection breaks at the point; before it everything is answered.
        loop {
            let receive = json!({"batch_size": 10, "wait_for": 5000});
            let path = "/api/sequin_streams/orders/receive";
            let asked = pulled.request("POST", path).bearer_auth(TOKEN).json(&receive).send();
            let Ok(reply) = asked.await else { break };
            let Ok(reply) = reply.json::<Value>().await else { break };
            for message in reply["data"].as_array().into_iter().flatten() {
                assert_eq!(message, &first[1]);
            }
            let nack = json!({"ack_ids": [first[1]["ack_id"]]});
            let path = "/api/sequin_streams/orders/nack";
            let asked = pulled.request("POST", path).bearer_auth(TOKEN).json(&nack).send();
            if asked.await.is_err() {
                break;
            }
        }
        pulled.server.wait_exit(PATIENCE).await;
    }
    pulled.server.start_ready().await;
    let last = pulled.receive(10).await;
    assert_eq!(last, first[1..]);
    pulled.settle("ack", &last).await;
    assert!(pulled.receive_now(10).await.is_empty());
}

#[tokio::test]
async fn a_kill_of_the_loop_at_any_step_loses_nothing() {
    let mut pulled = Pulled::start("").await;
    pulled.server.kill();
    for (number, point) in (1u32..).zip(["pull::after_begin", "pull::after_write"]) {
        pulled.server.start_to_die_at(point);
        pulled.insert(number..number + 1).await;
        pulled.server.wait_exit(PATIENCE).await;
    }
    pulled.server.start_ready().await;
    let messages = pulled.receive_all(2).await;
    assert_eq!(ids(&messages), [1, 2]);
    pulled.settle("ack", &messages).await;
}

#[tokio::test]
async fn each_reply_is_as_sequin_gives_it() {
    let pulled = Pulled::start("").await;
    let (_, sink) = pulled.get("/api/sinks/orders").await;
    let by_id = format!("/api/http_pull_consumers/{}/receive", sink["id"].as_str().unwrap());
    let old = "/api/http_pull_consumers/orders/receive";
    let new = "/api/sequin_streams/orders/receive";
    let empty = (200, json!({"data": []}));
    for path in [old, new, &by_id] {
        assert_eq!(pulled.get(path).await, empty);
        assert_eq!(pulled.get(&format!("{path}?max_batch_size=7&wait_for=500ms")).await, empty);
        assert_eq!(pulled.post(path, json!({"batch_size": "3", "wait_for": "1s"})).await, empty);
    }
    let summary = |(status, body): (u16, Value)| {
        (status, body["summary"].as_str().unwrap_or_else(|| panic!("{body}")).to_owned())
    };
    for body in [json!({"batch_size": 0}), json!({"max_batch_size": 1001})] {
        let (status, text) = summary(pulled.post(new, body).await);
        assert!(status == 400 && text.starts_with("Invalid `max_batch_size`"), "{text}");
    }
    for wait in [json!(300_001), json!("5h"), json!(-1)] {
        let (status, text) = summary(pulled.post(new, json!({"wait_for": wait})).await);
        assert!(status == 400 && text.contains("wait_for"), "{text}");
    }
    for how in ["ack", "nack"] {
        let path = format!("/api/sequin_streams/orders/{how}");
        for body in [json!({}), json!({"ack_ids": []}), json!({"ack_ids": ["MTIz"]})] {
            assert_eq!(summary(pulled.post(&path, body).await).0, 400);
        }
        let unknown = json!({"ack_ids": ["6ba7b812-9dad-51d1-80b4-00c04fd430c8"]});
        assert_eq!(pulled.post(&path, unknown.clone()).await, (200, json!({"success": true})));
        let plain = pulled.request("POST", &path).bearer_auth(TOKEN).body(unknown.to_string());
        assert_eq!(summary(reply(plain).await).0, 400, "no content-type");
    }
    let not_found = "Not found: No sink consumer found matching the provided ID or name";
    for path in ["/api/sequin_streams/nobody/receive", "/api/sequin_streams/lake/receive"] {
        assert_eq!(summary(pulled.post(path, json!({})).await), (404, not_found.to_owned()));
    }
    assert_eq!(summary(pulled.get("/api/sinks/nobody").await), (404, not_found.to_owned()));
    for path in ["/api/nothing", "/api/sequin_streams/orders", "/api/streams/x/messages"] {
        let unknown = (404, json!({"errors": {"detail": "Not Found"}}));
        assert_eq!(pulled.get(path).await, unknown, "{path}");
        assert_eq!(reply(pulled.request("PUT", path).bearer_auth(TOKEN)).await, unknown);
    }
    let wrong_method = reply(pulled.request("PUT", new).bearer_auth(TOKEN)).await;
    assert_eq!(wrong_method, (404, json!({"errors": {"detail": "Not Found"}})));
}

#[tokio::test]
async fn only_who_has_a_token_is_let_in() {
    let pulled = Pulled::start("").await;
    let mut sentences = BTreeSet::new();
    for path in ["/api/sinks", "/api/sinks/orders", "/api/sequin_streams/orders/receive"] {
        let ask = || pulled.request("GET", path);
        for request in [
            ask(),
            ask().header("authorization", format!("Basic {TOKEN}")),
            ask().bearer_auth("another"),
            ask().bearer_auth(TOKEN).header("authorization", format!("Bearer {TOKEN}")),
        ] {
            let (status, body) = reply(request).await;
            assert_eq!(status, 401, "{path}: {body}");
            sentences.insert(body["summary"].as_str().unwrap().to_owned());
        }
        assert_eq!(reply(ask().bearer_auth(TOKEN)).await.0, 200);
    }
    assert_eq!(sentences.len(), 4, "{sentences:?}");
    assert_eq!(pulled.server.get("/health").await.0, 200);
}

#[tokio::test]
async fn a_long_poll_ends_with_the_first_message_and_with_the_server() {
    let mut pulled = Pulled::start("max_waiting = 1").await;
    let ask = || {
        let path = "/api/http_pull_consumers/orders/receive";
        let body = json!({"max_batch_size": 200, "wait_for": 300_000});
        reply(pulled.request("POST", path).timeout(PATIENCE * 10).bearer_auth(TOKEN).json(&body))
    };
    let commit = async {
        tokio::task::yield_now().await;
        pulled.insert(1..2).await;
        Instant::now()
    };
    let (message, committed) = tokio::join!(ask(), commit);
    assert!(committed.elapsed() < Duration::from_secs(5), "{:?}", committed.elapsed());
    assert_eq!(ids(message.1["data"].as_array().unwrap()), [1]);
    let (client, address) = (pulled.client.clone(), pulled.server.address().unwrap());
    let mut task = tokio::task::JoinSet::new();
    task.spawn(async move {
        let url = format!("http://{address}/api/sequin_streams/orders/receive?wait_for=300000");
        loop {
            // The probe below may have the one place for a moment.
            let (status, body) = reply(client.get(&url).bearer_auth(TOKEN)).await;
            if status != 429 {
                return (status, body);
            }
        }
    });
    let waits = async || {
        let body = json!({"wait_for": 1});
        let (status, reply) = pulled.post("/api/sequin_streams/orders/receive", body).await;
        (status == 429 && reply["summary"].is_string()).then_some(())
    };
    wait_for(PATIENCE, waits, || "nobody waits".into()).await;
    assert!(pulled.server.stop().await.success());
    assert_eq!(task.join_next().await.unwrap().unwrap(), (200, json!({"data": []})));
}

#[tokio::test]
async fn a_consumer_that_was_away_under_load_receives_everything() {
    let mut pulled = Pulled::start("max_ack_pending = 500").await;
    for start in (1..4001).step_by(1000) {
        pulled.insert(start..start + 1000).await;
    }
    pulled.cluster.sql("update orders set status = 'paid'").await;
    pulled.kill_and_start().await;
    let mut actions: Vec<(u64, String)> = Vec::new();
    while actions.len() < 8000 {
        let messages = pulled.receive(1000).await;
        assert!(!messages.is_empty(), "{} arrived", actions.len());
        let of = |message: &Value| (id(message), message["data"]["action"].to_string());
        actions.extend(messages.iter().map(of));
        pulled.settle("ack", &messages).await;
    }
    let inserts = actions.iter().position(|(id, action)| *id == 7 && action == "\"insert\"");
    let updates = actions.iter().position(|(id, action)| *id == 7 && action == "\"update\"");
    assert!(inserts < updates, "{inserts:?} {updates:?}");
    assert_eq!(actions.len(), 8000);
    assert_eq!(actions.into_iter().collect::<BTreeSet<_>>().len(), 8000, "each of them once");
}

#[tokio::test]
async fn straits_start_up_finds_the_sink_and_its_loop_splits_ack_and_nack() {
    let pulled = Pulled::start("tables = [\"public.orders\"]").await;
    let (status, health) = pulled.server.get("/health").await;
    let health: Value = serde_json::from_str(&health).unwrap();
    assert_eq!((status, &health["ok"]), (200, &json!(true)));
    assert!(health["rev"].is_string());
    let ready = async || {
        let (status, sink) = pulled.get("/api/sinks/orders").await;
        let good = ["healthy", "waiting"].map(Value::from).contains(&sink["health"]["status"]);
        (status == 200 && sink["name"] == "orders" && sink["status"] == "active" && good)
            .then_some(sink)
    };
    let sink = wait_for(PATIENCE, ready, || "the sink is not healthy".into()).await;
    assert_eq!(sink["destination"], json!({"type": "sequin_stream"}));
    assert_eq!(sink["database"], "app");
    assert_eq!(sink["source"]["include_tables"], json!(["public.orders"]));
    assert_eq!(sink["health"]["name"], "Consumer health");
    assert_eq!(sink["health"]["checks"].as_array().unwrap().len(), 5);
    let (status, taken) = pulled.post("/api/sinks", json!({"name": "orders"})).await;
    assert_eq!(status, 422);
    assert_eq!(taken["validation_errors"]["name"], json!(["has already been taken"]));
    for other in [json!({"name": "nobody"}), json!({})] {
        let (status, refused) = pulled.post("/api/sinks", other).await;
        assert_eq!((status, &refused["summary"]), (422, &json!("Validation failed")));
        assert!(!refused.to_string().contains("taken"), "{refused}");
    }
    let (_, all) = pulled.get("/api/sinks").await;
    let names: Vec<_> = all["data"].as_array().unwrap().iter().map(|s| &s["name"]).collect();
    assert_eq!(names, ["lake", "orders"]);
    pulled.insert(1..11).await;
    let (mut done, mut refused) = (BTreeSet::new(), 0);
    while done.len() < 10 {
        let body = json!({"batch_size": 200, "wait_for": 5000});
        let (_, reply) = pulled.post("/api/http_pull_consumers/orders/receive", body).await;
        let messages = reply["data"].as_array().unwrap().clone();
        let bad = |message: &Value| refused == 0 && id(message).is_multiple_of(2);
        let (nack, ack): (Vec<_>, Vec<_>) = messages.into_iter().partition(bad);
        refused += nack.len();
        done.extend(ids(&ack));
        for (how, messages) in [("ack", ack), ("nack", nack)] {
            if !messages.is_empty() {
                pulled.settle(how, &messages).await;
            }
        }
    }
    assert!(refused > 0);
}

/// The variables alone configure the consumer of `examples`.
#[tokio::test]
async fn three_variables_configure_a_consumer_and_each_that_is_missing_is_named() {
    let pulled = Pulled::start("").await;
    let base = format!("http://{}", pulled.server.address().unwrap());
    let variables = [
        ("SEQUIN_BASE_URL", base.as_str()),
        ("SEQUIN_CONSUMER_NAME", "orders"),
        ("SEQUIN_API_TOKEN", TOKEN),
    ];
    let consumer = |without: Option<&str>| {
        let mut command = Command::new("python3");
        command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/pull_consumer.py"));
        command.stdin(Stdio::null());
        for (name, value) in variables {
            command.env_remove(name);
            if Some(name) != without {
                command.env(name, value);
            }
        }
        command
    };
    for (name, _) in variables {
        let output = consumer(Some(name)).output().expect("python3");
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && told.trim_end().ends_with(name), "{told}");
    }
    let scratch = Scratch::new("consumer");
    let path = scratch.path().join("out.jsonl");
    let mut child = consumer(None).stdout(File::create(&path).unwrap()).spawn().expect("python3");
    scratch.note("consumer", child.id());
    pulled.insert(1..251).await;
    let all = async || {
        let text = fs::read_to_string(&path).unwrap();
        (text.lines().count() >= 250).then_some(text)
    };
    let text = wait_for(PATIENCE, all, || "the consumer prints too little".into()).await;
    let printed = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let printed: BTreeSet<_> = printed.map(|data| data["record"]["id"].as_u64().unwrap()).collect();
    assert_eq!(printed.len(), 250);
    child.kill().unwrap();
    child.wait().unwrap();
    scratch.forget("consumer");
}

#[tokio::test]
async fn the_curl_lines_of_the_documentation_work() {
    let page = include_str!("../../docs/sinks/http_pull.md");
    let lines: Vec<&str> = page.lines().filter(|line| line.starts_with("curl ")).collect();
    assert_eq!(lines.len(), 3);
    let pulled = Pulled::start("").await;
    pulled.insert(1..2).await;
    let base = format!("http://{}", pulled.server.address().unwrap());
    let run = |line: &str, ack_id: &str| {
        let mut shell = Command::new("sh");
        shell.args(["-c", line]).env("SEQUIN_BASE_URL", &base).env("ACK_ID", ack_id);
        shell.env("SEQUIN_CONSUMER_NAME", "orders").env("SEQUIN_API_TOKEN", TOKEN);
        let output = shell.output().expect("sh");
        serde_json::from_slice::<Value>(&output.stdout)
            .unwrap_or_else(|_| panic!("{line}: {}", String::from_utf8_lossy(&output.stderr)))
    };
    let received = run(lines[0], "");
    assert_eq!(ids(received["data"].as_array().unwrap()), [1]);
    let ack_id = received["data"][0]["ack_id"].as_str().unwrap();
    assert_eq!(run(lines[1], ack_id), json!({"success": true}));
    assert_eq!(run(lines[0], ""), received);
    assert_eq!(run(lines[2], ack_id), json!({"success": true}));
    assert!(pulled.receive_now(1).await.is_empty());
}
