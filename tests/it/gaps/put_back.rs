//! A server that was put back, or is another than it was.

use crate::{
    gaps::{PATIENCE, Scene, fill, ids, insert},
    kit::{Cluster, Stop},
};

/// A scene of 100 rows, put back to a time when there were 50: the identifier and the timeline of
/// the server stay as they are.
async fn put_back() -> Scene {
    let mut scene = Scene::set().await;
    scene.insert(0..50).await;
    scene.arrived().await;
    scene.stop().await;
    let backup = scene.cluster.snapshot().await;
    scene.goes_on(50..100).await;
    scene.stop().await;
    scene.cluster.restore(&backup).await;
    assert_eq!(scene.cluster.value("select count(*) from t").await, 50);
    scene
}

const REMEDY: &str = "--accept-gap";

#[tokio::test]
async fn a_server_that_was_put_back_stops_the_source_until_the_gap_is_accepted() {
    let mut scene = put_back().await;
    let words = ["put back", "its log ends at", "missing from the journal", REMEDY];
    scene.refused(&words).await;
    scene.accept(&[], &["put back"]);
    scene.goes_on(1000..1010).await;
}

#[tokio::test]
async fn a_server_that_was_put_back_and_has_since_written_more_than_we_had_is_noticed() {
    let mut scene = put_back().await;
    // Its log ends beyond our progress now, with rows that lie below it.
    insert(&scene.cluster, 200..220).await;
    fill(&scene.cluster, 20_000).await;
    insert(&scene.cluster, 220..240).await;
    let words = ["put back", "has written another history", "did not happen there", REMEDY];
    scene.refused(&words).await;
    scene.accept(&[], &["put back"]);
    scene.server.start_ready().await;
    let all = |seen: &[serde_json::Value]| (200..240).all(|id| ids(seen).contains(&id));
    scene.file.wait_until(PATIENCE, all).await;
    scene.insert(1000..1010).await;
    scene.arrived().await;
    // The history before the gap is not compared again.
    scene.server.kill();
    scene.cluster.restart(Stop::Immediate).await;
    scene.goes_on(1010..1020).await;
}

#[tokio::test]
async fn rows_that_the_journal_has_and_a_server_that_was_put_back_lacks_are_noticed() {
    let mut scene = put_back().await;
    fill(&scene.cluster, 20_000).await; // nothing of ours, but more log than we had
    scene.refused(&["put back", "the server lacks transaction", REMEDY]).await;
}

#[tokio::test]
async fn a_put_back_server_is_noticed_although_the_journal_had_nothing_since() {
    let mut scene = Scene::set().await;
    scene.stop().await;
    let backup = scene.cluster.snapshot().await;
    scene.server.start_ready().await;
    fill(&scene.cluster, 1_000).await;
    scene.confirmed().await;
    scene.stop().await;
    scene.cluster.restore(&backup).await;
    insert(&scene.cluster, 0..5).await; // below our progress
    fill(&scene.cluster, 20_000).await;
    scene.refused(&["put back", "the journal lacks transaction", REMEDY]).await;
}

#[tokio::test]
async fn a_data_dir_that_was_put_back_finds_the_slot_ahead_of_it() {
    let mut scene = Scene::set().await;
    scene.insert(0..10).await;
    scene.arrived().await;
    scene.stop().await;
    let (data, copy) = (scene.server.path("data"), scene.server.path("backup"));
    copy_folder(&data, &copy);
    scene.goes_on(10..20).await;
    scene.stop().await;
    std::fs::remove_dir_all(&data).unwrap();
    copy_folder(&copy, &data);
    std::fs::remove_file(scene.server.path("lake.jsonl")).unwrap();
    scene.refused(&["was moved ahead to", "the journal ends at", REMEDY]).await;
    scene.accept(&[], &["was moved ahead to"]);
}

fn copy_folder(from: &std::path::Path, to: &std::path::Path) {
    let copied = std::process::Command::new("cp").arg("-a").args([from, to]).status().unwrap();
    assert!(copied.success());
}

#[tokio::test]
async fn a_crash_of_the_server_that_takes_the_slot_back_is_no_gap() {
    let mut scene = Scene::set().await;
    for round in 0..4 {
        scene.insert(round * 100..round * 100 + 100).await;
        scene.arrived().await;
        scene.server.kill();
        scene.cluster.restart(if round % 2 == 0 { Stop::Immediate } else { Stop::Kill }).await;
        scene.server.start_ready().await;
    }
    scene.goes_on_running(1000..1010).await;
    scene.assert_each_once();
}

#[tokio::test]
async fn a_clock_that_jumps_is_no_gap() {
    let mut scene = Scene::set().await;
    // The commit time of a transaction with an origin is what its session says.
    let session = scene.cluster.connect().await;
    session
        .batch_execute(
            "select pg_replication_origin_create('clock');
             select pg_replication_origin_session_setup('clock')",
        )
        .await
        .unwrap();
    for (id, time) in [(1, "2031-01-01"), (2, "2001-01-01"), (3, "2026-06-01"), (4, "1999-01-01")] {
        session
            .batch_execute(&format!(
                "begin; select pg_replication_origin_xact_setup('0/{id}', '{time}');
                 insert into t values ({id}); commit"
            ))
            .await
            .unwrap();
    }
    let all = |seen: &[serde_json::Value]| ids(seen) == [1, 2, 3, 4];
    scene.file.wait_until(PATIENCE, all).await;
    drop(session);
    scene.server.kill();
    scene.cluster.restart(Stop::Immediate).await;
    scene.goes_on(10..20).await;
    scene.assert_each_once();
}

#[tokio::test]
async fn a_copy_of_the_server_that_went_its_own_way_is_noticed() {
    let mut scene = Scene::set().await;
    scene.insert(0..50).await;
    scene.arrived().await;
    scene.stop().await;
    let copy: Cluster = scene.cluster.copy().await;
    scene.goes_on(50..100).await;
    scene.stop().await;
    insert(&copy, 500..600).await;
    fill(&copy, 20_000).await;
    scene.lead_to(&copy, "");
    scene.refused(&["copy that went its own way", REMEDY]).await;
}
