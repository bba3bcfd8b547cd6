//! Refused changes, what waits behind them, and what people do about it; and what people do to a
//! sink: pause, rewind, skip.

mod keys;

use std::time::Duration;

use serde_json::{Value, json};

use crate::kit::{Cluster, Recorder, Server, http_client, source_toml, wait_for};

const PATIENCE: Duration = Duration::from_secs(30);
const TABLES: &str = "create table item (id int primary key, v text);
    create table other (id int primary key, v text);
    create table bare (id int, v text); alter table bare replica identity full;
    create table outbox (id int primary key, aggregate text, headers jsonb, payload json)";

struct Scene {
    cluster: Cluster,
    hook: Recorder,
    server: Server,
}

impl Scene {
    /// A webhook with `options`, whose batches are all taken until a test says otherwise.
    async fn set(options: &str) -> Self {
        let cluster = Cluster::start().await;
        cluster.sql(TABLES).await;
        let hook = Recorder::start().await;
        let source = source_toml("app", &cluster.unix_url());
        let server = Server::new(&format!(
            "{source}\n[sink.hook]\nkind = \"webhook\"\nurl = \"{}\"\nretry_ms_min = 20\n\
             retry_ms_max = 100\n{options}\n",
            hook.url()
        ));
        let mut scene = Self { cluster, hook, server };
        scene.server.start_ready().await;
        scene
    }

    /// Starts again with `options` in place of the sink's.
    async fn restart_with(&mut self, options: &str) {
        self.server.kill();
        let path = self.server.path("walrace.toml");
        let config = std::fs::read_to_string(&path).unwrap();
        let (start, _) = config.split_once("retry_ms_max = 100").unwrap();
        let config =
            format!("{start}retry_ms_max = 100\n{options}\n\n[http]\nlisten = \"127.0.0.1:0\"\n");
        std::fs::write(path, config).unwrap();
        self.server.start_ready().await;
    }

    fn walrace(&self, arguments: &[&str]) -> String {
        let output = self.server.run(arguments);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (out, failure) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success(), "{arguments:?}: {out}{failure}");
        out
    }

    fn refuses(&self, arguments: &[&str]) -> String {
        let output = self.server.run(arguments);
        assert!(!output.status.success(), "{arguments:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    async fn sink(&self) -> Value {
        let status: Value = serde_json::from_str(&self.server.get("/status").await.1).unwrap();
        status["sinks"][0].clone()
    }

    async fn wait_sink(&self, what: &str, condition: impl Fn(&Value) -> bool) -> Value {
        let probe = async || Some(self.sink().await).filter(|sink| condition(sink));
        wait_for(PATIENCE, probe, || format!("{what}: {}", self.server.log_tail())).await
    }

    async fn wait_parked(&self, parked: u64, dead: u64) -> Value {
        let counts = |sink: &Value| (sink["parked_changes"].clone(), sink["dead_letters"].clone());
        self.wait_sink(&format!("{parked} parked, {dead} dead"), |sink| {
            counts(sink) == (json!(parked), json!(dead))
        })
        .await
    }

    /// Waits until everything of `table` that a rule picks has come; its values in the order of
    /// arrival.
    async fn values(&self, count: usize, pick: impl Fn(&Value) -> bool) -> Vec<String> {
        let seen = self.hook.wait_until(|seen| seen.iter().filter(|c| pick(c)).count() >= count);
        let value = |change: &Value| match change["op"].as_str().unwrap() {
            "d" => format!("-{}", change["before"]["id"]),
            "t" => "truncate".to_owned(),
            _ => change["after"]["v"].as_str().unwrap().to_owned(),
        };
        seen.await.iter().filter(|change| pick(change)).map(value).collect()
    }
}

fn is(table: &'static str, id: u64) -> impl Fn(&Value) -> bool + Send + Copy + 'static {
    move |change| {
        let has = |row: &str| change[row]["id"] == id;
        change["source_table"] == table && (has("after") || has("before"))
    }
}

fn of(table: &'static str) -> impl Fn(&Value) -> bool + Copy {
    move |change| change["source_table"] == table
}

#[tokio::test]
async fn the_trouble_of_one_key_never_stops_another() {
    let scene = Scene::set("attempts_max = 1000").await;
    scene.hook.refuse(is("item", 3));
    scene.cluster.sql("insert into item select i, 'a' || i from generate_series(0, 9) i").await;
    scene.cluster.sql("update item set v = 'b' || id where id in (3, 4)").await;
    scene.cluster.sql("delete from item where id in (3, 5)").await;
    let others = scene.values(11, of("item")).await;
    assert!(others.iter().all(|value| !value.ends_with('3')), "{others:?}");
    scene.wait_parked(3, 0).await;
    let listed = scene.walrace(&["dlq", "list", "--json"]);
    let first: Value = serde_json::from_str(listed.lines().next().unwrap()).unwrap();
    assert_eq!((&first["table"], &first["op"]), (&json!("public.item"), &json!("insert")));
    assert!(first["error"].as_str().unwrap().contains("422"), "{first}");
    assert!(listed.contains("waits behind"), "{listed}");
    scene.hook.refuse_nothing();
    assert_eq!(scene.values(3, is("item", 3)).await, ["a3", "b3", "-3"], "in their order");
    scene.wait_parked(0, 0).await;
}

#[tokio::test]
async fn many_keys_that_are_refused_again_and_again_leave_the_others_their_time() {
    let scene = Scene::set("attempts_max = 100000").await;
    scene.hook.refuse(|change| change["after"]["v"] == "bad");
    // More than can be tried again within `retry_ms_max`, so that some are always due.
    scene.cluster.sql("insert into item select i, 'bad' from generate_series(1, 500) i").await;
    scene.wait_parked(500, 0).await;
    scene.cluster.sql("update item set v = 'behind'").await;
    scene.wait_parked(1_000, 0).await;
    for id in 1..=10 {
        scene.cluster.sql(&format!("insert into other values ({id}, 'o{id}')")).await;
        scene.values(id, of("other")).await;
    }
    assert_eq!(scene.hook.changes().len(), 10, "nothing went before what it waits for");
    scene.hook.refuse_nothing();
    scene.wait_parked(0, 0).await;
    for id in [1, 250, 500] {
        assert_eq!(scene.values(2, is("item", id)).await, ["bad", "behind"]);
    }
}

#[tokio::test]
async fn attempts_that_are_used_up_make_a_dead_letter_which_holds_its_key() {
    let scene = Scene::set("attempts_max = 3").await;
    scene.hook.refuse(is("item", 1));
    scene.cluster.sql("insert into item values (1, 'bad'), (2, 'good')").await;
    scene.wait_parked(1, 1).await;
    scene.cluster.sql("update item set v = 'later' where id = 1").await;
    scene.wait_parked(2, 1).await;
    assert_eq!(scene.values(1, of("item")).await, ["good"]);

    let id = scene.walrace(&["dlq", "list", "--state", "dead"]);
    assert!(id.contains("hook:0") && id.contains("insert public.item"), "{id}");
    let letter: Value = serde_json::from_str(&scene.walrace(&["dlq", "show", "hook:0"])).unwrap();
    assert_eq!(letter["attempts"], 3);
    assert_eq!((&letter["sink"], &letter["change"]["after"]["v"]), (&json!("hook"), &json!("bad")));
    assert!(letter["first_at"].as_i64() < letter["last_at"].as_i64(), "{letter}");
    assert!(letter["error"].as_str().unwrap().contains("422"), "{letter}");

    let error = scene.refuses(&["dlq", "edit", "hook:0", "--set", "w=1"]);
    assert!(error.contains("no column w") && error.contains("id, v"), "{error}");
    scene.hook.refuse(|change| change["after"]["v"] == "bad");
    scene.walrace(&["dlq", "edit", "hook:0", "--set", "v=mended", "--why", "a typo"]);
    assert_eq!(scene.values(2, is("item", 1)).await, ["mended", "later"]);
    scene.wait_parked(0, 0).await;
    let events = scene.walrace(&["sink", "events", "hook"]);
    assert!(events.contains("edit_parked") && events.contains("a typo"), "{events}");
}

#[tokio::test]
async fn dead_letters_are_retried_and_dropped_by_filter_from_the_shell_and_over_http() {
    let scene = Scene::set("attempts_max = 1").await;
    scene.hook.refuse(|change| change["after"]["v"] == "bad");
    scene.cluster.sql("insert into item select i, 'bad' from generate_series(1, 4) i").await;
    scene.cluster.sql("insert into other select i, 'bad' from generate_series(1, 3) i").await;
    scene.wait_parked(7, 7).await;
    let error = scene.refuses(&["dlq", "drop"]);
    assert!(error.contains("--all") || error.contains("all"), "{error}");
    let dropped = scene.walrace(&["dlq", "drop", "--table", "public.other", "--error", "422"]);
    assert_eq!(dropped, "3 are dropped\n");
    assert_eq!(scene.walrace(&["dlq", "drop", "hook:0"]), "1 are dropped\n");
    let until = "2001-01-01T00:00:00Z";
    assert_eq!(scene.walrace(&["dlq", "retry", "--until", until]), "0 are tried again\n");

    let base = format!("http://{}", scene.server.address().unwrap());
    let letters = http_client().get(format!("{base}/dead-letters?sink=hook&state=dead"));
    let letters: Value = letters.send().await.unwrap().json().await.unwrap();
    assert_eq!(letters.as_array().unwrap().len(), 3);
    let show = http_client().get(format!("{base}/dead-letters/hook:1")).send().await.unwrap();
    assert_eq!(show.json::<Value>().await.unwrap()["change"]["after"]["id"], 2);
    scene.hook.refuse_nothing();
    let retry = http_client().post(format!("{base}/dead-letters/retry"));
    let reply = retry.json(&json!({"sink": "hook", "since": until, "who": "ana"})).send();
    assert_eq!(reply.await.unwrap().json::<Value>().await.unwrap(), json!({"retried": 3}));
    scene.wait_parked(0, 0).await;
    assert_eq!(scene.values(3, of("item")).await.len(), 3);
    assert!(scene.hook.changes().iter().all(|change| change["source_table"] == "item"));
    let missing = http_client().get(format!("{base}/dead-letters/hook:1")).send().await.unwrap();
    assert_eq!(missing.status(), 400);
}

#[tokio::test]
async fn a_released_dead_letter_lets_its_key_go_on_and_comes_late_with_a_mark() {
    let scene = Scene::set("attempts_max = 1\nafter_dead_letter = \"release\"").await;
    scene.hook.refuse(|change| change["after"]["v"] == "one");
    scene.cluster.sql("insert into item values (1, 'one')").await;
    scene.wait_parked(1, 1).await;
    scene.cluster.sql("update item set v = 'two'").await;
    scene.values(1, of("item")).await;
    let letter: Value = serde_json::from_str(&scene.walrace(&["dlq", "show", "hook:0"])).unwrap();
    assert_eq!(letter["superseded"], 1);
    scene.hook.refuse_nothing();
    scene.walrace(&["dlq", "retry", "--all"]);
    assert_eq!(scene.values(2, of("item")).await, ["two", "one"]);
    let seen = scene.hook.changes();
    assert_eq!((&seen[0]["late"], &seen[1]["late"]), (&Value::Null, &json!(true)));
}

#[tokio::test]
async fn what_is_parked_survives_a_kill_at_each_step_in_its_order() {
    let mut scene = Scene::set("attempts_max = 100000").await;
    scene.hook.refuse(is("item", 1));
    scene.server.kill();
    for (round, point) in [
        "deliver::before_park:1",
        "deliver::after_park:1",
        "deliver::before_retry:1",
        "deliver::after_park:1",
        "deliver::before_retry:3",
    ]
    .into_iter()
    .enumerate()
    {
        let statement = format!(
            "insert into item values (1, '{round}') on conflict (id) do update set v = excluded.v;
             insert into item values ({}, 'x'); insert into other values ({round}, 'x')",
            100 + round
        );
        scene.cluster.sql(&statement).await;
        scene.server.start_to_die_at(point);
        if round == 3 {
            scene.cluster.sql("insert into item values (50, 'x')").await;
            scene.hook.refuse(move |change| is("item", 1)(change) || is("item", 50)(change));
        }
        scene.server.wait_exit(PATIENCE).await;
    }
    scene.hook.refuse_nothing();
    scene.server.start_to_die_at("deliver::after_retry:1");
    scene.server.wait_exit(PATIENCE).await;
    scene.server.start_ready().await;
    scene.hook.wait_until(|seen| seen.iter().any(|change| change["after"]["v"] == "4")).await;
    scene.wait_parked(0, 0).await;
    let mut values = scene.values(5, is("item", 1)).await;
    values.dedup();
    let first_of_all = ["0", "1", "2", "3", "4"].map(str::to_owned);
    let tail = values.split_off(values.len() - first_of_all.len());
    assert_eq!(tail, first_of_all, "the whole run, in order, at the end");
    assert!(
        first_of_all.starts_with(&values),
        "and before it only what was sent twice: {values:?}"
    );
    let mut others: Vec<u64> =
        scene.hook.changes().iter().filter_map(|change| change["after"]["id"].as_u64()).collect();
    others.sort_unstable();
    others.dedup();
    assert_eq!(others, [0, 1, 2, 3, 4, 50, 100, 101, 102, 103, 104]);
}

#[tokio::test]
async fn a_change_of_the_key_and_a_swap_park_under_both_keys() {
    let scene = Scene::set("attempts_max = 100000").await;
    scene.cluster.sql("insert into item values (1, 'a'), (2, 'b'), (9, 'free')").await;
    scene.values(3, of("item")).await;
    scene.hook.refuse(|change| change["after"]["v"] == "swap");
    scene
        .cluster
        .sql(
            "begin; update item set id = 3, v = 'swap' where id = 1;
             update item set id = 1 where id = 2; update item set id = 2 where id = 3; commit;
             update item set v = 'after' where id = 1; update item set v = 'free2' where id = 9",
        )
        .await;
    assert_eq!(scene.values(2, is("item", 9)).await, ["free", "free2"], "another key goes on");
    scene.wait_parked(4, 0).await;
    scene.hook.refuse_nothing();
    scene.wait_parked(0, 0).await;
    let order: Vec<u64> =
        scene.hook.changes().iter().filter_map(|change| change["offset"].as_u64()).collect();
    let late: Vec<u64> = order.into_iter().filter(|offset| (3..7).contains(offset)).collect();
    assert_eq!(late, [3, 4, 5, 6]);
}

#[tokio::test]
async fn a_truncate_waits_for_every_key_of_its_table_and_every_key_for_it() {
    let scene = Scene::set("attempts_max = 100000").await;
    scene.hook.refuse(|change| change["after"]["v"] == "bad");
    scene.cluster.sql("insert into item values (1, 'bad'), (2, 'good')").await;
    scene.wait_parked(1, 0).await;
    scene
        .cluster
        .sql("truncate item; insert into item values (5, 'new'); insert into other values (1, 'o')")
        .await;
    assert_eq!(scene.values(1, of("other")).await, ["o"]);
    scene.wait_parked(3, 0).await;
    scene.hook.refuse_nothing();
    assert_eq!(scene.values(4, of("item")).await, ["good", "bad", "truncate", "new"]);
}

#[tokio::test]
async fn a_table_without_a_key_is_one_key() {
    let scene = Scene::set("attempts_max = 100000").await;
    scene.hook.refuse(|change| change["after"]["v"] == "bad");
    scene.cluster.sql("insert into bare values (1, 'a'), (2, 'bad'), (3, 'c')").await;
    scene.cluster.sql("insert into other values (1, 'o')").await;
    scene.values(1, of("other")).await;
    scene.wait_parked(2, 0).await;
    scene.hook.refuse_nothing();
    assert_eq!(scene.values(3, of("bare")).await, ["a", "bad", "c"]);
}

#[tokio::test]
async fn an_outage_parks_nothing_and_counts_no_attempt() {
    let mut scene = Scene::set("attempts_max = 2").await;
    scene.hook.go_down().await;
    scene.cluster.sql("insert into item values (1, 'a')").await;
    let waits =
        |sink: &Value| sink["state"] == "waiting" && sink["failed_attempts"].as_u64() >= Some(4);
    let sink = scene.wait_sink("it waits", waits).await;
    assert_eq!(sink["parked_changes"], 0);
    scene.hook.come_back().await;
    assert_eq!(scene.values(1, of("item")).await, ["a"]);
}

#[tokio::test]
async fn a_full_lot_stops_its_sink_with_a_reason_until_there_is_room() {
    let scene = Scene::set("attempts_max = 1\nparked_changes_max = 5\nbatch_changes_max = 2").await;
    scene.hook.refuse(|change| change["after"]["v"] == "bad");
    scene.cluster.sql("insert into item select i, 'bad' from generate_series(1, 8) i").await;
    scene.cluster.sql("insert into item values (100, 'good')").await;
    let full = |sink: &Value| {
        let reason = sink["reason"].as_str().unwrap_or_default();
        sink["state"] == "waiting" && reason.contains("5 parked") && reason.contains("walrace dlq")
    };
    scene.wait_sink("it says that it is full", full).await;
    let log = std::fs::read_to_string(scene.server.path("walrace.log")).unwrap();
    assert!(log.contains("the limit is near"), "the alarm sounds before");
    scene.walrace(&["dlq", "drop", "--all"]);
    assert_eq!(scene.values(1, of("item")).await, ["good"]);
    scene.wait_parked(3, 3).await;
}

#[tokio::test]
async fn a_sink_is_paused_resumed_rewound_and_skipped_and_each_is_written_down() {
    let mut scene = Scene::set("").await;
    scene.cluster.sql("insert into item select i, 'v' || i from generate_series(0, 9) i").await;
    scene.values(10, of("item")).await;
    scene.walrace(&["sink", "pause", "hook", "--why", "a release"]);
    let sink = scene.wait_sink("it is paused", |sink| sink["state"] == "paused").await;
    assert!(sink["by"].as_str().unwrap().contains("a release"), "{sink}");
    scene.cluster.sql("insert into item values (10, 'v10'), (11, 'v11')").await;
    scene.server.stop().await;
    scene.server.start_ready().await;
    scene
        .wait_sink("it is still paused", |sink| {
            sink["state"] == "paused" && sink["behind_changes"] == 2
        })
        .await;
    let said = scene.walrace(&["sink", "skip", "hook", "--offset", "10", "--why", "known bad"]);
    assert!(said.contains("hook:10"), "{said}");
    scene.walrace(&["sink", "resume", "hook"]);
    assert_eq!(scene.values(1, is("item", 11)).await, ["v11"]);
    scene.wait_parked(1, 1).await;
    assert!(scene.walrace(&["dlq", "list"]).contains("skipped by"), "a skip loses nothing");

    let said = scene.walrace(&["sink", "rewind", "hook", "--to", "8", "--why", "again"]);
    assert!(said.contains("from offset 12 to 8: 4 come again"), "{said}");
    assert_eq!(scene.values(2, is("item", 9)).await, ["v9", "v9"]);
    scene.walrace(&["sink", "rewind", "hook", "--to", "start"]);
    assert_eq!(scene.values(2, is("item", 0)).await, ["v0", "v0"]);
    let error = scene.refuses(&["sink", "rewind", "hook", "--to", "99"]);
    assert!(error.contains("holds 0 to 12"), "{error}");

    scene.walrace(&["sink", "pause", "hook"]);
    scene.cluster.sql("insert into item values (12, 'v12'), (13, 'v13')").await;
    scene.wait_sink("it is behind", |sink| sink["behind_changes"] == 2).await;
    let said = scene.walrace(&["sink", "skip", "hook", "--to", "13"]);
    assert!(said.contains("1 changes from 12"), "{said}");
    scene.walrace(&["sink", "resume", "hook"]);
    assert_eq!(scene.values(1, is("item", 13)).await, ["v13"]);
    assert!(!scene.hook.changes().iter().any(is("item", 12)));
    let sink = scene.wait_sink("it runs", |sink| sink["state"] == "running").await;
    assert_eq!(sink["lost_changes"], 1);
    let events = scene.walrace(&["sink", "events", "hook"]);
    for told in ["pause", "resume", "skip", "begin_epoch", "a release", "known bad", "again"] {
        assert!(events.contains(told), "{told}: {events}");
    }
}

#[tokio::test]
async fn lanes_write_at_the_same_time_and_keep_the_order_of_each_key() {
    let scene = Scene::set("lanes = 4\nbatch_changes_max = 50\nattempts_max = 100000").await;
    scene.hook.refuse(is("item", 7));
    for round in 0..20 {
        let statement = format!(
            "insert into item select i, '{round}' from generate_series(0, 19) i
             on conflict (id) do update set v = excluded.v"
        );
        scene.cluster.sql(&statement).await;
    }
    scene.hook.wait_until(|seen| seen.len() >= 19 * 20).await;
    scene.hook.refuse_nothing();
    scene.walrace(&["dlq", "retry", "--all"]);
    scene.wait_parked(0, 0).await;
    for id in 0..20 {
        let values = scene.values(20, is("item", id)).await;
        let all: Vec<String> = (0..20).map(|round| round.to_string()).collect();
        assert_eq!(values, all, "item {id}");
    }
}

#[tokio::test]
async fn a_change_on_which_a_rule_fails_is_a_dead_letter_at_once_and_never_delivered() {
    let rules = "[[sink.hook.transform]]\nset = { size = \"size(record.v) + 0\" }\n\
                 [[sink.hook.transform]]\ndrop = [\"v\"]\n";
    let mut scene = Scene::set(rules).await;
    scene.cluster.sql("insert into item values (1, 'abc'), (2, null), (3, 'x')").await;
    scene.cluster.sql("update item set v = 'later' where id = 2").await;
    let seen = scene.hook.wait_until(|seen| seen.len() >= 2).await;
    let sizes: Vec<_> = seen.iter().map(|change| change["after"].clone()).collect();
    assert_eq!(sizes, [json!({"id": 1, "size": 3}), json!({"id": 3, "size": 1})]);
    scene.wait_parked(2, 1).await;
    let letter: Value = serde_json::from_str(&scene.walrace(&["dlq", "show", "hook:1"])).unwrap();
    assert_eq!((&letter["state"], &letter["attempts"]), (&json!("dead"), &json!(1)));
    assert!(letter["error"].as_str().unwrap().contains("size"), "{letter}");
    assert_eq!(letter["change"]["after"]["v"], Value::Null, "as it was before any rule");

    // The rule is mended, and the dead letter goes through the new one.
    let config = std::fs::read_to_string(scene.server.path("walrace.toml")).unwrap();
    scene.server.kill();
    let mended = config.replace("size(record.v) + 0", "record.v == null ? 0 : size(record.v)");
    std::fs::write(scene.server.path("walrace.toml"), mended).unwrap();
    scene.server.start_ready().await;
    scene.walrace(&["dlq", "retry", "hook:1"]);
    scene.hook.wait_until(|seen| seen.iter().filter(|c| is("item", 2)(c)).count() >= 2).await;
    let of_two: Vec<_> = scene.hook.changes().into_iter().filter(is("item", 2)).collect();
    assert_eq!((&of_two[0]["after"]["size"], &of_two[1]["after"]["size"]), (&json!(0), &json!(5)));
}

#[tokio::test]
async fn one_sink_reads_again_and_another_does_not_move() {
    let mut scene = Scene::set("").await;
    let config = std::fs::read_to_string(scene.server.path("walrace.toml")).unwrap();
    scene.server.kill();
    let manifest = "[sink.manifest]\nkind = \"file\"\npath = \"manifest.jsonl\"\n\n[http]";
    std::fs::write(scene.server.path("walrace.toml"), config.replace("[http]", manifest)).unwrap();
    scene.server.start_ready().await;
    scene.cluster.sql("insert into item select i, 'v' || i from generate_series(1, 500) i").await;
    scene.values(500, of("item")).await;
    let file = crate::kit::FileRecorder::new(scene.server.path("manifest.jsonl"));
    file.wait_until(PATIENCE, |seen| seen.len() == 500).await;
    let at = async || {
        let status: Value = serde_json::from_str(&scene.server.get("/status").await.1).unwrap();
        let sinks = status["sinks"].as_array().unwrap().clone();
        let own = sinks.iter().find(|sink| sink["name"] == "manifest").unwrap();
        (own["cursor"].clone(), own["behind_changes"].clone())
    };
    let there = async || (at().await == (json!(500), json!(0))).then_some(());
    wait_for(PATIENCE, there, || "the manifest does not arrive".to_owned()).await;
    scene.walrace(&["sink", "rewind", "hook", "--to", "start", "--why", "finance reads the week"]);
    scene.hook.wait_until(|seen| seen.len() >= 1000).await;
    assert_eq!(at().await, (json!(500), json!(0)));
    assert_eq!(file.changes().len(), 500, "nothing came twice");
}
