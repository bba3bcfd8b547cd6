//! Texts that are never shown.

use std::{borrow::Cow, fmt};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize, Serializer};

const MASK: &str = "***";

/// Path segments of at least this length in a web address are taken for tokens, as chat and
/// automation services put them there.
const TOKEN_CHARS: usize = 20;

/// A text that is never shown: `Debug`, `Display` and serialization mask it. Of a URL only the
/// password and what looks like a token are masked.
#[derive(Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(transparent)]
#[schemars(extend("format" = "password"))]
pub struct Secret(String);

impl Secret {
    /// Wraps a text.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text itself; never log it.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// What may be shown: a URL without its password, tokens and query values; `***` for any other
    /// text.
    pub fn masked(&self) -> Cow<'static, str> {
        match self.0.split_once("://") {
            Some((scheme, rest)) if is_scheme(scheme) => Cow::Owned(mask_url(scheme, rest)),
            _ => Cow::Borrowed(MASK),
        }
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.masked())
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.masked())
    }
}

impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.masked())
    }
}

fn is_scheme(text: &str) -> bool {
    const SCHEMES: [&str; 11] = [
        "postgres",
        "postgresql",
        "http",
        "https",
        "redis",
        "rediss",
        "nats",
        "tls",
        "amqp",
        "amqps",
        "s3",
    ];
    SCHEMES.contains(&text)
}

/// Works on the text, not on a parsed URL: one that does not parse must not be shown either. All up
/// to the last `@` counts as user and password, so that an unescaped `/`, `?` or `#` in a password
/// cannot put its end where it would be shown.
fn mask_url(scheme: &str, rest: &str) -> String {
    let (login, rest) = rest.rsplit_once('@').map_or((None, rest), |(l, rest)| (Some(l), rest));
    let login = login.map_or_else(String::new, |login| mask_login(scheme, login));
    let rest = rest.split('#').next().unwrap_or_default();
    let (address, query) = rest.split_once('?').unwrap_or((rest, ""));
    let address = if scheme.starts_with("http") { mask_path(address) } else { address.into() };
    format!("{scheme}://{login}{address}{}", mask_query(scheme, query))
}

fn mask_login(scheme: &str, login: &str) -> String {
    match login.split_once(':') {
        Some((user, _)) => format!("{user}:{MASK}@"),
        None if scheme.starts_with("http") => format!("{MASK}@"), // an API token
        None => format!("{login}@"),
    }
}

fn mask_path(address: &str) -> String {
    let mut segments = address.split('/');
    let mut shown = segments.next().unwrap_or_default().to_owned();
    for segment in segments {
        shown.push('/');
        shown.push_str(if segment.chars().count() >= TOKEN_CHARS { MASK } else { segment });
    }
    shown
}

fn mask_query(scheme: &str, query: &str) -> String {
    let mut shown = String::new();
    for (index, pair) in query.split('&').filter(|pair| !pair.is_empty()).enumerate() {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let hidden = scheme.starts_with("http") || name.to_lowercase().contains("password");
        shown.push(if index == 0 { '?' } else { '&' });
        shown.push_str(name);
        shown.push('=');
        shown.push_str(if hidden { MASK } else { value });
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, shown: &str) {
        let secret = Secret::new(text);
        assert_eq!(format!("{secret} {secret:?}"), format!("{shown} {shown}"), "of {text}");
        assert_eq!(serde_json::to_value(&secret).unwrap(), shown);
    }

    #[test]
    fn a_url_keeps_all_but_what_opens_the_door() {
        check("postgres://walrace:hunter2@host:5432/db", "postgres://walrace:***@host:5432/db");
        check(
            "postgres://walrace@host/db?sslmode=require",
            "postgres://walrace@host/db?sslmode=require",
        );
        check(
            "postgres://host/db?user=a&password=hunter2&sslpassword=x",
            "postgres://host/db?user=a&password=***&sslpassword=***",
        );
        check(
            "https://hooks.example/services/T0/B0/abcdefghijklmnopqrstuvwx",
            "https://hooks.example/services/T0/B0/***",
        );
        check("https://example.org/hook?token=abc#frag", "https://example.org/hook?token=***");
        check("https://ghp_token@example.org/", "https://***@example.org/");
        check("http://localhost:8080/hook", "http://localhost:8080/hook");
    }

    #[test]
    fn a_password_with_unescaped_marks_stays_hidden() {
        check("postgres://u:a@b/c?d#e@host/db", "postgres://u:***@host/db");
    }

    #[test]
    fn any_other_text_is_masked_whole() {
        check("whsec_abc", "***");
        check("mysql://u:p@h/d", "***");
        check("", "***");
    }
}
