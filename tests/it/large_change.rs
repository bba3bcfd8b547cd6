//! A change for which the configuration allows no memory.

use std::time::Duration;

use crate::kit::{Cluster, FileRecorder, Server, source_toml, wait_for};

const VALUE_BYTES: u64 = 120 << 20;

fn config(cluster: &Cluster, change_bytes_max: u64) -> String {
    let source = source_toml("app", &cluster.unix_url());
    format!(
        "{source}change_bytes_max = {change_bytes_max}\n\n\
         [sink.lake]\nkind = \"file\"\npath = \"lake.jsonl\"\n"
    )
}

/// The largest resident size of the server so far.
fn peak_bytes(server: &Server) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

#[tokio::test]
async fn a_change_above_the_limit_stops_its_source_unread_and_passes_once_the_limit_is_raised() {
    let cluster = Cluster::start().await;
    cluster.sql("create table docs (id int primary key, body text)").await;
    cluster.sql("alter table docs alter body set storage external").await;
    let mut server = Server::new(&config(&cluster, 2 << 20));
    server.start_ready().await;
    let large = format!("insert into docs values (2, repeat('x', {VALUE_BYTES}))");
    for insert in ["insert into docs values (1, 'a')", &large, "insert into docs values (3, 'c')"] {
        cluster.sql(insert).await;
    }
    let told = async || {
        let (code, body) = server.get("/ready").await;
        let why = format!("a change of public.docs has {}", VALUE_BYTES / 10_000_000);
        (code == 503 && body.contains(&why) && body.contains("change_bytes_max")).then_some(())
    };
    let limit = Duration::from_secs(60);
    wait_for(limit, told, || format!("it never says why it stopped:\n{}", server.log())).await;
    assert!(server.log().contains("raise `change_bytes_max`"));
    let file = FileRecorder::new(server.path("lake.jsonl"));
    file.wait_until(limit, |seen| seen.len() == 1).await;
    let peak = peak_bytes(&server);
    assert!(peak < VALUE_BYTES, "{peak} bytes were taken for a change that is refused");

    assert!(server.stop().await.success());
    server.set_config(&config(&cluster, 256 << 20));
    server.start_ready().await;
    let seen = file.wait_until(limit, |seen| seen.len() == 3).await;
    let lengths = seen.iter().map(|change| change["after"]["body"].as_str().unwrap().len());
    assert_eq!(lengths.collect::<Vec<_>>(), [1, VALUE_BYTES as usize, 1]);
    let peak = peak_bytes(&server);
    println!("a change of {VALUE_BYTES} bytes took {peak} bytes");
    assert!(peak < 5 * VALUE_BYTES, "{peak} bytes were taken");
    assert!(server.stop().await.success());
}
