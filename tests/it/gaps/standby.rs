//! A standby as source, with its primary under load: PostgreSQL 16 and later.

use walrace::{
    change::{Lsn, Position},
    config::Postgres,
    error::Class,
};

use super::failover::caught_up;
use crate::{
    gaps::{PATIENCE, Scene, insert},
    kit::{Cluster, Server, Setup, Stop, wait_for},
    source::{Reading, config},
};

const REMEDY: &str = "--accept-gap";

/// A primary with a table, and a standby that keeps the rows its readers need.
async fn pair() -> (Cluster, Cluster) {
    let mut primary = Cluster::with(Setup { version: Some(modern()), ..Setup::default() }).await;
    primary.sql("create table t (id int primary key, v text)").await;
    primary.sql("select pg_create_physical_replication_slot('twin')").await;
    let settings = "primary_slot_name = 'twin'\nhot_standby_feedback = on
                    wal_receiver_status_interval = 1s";
    let standby = primary.standby_with(settings).await;
    caught_up(&primary, &standby).await;
    (primary, standby)
}

/// The suite's version, where that can decode on a standby.
fn modern() -> u32 {
    Cluster::default_version_from(16)
}

/// The keys of a source whose url leads to a standby of `primary`.
fn of(primary: &Cluster) -> String {
    format!("primary_url = {:?}\nreconcile_ms = 200\n", primary.unix_url())
}

/// The scene of a standby as source, running. Its `cluster` is the standby, so rows are inserted
/// with `insert_at`.
async fn scene() -> (Cluster, Scene) {
    let (primary, standby) = pair().await;
    let scene = Scene::over(standby, &of(&primary)).await;
    (primary, scene)
}

#[tokio::test]
async fn all_changes_of_a_loaded_primary_arrive_through_its_standby() {
    let (primary, mut scene) = scene().await;
    for round in 0..20 {
        scene.insert_at(&primary, round * 100..round * 100 + 100).await;
    }
    primary.sql("create table later (id int primary key)").await;
    let published = "select count(*) = 2 from pg_publication_tables
                     where pubname = 'walrace_app'";
    super::holds(&primary, published).await;
    primary.sql("insert into later values (1)").await;
    scene.arrived().await;
    scene.file.wait_for_text(PATIENCE, "\"later\"").await;
    scene.server.kill();
    scene.insert_at(&primary, 5000..5100).await;
    scene.server.start_ready().await;
    scene.arrived().await;
    scene.assert_each_once();
    assert_eq!(primary.value("select count(*) from pg_replication_slots").await, 1, "only `twin`");
    let slots = "select count(*) from pg_replication_slots where slot_name = 'walrace_app'";
    assert_eq!(scene.cluster.value(slots).await, 1);
    let (ready, said) = scene.walrace(&["check"]);
    assert!(ready && said.contains("its primary answers"), "{said}");
}

#[tokio::test]
async fn a_standby_that_is_promoted_in_flight_goes_on_with_no_gap() {
    let (mut primary, mut scene) = scene().await;
    scene.insert_at(&primary, 0..100).await;
    scene.arrived().await;
    scene.insert_at(&primary, 100..2000).await;
    caught_up(&primary, &scene.cluster).await;
    primary.down(Stop::Immediate);
    scene.cluster.promote().await;
    scene.insert(2000..2100).await;
    scene.arrived().await;
    assert_eq!(scene.cluster.value("select count(*) from t").await, 2100);
    let told = "went from timeline 1 to 2";
    assert!(scene.server.log().contains(told), "{}", scene.server.log());
    // What was read on the new timeline is known to be of it.
    scene.server.kill();
    scene.insert(2100..2200).await;
    scene.server.start_ready().await;
    scene.arrived().await;
    scene.assert_each_once();
    let (_, said) = scene.walrace(&["journal", "info"]);
    assert!(!said.contains("GAP"), "{said}");
    assert!(said.contains("progress     2:"), "{said}");
}

#[tokio::test]
async fn rows_that_the_primary_vacuumed_away_invalidate_the_slot_and_that_is_named() {
    let (primary, mut scene) = scene().await;
    scene.insert_at(&primary, 0..10).await;
    scene.arrived().await;
    scene.confirmed().await;
    scene.cluster.configure("hot_standby_feedback = off");
    scene.cluster.reload().await;
    let free = "select xmin is null and catalog_xmin is null from pg_replication_slots
                where slot_name = 'twin'";
    super::holds(&primary, free).await;
    primary.sql("create table gone (id int); drop table gone").await;
    let session = primary.connect().await;
    session.batch_execute("vacuum full pg_class").await.unwrap();
    insert(&primary, 10..20).await;
    let words = ["was invalidated", "to now", "hot_standby_feedback = on", REMEDY];
    scene.stopped(&words).await;
    scene.named_by_commands(&words);
    scene.stop().await;
    scene.cluster.configure("hot_standby_feedback = on");
    scene.cluster.reload().await;
    scene.accept(&[], &["was invalidated"]);
    scene.server.start_ready().await;
    scene.insert_at(&primary, 1000..1010).await;
    scene.arrived().await;
}

#[tokio::test]
async fn without_the_primary_the_publication_is_made_by_hand() {
    let (primary, standby) = pair().await;
    let mut server = Server::new(&super::config(&standby.unix_url(), ""));
    server.start();
    assert!(!server.wait_exit(PATIENCE).await.success());
    for word in ["publication `walrace_app` is missing", "standby", "primary_url"] {
        assert!(server.log().contains(word), "no {word} in {}", server.log());
    }
    primary.sql("create publication walrace_app for table t").await;
    caught_up(&primary, &standby).await;
    server.start();
    let running = async || {
        primary.sql("select pg_log_standby_snapshot()").await;
        (server.try_get("/ready").await?.0 == 200).then_some(())
    };
    wait_for(PATIENCE, running, || server.log()).await;
    insert(&primary, 0..10).await;
    let file = crate::kit::FileRecorder::new(server.path("lake.jsonl"));
    file.wait_until(PATIENCE, |seen| super::ids(seen).len() == 10).await;
}

#[tokio::test]
async fn a_standby_of_a_version_that_cannot_decode_there_is_refused_with_the_reason() {
    let mut primary = Cluster::version(15).await;
    let standby = primary.standby().await;
    let mut server = Server::new(&super::config(&standby.unix_url(), &of(&primary)));
    server.start();
    assert!(!server.wait_exit(PATIENCE).await.success());
    for word in ["leads to a standby", "PostgreSQL 15", "16"] {
        assert!(server.log().contains(word), "no {word} in {}", server.log());
    }
}

#[tokio::test]
async fn a_standby_that_is_behind_the_journal_is_waited_for_and_no_gap() {
    let (primary, standby) = pair().await;
    let keys = Postgres {
        primary_url: Some(walrace::config::Secret::new(primary.unix_url())),
        ..config(&standby.unix_url())
    };
    let mut reading = Reading::open(&keys, walrace::source::Known::default()).await.unwrap();
    insert(&primary, 0..1).await;
    reading.take(1).await;
    let mut known = reading.known();
    drop(reading);
    let free = "select not active from pg_replication_slots where slot_name = 'walrace_app'";
    super::holds(&standby, free).await;
    let Position { timeline, lsn, index } = known.progress.unwrap();
    known.progress = Some(Position { timeline, lsn: Lsn(lsn.0 + (1 << 30)), index });
    let error = Reading::open(&keys, known).await.err().unwrap();
    assert_eq!(error.class(), Class::Retry, "{error}");
    assert!(error.to_string().contains("waiting until it follows"), "{error}");
}
