//! Slots that are lost, made anew, moved or given up by the server.

use crate::{
    gaps::{PATIENCE, Scene, holds, insert},
    kit::{Answer, Cluster, Recorder, Server, Setup, Stop, source_toml, wait_for},
};

const REMEDY: &str = "--accept-gap";
const DROP: &str = "select pg_drop_replication_slot('walrace_app')";
const CREATE: &str = "select pg_create_logical_replication_slot('walrace_app', 'pgoutput')";

#[tokio::test]
async fn a_lost_slot_stops_the_source_until_the_gap_is_accepted() {
    let mut scene = Scene::set().await;
    scene.insert(0..10).await;
    scene.arrived().await;
    scene.stop().await;
    scene.cluster.sql(DROP).await;
    insert(&scene.cluster, 100..110).await;
    scene.refused(&["the slot `walrace_app` is gone", "to now", REMEDY]).await;
    assert_eq!(scene.cluster.value("select count(*) from pg_replication_slots").await, 0);
    scene.accept(&[], &["is gone"]);
    scene.goes_on(1000..1010).await;
}

#[tokio::test]
async fn a_slot_that_was_made_anew_under_the_same_name_is_a_gap() {
    let mut scene = Scene::set().await;
    scene.insert(0..10).await;
    scene.arrived().await;
    scene.stop().await;
    scene.cluster.sql(DROP).await;
    insert(&scene.cluster, 100..110).await;
    scene.cluster.sql(CREATE).await;
    scene.refused(&["made anew", "the journal ends at", REMEDY]).await;
    scene.accept(&[], &["made anew"]);
    scene.goes_on(1000..1010).await;
}

#[tokio::test]
async fn a_slot_that_was_made_anew_at_once_is_a_gap_too() {
    let mut scene = Scene::set().await;
    scene.insert(0..10).await;
    scene.arrived().await;
    scene.stop().await;
    scene.cluster.sql(DROP).await;
    scene.cluster.sql(CREATE).await;
    scene.refused(&["made anew", REMEDY]).await;
}

#[tokio::test]
async fn a_slot_that_another_reader_moved_is_a_gap_with_its_range() {
    let mut scene = Scene::set().await;
    scene.insert(0..10).await;
    scene.arrived().await;
    scene.stop().await;
    insert(&scene.cluster, 100..110).await;
    let moved = "select end_lsn::text
                 from pg_replication_slot_advance('walrace_app', pg_current_wal_lsn())";
    let to = scene.cluster.value(moved).await;
    scene.refused(&["was moved ahead to", to.as_str().unwrap(), REMEDY]).await;
    scene.accept(&[], &["was moved ahead to"]);
    scene.goes_on(1000..1010).await;
}

const SMALL: &str = "max_slot_wal_keep_size = 1MB\nmin_wal_size = 32MB\nmax_wal_size = 32MB";

/// Writes more log than the server keeps, and has it looked at.
async fn overrun(cluster: &Cluster) {
    for _ in 0..4 {
        super::fill(cluster, 100_000).await;
        cluster.sql("select pg_switch_wal()").await;
    }
    cluster.sql("checkpoint").await;
    let lost = "select wal_status = 'lost' from pg_replication_slots";
    holds(cluster, lost).await;
}

#[tokio::test]
async fn a_slot_whose_log_the_server_removed_names_the_range() {
    let setup = Setup { settings: SMALL.into(), ..Setup::default() };
    let mut scene = Scene::with(setup, "").await;
    scene.insert(0..10).await;
    scene.arrived().await;
    scene.stop().await;
    overrun(&scene.cluster).await;
    let words = ["was invalidated", "to now", "max_slot_wal_keep_size", REMEDY];
    scene.refused(&words).await;
    scene.accept(&[], &["was invalidated"]);
    scene.goes_on(1000..1010).await;
}

#[tokio::test]
async fn a_slot_that_is_lost_while_a_transaction_holds_its_log_is_named_in_flight() {
    let setup = Setup { settings: SMALL.into(), ..Setup::default() };
    let mut scene = Scene::with(setup, "").await;
    scene.insert(0..10).await;
    scene.arrived().await;
    // It keeps the log back to where it began, while the stream goes on.
    let holder = scene.cluster.connect().await;
    holder.batch_execute("begin; insert into t values (-1)").await.unwrap();
    overrun(&scene.cluster).await;
    scene.stopped(&["was invalidated", "to now", "max_slot_wal_keep_size", REMEDY]).await;
    holder.batch_execute("rollback").await.unwrap();
    scene.stop().await;
    scene.accept(&[], &["was invalidated"]);
    scene.goes_on(1000..1010).await;
}

#[tokio::test]
async fn a_slot_that_was_idle_for_too_long_is_named() {
    let mut scene = Scene::with(Setup { version: Some(18), ..Setup::default() }, "").await;
    scene.insert(0..10).await;
    scene.arrived().await;
    scene.stop().await;
    let sql = "alter system set idle_replication_slot_timeout = '1s'";
    scene.cluster.connect().await.batch_execute(sql).await.unwrap();
    scene.cluster.reload().await;
    let idle = async || {
        scene.cluster.sql("checkpoint").await;
        let reason = "select invalidation_reason from pg_replication_slots";
        (scene.cluster.value(reason).await == "idle_timeout").then_some(())
    };
    wait_for(PATIENCE, idle, || "it is never given up".into()).await;
    scene.refused(&["idle_timeout", "idle_replication_slot_timeout", "to now", REMEDY]).await;
    scene.accept(&[], &["idle_timeout"]);
    scene.goes_on(1000..1010).await;
}

#[tokio::test]
async fn wal_level_that_was_lowered_is_named_and_then_the_slot_that_had_to_go_for_it() {
    let mut scene = Scene::set().await;
    scene.insert(0..10).await;
    scene.arrived().await;
    scene.stop().await;
    scene.cluster.sql(DROP).await; // the server does not start with it
    scene.cluster.configure("wal_level = replica");
    scene.cluster.restart(Stop::Fast).await;
    scene.server.start();
    assert!(!scene.server.wait_exit(PATIENCE).await.success());
    assert!(scene.server.log().contains("ALTER SYSTEM SET wal_level = logical"));
    let (ok, said) = scene.walrace(&["check"]);
    assert!(!ok && said.contains("wal_level"), "{said}");
    scene.cluster.configure("wal_level = logical");
    scene.cluster.restart(Stop::Fast).await;
    scene.refused(&["is gone", REMEDY]).await;
    scene.accept(&[], &["is gone"]);
    scene.goes_on(1000..1010).await;
}

/// Nobody reads the slot while the journal is full, so only who asks for it hears of it.
#[tokio::test]
async fn a_slot_that_is_lost_while_capture_is_paused_is_named_although_nobody_reads_it() {
    let setup = Setup { settings: SMALL.into(), ..Setup::default() };
    let cluster = Cluster::with(setup).await;
    cluster.sql("create table t (id int primary key, v text)").await;
    let hook = Recorder::start().await;
    hook.always(Answer::Refuse(503));
    let source = source_toml("app", &cluster.unix_url());
    let mut server = Server::new(&format!(
        "{source}\n[sink.hook]\nkind = \"webhook\"\nurl = \"{}\"\nretain = \"always\"\n\n\
         [journal]\nsegment_bytes_max = 65536\nbytes_max = 200000\n",
        hook.url()
    ));
    server.start_ready().await;
    let named = async |words: &[&str]| {
        let said = async || {
            let (code, body) = server.try_get("/ready").await?;
            (code == 503 && words.iter().all(|word| body.contains(word))).then_some(())
        };
        wait_for(PATIENCE, said, || server.log()).await;
    };
    for block in 0..5 {
        insert(&cluster, block * 20_000..block * 20_000 + 20_000).await;
    }
    named(&["capture is paused", "journal.bytes_max"]).await;
    overrun(&cluster).await;
    named(&["capture is paused", "was invalidated", "missing from the journal", REMEDY]).await;
    assert!(server.log().contains("the slot of source app was invalidated"));
}
