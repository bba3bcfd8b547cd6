//! A user's HTTP program that says for each change what became of it. The contract is
//! `docs/sinks/custom.md`.

use async_trait::async_trait;
use serde::Deserialize;
use tokio::time::Instant;

use super::{
    Capabilities, Carries, Context, Outcome, Progress, Sink, With, Written,
    http::{self, Body, Endpoint},
};
use crate::{
    change::Batch,
    config,
    error::{Error, Result},
    format::Encoder,
};

/// A reply may be this long.
const REPLY_BYTES_MAX: usize = 16 << 20;
/// A reason is kept up to here.
const REASON_BYTES_MAX: usize = 1000;

/// The `custom` sink.
pub(super) struct Custom {
    encoder: Encoder,
    endpoint: Endpoint,
    context: Context,
}

/// What the program answers; nothing at all means that it has taken everything.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Reply {
    ok: Option<bool>,
    outcomes: Option<Vec<Answer>>,
}

/// What the program says about one change.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Answer {
    Ok(bool),
    Refused(String),
    Retry(String),
}

impl Custom {
    pub(super) fn new(options: &config::Custom, with: With) -> Result<Self> {
        let With { format, context, .. } = with;
        Ok(Self {
            encoder: with.encoder(format)?,
            endpoint: Endpoint::new(&options.url, &options.headers, options.timeout_ms)?,
            context: context.clone(),
        })
    }

    fn breach(&self, what: &str) -> Error {
        Error::config(format!("{} {what}", self.endpoint.name())).remedy(
            "answer with {\"outcomes\":[...]}, one of {\"ok\":true}, {\"refused\":\"why\"} and \
             {\"retry\":\"why\"} for each change in its order, or with an empty body",
        )
    }

    fn parse(&self, body: &[u8], count: usize) -> Result<Vec<Answer>> {
        let all = || (0..count).map(|_| Answer::Ok(true)).collect();
        if body.trim_ascii().is_empty() {
            return Ok(all());
        }
        let reply: Reply = serde_json::from_slice(body)
            .map_err(|cause| self.breach("answered something else").caused_by(cause))?;
        match reply {
            Reply { ok: Some(true), outcomes: None } => Ok(all()),
            Reply { ok: None | Some(true), outcomes: Some(outcomes) } => {
                if outcomes.len() != count {
                    let found = outcomes.len();
                    return Err(self.breach(&format!("gave {found} outcomes for {count} changes")));
                }
                if outcomes.iter().any(|answer| matches!(answer, Answer::Ok(false))) {
                    return Err(self.breach("answered ok = false, which says not why"));
                }
                Ok(outcomes)
            }
            _ => Err(self.breach("answered neither ok = true nor outcomes")),
        }
    }

    fn outcome(&self, answer: Answer) -> Outcome {
        match answer {
            Answer::Ok(_) => Outcome::Durable,
            Answer::Refused(mut why) => {
                http::cut(&mut why, REASON_BYTES_MAX);
                Outcome::Refused(Error::data(format!("{} refused: {why}", self.endpoint.name())))
            }
            Answer::Retry(_) => Outcome::Unknown,
        }
    }
}

#[async_trait]
impl Sink for Custom {
    fn capabilities(&self) -> Capabilities {
        Capabilities { lanes: true, carries: Carries::Text, ..Capabilities::default() }
    }

    fn not_before(&self) -> Option<Instant> {
        self.endpoint.not_before()
    }

    async fn open(&mut self) -> Result<Option<Progress>> {
        Ok(None)
    }

    async fn write(&mut self, batch: &Batch, _progress: &Progress) -> Result<Written> {
        let count = batch.changes.len();
        let Some(body) = Body::new(&mut self.encoder, &batch.changes)? else {
            self.context.count_filtered(count as u64);
            return Ok(Written::All);
        };
        let sent = body.sent.iter().filter(|sent| **sent).count();
        let reply = self.endpoint.post(http::identified(&body.id)?, body.bytes).await?;
        let reply = self.endpoint.read(reply, REPLY_BYTES_MAX).await?;
        let answers = self.parse(&reply, sent)?;
        // Nothing was achieved: wait, as for an outage, rather than ask again at once.
        if let Some(Answer::Retry(why)) = answers.first()
            && answers.iter().all(|answer| matches!(answer, Answer::Retry(_)))
        {
            let mut why = why.clone();
            http::cut(&mut why, REASON_BYTES_MAX);
            return Err(Error::retry(format!("{} asks to wait: {why}", self.endpoint.name())));
        }
        self.context.count_filtered((count - sent) as u64);
        if answers.iter().all(|answer| matches!(answer, Answer::Ok(_))) {
            return Ok(Written::All);
        }
        let mut answers = answers.into_iter();
        let outcome = |sent: bool| match sent {
            true => answers.next().map_or(Outcome::Unknown, |answer| self.outcome(answer)),
            false => Outcome::Durable,
        };
        Ok(Written::Each(body.sent.into_iter().map(outcome).collect()))
    }

    async fn close(&mut self) -> Result<()> {
        Ok(())
    }
}
