//! Failovers and recoveries, each with two real servers: those that go on, and those that do not.

use crate::{
    gaps::{PATIENCE, Scene, holds, insert},
    kit::{Cluster, Setup, Stop, wait_for},
};

const REMEDY: &str = "--accept-gap";

/// Waits until `standby` has replayed all that `primary` has written.
pub(super) async fn caught_up(primary: &Cluster, standby: &Cluster) {
    let end = primary.value("select pg_current_wal_lsn()::text").await;
    let end = end.as_str().unwrap();
    holds(standby, &format!("select pg_last_wal_replay_lsn() >= '{end}'")).await;
}

#[tokio::test]
async fn a_promoted_standby_without_the_slot_stops_the_source_and_names_the_gap() {
    let mut scene = Scene::set().await;
    scene.insert(0..10).await;
    scene.arrived().await;
    scene.stop().await;
    scene.cluster.sql("create table no_slot_yet ()").await;
    let standby = scene.cluster.standby().await;
    // The copy of a stopped server has its slots; a base backup has none.
    let drop = "select pg_drop_replication_slot(slot_name) from pg_replication_slots";
    scene.server.start_ready().await;
    scene.insert(10..20).await;
    scene.arrived().await;
    caught_up(&scene.cluster, &standby).await;
    insert(&scene.cluster, 500..510).await;
    caught_up(&scene.cluster, &standby).await;
    scene.cluster.down(Stop::Immediate);
    scene.server.kill();
    standby.promote().await;
    standby.sql(drop).await;
    scene.lead_to(&standby, "");
    scene.refused(&["is gone", "failed over to a standby", "to now", REMEDY]).await;
    scene.accept(&[], &["failed over to a standby"]);
    scene.server.start_ready().await;
    scene.insert_at(&standby, 1000..1010).await;
    scene.arrived().await;
}

#[tokio::test]
async fn a_promoted_standby_that_lacks_what_the_journal_has_has_diverged() {
    let mut scene = Scene::set().await;
    scene.insert(0..10).await;
    scene.arrived().await;
    scene.stop().await;
    let mut standby = scene.cluster.standby().await;
    standby.configure("primary_conninfo = ''");
    standby.restart(Stop::Fast).await; // it follows nobody now
    scene.goes_on(10..20).await;
    scene.stop().await;
    scene.cluster.down(Stop::Fast);
    standby.promote().await;
    super::fill(&standby, 20_000).await; // beyond our progress, on its own timeline
    scene.lead_to(&standby, "");
    let words = ["diverged", "timeline 2 left timeline 1", "did not happen there", REMEDY];
    scene.refused(&words).await;
    scene.accept(&[], &["diverged"]);
    scene.server.start_ready().await;
    scene.insert_at(&standby, 1000..1010).await;
    scene.arrived().await;
}

/// PostgreSQL 17 and later keep the slot on a standby that synchronises it.
#[tokio::test]
async fn a_failover_slot_carries_on_at_the_promoted_standby_with_no_gap() {
    let settings = "hot_standby_feedback = on".into();
    let mut cluster = Cluster::with(Setup {
        version: Some(Cluster::default_version_from(17)),
        settings,
        ..Setup::default()
    })
    .await;
    cluster.sql("select pg_create_physical_replication_slot('twin')").await;
    let standby =
        cluster.standby_with("primary_slot_name = 'twin'\nsync_replication_slots = on").await;
    // Nothing reaches us that the standby might lack.
    cluster.configure("synchronized_standby_slots = 'twin'");
    cluster.reload().await;
    let mut scene = Scene::of(cluster, "").await;
    scene.insert(0..100).await;
    scene.arrived().await;
    let synced = "select count(*) = 1 from pg_replication_slots
                  where slot_name = 'walrace_app' and synced and not temporary
                    and invalidation_reason is null";
    let ready = async || {
        // An idle primary writes no record of its running transactions, which the sync waits for.
        scene.cluster.sql("select pg_log_standby_snapshot()").await;
        (standby.value(synced).await == true).then_some(())
    };
    wait_for(PATIENCE, ready, || "the slot is never synchronised".into()).await;
    scene.insert(100..200).await;
    scene.arrived().await;
    scene.insert(200..300).await; // in flight
    caught_up(&scene.cluster, &standby).await;
    scene.cluster.down(Stop::Immediate);
    standby.promote().await;
    scene.insert_at(&standby, 300..400).await;
    scene.server.kill();
    scene.lead_to(&standby, "");
    scene.server.start_ready().await;
    scene.insert_at(&standby, 400..500).await;
    scene.arrived().await;
    scene.assert_each_once();
    let (_, said) = scene.walrace(&["journal", "info"]);
    assert!(!said.contains("GAP"), "{said}");
}

/// A base backup and an archive, recovered to a point that has all that the journal has: the slot
/// is not part of a backup, so it is made anew, and that gap is named.
#[tokio::test]
async fn a_recovery_to_a_point_below_our_progress_has_diverged() {
    let mut scene = Scene::set().await;
    let archive = scene.cluster.folder("archive");
    let to = archive.display(); // a file that is there is whole
    let command = format!("archive_command = 'cp %p {to}/.part && mv {to}/.part {to}/%f'");
    scene.cluster.configure(&format!("archive_mode = on\n{command}"));
    scene.insert(0..10).await;
    scene.arrived().await;
    scene.stop().await;
    let backup = scene.cluster.snapshot().await;
    insert(&scene.cluster, 10..20).await;
    scene.cluster.sql("select pg_create_restore_point('here')").await;
    scene.server.start_ready().await;
    scene.insert(20..30).await;
    scene.arrived().await;
    scene.stop().await;
    let file = "select pg_walfile_name(pg_switch_wal())";
    let file = scene.cluster.value(file).await;
    let path = archive.join(file.as_str().unwrap());
    let archived = async || path.exists().then_some(());
    wait_for(PATIENCE, archived, || "it is never archived".into()).await;
    scene.cluster.recover(&backup, &archive, "recovery_target_name = 'here'").await;
    holds(&scene.cluster, "select not pg_is_in_recovery()").await;
    assert_eq!(scene.cluster.value("select count(*) from t").await, 20);
    insert(&scene.cluster, 100..110).await;
    super::fill(&scene.cluster, 20_000).await;
    scene.refused(&["diverged", "timeline 2 left timeline 1", REMEDY]).await;
    scene.accept(&[], &["diverged"]);
    scene.goes_on(1000..1010).await;
}

#[tokio::test]
async fn a_timeline_that_switched_at_or_above_our_progress_goes_on_with_no_gap() {
    let mut scene = Scene::set().await;
    scene.insert(0..10).await;
    scene.arrived().await;
    scene.stop().await;
    let standby = scene.cluster.standby().await; // with a copy of the slot
    insert(&scene.cluster, 10..20).await;
    caught_up(&scene.cluster, &standby).await;
    scene.cluster.down(Stop::Immediate);
    standby.promote().await;
    scene.lead_to(&standby, "");
    scene.server.start_ready().await;
    scene.insert_at(&standby, 20..30).await;
    scene.arrived().await;
    let seen = scene.file.changes_so_far();
    assert_eq!(super::ids(&seen), (0..30).collect::<Vec<_>>());
    let (_, said) = scene.walrace(&["journal", "info"]);
    assert!(!said.contains("GAP"), "{said}");
}
