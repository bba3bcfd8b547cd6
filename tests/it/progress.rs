//! Who has what when something unusual happens to it: a sink that is released for want of disk, a
//! target that was put back, a target that asks to wait, an offset that is not there.

use std::{fs, time::Duration};

use serde_json::Value;
use walrace::{error::Class, runtime::Walrace};

use crate::{
    config_cdc::{configured, id, take},
    kit::{Answer, Cluster, FileRecorder, Recorder, Scratch, Server, source_toml, wait_for},
};

const PATIENCE: Duration = Duration::from_secs(30);
const TABLE: &str = "create table t (id int primary key, v text)";

async fn sink(server: &Server, name: &str) -> Option<Value> {
    let status: Value = serde_json::from_str(&server.try_get("/status").await?.1).ok()?;
    status["sinks"].as_array()?.iter().find(|sink| sink["name"] == name).cloned()
}

fn offsets(changes: &[Value]) -> Vec<u64> {
    changes.iter().map(|change| change["offset"].as_u64().unwrap()).collect()
}

#[tokio::test]
async fn a_released_sink_goes_on_behind_its_lost_range_and_no_other_notices() {
    let cluster = Cluster::start().await;
    cluster.sql(TABLE).await;
    let hook = Recorder::start().await;
    hook.always(Answer::Hang);
    let mut server = Server::new(&format!(
        "{}\n[journal]\nbytes_max = 262144\nsegment_bytes_max = 65536\n\n\
         [sink.lake]\nkind = \"file\"\npath = \"lake.jsonl\"\n\n\
         [sink.hook]\nkind = \"webhook\"\nurl = \"{}\"\nretry_ms_max = 200\n\
         timeout_ms = 500\n",
        source_toml("app", &cluster.unix_url()),
        hook.url()
    ));
    server.start_ready().await;
    let file = FileRecorder::new(server.path("lake.jsonl"));
    let noise = "string_agg(md5(random()::text), '')";
    for round in 0..40 {
        let (from, to) = (round * 20, round * 20 + 19);
        cluster
            .sql(&format!(
                "insert into t select id, (select {noise} from generate_series(1, 30 + id % 2))
                 from generate_series({from}, {to}) id"
            ))
            .await;
    }
    let lost = async || {
        let lost = sink(&server, "hook").await?["lost_changes"].as_u64()?;
        // Within its limit the journal releases no more, and what was lost is settled.
        let within = server.metric("walrace_journal_bytes", &[]).await? <= 262_144.0;
        (lost > 0 && within && file.changes_so_far().len() == 800).then_some(())
    };
    wait_for(PATIENCE, lost, || "the hook was not released".to_owned()).await;
    assert_eq!(offsets(&file.changes()), (0..800).collect::<Vec<_>>());
    hook.always(Answer::Accept);
    let seen = hook.wait_until(|seen| offsets(seen).last() == Some(&799)).await;
    let lost = sink(&server, "hook").await.unwrap()["lost_changes"].as_u64().unwrap();
    assert_eq!(offsets(&seen), (lost..800).collect::<Vec<_>>(), "all but the lost range, once");
    cluster.sql("insert into t values (800, '')").await;
    file.wait_until(PATIENCE, |seen| seen.len() == 801).await;
    assert_eq!(sink(&server, "lake").await.unwrap()["lost_changes"], 0);
}

#[tokio::test]
async fn a_target_that_was_put_back_is_filled_again() {
    let cluster = Cluster::start().await;
    cluster.sql(TABLE).await;
    let mut server = Server::new(&format!(
        "{}\n[sink.lake]\nkind = \"file\"\npath = \"lake.jsonl\"\n",
        source_toml("app", &cluster.unix_url())
    ));
    let file = FileRecorder::new(server.path("lake.jsonl"));
    let both = ["lake.jsonl", "lake.jsonl.walrace"];
    server.start_ready().await;
    cluster.sql("insert into t select generate_series(0, 9)").await;
    file.wait_until(PATIENCE, |seen| seen.len() == 10).await;
    assert!(server.stop().await.success());
    for name in both {
        fs::copy(server.path(name), server.path(format!("{name}.copy"))).unwrap();
    }
    server.start_ready().await;
    cluster.sql("insert into t select generate_series(10, 19)").await;
    file.wait_until(PATIENCE, |seen| seen.len() == 20).await;
    assert!(server.stop().await.success());
    for name in both {
        fs::copy(server.path(format!("{name}.copy")), server.path(name)).unwrap();
    }
    server.start_ready().await;
    cluster.sql("insert into t values (20)").await;
    let seen = file.wait_until(PATIENCE, |seen| seen.len() >= 21).await;
    assert_eq!(offsets(&seen), (0..21).collect::<Vec<_>>());
    // It is written after the line that was waited for.
    let sidecar = || fs::read_to_string(server.path("lake.jsonl.walrace")).unwrap();
    let new_epoch = async || sidecar().contains("\"epoch\":2").then_some(());
    wait_for(PATIENCE, new_epoch, || format!("what falls is a new epoch: {}", sidecar())).await;
    let recorded = async || (sink(&server, "lake").await?["recorded"] == 21).then_some(());
    wait_for(PATIENCE, recorded, || "the progress is not recorded".to_owned()).await;
}

#[tokio::test]
async fn a_target_that_asks_to_wait_is_left_alone_for_so_long() {
    let cluster = Cluster::start().await;
    cluster.sql(TABLE).await;
    let hook = Recorder::start().await;
    let headers = vec![("retry-after".to_owned(), "3".to_owned())];
    hook.next([Answer::RefuseWith { status: 429, headers, body: String::new() }]);
    let mut server = Server::new(&format!(
        "{}\n[sink.hook]\nkind = \"webhook\"\nurl = \"{}\"\nretry_ms_min = 1\n",
        source_toml("app", &cluster.unix_url()),
        hook.url()
    ));
    server.start_ready().await;
    cluster.sql("insert into t values (1)").await;
    hook.wait_until_asked(1).await;
    let asked = std::time::Instant::now();
    hook.wait_until(|seen| seen.len() == 1).await;
    assert!(asked.elapsed() > Duration::from_secs(2), "{:?}", asked.elapsed());
}

#[tokio::test]
async fn an_offset_that_is_not_there_is_refused_before_it_is_remembered() {
    let cluster = Cluster::start().await;
    cluster.sql("create table t (id int primary key)").await;
    let folder = Scratch::new("offset");
    let queue = |from: &str| format!("[sink.q]\nkind = \"queue\"\nfrom = {from}\n");
    let wrong = configured(&queue("7"), &cluster, folder.path());
    let refused = Walrace::start(wrong).await.unwrap_err();
    assert_eq!(refused.class(), Class::Config, "{refused}");
    assert!(refused.to_string().contains("cannot begin at offset 7"), "{refused}");
    let right = configured(&queue("0"), &cluster, folder.path());
    let walrace = Walrace::start(right).await.unwrap();
    let mut queue = walrace.subscribe("q").unwrap();
    let running = async || walrace.status().sources[0].state.is_running().then_some(());
    wait_for(PATIENCE, running, || format!("{:?}", walrace.status())).await;
    cluster.sql("insert into t values (1)").await;
    assert_eq!(id(&take(&mut queue, 1).await.changes[0]), 1);
    queue.done();
    walrace.stop().await;
}
