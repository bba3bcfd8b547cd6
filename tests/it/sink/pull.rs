use std::{collections::BTreeSet, sync::Arc, time::Duration};

use serde_json::{Value as Json, json};
use tempfile::TempDir;
use tokio::task::JoinSet;
use uuid::Uuid;
use walrace::{
    change::{Batch, Before, Change, Op, Row, Value},
    config,
    error::Class,
    sink::{self, Beyond, Context, Progress, Pulled, Sink, Stream, Verdict, Written},
};

use super::{batch, context, truncate};

const NOW: Duration = Duration::ZERO;
const LONG: Duration = Duration::from_secs(60);

/// A sink in a folder of its own, both ends.
struct Both {
    context: Context,
    config: Json,
    sink: Box<dyn Sink>,
    stream: Stream,
}

async fn begin(directory: &TempDir, more: Json) -> (Both, Option<Progress>) {
    let mut config = json!({"kind": "http_pull", "message": "native"});
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let context = Context { data_dir: directory.path().to_owned(), ..context() };
    Both::reopened(context, config).await
}

impl Both {
    async fn reopened(context: Context, config: Json) -> (Self, Option<Progress>) {
        let parsed: config::Sink = serde_json::from_value(config.clone()).unwrap();
        let mut sink = sink::open("pulled", &parsed, &context).unwrap();
        let progress = sink.open().await.unwrap();
        let config::SinkKind::HttpPull(options) = &parsed.kind else { panic!("{parsed:?}") };
        let stream = context.pulls.stream("pulled", options);
        (Self { context, config, sink, stream }, progress)
    }

    /// As after a kill: nothing is left but the file.
    async fn killed(self) -> (Self, Option<Progress>) {
        let Self { context, config, .. } = self;
        Self::reopened(Context { pulls: sink::Pulls::default(), ..context }, config).await
    }

    async fn write(&mut self, batch: &Batch, progress: Progress) -> u64 {
        match self.sink.write(batch, &progress).await.unwrap() {
            Written::All => progress.cursor,
            Written::Until(low) => low,
            other => panic!("{other:?}"),
        }
    }

    async fn receive(&self, max: usize) -> Vec<Pulled> {
        self.stream.receive(max, NOW).await.unwrap().unwrap()
    }
}

fn at(epoch: u64, cursor: u64) -> Progress {
    Progress { lineage: Uuid::from_u128(7), epoch, cursor, retry_seq: 0 }
}

fn offsets(messages: &[Pulled]) -> Vec<u64> {
    let body = |message: &Pulled| serde_json::from_slice::<Json>(&message.body).unwrap();
    messages.iter().map(|message| body(message)["offset"].as_u64().unwrap()).collect()
}

fn ids(messages: &[Pulled]) -> Vec<Uuid> {
    messages.iter().map(|message| message.ack_id).collect()
}

/// Lets it run until it first waits, then drops it, as when a client hangs up.
async fn begin_and_leave(call: impl Future) {
    let mut call = std::pin::pin!(call);
    std::future::poll_fn(|context| {
        let _ = call.as_mut().poll(context);
        std::task::Poll::Ready(())
    })
    .await;
}

/// An update of the row `id`, at `offset`.
fn update(offset: u64, old: Option<&str>, id: &str) -> Change {
    let row = |id: &str| Row::from_values([Value::Text(id.as_bytes()), Value::Text(b"v")]);
    let before = old.map_or(Before::Nothing, |old| Before::Key(row(old)));
    let change = batch(offset..offset + 1).changes.remove(0);
    Change { op: Op::Update, before, after: Some(row(id)), ..change }
}

fn of(changes: Vec<Change>) -> Batch {
    Batch { changes, position: None }
}

#[tokio::test]
async fn progress_passes_what_is_acknowledged_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let (mut both, progress) = begin(&directory, json!({})).await;
    assert_eq!(progress, None);
    assert_eq!(both.write(&batch(3..8), at(1, 9)).await, 3);
    let messages = both.receive(10).await;
    assert_eq!(offsets(&messages), [3, 4, 5, 6, 7]);
    both.stream.ack(&ids(&messages[1..3])).await.unwrap();
    assert_eq!(both.write(&Batch::default(), at(1, 9)).await, 3);
    both.stream.ack(&ids(&messages[..1])).await.unwrap();
    assert_eq!(both.write(&Batch::default(), at(1, 9)).await, 6);
    both.stream.ack(&ids(&messages)).await.unwrap();
    both.stream.ack(&[Uuid::max()]).await.unwrap();
    let all = both.sink.write(&Batch::default(), &at(1, 9)).await.unwrap();
    assert!(matches!(all, Written::All), "{all:?}");
    assert_eq!(both.sink.peek().await.unwrap(), Some(at(1, 9)));
    assert!(both.receive(10).await.is_empty());
}

#[tokio::test]
async fn after_a_kill_the_acknowledged_stay_away_and_the_leased_keep_their_ids_and_their_time() {
    let directory = tempfile::tempdir().unwrap();
    let (mut both, _) = begin(&directory, json!({})).await;
    both.write(&batch(0..6), at(1, 6)).await;
    let messages = both.receive(4).await;
    both.stream.ack(&ids(&messages[1..3])).await.unwrap();
    let (mut both, progress) = both.killed().await;
    assert_eq!(progress, Some(at(1, 0)));
    // An acknowledgement may come before the loop has brought the message again.
    both.stream.ack(&ids(&messages[3..])).await.unwrap();
    assert_eq!(both.write(&batch(0..4), at(1, 4)).await, 0);
    assert_eq!(both.write(&batch(4..8), at(1, 8)).await, 0);
    assert_eq!(offsets(&both.receive(10).await), [4, 5, 6, 7], "0 is leased, 1 to 3 are done");
    both.stream.nack(&ids(&messages)).await.unwrap();
    let again = both.receive(10).await;
    assert_eq!((offsets(&again), again[0].ack_id), (vec![0], messages[0].ack_id));
    both.stream.ack(&ids(&again)).await.unwrap();
    assert_eq!(both.write(&Batch::default(), at(1, 8)).await, 4);
    let (_, progress) = both.killed().await;
    assert_eq!(progress, Some(at(1, 4)));
}

#[tokio::test]
async fn an_acknowledgement_whose_sender_left_is_durable_once_it_is_repeated() {
    let directory = tempfile::tempdir().unwrap();
    let (mut both, _) = begin(&directory, json!({})).await;
    both.write(&batch(0..3), at(1, 3)).await;
    let messages = both.receive(3).await;
    let (first, all) = (ids(&messages[..1]), ids(&messages));
    begin_and_leave(both.stream.ack(&first)).await;
    both.stream.ack(&first).await.unwrap();
    let (mut both, progress) = both.killed().await;
    assert_eq!(progress, Some(at(1, 1)));
    both.write(&batch(1..3), at(1, 3)).await;
    both.stream.nack(&all).await.unwrap();
    begin_and_leave(both.stream.receive(3, NOW)).await;
    both.stream.nack(&all).await.unwrap();
    assert_eq!(ids(&both.receive(3).await), all[1..]);
}

#[tokio::test]
async fn what_is_given_back_or_not_acknowledged_in_time_comes_again_under_the_same_id() {
    let directory = tempfile::tempdir().unwrap();
    let (mut both, _) = begin(&directory, json!({"ack_wait_ms": 500})).await;
    both.write(&batch(0..2), at(1, 2)).await;
    let first = both.receive(2).await;
    assert!(both.receive(2).await.is_empty());
    both.stream.nack(&ids(&first[1..])).await.unwrap();
    both.stream.nack(&ids(&first[1..])).await.unwrap();
    assert_eq!(both.receive(2).await, first[1..]);
    // The wait ends by itself once the lease of the first is over.
    let late = both.stream.receive(1, LONG).await.unwrap().unwrap();
    assert_eq!(late, first[..1]);
    both.stream.ack(&ids(&first)).await.unwrap();
    assert_eq!(both.write(&Batch::default(), at(1, 2)).await, 2);
}

#[tokio::test]
async fn of_each_key_one_message_is_out_and_the_others_wait() {
    let directory = tempfile::tempdir().unwrap();
    let (mut both, _) = begin(&directory, json!({})).await;
    let changes = vec![
        update(0, None, "a"),
        update(1, None, "a"),
        update(2, None, "b"),
        update(3, Some("b"), "a"), // both keys
        update(4, None, "b"),
        truncate(5),
        update(6, None, "c"),
    ];
    both.write(&of(changes), at(1, 7)).await;
    let mut waves = Vec::new();
    loop {
        let wave = both.receive(10).await;
        if wave.is_empty() {
            break;
        }
        assert!(both.receive(10).await.is_empty());
        waves.push(offsets(&wave));
        both.stream.ack(&ids(&wave)).await.unwrap();
    }
    assert_eq!(waves, [vec![0, 2], vec![1], vec![3], vec![4], vec![5], vec![6]]);
}

#[tokio::test]
async fn a_group_stays_in_flight_over_a_kill_and_without_grouping_nothing_waits() {
    for grouping in [true, false] {
        let directory = tempfile::tempdir().unwrap();
        let (mut both, _) = begin(&directory, json!({"message_grouping": grouping})).await;
        let changes = || of((0..3).map(|offset| update(offset, None, "a")).collect());
        both.write(&changes(), at(1, 3)).await;
        let first = both.receive(1).await;
        let (mut both, _) = both.killed().await;
        both.write(&changes(), at(1, 3)).await;
        let next = offsets(&both.receive(10).await);
        if grouping {
            assert!(next.is_empty(), "{next:?}");
            both.stream.ack(&ids(&first)).await.unwrap();
            assert_eq!(offsets(&both.receive(10).await), [1]);
        } else {
            assert_eq!(next, [1, 2]);
        }
    }
}

#[tokio::test]
async fn a_full_look_ahead_waits_for_acknowledgements_and_a_cancelled_write_loses_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let (mut both, _) = begin(&directory, json!({"max_ack_pending": 3})).await;
    both.write(&batch(0..3), at(1, 3)).await;
    let more = batch(3..5);
    let progress = at(1, 5);
    let waits = tokio::time::timeout(Duration::from_millis(50), both.sink.write(&more, &progress));
    assert!(waits.await.is_err(), "there is no room");
    assert_eq!(both.sink.open().await.unwrap(), Some(at(1, 0)));
    both.write(&batch(0..3), at(1, 3)).await;
    let stream = both.stream.clone();
    let mut consumer = JoinSet::new();
    consumer.spawn(async move {
        let mut seen = Vec::new();
        while seen.len() < 5 {
            let messages = stream.receive(2, LONG).await.unwrap().unwrap();
            stream.ack(&ids(&messages)).await.unwrap();
            seen.extend(offsets(&messages));
        }
        seen
    });
    both.write(&more, progress).await;
    assert_eq!(consumer.join_next().await.unwrap().unwrap(), [0, 1, 2, 3, 4]);
}

#[tokio::test]
async fn a_stop_ends_every_wait() {
    let directory = tempfile::tempdir().unwrap();
    let stop = tokio_util::sync::CancellationToken::new();
    let context = Context {
        data_dir: directory.path().to_owned(),
        pulls: sink::Pulls::until(stop.clone()),
        ..context()
    };
    let config = json!({"kind": "http_pull", "max_ack_pending": 1, "max_waiting": 1});
    let (mut both, _) = Both::reopened(context, config).await;
    both.write(&batch(0..1), at(1, 1)).await;
    assert_eq!(both.receive(1).await.len(), 1);
    let stream = both.stream.clone();
    let mut waiting = JoinSet::new();
    waiting.spawn(async move { stream.receive(1, LONG).await.unwrap().unwrap().len() });
    tokio::task::yield_now().await;
    let (more, progress) = (batch(1..2), at(1, 2));
    let (written, ()) = tokio::join!(both.sink.write(&more, &progress), async {
        let refused = both.stream.receive(1, LONG).await.unwrap();
        assert_eq!(refused, None, "one waits, and no more may");
        stop.cancel();
    });
    assert_eq!(written.unwrap_err().class(), Class::Retry);
    assert_eq!(waiting.join_next().await.unwrap().unwrap(), 0);
}

#[tokio::test]
async fn two_consumers_never_have_the_same_message() {
    let directory = tempfile::tempdir().unwrap();
    let (mut both, _) = begin(&directory, json!({})).await;
    let mut consumers = JoinSet::new();
    for _ in 0..4 {
        let stream = both.stream.clone();
        consumers.spawn(async move {
            let mut seen = Vec::new();
            loop {
                let messages = stream.receive(7, Duration::from_secs(2)).await.unwrap().unwrap();
                if messages.is_empty() {
                    return seen;
                }
                seen.extend(offsets(&messages));
                stream.ack(&ids(&messages)).await.unwrap();
            }
        });
    }
    for start in (0..400).step_by(50) {
        both.write(&batch(start..start + 50), at(1, start + 50)).await;
    }
    let mut all = Vec::new();
    while let Some(seen) = consumers.join_next().await {
        all.extend(seen.unwrap());
    }
    assert_eq!(all.len(), 400);
    assert_eq!(all.into_iter().collect::<BTreeSet<_>>().len(), 400);
}

fn words(told: &[(u64, Verdict)]) -> String {
    let word = |(offset, verdict): &(u64, Verdict)| match verdict {
        Verdict::Durable => format!("{offset} durable"),
        Verdict::GivenUp { attempts, next: None, .. } => format!("{offset} given up {attempts}"),
        Verdict::GivenUp { next: Some(next), .. } => format!("{offset} given up for {next}"),
        Verdict::Behind => format!("{offset} behind"),
        Verdict::SetAside => format!("{offset} set aside"),
    };
    told.iter().map(word).collect::<Vec<_>>().join(", ")
}

fn group() -> Batch {
    of(vec![
        update(0, None, "a"),
        update(1, None, "a"),
        update(2, None, "b"),
        update(3, Some("b"), "a"), // both keys
        update(4, None, "b"),
        update(5, None, "c"),
    ])
}

#[tokio::test]
async fn what_waits_for_a_message_that_is_given_up_goes_with_it_or_goes_on() {
    for hold in [true, false] {
        let directory = tempfile::tempdir().unwrap();
        let (mut both, _) = begin(&directory, json!({"max_deliver": 1})).await;
        both.write(&group(), at(1, 6)).await;
        let first = both.receive(10).await;
        assert_eq!(offsets(&first), [0, 2, 5]);
        both.stream.nack(&ids(&first[..1])).await.unwrap();
        both.sink.told().await;
        let told = both.sink.verdicts(hold).await.unwrap();
        let expected = match hold {
            true => "0 given up 1, 1 behind, 3 behind, 4 behind",
            false => "0 given up for 1",
        };
        assert_eq!(words(&told), expected);
        both.stream.ack(&ids(&first[..1])).await.unwrap();
        assert!(both.receive(10).await.is_empty(), "nothing passes it before it is parked");
        both.sink.settle(&told).await.unwrap();
        both.stream.ack(&ids(&first[1..])).await.unwrap();
        if !hold {
            for offset in [1, 3, 4] {
                let next = both.receive(10).await;
                assert_eq!(offsets(&next), [offset]);
                both.stream.ack(&ids(&next)).await.unwrap();
            }
        }
        assert_eq!(both.write(&Batch::default(), at(1, 6)).await, 6);
        let (both, progress) = both.killed().await;
        assert_eq!(progress, Some(at(1, 6)));
        assert!(both.receive(10).await.is_empty());
    }
}

#[tokio::test]
async fn deliveries_are_counted_over_a_kill_and_what_was_given_up_is_done_beyond_the_cursor() {
    let directory = tempfile::tempdir().unwrap();
    let (mut both, _) = begin(&directory, json!({"max_deliver": 2})).await;
    both.write(&batch(0..4), at(1, 4)).await;
    let first = both.receive(10).await;
    both.stream.nack(&ids(&first[2..3])).await.unwrap();
    assert_eq!(offsets(&both.receive(10).await), [2]);
    let (mut both, _) = both.killed().await;
    both.write(&batch(0..4), at(1, 4)).await;
    both.stream.nack(&ids(&first[2..3])).await.unwrap();
    let told = both.sink.verdicts(true).await.unwrap();
    assert_eq!(words(&told), "2 given up 2");
    // Killed before the sink heard that it is parked: it says so again.
    let (mut both, _) = both.killed().await;
    assert_eq!(both.sink.beyond(&at(1, 0)).await.unwrap(), Beyond::default());
    both.write(&batch(0..4), at(1, 4)).await;
    let told = both.sink.verdicts(true).await.unwrap();
    assert_eq!(words(&told), "2 given up 2");
    both.sink.settle(&told).await.unwrap();
    let (mut both, _) = both.killed().await;
    let beyond = both.sink.beyond(&at(1, 0)).await.unwrap();
    assert_eq!(beyond, Beyond { done: vec![(2, 3)], out: vec![] });
    assert_eq!(both.sink.beyond(&at(2, 0)).await.unwrap(), Beyond::default(), "a rewind");
}

#[tokio::test]
async fn a_retried_change_is_out_until_its_verdict_and_is_counted_anew() {
    let directory = tempfile::tempdir().unwrap();
    let (mut both, _) = begin(&directory, json!({"max_deliver": 1})).await;
    let retry = |retry_seq| Progress { retry_seq, ..at(1, 5) };
    both.write(&Batch::default(), at(1, 5)).await;
    for seq in [1, 2] {
        both.write(&batch(2..3), retry(seq)).await;
        let beyond = both.sink.beyond(&retry(seq)).await.unwrap();
        assert_eq!(beyond, Beyond { done: vec![], out: vec![2] });
        let message = both.receive(9).await;
        let (how, word) = match seq {
            1 => (both.stream.nack(&ids(&message)).await, "2 given up 1"),
            _ => (both.stream.ack(&ids(&message)).await, "2 durable"),
        };
        how.unwrap();
        let told = both.sink.verdicts(true).await.unwrap();
        assert_eq!(words(&told), word);
        both.sink.settle(&told).await.unwrap();
        assert_eq!(both.sink.beyond(&retry(seq)).await.unwrap(), Beyond::default());
    }
}

#[tokio::test]
async fn a_stuck_group_that_fills_the_look_ahead_is_set_aside_and_slow_consumers_are_not() {
    let directory = tempfile::tempdir().unwrap();
    let (mut both, _) = begin(&directory, json!({"max_ack_pending": 4})).await;
    let changes = of((0..4).map(|offset| update(offset, None, "a")).collect());
    both.write(&changes, at(1, 4)).await;
    let (more, progress) = (batch(4..6), at(1, 6));
    let first = both.receive(9).await;
    let wait = Duration::from_millis(50);
    let full = tokio::time::timeout(wait, both.sink.write(&more, &progress)).await;
    assert!(full.is_err(), "it was delivered once: its consumer may be at work");
    both.stream.nack(&ids(&first)).await.unwrap();
    assert_eq!(both.receive(9).await, first);
    assert_eq!(both.write(&more, progress).await, 0, "what makes room is to be heard");
    let told = both.sink.verdicts(true).await.unwrap();
    assert_eq!(words(&told), "0 set aside, 1 behind, 2 behind, 3 behind");
    both.sink.settle(&told).await.unwrap();
    assert_eq!(both.write(&Batch::default(), progress).await, 4, "it no longer holds the journal");
    let beyond = both.sink.beyond(&progress).await.unwrap();
    assert_eq!(beyond.out, [0]);
    let (mut both, _) = both.killed().await;
    both.stream.ack(&ids(&first)).await.unwrap();
    assert_eq!(words(&both.sink.verdicts(true).await.unwrap()), "0 durable");
}

#[tokio::test]
async fn a_rewind_delivers_again_under_new_ids_and_an_older_epoch_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let (mut both, _) = begin(&directory, json!({})).await;
    both.write(&batch(0..4), at(1, 4)).await;
    let first = both.receive(4).await;
    both.stream.ack(&ids(&first[..3])).await.unwrap();
    assert_eq!(both.sink.open().await.unwrap(), Some(at(1, 3)));
    assert_eq!(both.write(&batch(1..4), at(2, 4)).await, 1);
    let again = both.receive(9).await;
    assert_eq!(offsets(&again), [1, 2, 3]);
    assert!(ids(&again).iter().all(|id| !ids(&first).contains(id)));
    both.stream.ack(&ids(&first)).await.unwrap();
    assert_eq!(both.write(&Batch::default(), at(2, 4)).await, 1, "ids of before mean nothing");
    let old = both.sink.write(&batch(4..5), &at(1, 5)).await.unwrap_err();
    assert_eq!(old.class(), Class::Retry, "{old}");
    let (_, progress) = both.killed().await;
    assert_eq!(progress, Some(at(2, 1)));
}

#[tokio::test]
async fn a_retried_change_is_kept_until_it_is_acknowledged() {
    let directory = tempfile::tempdir().unwrap();
    let (mut both, _) = begin(&directory, json!({})).await;
    both.write(&batch(3..5), at(1, 5)).await;
    let messages = both.receive(9).await;
    both.stream.ack(&ids(&messages)).await.unwrap();
    both.write(&Batch::default(), at(1, 5)).await;
    let retry = Progress { retry_seq: 1, ..at(1, 5) };
    assert_eq!(both.write(&batch(2..3), retry).await, 5);
    let (mut both, progress) = both.killed().await;
    assert_eq!(progress, Some(retry));
    let message = both.receive(9).await;
    assert_eq!(offsets(&message), [2]);
    both.stream.ack(&ids(&message)).await.unwrap();
    assert_eq!(both.write(&Batch::default(), retry).await, 5);
    let (both, _) = both.killed().await;
    assert!(both.receive(9).await.is_empty());
}

#[tokio::test]
async fn a_change_that_no_message_can_carry_is_refused_alone() {
    let directory = tempfile::tempdir().unwrap();
    let (mut both, _) = begin(&directory, json!({})).await;
    let mut bad = batch(1..2).changes.remove(0);
    bad.after = Some(Row::from_values([Value::Text(b"1"), Value::Text(b"\xff")]));
    let mut mixed = batch(0..1);
    mixed.changes.push(bad.clone());
    let refused = both.sink.write(&mixed, &at(1, 2)).await.unwrap_err();
    assert_eq!(refused.class(), Class::Data, "{refused}");
    assert!(both.receive(9).await.is_empty(), "nothing of a refused batch is there");
    both.write(&batch(0..1), at(1, 1)).await;
    assert_eq!(both.sink.write(&of(vec![bad]), &at(1, 2)).await.unwrap_err().class(), Class::Data);
    both.write(&batch(2..3), at(1, 3)).await;
    assert_eq!(offsets(&both.receive(9).await), [0, 2]);
}

#[tokio::test]
async fn messages_are_sequins_unless_told_otherwise_and_what_it_has_no_word_for_is_counted() {
    let directory = tempfile::tempdir().unwrap();
    let context = Context { data_dir: directory.path().to_owned(), ..context() };
    let filtered = Arc::clone(&context.filtered);
    let (mut both, _) = Both::reopened(context, json!({"kind": "sequin_stream"})).await;
    let mut changes = batch(0..2);
    changes.changes.push(truncate(2));
    both.write(&changes, at(1, 3)).await;
    let messages = both.receive(9).await;
    let body: Json = serde_json::from_slice(&messages[0].body).unwrap();
    assert_eq!((&body["action"], &body["record"]["id"]), (&json!("insert"), &json!(0)));
    assert_eq!((messages.len(), filtered.load(std::sync::atomic::Ordering::Relaxed)), (2, 1));
}

#[test]
fn options_out_of_range_are_refused() {
    for (key, value) in [
        ("ack_wait_ms", 499),
        ("max_deliver", 0),
        ("max_ack_pending", 0),
        ("pending_bytes_max", 0),
        ("max_waiting", 0),
    ] {
        let config = serde_json::from_value(json!({"kind": "http_pull", key: value})).unwrap();
        let error = sink::open("pulled", &config, &context()).expect_err("a refusal");
        assert_eq!(error.class(), Class::Config, "{error}");
        assert!(error.to_string().contains(key), "{error}");
    }
}
