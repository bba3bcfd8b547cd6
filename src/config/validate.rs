//! What must hold across keys: names, bounds, addresses, globs, and who reads whom.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    path::{Component, Path, PathBuf},
};

use url::Url;

use super::{
    Config, Plugin, Postgres, Rules, Secret, Sink, SinkKind, Source, document::Places, read::hint,
};
use crate::error::{Error, Result};

/// Leaves room for `walrace_` and a suffix in the 63 bytes of a PostgreSQL name.
const NAME_CHARS_MAX: usize = 48;
const SLOT_CHARS_MAX: usize = 63;

/// Checks a configuration whose every key is well formed.
pub(super) fn check(config: &Config, places: &Places) -> Result<()> {
    let check = Check { config, places };
    check.sources()?;
    check.sinks()?;
    check.files()?;
    check.rest()
}

struct Check<'a> {
    config: &'a Config,
    places: &'a Places,
}

impl Check<'_> {
    fn sources(&self) -> Result<()> {
        if self.config.source.is_empty() {
            return Err(self.places.error("source", "there is no source").remedy(
                "add [source.app] with kind = \"postgres\" and a url, or set DATABASE_URL",
            ));
        }
        let mut slots = BTreeMap::new();
        for (name, source) in &self.config.source {
            let path = format!("source.{name}");
            self.name(&path, name)?;
            let Source::Postgres(postgres) = source;
            self.postgres(&path, postgres)?;
            let slot = postgres.slot.clone().map(|slot| (postgres.url.expose(), slot));
            if let Some(first) = slot.and_then(|slot| slots.insert(slot, name)) {
                let what = format!("sources `{first}` and `{name}` share one slot");
                let error = self.places.error(&format!("{path}.slot"), &what);
                return Err(error.remedy("a slot serves one reader: give each its own"));
            }
        }
        Ok(())
    }

    fn postgres(&self, path: &str, postgres: &Postgres) -> Result<()> {
        let url = postgres.url.expose();
        let rest = url.strip_prefix("postgres://").or_else(|| url.strip_prefix("postgresql://"));
        let problem = match rest {
            None => Some("does not begin with postgres://"),
            Some("") => Some("names no server"),
            Some(rest) if rest.contains(|c: char| c.is_whitespace() || c.is_control()) => {
                Some("contains white space")
            }
            Some(rest) if rest.contains('#') => Some("contains an unescaped `#`"),
            Some(_) => None,
        };
        if let Some(problem) = problem {
            let path = format!("{path}.url");
            let error = self.places.error(&path, &format!("`{path}` {problem}"));
            return Err(error.remedy(
                "postgres://user:password@host:port/database; percent-encode the user and the \
                 password",
            ));
        }
        self.tables(path, &postgres.tables)?;
        for (index, rule) in postgres.compatibility.iter().enumerate() {
            self.tables(&format!("{path}.compatibility[{index}]"), &rule.tables)?;
        }
        for (key, name) in [("slot", &postgres.slot), ("publication", &postgres.publication)] {
            let Some(name) = name else { continue };
            let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
            let fits = !name.is_empty() && name.len() <= SLOT_CHARS_MAX;
            if !fits || (key == "slot" && !name.bytes().all(plain)) {
                let what = format!("`{path}.{key}` is not a name that PostgreSQL takes");
                return Err(self
                    .places
                    .error(&format!("{path}.{key}"), &what)
                    .remedy("1 to 63 of a-z, 0-9 and _"));
            }
        }
        if postgres.plugin == Plugin::Wal2json && postgres.publication.is_some() {
            let what = format!("`{path}.publication` means nothing to the plugin wal2json");
            let error = self.places.error(&format!("{path}.publication"), &what);
            return Err(error.remedy("take it out; `tables` chooses what is captured"));
        }
        Ok(())
    }

    fn sinks(&self) -> Result<()> {
        for (name, sink) in &self.config.sink {
            let path = format!("sink.{name}");
            self.name(&path, name)?;
            self.reads(&path, sink)?;
            self.tables(&path, &sink.tables)?;
            if sink.retry_ms_min > sink.retry_ms_max {
                let what = format!(
                    "`{path}.retry_ms_min` ({}) is above `retry_ms_max` ({})",
                    sink.retry_ms_min, sink.retry_ms_max
                );
                return Err(self.places.error(&format!("{path}.retry_ms_min"), &what));
            }
            self.contracts(&path, sink)?;
            self.rules(&path, &sink.rules)?;
            self.target(&path, &sink.kind)?;
        }
        Ok(())
    }

    fn reads(&self, path: &str, sink: &Sink) -> Result<()> {
        let names: Vec<&str> = self.config.source.keys().map(String::as_str).collect();
        match &sink.source {
            None if names.len() > 1 => {
                let what = format!("`{path}.source` is missing: there are several sources");
                let error = self.places.error(path, &what);
                Err(error.remedy(format!("one of: {}", names.join(", "))))
            }
            Some(source) if !self.config.source.contains_key(source) => {
                let path = format!("{path}.source");
                let error = self.places.error(&path, &format!("`{path}` names no source"));
                Err(error.remedy(hint(source, &names)))
            }
            _ => Ok(()),
        }
    }

    fn contracts(&self, path: &str, sink: &Sink) -> Result<()> {
        for (index, contract) in sink.contract.iter().enumerate() {
            let path = format!("{path}.contract[{index}]");
            let parts = contract.table.split_once('.');
            if parts.is_none_or(|(schema, table)| schema.is_empty() || table.is_empty()) {
                let path = format!("{path}.table");
                let what = format!("`{path}` is not schema.table");
                return Err(self.places.error(&path, &what).remedy("such as \"public.orders\""));
            }
            if contract.columns.values().any(|wanted| wanted.trim().is_empty()) {
                let path = format!("{path}.columns");
                let what = format!("`{path}` has a column without a type");
                return Err(self.places.error(&path, &what).remedy("such as total = \"numeric\""));
            }
        }
        Ok(())
    }

    fn rules(&self, path: &str, rules: &Rules) -> Result<()> {
        let Some(problem) = rules.problem() else { return Ok(()) };
        let path = format!("{path}.{}", problem.path);
        let error = self.places.error(&path, &format!("`{path}` {}", problem.what));
        Err(error.remedy(problem.remedy))
    }

    fn target(&self, path: &str, kind: &SinkKind) -> Result<()> {
        match kind {
            SinkKind::Webhook(webhook) => {
                self.web_url(path, &webhook.url)?;
                self.headers(path, &webhook.headers)?;
                self.header_name(&format!("{path}.hmac_header"), &webhook.hmac_header)
            }
            SinkKind::Custom(custom) => {
                self.web_url(path, &custom.url)?;
                self.headers(path, &custom.headers)
            }
            SinkKind::File(file) if file.path.file_name().is_none() => {
                let path = format!("{path}.path");
                Err(self.places.error(&path, &format!("`{path}` names no file")))
            }
            SinkKind::Opensearch(search) => {
                self.web_url(path, &search.url)?;
                self.headers(path, &search.headers)
            }
            _ => Ok(()), // what is wrong about the others, they say themselves when they are made
        }
    }

    fn web_url(&self, path: &str, url: &Secret) -> Result<()> {
        let path = format!("{path}.url");
        let problem = match Url::parse(url.expose()) {
            Err(error) => error.to_string(), // says what is wrong, without the text
            Ok(url) if !matches!(url.scheme(), "http" | "https") => "neither http nor https".into(),
            Ok(_) => return Ok(()),
        };
        let error = self.places.error(&path, &format!("`{path}` is not a web address: {problem}"));
        Err(error.remedy("https://host:port/path"))
    }

    fn headers(&self, path: &str, headers: &BTreeMap<String, Secret>) -> Result<()> {
        for (name, value) in headers {
            let path = format!("{path}.headers.{name}");
            self.header_name(&path, name)?;
            if reqwest::header::HeaderValue::from_str(value.expose()).is_err() {
                let what = format!("`{path}` has a character that a header cannot hold");
                return Err(self.places.error(&path, &what).remedy("visible ASCII on one line"));
            }
        }
        Ok(())
    }

    fn header_name(&self, path: &str, name: &str) -> Result<()> {
        match reqwest::header::HeaderName::from_bytes(name.as_bytes()) {
            Ok(_) => Ok(()),
            Err(_) => {
                let error = self.places.error(path, &format!("`{path}`: {name:?} names no header"));
                Err(error.remedy("letters, digits and `-`"))
            }
        }
    }

    fn files(&self) -> Result<()> {
        let mut writers: BTreeMap<PathBuf, &str> = BTreeMap::new();
        for (name, sink) in &self.config.sink {
            let SinkKind::File(file) = &sink.kind else { continue };
            if let Some(first) = writers.insert(plain(&file.path), name) {
                let what = format!("sinks `{first}` and `{name}` write the same file");
                let error = self.places.error(&format!("sink.{name}.path"), &what);
                return Err(error.remedy("give each its own path"));
            }
        }
        Ok(())
    }

    fn tables(&self, path: &str, globs: &[String]) -> Result<()> {
        for (index, glob) in globs.iter().enumerate() {
            if let Some(problem) = glob_problem(glob) {
                let path = format!("{path}.tables[{index}]");
                let error = self.places.error(&path, &format!("`{path}` {problem}"));
                return Err(
                    error.remedy("such as \"public.*\", \"*.orders\" or \"!public.audit_*\"")
                );
            }
        }
        Ok(())
    }

    fn name(&self, path: &str, name: &str) -> Result<()> {
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"_.-".contains(&b);
        let hidden = name.starts_with('.');
        let what = path.split('.').next().unwrap_or_default();
        if name.is_empty() || name.len() > NAME_CHARS_MAX || hidden || !name.bytes().all(plain) {
            let error = self.places.error(path, &format!("{name:?} is not a name for a {what}"));
            return Err(error.remedy(format!(
                "1 to {NAME_CHARS_MAX} of a-z, 0-9, `_`, `.` and `-`, not beginning with `.`"
            )));
        }
        Ok(())
    }

    fn rest(&self) -> Result<()> {
        let listen = &self.config.http.listen;
        let port = listen.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok());
        if !listen.is_empty() && port.is_none() {
            let error = self.places.error("http.listen", "`http.listen` is not address and port");
            return Err(error.remedy("such as \"127.0.0.1:7376\"; \"\" for no HTTP"));
        }
        self.api_tokens()?;
        let journal = &self.config.journal;
        if journal.bytes_max != 0 && journal.bytes_max < journal.segment_bytes_max.saturating_mul(2)
        {
            let what = "`journal.bytes_max` has no room for two segments";
            return Err(self.places.error("journal.bytes_max", what).remedy(format!(
                "raise it to {}, or lower `journal.segment_bytes_max`",
                journal.segment_bytes_max.saturating_mul(2)
            )));
        }
        match &self.config.log.level {
            Some(level) => self.level(level),
            None => Ok(()),
        }
    }

    /// Messages are not given to a whole network without asking who wants them.
    fn api_tokens(&self) -> Result<()> {
        let tokens = &self.config.api_tokens;
        if let Some(index) = tokens.iter().position(|token| token.token.expose().is_empty()) {
            let path = format!("api_tokens[{index}].token");
            return Err(self.places.error(&path, &format!("`{path}` is empty")));
        }
        let mut sinks = self.config.sink.iter();
        let pulled = sinks.find(|(_, sink)| matches!(sink.kind, SinkKind::HttpPull(_)));
        let listen = self.config.http.listen.as_str();
        match pulled {
            Some((name, _)) if tokens.is_empty() && !listen.is_empty() && !is_loopback(listen) => {
                let what = format!(
                    "`http.listen` is open to other machines, and nobody is asked for a token \
                     before reading from sink {name}"
                );
                Err(self
                    .places
                    .error("http.listen", &what)
                    .remedy("add [[api_tokens]] with a name and a token, or listen on 127.0.0.1"))
            }
            _ => Ok(()),
        }
    }

    fn level(&self, level: &str) -> Result<(), Error> {
        match tracing_subscriber::EnvFilter::builder().parse(level) {
            Ok(_) => Ok(()),
            Err(_) => {
                let error = self.places.error("log.level", "`log.level` is not a filter");
                Err(error.remedy("such as \"info\", \"debug\" or \"info,walrace=debug\""))
            }
        }
    }
}

/// Whether only this machine can reach the address.
fn is_loopback(listen: &str) -> bool {
    let host = listen.rsplit_once(':').map_or(listen, |(host, _)| host);
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

/// What is wrong with a glob over `schema.table`.
pub(super) fn glob_problem(glob: &str) -> Option<&'static str> {
    let name = glob.strip_prefix('!').unwrap_or(glob);
    if name.is_empty() {
        return Some("is empty");
    }
    if name.trim() != name || name.chars().any(char::is_control) {
        return Some("has white space around it");
    }
    match name.split_once('.') {
        Some((schema, table)) if schema.is_empty() || table.is_empty() => Some("lacks a part"),
        None if name != "*" => Some("names no schema"),
        _ => None,
    }
}

/// The path without `.` parts, so that two spellings of one file meet.
fn plain(path: &Path) -> PathBuf {
    path.components().filter(|part| *part != Component::CurDir).collect()
}
