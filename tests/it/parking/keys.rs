//! Parking by the keys that rules give, and after them; changes of several parts.

use serde_json::{Value, json};

use super::{PATIENCE, Scene, TABLES, is};
use crate::kit::{Cluster, Server, source_toml, wait_for};

#[tokio::test]
async fn what_waits_behind_a_change_that_a_rule_now_fails_on_stays_behind_it() {
    let mut scene = Scene::set("attempts_max = 100000").await;
    scene.hook.refuse(is("item", 1));
    scene.cluster.sql("insert into item values (1, 'first')").await;
    scene.wait_parked(1, 0).await;
    scene.cluster.sql("update item set v = 'second'").await;
    scene.wait_parked(2, 0).await;
    let config = std::fs::read_to_string(scene.server.path("walrace.toml")).unwrap();
    scene.server.kill();
    let rule =
        "[[sink.hook.transform]]\nset = { n = \"record.v == 'first' ? 1 / 0 : 2\" }\n\n[http]";
    std::fs::write(scene.server.path("walrace.toml"), config.replace("[http]", rule)).unwrap();
    scene.hook.refuse_nothing();
    scene.server.start_ready().await;
    scene.wait_parked(2, 1).await;
    assert!(scene.hook.changes().is_empty(), "the second change never goes before the first");
    scene.walrace(&["dlq", "drop", "hook:0"]);
    assert_eq!(scene.values(1, is("item", 1)).await, ["second"]);
}

const OUTBOX: &str = "[sink.hook.outbox]\ntable = \"public.outbox\"\nkey_column = \"aggregate\"\n\
                      headers_column = \"headers\"\nmessage_prefix = \"outbox.\"\n";

/// Statements that write events `from` to `to` - 1 of the aggregates a0, a1 and a2, in turn.
fn events(from: u32, to: u32) -> String {
    let event = |id: u32| {
        let a = id % 3;
        format!("insert into outbox values ({id}, 'a{a}', null, '{{\"a\": {a}, \"n\": {id}}}')")
    };
    (from..to).map(event).collect::<Vec<_>>().join(";")
}

/// The numbers of an aggregate's events in the order of their arrival.
fn numbers(changes: &[Value], aggregate: u64) -> Vec<u64> {
    let own = changes.iter().filter(|change| change["a"] == aggregate);
    own.map(|change| change["n"].as_u64().unwrap()).collect()
}

#[tokio::test]
async fn events_of_an_aggregate_wait_behind_one_that_is_refused_also_over_a_restart() {
    let options = format!("attempts_max = 100000\nbatch_changes_max = 5\n{OUTBOX}");
    let mut scene = Scene::set(&options).await;
    scene.hook.refuse(|change| change["n"] == 1);
    scene.cluster.sql(&events(0, 9)).await;
    let message = "select pg_logical_emit_message(true, 'outbox.#a1', '{\"a\": 1, \"n\": 9}')";
    scene.cluster.sql(message).await;
    scene.hook.wait_until(|seen| seen.len() >= 6).await;
    scene.wait_parked(4, 0).await;
    scene.wait_sink("all is recorded", |sink| sink["recorded"] == sink["cursor"]).await;
    scene.server.kill();
    scene.server.start_ready().await;
    scene.cluster.sql(&events(10, 16)).await;
    scene.hook.wait_until(|seen| seen.len() >= 10).await;
    scene.wait_parked(6, 0).await;
    let seen = scene.hook.changes();
    assert_eq!(numbers(&seen, 0), [0, 3, 6, 12, 15]);
    assert_eq!(numbers(&seen, 1), [0; 0]);
    assert_eq!(numbers(&seen, 2), [2, 5, 8, 11, 14]);
    scene.hook.refuse_nothing();
    scene.wait_parked(0, 0).await;
    assert_eq!(numbers(&scene.hook.changes(), 1), [1, 4, 7, 9, 10, 13], "in their order");
}

#[tokio::test]
async fn lanes_keep_the_order_of_each_aggregate() {
    let options = format!("lanes = 4\nbatch_changes_max = 50\nattempts_max = 100000\n{OUTBOX}");
    let scene = Scene::set(&options).await;
    scene.hook.refuse(|change| change["n"] == 31);
    for round in 0..10 {
        scene.cluster.sql(&events(round * 30, round * 30 + 30)).await;
    }
    scene.hook.wait_until(|seen| seen.len() >= 210).await;
    scene.hook.refuse_nothing();
    scene.wait_parked(0, 0).await;
    for aggregate in 0..3 {
        let mut seen = numbers(&scene.hook.changes(), aggregate);
        seen.dedup();
        let all: Vec<u64> = (0..300).filter(|n| n % 3 == aggregate).collect();
        assert_eq!(seen, all, "aggregate {aggregate}");
    }
}

#[tokio::test]
async fn an_event_on_which_its_headers_fail_holds_its_aggregate() {
    let scene = Scene::set(OUTBOX).await;
    let bad = "insert into outbox values (1, 'a1', '[1]', '{\"a\": 1, \"n\": 1}')";
    scene.cluster.sql(&format!("{bad}; {}", events(2, 6))).await;
    scene.hook.wait_until(|seen| seen.len() >= 3).await;
    scene.wait_parked(2, 1).await;
    assert_eq!(numbers(&scene.hook.changes(), 1), [0; 0]);
    scene.walrace(&["dlq", "edit", "hook:0", "--set", "headers=null"]);
    scene.wait_parked(0, 0).await;
    assert_eq!(numbers(&scene.hook.changes(), 1), [1, 4]);
}

#[tokio::test]
async fn the_key_that_rules_give_links_tables_and_counts_for_what_was_parked_before_it() {
    let mut scene = Scene::set("attempts_max = 100000").await;
    scene.hook.refuse(is("item", 1));
    scene.cluster.sql("insert into item values (1, 'x'), (2, 'y')").await;
    scene.wait_parked(1, 0).await;
    scene.restart_with("attempts_max = 100000\nmessage_key = \"record.v\"").await;
    scene
        .cluster
        .sql("insert into other values (1, 'x'), (2, 'y'); update item set v = 'z' where id = 1")
        .await;
    scene.values(1, is("other", 2)).await;
    scene.wait_parked(3, 0).await;
    scene.cluster.sql("insert into other values (3, 'z'), (4, 'w')").await;
    scene.values(1, is("other", 4)).await;
    scene.wait_parked(4, 0).await;
    scene.hook.refuse_nothing();
    scene.wait_parked(0, 0).await;
    let order: Vec<u64> =
        scene.hook.changes().iter().filter_map(|change| change["offset"].as_u64()).collect();
    assert_eq!(order, [1, 3, 6, 0, 2, 4, 5], "each by its row and by its message's key");
}

#[tokio::test]
async fn an_edited_change_keeps_the_order_of_its_old_key_and_of_its_new_one() {
    let scene = Scene::set("attempts_max = 1").await;
    scene.hook.refuse(|change| change["after"]["v"] == "bad" || change["after"]["id"] == 2);
    scene.cluster.sql("insert into item values (1, 'bad'), (9, 'free')").await;
    scene.wait_parked(1, 1).await;
    scene.cluster.sql("update item set v = 'one' where id = 1").await;
    scene.wait_parked(2, 1).await;
    scene.walrace(&["dlq", "edit", "hook:0", "--set", "id=2", "--set", "v=moved"]);
    scene.wait_parked(2, 1).await;
    scene
        .cluster
        .sql("insert into item values (2, 'two'); update item set v = 'on' where id = 9")
        .await;
    assert_eq!(scene.values(2, is("item", 9)).await, ["free", "on"]);
    scene.wait_parked(3, 1).await;
    scene.hook.refuse_nothing();
    scene.walrace(&["dlq", "retry", "hook:0"]);
    scene.wait_parked(0, 0).await;
    let seen = scene.hook.changes();
    let values: Vec<&str> = seen.iter().map(|c| c["after"]["v"].as_str().unwrap()).collect();
    assert_eq!(values, ["free", "on", "moved", "one", "two"]);
}

#[tokio::test]
async fn a_change_leaves_the_lot_when_all_of_its_parts_are_there() {
    let rules = "batch = false\nattempts_max = 100000\n[[sink.hook.transform]]\n\
                 explode = \"record.v.split(',')\"\nas = \"item\"\n";
    let scene = Scene::set(rules).await;
    scene.hook.refuse(|change| change["after"]["item"] == "b");
    scene.cluster.sql("insert into item values (1, 'a,b,c')").await;
    // Each attempt brings the part before the refused one.
    scene.hook.wait_until(|seen| seen.len() >= 4).await;
    scene.wait_parked(1, 0).await;
    scene.hook.refuse_nothing();
    scene.wait_parked(0, 0).await;
    let seen = scene.hook.changes();
    let parts: Vec<&str> = seen.iter().map(|c| c["after"]["item"].as_str().unwrap()).collect();
    assert!(parts.ends_with(&["a", "b", "c"]), "{parts:?}");
    assert_eq!(parts.iter().filter(|part| **part == "c").count(), 1, "{parts:?}");
}

#[tokio::test]
async fn no_half_of_a_refused_retry_vouches_for_the_other_over_a_kill() {
    let cluster = Cluster::start().await;
    let target = "create schema copy; create table copy.item (id int primary key, v text);
                  alter table copy.item add constraint c check (id > 100)";
    cluster.sql(&format!("{TABLES}; {target}")).await;
    let mut server = Server::new(&format!(
        "{}tables = [\"public.item\"]\n[sink.copy]\nkind = \"postgres\"\nurl = \"{}\"\n\
         table = \"copy.{{table}}\"\non_refusal = \"park\"\nattempts_max = 100000\n\
         retry_ms_min = 10\nretry_ms_max = 10\n",
        source_toml("app", &cluster.unix_url()),
        cluster.url()
    ));
    let parked = async |server: &Server, count: u64| {
        let probe = async || {
            let status: Value = serde_json::from_str(&server.try_get("/status").await?.1).ok()?;
            (status["sinks"][0]["parked_changes"] == count).then_some(())
        };
        wait_for(PATIENCE, probe, || format!("{count} parked: {}", server.log_tail())).await;
    };
    server.start_ready().await;
    let insert = "insert into public.item select i, 'x' from generate_series(1, 4) i";
    cluster.sql(&format!("{insert}; insert into public.item values (101, 'y')")).await;
    parked(&server, 4).await;
    // Durably: what is not would come anew after the kill, and be no retry.
    let written = async || {
        let (_, letters) = server.try_get("/dead-letters?sink=copy").await?;
        let letters: Vec<Value> = serde_json::from_str(&letters).ok()?;
        (letters.len() == 4).then_some(())
    };
    wait_for(PATIENCE, written, || format!("4 written down: {}", server.log_tail())).await;
    server.kill();
    let mended = "alter table copy.item drop constraint c;
                  alter table copy.item add constraint c check (id <> 3)";
    cluster.sql(mended).await;
    // The first goes alone, the next two together; those are refused, half of them is taken, and
    // that is all.
    server.start_to_die_at("deliver::after_retry:2");
    server.wait_exit(PATIENCE).await;
    let there = async || cluster.value("select array_agg(id order by id) from copy.item").await;
    assert_eq!(there().await, json!([1, 2, 101]));
    server.start_ready().await;
    parked(&server, 1).await;
    assert_eq!(there().await, json!([1, 2, 4, 101]));
    cluster.sql("alter table copy.item drop constraint c").await;
    parked(&server, 0).await;
    assert_eq!(there().await, json!([1, 2, 3, 4, 101]));
}
