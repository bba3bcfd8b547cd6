use std::{process::Stdio, time::Duration};

use serde_json::{Value as Json, json};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
};
use walrace::{
    change::Batch,
    error::Class,
    sink::{Outcome, Sink, Written},
};

use super::{batch, delivers, fails, letters, offsets, open, receiver::Receiver, truncate, write};

fn program(receiver: &Receiver) -> Box<dyn Sink> {
    open(json!({"kind": "custom", "url": receiver.url("/take")})).unwrap()
}

#[tokio::test]
async fn silence_and_ok_mean_that_everything_was_taken() {
    let receiver = Receiver::start().await;
    let mut sink = program(&receiver);
    let each = r#"{"outcomes":[{"ok":true},{"ok":true}]}"#;
    for body in
        ["", " \n", r#"{"ok":true}"#, each, r#"{"ok":true,"outcomes":[{"ok":true},{"ok":true}]}"#]
    {
        receiver.will_answer(200, body);
        delivers(&mut *sink, &batch(0..2)).await;
    }
    let request = receiver.requests().remove(0);
    assert_eq!(offsets(&request.data()), [0, 1]);
    assert!(request.header("idempotency-key").ends_with("-2"));
}

#[tokio::test]
async fn each_change_has_the_outcome_that_the_program_gave_it() {
    let receiver = Receiver::start().await;
    let mut sink = program(&receiver);
    receiver.will_answer(
        200,
        r#"{"outcomes":[{"ok":true},{"refused":"no such room"},{"retry":"busy"}]}"#,
    );
    let written = write(&mut *sink, &batch(0..3)).await.unwrap();
    assert_eq!(letters(&written), "dru");
    let Written::Each(outcomes) = written else { unreachable!() };
    let Outcome::Refused(error) = &outcomes[1] else { unreachable!() };
    assert_eq!(error.class(), Class::Data);
    assert!(error.to_string().ends_with("/take refused: no such room"), "{error}");
}

#[tokio::test]
async fn what_the_format_leaves_out_keeps_the_outcomes_aligned() {
    let receiver = Receiver::start().await;
    let url = receiver.url("/take");
    let mut sink = open(json!({"kind": "custom", "url": url, "format": "sequin"})).unwrap();
    let mut mixed = batch(0..2);
    mixed.changes.insert(0, truncate(0));
    receiver.will_answer(200, r#"{"outcomes":[{"refused":"first"},{"ok":true}]}"#);
    assert_eq!(letters(&write(&mut *sink, &mixed).await.unwrap()), "drd");
    delivers(&mut *sink, &Batch { changes: vec![truncate(0)], position: None }).await;
    assert_eq!(receiver.requests().len(), 1);
}

#[tokio::test]
async fn a_program_that_asks_to_wait_for_everything_is_waited_for() {
    let receiver = Receiver::start().await;
    let mut sink = program(&receiver);
    receiver.will_answer(200, r#"{"outcomes":[{"retry":"warming up"},{"retry":"warming up"}]}"#);
    let error = fails(&mut *sink, &batch(0..2)).await;
    assert_eq!(error.class(), Class::Retry);
    assert!(error.to_string().ends_with("asks to wait: warming up"), "{error}");
}

#[tokio::test]
async fn a_reply_outside_the_contract_stops_the_sink_and_nothing_is_taken_for_delivered() {
    let receiver = Receiver::start().await;
    let mut sink = program(&receiver);
    for body in [
        "thanks",
        "null",
        "{}",
        r#"{"ok":false}"#,
        r#"{"outcomes":[{"ok":true}]}"#,
        r#"{"outcomes":[{"ok":true},{"ok":true},{"ok":true}]}"#,
        r#"{"outcomes":[{"ok":true},{"ok":false}]}"#,
        r#"{"outcomes":[{"ok":true},{"failed":"x"}]}"#,
        r#"{"outcome":[]}"#,
    ] {
        receiver.will_answer(200, body);
        let error = fails(&mut *sink, &batch(0..2)).await;
        assert_eq!(error.class(), Class::Config, "{body}: {error}");
        assert!(error.remedy_text().unwrap().contains("outcomes"), "{error}");
    }
    receiver.will_answer(503, "");
    assert_eq!(fails(&mut *sink, &batch(0..2)).await.class(), Class::Retry);
}

/// The program of the documentation, as it stands there.
async fn documented_program() -> (Child, String) {
    let page = include_str!("../../../docs/sinks/custom.md");
    let code = page.split("```python\n").nth(1).unwrap().split("```").next().unwrap();
    assert!(code.lines().count() <= 24, "the example is to be short");
    let mut child = Command::new("python3")
        .args(["-u", "-c", code, "0"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .expect("python3, which runs the documented program");
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let first = tokio::time::timeout(Duration::from_secs(30), lines.next_line());
    let address = first.await.unwrap().unwrap().unwrap();
    (child, address.rsplit(' ').next().unwrap().to_owned())
}

#[tokio::test]
async fn the_program_of_the_documentation_works() {
    let (mut child, url) = documented_program().await;
    let mut sink = open(json!({"kind": "custom", "url": url})).unwrap();
    delivers(&mut *sink, &batch(0..3)).await;
    let mut mixed = batch(0..3);
    mixed.changes[1] = truncate(1);
    let written = write(&mut *sink, &mixed).await.unwrap();
    assert_eq!(letters(&written), "drd");
    delivers(&mut *sink, &batch(3..4)).await;
    child.kill().await.unwrap();
    assert_eq!(fails(&mut *sink, &batch(0..3)).await.class(), Class::Retry);
}

#[tokio::test]
async fn the_examples_of_the_documentation_are_valid_json() {
    let page = include_str!("../../../docs/sinks/custom.md");
    let examples: Vec<_> = page.split("```json\n").skip(1).collect();
    assert!(examples.len() >= 2);
    for example in examples {
        let text = example.split("```").next().unwrap();
        serde_json::from_str::<Json>(text).unwrap_or_else(|error| panic!("{text}: {error}"));
    }
}
