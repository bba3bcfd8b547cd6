//! HTTP POST of each change or each batch, signed on request. At least once: the receiver tells a
//! second delivery by the idempotency key.

use async_trait::async_trait;
use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use tokio::time::Instant;

use super::{
    Capabilities, Carries, Context, Outcome, Progress, Sink, With, Written,
    http::{self, Body, Endpoint},
    signature::{self, Signer},
};
use crate::{
    change::{Batch, Change, Timestamp},
    config::{self, Secret},
    error::{Class, Error, Result},
    format::Encoder,
};

/// The `webhook` sink.
pub(super) struct Webhook {
    encoder: Encoder,
    endpoint: Endpoint,
    batch: bool,
    signer: Option<Signer>,
    hmac: Option<(HeaderName, Secret)>,
    context: Context,
}

impl Webhook {
    pub(super) fn new(options: &config::Webhook, with: With) -> Result<Self> {
        let With { format, context, .. } = with;
        let mut endpoint = Endpoint::new(&options.url, &options.headers, options.timeout_ms)?;
        for secret in options.signing_secret.iter().chain(&options.hmac_secret) {
            endpoint.hide(secret);
        }
        let hmac = match &options.hmac_secret {
            None => None,
            Some(secret) => {
                let name = &options.hmac_header;
                let header = HeaderName::from_bytes(name.as_bytes()).map_err(|_| {
                    Error::config(format!("`hmac_header` `{name}` is not the name of a header"))
                })?;
                Some((header, secret.clone()))
            }
        };
        Ok(Self {
            encoder: with.encoder(format)?,
            endpoint,
            batch: options.batch,
            signer: options.signing_secret.as_ref().map(Signer::new).transpose()?,
            hmac,
            context: context.clone(),
        })
    }

    async fn write_batch(&mut self, changes: &[Change]) -> Result<Written> {
        let Some(body) = Body::new(&mut self.encoder, changes)? else {
            self.context.count_filtered(changes.len() as u64);
            return Ok(Written::All);
        };
        let filtered = body.sent.iter().filter(|sent| !**sent).count();
        self.post(&body.id, body.bytes, Vec::new()).await?;
        self.context.count_filtered(filtered as u64);
        Ok(Written::All)
    }

    /// One request a change, in order; the first that is refused ends the run.
    async fn write_each(&mut self, changes: &[Change]) -> Result<Written> {
        let mut outcomes = Vec::with_capacity(changes.len());
        for change in changes {
            match self.write_one(change).await {
                Ok(()) => outcomes.push(Outcome::Durable),
                Err(error) if error.class() == Class::Data => {
                    outcomes.push(Outcome::Refused(error));
                    break;
                }
                Err(error) if outcomes.is_empty() => return Err(error),
                // It comes again, first in its batch, if it lasts.
                Err(_) => break,
            }
        }
        if outcomes.len() == changes.len()
            && outcomes.iter().all(|outcome| matches!(outcome, Outcome::Durable))
        {
            return Ok(Written::All);
        }
        outcomes.resize_with(changes.len(), || Outcome::Unknown);
        Ok(Written::Each(outcomes))
    }

    async fn write_one(&mut self, change: &Change) -> Result<()> {
        let mut body = Vec::new();
        if self.encoder.encode(change, &mut body)? {
            let headers = self.encoder.headers(change)?;
            self.post(&change.idempotency_key(), body, headers).await
        } else {
            self.context.count_filtered(1);
            Ok(())
        }
    }

    /// `extra` are the headers of the format.
    async fn post(
        &mut self,
        id: &str,
        body: Vec<u8>,
        extra: Vec<(&'static str, String)>,
    ) -> Result<()> {
        let mut headers = http::identified(id)?;
        if !self.batch {
            let kind = HeaderValue::from_static(self.encoder.content_type());
            headers.insert(CONTENT_TYPE, kind);
        }
        for (name, value) in extra {
            headers.insert(name, http::header_value(&value)?);
        }
        self.sign(id, &body, &mut headers)?;
        let reply = self.endpoint.post(headers, body).await?;
        http::drain(reply).await;
        Ok(())
    }

    fn sign(&self, id: &str, body: &[u8], headers: &mut HeaderMap) -> Result<()> {
        if let Some(signer) = &self.signer {
            let timestamp = Timestamp::now().0.div_euclid(1_000_000);
            let signature = signer.sign(id, timestamp, body)?;
            headers.insert("webhook-timestamp", timestamp.into());
            headers.insert("webhook-signature", http::header_value(&signature)?);
        }
        if let Some((name, secret)) = &self.hmac {
            let signature = signature::plain(secret, body)?;
            headers.insert(name.clone(), http::header_value(&signature)?);
        }
        Ok(())
    }
}

#[async_trait]
impl Sink for Webhook {
    fn capabilities(&self) -> Capabilities {
        let carries = if self.batch { Carries::Text } else { Carries::Headers };
        Capabilities { lanes: true, carries, ..Capabilities::default() }
    }

    fn not_before(&self) -> Option<Instant> {
        self.endpoint.not_before()
    }

    async fn open(&mut self) -> Result<Option<Progress>> {
        Ok(None)
    }

    async fn write(&mut self, batch: &Batch, _progress: &Progress) -> Result<Written> {
        if self.batch {
            self.write_batch(&batch.changes).await
        } else {
            self.write_each(&batch.changes).await
        }
    }

    async fn close(&mut self) -> Result<()> {
        Ok(())
    }
}
