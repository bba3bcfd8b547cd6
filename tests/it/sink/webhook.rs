use std::{process::Stdio, time::Duration};

use serde_json::{Value as Json, json};
use tokio::{io::AsyncWriteExt, net::TcpListener, process::Command};
use walrace::{change::Batch, error::Class};

use super::{
    batch, delivers, fails, letters, offsets, open,
    receiver::{Answer, Receiver, Request},
    truncate, write,
};

#[expect(clippy::needless_pass_by_value, reason = "every caller makes it in place")]
fn config(receiver: &Receiver, more: Json) -> Json {
    let mut config = json!({"kind": "webhook", "url": receiver.url("/hook")});
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    config
}

#[tokio::test]
async fn a_batch_is_one_request_with_an_id_that_stays_on_redelivery() {
    let receiver = Receiver::start().await;
    let headers = json!({"headers": {"Authorization": "Bearer s3cret", "content-type": "x/y"}});
    let mut sink = open(config(&receiver, headers)).unwrap();
    delivers(&mut *sink, &batch(3..6)).await;
    delivers(&mut *sink, &batch(3..6)).await;
    delivers(&mut *sink, &batch(3..5)).await;
    let requests = receiver.requests();
    assert_eq!(offsets(&requests[0].data()), [3, 4, 5]);
    assert_eq!(requests[0].data()[0]["after"], json!({"id": 3, "v": "ü \"quoted\""}));
    assert_eq!(requests[0].path, "/hook");
    assert_eq!(requests[0].header("authorization"), "Bearer s3cret");
    assert!(requests[0].header("user-agent").starts_with("walrace/"));
    let key = requests[0].data()[0]["idempotency_key"].as_str().unwrap().to_owned();
    assert_eq!(requests[0].header("webhook-id"), format!("{key}-3"));
    let ids: Vec<_> = requests.iter().map(|request| request.header("webhook-id")).collect();
    let keys: Vec<_> = requests.iter().map(|request| request.header("idempotency-key")).collect();
    assert_eq!(ids, keys);
    assert_eq!(ids[0], ids[1]);
    assert_ne!(ids[0], ids[2]);
}

#[tokio::test]
async fn a_single_change_is_its_own_body_under_its_own_key() {
    let receiver = Receiver::start().await;
    let mut sink = open(config(&receiver, json!({"batch": false}))).unwrap();
    delivers(&mut *sink, &batch(3..6)).await;
    let requests = receiver.requests();
    let bodies: Vec<_> = requests.iter().map(Request::json).collect();
    assert_eq!(offsets(&bodies), [3, 4, 5]);
    for (request, body) in requests.iter().zip(&bodies) {
        assert_eq!(request.header("webhook-id"), body["idempotency_key"].as_str().unwrap());
        assert_eq!(request.header("content-type"), "application/json");
    }
}

#[tokio::test]
async fn sequin_messages_leave_out_what_they_have_no_word_for() {
    let receiver = Receiver::start().await;
    for single in [false, true] {
        let more = json!({"format": "sequin", "batch": !single});
        let mut sink = open(config(&receiver, more)).unwrap();
        let mut mixed = batch(0..2);
        mixed.changes.insert(1, truncate(1));
        delivers(&mut *sink, &mixed).await;
        let requests = receiver.requests();
        let messages = match single {
            true => requests.iter().map(Request::json).collect(),
            false => requests[0].data(),
        };
        assert_eq!(messages.len(), 2);
        assert!(messages.iter().all(|message| message["action"] == "insert"), "{messages:?}");
        let nothing = Batch { changes: vec![truncate(0)], position: None };
        delivers(&mut *sink, &nothing).await;
        delivers(&mut *sink, &Batch::default()).await;
        assert!(receiver.requests().is_empty());
    }
}

#[tokio::test]
async fn each_reply_code_means_what_the_documentation_says() {
    let receiver = Receiver::start().await;
    let mut sink = open(config(&receiver, json!({}))).unwrap();
    for code in [200, 201, 202, 204] {
        receiver.will_answer(code, "");
        delivers(&mut *sink, &batch(0..2)).await;
    }
    let classes = [
        (Class::Config, &[301, 302, 307, 308, 401, 403, 404, 405, 410][..]),
        (Class::Retry, &[408, 425, 429, 500, 502, 503, 504][..]),
        (Class::Data, &[400, 413, 422, 402, 409, 418][..]),
    ];
    for (class, codes) in classes {
        for &code in codes {
            receiver.will_answer(code, "the reason");
            let error = fails(&mut *sink, &batch(0..2)).await;
            assert_eq!(error.class(), class, "{code}: {error}");
            let start = format!("{}/hook answered {code} ", receiver.address);
            assert!(error.to_string().starts_with(&start), "{error}");
            assert!(error.to_string().contains(": the reason"), "{error}");
        }
    }
    receiver.requests();
    receiver.will(Answer {
        status: 307,
        headers: vec![("location", receiver.url("/elsewhere"))],
        ..Answer::default()
    });
    let error = fails(&mut *sink, &batch(0..2)).await;
    assert!(error.remedy_text().unwrap().contains("redirects are not followed"), "{error}");
    assert_eq!(receiver.requests().len(), 1);
}

#[tokio::test]
async fn in_single_mode_a_refused_change_stands_alone() {
    let receiver = Receiver::start().await;
    let mut sink = open(config(&receiver, json!({"batch": false}))).unwrap();
    for (third, expected) in [(422, "ddruu"), (503, "dduuu"), (401, "dduuu")] {
        receiver.will_answer(200, "");
        receiver.will_answer(200, "");
        receiver.will_answer(third, "no");
        let written = write(&mut *sink, &batch(0..5)).await.unwrap();
        assert_eq!(letters(&written), expected, "{third}");
        assert_eq!(receiver.requests().len(), 3, "nothing is sent behind a failure");
    }
    receiver.will_answer(503, "down");
    assert_eq!(fails(&mut *sink, &batch(2..5)).await.class(), Class::Retry);
    receiver.will_answer(401, "who are you");
    assert_eq!(fails(&mut *sink, &batch(2..5)).await.class(), Class::Config);
}

#[tokio::test]
async fn a_target_that_is_down_or_slow_is_an_outage() {
    let receiver = Receiver::start().await;
    let mut slow = open(config(&receiver, json!({"timeout_ms": 50}))).unwrap();
    receiver.will(Answer { status: 200, delay: Duration::from_secs(30), ..Answer::default() });
    let error = fails(&mut *slow, &batch(0..1)).await;
    assert_eq!(error.class(), Class::Retry);
    assert!(error.to_string().ends_with("/hook did not answer within 50 ms"), "{error}");
    delivers(&mut *slow, &batch(0..1)).await;

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let url = format!("http://user:hunter2@{address}/hook?token=hunter3");
    let mut down = open(json!({"kind": "webhook", "url": url})).unwrap();
    let error = fails(&mut *down, &batch(0..1)).await;
    assert_eq!(error.class(), Class::Retry);
    assert!(error.to_string().starts_with(&format!("cannot reach {address}/hook: ")), "{error}");
    assert!(!format!("{error} {error:?}").contains("hunter"), "{error:?}");
}

#[tokio::test]
async fn retry_after_is_told_to_the_loop_which_waits() {
    let receiver = Receiver::start().await;
    let mut sink = open(config(&receiver, json!({}))).unwrap();
    let headers = vec![("retry-after", "1".to_owned())];
    receiver.will(Answer { status: 429, headers, ..Answer::default() });
    let asked = tokio::time::Instant::now();
    assert_eq!(fails(&mut *sink, &batch(0..1)).await.class(), Class::Retry);
    sink.open().await.unwrap();
    assert!(sink.not_before().is_some_and(|time| time >= asked + Duration::from_secs(1)));
    delivers(&mut *sink, &batch(0..1)).await;
    assert_eq!(sink.not_before(), None, "only the next request waits");
}

#[tokio::test]
async fn a_reply_that_echoes_secrets_or_is_huge_is_shown_masked_and_cut() {
    let receiver = Receiver::start().await;
    let more = json!({"headers": {"authorization": "Bearer hunter2"}, "signing_secret": "hunter3"});
    let mut sink = open(config(&receiver, more)).unwrap();
    let echo = format!("you sent Bearer hunter2, hunter2 and hunter3\n{}", "x".repeat(99_999));
    receiver.will_answer(400, &echo);
    let error = fails(&mut *sink, &batch(0..1)).await.to_string();
    assert!(error.contains("you sent ***, *** and *** x"), "{error}");
    assert!(error.len() < 400, "{error}");
    receiver.will_answer(400, &format!("{}hunter2", "x".repeat(195)));
    let error = fails(&mut *sink, &batch(0..1)).await.to_string();
    assert!(error.ends_with("x***"), "{error}");
}

/// Verifies with Python's own HMAC, so that one mistake cannot be on both sides.
const VERIFY: &str = "
import base64, hashlib, hmac, json, sys
request = json.load(sys.stdin)
body = base64.b64decode(request['body'])
signed = f\"{request['id']}.{request['timestamp']}.\".encode() + body
key = base64.b64decode(request['secret'].removeprefix('whsec_'))
print('v1,' + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode())
print(hmac.new(b'plain key', body, hashlib.sha256).hexdigest())
";

#[tokio::test]
async fn signatures_are_verified_by_another_implementation() {
    use base64::{Engine, engine::general_purpose::STANDARD};

    let receiver = Receiver::start().await;
    let secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    let more = json!({"signing_secret": secret, "hmac_secret": "plain key"});
    let mut sink = open(config(&receiver, more)).unwrap();
    delivers(&mut *sink, &batch(0..3)).await;
    let request = receiver.requests().remove(0);
    let timestamp: i64 = request.header("webhook-timestamp").parse().unwrap();
    let now = walrace::change::Timestamp::now().0 / 1_000_000;
    assert!((now - 60..=now).contains(&timestamp));

    let mut python = Command::new("python3")
        .args(["-c", VERIFY])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("python3, which verifies the signatures");
    let input = json!({
        "id": request.header("webhook-id"),
        "timestamp": timestamp.to_string(),
        "secret": secret,
        "body": STANDARD.encode(&request.body),
    });
    python.stdin.take().unwrap().write_all(input.to_string().as_bytes()).await.unwrap();
    let output = String::from_utf8(python.wait_with_output().await.unwrap().stdout).unwrap();
    let expected: Vec<_> = output.lines().collect();
    assert_eq!(request.header("webhook-signature"), expected[0]);
    assert_eq!(request.header("x-sequin-signature"), expected[1]);
}

#[tokio::test]
async fn a_wrong_setting_is_refused_before_anything_is_sent() {
    let receiver = Receiver::start().await;
    for wrong in [
        json!({"headers": {"bad name": "x"}}),
        json!({"headers": {"x": "line\nbreak hunter2"}}),
        json!({"signing_secret": "whsec_not base64 hunter2"}),
        json!({"hmac_secret": "hunter2", "hmac_header": "no good"}),
        json!({"url": "hunter2.example/hook"}),
    ] {
        let error = open(config(&receiver, wrong)).expect_err("a refusal");
        assert_eq!(error.class(), Class::Config);
        assert!(!error.to_string().contains("hunter2"), "{error}");
    }
    assert!(receiver.requests().is_empty());
}
