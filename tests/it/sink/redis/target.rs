//! The sinks of Redis as the conformance suite sees them.

use async_trait::async_trait;
use redis::aio::PubSub;
use serde_json::{Value as Json, json};
use walrace::{
    change::{Change, Row, Value},
    error::Class,
};

use super::{
    super::{conformance::conforms, target::Target},
    batch, config, delivers, fails, open, opened, pubsub,
};
use crate::kit::Redis;

/// Each kind, with a target that the rights on its page allow.
pub(super) fn kinds() -> Vec<(&'static str, Json)> {
    vec![
        ("redis_stream", json!({"stream": "walstream:events"})),
        ("redis_list", json!({"list": "jobs:{table}", "on_full": "trim"})),
        ("redis_pubsub", json!({"channel": "cdc:{table}"})),
        ("redis_string", json!({"key": "users:{table}:{key}", "on_truncate": "scan"})),
    ]
}

const STREAM: &str = "events";
const LIST: &str = "jobs";
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

/// A server and one list.
pub(crate) struct ListTarget {
    redis: Redis,
}

impl ListTarget {
    pub(crate) async fn start() -> Self {
        Self { redis: Redis::start().await }
    }
}

#[async_trait]
impl Target for ListTarget {
    fn config(&self) -> Json {
        let options = json!({"list": LIST, "length_max": 0, "item_bytes_max": ENTRY_BYTES_MAX});
        config(&self.redis, "redis_list", options)
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
        let items: Vec<String> = self.redis.ask(&format!("LRANGE {LIST} 0 -1")).await;
        items.iter().map(|item| serde_json::from_str(item).expect("JSON")).collect()
    }

    fn failpoints(&self) -> &'static [&'static str] {
        &["redis::before_write:3", "redis::after_write:2"]
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
async fn the_redis_list_sink_conforms() {
    conforms(&mut ListTarget::start().await).await;
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
    let mut targets: Vec<Box<dyn Target>> = vec![
        Box::new(StreamTarget::start().await),
        Box::new(ListTarget::start().await),
        Box::new(PubsubTarget::start().await),
        Box::new(StringTarget::start().await),
    ];
    for target in &mut targets {
        let mut sink = open(target.config()).unwrap();
        sink.open().await.unwrap();
        let mut refused = batch(0..1);
        refused.changes = vec![target.refused(refused.changes.remove(0)).unwrap()];
        let error = fails(&mut *sink, &refused).await;
        assert_eq!(error.class(), Class::Data, "{error}");
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
        assert_eq!(wrong.open().await.unwrap_err().class(), Class::Config);
    }
}

/// The offsets of a list's items, the oldest first.
async fn items(redis: &Redis, list: &str) -> Vec<u64> {
    let items: Vec<String> = redis.ask(&format!("LRANGE {list} 0 -1")).await;
    let offset = |item: &String| serde_json::from_str::<Json>(item).unwrap()["offset"].as_u64();
    items.iter().map(|item| offset(item).unwrap()).collect()
}

#[tokio::test]
async fn a_consumer_of_a_list_takes_the_oldest_message() {
    let redis = Redis::start().await;
    let mut sink = opened(&redis, "redis_list", json!({})).await;
    let mut batch = batch(0..3);
    batch.changes[1].shaped_mut().route = Some("other".into());
    delivers(&mut *sink, &batch).await;
    let (list, item): (String, String) = redis.ask("BLPOP walrace:public.t 1").await;
    let item: Json = serde_json::from_str(&item).unwrap();
    assert_eq!(list, "walrace:public.t");
    assert_eq!(item["after"], json!({"id": 0, "v": "ü \"quoted\""}));
    assert_eq!(items(&redis, "walrace:public.t").await, [2]);
    assert_eq!(items(&redis, "other").await, [1]);

    let bytes = json!({"format": "walstream", "list": "bytes", "progress_key": "bytes:progress"});
    let mut sink = opened(&redis, "redis_list", bytes).await;
    delivers(&mut *sink, &batch).await;
    assert_eq!(redis.ask::<u64>("LLEN bytes").await, 2);
    let headers = config(&redis, "redis_list", json!({"format": "cloudevents_binary"}));
    assert_eq!(open(headers).err().unwrap().class(), Class::Config);
}

#[tokio::test]
async fn a_full_list_is_waited_for_and_nothing_is_lost() {
    let redis = Redis::start().await;
    let mut sink = opened(&redis, "redis_list", json!({"list": LIST, "length_max": 3})).await;
    delivers(&mut *sink, &batch(0..2)).await;
    let mut two = batch(2..4);
    for route in [None, Some("other".to_owned())] {
        // One of them would fit: the batch goes in whole, or not at all.
        two.changes.insert(0, batch(2..3).changes.remove(0));
        two.changes[0].shaped_mut().route = route;
        let stored = sink.open().await.unwrap();
        let error = fails(&mut *sink, &two).await;
        assert_eq!(error.class(), Class::Retry, "{error}");
        assert!(error.to_string().contains("has 2 of at most 3 items in `jobs`"), "{error}");
        assert!(error.remedy_text().unwrap().contains("length_max"), "{error}");
        assert_eq!(sink.open().await.unwrap(), stored);
        two.changes.remove(0);
    }
    assert_eq!(items(&redis, LIST).await, [0, 1]);
    assert_eq!(redis.ask::<u64>("EXISTS other").await, 0);
    redis.ask::<(String, String)>("BLPOP jobs 1").await;
    delivers(&mut *sink, &two).await;
    assert_eq!(items(&redis, LIST).await, [1, 2, 3]);
    // What could not fit into an empty list is halved by the pipeline.
    assert_eq!(fails(&mut *sink, &batch(4..8)).await.class(), Class::Data);
    assert_eq!(fails(&mut *sink, &batch(4..5)).await.class(), Class::Retry);
}

#[tokio::test]
async fn a_full_list_drops_its_oldest_items_on_request_alone() {
    let redis = Redis::start().await;
    let options = json!({"list": LIST, "length_max": 3, "on_full": "trim"});
    let mut sink = opened(&redis, "redis_list", options).await;
    delivers(&mut *sink, &batch(0..5)).await;
    assert_eq!(items(&redis, LIST).await, [2, 3, 4]);
    delivers(&mut *sink, &batch(5..6)).await;
    assert_eq!(items(&redis, LIST).await, [3, 4, 5]);
    // Who may not trim is told before anything is pushed.
    redis.ask::<()>("ACL SETUSER half on >s3cret ~* +@all -ltrim").await;
    let url = redis.url_of("half:s3cret");
    let options = json!({"list": LIST, "length_max": 3, "on_full": "trim", "url": url});
    let mut sink = opened(&redis, "redis_list", options).await;
    let error = fails(&mut *sink, &batch(6..8)).await;
    assert_eq!(error.class(), Class::Config, "{error}");
    assert_eq!(items(&redis, LIST).await, [3, 4, 5]);
}

#[tokio::test]
async fn a_list_that_is_no_list_or_cannot_be_named_is_told() {
    let redis = Redis::start().await;
    redis.ask::<()>("SET jobs x").await;
    let mut sink = opened(&redis, "redis_list", json!({"list": LIST})).await;
    let error = fails(&mut *sink, &batch(0..1)).await;
    assert_eq!(error.class(), Class::Config, "{error}");
    assert!(error.to_string().contains("`jobs`"), "{error}");
    for wrong in [
        json!({"list": ""}),
        json!({"list": "{tabel}"}),
        json!({"list": "a", "progress_key": "a"}),
        json!({"progress_key": ""}),
    ] {
        let error = open(config(&redis, "redis_list", wrong)).err().unwrap();
        assert_eq!(error.class(), Class::Config, "{error}");
    }
}
