//! The sinks of Redis as the conformance suite sees them.

use async_trait::async_trait;
use redis::aio::PubSub;
use serde_json::{Value as Json, json};
use walrace::change::{Change, Row, Value};

use super::{
    super::{conformance::conforms, target::Target},
    config, pubsub,
};
use crate::kit::Redis;

/// Each kind, with a target that the rights on its page allow.
pub(super) fn kinds() -> Vec<(&'static str, Json)> {
    vec![
        ("redis_stream", json!({"stream": "walstream:events"})),
        ("redis_pubsub", json!({"channel": "cdc:{table}"})),
        ("redis_string", json!({"key": "users:{table}:{key}", "on_truncate": "scan"})),
    ]
}

const STREAM: &str = "events";
const ENTRY_BYTES_MAX: usize = 1 << 20;

/// A server and one stream.
pub(crate) struct StreamTarget {
    redis: Redis,
}

impl StreamTarget {
    pub(crate) async fn start() -> Self {
        Self { redis: Redis::start().await }
    }
}

#[async_trait]
impl Target for StreamTarget {
    fn config(&self) -> Json {
        let options = json!({"stream": STREAM, "maxlen": 0, "entry_bytes_max": ENTRY_BYTES_MAX});
        config(&self.redis, "redis_stream", options)
    }

    fn wrong_login(&self) -> Option<Json> {
        Some(wrong_login(&self.redis, self.config()))
    }

    async fn stop(&mut self) {
        self.redis.kill();
    }

    async fn start(&mut self) {
        self.redis.up().await;
    }

    async fn content(&mut self) -> Vec<Json> {
        type Entry = (String, Vec<(String, String)>);
        let entries: Vec<Entry> = self.redis.ask(&format!("XRANGE {STREAM} - +")).await;
        let payload = |(_, fields): Entry| {
            let payload = fields.into_iter().find(|(name, _)| name == "payload");
            serde_json::from_str(&payload.expect("a payload").1).expect("JSON")
        };
        entries.into_iter().map(payload).collect()
    }

    fn refused(&self, change: Change) -> Option<Change> {
        large(change)
    }
}

/// A server and a subscriber, who misses what is published while the server starts.
pub(crate) struct PubsubTarget {
    redis: Redis,
    listener: Option<PubSub>,
    received: Vec<Json>,
}

impl PubsubTarget {
    pub(crate) async fn start() -> Self {
        let redis = Redis::start().await;
        let listener = Some(pubsub::listen(&redis).await);
        Self { redis, listener, received: Vec::new() }
    }

    /// Takes what has been published until now.
    async fn receive(&mut self) {
        self.redis.ask::<u64>("PUBLISH mark -").await;
        let listener = self.listener.as_mut().expect("a listener");
        loop {
            let (channel, text) = pubsub::next(listener).await;
            if channel == "mark" {
                return;
            }
            self.received.push(serde_json::from_str(&text).expect("JSON"));
        }
    }
}

#[async_trait]
impl Target for PubsubTarget {
    fn config(&self) -> Json {
        config(&self.redis, "redis_pubsub", json!({"channel": "{table}:{key}"}))
    }

    fn ledger_config(&self) -> Json {
        config(&self.redis, "redis_pubsub", json!({"channel": "{schema}.{table}"}))
    }

    fn is_durable(&self) -> bool {
        false // who does not listen misses it
    }

    fn wrong_login(&self) -> Option<Json> {
        Some(wrong_login(&self.redis, self.config()))
    }

    async fn stop(&mut self) {
        self.receive().await;
        self.listener = None;
        self.redis.kill();
    }

    async fn start(&mut self) {
        self.redis.up().await;
        self.listener = Some(pubsub::listen(&self.redis).await);
    }

    async fn content(&mut self) -> Vec<Json> {
        self.receive().await;
        self.received.clone()
    }

    fn refused(&self, change: Change) -> Option<Change> {
        keyless(change)
    }
}

/// A server and a string for each row.
pub(crate) struct StringTarget {
    redis: Redis,
}

impl StringTarget {
    pub(crate) async fn start() -> Self {
        Self { redis: Redis::start().await }
    }
}

#[async_trait]
impl Target for StringTarget {
    fn config(&self) -> Json {
        config(&self.redis, "redis_string", json!({"on_truncate": "scan"}))
    }

    fn tables(&self) -> &'static [&'static str] {
        &["tx", "account", "order_line", "document", "visit"]
    }

    fn wrong_login(&self) -> Option<Json> {
        Some(wrong_login(&self.redis, self.config()))
    }

    async fn stop(&mut self) {
        self.redis.kill();
    }

    async fn start(&mut self) {
        self.redis.up().await;
    }

    async fn content(&mut self) -> Vec<Json> {
        let mut keys: Vec<String> = self.redis.ask("KEYS *").await;
        keys.sort();
        let mut content = Vec::with_capacity(keys.len());
        for key in keys {
            let (table, _) = key.split_once(':').expect("the key of a row");
            let text: String = self.redis.ask(&format!("GET {key}")).await;
            let row: Json = serde_json::from_str(&text).expect("JSON");
            content.push(json!({"table": table, "row": row}));
        }
        content
    }

    fn refused(&self, change: Change) -> Option<Change> {
        keyless(change)
    }
}

fn wrong_login(redis: &Redis, mut config: Json) -> Json {
    config["url"] = json!(redis.url_of("walrace:hunter2"));
    config
}

/// With a text in place of its last value that makes the entry too large.
fn large(mut change: Change) -> Option<Change> {
    let text = "x".repeat(ENTRY_BYTES_MAX);
    let mut values: Vec<Value> = change.after.as_ref()?.values().collect();
    *values.last_mut()? = Value::Text(text.as_bytes());
    change.after = Some(Row::from_values(values));
    Some(change)
}

/// With NULL in its key, so that no name can be made of it.
fn keyless(mut change: Change) -> Option<Change> {
    let key = change.table.as_ref()?.key_columns();
    let mut values: Vec<Value> = change.after.as_ref()?.values().collect();
    *values.get_mut(*key.first()?)? = Value::Null;
    change.after = Some(Row::from_values(values));
    Some(change)
}

#[tokio::test]
async fn the_redis_stream_sink_conforms() {
    conforms(&mut StreamTarget::start().await).await;
}

#[tokio::test]
async fn the_redis_pubsub_sink_conforms() {
    conforms(&mut PubsubTarget::start().await).await;
}

#[tokio::test]
async fn the_redis_string_sink_conforms() {
    conforms(&mut StringTarget::start().await).await;
}

#[tokio::test]
async fn each_target_shows_what_its_sink_delivered() {
    use super::{batch, delivers, fails, open};

    let mut targets: Vec<Box<dyn Target>> = vec![
        Box::new(StreamTarget::start().await),
        Box::new(PubsubTarget::start().await),
        Box::new(StringTarget::start().await),
    ];
    for target in &mut targets {
        let mut sink = open(target.config()).unwrap();
        sink.open().await.unwrap();
        let mut refused = batch(0..1);
        refused.changes = vec![target.refused(refused.changes.remove(0)).unwrap()];
        let error = fails(&mut *sink, &refused).await;
        assert_eq!(error.class(), walrace::error::Class::Data, "{error}");
        delivers(&mut *sink, &batch(0..3)).await;
        target.stop().await;
        target.start().await;
        sink.open().await.unwrap();
        delivers(&mut *sink, &batch(3..4)).await;
        let content = target.content().await;
        let id = |one: &Json| {
            let row = one.get("row").or_else(|| one.get("after")).unwrap();
            row["id"].as_u64().unwrap()
        };
        assert_eq!(content.iter().map(id).collect::<Vec<_>>(), [0, 1, 2, 3]);
        let mut wrong = open(target.wrong_login().unwrap()).unwrap();
        assert_eq!(wrong.open().await.unwrap_err().class(), walrace::error::Class::Config);
    }
}
