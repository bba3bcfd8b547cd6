//! Filters, transforms and the outbox, from a committed statement to what a sink received.

use std::time::Duration;

use serde_json::{Value, json};

use crate::kit::{Answer, Cluster, FileRecorder, Recorder, Server, source_toml, wait_for};

const PATIENCE: Duration = Duration::from_secs(30);
const SHOP: &str = "
    create schema audit;
    create table audit.log (id int primary key);
    create table customers (id int primary key, email text, ssn text);
    create table orders (id bigint primary key, status text, net numeric, items jsonb, big text);
    alter table orders replica identity full;
    create table outbox (id int primary key, topic text, aggregate text, kind text, headers jsonb,
        payload json)";

struct Scene {
    cluster: Cluster,
    server: Server,
}

impl Scene {
    /// A server with these sinks; `data_dir` and source are written before them.
    async fn set(sinks: &str) -> Self {
        let cluster = Cluster::start().await;
        cluster.sql(SHOP).await;
        let source = source_toml("app", &cluster.unix_url());
        let mut server = Server::new(&format!("{source}\n{sinks}"));
        server.start_ready().await;
        Self { cluster, server }
    }

    fn file(&self, name: &str) -> FileRecorder {
        FileRecorder::new(self.server.path(format!("{name}.jsonl")))
    }

    /// Exit code, standard output and standard error of a command.
    fn walrace(&self, arguments: &[&str]) -> (Option<i32>, String, String) {
        let output = self.server.run(arguments);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    }
}

/// A `file` sink with rules; a table `done` that it always sees says that all has come.
fn file(name: &str, rules: &str) -> String {
    format!("[sink.{name}]\nkind = \"file\"\npath = \"{name}.jsonl\"\n{rules}\n")
}

fn letters(changes: &[Value]) -> String {
    changes.iter().map(|change| change["op"].as_str().unwrap()).collect()
}

fn tables(changes: &[Value]) -> Vec<&str> {
    changes.iter().map(|change| change["source_table"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn schemas_tables_and_operations_choose_what_a_sink_gets() {
    let sinks = [
        file("all", "schemas = []"),
        file("public", "schemas = [\"public\"]"),
        file("named", "tables = [\"public.customers\", \"audit.*\"]"),
        file("deletes", "operations = [\"delete\"]"),
    ];
    let scene = Scene::set(&sinks.concat()).await;
    scene
        .cluster
        .sql(
            "insert into orders values (1, 'new', 1, '[]', null); insert into audit.log values (1);
             insert into customers values (1, 'a', 'b'); delete from customers;
             delete from audit.log; delete from orders",
        )
        .await;
    let all = scene.file("all").wait_until(PATIENCE, |seen| seen.len() == 6).await;
    assert_eq!(letters(&all), "cccddd");
    let public = scene.file("public").wait_until(PATIENCE, |seen| seen.len() == 4).await;
    assert_eq!(tables(&public), ["orders", "customers", "customers", "orders"]);
    let named = scene.file("named").wait_until(PATIENCE, |seen| seen.len() == 4).await;
    assert_eq!(tables(&named), ["log", "customers", "customers", "log"]);
    let deletes = scene.file("deletes").wait_until(PATIENCE, |seen| seen.len() == 3).await;
    assert_eq!(letters(&deletes), "ddd");
}

#[tokio::test]
async fn rows_are_chosen_enriched_masked_and_cut_before_they_are_indexed() {
    let hook = Recorder::start().await;
    let sinks = format!(
        r#"
        [sink.index]
        kind = "webhook"
        url = "{}"
        tables = ["public.orders", "public.customers"]
        where = "table == 'customers' || record.status != 'draft'"
        mask_key = "0123456789abcdef"

        [[sink.index.transform]]
        tables = ["public.customers"]
        mask = {{ email = "hash", ssn = "drop" }}

        [[sink.index.transform]]
        tables = ["public.orders"]
        set = {{ gross = "record.net * 1.25" }}

        [[sink.index.transform]]
        tables = ["public.orders"]
        function = '''
        function transform(change)
          change.record.units = 0
          for _, item in change.record.items do
            change.record.units += item.qty
          end
          change.record.items = nil
          return change
        end
        '''
        "#,
        hook.url()
    );
    let scene = Scene::set(&sinks).await;
    scene
        .cluster
        .sql(
            "insert into customers values (1, 'ann@example.org', '078-05-1120');
             insert into orders values (9007199254740993, 'draft', 10, '[]', repeat('x', 5000));
             update orders set status = 'paid', items = '[{\"qty\": 2}, {\"qty\": 3}]';
             delete from orders; delete from customers",
        )
        .await;
    let changes = hook.wait_until(|seen| seen.len() >= 4).await;
    assert_eq!(letters(&changes), "cudd");
    let hash = changes[0]["after"]["email"].as_str().unwrap();
    assert_eq!(hash.len(), 64);
    assert_eq!(changes[0]["after"], json!({"id": 1, "email": hash}));
    let paid = &changes[1]["after"];
    assert_eq!(paid["id"], json!(9_007_199_254_740_993_i64));
    assert_eq!((&paid["gross"], &paid["units"]), (&json!(12.5), &json!(5)));
    assert_eq!(paid["big"].as_str().unwrap().len(), 5000, "completed from the old row");
    assert!(paid.get("items").is_none());
    assert_eq!(changes[1]["before"]["status"], "draft");
    assert_eq!(changes[2]["before"]["units"], 5, "of a delete the old row is the record");
    assert_eq!(changes[3]["key"], json!({"id": 1}));
    let sent = hook.stored().into_iter().map(|r| String::from_utf8_lossy(&r.body).into_owned());
    let sent: String = sent.collect();
    assert!(!sent.contains("ann@") && !sent.contains("078-05"), "{sent}");
}

const EVENTS: &str = r#"
    [sink.events]
    kind = "file"
    path = "events.jsonl"
    tables = ["public.outbox"]

    [sink.events.outbox]
    table = "public.outbox"
    route_column = "topic"
    key_column = "aggregate"
    type_column = "kind"
    headers_column = "headers"
    message_prefix = "outbox."
"#;

#[tokio::test]
async fn outbox_rows_and_messages_are_events_and_a_rollback_or_delete_emits_nothing() {
    let rows =
        file("rows", "tables = [\"public.*\", \"!public.outbox\"]\noperations = [\"insert\"]");
    let scene = Scene::set(&format!("{EVENTS}\n{rows}")).await;
    let insert = "insert into outbox values";
    scene
        .cluster
        .sql(&format!(
            "begin; insert into orders values (1, 'paid', 1, '[]', null);
             {insert} (1, 'orders', 'o-1', 'Paid', '{{\"trace\": \"x\"}}', '{{\"n\":  1}}'); commit;
             begin; {insert} (2, 'orders', 'o-2', 'Paid', null, '{{\"n\": 2}}'); rollback;
             begin; {insert} (3, 'orders', 'o-1', 'Sent', null, '{{\"n\": 3}}');
             delete from outbox where id = 3; commit;
             begin; select pg_logical_emit_message(true, 'outbox.orders#o-9', '{{\"n\": 4}}'); rollback;
             select pg_logical_emit_message(true, 'outbox.orders#o-1', '{{\"n\": 5}}');
             update outbox set topic = 'x'; delete from outbox; truncate outbox;
             {insert} (6, null, null, null, null, null)"
        ))
        .await;
    let events = scene.file("events").wait_until(PATIENCE, |seen| seen.len() >= 4).await;
    assert_eq!(events, [json!({"n": 1}), json!({"n": 3}), json!({"n": 5}), json!(null)]);
    let rows = scene.file("rows").wait_until(PATIENCE, |seen| !seen.is_empty()).await;
    assert_eq!(tables(&rows), ["orders"]);
    let (code, shown, said) = scene.walrace(&["transform", "test", "--sink", "events"]);
    assert_eq!(code, Some(0), "{said}");
    let lines: Vec<&str> = shown.lines().collect();
    assert_eq!(
        lines,
        [
            "left out  0 insert public.orders by tables",
            "passed    1 insert public.outbox  route orders  key o-1  trace: x  type: Paid",
            "  {\"n\":1}",
            "passed    2 insert public.outbox  route orders  key o-1  type: Sent",
            "  {\"n\":3}",
            "left out  3 delete public.outbox by outbox",
            "passed    4 message outbox.orders#o-1  route orders  key o-1",
            "  {\"n\": 5}",
            "left out  5 update public.outbox by outbox",
            "left out  6 delete public.outbox by outbox",
            "left out  7 truncate public.outbox by outbox",
            "passed    8 insert public.outbox",
            "  null",
        ]
    );
    assert_eq!(said.trim(), "9 changes: 4 passed, 5 left out (4 by outbox, 1 by tables), 0 failed");
}

#[tokio::test]
async fn rules_are_tried_on_real_changes_whether_it_runs_or_not() {
    let mut scene =
        Scene::set(&file("lake", "format = \"sequin\"\noperations = [\"insert\"]")).await;
    scene
        .cluster
        .sql(
            "insert into orders values (1, 'paid', 100, '[{\"sku\": \"a\"}, {\"sku\": \"b\"}]', null),
             (2, 'draft', 5, '[]', null), (3, 'paid', null, '[]', null); delete from orders where id = 1",
        )
        .await;
    scene.file("lake").wait_until(PATIENCE, |seen| seen.len() == 3).await;
    let rules = r#"
        where = "record.status == 'paid'"
        route = "'orders.' + record.item.sku"
        [[transform]]
        where_not = "x"
    "#;
    std::fs::write(scene.server.path("new.toml"), rules).unwrap();
    let test = ["transform", "test", "--sink", "lake", "--rules", "new.toml"];
    let (code, _, said) = scene.walrace(&test);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("new.toml:5:9: unknown key `transform[0].where_not`"), "{said}");
    let rules = r#"
        where = "record.status == 'paid'"
        route = "'orders.' + record.item.sku"
        [[transform]]
        set = { gross = "record.net * 1.25" }
        [[transform]]
        explode = "record.items"
        as = "item"
        [[transform]]
        columns = ["gross", "item"]
    "#;
    std::fs::write(scene.server.path("new.toml"), rules).unwrap();
    let running = scene.walrace(&test);
    assert!(scene.server.stop().await.success());
    assert_eq!(scene.walrace(&test), running, "the same when it does not run");
    let (code, shown, said) = running;
    assert_eq!(code, Some(3), "{said}");
    let lines: Vec<&str> = shown.lines().collect();
    assert_eq!(lines[0], "passed    0 insert public.orders  route orders.a");
    let message: Value = serde_json::from_str(lines[1]).unwrap();
    assert_eq!(message["record"], json!({"id": 1, "gross": 125.0, "item": {"sku": "a"}}));
    assert_eq!(message["metadata"]["database_name"], "app");
    assert_eq!(lines[2], "passed    0 insert public.orders  route orders.b");
    assert_eq!(lines[4], "left out  1 insert public.orders by where");
    let failed = "failed    2 insert public.orders: by the rules of sink lake: \
                  transform[0].set.gross fails: ";
    assert!(lines[5].starts_with(failed), "{}", lines[5]);
    assert_eq!(lines[6], "left out  3 delete public.orders by operations");
    let told =
        "4 changes: 1 passed as 2 messages, 2 left out (1 by operations, 1 by where), 1 failed";
    assert_eq!(said.trim(), told);
    let (_, shown, _) =
        scene.walrace(&["transform", "test", "--sink", "lake", "--from", "1", "--count", "1"]);
    assert_eq!(shown.lines().count(), 2, "{shown}");
    std::fs::write(scene.server.path("new.toml"), "where = \"record.net >\"").unwrap();
    let (code, _, said) = scene.walrace(&test);
    assert_eq!(code, Some(1));
    assert!(said.contains("sink lake: `where`, line 1, column 13: "), "{said}");
}

#[tokio::test]
async fn what_a_sink_is_missing_is_what_its_rules_let_through_whether_it_runs_or_not() {
    let hook = Recorder::start().await;
    let sink = format!(
        "[sink.hook]\nkind = \"webhook\"\nurl = \"{}\"\ntables = [\"public.orders\"]\nreads = false\n\
         where = \"op == 'delete' || record.net / 1.0 > 10.0\"\nattempts_max = 1\n",
        hook.url()
    );
    let mut scene = Scene::set(&sink).await;
    hook.refuse(|change| change["after"]["id"] == 1);
    scene.cluster.sql("insert into orders values (1, 'bad', 20, '[]', null)").await;
    let parked = async || {
        let status: Value = serde_json::from_str(&scene.server.get("/status").await.1).unwrap();
        (status["sinks"][0]["parked_changes"] == 1).then_some(())
    };
    wait_for(PATIENCE, parked, || scene.server.log_tail()).await;
    hook.always(Answer::Refuse(503));
    scene
        .cluster
        .sql(
            "insert into orders values (2, 'small', 5, '[]', null), (3, 'large', 50, '[]', null),
             (4, 'fails', null, '[]', null); delete from orders where id = 2",
        )
        .await;
    let behind = async || {
        let status: Value = serde_json::from_str(&scene.server.get("/status").await.1).unwrap();
        (status["sinks"][0]["behind_changes"].as_u64() >= Some(3)).then_some(())
    };
    wait_for(PATIENCE, behind, || scene.server.log_tail()).await;
    let (_, told, _) = scene.walrace(&["lag"]);
    assert!(told.contains("before filters and rules"), "{told}");
    let running = scene.walrace(&["missing", "--sink", "hook", "--json"]);
    scene.server.kill();
    let stopped = scene.walrace(&["missing", "--sink", "hook", "--json"]);
    assert_eq!((running.0, stopped.0), (Some(3), Some(3)), "{} {}", running.2, stopped.2);
    assert_eq!(running.1, stopped.1);
    let lines: Vec<Value> = stopped.1.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let offsets: Vec<u64> = lines.iter().map(|line| line["offset"].as_u64().unwrap()).collect();
    assert_eq!(offsets, [2, 3, 4], "what a rule leaves out is not missing, what it fails on is");
    for said in [&running.2, &stopped.2] {
        assert!(said.contains(" are parked: `walrace dlq list --sink hook`"), "{said}");
    }
}

#[tokio::test]
async fn a_mask_with_a_slip_of_the_pen_is_told_by_check_in_the_log_in_the_metrics_and_by_test() {
    let rules = |email: &str| {
        file(
            "lake",
            &format!(
                "tables = [\"public.customers\", \"public.orders\"]\nmask_key = \"0123456789abcdef\"\n\
                 [[sink.lake.transform]]\nmask = {{ {email} = \"hash\", \"*_token\" = \"drop\" }}\n\
                 [[sink.lake.transform]]\nrename = {{ id = \"key\" }}\n\
                 [[sink.lake.transform]]\ncolumns = [\"key\", \"emal\", \"status\", \"net\"]\n"
            ),
        )
    };
    let mut scene = Scene::set(&rules("emial")).await;
    let (code, said, _) = scene.walrace(&["check"]);
    assert_eq!(code, Some(1), "{said}");
    let mask = "transform[0].mask names the column `emial`, which none of its tables has \
                (public.customers, public.orders); public.customers has `email`";
    assert!(said.contains("sink lake") && said.contains(mask), "{said}");
    assert!(said.contains("1 thing stands in the way"), "{said}");
    let warned = |rule: &str| said.lines().any(|l| l.contains("warning") && l.contains(rule));
    assert!(warned("transform[0].mask names the column `*_token`"), "{said}");
    assert!(warned("transform[2].columns names the column `emal`"), "{said}");
    assert!(!said.contains("rename"), "{said}");

    for id in 1..4 {
        scene.cluster.sql(&format!("insert into customers values ({id}, 'a', 'b')")).await;
    }
    scene.cluster.sql("insert into orders values (1, 'paid', 1, '[]', null)").await;
    scene.file("lake").wait_until(PATIENCE, |seen| seen.len() == 4).await;
    let log = std::fs::read_to_string(scene.server.path("walrace.log")).unwrap();
    let told = "names the column `emial`, which public.customers does not have; it has `email`";
    assert_eq!(log.matches(told).count(), 1, "once for each table: {log}");
    assert_eq!(log.matches("names the column `emial`, which public.orders").count(), 1, "{log}");
    let metric = "walrace_sink_unmatched_columns";
    assert_eq!(scene.server.metric(metric, &["sink=\"lake\""]).await, Some(1.0));
    let (_, _, said) = scene.walrace(&["transform", "test", "--sink", "lake"]);
    assert!(said.contains(&format!("warning: {mask}")), "{said}");

    scene.server.stop().await;
    let source = source_toml("app", &scene.cluster.unix_url());
    scene.server.set_config(&format!("{source}\n{}", rules("email").replace("emal", "email")));
    let (code, said, _) = scene.walrace(&["check"]);
    assert_eq!(code, Some(0), "{said}");
    scene.server.set_config(&format!(
        "{source}\n{}",
        rules("email").replace(
            "[[sink.lake.transform]]\nmask",
            "[[sink.lake.transform]]\ntables = [\"public.custmers\"]\nmask",
        )
    ));
    let (code, said, _) = scene.walrace(&["check"]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("names the column `email`, but applies to no table"), "{said}");
}

#[tokio::test]
async fn check_compiles_the_rules_of_every_sink() {
    let cluster = Cluster::start().await;
    cluster.sql(SHOP).await;
    let source = source_toml("app", &cluster.unix_url());
    let server = Server::new("");
    for (rules, told) in [
        ("where = \"record.net >\"", "sink lake: `where`, line 1, column 13"),
        ("route = \"recrd.net\"", "sink lake: `route`, line 1, column 1: there is no variable"),
        ("message_key = \"lower(record.net)\"", "sink lake: `message_key`, line 1"),
        ("message_headers = { x = \"1 +\" }", "sink lake: `message_headers.x`, line 1, column 4"),
        ("transform = [{ set = { x = \"1 +\" } }]", "sink lake: `transform[0].set.x`, line 1"),
        (
            "transform = [{ function = \"\"\"\nfunction transform(change)\n  retrn change\nend\"\"\" }]",
            "sink lake: `transform[0].function` does not compile: transform[0].function:2:",
        ),
        (
            "outbox.table = \"public.outbox\"\noutbox.key_column = \"agregate\"",
            "no column agregate",
        ),
    ] {
        server.set_config(&format!("{source}\n{}{}", file("good", ""), file("lake", rules)));
        let output = server.run(&["check"]);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(told), "{told}: {said}");
        // A file has no use for these at all, which is told too.
        let unheard = ["route", "message_headers"].iter().any(|rule| rules.starts_with(rule));
        let things = if unheard { "2 things stand" } else { "1 thing stands" };
        assert!(said.contains("sink good") && said.contains(things), "{said}");
        assert_eq!(said.contains("sink `lake` has no use for its"), unheard, "{said}");
    }
}
