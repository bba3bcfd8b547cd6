//! Messages that consumers never acknowledge: dead letters after `max_deliver`, the groups behind
//! them, and groups that would fill the look-ahead.

use std::time::Duration;

use serde_json::{Value, json};

use crate::{
    kit::wait_for,
    sequin_api::{Pulled, id, ids},
};

const PATIENCE: Duration = Duration::from_secs(30);

impl Pulled {
    fn walrace(&self, arguments: &[&str]) -> String {
        let output = self.server.run(arguments);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (out, failure) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success(), "{arguments:?}: {out}{failure}");
        out
    }

    /// What is parked, as `walrace dlq list` shows it.
    fn letters(&self) -> Vec<Value> {
        let text = self.walrace(&["dlq", "list", "--json"]);
        text.lines()
            .filter(|line| !line.is_empty())
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    /// Waits for so many parked changes, of which so many are dead.
    async fn wait_letters(&self, parked: usize, dead: usize) -> Vec<Value> {
        let found = async || {
            let letters = self.letters();
            let died = letters.iter().filter(|letter| letter["state"] == "dead").count();
            (letters.len() == parked && died == dead).then_some(letters)
        };
        let seen = || format!("{:?}\n{}", self.letters(), self.server.log_tail());
        wait_for(PATIENCE, found, seen).await
    }

    /// Receives, gives back what is of the row `bad`, and acknowledges the rest, until `bad` was
    /// there `times` times; its messages.
    async fn refuse(&self, bad: u64, times: usize) -> Vec<Value> {
        let mut refused = Vec::new();
        while refused.len() < times {
            let messages = self.receive(100).await;
            assert!(!messages.is_empty(), "{} came", refused.len());
            let (of_bad, others): (Vec<_>, Vec<_>) =
                messages.into_iter().partition(|message| id(message) == bad);
            for (how, messages) in [("nack", &of_bad), ("ack", &others)] {
                if !messages.is_empty() {
                    self.settle(how, messages).await;
                }
            }
            refused.extend(of_bad);
        }
        refused
    }

    async fn update(&self, row: u64, status: &str) {
        self.cluster.sql(&format!("update orders set status = '{status}' where id = {row}")).await;
    }

    /// Receives and acknowledges, one after the other.
    async fn drain(&self, count: usize) -> Vec<(u64, String)> {
        let mut seen = Vec::new();
        while seen.len() < count {
            let messages = self.receive(100).await;
            assert!(!messages.is_empty(), "{seen:?}");
            self.settle("ack", &messages).await;
            seen.extend(messages.iter().map(|message| (id(message), status(message))));
        }
        seen
    }
}

fn status(message: &Value) -> String {
    message["data"]["record"]["status"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_message_that_always_comes_back_is_a_dead_letter_which_holds_its_group_and_no_other() {
    let mut pulled = Pulled::start("max_deliver = 3").await;
    pulled.insert(1..4).await;
    pulled.update(1, "paid").await;
    let twice = pulled.refuse(1, 2).await;
    pulled.kill_and_start().await; // the count outlives it
    let third = pulled.refuse(1, 1).await;
    assert_eq!([&twice[0], &twice[1]], [&third[0]; 2], "one message under one id");
    let letters = pulled.wait_letters(2, 1).await;
    assert_eq!((&letters[0]["state"], &letters[0]["attempts"]), (&json!("dead"), &json!(3)));
    assert!(letters[0]["error"].as_str().unwrap().contains("3 times"), "{letters:?}");
    assert_eq!((&letters[1]["op"], &letters[1]["attempts"]), (&json!("update"), &json!(0)));
    pulled.update(1, "sent").await;
    pulled.update(2, "paid").await;
    assert_eq!(pulled.drain(1).await, [(2, "paid".into())], "its group waits, others go on");
    pulled.kill_and_start().await;
    let letters = pulled.wait_letters(3, 1).await;
    assert!(pulled.receive_now(10).await.is_empty(), "what is dead stays so over a start");
    pulled.settle("ack", &third).await;
    pulled.settle("nack", &third).await;
    assert!(pulled.receive_now(10).await.is_empty(), "its id means nothing now");
    let shown = pulled.walrace(&["dlq", "show", letters[0]["id"].as_str().unwrap()]);
    assert!(shown.contains("orders"), "{shown}");

    pulled.walrace(&["dlq", "retry", letters[0]["id"].as_str().unwrap()]);
    let again = pulled.refuse(1, 3).await;
    assert_eq!(again, [&third[0]; 3].map(Clone::clone), "the same id, and so often again");
    pulled.wait_letters(3, 1).await;
    pulled.walrace(&["dlq", "retry", letters[0]["id"].as_str().unwrap()]);
    let expected = ["new", "paid", "sent"].map(|status| (1, status.to_owned()));
    assert_eq!(pulled.drain(3).await, expected, "in their order");
    pulled.wait_letters(0, 0).await;
    pulled.kill_and_start().await;
    pulled.update(1, "done").await;
    assert_eq!(pulled.drain(1).await, [(1, "done".into())], "and nothing of before");
}

#[tokio::test]
async fn a_message_that_is_never_acknowledged_is_released_or_dropped() {
    let options = "max_deliver = 2\nack_wait_ms = 500\nafter_dead_letter = \"release\"";
    let mut pulled = Pulled::start(options).await;
    pulled.insert(1..2).await;
    pulled.update(1, "paid").await;
    for _ in 0..2 {
        let message = pulled.receive(10).await; // and says nothing
        assert_eq!((id(&message[0]), status(&message[0])), (1, "new".into()));
    }
    assert_eq!(pulled.drain(1).await, [(1, "paid".into())], "the later one goes on without it");
    let letters = pulled.wait_letters(1, 1).await;
    assert!(letters[0]["superseded"].is_u64(), "{letters:?}");
    pulled.kill_and_start().await;
    pulled.wait_letters(1, 1).await;
    assert!(pulled.receive_now(10).await.is_empty());
    pulled.walrace(&["dlq", "drop", letters[0]["id"].as_str().unwrap()]);
    pulled.kill_and_start().await;
    pulled.update(1, "sent").await;
    assert_eq!(pulled.drain(1).await, [(1, "sent".into())], "what was dropped is gone");
    pulled.wait_letters(0, 0).await;
}

#[tokio::test]
async fn a_kill_between_the_sink_and_the_parking_lot_neither_loses_nor_doubles() {
    let mut pulled = Pulled::start("max_deliver = 1").await;
    let points = ["deliver::before_park", "deliver::after_park", "pull::before_settle"];
    for (row, point) in (1u64..).zip(points) {
        pulled.server.kill();
        pulled.server.start_to_die_at(point);
        wait_for(PATIENCE, async || pulled.server.address(), || "no address".into()).await;
        let from = u32::try_from(row).unwrap();
        pulled.insert(from..from + 1).await;
        pulled.update(row, "paid").await;
        let first = pulled.receive(10).await;
        assert_eq!(ids(&first), [row]);
        let body = json!({"ack_ids": [first[0]["ack_id"]]});
        pulled.try_post("/api/sequin_streams/orders/nack", body).await;
        pulled.server.wait_exit(PATIENCE).await;
        pulled.server.start_ready().await;
        let row = usize::try_from(row).unwrap();
        pulled.wait_letters(row * 2, row).await;
        assert!(pulled.receive_now(10).await.is_empty(), "at {point}");
    }
    for (point, row) in ["deliver::before_retry", "deliver::after_retry"].into_iter().zip(1..) {
        let of_row = pulled.letters()[0].clone();
        pulled.server.kill();
        pulled.server.start_to_die_at(point);
        pulled.server.wait_ready().await;
        let _ = pulled.server.run(&["dlq", "retry", of_row["id"].as_str().unwrap()]);
        pulled.server.wait_exit(PATIENCE).await;
        pulled.server.start_ready().await;
        let both = ["new", "paid"].map(|status| (row, status.to_owned()));
        assert_eq!(pulled.drain(2).await, both, "at {point}");
        assert!(pulled.receive_now(10).await.is_empty(), "at {point}");
    }
    pulled.wait_letters(2, 1).await;
}

#[tokio::test]
async fn a_group_that_nobody_acknowledges_leaves_room_for_the_others() {
    let mut pulled =
        Pulled::start("ack_wait_ms = 500\nmax_ack_pending = 10\nbatch_changes_max = 10").await;
    pulled.insert(1..2).await;
    for step in 0..40 {
        pulled.update(1, &step.to_string()).await;
    }
    pulled.insert(2..102).await;
    let (mut others, mut stuck, mut killed) = (Vec::new(), Vec::new(), false);
    while others.len() < 100 {
        let messages = pulled.receive(100).await;
        let (of_stuck, rest): (Vec<_>, Vec<_>) = messages.into_iter().partition(|m| id(m) == 1);
        stuck.extend(of_stuck);
        if !rest.is_empty() {
            pulled.settle("ack", &rest).await;
        }
        others.extend(ids(&rest));
        if others.len() > 50 && !killed {
            killed = true;
            pulled.kill_and_start().await;
        }
    }
    assert_eq!(others, (2..102).collect::<Vec<_>>());
    assert!(stuck.iter().all(|message| *message == stuck[0]), "one of the group, under one id");
    assert!(!pulled.letters().is_empty(), "the group waits in the lot");
    assert!(pulled.letters().iter().all(|letter| letter["state"] == "parked"));
    let seen = pulled.drain(41).await;
    let expected = ["new".to_owned()].into_iter().chain((0..40).map(|step| step.to_string()));
    assert_eq!(seen, expected.map(|status| (1, status)).collect::<Vec<_>>(), "in their order");
    pulled.wait_letters(0, 0).await;
    pulled.kill_and_start().await;
    pulled.insert(200..201).await;
    assert_eq!(pulled.drain(1).await, [(200, "new".into())], "nothing that was acknowledged");
}
