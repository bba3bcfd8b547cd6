//! One HTTP endpoint: requests with headers and a limit of time, and what its replies mean.

use std::{collections::BTreeMap, path::Path, time::Duration};

use reqwest::{
    Certificate, Client, Response, StatusCode, Url,
    header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER},
    redirect::Policy,
};
use tokio::time::Instant;

use crate::{
    change::Change,
    config::Secret,
    error::{Class, Classify, Error, Result},
    format::Encoder,
};

/// Of a reply that is no success this much is shown.
const EXCERPT_BYTES: usize = 200;
/// This much of it is read before secrets are masked, so that none is cut in two.
const EXCERPT_READ_BYTES: usize = 8 << 10;
/// Shorter parts of a header's value are words such as `Bearer`, not secrets.
const SECRET_BYTES_MIN: usize = 7;
/// A first segment of a path that is as long as this may be a token.
const PATH_SECRET_BYTES_MIN: usize = 20;
/// Of a reply that nobody needs this much is read, so that the connection can be used again.
const DRAIN_BYTES_MAX: usize = 64 << 10;
/// A `Retry-After` beyond this is cut: a target cannot stop a sink for days by a slip.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(600);

/// Where a sink POSTs to.
pub(super) struct Endpoint {
    client: Client,
    url: Url,
    /// What errors may show of the address.
    name: String,
    timeout: Duration,
    /// Texts that must not be shown although a reply may echo them.
    secrets: Vec<String>,
    not_before: Option<Instant>,
}

impl Endpoint {
    /// Checks the address and the headers; connects to nothing.
    pub(super) fn new(
        url: &Secret,
        headers: &BTreeMap<String, Secret>,
        timeout_ms: u64,
    ) -> Result<Self> {
        Self::with_authority(url, headers, timeout_ms, None)
    }

    /// The same, trusting also the authorities of a PEM file.
    pub(super) fn with_authority(
        url: &Secret,
        headers: &BTreeMap<String, Secret>,
        timeout_ms: u64,
        authority: Option<&Path>,
    ) -> Result<Self> {
        // Fails where a provider is installed already, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let url = parse_url(url)?;
        let timeout = Duration::from_millis(timeout_ms);
        let mut builder = Client::builder();
        for certificate in authority.map(certificates).transpose()?.unwrap_or_default() {
            builder = builder.add_root_certificate(certificate);
        }
        let client = builder
            .default_headers(header_map(headers)?)
            .user_agent(concat!("walrace/", env!("CARGO_PKG_VERSION")))
            .redirect(Policy::none())
            .timeout(timeout)
            .build()
            .class(Class::Config, || "cannot set up the HTTP client")?;
        let name = name_of(&url);
        let mut endpoint =
            Self { client, url, name, timeout, secrets: Vec::new(), not_before: None };
        endpoint.hide_all(headers);
        Ok(endpoint)
    }

    /// When the last reply wants the next request.
    pub(super) fn not_before(&self) -> Option<Instant> {
        self.not_before
    }

    /// Masks a further text in the replies that are shown.
    pub(super) fn hide(&mut self, secret: &Secret) {
        self.hide_text(secret.expose().to_owned());
    }

    fn hide_all(&mut self, headers: &BTreeMap<String, Secret>) {
        let of_url: Vec<String> = self
            .url
            .query_pairs()
            .map(|(_, value)| value.into_owned())
            .chain(self.url.password().map(str::to_owned))
            .chain(hidden_segments(&self.url).map(str::to_owned))
            .collect();
        of_url.into_iter().for_each(|text| self.hide_text(text));
        for value in headers.values() {
            self.hide(value);
            let parts = value.expose().split_whitespace();
            let long = parts.filter(|part| part.len() >= SECRET_BYTES_MIN);
            long.for_each(|part| self.hide_text(part.to_owned()));
        }
    }

    fn hide_text(&mut self, text: String) {
        if !text.is_empty() {
            self.secrets.push(text);
            // The longest first: a part must not be masked out of the middle of the whole.
            self.secrets.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
        }
    }

    /// POSTs JSON and waits for a reply of success; every other outcome is an error whose class
    /// says what it means (DESIGN, section 11).
    pub(super) async fn post(&mut self, headers: HeaderMap, body: Vec<u8>) -> Result<Response> {
        self.post_to(self.url.clone(), headers, body).await
    }

    /// The address of a path below the sink's own, with a query.
    pub(super) fn below(&self, path: &[&str], query: &[(&str, &str)]) -> Url {
        let mut url = self.url.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().extend(path);
        }
        if !query.is_empty() {
            url.query_pairs_mut().extend_pairs(query);
        }
        url
    }

    /// The same as [`post`](Self::post), to an address that [`below`](Self::below) made.
    pub(super) async fn post_to(
        &mut self,
        url: Url,
        headers: HeaderMap,
        body: Vec<u8>,
    ) -> Result<Response> {
        self.not_before = None;
        let request = self.client.post(url).headers(headers).body(body);
        let reply = request.send().await.map_err(|cause| self.unreachable(cause))?;
        let status = reply.status();
        if status.is_success() {
            return Ok(reply);
        }
        let class = class_of(status);
        if class == Class::Retry {
            let wait = reply.headers().get(RETRY_AFTER).and_then(retry_after);
            self.not_before = wait.map(|wait| Instant::now() + wait.min(RETRY_AFTER_MAX));
        }
        Err(self.refusal(class, reply).await)
    }

    /// The body of a reply up to `bytes_max`; more is an error of class `Config`.
    pub(super) async fn read(&self, mut reply: Response, bytes_max: usize) -> Result<Vec<u8>> {
        let mut body = Vec::new();
        while let Some(piece) = reply.chunk().await.map_err(|cause| self.unreachable(cause))? {
            if body.len() + piece.len() > bytes_max {
                let name = &self.name;
                return Err(Error::config(format!("{name} replied with over {bytes_max} bytes")));
            }
            body.extend_from_slice(&piece);
        }
        Ok(body)
    }

    /// Host and path.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    fn unreachable(&self, cause: reqwest::Error) -> Error {
        let name = &self.name;
        if cause.is_timeout() {
            let timeout_ms = self.timeout.as_millis();
            return Error::retry(format!("{name} did not answer within {timeout_ms} ms"));
        }
        // The address may hold a password or a token in its query.
        Error::retry(format!("cannot reach {name}")).caused_by(cause.without_url())
    }

    async fn refusal(&self, class: Class, reply: Response) -> Error {
        let status = reply.status();
        let mut text = format!("{} answered {}", self.name, status.as_u16());
        if let Some(reason) = status.canonical_reason() {
            text.push_str(&format!(" {reason}"));
        }
        let excerpt = self.excerpt(reply).await;
        if !excerpt.is_empty() {
            text.push_str(&format!(": {excerpt}"));
        }
        let error = Error::new(class, text);
        match class {
            Class::Config if status.is_redirection() => {
                error.remedy("redirects are not followed: set `url` to where it points")
            }
            Class::Config => error.remedy("check `url` and the headers of this sink"),
            _ => error,
        }
    }

    async fn excerpt(&self, mut reply: Response) -> String {
        let mut body = Vec::new();
        while body.len() < EXCERPT_READ_BYTES {
            match reply.chunk().await {
                Ok(Some(piece)) => body.extend_from_slice(&piece),
                Ok(None) | Err(_) => break,
            }
        }
        // Masked before it is cut, so that a cut cannot leave a part of a secret.
        let mut text = String::from_utf8_lossy(&body).into_owned();
        for secret in &self.secrets {
            text = text.replace(secret.as_str(), "***");
        }
        cut(&mut text, EXCERPT_BYTES);
        let visible = |c: char| if c.is_control() { ' ' } else { c };
        text.trim().chars().map(visible).collect()
    }
}

/// Cuts a text to at most `bytes_max`, between two characters.
pub(super) fn cut(text: &mut String, bytes_max: usize) {
    let mut end = text.len().min(bytes_max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
}

/// Lets the connection be used again.
pub(super) async fn drain(mut reply: Response) {
    let mut read = 0;
    while let Ok(Some(piece)) = reply.chunk().await {
        read += piece.len();
        if read > DRAIN_BYTES_MAX {
            return;
        }
    }
}

/// Several messages as one body, `{"data":[...]}`, and what identifies it.
pub(super) struct Body {
    pub(super) bytes: Vec<u8>,
    /// Whether each change of the batch has a message in it.
    pub(super) sent: Vec<bool>,
    /// The same on each delivery of the same run of changes: the key of the first, and the count.
    pub(super) id: String,
}

impl Body {
    /// `None` where the format has no message for any of the changes.
    pub(super) fn new(encoder: &mut Encoder, changes: &[Change]) -> Result<Option<Self>> {
        let mut bytes = b"{\"data\":[".to_vec();
        let mut sent = Vec::with_capacity(changes.len());
        let mut first = None;
        let mut count = 0;
        for change in changes {
            let end = bytes.len();
            if count > 0 {
                bytes.push(b',');
            }
            let written = encoder.encode(change, &mut bytes)?;
            sent.push(written);
            if written {
                first = first.or(Some(change));
                count += 1;
            } else {
                bytes.truncate(end);
            }
        }
        bytes.extend_from_slice(b"]}");
        let id = first.map(|first| format!("{}-{count}", first.idempotency_key()));
        Ok(id.map(|id| Self { bytes, sent, id }))
    }
}

/// The headers that every request has: the type, and the id under both of its names.
pub(super) fn identified(id: &str) -> Result<HeaderMap> {
    let mut headers = HeaderMap::new();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert("webhook-id", header_value(id)?);
    headers.insert("idempotency-key", header_value(id)?);
    Ok(headers)
}

pub(super) fn header_value(text: &str) -> Result<HeaderValue> {
    HeaderValue::from_str(text).class(Class::Bug, || "a header of ours is not printable")
}

fn class_of(status: StatusCode) -> Class {
    match status.as_u16() {
        408 | 425 | 429 | 500..=599 => Class::Retry,
        401 | 403 | 404 | 405 | 410 | 300..=399 => Class::Config,
        _ => Class::Data,
    }
}

/// Seconds, or a date (RFC 9110, section 10.2.3).
fn retry_after(value: &HeaderValue) -> Option<Duration> {
    let text = value.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let time = jiff::fmt::rfc2822::parse(text).ok()?.timestamp();
    let wait = time.duration_since(jiff::Timestamp::now());
    Some(wait.try_into().unwrap_or(Duration::ZERO))
}

/// Host, port, and of the path what cannot be a token: many services put one behind the first
/// segment (`https://hooks.example/services/T0/B0/hunter2`).
fn name_of(url: &Url) -> String {
    let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
    let first = url.path_segments().and_then(|mut segments| segments.next()).unwrap_or_default();
    let shown = if first.len() < PATH_SECRET_BYTES_MIN { first } else { "…" };
    let more = if url.path_segments().is_some_and(|all| all.count() > 1) { "/…" } else { "" };
    format!("{}{port}/{shown}{more}", url.host_str().unwrap_or_default())
}

/// Segments of the path that are not shown and are long enough to be tokens.
fn hidden_segments(url: &Url) -> impl Iterator<Item = &str> {
    let segments = url.path_segments().into_iter().flatten().enumerate();
    segments.filter_map(|(index, segment)| {
        let min = if index == 0 { PATH_SECRET_BYTES_MIN } else { SECRET_BYTES_MIN };
        (segment.len() >= min).then_some(segment)
    })
}

fn parse_url(secret: &Secret) -> Result<Url> {
    let url = Url::parse(secret.expose()).ok();
    let url = url.filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
    // Neither the text nor the cause is shown: both may hold a password.
    url.ok_or_else(|| {
        Error::config("`url` is not an address of the form https://host/path")
            .remedy("write it with its scheme, http or https")
    })
}

fn certificates(path: &Path) -> Result<Vec<Certificate>> {
    let shown = path.display();
    let pem =
        std::fs::read(path).class(Class::Config, || format!("cannot read `tls_ca` {shown}"))?;
    let found = Certificate::from_pem_bundle(&pem)
        .class(Class::Config, || format!("`tls_ca` {shown} holds no certificates"))?;
    if found.is_empty() {
        return Err(Error::config(format!("`tls_ca` {shown} holds no certificates"))
            .remedy("it is a PEM file with one or more CERTIFICATE blocks"));
    }
    Ok(found)
}

fn header_map(headers: &BTreeMap<String, Secret>) -> Result<HeaderMap> {
    let mut map = HeaderMap::new();
    for (name, value) in headers {
        let parsed = HeaderName::from_bytes(name.as_bytes())
            .map_err(|_| Error::config(format!("`{name}` is not the name of an HTTP header")))?;
        let mut value = HeaderValue::from_str(value.expose()).map_err(|_| {
            Error::config(format!("the value of the header `{name}` is not printable"))
        })?;
        value.set_sensitive(true);
        map.insert(parsed, value);
    }
    Ok(map)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reply_code_has_the_class_that_the_design_gives_it() {
        let class = |code| class_of(StatusCode::from_u16(code).unwrap());
        for code in [401, 403, 404, 405, 410, 300, 301, 302, 304, 307, 308] {
            assert_eq!(class(code), Class::Config, "{code}");
        }
        for code in [408, 425, 429, 500, 502, 503, 504, 599] {
            assert_eq!(class(code), Class::Retry, "{code}");
        }
        for code in [400, 413, 422, 402, 406, 409, 418, 451] {
            assert_eq!(class(code), Class::Data, "{code}");
        }
    }

    #[test]
    fn of_an_address_only_what_cannot_be_a_token_is_shown() {
        let name = |url| name_of(&Url::parse(url).unwrap());
        assert_eq!(name("https://a.example"), "a.example/");
        assert_eq!(name("https://u:pw@a.example:8443/hook?token=x"), "a.example:8443/hook");
        assert_eq!(name("https://a.example/services/T0/hunter2"), "a.example/services/…");
        assert_eq!(name("https://a.example/d2Vob29rLXRva2VuLWhlcmU"), "a.example/…");
        let url = Url::parse("https://a.example/services/T0/hunter2").unwrap();
        assert_eq!(hidden_segments(&url).collect::<Vec<_>>(), ["hunter2"]);
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let wait = |text| retry_after(&HeaderValue::from_static(text));
        assert_eq!(wait("120"), Some(Duration::from_secs(120)));
        assert_eq!(wait("Fri, 31 Dec 1999 23:59:59 GMT"), Some(Duration::ZERO));
        assert!(wait("Fri, 31 Dec 2100 23:59:59 GMT").unwrap() > Duration::from_secs(1 << 30));
        assert_eq!(wait("soon"), None);
    }

    #[test]
    fn an_address_that_is_refused_is_not_shown() {
        for url in ["ftp://u:hunter2@host/", "hunter2", "https://", "http://[hunter2"] {
            let error = Endpoint::new(&Secret::new(url), &BTreeMap::new(), 1).err().unwrap();
            assert_eq!(error.class(), Class::Config);
            assert!(!error.to_string().contains("hunter2"), "{error}");
        }
    }
}
