//! Publications that are dropped, and tables that are taken out of them.

use crate::{
    gaps::{PATIENCE, Scene, insert},
    kit::{Cluster, FileRecorder, Server, Setup, wait_for},
};

const REMEDY: &str = "--accept-gap";
const QUICK: &str = "reconcile_ms = 100\n";
/// So slow that only the stream itself can notice.
const SLOW: &str = "reconcile_ms = 3600000\n";

#[tokio::test]
async fn a_publication_that_was_dropped_meanwhile_is_a_gap_and_made_anew_on_acceptance() {
    let mut scene = Scene::set().await;
    scene.insert(0..10).await;
    scene.arrived().await;
    scene.stop().await;
    scene.cluster.sql("drop publication walrace_app").await;
    insert(&scene.cluster, 100..110).await;
    let words = ["the publication `walrace_app` was dropped", "to now", REMEDY];
    scene.refused(&words).await;
    scene.accept(&[], &["was dropped"]);
    scene.goes_on(1000..1010).await;
}

#[tokio::test]
async fn the_second_publication_is_missed_too() {
    let mut scene = Scene::set().await;
    scene.cluster.sql("create table bare (id int)").await;
    scene.stop().await;
    scene.server.start_ready().await;
    scene.stop().await;
    scene.cluster.sql("drop publication walrace_app_inserts").await;
    scene.refused(&["the publication `walrace_app_inserts` was dropped", REMEDY]).await;
}

#[tokio::test]
async fn a_publication_that_was_dropped_and_made_anew_meanwhile_is_a_gap() {
    let mut scene = Scene::set().await;
    scene.insert(0..10).await;
    scene.arrived().await;
    scene.stop().await;
    scene.cluster.sql("drop publication walrace_app").await;
    insert(&scene.cluster, 100..110).await;
    scene.cluster.sql("create publication walrace_app for table t").await;
    scene.refused(&["dropped and made anew", "to now", REMEDY]).await;
    scene.accept(&[], &["dropped and made anew"]);
    scene.goes_on(1000..1010).await;
}

async fn dropped_in_flight(version: Option<u32>, keys: &str, words: &[&str]) {
    let mut scene = Scene::with(Setup { version, ..Setup::default() }, keys).await;
    scene.insert(0..10).await;
    scene.arrived().await;
    scene.confirmed().await;
    scene.cluster.sql("drop publication walrace_app").await;
    insert(&scene.cluster, 100..110).await;
    scene.stopped(words).await;
    scene.named_by_commands(&["the publication `walrace_app` was dropped", "to now", REMEDY]);
    scene.stop().await;
    scene.accept(&[], &["was dropped"]);
    scene.goes_on(1000..1010).await;
}

#[tokio::test]
async fn a_publication_that_is_dropped_in_flight_stops_the_stream() {
    dropped_in_flight(None, SLOW, &["walrace_app", REMEDY]).await;
}

#[tokio::test]
async fn a_server_that_only_warns_of_a_missing_publication_is_heard() {
    let words = ["PostgreSQL does not send what is committed", "walrace_app", REMEDY];
    dropped_in_flight(Some(18), SLOW, &words).await;
}

#[tokio::test]
async fn a_publication_that_is_dropped_is_noticed_without_any_change() {
    let scene = Scene::with(Setup::default(), QUICK).await;
    scene.confirmed().await;
    scene.cluster.sql("drop publication walrace_app").await;
    scene.stopped(&["the publication `walrace_app` was dropped", REMEDY]).await;
}

#[tokio::test]
async fn a_table_that_somebody_takes_out_in_flight_stops_the_source() {
    let mut scene = Scene::with(Setup::default(), QUICK).await;
    scene.cluster.sql("create table other (id int primary key)").await;
    scene.insert(0..10).await;
    scene.arrived().await;
    scene.confirmed().await;
    scene.cluster.sql("alter publication walrace_app drop table t").await;
    insert(&scene.cluster, 100..110).await;
    let words = ["somebody took public.t out of the publication", REMEDY];
    scene.stopped(&words).await;
    scene.named_by_commands(&words);
    scene.stop().await;
    scene.accept(&[], &["took public.t out"]);
    scene.goes_on(1000..1010).await;
}

#[tokio::test]
async fn a_table_that_was_taken_out_meanwhile_is_a_gap() {
    let mut scene = Scene::set().await;
    scene.insert(0..10).await;
    scene.arrived().await;
    scene.stop().await;
    scene.cluster.sql("alter publication walrace_app drop table t").await;
    insert(&scene.cluster, 100..110).await;
    scene.refused(&["somebody took public.t out of the publication", REMEDY]).await;
    scene.accept(&[], &["took public.t out"]);
    scene.goes_on(1000..1010).await;
}

#[tokio::test]
async fn a_table_that_was_taken_out_and_put_back_meanwhile_is_a_gap() {
    let mut scene = Scene::set().await;
    scene.insert(0..10).await;
    scene.arrived().await;
    scene.stop().await;
    scene.cluster.sql("alter publication walrace_app drop table t").await;
    insert(&scene.cluster, 100..110).await;
    scene.cluster.sql("alter publication walrace_app add table t").await;
    scene.refused(&["somebody took public.t out of the publication", REMEDY]).await;
}

#[tokio::test]
async fn a_table_that_its_owner_takes_out_of_his_own_publication_is_told_and_the_rest_goes_on() {
    let cluster = Cluster::start().await;
    cluster.sql("create table other (id int primary key)").await;
    cluster.sql("create publication theirs for table other").await;
    let keys = format!("{QUICK}publication = \"theirs\"\ntables = [\"public.other\"]\n");
    let mut scene = Scene::of(cluster, &keys).await;
    scene.cluster.sql("alter publication theirs add table t").await;
    scene.insert(0..10).await;
    scene.arrived().await;
    scene.cluster.sql("alter publication theirs drop table other").await;
    let told = async || scene.server.log().contains("took the table out").then_some(());
    wait_for(PATIENCE, told, || scene.server.log()).await;
    scene.goes_on_running(1000..1010).await;
}

#[tokio::test]
async fn tables_that_are_dropped_renamed_or_not_wanted_any_more_are_no_gap() {
    let mut scene = Scene::with(Setup::default(), QUICK).await;
    let sql = "create table a (id int primary key); create table b (id int primary key)";
    scene.cluster.sql(sql).await;
    super::holds(
        &scene.cluster,
        "select count(*) = 3 from pg_publication_tables where pubname = 'walrace_app'",
    )
    .await;
    scene.stop().await;
    scene.server.start_ready().await;
    scene.cluster.sql("drop table a; alter table b rename to c").await;
    scene.goes_on_running(0..10).await;
    scene.stop().await;
    let keys = format!("{QUICK}tables = [\"public.t\"]\n");
    scene.server.set_config(&super::config(&scene.cluster.unix_url(), &keys));
    scene.goes_on(10..20).await;
}

#[tokio::test]
async fn a_publication_that_is_younger_than_the_slot_is_a_gap_that_can_be_accepted() {
    for version in [None, Some(18)] {
        let cluster = Cluster::with(Setup { version, ..Setup::default() }).await;
        cluster.sql("create table t (id int primary key, v text)").await;
        let slot = "select pg_create_logical_replication_slot('walrace_app', 'pgoutput')";
        cluster.sql(slot).await;
        insert(&cluster, 0..10).await;
        cluster.sql("create publication walrace_app for table t").await;
        let mut server = Server::new(&super::config(&cluster.unix_url(), ""));
        server.start();
        let file = FileRecorder::new(server.path("lake.jsonl"));
        let refused = async || server.log().contains(REMEDY).then_some(());
        wait_for(PATIENCE, refused, || server.log()).await;
        server.kill();
        let mut scene = Scene::at_rest(cluster, server, file);
        scene.named_by_commands(&["was not there yet", "to now", REMEDY]);
        scene.accept(&[], &["was not there yet"]);
        scene.goes_on(1000..1010).await;
    }
}
