//! What clients of Sequin put on the wire, byte for byte as their sources and their HTTP libraries
//! write it, and what each reads of the reply (contract of Sequin's API, part 2.4).

use std::time::Duration;

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::sequin_api::{Pulled, TOKEN};

/// How a client writes the head of a request.
struct Client {
    name: &'static str,
    /// The prefix that its source has, and the body of its `receive`; `None`: a GET without one.
    prefix: &'static str,
    receive: Option<&'static str>,
    /// The header lines between the request line and the body.
    headers: &'static [&'static str],
}

/// Go's `net/http` writes `Host`, `User-Agent`, `Content-Length`, then the others by name.
const GO: &[&str] = &[
    "Host: {host}",
    "User-Agent: Go-http-client/1.1",
    "Content-Length: {length}",
    "Authorization: Bearer {token}",
    "Content-Type: application/json",
    "Accept-Encoding: gzip",
];

/// Elixir's `Req`, over Mint.
const REQ: &[&str] = &[
    "content-length: {length}",
    "host: {host}",
    "accept: application/json",
    "accept-encoding: zstd, br, gzip",
    "authorization: Bearer {token}",
    "content-type: application/json",
    "user-agent: req/0.5.6",
];

const CURL: &[&str] =
    &["Host: {host}", "User-Agent: curl/8.5.0", "Accept: */*", "Authorization: Bearer {token}"];

const OLD: &str = "/api/http_pull_consumers/orders/";
const NEW: &str = "/api/sequin_streams/orders/";

const CLIENTS: [Client; 8] = [
    Client {
        name: "sequin-go at 70e109ad",
        prefix: OLD,
        receive: Some(r#"{"max_batch_size":10,"wait_for":120000}"#),
        headers: GO,
    },
    Client {
        name: "sequin-go at f078d48e, as its Processor asks",
        prefix: OLD,
        receive: Some(r#"{"batch_size":10}"#),
        headers: GO,
    },
    Client {
        name: "sequin-go at f078d48e, with options that say nothing",
        prefix: OLD,
        receive: Some("{}"),
        headers: GO,
    },
    Client { name: "sequin-go without options", prefix: OLD, receive: Some(""), headers: GO },
    Client {
        name: "the Go client of Strait",
        prefix: OLD,
        receive: Some(r#"{"batch_size":200,"wait_for":5000}"#),
        headers: GO,
    },
    Client {
        name: "the worker of nativebpm/connectors",
        prefix: OLD,
        receive: Some(r#"{"batch_size":20,"wait_for":5000}"#),
        headers: GO,
    },
    Client {
        name: "off_broadway_sequin 0.1.1 to 0.1.3",
        prefix: OLD,
        receive: Some(r#"{"max_batch_size":10,"wait_for":120000}"#),
        headers: REQ,
    },
    Client {
        name: "curl, as Sequin's console shows it",
        prefix: NEW,
        receive: None,
        headers: CURL,
    },
];

impl Client {
    fn request(&self, host: &str, what: &str, body: Option<&str>) -> String {
        let method = if body.is_some() { "POST" } else { "GET" };
        let mut text = format!("{method} {}{what} HTTP/1.1\r\n", self.prefix);
        for line in self.headers {
            let length = body.unwrap_or_default().len().to_string();
            let line = line.replace("{host}", host).replace("{length}", &length);
            text.push_str(&format!("{}\r\n", line.replace("{token}", TOKEN)));
        }
        if body.is_some() && self.receive.is_none() {
            let length = body.unwrap_or_default().len();
            let kind = "Content-Type: application/json";
            text.push_str(&format!("{kind}\r\nContent-Length: {length}\r\n"));
        }
        format!("{text}\r\n{}", body.unwrap_or_default())
    }
}

/// One connection, kept open over all requests, as each of these clients does.
struct Wire {
    stream: TcpStream,
    host: String,
}

impl Wire {
    async fn connect(host: String) -> Self {
        Self { stream: TcpStream::connect(&host).await.unwrap(), host }
    }

    /// Status, content type and body of the reply.
    async fn ask(&mut self, request: &str) -> (u16, String, Value) {
        self.stream.write_all(request.as_bytes()).await.unwrap();
        let (mut bytes, mut more) = (Vec::new(), [0; 4096]);
        loop {
            let read = tokio::time::timeout(Duration::from_secs(30), self.stream.read(&mut more));
            let count = read.await.expect("a reply in time").unwrap();
            assert!(count > 0, "it hung up: {}", String::from_utf8_lossy(&bytes));
            bytes.extend_from_slice(&more[..count]);
            let text = String::from_utf8(bytes.clone()).unwrap();
            let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
            let header = |name: &str| {
                let line = head.lines().find(|line| line.to_ascii_lowercase().starts_with(name));
                line.map(|line| line[name.len()..].trim().to_owned())
            };
            let length: usize = header("content-length:").expect("no chunks").parse().unwrap();
            if body.len() == length {
                let status = head.split(' ').nth(1).unwrap().parse().unwrap();
                let kind = header("content-type:").unwrap();
                return (status, kind, serde_json::from_str(body).unwrap());
            }
        }
    }
}

#[tokio::test]
async fn each_client_gets_what_it_reads_for_what_it_puts_on_the_wire() {
    let pulled = Pulled::start("").await;
    let host = pulled.server.address().unwrap();
    for (number, client) in (1u32..).zip(&CLIENTS) {
        let name = client.name;
        let mut wire = Wire::connect(host.clone()).await;
        pulled.insert(number..number + 1).await;
        let mut ack_ids = Vec::new();
        for settle in ["nack", "ack"] {
            let receive = client.request(&wire.host, "receive", client.receive);
            // A client without a wait asks again and again.
            let message = loop {
                let (status, kind, reply) = wire.ask(&receive).await;
                assert_eq!(status, 200, "{name}: {reply}");
                assert!(kind.starts_with("application/json"), "{name}: {kind}");
                let messages = reply["data"].as_array().expect("always a list");
                if let Some(message) = messages.first() {
                    assert_eq!(messages.len(), 1, "{name}");
                    break message.clone();
                }
            };
            // sequin-go and off_broadway_sequin read these two, and nothing beside them.
            let ack_id = message["ack_id"].as_str().unwrap().to_owned();
            assert_eq!(message["data"]["record"]["id"], number, "{name}");
            // The worker of nativebpm/connectors reads this, too.
            assert_eq!(message["data"]["action"], "insert", "{name}");
            let body = json!({"ack_ids": [ack_id]}).to_string();
            let (status, _, reply) =
                wire.ask(&client.request(&wire.host, settle, Some(&body))).await;
            assert_eq!((status, reply), (200, json!({"success": true})), "{name}");
            ack_ids.push(ack_id);
        }
        assert_eq!(ack_ids[0], ack_ids[1], "{name}");
    }
    assert!(pulled.receive_now(10).await.is_empty());
}

/// A demand of off_broadway_sequin may be above 1000: Sequin refuses it, and so do we.
#[tokio::test]
async fn what_sequin_refuses_of_a_client_is_refused_in_words_that_it_reads() {
    let pulled = Pulled::start("").await;
    let mut wire = Wire::connect(pulled.server.address().unwrap()).await;
    let client = &CLIENTS[6];
    let demand = Some(r#"{"max_batch_size":1001,"wait_for":120000}"#);
    let (status, _, reply) = wire.ask(&client.request(&wire.host, "receive", demand)).await;
    assert_eq!(status, 400);
    assert!(reply["summary"].as_str().unwrap().contains("max_batch_size"), "{reply}");
    for body in [r#"{"ack_ids":[]}"#, r#"{"ack_ids":["MTYyeJ7abUjl1pO"]}"#, r#"{"ack_ids":null}"#] {
        for what in ["ack", "nack"] {
            let request = CLIENTS[0].request(&wire.host, what, Some(body));
            let (status, _, reply) = wire.ask(&request).await;
            assert!(status == 400 && reply["summary"].is_string(), "{what} {body}: {reply}");
        }
    }
}
