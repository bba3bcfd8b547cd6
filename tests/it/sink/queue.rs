use serde_json::json;
use tokio::task::JoinSet;
use walrace::{error::Class, sink};

use super::{batch, context, delivers};

#[tokio::test]
async fn a_program_that_embeds_walrace_reads_what_a_sink_delivers() {
    let context = context();
    let config = serde_json::from_value(json!({"kind": "queue", "capacity": 8})).unwrap();
    let mut sink = sink::open("changes", &config, &context).unwrap();
    let mut subscription = context.queues.subscribe("changes").unwrap();
    let mut deliver = JoinSet::new();
    deliver.spawn(async move {
        assert_eq!(sink.open().await.unwrap(), None);
        for start in [0, 20] {
            delivers(&mut *sink, &batch(start..start + 20)).await;
        }
    });
    let mut seen = Vec::new();
    while let Some(delivery) = subscription.next(3).await {
        assert!((1..=3).contains(&delivery.changes.len()));
        assert_eq!(delivery.lineage, context.lineage);
        assert_eq!(delivery.cursor, delivery.changes.last().unwrap().offset + 1);
        seen.extend(delivery.changes.iter().map(|change| change.offset));
    }
    deliver.join_next().await.unwrap().unwrap();
    assert_eq!(seen, (0..40).collect::<Vec<_>>());
}

#[test]
fn a_queue_without_room_is_refused() {
    let config = serde_json::from_value(json!({"kind": "queue", "capacity": 0})).unwrap();
    let error = sink::open("changes", &config, &context()).expect_err("a refusal");
    assert_eq!(error.class(), Class::Config, "{error}");
}
