//! The checks on connect: whether the server still has the history that the journal begins.

use walrace::{
    change::{Gap, Position},
    config::Postgres,
    error::{Class, Error},
    source::{Known, postgres},
};

use crate::{
    kit::{Cluster, Setup, Stop, wait_for},
    source::{PATIENCE, Reading, config, lsn},
};

const SLOT: &str = "select confirmed_flush_lsn from pg_replication_slots";

async fn accept(config: &Postgres, known: &Known) -> Result<Gap, Error> {
    let accepted = postgres::accept_gap("app", config, known.clone(), None).await;
    accepted.map(|accepted| accepted.gap)
}

async fn refused(config: &Postgres, known: &Known) -> Error {
    Reading::open(config, known.clone()).await.err().expect("it must not open")
}

/// Opens once the server has noticed that the last reader is gone.
async fn reopened(config: &Postgres, known: &Known) -> Reading {
    let open = async || match Reading::open(config, known.clone()).await {
        Ok(reading) => Some(reading),
        Err(error) => {
            assert_eq!(error.class(), Class::Retry, "{error}");
            None
        }
    };
    wait_for(PATIENCE, open, || "it does not open again".into()).await
}

async fn free(cluster: &Cluster) {
    let inactive = async || {
        (cluster.value("select count(*) from pg_replication_slots where active").await == 0)
            .then_some(())
    };
    wait_for(PATIENCE, inactive, || "the slot is not freed".into()).await;
}

/// A cluster with a table, and what a journal knows that has its first row.
async fn begun(setup: Setup) -> (Cluster, Known) {
    let cluster = Cluster::with(setup).await;
    cluster.sql("create table t (id int primary key)").await;
    let mut reading = Reading::begin(&cluster).await;
    cluster.sql("insert into t values (1)").await;
    reading.take(1).await;
    let known = reading.known();
    drop(reading);
    free(&cluster).await;
    (cluster, known)
}

fn assert_config(error: &Error, words: &[&str]) {
    assert_eq!(error.class(), Class::Config, "{error}");
    for word in words {
        assert!(error.to_string().contains(word), "`{word}` is not in: {error}");
    }
}

#[tokio::test]
async fn a_slot_that_another_process_reads_is_waited_for() {
    let (cluster, known) = begun(Setup::default()).await;
    let first = reopened(&config(&cluster.unix_url()), &known).await;
    let error = refused(&config(&cluster.unix_url()), &known).await;
    assert_eq!(error.class(), Class::Retry, "{error}");
    assert!(error.to_string().contains("pid "), "{error}");
    drop(first);
    reopened(&config(&cluster.unix_url()), &known).await;
}

#[tokio::test]
async fn a_slot_that_is_gone_stops_the_source_until_the_gap_is_accepted() {
    let (cluster, known) = begun(Setup::default()).await;
    let config = config(&cluster.unix_url());
    cluster.sql("select pg_drop_replication_slot('walrace_app'); insert into t values (2)").await;
    let error = refused(&config, &known).await;
    assert_config(&error, &["walrace_app", "gone", "--accept-gap", "to now"]);
    let count = cluster.value("select count(*) from pg_replication_slots").await;
    assert_eq!(count, 0, "it was recreated silently");
    let gap = accept(&config, &known).await.unwrap();
    assert_eq!(Some(gap.from), known.progress);
    assert!(gap.to > gap.from);
    let known = Known { progress: Some(gap.to), ..known };
    let mut reading = reopened(&config, &known).await;
    cluster.sql("insert into t values (3)").await;
    assert_eq!(reading.take(1).await[0].after.as_ref().unwrap().as_bytes(), b"\0\x01t\0\0\0\x013");
}

#[tokio::test]
async fn a_slot_ahead_of_the_journal_is_a_named_gap() {
    let (cluster, known) = begun(Setup::default()).await;
    let config = config(&cluster.unix_url());
    cluster.sql("insert into t values (2)").await;
    cluster.sql("select pg_replication_slot_advance('walrace_app', pg_current_wal_lsn())").await;
    let ahead = lsn(&cluster, SLOT).await;
    let from = known.progress.unwrap().lsn;
    let error = refused(&config, &known).await;
    assert_config(&error, &["ahead", &format!("{from} to {ahead}"), "--accept-gap"]);
    let gap = accept(&config, &known).await.unwrap();
    assert_eq!((gap.from.lsn, gap.to.lsn), (from, ahead));
    let known = Known { progress: Some(gap.to), ..known };
    reopened(&config, &known).await;
    let error = accept(&config, &known).await.unwrap_err();
    assert_config(&error, &["no gap"]);
}

#[tokio::test]
async fn another_cluster_database_or_slot_is_refused_by_name() {
    let (cluster, known) = begun(Setup::default()).await;
    let other = Cluster::with(Setup { own_identity: true, ..Setup::default() }).await;
    let error = refused(&config(&other.unix_url()), &known).await;
    let system = known.origin.as_ref().unwrap().system.clone();
    assert_config(&error, &["system identifier", &system]);
    cluster.sql("create database second").await;
    let url = cluster.unix_url().replace("/postgres?", "/second?");
    assert_config(
        &refused(&config(&url), &known).await,
        &["`walrace_app` belongs to the database `postgres`"],
    );
    let slot = Postgres { slot: Some("another".into()), ..config(&cluster.unix_url()) };
    assert_config(&refused(&slot, &known).await, &["the slot `walrace_app`", "`another`"]);
    let accepted = accept(&slot, &known).await.unwrap_err();
    assert_config(&accepted, &["another"]);
}

#[tokio::test]
async fn a_server_that_was_put_back_is_noticed() {
    let mut cluster = Cluster::start().await;
    cluster.sql("create table t (id int primary key)").await;
    drop(Reading::begin(&cluster).await);
    let backup = cluster.snapshot().await;
    let mut reading = Reading::begin(&cluster).await;
    cluster.sql("insert into t select generate_series(1, 5000)").await;
    reading.take(5000).await;
    let known = reading.known();
    drop(reading);
    cluster.restore(&backup).await;
    let error = refused(&config(&cluster.unix_url()), &known).await;
    let progress = known.progress.unwrap().lsn.to_string();
    assert_config(&error, &["put back", &progress]);
}

#[tokio::test]
async fn a_promoted_standby_continues_from_at_or_above_progress_and_else_diverged() {
    let (mut cluster, mut known) = begun(Setup::default()).await;
    let standby = cluster.standby().await;
    // Only the primary has this, once the standby has lost its connection.
    let upstream = standby.connect().await;
    upstream.batch_execute("alter system set primary_conninfo = ''").await.unwrap();
    upstream.batch_execute("select pg_reload_conf()").await.unwrap();
    let alone = async || {
        (cluster.value("select count(*) from pg_stat_replication").await == 0).then_some(())
    };
    wait_for(PATIENCE, alone, || "the standby still follows".into()).await;
    let mut reading = reopened(&config(&cluster.unix_url()), &known).await;
    cluster.sql("insert into t values (2)").await;
    reading.take(1).await;
    let ahead = reading.known();
    drop(reading);
    cluster.down(Stop::Fast);
    standby.promote().await;
    standby
        .sql(
            "select pg_drop_replication_slot(slot_name) from pg_replication_slots;
              select pg_create_logical_replication_slot('walrace_app', 'pgoutput')",
        )
        .await;
    let error = refused(&config(&standby.unix_url()), &ahead).await;
    assert_config(
        &error,
        &["diverged", "timeline 2 left timeline 1", &ahead.progress.unwrap().lsn.to_string()],
    );
    // Progress at the switch itself continues on the new timeline.
    let history =
        std::fs::read_to_string(standby.data_dir().join("pg_wal/00000002.history")).unwrap();
    let switch = history.split_whitespace().nth(1).unwrap().parse().unwrap();
    known.progress = Some(Position { timeline: 1, lsn: switch, index: 0 });
    let error = refused(&config(&standby.unix_url()), &known).await;
    // The new slot begins behind the switch: that is a gap, and no divergence.
    assert_config(&error, &["ahead"]);
    let gap = accept(&config(&standby.unix_url()), &known).await.unwrap();
    assert_eq!(gap.to.timeline, 2);
    known.progress = Some(gap.to);
    let mut reading = reopened(&config(&standby.unix_url()), &known).await;
    standby.sql("insert into t values (9)").await;
    assert_eq!(reading.take(1).await.len(), 1);
    assert_eq!(reading.position.unwrap().timeline, 2);
}

#[tokio::test]
async fn a_slot_whose_log_is_gone_says_so_and_can_be_accepted() {
    let settings = "max_slot_wal_keep_size = 1MB\nmin_wal_size = 32MB\nmax_wal_size = 32MB".into();
    let (cluster, known) = begun(Setup { settings, ..Setup::default() }).await;
    for _ in 0..4 {
        cluster
            .sql(
                "select pg_switch_wal();
             create table if not exists fill as select generate_series(1, 100000);
             drop table fill",
            )
            .await;
    }
    cluster.sql("checkpoint").await;
    let lost = cluster.value("select wal_status from pg_replication_slots").await;
    assert_eq!(lost, "lost");
    let config = config(&cluster.unix_url());
    assert_config(&refused(&config, &known).await, &["invalidated", "--accept-gap"]);
    let gap = accept(&config, &known).await.unwrap();
    reopened(&config, &Known { progress: Some(gap.to), ..known }).await;
}

#[tokio::test]
async fn a_slot_of_the_wrong_kind_is_refused() {
    let cluster = Cluster::start().await;
    cluster
        .sql(
            "select pg_create_physical_replication_slot('physical');
              select pg_create_logical_replication_slot('test', 'test_decoding')",
        )
        .await;
    for (slot, word) in [("physical", "physical"), ("test", "test_decoding")] {
        let config = Postgres { slot: Some(slot.into()), ..config(&cluster.unix_url()) };
        assert_config(&refused(&config, &Known::default()).await, &[word]);
    }
}

#[tokio::test]
async fn a_server_without_logical_wal_or_free_slots_says_what_to_set() {
    let settings = "wal_level = replica".into();
    let replica = Cluster::with(Setup { settings, ..Setup::default() }).await;
    let error = refused(&config(&replica.unix_url()), &Known::default()).await;
    assert_config(&error, &["wal_level", "ALTER SYSTEM SET wal_level = logical"]);
    let settings = "max_replication_slots = 1".into();
    let full = Cluster::with(Setup { settings, ..Setup::default() }).await;
    full.sql("select pg_create_physical_replication_slot('taken')").await;
    let error = refused(&config(&full.unix_url()), &Known::default()).await;
    assert_config(&error, &["max_replication_slots"]);
}
