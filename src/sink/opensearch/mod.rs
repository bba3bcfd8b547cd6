//! The last state of each row as a document of OpenSearch or Elasticsearch. The version of a
//! document is the offset of its last change, so that one that comes again, or late, does no harm.

use async_trait::async_trait;
use base64::{Engine, engine::general_purpose::STANDARD};
use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::json;
use tokio::time::Instant;

use self::{
    bulk::{Bulk, Outcomes, Reply},
    place::{Place, Places},
};
use super::{Capabilities, Carries, Context, Progress, Sink, With, Written, http::Endpoint};
use crate::{
    change::{Batch, Change, Op},
    config::{self, Document, Format, SearchOnTruncate, Secret, UnchangedColumns},
    error::{Class, Classify, Error, Result},
    failpoint,
    format::Encoder,
};

mod bulk;
mod place;

/// A reply may be this long.
const REPLY_BYTES_MAX: usize = 64 << 20;
/// Of a reply only this is of interest.
const FILTER: &str = "errors,items.*.status,items.*.error.type,items.*.error.reason";
/// Documents that are looked up at one time for a TRUNCATE.
const PAGE_DOCUMENTS: usize = 1000;

/// The `opensearch` sink.
pub(super) struct Opensearch {
    encoder: Encoder,
    endpoint: Endpoint,
    places: Places,
    document: Document,
    on_truncate: SearchOnTruncate,
    unchanged: UnchangedColumns,
    context: Context,
}

/// A page of the documents that a TRUNCATE removes.
#[derive(Debug, Deserialize)]
struct Page {
    /// Left out where there is no index at all.
    #[serde(rename = "_scroll_id", default)]
    scroll_id: String,
    hits: Hits,
}

#[derive(Debug, Deserialize)]
struct Hits {
    hits: Vec<Hit>,
}

#[derive(Debug, Deserialize)]
struct Hit {
    #[serde(rename = "_index")]
    index: String,
    #[serde(rename = "_id")]
    id: String,
}

impl Opensearch {
    pub(super) fn new(options: &config::Opensearch, with: With) -> Result<Self> {
        let With { format, context, .. } = with;
        let mut headers = options.headers.clone();
        let login = login(options)?;
        if let Some(login) = &login {
            headers.insert("authorization".into(), login.clone());
        }
        let ca = options.tls_ca.as_deref();
        let mut endpoint =
            Endpoint::with_authority(&options.url, &headers, options.timeout_ms, ca)?;
        for secret in [&options.password, &options.api_key, &options.bearer].into_iter().flatten() {
            endpoint.hide(secret);
        }
        if options.on_truncate == SearchOnTruncate::Delete && !options.index.contains("{table}") {
            return Err(Error::config(format!(
                "`on_truncate = \"delete\"` empties an index, and `{}` may hold several tables",
                options.index
            ))
            .remedy("name the table in `index`, such as `{schema}.{table}`"));
        }
        // The row alone is the same in every format but in Sequin's.
        let encoding = match (options.document, format) {
            (Document::Record, Format::Sequin) => Format::Sequin,
            (Document::Record, _) => Format::Native,
            (Document::Message, format) => format,
        };
        Ok(Self {
            encoder: with.encoder(encoding)?,
            endpoint,
            places: Places::new(options, &context.names)?,
            document: options.document,
            on_truncate: options.on_truncate,
            unchanged: options.unchanged,
            context: context.clone(),
        })
    }

    /// Adds the actions of a change; `false`: it has none. An error leaves `bulk` as it was.
    fn add(&mut self, bulk: &mut Bulk, index: usize, change: &Change) -> Result<bool> {
        if change.op == Op::Delete {
            bulk.delete(index, &self.places.removed_of(change)?, change.offset)?;
            return Ok(true);
        }
        if change.table.is_none() && self.document == Document::Record {
            return Ok(false);
        }
        let Some(document) = self.document(change)? else { return Ok(false) };
        let new = self.places.new_of(change)?;
        if let Some(old) = self.places.old_of(change)?.filter(|old| *old != new) {
            bulk.delete(index, &old, change.offset)?;
        }
        bulk.index(index, (&new, &document), change.offset)?;
        Ok(true)
    }

    fn document(&mut self, change: &Change) -> Result<Option<Vec<u8>>> {
        let mut body = Vec::new();
        let ready = change.shaped.as_ref().is_some_and(|shaped| shaped.payload.is_some());
        if ready || self.document == Document::Message {
            return Ok(self.encoder.encode(change, &mut body)?.then_some(body));
        }
        let missing = self.encoder.encode_record(change, &mut body)?;
        if let Some(&column) = missing.first()
            && self.unchanged == UnchangedColumns::Refuse
        {
            return Err(lost_column(change, column));
        }
        Ok(Some(body))
    }

    async fn send(&mut self, bulk: &mut Bulk, outcomes: &mut Outcomes) -> Result<()> {
        let bulk = std::mem::take(bulk);
        if bulk.actions.is_empty() {
            return Ok(());
        }
        let reply = self.bulk(&bulk).await?;
        failpoint::reach("opensearch::after_bulk");
        outcomes.settle(&bulk, reply, self.endpoint.name())
    }

    async fn bulk(&mut self, bulk: &Bulk) -> Result<Reply> {
        let url = self.endpoint.below(&["_bulk"], &[("filter_path", FILTER)]);
        self.ask(url, "application/x-ndjson", bulk.body.clone()).await
    }

    async fn ask<T: DeserializeOwned>(
        &mut self,
        url: reqwest::Url,
        content_type: &'static str,
        body: Vec<u8>,
    ) -> Result<T> {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
        let reply = self.endpoint.post_to(url, headers, body).await?;
        let bytes = self.endpoint.read(reply, REPLY_BYTES_MAX).await?;
        let name = self.endpoint.name();
        serde_json::from_slice(&bytes)
            .class(Class::Config, || format!("{name} answered something else than a search engine"))
            .map_err(|error| error.remedy("check that `url` is the address of the cluster itself"))
    }

    /// Deletes every document that is older than the TRUNCATE. Each under its own version, so that
    /// a TRUNCATE that comes again spares what was written after it.
    async fn truncate(
        &mut self,
        at: usize,
        change: &Change,
        outcomes: &mut Outcomes,
    ) -> Result<()> {
        let index = self.places.index(change)?;
        let lenient = [("ignore_unavailable", "true"), ("allow_no_indices", "true")];
        let json = "application/json";
        let refresh = self.endpoint.below(&[&index, "_refresh"], &lenient);
        let _: serde_json::Value = self.ask(refresh, json, Vec::new()).await?;
        let query = [&lenient[..], &[("scroll", "1m"), ("allow_partial_search_results", "false")]];
        let search = self.endpoint.below(&[&index, "_search"], &query.concat());
        let wanted = json!({"size": PAGE_DOCUMENTS, "_source": false, "sort": ["_doc"]});
        let mut page: Page = self.ask(search, json, wanted.to_string().into_bytes()).await?;
        while !page.hits.hits.is_empty() {
            let mut bulk = Bulk::default();
            for Hit { index, id } in page.hits.hits {
                bulk.delete(at, &Place { index, id }, change.offset)?;
            }
            self.send(&mut bulk, outcomes).await?;
            let next = self.endpoint.below(&["_search", "scroll"], &[]);
            let wanted = json!({"scroll": "1m", "scroll_id": page.scroll_id});
            page = self.ask(next, json, wanted.to_string().into_bytes()).await?;
        }
        Ok(())
    }

    async fn write_changes(&mut self, changes: &[Change]) -> Result<Written> {
        let mut bulk = Bulk::default();
        let mut outcomes = Outcomes::all_durable(changes.len());
        let mut filtered = 0;
        for (index, change) in changes.iter().enumerate() {
            if change.op == Op::Truncate && self.on_truncate == SearchOnTruncate::Delete {
                self.send(&mut bulk, &mut outcomes).await?;
                match self.truncate(index, change, &mut outcomes).await {
                    Err(error) if error.class() == Class::Data => outcomes.refuse(index, error),
                    done => done?,
                }
                continue;
            }
            if change.op == Op::Truncate {
                filtered += 1;
                continue;
            }
            match self.add(&mut bulk, index, change) {
                Ok(true) => {}
                Ok(false) => filtered += 1,
                Err(error) if error.class() == Class::Data => outcomes.refuse(index, error),
                Err(error) => return Err(error),
            }
        }
        self.send(&mut bulk, &mut outcomes).await?;
        if let Some(error) = outcomes.outage(self.endpoint.name()) {
            return Err(error);
        }
        self.context.count_filtered(filtered);
        Ok(match outcomes.is_all_durable() {
            true => Written::All,
            false => Written::Each(outcomes.each),
        })
    }
}

fn lost_column(change: &Change, column: usize) -> Error {
    let table = change.table.as_deref();
    let name = table.and_then(|table| table.columns.get(column));
    let name = name.map_or("a column", |column| column.name.as_str());
    let table = table.map(ToString::to_string).unwrap_or_default();
    Error::data(format!(
        "the document would lose `{name}`: the update of {table} left it alone, so that PostgreSQL \
         did not send it"
    ))
    .remedy(format!(
        "ALTER TABLE {table} REPLICA IDENTITY FULL, or `unchanged = \"omit\"` to do without it"
    ))
}

/// The `authorization` header, of whichever login there is.
fn login(options: &config::Opensearch) -> Result<Option<Secret>> {
    let basic = match (&options.username, &options.password) {
        (Some(user), Some(password)) => {
            let both = STANDARD.encode(format!("{user}:{}", password.expose()));
            Some(Secret::new(format!("Basic {both}")))
        }
        (None, None) => None,
        _ => return Err(Error::config("`username` and `password` belong together")),
    };
    let api_key = options.api_key.as_ref().map(|key| format!("ApiKey {}", key.expose()));
    let bearer = options.bearer.as_ref().map(|token| format!("Bearer {}", token.expose()));
    let mut all = basic.into_iter().chain(api_key.into_iter().chain(bearer).map(Secret::new));
    let (login, more) = (all.next(), all.next());
    match more {
        None => Ok(login),
        Some(_) => Err(Error::config("there are several logins for one cluster")
            .remedy("give one of `username` with `password`, `api_key` and `bearer`")),
    }
}

#[async_trait]
impl Sink for Opensearch {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            lanes: true,
            state_target: true,
            supersedes: true,
            carries: Carries::Text,
            routes: true,
            ..Capabilities::default()
        }
    }

    fn not_before(&self) -> Option<Instant> {
        self.endpoint.not_before()
    }

    async fn open(&mut self) -> Result<Option<Progress>> {
        Ok(None)
    }

    async fn write(&mut self, batch: &Batch, _progress: &Progress) -> Result<Written> {
        self.write_changes(&batch.changes).await
    }

    async fn close(&mut self) -> Result<()> {
        Ok(())
    }
}
