//! Entries of streams, each change once: one script appends a batch and stores the progress, so
//! that both are there, or neither, whatever the server falls back to.
//!
//! The script stores progress only in the place of what this sink last saw. Whoever was overtaken
//! (a second Walrace, or a request of ours that was given up and came through all the same) gets
//! an outage, and `open` reads what is there.

use std::collections::HashMap;

use ::redis::{Cmd, Script, cmd};
use async_trait::async_trait;

use super::{
    Server, check_size,
    entry::{Fields, Shape},
};
use crate::{
    change::{Batch, Change},
    config,
    error::{Class, Classify, Error, Result},
    failpoint,
    format::{Encoder, Template},
    sink::{Capabilities, Context, Progress, Sink, With, Written},
};

/// A script has at most this many arguments, and bytes of them; a batch above it is halved.
const ARGUMENTS_MAX: usize = 1_000_000;
const BATCH_BYTES_MAX: usize = 256 << 20;

/// The `redis_stream` sink.
pub(in crate::sink) struct Stream {
    server: Server,
    encoder: Encoder,
    shape: Shape,
    stream: Template,
    maxlen: u64,
    entry_bytes_max: usize,
    progress_key: String,
    script: Script,
    /// What the server had when it was last heard of.
    stored: Stored,
    context: Context,
}

/// A progress as it is stored.
#[derive(Clone, Debug, Default)]
struct Stored {
    text: Vec<u8>,
    progress: Option<Progress>,
}

/// What is appended.
#[derive(Default)]
struct Entries {
    /// Each stream once, in the order in which they are first met.
    streams: Vec<String>,
    numbers: HashMap<String, usize>,
    entries: Vec<(usize, Fields)>,
    arguments: usize,
    bytes: usize,
    filtered: u64,
}

impl Stream {
    pub(in crate::sink) fn new(options: &config::RedisStream, with: With) -> Result<Self> {
        let With { name, format, context } = with;
        let encoder = Encoder::new(format, &context.names);
        let progress_key = match &options.progress_key {
            Some(key) if key.is_empty() => return Err(Error::config("`progress_key` is empty")),
            Some(key) => key.clone(),
            None => format!("walrace:progress:{name}"),
        };
        let stream: Template = options.stream.parse()?;
        if stream.as_str().is_empty() || stream.as_str() == progress_key {
            return Err(Error::config(format!("`stream` cannot be `{stream}`"))
                .remedy("give the stream a name, another than the progress has"));
        }
        Ok(Self {
            server: Server::new(&options.url, options.tls_ca.as_ref(), options.timeout_ms)?,
            shape: Shape::of(format, encoder.content_type()),
            encoder,
            stream,
            maxlen: options.maxlen,
            entry_bytes_max: options.entry_bytes_max.min(super::VALUE_BYTES_MAX),
            progress_key,
            script: Script::new(include_str!("append.lua")),
            stored: Stored::default(),
            context: context.clone(),
        })
    }

    fn encode(&mut self, changes: &[Change]) -> Result<Entries> {
        let mut all = Entries::default();
        for change in changes {
            match self.entry(change)? {
                Some((stream, fields)) => all.push(stream, fields),
                None => all.filtered += 1,
            }
        }
        let large = all.arguments > ARGUMENTS_MAX || all.bytes > BATCH_BYTES_MAX;
        if large && changes.len() > 1 {
            let (arguments, bytes) = (all.arguments, all.bytes);
            let text = format!("{arguments} values of {bytes} bytes are too much for one script");
            return Err(Error::data(text));
        }
        Ok(all)
    }

    fn entry(&mut self, change: &Change) -> Result<Option<(String, Fields)>> {
        let mut payload = Vec::new();
        if !self.encoder.encode(change, &mut payload)? {
            return Ok(None);
        }
        let mut key = Vec::new();
        let key = self.encoder.encode_key(change, &mut key)?.then_some(key);
        let stream = match change.route() {
            Some(route) => route.to_owned(),
            None => self.stream.render(change, &self.context.names)?,
        };
        if stream.is_empty() || stream == self.progress_key {
            return Err(Error::data(format!("`{stream}` cannot be the name of a stream")));
        }
        let fields = self.shape.fields(change, payload, key)?;
        check_size("an entry", bytes_of(&fields), self.entry_bytes_max)?;
        Ok(Some((stream, fields)))
    }

    fn command(&self, entries: &Entries, progress: &[u8]) -> Cmd {
        let mut command = Cmd::with_capacity(entries.arguments + 8, entries.bytes + 1024);
        command.arg("EVALSHA").arg(self.script.get_hash()).arg(entries.streams.len() + 1);
        command.arg(&self.progress_key).arg(&entries.streams);
        command.arg(&self.stored.text).arg(progress).arg(self.maxlen);
        for (stream, fields) in &entries.entries {
            command.arg(*stream).arg(fields.len() * 2);
            for (name, value) in fields {
                command.arg(name.as_bytes()).arg(value);
            }
        }
        command
    }

    /// Whether `progress` may follow what is stored.
    fn check(&self, progress: &Progress) -> Result<()> {
        let Some(stored) = self.stored.progress else { return Ok(()) };
        if stored.lineage != progress.lineage || stored.epoch > progress.epoch {
            let Progress { lineage, epoch, .. } = stored;
            return Err(self.overtaken(&format!("epoch {epoch} of {lineage}")));
        }
        Ok(())
    }

    fn overtaken(&self, by: &str) -> Error {
        let (name, key) = (self.server.name(), &self.progress_key);
        Error::retry(format!(
            "another walrace writes to {name}: it holds {by} in `{key}`, which this sink did not \
             write"
        ))
    }

    fn heed(&self, reply: &[Vec<u8>]) -> Result<()> {
        let text = |index: usize| {
            String::from_utf8_lossy(reply.get(index).map_or(&[][..], Vec::as_slice)).into_owned()
        };
        let name = self.server.name();
        match text(0).as_str() {
            "ok" => Ok(()),
            "stale" if text(1).is_empty() => {
                let key = &self.progress_key;
                Err(Error::retry(format!("{name} has lost the progress of this sink in `{key}`")))
            }
            "stale" => Err(self.overtaken(&text(1))),
            "type" => Err(wrong_type(name, &text(1), &text(2))),
            other => Err(Error::bug(format!("a script of ours answered `{other}` at {name}"))),
        }
    }

    fn parse(&self, text: Option<Vec<u8>>) -> Result<Stored> {
        let Some(text) = text else { return Ok(Stored::default()) };
        let foreign = || {
            let (name, key) = (self.server.name(), &self.progress_key);
            format!("{name} has something else than a progress of walrace in `{key}`")
        };
        let progress = serde_json::from_slice(&text).class(Class::Config, foreign);
        let progress = progress
            .map_err(|error| error.remedy("set `progress_key` to a key that nothing else uses"))?;
        Ok(Stored { text, progress: Some(progress) })
    }

    fn get(&self) -> Cmd {
        let mut get = cmd("GET");
        get.arg(&self.progress_key);
        get
    }
}

impl Entries {
    fn push(&mut self, stream: String, fields: Fields) {
        self.arguments += 2 + fields.len() * 2;
        self.bytes += bytes_of(&fields);
        let number = match self.numbers.get(&stream) {
            Some(number) => *number,
            None => {
                self.streams.push(stream.clone());
                let number = self.streams.len() + 1; // the first key is that of the progress
                self.numbers.insert(stream, number);
                number
            }
        };
        self.entries.push((number, fields));
    }
}

#[async_trait]
impl Sink for Stream {
    fn capabilities(&self) -> Capabilities {
        Capabilities { transactional_progress: true, ..Capabilities::default() }
    }

    async fn open(&mut self) -> Result<Option<Progress>> {
        self.server.open().await?;
        let text = self.server.ask(&self.get()).await?;
        self.stored = self.parse(text)?;
        Ok(self.stored.progress)
    }

    async fn write(&mut self, batch: &Batch, progress: &Progress) -> Result<Written> {
        self.check(progress)?;
        let entries = self.encode(&batch.changes)?;
        let text = serde_json::to_vec(progress)
            .class(Class::Bug, || "a progress that cannot be written as JSON")?;
        let command = self.command(&entries, &text);
        failpoint::reach("redis::before_write");
        let reply: Vec<Vec<u8>> = self.server.evaluate(&self.script, &command).await?;
        self.heed(&reply)?;
        failpoint::reach("redis::after_write");
        self.stored = Stored { text, progress: Some(*progress) };
        self.context.count_filtered(entries.filtered);
        Ok(Written::All)
    }

    async fn peek(&mut self) -> Result<Option<Progress>> {
        let mut connection = self.server.connect().await?;
        let get = self.get();
        let text = self.server.within(get.query_async(&mut connection)).await?;
        Ok(self.parse(text)?.progress)
    }

    async fn close(&mut self) -> Result<()> {
        self.server.close();
        Ok(())
    }
}

fn bytes_of(fields: &Fields) -> usize {
    fields.iter().map(|(name, value)| name.len() + value.len()).sum()
}

fn wrong_type(name: &str, key: &str, kind: &str) -> Error {
    Error::config(format!("the key `{key}` of {name} holds a {kind}, which walrace cannot write"))
        .remedy(format!("delete it (DEL {key}), or set another name in `stream` or `progress_key`"))
}
