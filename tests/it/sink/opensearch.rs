use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use serde_json::{Value as Json, json};
use walrace::{
    change::{Batch, Before, Change, Op, Row, Value},
    error::Class,
    schema::Identity,
};

use super::{
    batch, conformance::conforms, delivers, fails, letters, open, receiver::Receiver,
    target::Target, truncate, write,
};
use crate::kit::OpenSearch;

/// The tables of the ledger that have a key.
const TABLES: &[&str] = &["tx", "account", "order_line", "document", "visit"];

/// The sink `opensearch` and its server, for the conformance suite.
pub(crate) struct OpenSearchTarget {
    server: OpenSearch,
}

impl OpenSearchTarget {
    pub(crate) async fn new() -> Self {
        let server = OpenSearch::start().await;
        // With a fixed type there is a change that the server refuses.
        let mapping = json!({"mappings": {"properties": {"v": {"type": "keyword"}}}});
        server.ask("PUT", "public.t", &mapping).await;
        Self { server }
    }
}

#[async_trait]
impl Target for OpenSearchTarget {
    fn config(&self) -> Json {
        json!({"kind": "opensearch", "url": self.server.url()})
    }

    fn ledger_config(&self) -> Json {
        json!({"kind": "opensearch", "url": self.server.url(), "on_truncate": "delete"})
    }

    fn pause(&self) -> Duration {
        Duration::from_millis(60)
    }

    fn tables(&self) -> &'static [&'static str] {
        TABLES
    }

    async fn stop(&mut self) {
        self.server.down();
    }

    async fn start(&mut self) {
        self.server.up().await;
    }

    async fn content(&mut self) -> Vec<Json> {
        let mut content = Vec::new();
        for table in [&["t"], TABLES].concat() {
            let index =
                if table == "t" { "public.t".to_owned() } else { format!("ledger.{table}") };
            if !self.server.has_index(&index).await {
                continue;
            }
            let documents = self.server.documents(&index).await;
            let row = |(_, row): (String, Json)| json!({"table": table, "row": row});
            content.extend(documents.into_iter().map(row));
        }
        content
    }

    /// Longer than what Lucene takes as one term.
    fn refused(&self, mut change: Change) -> Option<Change> {
        let values: Vec<Value> = change.after.as_ref()?.values().take(1).collect();
        let long = "x".repeat(40_000);
        let row = values.into_iter().chain([Value::Text(long.as_bytes())]);
        change.after = Some(Row::from_values(row));
        Some(change)
    }
}

fn row(id: &str, v: &str) -> Row {
    Row::from_values([Value::Text(id.as_bytes()), Value::Text(v.as_bytes())])
}

fn insert(offset: u64, id: &str, v: &str) -> Change {
    Change { after: Some(row(id, v)), ..batch(offset..offset + 1).changes.remove(0) }
}

fn update(offset: u64, id: &str, v: &str) -> Change {
    Change { op: Op::Update, ..insert(offset, id, v) }
}

fn delete(offset: u64, id: &str) -> Change {
    let key = Row::from_values([Value::Text(id.as_bytes()), Value::Null]);
    Change { op: Op::Delete, after: None, before: Before::Key(key), ..insert(offset, id, "") }
}

fn changes(changes: impl IntoIterator<Item = Change>) -> Batch {
    Batch { changes: changes.into_iter().collect(), position: None }
}

#[expect(clippy::needless_pass_by_value, reason = "every caller makes it in place")]
fn config(url: &str, more: Json) -> Json {
    let mut config = json!({"kind": "opensearch", "url": url});
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    config
}

/// One test, as the server takes long to start: each part has an index of its own.
#[tokio::test]
async fn documents_are_the_last_state_of_their_rows_whatever_comes_again_late_or_wrong() {
    let mut server = OpenSearch::start().await;
    a_document_appears_changes_and_goes(&server).await;
    what_comes_again_or_late_leaves_the_last_state(&server).await;
    a_refused_document_stands_alone(&server).await;
    an_update_of_the_key_moves_the_document(&server).await;
    a_column_that_was_not_sent_is_not_lost_in_silence(&server).await;
    a_message_is_a_document_too(&server).await;
    a_truncate_deletes_what_is_older(&server).await;
    an_index_that_may_not_be_created_is_named(&server).await;
    aggregates_equal_those_of_the_rows(&server).await;
    a_server_that_was_down_goes_on(&mut server).await;
}

async fn a_document_appears_changes_and_goes(server: &OpenSearch) {
    // FEATURES, row 35
    let mut sink = open(config(&server.url(), json!({}))).unwrap();
    delivers(&mut *sink, &changes([insert(1, "7", "ü \"quoted\"\n")])).await;
    let documents = server.documents("public.t").await;
    assert_eq!(documents, [("7".into(), json!({"id": 7, "v": "ü \"quoted\"\n"}))]);
    delivers(&mut *sink, &changes([update(2, "7", "b")])).await;
    assert_eq!(server.documents("public.t").await, [("7".into(), json!({"id": 7, "v": "b"}))]);
    delivers(&mut *sink, &changes([delete(3, "7")])).await;
    assert!(server.documents("public.t").await.is_empty());
    delivers(&mut *sink, &changes([delete(4, "7"), delete(5, "never there")])).await;
    delivers(&mut *sink, &Batch::default()).await;
    delivers(&mut *sink, &changes([truncate(6)])).await;
}

async fn what_comes_again_or_late_leaves_the_last_state(server: &OpenSearch) {
    let url = server.url();
    let mut sink = open(config(&url, json!({"kind": "elasticsearch", "index": "Again.{table}"})));
    let sink = &mut **sink.as_mut().unwrap();
    let all = changes([
        insert(10, "1", "a"),
        insert(11, "2", "a"),
        update(12, "1", "b"),
        delete(13, "2"),
        insert(14, "3", "a"),
    ]);
    let expected = [
        ("1".to_owned(), json!({"id": 1, "v": "b"})),
        ("3".to_owned(), json!({"id": 3, "v": "a"})),
    ];
    for _ in 0..2 {
        delivers(sink, &all).await;
        assert_eq!(server.documents("again.t").await, expected);
    }
    delivers(sink, &changes([insert(10, "1", "a"), insert(11, "2", "a")])).await;
    assert_eq!(server.documents("again.t").await, expected, "older than what is there");
    delivers(sink, &changes([update(12, "1", "edited")])).await;
    assert_eq!(server.documents("again.t").await[0].1["v"], "edited", "the same change again");
}

async fn a_refused_document_stands_alone(server: &OpenSearch) {
    let mapping = json!({"mappings": {"properties": {"v": {"type": "integer"}}}});
    server.ask("PUT", "numbers.t", &mapping).await;
    let mut sink = open(config(&server.url(), json!({"index": "numbers.{table}"}))).unwrap();
    let written = write(
        &mut *sink,
        &changes([insert(1, "1", "5"), insert(2, "2", "many"), insert(3, "3", "6")]),
    )
    .await
    .unwrap();
    assert_eq!(letters(&written), "drd");
    let walrace::sink::Written::Each(outcomes) = written else { unreachable!() };
    let walrace::sink::Outcome::Refused(error) = &outcomes[1] else { unreachable!() };
    assert_eq!(error.class(), Class::Data);
    assert!(error.to_string().contains("failed to parse field [v]"), "{error}");
    let ids: Vec<_> = server.documents("numbers.t").await.into_iter().map(|(id, _)| id).collect();
    assert_eq!(ids, ["1", "3"]);
}

async fn an_update_of_the_key_moves_the_document(server: &OpenSearch) {
    let mut sink = open(config(&server.url(), json!({"index": "moved"}))).unwrap();
    let mut moved = update(2, "2", "b");
    moved.before = Before::Key(Row::from_values([Value::Text(b"1"), Value::Null]));
    let both = changes([insert(1, "1", "a"), moved]);
    for _ in 0..2 {
        delivers(&mut *sink, &both).await;
        let documents = server.documents("moved").await;
        assert_eq!(documents, [("2".into(), json!({"id": 2, "v": "b"}))]);
    }
}

async fn a_column_that_was_not_sent_is_not_lost_in_silence(server: &OpenSearch) {
    let url = server.url();
    let mut sink = open(config(&url, json!({"index": "large"}))).unwrap();
    delivers(&mut *sink, &changes([insert(1, "1", "long")])).await;
    let mut lean = update(2, "1", "");
    lean.after = Some(Row::from_values([Value::Text(b"1"), Value::Unchanged]));
    let written = write(&mut *sink, &changes([lean.clone()])).await.unwrap();
    assert_eq!(letters(&written), "r");
    assert!(format!("{written:?}").contains("public.t REPLICA IDENTITY FULL"), "{written:?}");
    assert_eq!(server.documents("large").await[0].1["v"], "long");
    let mut whole = lean.clone();
    whole.before = Before::Full(row("1", "long"));
    delivers(&mut *sink, &changes([whole])).await;
    assert_eq!(server.documents("large").await[0].1["v"], "long");
    let mut sink = open(config(&url, json!({"index": "large", "unchanged": "omit"}))).unwrap();
    delivers(&mut *sink, &changes([lean])).await;
    assert_eq!(server.documents("large").await, [("1".into(), json!({"id": 1}))]);
}

async fn a_message_is_a_document_too(server: &OpenSearch) {
    let more = json!({"index": "messages", "document": "message"});
    let mut sink = open(config(&server.url(), more)).unwrap();
    let mut routed = insert(2, "2", "b");
    routed.shaped_mut().route = Some("Elsewhere".into());
    routed.shaped_mut().key = Some("chosen".into());
    delivers(&mut *sink, &changes([insert(1, "1", "a"), routed])).await;
    let documents = server.documents("messages").await;
    assert_eq!(documents.len(), 1);
    assert_eq!(documents[0].1["after"], json!({"id": 1, "v": "a"}));
    assert_eq!(documents[0].1["offset"], 1);
    assert_eq!(server.documents("elsewhere").await[0].0, "chosen");
}

async fn a_truncate_deletes_what_is_older(server: &OpenSearch) {
    let more = json!({"index": "emptied.{table}", "on_truncate": "delete"});
    let mut sink = open(config(&server.url(), more)).unwrap();
    let rows = |from: u64| (from..from + 1500).map(|n| insert(n, &n.to_string(), "a"));
    delivers(&mut *sink, &changes([truncate(0)])).await;
    delivers(&mut *sink, &changes(rows(1))).await;
    let all = changes([insert(1501, "1501", "a"), truncate(1502), insert(1503, "1", "new")]);
    let left = [("1".to_owned(), json!({"id": 1, "v": "new"}))];
    for _ in 0..2 {
        delivers(&mut *sink, &all).await;
        assert_eq!(server.documents("emptied.t").await, left);
    }
    delivers(&mut *sink, &changes([truncate(1502)])).await;
    assert_eq!(server.documents("emptied.t").await, left, "it is newer than the truncate");
    let shared = open(config(&server.url(), json!({"index": "all", "on_truncate": "delete"})));
    assert_eq!(shared.unwrap_err().class(), Class::Config);
}

async fn an_index_that_may_not_be_created_is_named(server: &OpenSearch) {
    let allow = |allowed: Json| json!({"persistent": {"action.auto_create_index": allowed}});
    server.ask("PUT", "_cluster/settings", &allow(json!("false"))).await;
    let mut sink = open(config(&server.url(), json!({"index": "closed"}))).unwrap();
    let error = fails(&mut *sink, &changes([insert(1, "1", "a")])).await;
    assert_eq!(error.class(), Class::Config);
    assert!(error.to_string().contains("closed"), "{error}");
    server.ask("PUT", "_cluster/settings", &allow(Json::Null)).await;
    delivers(&mut *sink, &changes([insert(1, "1", "a")])).await;
}

async fn aggregates_equal_those_of_the_rows(server: &OpenSearch) {
    // FEATURES, row 70
    let mapping = json!({"mappings": {"properties": {"v": {"type": "keyword"}}}});
    server.ask("PUT", "orders.t", &mapping).await;
    let mut sink = open(config(&server.url(), json!({"index": "orders.{table}"}))).unwrap();
    let city = |n: u64| ["Ulm", "Bonn", "Kiel"][usize::try_from(n % 3).unwrap()];
    let rows = (1..=1000).map(|n| insert(n, &n.to_string(), city(n)));
    delivers(&mut *sink, &changes(rows)).await;
    let later = (1..=100).map(|n| match n % 2 {
        0 => delete(1000 + n, &n.to_string()),
        _ => update(1000 + n, &n.to_string(), "Ulm"),
    });
    delivers(&mut *sink, &changes(later)).await;
    let mut expected = std::collections::BTreeMap::<&str, (u64, u64)>::new();
    for n in (1..=1000u64).filter(|n| *n > 100 || n % 2 == 1) {
        let (count, sum) = expected.entry(if n > 100 { city(n) } else { "Ulm" }).or_default();
        (*count, *sum) = (*count + 1, *sum + n);
    }
    server.ask("POST", "orders.t/_refresh", &Json::Null).await;
    let query = json!({"size": 0, "aggs": {"cities": {
        "terms": {"field": "v"}, "aggs": {"ids": {"sum": {"field": "id"}}},
    }}});
    let found = server.ask("POST", "orders.t/_search", &query).await;
    let buckets = found["aggregations"]["cities"]["buckets"].as_array().unwrap();
    assert_eq!(buckets.len(), expected.len());
    for bucket in buckets {
        let (count, sum) = expected[bucket["key"].as_str().unwrap()];
        assert_eq!(bucket["doc_count"], count);
        assert_eq!(bucket["ids"]["value"].as_f64(), Some(sum as f64));
    }
}

async fn a_server_that_was_down_goes_on(server: &mut OpenSearch) {
    let mut sink =
        open(config(&server.url(), json!({"index": "down", "timeout_ms": 5000}))).unwrap();
    delivers(&mut *sink, &changes([insert(1, "1", "a")])).await;
    server.down();
    let error = fails(&mut *sink, &changes([insert(2, "2", "a")])).await;
    assert_eq!(error.class(), Class::Retry, "{error}");
    server.up().await;
    sink.open().await.unwrap();
    delivers(&mut *sink, &changes([insert(2, "2", "a")])).await;
    assert_eq!(server.documents("down").await.len(), 2);
}

#[tokio::test]
async fn a_login_is_sent_and_a_refused_one_is_for_a_person() {
    let receiver = Receiver::start().await;
    let url = receiver.url("");
    for (login, header) in [
        (json!({"username": "w", "password": "hunter22"}), "Basic dzpodW50ZXIyMg=="),
        (json!({"api_key": "hunter22"}), "ApiKey hunter22"),
        (json!({"bearer": "hunter22"}), "Bearer hunter22"),
    ] {
        receiver.requests();
        receiver.will_answer(401, "{\"error\":\"hunter22 is wrong\"}");
        let mut sink = open(config(&url, login)).unwrap();
        let error = fails(&mut *sink, &batch(0..1)).await;
        assert_eq!(error.class(), Class::Config);
        assert!(!error.to_string().contains("hunter22"), "{error}");
        let requests = receiver.requests();
        assert_eq!(requests[0].header("authorization"), header);
        assert_eq!(requests[0].header("content-type"), "application/x-ndjson");
        assert!(requests[0].path.starts_with("/_bulk"), "{}", requests[0].path);
    }
    for wrong in [
        json!({"username": "w"}),
        json!({"api_key": "a", "bearer": "b"}),
        json!({"index": "{tabel}"}),
        json!({"tls_ca": "/nowhere.pem"}),
    ] {
        assert_eq!(open(config(&url, wrong)).unwrap_err().class(), Class::Config);
    }
}

#[tokio::test]
async fn a_reply_of_the_whole_request_has_the_class_of_its_status() {
    let receiver = Receiver::start().await;
    let mut sink = open(config(&receiver.url(""), json!({"timeout_ms": 300}))).unwrap();
    for (status, class) in
        [(413, Class::Data), (429, Class::Retry), (503, Class::Retry), (403, Class::Config)]
    {
        receiver.will_answer(status, "");
        assert_eq!(fails(&mut *sink, &batch(0..2)).await.class(), class, "{status}");
    }
    receiver.will_answer(200, "<html>");
    assert_eq!(fails(&mut *sink, &batch(0..2)).await.class(), Class::Config);
    let busy = json!({"index": {"status": 429, "error": {"type": "rejected", "reason": "full"}}});
    receiver.will_answer(200, &json!({"items": [busy, busy]}).to_string());
    let error = fails(&mut *sink, &batch(0..2)).await;
    assert_eq!(error.class(), Class::Retry);
    assert!(error.to_string().contains("full"), "{error}");
    let good = json!({"index": {"status": 200}});
    receiver.will_answer(200, &json!({"items": [good, busy]}).to_string());
    assert_eq!(letters(&write(&mut *sink, &batch(0..2)).await.unwrap()), "du");
}

#[tokio::test]
async fn changes_of_a_table_without_a_key_can_only_be_added() {
    let receiver = Receiver::start().await;
    let mut sink = open(config(&receiver.url(""), json!({}))).unwrap();
    let bare = |mut change: Change| {
        let mut table = (**change.table.as_ref().unwrap()).clone();
        table.identity = Identity::Full;
        table.columns.iter_mut().for_each(|column| column.primary_key = false);
        change.table = Some(Arc::new(table));
        change
    };
    let good = json!({"items": [{"index": {"status": 201}}]});
    receiver.will_answer(200, &good.to_string());
    let added = bare(insert(1, "1", "a"));
    let both = changes([added.clone(), bare(update(2, "1", "b")), bare(delete(3, "1"))]);
    assert_eq!(letters(&write(&mut *sink, &both).await.unwrap()), "drr");
    let body = String::from_utf8(receiver.requests()[0].body.to_vec()).unwrap();
    assert!(body.contains(&added.idempotency_key()), "{body}");
}

#[tokio::test]
async fn the_opensearch_sink_conforms() {
    conforms(&mut OpenSearchTarget::new().await).await;
}
