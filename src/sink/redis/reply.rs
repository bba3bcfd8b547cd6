//! What the server's errors mean.

use ::redis::{ErrorKind, RedisError};

use crate::{
    error::{Class, Error},
    sink::http,
};

/// Of an error's text this much is shown.
const EXCERPT_BYTES: usize = 300;

/// An error of ours for what went wrong with the server `name`.
pub(super) fn error(name: &str, cause: RedisError) -> Error {
    if let Some(errors) = cause.clone().into_server_errors()
        && let Some((_, first)) = errors.first()
    {
        let details = first.details().unwrap_or_default();
        return refusal(name, first.code(), details);
    }
    match cause.kind() {
        ErrorKind::Io if cause.to_string().contains("invalid peer certificate") => {
            Error::config(format!("{name} has a certificate that is not trusted"))
                .caused_by(cause)
                .remedy("set `tls_ca` to the authority that signed it, and `url` to its host name")
        }
        ErrorKind::InvalidClientConfig => {
            Error::config(format!("cannot set up the connection to {name}")).caused_by(cause)
        }
        _ => Error::retry(format!("cannot reach {name}")).caused_by(cause),
    }
}

fn refusal(name: &str, code: &str, details: &str) -> Error {
    let (class, remedy) = meaning(code, details);
    let mut text = format!("{name} answered {code} {details}");
    http::cut(&mut text, name.len() + EXCERPT_BYTES);
    let error = Error::new(class, text.trim_end());
    match remedy {
        Some(remedy) => error.remedy(remedy),
        None => error,
    }
}

fn meaning(code: &str, details: &str) -> (Class, Option<&'static str>) {
    match code {
        "WRONGPASS" | "NOAUTH" => {
            (Class::Config, Some("set `url` to redis://USER:PASSWORD@HOST:PORT/DB"))
        }
        "NOPERM" => (
            Class::Config,
            Some("grant it with ACL SETUSER; the sink's page names the commands and keys it needs"),
        ),
        "DENIED" => (
            Class::Config,
            Some("give the server a password: its protected mode admits only local clients"),
        ),
        "MOVED" | "ASK" | "CROSSSLOT" => (
            Class::Config,
            Some(
                "of a Redis Cluster only one slot can be written: give every key the same hash \
                 tag, and set `url` to the primary of its slot",
            ),
        ),
        "WRONGTYPE" => (Class::Config, Some("delete the key, or choose another name")),
        "OOM" => (
            Class::Retry,
            Some("raise the server's maxmemory, delete keys, or lower `maxlen` of this sink"),
        ),
        "MISCONF" => (Class::Retry, Some("the server cannot save to its disk: look into its log")),
        "READONLY" => (Class::Retry, Some("this is a replica: set `url` to the primary")),
        "ERR" => meaning_of_text(details),
        // LOADING, BUSY, CLUSTERDOWN, MASTERDOWN, TRYAGAIN, NOREPLICAS, and what a proxy says.
        _ => (Class::Retry, None),
    }
}

/// Errors without a code of their own; before Redis 7 also those that a script met, in its text.
fn meaning_of_text(details: &str) -> (Class, Option<&'static str>) {
    let has = |text: &str| details.contains(text);
    for code in ["OOM", "MISCONF", "READONLY", "NOREPLICAS"] {
        if has(&format!("-{code} ")) || has(&format!(": {code} ")) {
            return meaning(code, "");
        }
    }
    if has("max number of clients") || has("Script killed") {
        return (Class::Retry, None);
    }
    if has("DB index") {
        return (Class::Config, Some("set the number after the last `/` of `url`"));
    }
    if has("without any password configured") {
        return (Class::Config, Some("take the password out of `url`"));
    }
    if has("Protocol error") {
        return (Class::Config, Some("set `entry_bytes_max` to the server's proto-max-bulk-len"));
    }
    (Class::Config, None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_code_has_a_class_and_those_that_a_person_can_mend_a_remedy() {
        for code in ["WRONGPASS", "NOAUTH", "NOPERM", "DENIED", "MOVED", "CROSSSLOT", "WRONGTYPE"] {
            let error = refusal("redis at h:1", code, "no");
            assert_eq!(error.class(), Class::Config, "{error}");
            assert!(error.remedy_text().is_some(), "{error}");
            assert!(error.to_string().starts_with(&format!("redis at h:1 answered {code} no")));
        }
        for code in ["OOM", "MISCONF", "READONLY", "LOADING", "BUSY", "CLUSTERDOWN", "TRYAGAIN"] {
            assert_eq!(refusal("redis", code, "").class(), Class::Retry, "{code}");
        }
    }

    #[test]
    fn an_error_without_a_code_goes_by_its_text() {
        let class = |text| refusal("redis", "ERR", text).class();
        assert_eq!(class("max number of clients reached"), Class::Retry);
        let old = "Error running script (call to f_1): @user_script:9: -OOM command not allowed";
        assert_eq!(class(old), Class::Retry);
        assert_eq!(class("DB index is out of range"), Class::Config);
        assert_eq!(class("unknown command 'XADD'"), Class::Config);
        assert_eq!(class("Protocol error: invalid bulk length"), Class::Config);
    }

    #[test]
    fn a_long_text_is_cut_between_characters() {
        let error = refusal("redis", "ERR", &"ü".repeat(1000));
        assert!(error.to_string().len() <= EXCERPT_BYTES + 10);
    }
}
