//! Contracts and compatibility modes: what breaks a reader is told, and held back where that is
//! asked for; nothing else is.

use std::time::Duration;

use serde_json::Value;

use crate::kit::{Cluster, Server, source_toml, wait_for};

const PATIENCE: Duration = Duration::from_secs(30);

const ORDERS: &str = "create table orders (id bigint primary key, total numeric);
    create table other (id bigint primary key)";

fn sink(name: &str, on_breach: &str) -> String {
    format!(
        "[sink.{name}]\nkind = \"file\"\npath = \"{name}.jsonl\"\non_breach = \"{on_breach}\"\n\
         retry_ms_max = 1000\n\
         [[sink.{name}.contract]]\ntable = \"public.orders\"\n\
         columns = {{ id = \"bigint\", total = \"numeric\" }}\n"
    )
}

fn plain(name: &str) -> String {
    format!("[sink.{name}]\nkind = \"file\"\npath = \"{name}.jsonl\"\nretry_ms_max = 1000\n")
}

struct Place {
    cluster: Cluster,
    server: Server,
}

impl Place {
    async fn new(more: &str) -> Self {
        let cluster = Cluster::start().await;
        cluster.sql(ORDERS).await;
        let server = Server::new(&format!("{}{more}", source_toml("app", &cluster.unix_url())));
        let mut place = Self { cluster, server };
        place.server.start_ready().await;
        place
    }

    async fn sql(&self, statements: &[&str]) {
        for statement in statements {
            self.cluster.sql(statement).await;
        }
    }

    /// Table, operation and id of everything that a sink has got.
    fn got(&self, sink: &str) -> Vec<String> {
        let path = self.server.path(format!("{sink}.jsonl"));
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let short = |change: Value| {
            let word = |name: &str| change[name].as_str().unwrap_or_default().to_owned();
            format!("{} {} {}", word("source_table"), word("op"), change["key"]["id"])
        };
        lines.map(short).collect()
    }

    async fn gets(&self, sink: &str, wanted: &[&str]) {
        let same = async || (self.got(sink) == wanted).then_some(());
        let got = || format!("{sink} has {:?}, not {wanted:?}", self.got(sink));
        wait_for(PATIENCE, same, got).await;
    }

    async fn logs(&self, text: &str) {
        let found = async || self.server.log().contains(text).then_some(());
        wait_for(PATIENCE, found, || format!("`{text}` is not in {}", self.server.log())).await;
    }

    /// What a command prints and whether it succeeded.
    fn run(&self, arguments: &[&str]) -> (bool, String) {
        let output = self.server.run(arguments);
        let text = String::from_utf8(output.stdout).unwrap();
        (output.status.success(), text + &String::from_utf8_lossy(&output.stderr))
    }

    /// Reasons of what is parked for a sink, by offset.
    fn parked(&self, sink: &str, state: &str) -> Vec<String> {
        let (_, text) = self.run(&["dlq", "list", "--sink", sink, "--state", state, "--json"]);
        let letters = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        letters.map(|letter| letter["error"].as_str().unwrap_or_default().to_owned()).collect()
    }

    async fn parks(&self, sink: &str, state: &str, count: usize) -> Vec<String> {
        let full = async || {
            let parked = self.parked(sink, state);
            (parked.len() == count).then_some(parked)
        };
        wait_for(PATIENCE, full, || format!("{:?}", self.parked(sink, state))).await
    }
}

#[tokio::test]
async fn a_broken_contract_names_its_sink_and_is_passed_held_or_dead_as_each_sink_says() {
    let sinks = [sink("careful", "hold"), sink("careless", "pass"), sink("strict", "dead_letter")];
    let mut place = Place::new(&sinks.concat()).await;
    place
        .sql(&[
            "insert into orders values (1, 1.5), (2, 2.5)",
            "alter table orders alter total type text",
            "insert into orders values (3, 'three')",
            "update orders set total = 'one' where id = 1",
            "insert into other values (1)",
            "delete from orders where id = 2",
        ])
        .await;
    let all = ["orders c 1", "orders c 2", "orders c 3", "orders u 1", "other c 1", "orders d 2"];
    let sound = ["orders c 1", "orders c 2", "other c 1"];
    place.gets("careless", &all).await;
    for sink in ["careful", "careless", "strict"] {
        let told = format!("a contract is broken: sink {sink}: total must be numeric, and is text");
        place.logs(&told).await;
    }
    place.gets("careful", &sound).await;
    let held = place.parks("careful", "parked", 3).await;
    let reason = "the schema of public.orders is not accepted: sink careful: total must be numeric";
    assert!(held[0].starts_with(reason), "{held:?}");
    assert!(held[1].starts_with("waits behind") && held[2].starts_with("waits behind"), "{held:?}");
    place.gets("strict", &sound).await;
    place.parks("strict", "dead", 3).await;
    place.server.kill();
    place.server.start_ready().await;
    place.sql(&["insert into orders values (4, 'four')", "insert into other values (2)"]).await;
    place.gets("careful", &["orders c 1", "orders c 2", "other c 1", "other c 2"]).await;
    place.parks("careful", "parked", 4).await;
    let (ok, text) = place.run(&["check"]);
    assert!(!ok && text.contains("sink careful: public.orders: total must be numeric"), "{text}");
    let (ok, text) = place.run(&["schema", "accept", "orders", "--why", "agreed"]);
    assert!(ok && text.contains("public.orders version 2 is accepted"), "{text}");
    let late = ["orders c 3", "orders u 1", "orders d 2", "orders c 4"];
    let whole: Vec<&str> =
        ["orders c 1", "orders c 2", "other c 1", "other c 2"].into_iter().chain(late).collect();
    place.gets("careful", &whole).await;
    place.gets("strict", &whole).await;
    place.sql(&["insert into orders values (5, 'five')"]).await;
    let whole: Vec<&str> = whole.into_iter().chain(["orders c 5"]).collect();
    place.gets("careful", &whole).await;
    place.parks("strict", "dead", 0).await;
}

#[tokio::test]
async fn a_version_that_is_not_compatible_is_held_for_each_sink_until_it_is_accepted() {
    let rule = "[[source.app.compatibility]]\ntables = [\"public.orders\"]\nmode = \"backward\"\n\
                on_breach = \"hold\"\n";
    let mut place = Place::new(&[rule, &plain("one"), &plain("two")].concat()).await;
    place
        .sql(&[
            "insert into orders values (1)",
            "alter table orders add note text",
            "insert into orders values (2)",
            "alter table orders add state int not null default 0",
            "insert into orders values (3)",
            "insert into other values (1)",
            "alter table orders drop column note",
            "insert into orders values (4)",
        ])
        .await;
    let sound = ["orders c 1", "orders c 2", "other c 1"];
    for sink in ["one", "two"] {
        place.gets(sink, &sound).await;
        place.parks(sink, "parked", 2).await;
    }
    place.logs("public.orders version 3: it is not backward compatible: added state").await;
    let told = place.server.log().matches("is not backward compatible").count();
    assert_eq!(told, 1, "{}", place.server.log());
    place.server.kill();
    place.server.start_ready().await;
    let (ok, text) = place.run(&["schema", "accept", "orders", "--version", "3"]);
    assert!(ok, "{text}");
    let whole = ["orders c 1", "orders c 2", "other c 1", "orders c 3", "orders c 4"];
    for sink in ["one", "two"] {
        place.gets(sink, &whole).await;
    }
    place
        .sql(&["alter table orders rename total to amount", "insert into orders values (5)"])
        .await;
    place.parks("two", "parked", 1).await;
    place.logs("added amount numeric (may be total under a new name)").await;
    let (ok, text) = place.run(&["schema", "accept", "orders", "--version", "9"]);
    assert!(!ok && text.contains("public.orders has no version 9"), "{text}");
    // A sink that reads again from the start meets the same versions, accepted and not.
    let (ok, text) = place.run(&["sink", "rewind", "one", "--to", "start"]);
    assert!(ok, "{text}");
    let again: Vec<&str> = whole.into_iter().chain(["orders c 1"]).collect();
    let comes = async || (place.got("one").len() > again.len()).then_some(());
    wait_for(PATIENCE, comes, || format!("{:?}", place.got("one"))).await;
    place.parks("one", "parked", 1).await;
    assert!(!place.got("one").contains(&"orders c 5".to_owned()));
}

#[tokio::test]
async fn a_table_split_in_three_is_seen_and_those_who_relied_on_it_are_named() {
    let place = Place::new(&[sink("ledger", "pass"), plain("other")].concat()).await;
    let split = "create table orders_eu as table orders; create table orders_us as table orders;
        create table orders_asia as table orders; drop table orders";
    std::fs::write(place.server.path("split.sql"), split).unwrap();
    let before = place.cluster.value("select count(*) from pg_class").await;
    let (ok, text) = place.run(&["schema", "check", "--sql", "split.sql"]);
    let breach = "sink ledger needs public.orders, which the source does not have";
    assert!(!ok && text.contains(breach), "{text}");
    assert!(text.contains("public.orders: dropped") && text.contains("public.orders_us: new"));
    assert_eq!(place.cluster.value("select count(*) from pg_class").await, before);
    place.sql(&["insert into orders values (1, 1)", split]).await;
    place.sql(&["alter table orders_eu add primary key (id)"]).await;
    let captured = async || {
        place.cluster.sql("insert into orders_eu select max(id) + 1 from orders_eu").await;
        place.got("other").iter().any(|change| change.starts_with("orders_eu")).then_some(())
    };
    wait_for(PATIENCE, captured, || place.server.log()).await;
    place.logs(&format!("a contract is broken: {breach}")).await;
    let (_, text) = place.run(&["schema", "list"]);
    assert!(text.contains("public.orders_eu"), "{text}");
}

#[tokio::test]
async fn a_migration_is_tried_on_copies_or_in_a_given_database_and_taken_back() {
    let rule = "[[source.app.compatibility]]\nmode = \"full\"\n";
    let place = Place::new(&[rule, &sink("ledger", "pass")].concat()).await;
    place
        .sql(&[
            "create type mood as enum ('ok'); alter table other add m mood;
             insert into orders select n, n from generate_series(1, 1000) n",
            "create database copy",
        ])
        .await;
    let try_it = |sql: &str, more: &[&str]| {
        std::fs::write(place.server.path("m.sql"), sql).unwrap();
        place.run(&[&["schema", "check", "--sql", "m.sql"], more].concat())
    };
    let (ok, text) = try_it("create index on orders (total); alter table other add n mood", &[]);
    assert!(ok && text.contains("public.other: added n public.mood"), "{text}");
    assert!(text.contains("it would break nobody"), "{text}");
    let (ok, text) = try_it("alter table orders alter total type text, add x int not null", &[]);
    assert!(!ok && text.contains("sink ledger: public.orders: total must be numeric"), "{text}");
    assert!(text.contains("public.orders is no longer full compatible: added x integer"), "{text}");
    let (ok, text) = try_it("alter table public.orders add x int", &[]);
    assert!(!ok && text.contains("must be owner of table orders"), "{text}");
    assert!(text.contains("--database"), "{text}");
    for ends in ["commit; drop table orders", "begin; alter table orders add x int; commit"] {
        let (ok, text) = try_it(ends, &[]);
        assert!(!ok && text.contains("the migration cannot run"), "{text}");
    }
    let url = place.cluster.unix_url().replace("@/postgres?", "@/copy?");
    let (ok, text) =
        try_it(&format!("{ORDERS}; alter table orders drop total"), &["--database", &url]);
    assert!(!ok && text.contains("total numeric is not there"), "{text}");
    let (ok, text) = try_it(ORDERS, &["--database", &url, "--json"]);
    let found: Value = serde_json::from_str(&text).unwrap();
    assert!(ok && found["changes"].as_array().unwrap().len() == 2, "{text}");
    // A role that is no superuser, with the rights that the documentation names.
    place
        .sql(&["create role deploy login createrole replication;
                grant create on database postgres to deploy;
                grant select on all tables in schema public to deploy"])
        .await;
    let url = place.cluster.unix_url().replace("postgres://postgres@", "postgres://deploy@");
    place.server.set_config(&[source_toml("app", &url), sink("ledger", "pass")].concat());
    let (ok, text) = try_it("alter table orders drop column total", &[]);
    assert!(!ok && text.contains("total numeric is not there"), "{text}");
    let (ok, text) = try_it("alter table other add n int", &[]);
    assert!(ok && text.contains("public.other: added n integer"), "{text}");
    let left = "select (select count(*) from pg_roles where rolname like 'walrace%')
        + (select count(*) from pg_namespace where nspname like 'walrace%')
        + (select count(*) from pg_attribute where attname in ('x', 'n') and attnum > 0
           and attrelid in ('orders'::regclass, 'other'::regclass))";
    assert_eq!(place.cluster.value(left).await, 0);
    assert_eq!(place.cluster.value("select count(*) from orders").await, 1000);
}

#[tokio::test]
async fn a_rule_that_fails_after_a_schema_change_says_so_and_keeps_the_event() {
    let rules = "[sink.double]\nkind = \"file\"\npath = \"double.jsonl\"\n\
        [[sink.double.transform]]\ntables = [\"public.orders\"]\n\
        set = { double = \"int(record.total)\" }\n";
    let place = Place::new(rules).await;
    place
        .sql(&[
            "insert into orders values (1, 1)",
            "alter table orders alter total type text",
            "insert into orders values (2, 'two')",
            "insert into other values (1)",
        ])
        .await;
    place.gets("double", &["orders c 1", "other c 1"]).await;
    let dead = place.parks("double", "dead", 1).await;
    assert!(dead[0].contains("double"), "{dead:?}");
    let (ok, text) = place.run(&["dlq", "show", "double:1"]);
    let letter: Value = serde_json::from_str(&text).unwrap();
    assert!(ok && letter["change"]["after"]["total"] == "two", "{text}");
    let (ok, text) = place.run(&["schema", "diff", "orders"]);
    assert!(ok && text.contains("retyped total: numeric to text"), "{text}");
}

#[tokio::test]
async fn a_kill_at_any_step_of_holding_and_accepting_loses_no_change_nor_its_order() {
    let mut place = Place::new(&sink("careful", "hold")).await;
    place.sql(&["insert into orders values (0, 0)"]).await;
    place.gets("careful", &["orders c 0"]).await;
    let mut wanted = vec!["orders c 0".to_owned()];
    for (number, point) in [
        "deliver::before_write",
        "deliver::after_write",
        "deliver::before_advance",
        "deliver::before_retry",
        "deliver::after_retry",
        "history::before_record",
    ]
    .into_iter()
    .enumerate()
    {
        let id = number + 1;
        place.server.kill();
        place.server.start_to_die_at(point);
        place
            .sql(&[
                // another version each time, of which nothing was accepted
                &format!("alter table orders alter total type varchar({})", 30 + number),
                &format!("insert into orders values ({id}, 'a')"),
                "update orders set total = 'b' where id = 0",
                &format!("delete from orders where id = {id}"),
            ])
            .await;
        wanted.extend([format!("orders c {id}"), "orders u 0".into(), format!("orders d {id}")]);
        let died = async || {
            place.run(&["schema", "accept", "orders"]);
            (!place.server.is_running()).then_some(())
        };
        wait_for(PATIENCE, died, || format!("{point} is never reached")).await;
        place.server.wait_exit(PATIENCE).await;
        place.server.start_ready().await;
        let there = async || {
            place.run(&["schema", "accept", "orders"]);
            (place.got("careful").len() >= wanted.len()).then_some(())
        };
        wait_for(PATIENCE, there, || point.to_owned()).await;
        assert_eq!(place.got("careful"), wanted, "{point}");
    }
}
