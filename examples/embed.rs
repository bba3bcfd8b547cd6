//! A Rust program that embeds Walrace: it reads committed changes from a bounded queue, in commit
//! order, and goes on where it was after a restart.
//!
//! ```sh
//! DATABASE_URL=postgres://walrace:secret@localhost:5432/app cargo run --example embed
//! ```
#![allow(clippy::print_stdout, reason = "it is what the example does")]

use std::time::Duration;

use walrace::{
    config::Config,
    error::{Class, Classify, Result},
    runtime::Walrace,
};

/// `DATABASE_URL` makes the source, so the file only has to name the queue.
const CONFIG: &str = r#"
data_dir = "embed-data"

[sink.mine]
kind = "queue"
capacity = 1000
"#;

#[tokio::main]
async fn main() -> Result<()> {
    let walrace = Walrace::start(Config::parse(CONFIG, "embed.rs")?).await?;
    let mut queue = walrace.subscribe("mine")?.linger(Duration::from_millis(50));
    loop {
        let delivery = tokio::select! {
            delivery = queue.next(100) => delivery,
            _ = tokio::signal::ctrl_c() => break,
            stopped = until_stopped(&walrace) => {
                walrace.stop().await;
                return stopped;
            }
        };
        let Some(delivery) = delivery else { break };
        for change in &delivery.changes {
            let table = change.table.as_ref().map(|table| table.full_name());
            println!("{:>8} {} {}", change.offset, change.op.word(), table.unwrap_or_default());
        }
        // Only the program that keeps its own place needs the token; Walrace keeps one anyway.
        println!("resume with {}", walrace.token(&delivery)?);
    }
    queue.done(); // what was handed out is dealt with; without it, it comes again
    drop(queue);
    walrace.stop().await;
    Ok(())
}

/// Returns when a source cannot be captured until a person acts.
async fn until_stopped(walrace: &Walrace) -> Result<()> {
    loop {
        let status = walrace.status();
        if let Some(source) = status.sources.iter().find(|source| source.state.is_stopped()) {
            let reason = source.state.reason().unwrap_or_default();
            return Err(reason).class(Class::Config, || format!("source {}", source.name));
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}
