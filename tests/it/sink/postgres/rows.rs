//! What becomes of rows: changes of every sort, refusals, and what the target lacks.

use serde_json::json;
use walrace::{
    change::{Batch, Before, Op},
    error::Class,
    schema::Identity,
};

use super::{
    super::{batch, delivers, fails, open, truncate},
    CREATE, Story, config, opened, progress, row, rows, table, until,
};
use crate::kit::Cluster;

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

#[tokio::test]
async fn a_column_that_the_source_adds_is_added_within_its_transaction() {
    let cluster = Cluster::start().await;
    cluster.sql("create table t (id bigint primary key, v text)").await;
    let mut sink = opened(&cluster, json!({"missing_columns": "add"})).await;
    let mut story = Story::of(table(Identity::Default, "t", &[("id*", 20), ("v", 25)]));
    story.insert(&[Some("1"), Some("a")]).update(&[Some("1"), Some("b")]);
    story.table = table(Identity::Default, "t", &[("id*", 20), ("v", 25), ("w", 1182)]);
    story.update(&[Some("1"), Some("b"), Some("{2026-01-01}")]);
    story.insert(&[Some("2"), None, Some("{}")]);
    let open = story.batch();
    assert_eq!(until(&mut *sink, &open).await, 1);
    let column = "select count(*) from pg_attribute where attrelid = 't'::regclass \
                  and attname = 'w' and format_type(atttypid, atttypmod) = 'date[]'";
    assert_eq!(cluster.value(column).await, 0, "it is not committed yet");
    // What follows is refused, and undone with the rest: the column is added once more.
    story.insert(&[Some("3"), None, Some("no date")]).end();
    assert_eq!(fails(&mut *sink, &story.batch()).await.class(), Class::Config);
    sink.open().await.unwrap();
    let mut whole = open;
    whole.changes.last_mut().unwrap().closes_transaction = true;
    delivers(&mut *sink, &whole).await;
    assert_eq!(cluster.value(column).await, 1);
    let expected = json!([{"id": 1, "v": "b", "w": ["2026-01-01"]}, {"id": 2, "v": null, "w": []}]);
    assert_eq!(rows(&cluster).await, expected);
}

#[tokio::test]
async fn a_row_is_found_by_the_index_of_its_replica_identity() {
    let cluster = Cluster::start().await;
    let mut sink = opened(&cluster, json!({"missing_table": "create"})).await;
    let mut columns = (*table(Identity::Index, "t", &[("id*", 20), ("v", 25), ("w", 25)])).clone();
    columns.columns[0].identity = false;
    columns.columns[1].identity = true;
    let mut story = Story::of(columns.into());
    for id in ["1", "2", "3"] {
        story.insert(&[Some(id), Some(&format!("v{id}")), Some("long")]);
    }
    // The primary key changes without a word about the old one.
    story.update(&[Some("10"), Some("v1"), Some("?")]);
    let old = |v| Before::Key(row(&[None, Some(v), None]));
    let moved = row(&[Some("2"), Some("v20"), Some("?")]);
    story.add(Op::Update, old("v2"), Some(moved)).add(Op::Delete, old("v3"), None).end();
    delivers(&mut *sink, &story.batch()).await;
    let expected = json!([{"id": 2, "v": "v20", "w": "long"}, {"id": 10, "v": "v1", "w": "long"}]);
    assert_eq!(rows(&cluster).await, expected);
}

#[tokio::test]
async fn a_partitioned_target_takes_rows_and_moves_them() {
    let cluster = Cluster::start().await;
    let create = "create table t (id bigint primary key, v text, w text) partition by range (id); \
                  create table low partition of t for values from (0) to (100); \
                  create table high partition of t for values from (100) to (1000)";
    cluster.sql(create).await;
    let mut sink = opened(&cluster, json!({})).await;
    let mut story = Story::keyed();
    for id in 0..200 {
        story.insert(&[Some(&id.to_string()), Some("a"), Some("long")]);
    }
    story.end().update(&[Some("150"), Some("b"), Some("?")]).delete("151");
    story.rekey("1", &[Some("500"), Some("c"), Some("?")]).end();
    delivers(&mut *sink, &story.batch()).await;
    let counts = "select json_build_array((select count(*) from low), (select count(*) from high))";
    assert_eq!(cluster.value(counts).await, json!([99, 100]));
    let moved = cluster.rows("select * from t where v <> 'a' order by 1").await;
    assert_eq!(
        moved,
        [json!({"id": 150, "v": "b", "w": "long"}), json!({"id": 500, "v": "c", "w": "long"}),]
    );
}

#[tokio::test]
async fn triggers_of_the_target_see_every_change_in_its_order() {
    let cluster = Cluster::start().await;
    let audit = "create table seen (no serial, what text); \
                 create function note() returns trigger language plpgsql as $$ begin \
                 insert into seen (what) values (lower(tg_op) || coalesce(new.id, old.id)); \
                 return null; end $$; \
                 create trigger note after insert or update or delete on t \
                 for each row execute function note()";
    cluster.sql(&format!("{CREATE}; {audit}")).await;
    let mut sink = opened(&cluster, json!({})).await;
    let mut story = Story::keyed();
    story.insert(&[Some("1"), None, None]).update(&[Some("1"), Some("a"), None]);
    story.insert(&[Some("2"), None, None]).delete("1").insert(&[Some("1"), None, None]).end();
    delivers(&mut *sink, &story.batch()).await;
    let order = "select string_agg(what, ' ' order by no) from seen";
    assert_eq!(cluster.value(order).await, "insert1 update1 insert2 delete1 insert1");
}

#[tokio::test]
async fn a_refusal_at_the_commit_itself_leaves_nothing_behind() {
    let cluster = Cluster::start().await;
    let create = "create table p (id bigint primary key); \
                  create table t (id bigint primary key, v text, w text, p bigint default 1 \
                  constraint has_p references p deferrable initially deferred)";
    cluster.sql(create).await;
    let mut sink = opened(&cluster, json!({})).await;
    let mut story = Story::keyed();
    let batch = story.insert(&[Some("1"), None, None]).end().batch();
    let error = fails(&mut *sink, &batch).await;
    assert_eq!(error.class(), Class::Config);
    assert!(error.to_string().contains("has_p"), "{error}");
    assert_eq!((rows(&cluster).await, sink.peek().await.unwrap()), (json!([]), None));
    cluster.sql("insert into p values (1)").await;
    assert_eq!(sink.open().await.unwrap(), None);
    delivers(&mut *sink, &batch).await;
    assert_eq!(cluster.value("select count(*) from t").await, 1);
}

#[tokio::test]
async fn a_logical_message_moves_the_progress_alone() {
    let cluster = Cluster::start().await;
    let mut sink = opened(&cluster, json!({})).await;
    let mut messages = batch(1..3);
    for change in &mut messages.changes {
        (change.op, change.table, change.after) = (Op::Message, None, None);
    }
    delivers(&mut *sink, &messages).await;
    assert_eq!(sink.peek().await.unwrap(), Some(progress(3)));
}
