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

use super::{batch, conformance::conforms, delivers, fails, open, target::Target, write};
use crate::kit::{Cluster, Proxy, Setup, Stop, wait_for};

mod rows;

/// A second PostgreSQL, whose tables the sink creates.
pub(crate) struct Postgres {
    cluster: Cluster,
    /// `block` keeps transactions whole; `park` refuses single changes.
    on_refusal: &'static str,
}

impl Postgres {
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

    fn failpoints(&self) -> &'static [&'static str] {
        &["postgres::before_commit:3", "postgres::after_commit:2"]
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
            backfill: None,
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
async fn sslmode_says_how_far_the_certificate_is_checked() {
    let (cluster, scratch, url) = crate::source_login::with_tls("DNS:db.example").await;
    cluster.sql("grant create on database postgres to app").await;
    let try_open = async |mode: &str, more: Json| {
        let mut config = json!({"kind": "postgres", "url": format!("{url}{mode}")});
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        open(config).unwrap().open().await
    };
    for mode in ["verify-ca", "require", "prefer"] {
        assert_eq!(try_open(mode, json!({})).await.unwrap(), None, "{mode}");
    }
    let error = try_open("verify-full", json!({})).await.unwrap_err();
    assert_eq!(error.class(), Class::Config, "another name: {error}");
    let plain = try_open("disable", json!({})).await.unwrap_err();
    assert_eq!(plain.class(), Class::Config, "{plain}");
    let missing = json!({"tls_ca": scratch.path().join("none.pem")});
    let bare = url.split('?').next().unwrap();
    let mut config = json!({"kind": "postgres", "url": format!("{bare}?sslmode=verify-ca")});
    config.as_object_mut().unwrap().extend(missing.as_object().unwrap().clone());
    let error = open(config).unwrap().open().await.unwrap_err();
    assert!(error.to_string().contains("none.pem"), "{error}");
}

#[tokio::test]
async fn the_postgres_sink_conforms_with_whole_transactions_and_with_parking() {
    for on_refusal in ["block", "park"] {
        conforms(&mut Postgres::start(on_refusal).await).await;
    }
}
