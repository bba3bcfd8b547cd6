//! Another cluster or another database in the place of the one that filled the journal.

use crate::{
    gaps::{Scene, insert},
    kit::{Cluster, Setup},
};

const REMEDY: &str = "--accept-gap";

async fn other() -> Cluster {
    let cluster = Cluster::with(Setup { own_identity: true, ..Setup::default() }).await;
    cluster.sql("create table t (id int primary key, v text)").await;
    cluster
}

async fn identifier(cluster: &Cluster) -> String {
    let id = "select system_identifier::text from pg_control_system()";
    cluster.value(id).await.as_str().unwrap().to_owned()
}

/// Refused as another cluster, accepted only by its name, and then it goes on with it.
async fn continued_by(scene: &mut Scene, other: &Cluster) {
    let id = identifier(other).await;
    scene.lead_to(other, "");
    let words = ["system identifier", &id, "pg_upgrade", "--cluster"];
    scene.refused(&words).await;
    let (accepted, said) = scene.walrace(&["source", "create", "app", "--accept-gap"]);
    assert!(!accepted && said.contains("--cluster"), "{said}");
    let (accepted, said) =
        scene.walrace(&["source", "create", "app", "--accept-gap", "--cluster", "1"]);
    assert!(!accepted && said.contains(&id), "{said}");
    scene.accept(&["--cluster", &id], &["continues what the cluster"]);
    scene.server.start_ready().await;
    scene.insert_at(other, 1000..1010).await;
    scene.arrived().await;
    scene.stop().await;
    scene.server.start_ready().await;
    scene.insert_at(other, 1010..1020).await;
    scene.arrived().await;
}

#[tokio::test]
async fn a_database_that_moved_by_dump_and_restore_is_foreign_until_it_is_named() {
    let mut scene = Scene::set().await;
    scene.insert(0..10).await;
    scene.arrived().await;
    scene.stop().await;
    let other = other().await;
    insert(&other, 0..10).await;
    continued_by(&mut scene, &other).await;
}

/// pg_upgrade comes with Debian's server 15, which also upgrades to itself: a new cluster, a new
/// identifier, the log at another place, and no slot.
#[tokio::test]
async fn a_cluster_that_went_through_pg_upgrade_is_foreign_until_it_is_named() {
    let cluster = Cluster::version(15).await;
    assert!(cluster.can_upgrade(), "pg_upgrade is missing: install Debian's postgresql-15");
    let mut scene = Scene::of(cluster, "").await;
    scene.insert(0..10).await;
    scene.arrived().await;
    scene.stop().await;
    scene.cluster.sql("select pg_drop_replication_slot('walrace_app')").await;
    let setup = Setup { version: Some(15), own_identity: true, ..Setup::default() };
    let mut upgraded = Cluster::with(setup).await;
    scene.cluster.upgrade_into(&mut upgraded).await;
    assert_eq!(upgraded.value("select count(*) from t").await, 10);
    continued_by(&mut scene, &upgraded).await;
}

#[tokio::test]
async fn a_database_that_was_made_anew_is_a_gap_with_or_without_a_slot() {
    for with_slot in [false, true] {
        let cluster = Cluster::start().await;
        cluster.sql("create database app").await;
        let url = cluster.unix_url().replace("/postgres?", "/app?");
        let mut scene = Scene::of(cluster, "").await;
        scene.stop().await;
        std::fs::remove_dir_all(scene.server.path("data")).unwrap();
        scene.cluster.sql("select pg_drop_replication_slot('walrace_app')").await;
        scene.server.set_config(&super::config(&url, ""));
        let table = "create table public.t (id int primary key, v text)";
        super::execute(&url, table).await;
        scene.server.start_ready().await;
        super::execute(&url, "insert into public.t values (1)").await;
        scene.file.wait_until(super::PATIENCE, |seen| super::ids(seen) == [1]).await;
        scene.stop().await;
        scene.cluster.sql("drop database app").await;
        scene.cluster.sql("create database app").await;
        super::execute(&url, table).await;
        super::execute(&url, "create publication walrace_app for table public.t").await;
        if with_slot {
            let slot = "select pg_create_logical_replication_slot('walrace_app', 'pgoutput')";
            super::execute(&url, slot).await;
        }
        scene.refused(&["the database `app` was dropped and made anew", REMEDY]).await;
        scene.accept(&[], &["dropped and made anew"]);
        scene.server.start_ready().await;
        super::execute(&url, "insert into public.t values (7)").await;
        scene.file.wait_until(super::PATIENCE, |seen| super::ids(seen).contains(&7)).await;
    }
}

#[tokio::test]
async fn a_database_that_was_renamed_is_the_same_one() {
    let cluster = Cluster::start().await;
    cluster.sql("create database app").await;
    let url = cluster.unix_url().replace("/postgres?", "/app?");
    super::execute(&url, "create table public.t (id int primary key, v text)").await;
    let mut server = crate::kit::Server::new(&super::config(&url, ""));
    let file = crate::kit::FileRecorder::new(server.path("lake.jsonl"));
    server.start_ready().await;
    super::execute(&url, "insert into public.t values (1)").await;
    file.wait_until(super::PATIENCE, |seen| super::ids(seen) == [1]).await;
    assert!(server.stop().await.success());
    super::execute(&url, "insert into public.t values (2)").await;
    let session = cluster.connect().await;
    let gone = async || session.batch_execute("alter database app rename to shop").await.ok();
    crate::kit::wait_for(super::PATIENCE, gone, || "it is still in use".into()).await;
    let url = url.replace("/app?", "/shop?");
    server.set_config(&super::config(&url, ""));
    server.start_ready().await;
    super::execute(&url, "insert into public.t values (3)").await;
    file.wait_until(super::PATIENCE, |seen| super::ids(seen) == [1, 2, 3]).await;
}
