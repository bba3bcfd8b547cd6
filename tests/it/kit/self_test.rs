//! The kit's own tests: a tool that lies makes every test above it worthless.

use std::time::{Duration, Instant};

use super::*;

#[tokio::test]
async fn a_cluster_starts_from_its_template_and_stops_with_the_test() {
    drop(Cluster::start().await); // makes the template, where this is the first test
    let begin = Instant::now();
    let cluster = Cluster::start().await;
    let took = begin.elapsed();
    assert!(took < Duration::from_secs(5), "a start from the template took {took:?}");
    cluster.sql("create table t(id int primary key); insert into t values (1), (2)").await;
    assert_eq!(
        cluster.rows("table t order by id").await,
        [serde_json::json!({"id": 1}), serde_json::json!({"id": 2})]
    );
    assert_eq!(cluster.value("select current_setting('wal_level')").await, "logical");
    let folder = cluster.data_dir();
    drop(cluster);
    assert!(!folder.exists());
}

#[tokio::test]
async fn a_cluster_comes_back_after_each_kind_of_stop_and_from_a_snapshot() {
    let mut cluster = Cluster::start().await;
    cluster.sql("create table t(id int primary key); insert into t values (1)").await;
    for how in [Stop::Fast, Stop::Immediate, Stop::Kill] {
        cluster.restart(how).await;
        assert_eq!(cluster.value("select count(*) from t").await, 1);
    }
    let snapshot = cluster.snapshot().await;
    cluster.sql("insert into t values (2)").await;
    cluster.restore(&snapshot).await;
    assert_eq!(cluster.value("select count(*) from t").await, 1);
}

#[tokio::test]
async fn a_standby_is_promoted_to_a_timeline_of_its_own() {
    let mut primary = Cluster::start().await;
    primary.sql("create table t(id int primary key)").await;
    let standby = primary.standby().await;
    primary.sql("insert into t values (1)").await;
    let arrived = async || (standby.value("select count(*) from t").await == 1).then_some(());
    wait_for(Duration::from_secs(20), arrived, || "the row is not on the standby".into()).await;
    standby.promote().await;
    standby.sql("insert into t values (2)").await;
    standby.sql("checkpoint").await;
    let timeline = standby.value("select timeline_id from pg_control_checkpoint()").await;
    assert_eq!(timeline, 2);
}

#[tokio::test]
async fn the_oldest_and_the_newest_server_start() {
    for version in [14, 18] {
        let cluster = Cluster::version(version).await;
        let number = cluster.value("select current_setting('server_version_num')::int").await;
        assert_eq!(number.as_u64().map(|n| n / 10_000), Some(version.into()));
    }
}

#[tokio::test]
async fn a_cluster_can_have_an_identity_of_its_own() {
    let usual = Cluster::start().await;
    let other = Cluster::with(Setup { own_identity: true, ..Setup::default() }).await;
    let query = "select system_identifier::text from pg_control_system()";
    assert_ne!(usual.value(query).await, other.value(query).await);
}

#[test]
fn what_a_killed_test_leaves_behind_is_cleared_away() {
    let scratch = Scratch::new("self");
    let folder = scratch.path().to_owned();
    let mut sleeper = std::process::Command::new("sleep").arg("600").spawn().unwrap();
    scratch.note("sleeper", sleeper.id());
    drop(scratch); // the watchdog sees the same: its pipe closes
    assert!(!folder.exists());
    assert!(!sleeper.wait().unwrap().success());
}
