//! The running Walrace that a command asks, found through `data_dir`.

use std::{io::Write, time::Duration};

pub use reqwest::Method;
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    api::ADDRESS_FILE,
    config::Config,
    error::{Class, Classify, Error, Result},
    runtime::Status,
};

/// Who does not connect, or does not say who it is, within this time is not there.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// A running Walrace, reached over HTTP.
#[derive(Debug)]
pub struct Instance {
    base: String,
    client: reqwest::Client,
}

impl Instance {
    /// Finds the process that serves `config.data_dir`.
    pub async fn find(config: &Config) -> Result<Self> {
        Self::running(config).await?.ok_or_else(|| {
            let data_dir = config.data_dir.display();
            Error::config(format!("no walrace is running on data_dir {data_dir}"))
                .remedy("start it with `walrace run`")
        })
    }

    /// As `find`; `None` where no process answers.
    pub async fn running(config: &Config) -> Result<Option<Self>> {
        let path = config.data_dir.join(ADDRESS_FILE);
        let Ok(text) = std::fs::read_to_string(&path) else { return Ok(None) };
        let mut lines = text.lines();
        let (Some(address), Some(instance)) = (lines.next(), lines.next()) else {
            return Ok(None);
        };
        let client = reqwest::Client::builder()
            .no_proxy()
            .connect_timeout(ANSWER_MAX)
            .build()
            .class(Class::Bug, || "cannot build an HTTP client")?;
        let found = Self { base: format!("http://{address}"), client };
        Ok(found.is(instance).await.then_some(found))
    }

    /// Whether the one that answers is the one that wrote the file.
    async fn is(&self, instance: &str) -> bool {
        let health = self.client.get(format!("{}/health", self.base)).timeout(ANSWER_MAX);
        let Ok(reply) = health.send().await else { return false };
        let Ok(body) = reply.json::<serde_json::Value>().await else { return false };
        body.get("instance").and_then(|text| text.as_str()) == Some(instance)
    }

    /// What every part is doing.
    pub async fn status(&self) -> Result<Status> {
        let failed = || format!("cannot read the status of {}", self.base);
        let reply = self.get("/status", &[]).await?;
        reply.json().await.class(Class::Retry, failed)
    }

    /// Copies a stream of lines to `out` until it ends; a closed pipe ends it too. Returns whether
    /// the stream came to its own end.
    pub async fn stream(
        &self,
        path: &str,
        query: &[(&str, String)],
        out: &mut impl Write,
    ) -> Result<bool> {
        let mut reply = self.get(path, query).await?;
        loop {
            let chunk = reply.chunk().await.class(Class::Retry, || "the stream broke off")?;
            let Some(chunk) = chunk else { return Ok(true) };
            let written = out.write_all(&chunk).and_then(|()| out.flush());
            if written.is_err() {
                return Ok(false);
            }
        }
    }

    /// Asks for JSON.
    pub async fn read<T: DeserializeOwned>(
        &self,
        path: &str,
        query: &[(&str, String)],
    ) -> Result<T> {
        let failed = || format!("cannot read the answer of {}", self.base);
        self.get(path, query).await?.json().await.class(Class::Bug, failed)
    }

    /// Has something done, and reads what came of it.
    pub async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T> {
        let request = self.client.request(method, format!("{}{path}", self.base)).json(body);
        let failed = || format!("cannot read the answer of {}", self.base);
        self.send(request).await?.json().await.class(Class::Bug, failed)
    }

    async fn get(&self, path: &str, query: &[(&str, String)]) -> Result<reqwest::Response> {
        let url = url::Url::parse_with_params(&format!("{}{path}", self.base), query)
            .class(Class::Bug, || format!("`{path}` makes no URL"))?;
        self.send(self.client.get(url)).await
    }

    async fn send(&self, request: reqwest::RequestBuilder) -> Result<reqwest::Response> {
        let failed = || format!("cannot ask {}", self.base);
        let reply = request.send().await.class(Class::Retry, failed)?;
        if reply.status().is_success() {
            return Ok(reply);
        }
        let status = reply.status();
        let body: serde_json::Value = reply.json().await.unwrap_or_default();
        let text = |key: &str| body.get(key).and_then(|text| text.as_str()).map(str::to_owned);
        let error = Error::config(text("error").unwrap_or_else(|| format!("it answered {status}")));
        Err(match text("remedy") {
            Some(remedy) => error.remedy(remedy),
            None => error,
        })
    }
}
