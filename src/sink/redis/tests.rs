//! What can be said without a server.

use std::path::Path;

use serde_json::{Value as Json, json};

use super::*;
use crate::{
    config::{self, Format, SinkKind, Types},
    sink::{Context, With, open_kind, testing},
};

fn opened(config: Json, context: &Context) -> Result<()> {
    let kind: SinkKind = serde_json::from_value(config).unwrap();
    let with = With { name: "test", format: Format::Native, types: Types::default(), context };
    open_kind(&kind, with).map(drop)
}

#[test]
fn what_is_wrong_without_a_server_is_said_at_once_and_no_password_is_shown() {
    let context = testing::context();
    let url = "redis://u:hunter2@localhost/";
    for (config, told) in [
        (json!({"kind": "redis_stream", "url": "http://u:hunter2@localhost/"}), "`url`"),
        (json!({"kind": "redis_stream", "url": "hunter2"}), "`url`"),
        (json!({"kind": "redis_stream", "url": "rediss://u:hunter2@h/#insecure"}), "`url`"),
        (json!({"kind": "redis_stream", "url": url, "tls_ca": "/ca.pem"}), "rediss://"),
        (json!({"kind": "redis_stream", "url": url, "stream": "{tabel}"}), "`tabel`"),
        (json!({"kind": "redis_stream", "url": url, "progress_key": ""}), "progress_key"),
        (json!({"kind": "redis_stream", "url": url, "stream": ""}), "`stream`"),
        (
            json!({"kind": "redis_stream", "url": url, "stream": "walrace:progress:test"}),
            "`stream`",
        ),
        (json!({"kind": "redis_pubsub", "url": url, "channel": "a{"}), "half"),
        (json!({"kind": "redis_pubsub", "url": url, "channels": {"!t": "x"}}), "`!t`"),
        (json!({"kind": "redis_pubsub", "url": url, "channels": {"t": "{x}"}}), "`channels`"),
        (json!({"kind": "redis_string", "url": url, "key": "{x}"}), "`x`"),
        (
            json!({"kind": "redis_string", "url": url, "key": "{key}", "on_truncate": "scan"}),
            "on_truncate",
        ),
    ] {
        let error = opened(config.clone(), &context).expect_err(&config.to_string());
        assert_eq!(error.class(), Class::Config, "{error}");
        assert!(error.to_string().contains(told), "{error}");
        assert!(!error.to_string().contains("hunter2"), "{error}");
    }
}

#[test]
fn the_defaults_are_those_of_the_documentation() {
    let config = json!({"kind": "redis_stream", "url": "redis://localhost"});
    let SinkKind::RedisStream(stream) = serde_json::from_value(config).unwrap() else { panic!() };
    assert_eq!(stream.stream, "walrace.{source}.{schema}.{table}");
    assert_eq!((stream.maxlen, stream.entry_bytes_max), (100_000, VALUE_BYTES_MAX));
    let config = json!({"kind": "redis_string", "url": "redis://localhost"});
    let SinkKind::RedisString(string) = serde_json::from_value(config).unwrap() else { panic!() };
    assert_eq!(string.key, "{table}:{key}");
    assert_eq!(string.payload, config::RedisStringPayload::Record);
}

#[test]
fn a_server_is_named_without_its_login() {
    let url = Secret::new("rediss://u:p%40ss@cache.example:6380/3");
    let server = Server::new(&url, Some(&Path::new("/ca.pem").to_owned()), 1).unwrap();
    assert_eq!(server.name(), "redis at cache.example:6380");
    assert_eq!(server.login.password.as_ref().map(Secret::expose), Some("p@ss"));
    assert_eq!((server.login.user.as_deref(), server.login.db), (Some("u"), 3));
}

#[test]
fn a_connection_is_known_by_its_number_and_address() {
    let line = "id=7 addr=127.0.0.1:40312 laddr=127.0.0.1:6379 fd=8 name= user=default\n";
    let peer = Peer::parse(line).unwrap();
    assert_eq!((peer.id.as_str(), peer.address.as_str()), ("7", "127.0.0.1:40312"));
    assert_eq!(Peer::parse("garbage"), None);
}
