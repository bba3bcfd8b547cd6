//! The `postgres` sink against a second PostgreSQL: rows, transactions, refusals, and the whole
//! binary between two servers.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use serde_json::{Value as Json, json};
use uuid::Uuid;
use walrace::{
    change::{Batch, Before, Change, Lsn, Op, Row, Timestamp, Transaction, Value},
    error::Class,
    schema::{Column, Identity, Table, Type},
    sink::{Progress, Sink, Written},
};

use super::{batch, delivers, fails, open, target::Target, truncate, write};
use crate::kit::{Cluster, Proxy, Setup, Stop, wait_for};

/// A second PostgreSQL, whose tables the sink creates.
pub(crate) struct Postgres {
    cluster: Cluster,
    /// `block` keeps transactions whole; `park` refuses single changes.
    on_refusal: &'static str,
}

impl Postgres {
    #[expect(dead_code, reason = "the conformance suite starts it")]
    pub(crate) async fn start(on_refusal: &'static str) -> Self {
        Self { cluster: Cluster::start().await, on_refusal }
    }
}

#[async_trait]
impl Target for Postgres {
    fn config(&self) -> Json {
        config(&self.cluster, json!({"missing_table": "create", "on_refusal": self.on_refusal}))
    }

    fn wrong_login(&self) -> Option<Json> {
        let url = self.cluster.url().replace("postgres@", "nobody:wrong@");
        Some(json!({"kind": "postgres", "url": url}))
    }

    async fn stop(&mut self) {
        self.cluster.down(Stop::Kill);
    }

    async fn start(&mut self) {
        // What the kit waits with is not `Send`, as this future must be: it gets its own thread.
        let cluster = &mut self.cluster;
        let up = || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.unwrap().block_on(cluster.up());
        };
        std::thread::scope(|scope| scope.spawn(up).join()).unwrap();
    }

    async fn content(&mut self) -> Vec<Json> {
        let tables = "select format('%I.%I', schemaname, tablename) as name from pg_tables \
                      where schemaname not in ('pg_catalog', 'information_schema', 'walrace') \
                      order by 1";
        let mut content = Vec::new();
        for table in self.cluster.rows(tables).await {
            let name = table["name"].as_str().unwrap();
            for row in self.cluster.rows(&format!("select * from {name} order by 1")).await {
                content.push(json!({"table": name, "row": row}));
            }
        }
        content
    }

    fn refused(&self, mut change: Change) -> Option<Change> {
        if self.on_refusal == "block" {
            return None; // a refusal stops the sink
        }
        change.after = Some(row(&[Some("no number"), Some("x")]));
        Some(change)
    }
}

#[expect(clippy::needless_pass_by_value, reason = "every caller makes it in place")]
fn config(cluster: &Cluster, more: Json) -> Json {
    let mut config = json!({"kind": "postgres", "url": cluster.url()});
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    config
}

async fn opened(cluster: &Cluster, more: Json) -> Box<dyn Sink> {
    let mut sink = open(config(cluster, more)).unwrap();
    assert_eq!(sink.open().await.unwrap(), None);
    sink
}

fn row(texts: &[Option<&str>]) -> Row {
    Row::from_values(texts.iter().map(|text| match text {
        Some("?") => Value::Unchanged,
        Some(text) => Value::Text(text.as_bytes()),
        None => Value::Null,
    }))
}

/// A table of these columns with their types; a `*` marks the key.
fn table(identity: Identity, name: &str, columns: &[(&str, u32)]) -> Arc<Table> {
    let column = |&(name, oid): &(&str, u32)| {
        let key = name.ends_with('*');
        Column {
            name: name.trim_end_matches('*').into(),
            ty: Type::base(oid, -1),
            primary_key: key,
            identity: key || identity == Identity::Full,
            nullable: None,
        }
    };
    let columns = columns.iter().map(column).collect();
    Arc::new(Table { oid: 7, schema: "public".into(), name: name.into(), identity, columns })
}

/// The changes of one table, in transactions of the test's making.
struct Story {
    table: Arc<Table>,
    changes: Vec<Change>,
    next: u64,
    xid: u32,
}

impl Story {
    fn of(table: Arc<Table>) -> Self {
        Self { table, changes: Vec::new(), next: 1, xid: 1 }
    }

    /// `(id, v, w)` with the key `id`.
    fn keyed() -> Self {
        Self::of(table(Identity::Default, "t", &[("id*", 20), ("v", 25), ("w", 25)]))
    }

    fn add(&mut self, op: Op, before: Before, after: Option<Row>) -> &mut Self {
        let lsn = Lsn(u64::from(self.xid) * 100);
        let commit_time = Timestamp(1_775_466_862_000_123);
        self.changes.push(Change {
            offset: self.next,
            op,
            index: 0,
            closes_transaction: false,
            transaction: Transaction { xid: self.xid, commit_lsn: lsn, commit_time },
            table: Some(Arc::clone(&self.table)),
            before,
            after,
            message: None,
            shaped: None,
        });
        self.next += 1;
        self
    }

    fn insert(&mut self, texts: &[Option<&str>]) -> &mut Self {
        self.add(Op::Insert, Before::Nothing, Some(row(texts)))
    }

    fn update(&mut self, texts: &[Option<&str>]) -> &mut Self {
        self.add(Op::Update, Before::Nothing, Some(row(texts)))
    }

    /// The key changes from `old` to that of the row.
    fn rekey(&mut self, old: &str, texts: &[Option<&str>]) -> &mut Self {
        self.add(Op::Update, Before::Key(row(&[Some(old), None, None])), Some(row(texts)))
    }

    fn delete(&mut self, old: &str) -> &mut Self {
        self.add(Op::Delete, Before::Key(row(&[Some(old), None, None])), None)
    }

    fn truncate(&mut self) -> &mut Self {
        self.add(Op::Truncate, Before::Nothing, None)
    }

    fn end(&mut self) -> &mut Self {
        if let Some(last) = self.changes.last_mut() {
            last.closes_transaction = true;
        }
        self.xid += 1;
        self
    }

    /// What was told since the last call.
    fn batch(&mut self) -> Batch {
        Batch { changes: std::mem::take(&mut self.changes), position: None }
    }
}

const CREATE: &str = "create table t (id bigint primary key, v text, w text)";

fn progress(cursor: u64) -> Progress {
    Progress { lineage: Uuid::from_u128(7), epoch: 1, cursor, retry_seq: 0 }
}

async fn rows(cluster: &Cluster) -> Json {
    Json::Array(cluster.rows("select * from t order by 1").await)
}

async fn until(sink: &mut dyn Sink, batch: &Batch) -> u64 {
    match write(sink, batch).await {
        Ok(Written::Until(offset)) => offset,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_batch_comes_with_its_progress_and_changes_nothing_when_it_comes_again() {
    let cluster = Cluster::start().await;
    let mut sink = opened(&cluster, json!({"missing_table": "create"})).await;
    assert!(sink.capabilities().transactional_progress && sink.capabilities().atomic);
    delivers(&mut *sink, &batch(1..301)).await; // by COPY
    assert_eq!(cluster.value("select count(*) from t where v = 'ü \"quoted\"'").await, 300);
    assert_eq!(sink.peek().await.unwrap(), Some(progress(301)));
    delivers(&mut *sink, &batch(1..301)).await;
    assert_eq!(cluster.value("select count(*) from t").await, 300);
    delivers(&mut *sink, &batch(301..303)).await;
    assert_eq!(sink.open().await.unwrap(), Some(progress(303)));
    let kept = cluster.rows("select sink, epoch, cursor, retry_seq from walrace.progress").await;
    assert_eq!(kept, [json!({"sink": "hook", "epoch": 1, "cursor": 303, "retry_seq": 0})]);
    sink.close().await.unwrap();
}

#[tokio::test]
async fn an_empty_batch_and_a_retry_store_the_progress_too() {
    let cluster = Cluster::start().await;
    let mut sink = opened(&cluster, json!({})).await;
    let empty = Batch::default();
    assert!(matches!(sink.write(&empty, &progress(40)).await, Ok(Written::All)));
    assert_eq!(sink.peek().await.unwrap(), Some(progress(40)));
    let retried = Progress { retry_seq: 3, ..progress(40) };
    assert!(matches!(sink.write(&empty, &retried).await, Ok(Written::All)));
    assert_eq!(sink.open().await.unwrap(), Some(retried));
    let rewound = Progress { epoch: 2, cursor: 5, ..retried };
    assert!(matches!(sink.write(&empty, &rewound).await, Ok(Written::All)));
    let error = sink.write(&empty, &retried).await.unwrap_err();
    assert_eq!(error.class(), Class::Retry, "an epoch never goes back: {error}");
    assert_eq!(sink.open().await.unwrap(), Some(rewound));
}

#[tokio::test]
async fn a_transaction_is_seen_whole_or_not_at_all() {
    let settings = "track_commit_timestamp = on".to_owned();
    let cluster = Cluster::with(Setup { settings, ..Setup::default() }).await;
    cluster.sql(CREATE).await;
    let mut sink = opened(&cluster, json!({})).await;
    let mut story = Story::keyed();
    let first = story.insert(&[Some("1"), None, None]).end().batch();
    delivers(&mut *sink, &first).await;
    // A whole one, and the begin of another.
    story.insert(&[Some("2"), None, None]).end().insert(&[Some("3"), None, None]);
    assert_eq!(until(&mut *sink, &story.batch()).await, 3);
    assert_eq!(cluster.value("select count(*) from t").await, 2);
    assert_eq!(sink.peek().await.unwrap(), Some(progress(3)));
    let more = story.insert(&[Some("4"), None, None]).batch();
    assert_eq!(until(&mut *sink, &more).await, 3);
    assert_eq!(cluster.value("select count(*) from t").await, 2);
    let end = story.update(&[Some("3"), Some("x"), None]).end().batch();
    delivers(&mut *sink, &end).await;
    // Rows of one transaction have one commit, though each write of it may have its savepoint.
    let commits = "select count(distinct pg_xact_commit_timestamp(xmin)) from t where id";
    assert_eq!(cluster.value(&format!("{commits} in (3, 4)")).await, 1);
    assert_eq!(cluster.value(&format!("{commits} in (1, 4)")).await, 2);
    // One whose end was filtered out: an empty batch ends it, or the begin of the next.
    let open = story.insert(&[Some("5"), None, None]).batch();
    assert_eq!(until(&mut *sink, &open).await, 6);
    assert!(matches!(sink.write(&Batch::default(), &progress(7)).await, Ok(Written::All)));
    assert_eq!(cluster.value("select count(*) from t").await, 5);
    story.end().insert(&[Some("6"), None, None]);
    assert_eq!(until(&mut *sink, &story.batch()).await, 7);
    story.end().insert(&[Some("7"), None, None]);
    assert_eq!(until(&mut *sink, &story.batch()).await, 8);
    assert_eq!(cluster.value("select max(id) from t").await, 6);
    // What was open goes with the connection.
    assert_eq!(sink.open().await.unwrap(), Some(progress(8)));
    assert_eq!(cluster.value("select max(id) from t").await, 6);
}

#[tokio::test]
async fn the_first_transaction_may_be_open_and_its_begin_is_what_the_target_holds() {
    let cluster = Cluster::start().await;
    cluster.sql(CREATE).await;
    let mut sink = opened(&cluster, json!({})).await;
    let mut story = Story::keyed();
    let begin = story.insert(&[Some("1"), None, None]).batch();
    assert_eq!(until(&mut *sink, &begin).await, 1);
    assert_eq!(sink.peek().await.unwrap(), Some(progress(1)));
    assert_eq!(rows(&cluster).await, json!([]));
}

#[tokio::test]
async fn a_second_walrace_with_the_same_sink_writes_nothing() {
    let cluster = Cluster::start().await;
    let mut old = opened(&cluster, json!({"missing_table": "create"})).await;
    delivers(&mut *old, &batch(1..3)).await;
    let mut new = open(config(&cluster, json!({"missing_table": "create"}))).unwrap();
    assert_eq!(new.open().await.unwrap(), Some(progress(3)));
    delivers(&mut *new, &batch(3..5)).await;
    let error = fails(&mut *old, &batch(3..9)).await;
    assert_eq!(error.class(), Class::Retry, "{error}");
    assert!(error.to_string().contains("another walrace"), "{error}");
    assert_eq!(cluster.value("select count(*) from t").await, 4);
    assert_eq!(old.open().await.unwrap(), Some(progress(5)));
    delivers(&mut *old, &batch(5..6)).await;
    assert_eq!(fails(&mut *new, &Batch::default()).await.class(), Class::Retry);
}

#[tokio::test]
async fn a_wrong_login_database_or_right_is_for_a_person() {
    let cluster = Cluster::start().await;
    cluster.sql("create role app login password 'right'").await;
    cluster.set_hba("host all all 127.0.0.1/32 scram-sha-256");
    cluster.reload().await;
    let port = cluster.port();
    for (url, says) in [
        (format!("postgres://app:hunter2@127.0.0.1:{port}/postgres"), "password"),
        (format!("postgres://app@127.0.0.1:{port}/postgres"), "password"),
        (format!("postgres://app:right@127.0.0.1:{port}/none"), "3D000"),
        (format!("postgres://app:right@127.0.0.1:{port}/postgres?sslmode=require"), "TLS"),
        (format!("postgres://app:right@127.0.0.1:{port}/postgres"), "grant"),
    ] {
        let mut sink = open(json!({"kind": "postgres", "url": url})).unwrap();
        let error = sink.open().await.unwrap_err();
        assert_eq!(error.class(), Class::Config, "{error}");
        let text = error.to_string();
        assert!(text.contains(says) && !text.contains("hunter2"), "{text}");
    }
}

#[tokio::test]
async fn a_server_that_is_down_or_hangs_is_an_outage_and_the_sink_goes_on_after_it() {
    let mut cluster = Cluster::start().await;
    let link = Proxy::to(cluster.port()).await;
    let url = cluster.url_at(link.port());
    let config = json!({"kind": "postgres", "url": url, "missing_table": "create",
                        "timeout_ms": 1500});
    let mut sink = open(config).unwrap();
    sink.open().await.unwrap();
    delivers(&mut *sink, &batch(1..3)).await;
    cluster.down(Stop::Kill);
    assert_eq!(fails(&mut *sink, &batch(3..5)).await.class(), Class::Retry);
    assert_eq!(sink.open().await.unwrap_err().class(), Class::Retry);
    cluster.up().await;
    assert_eq!(sink.open().await.unwrap(), Some(progress(3)));
    delivers(&mut *sink, &batch(3..5)).await;
    link.stall(true);
    assert_eq!(fails(&mut *sink, &batch(5..7)).await.class(), Class::Retry);
    assert_eq!(sink.open().await.unwrap_err().class(), Class::Retry);
    link.stall(false);
    let again = async || sink_opens(&mut *sink).await;
    wait_for(Duration::from_secs(20), again, || "the sink does not come back".into()).await;
    delivers(&mut *sink, &batch(5..7)).await;
    let blocker = cluster.connect().await;
    blocker.batch_execute("begin; lock table t").await.unwrap();
    let error = fails(&mut *sink, &batch(7..9)).await;
    assert_eq!(error.class(), Class::Retry, "a lock that is not let go: {error}");
    blocker.batch_execute("rollback").await.unwrap();
    assert_eq!(sink.open().await.unwrap(), Some(progress(7)));
    delivers(&mut *sink, &batch(7..9)).await;
    assert_eq!(cluster.value("select count(*) from t").await, 8);
}

async fn sink_opens(sink: &mut dyn Sink) -> Option<()> {
    sink.open().await.ok().map(|_| ())
}

#[tokio::test]
async fn rows_follow_inserts_updates_deletes_and_changes_of_their_key() {
    let cluster = Cluster::start().await;
    cluster.sql(&format!("{CREATE}; insert into t values (9, 'stale', 'stale')")).await;
    let mut sink = opened(&cluster, json!({})).await;
    let mut story = Story::keyed();
    for id in ["1", "2", "3", "4", "9"] {
        story.insert(&[Some(id), Some("a"), Some("long")]);
    }
    story.end();
    delivers(&mut *sink, &story.batch()).await;
    // Within one run: changes of one key, values that were not sent, a row that goes and returns.
    story.update(&[Some("1"), Some("b"), Some("?")]).update(&[Some("1"), Some("c"), Some("?")]);
    story.update(&[Some("2"), None, Some("?")]).delete("3").delete("9");
    story.insert(&[Some("3"), Some("new"), None]);
    story.insert(&[Some("5"), Some("x"), Some("y")]).update(&[Some("5"), Some("z"), Some("?")]);
    story.insert(&[Some("6"), None, None]).delete("6").end();
    delivers(&mut *sink, &story.batch()).await;
    let expected = json!([
        {"id": 1, "v": "c", "w": "long"}, {"id": 2, "v": null, "w": "long"},
        {"id": 3, "v": "new", "w": null}, {"id": 4, "v": "a", "w": "long"},
        {"id": 5, "v": "z", "w": "y"},
    ]);
    assert_eq!(rows(&cluster).await, expected);
    // Keys 1 and 2 change places, with a value that is not sent; 4 moves over a stale row.
    cluster.sql("insert into t values (40, 'stale', 'stale')").await;
    story.rekey("1", &[Some("-1"), Some("c"), Some("?")]);
    story.rekey("2", &[Some("1"), None, Some("?")]);
    story.rekey("-1", &[Some("2"), Some("c"), Some("?")]);
    story.rekey("4", &[Some("40"), Some("moved"), Some("?")]).end();
    let moves = story.batch();
    delivers(&mut *sink, &moves).await;
    let expected = json!([
        {"id": 1, "v": null, "w": "long"}, {"id": 2, "v": "c", "w": "long"},
        {"id": 3, "v": "new", "w": null}, {"id": 5, "v": "z", "w": "y"},
        {"id": 40, "v": "moved", "w": "long"},
    ]);
    assert_eq!(rows(&cluster).await, expected);
    story.truncate().insert(&[Some("1"), None, None]).end();
    delivers(&mut *sink, &story.batch()).await;
    assert_eq!(rows(&cluster).await, json!([{"id": 1, "v": null, "w": null}]));
}

#[tokio::test]
async fn new_rows_that_are_there_already_get_the_new_values() {
    let cluster = Cluster::start().await;
    let stale = "insert into t select i, 'stale', 'stale' from generate_series(50, 60) i";
    cluster.sql(&format!("{CREATE}; {stale}")).await;
    let mut sink = opened(&cluster, json!({})).await;
    let mut story = Story::keyed();
    for _ in 0..2 {
        story.insert(&[Some("1000"), None, None]).end();
        for id in 0..300 {
            story.insert(&[Some(&id.to_string()), Some("new\t\\N"), Some("\n")]);
        }
        // The begin of a transaction comes before its rest, which meets them.
        let (open, rest) = (story.batch(), story.update(&[Some("7"), None, None]).end().batch());
        until(&mut *sink, &open).await;
        delivers(&mut *sink, &rest).await;
        let new = "select count(*) from t where v = E'new\\t\\\\N' and w = E'\\n'";
        assert_eq!(cluster.value(new).await, 299);
        assert_eq!(cluster.value("select count(*) from t").await, 301);
        cluster.sql("update t set v = 'stale'").await;
    }
}

#[tokio::test]
async fn a_value_that_was_not_sent_for_a_row_that_is_missing_is_never_made_up() {
    let cluster = Cluster::start().await;
    cluster.sql(CREATE).await;
    let mut sink = opened(&cluster, json!({"on_refusal": "park"})).await;
    let mut story = Story::keyed();
    story.update(&[Some("1"), Some("b"), Some("?")]).end();
    let error = fails(&mut *sink, &story.batch()).await;
    assert_eq!(error.class(), Class::Data, "{error}");
    assert!(error.to_string().contains("lacks a row"), "{error}");
    assert_eq!(rows(&cluster).await, json!([]));
}

#[tokio::test]
async fn a_refused_row_is_named_and_its_transaction_waits_until_it_is_mended() {
    let cluster = Cluster::start().await;
    cluster.sql("create table t (id bigint primary key, v varchar(3), w text)").await;
    let mut sink = opened(&cluster, json!({})).await;
    let mut story = Story::keyed();
    for id in 0..200 {
        let v = if id == 77 { "too long" } else { "ok" };
        story.insert(&[Some(&id.to_string()), Some(v), None]);
    }
    let batch = story.end().batch();
    let error = fails(&mut *sink, &batch).await;
    assert_eq!(error.class(), Class::Config);
    let text = error.to_string();
    for says in ["public.t", "id=77", "22001", "on_refusal = \"park\"", "walrace sink skip"] {
        assert!(text.contains(says), "{says} in {text}");
    }
    assert_eq!(rows(&cluster).await, json!([]));
    cluster.sql("alter table t alter v type text").await;
    assert_eq!(sink.open().await.unwrap(), None);
    delivers(&mut *sink, &batch).await;
    assert_eq!(cluster.value("select count(*) from t").await, 200);
}

#[tokio::test]
async fn with_park_the_refused_change_stands_alone_and_the_others_pass() {
    let cluster = Cluster::start().await;
    cluster.sql("create table t (id bigint primary key, v varchar(3), w text)").await;
    let mut sink = opened(&cluster, json!({"on_refusal": "park"})).await;
    assert!(!sink.capabilities().atomic);
    let mut story = Story::keyed();
    story.insert(&[Some("1"), Some("ok"), None]).insert(&[Some("2"), Some("too long"), None]);
    story.insert(&[Some("3"), Some("ok"), None]).end();
    let whole = story.batch();
    assert_eq!(fails(&mut *sink, &whole).await.class(), Class::Data);
    let single = |at: usize| Batch { changes: vec![whole.changes[at].clone()], position: None };
    delivers(&mut *sink, &single(0)).await; // without another `open`, as the pipeline does
    assert_eq!(fails(&mut *sink, &single(1)).await.class(), Class::Data);
    delivers(&mut *sink, &single(2)).await;
    assert_eq!(cluster.value("select array_agg(id order by id) from t").await, json!([1, 3]));
}

#[tokio::test]
async fn what_only_its_grouping_breaks_is_written_row_by_row() {
    let cluster = Cluster::start().await;
    cluster.sql("create table t (id bigint primary key, v text unique, w text)").await;
    let mut sink = opened(&cluster, json!({})).await;
    let mut story = Story::keyed();
    story.insert(&[Some("1"), Some("a"), None]).insert(&[Some("2"), Some("b"), None]).end();
    delivers(&mut *sink, &story.batch()).await;
    // 2 gives `b` up before 1 takes it; as one statement, 1 would take it first.
    story.update(&[Some("1"), Some("x"), None]).update(&[Some("2"), Some("y"), None]);
    story.update(&[Some("1"), Some("b"), None]).end();
    delivers(&mut *sink, &story.batch()).await;
    let expected = json!([{"id": 1, "v": "b", "w": null}, {"id": 2, "v": "y", "w": null}]);
    assert_eq!(rows(&cluster).await, expected);
}

#[tokio::test]
async fn a_missing_table_or_column_is_refused_ignored_or_made() {
    let cluster = Cluster::start().await;
    let mut sink = opened(&cluster, json!({})).await;
    let mut story = Story::keyed();
    let batch = story.insert(&[Some("1"), Some("a"), Some("b")]).end().batch();
    let error = fails(&mut *sink, &batch).await;
    assert_eq!(error.class(), Class::Config);
    let create = "create table \"public\".\"t\" (\"id\" bigint, \"v\" text, \"w\" text, \
                  primary key (\"id\"))";
    assert!(error.to_string().contains(create), "{error}");
    cluster.sql("create table t (id bigint, v text, own text default 'mine')").await;
    sink.open().await.unwrap();
    let error = fails(&mut *sink, &batch).await.to_string();
    assert!(error.contains("alter table \"public\".\"t\" add column \"w\" text"), "{error}");
    cluster.sql("alter table t add column w text").await;
    sink.open().await.unwrap();
    let error = fails(&mut *sink, &batch).await.to_string();
    assert!(error.contains("alter table \"public\".\"t\" add primary key (\"id\")"), "{error}");
    cluster.sql("alter table t add primary key (id)").await;
    sink.open().await.unwrap();
    delivers(&mut *sink, &batch).await;
    let mine = json!([{"id": 1, "v": "a", "own": "mine", "w": "b"}]);
    assert_eq!(rows(&cluster).await, mine);

    cluster.sql("alter table t drop column w; truncate t; truncate walrace.progress").await;
    let mut sink = opened(&cluster, json!({"missing_columns": "ignore"})).await;
    delivers(&mut *sink, &batch).await;
    assert_eq!(rows(&cluster).await, json!([{"id": 1, "v": "a", "own": "mine"}]));
    cluster.sql("truncate t; truncate walrace.progress").await;
    let mut sink = opened(&cluster, json!({"missing_columns": "add"})).await;
    delivers(&mut *sink, &batch).await;
    assert_eq!(rows(&cluster).await, mine);
}

#[tokio::test]
async fn a_table_without_a_key_is_matched_by_all_of_its_values() {
    let cluster = Cluster::start().await;
    cluster.sql("create table t (a int, b json, c numeric(6,2))").await;
    let mut sink = opened(&cluster, json!({})).await;
    let columns = [("a", 23), ("b", 114), ("c", 1700)];
    let mut story = Story::of(table(Identity::Full, "t", &columns));
    let (one, two) = ([Some("1"), Some("{\"x\":1}"), None], [Some("2"), None, Some("1.50")]);
    for _ in 0..3 {
        story.insert(&one).insert(&two);
    }
    story.end();
    delivers(&mut *sink, &story.batch()).await;
    let full = |texts: &[Option<&str>]| Before::Full(row(texts));
    story.add(Op::Delete, full(&one), None);
    story.add(Op::Update, full(&two), Some(row(&[Some("3"), None, Some("1.50")])));
    story.add(Op::Update, full(&[Some("8"), None, None]), Some(row(&[Some("9"), None, None])));
    story.end();
    delivers(&mut *sink, &story.batch()).await;
    let counts = "select json_object_agg(a, n) from (select a, count(*) n from t group by a) s";
    assert_eq!(cluster.value(counts).await, json!({"1": 2, "2": 2, "3": 1, "9": 1}));
}

#[tokio::test]
async fn generated_columns_identities_and_references_of_the_target_are_kept() {
    let cluster = Cluster::start().await;
    cluster
        .sql(
            "create table t (id bigint generated always as identity primary key, v text, \
             w text generated always as (upper(v)) stored); \
             create table child (id bigint primary key, of bigint references t on delete cascade)",
        )
        .await;
    let mut sink = opened(&cluster, json!({})).await;
    let mut parents = Story::keyed();
    let mut children = Story::of(table(Identity::Default, "child", &[("id*", 20), ("of", 20)]));
    let mut mixed = Vec::new();
    for id in ["1", "2", "3"] {
        mixed.extend(parents.insert(&[Some(id), Some("a"), Some("A")]).batch().changes);
        mixed.extend(children.insert(&[Some(id), Some(id)]).batch().changes);
    }
    // The child leaves its parent before that goes: the cascade must not take it along.
    mixed.extend(children.update(&[Some("2"), Some("1")]).batch().changes);
    mixed.extend(parents.delete("2").batch().changes);
    mixed.extend(parents.update(&[Some("1"), Some("b"), Some("B")]).batch().changes);
    mixed.extend(parents.rekey("3", &[Some("4"), Some("c"), Some("C")]).batch().changes);
    for (offset, change) in mixed.iter_mut().enumerate() {
        change.offset = offset as u64 + 1;
    }
    mixed.last_mut().unwrap().closes_transaction = true;
    delivers(&mut *sink, &Batch { changes: mixed, position: None }).await;
    let expected = json!([{"id": 1, "v": "b", "w": "B"}, {"id": 4, "v": "c", "w": "C"}]);
    assert_eq!(rows(&cluster).await, expected);
    let children = cluster.value("select json_object_agg(id, of) from child").await;
    assert_eq!(children, json!({"1": 1, "2": 1}));
}

#[tokio::test]
async fn tables_that_were_truncated_together_are_truncated_together() {
    let cluster = Cluster::start().await;
    cluster
        .sql(&format!(
            "{CREATE}; create table child (id bigint primary key references t);
                      insert into t values (1); insert into child values (1)"
        ))
        .await;
    let mut sink = opened(&cluster, json!({})).await;
    let mut story = Story::keyed();
    let child = Story::of(table(Identity::Default, "child", &[("id*", 20)])).truncate().batch();
    let mut both = story.truncate().end().batch();
    both.changes.insert(0, child.changes[0].clone());
    delivers(&mut *sink, &both).await;
    assert_eq!(rows(&cluster).await, json!([]));
    cluster.sql("insert into t values (1); truncate walrace.progress").await;
    let mut sink = opened(&cluster, json!({"on_truncate": "ignore"})).await;
    delivers(&mut *sink, &Batch { changes: vec![truncate(1)], position: None }).await;
    assert_eq!(cluster.value("select count(*) from t").await, 1);
}

#[tokio::test]
async fn a_template_or_a_route_chooses_the_table() {
    let cluster = Cluster::start().await;
    let more = json!({"missing_table": "create", "table": "replica.{schema}_{table}"});
    let mut sink = opened(&cluster, more).await;
    let mut changes = batch(1..4).changes;
    changes[1].shaped_mut().route = Some("other.Odd \"name\"".into());
    delivers(&mut *sink, &Batch { changes, position: None }).await;
    assert_eq!(cluster.value("select count(*) from replica.public_t").await, 2);
    assert_eq!(cluster.value("select count(*) from other.\"Odd \"\"name\"\"\"").await, 1);
    for wrong in [json!({"table": "a.{colour}"}), json!({"progress_table": "plain"})] {
        let error = open(config(&cluster, wrong)).unwrap_err();
        assert_eq!(error.class(), Class::Config, "{error}");
    }
}
