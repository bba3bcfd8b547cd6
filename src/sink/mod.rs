//! Where changes go: one trait, one file for each kind of target, one `match` that opens them.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use uuid::Uuid;

use crate::{
    change::Batch,
    config::{self, Format, SinkKind, Types},
    disk::{Disk, RealDisk},
    error::{Error, Result},
    format::{Encoder, Names},
};

pub use postgres::{Mapped, MappedColumn, Mending, Replica};
pub use pull::{Pulled, Pulls, Stream};
pub use queue::{Delivery, Queues, Subscription};
pub use stats::{SinkStats, Totals};

mod certificate;
mod custom;
mod file;
mod http;
mod kafka;
mod nats;
mod object_store;
mod opensearch;
mod postgres;
mod pull;
mod queue;
mod rabbitmq;
mod redis;
mod signature;
mod stats;
mod stdout;
#[cfg(test)]
mod testing;
mod wave;
mod webhook;

/// What a sink needs from its surroundings.
#[derive(Clone, Debug)]
pub struct Context {
    /// Where a sink may keep what must outlive the process and no target keeps for it.
    pub data_dir: PathBuf,
    /// The file layer of the `file` sink.
    pub disk: Arc<dyn Disk>,
    /// The names that a message may carry.
    pub names: Names,
    /// The history that the source's offsets count in.
    pub lineage: Uuid,
    /// The queues of the program that embeds Walrace.
    pub queues: Queues,
    /// The streams that consumers pull from.
    pub pulls: Pulls,
    /// Changes for which the sink's format has no message.
    pub filtered: Arc<AtomicU64>,
}

impl Context {
    /// Surroundings of their own, in `data_dir`.
    pub fn new(data_dir: &Path, names: Names, lineage: Uuid) -> Self {
        Self {
            data_dir: data_dir.to_owned(),
            disk: RealDisk::shared(),
            names,
            lineage,
            queues: Queues::default(),
            pulls: Pulls::default(),
            filtered: Arc::default(),
        }
    }

    fn count_filtered(&self, changes: u64) {
        self.filtered.fetch_add(changes, Ordering::Relaxed);
    }
}

/// What a sink is made with, beside its own options.
#[derive(Clone, Copy, Debug)]
pub(crate) struct With<'a> {
    /// The sink's name.
    name: &'a str,
    /// How a change is written.
    format: Format,
    /// How values are written.
    types: Types,
    context: &'a Context,
}

impl With<'_> {
    /// An encoder of `format`, which may differ from the one that the sink is told.
    fn encoder(&self, format: Format) -> Result<Encoder> {
        if !Encoder::heeds_types(format) {
            self.refuse_types()?;
        }
        Ok(Encoder::with_types(format, &self.context.names, self.types))
    }

    /// For sinks and formats that write values in a way of their own. A choice of which they would
    /// take no notice is a mistake: somebody relies on it.
    fn refuse_types(&self) -> Result<()> {
        if self.types == Types::default() {
            return Ok(());
        }
        let what = format!(
            "sink `{}` has no use for its `types`: it writes values in a way of its own",
            self.name
        );
        Err(Error::config(what)
            .remedy("remove it, or take the format native or cloudevents: docs/types.md"))
    }
}

macro_rules! open_kind {
    ($($(#[$doc:meta])+ $kind:ident => $module:ident :: $sink:ident,)+) => {
        fn open_kind(kind: &SinkKind, with: With<'_>) -> Result<Box<dyn Sink>> {
            Ok(match kind {
                $(SinkKind::$kind(options) => Box::new($module::$sink::new(options, with)?),)+
            })
        }
    };
}
config::sink_kinds!(open_kind);

/// Makes the sink that the configuration describes; it connects in [`Sink::open`].
pub fn open(name: &str, sink: &config::Sink, context: &Context) -> Result<Box<dyn Sink>> {
    let made =
        open_kind(&sink.kind, With { name, format: sink.format, types: sink.types, context })?;
    fits(name, sink.format, made.capabilities().carries)?;
    heeds(name, &sink.rules, made.capabilities())?;
    Ok(made)
}

/// A rule that the sink would take no notice of is a mistake: somebody relies on it.
fn heeds(name: &str, rules: &config::Rules, capabilities: Capabilities) -> Result<()> {
    let unheard = [
        ("route", rules.route.is_some() && !capabilities.routes),
        ("message_headers", !rules.message_headers.is_empty() && !capabilities.headers),
    ];
    match unheard.into_iter().find(|(_, unheard)| *unheard) {
        None => Ok(()),
        Some((rule, _)) => Err(Error::config(format!("sink `{name}` has no use for its `{rule}`"))
            .remedy(
                "remove it, or take a sink with topics, streams or the like: docs/transforms.md",
            )),
    }
}

/// Bytes that are no text, and attributes that are headers, are not for every sink.
fn fits(name: &str, format: Format, carries: Carries) -> Result<()> {
    let problem = match (format, carries) {
        (Format::Walstream, Carries::Text) => "format walstream is no text",
        (Format::CloudeventsBinary, Carries::Text | Carries::Bytes) => {
            "format cloudevents_binary has its attributes in headers"
        }
        _ => return Ok(()),
    };
    Err(Error::config(format!("sink `{name}` cannot deliver its format: {problem}")).remedy(
        "take another format, or a sink with a message for each change (webhook: batch = false)",
    ))
}

/// What a sink has, durably. It grows, except by a named rewind, which begins a new epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// The history of the source that the cursor counts in.
    pub lineage: Uuid,
    /// Begun anew by a rewind or when the sink is created again; owned by the catalog.
    pub epoch: u64,
    /// Every change below this offset is delivered, filtered or parked.
    pub cursor: u64,
    /// The last retry of a parked change that was sent.
    pub retry_seq: u64,
}

/// What happened to one change of a batch.
#[derive(Debug)]
pub enum Outcome {
    /// It is durable at the target.
    Durable,
    /// The target refuses this very change, and would again: an error of class `Data`.
    Refused(Error),
    /// It was not tried, or nobody can say: deliver it again.
    Unknown,
}

/// What a write achieved.
#[derive(Debug)]
pub enum Written {
    /// Every change is durable, and the target holds the progress if it keeps one.
    All,
    /// Every change is taken, but only those below this offset are durable: the target commits
    /// whole transactions, or waits for others to acknowledge. The rest becomes durable with a
    /// later write, of an empty batch at the latest, or is delivered again.
    Until(u64),
    /// One outcome for each change of the batch, in order.
    Each(Vec<Outcome>),
}

/// What can be delivered of a change's message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Carries {
    /// Any bytes, and headers beside them.
    #[default]
    Headers,
    /// Any bytes, without headers.
    Bytes,
    /// Text only, because changes share a message, a file or a document.
    Text,
}

/// What became of a change that a target took before, when others decide about it later.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// A retried change is durable.
    Durable,
    /// It was tried so often that the target gives it up.
    GivenUp {
        /// How often.
        attempts: u32,
        /// What happened.
        why: String,
        /// The offset of the first later change of its keys that is taken, and goes on without it.
        next: Option<u64>,
    },
    /// It must wait parked behind an earlier change of its keys; the target lets go of it.
    Behind,
    /// The target keeps it as it keeps a retried change, and the later ones wait parked behind it.
    SetAside,
}

/// What a target has beyond its progress, because others acknowledge out of order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Beyond {
    /// Done: from an offset to the one after the last, in order.
    pub done: Vec<(u64, u64)>,
    /// Retried or set aside, and waiting for a verdict; in order.
    pub out: Vec<u64>,
}

/// What a sink declares about itself; the runtime and the conformance suite go by it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// The target keeps [`Progress`] together with the data, so nothing is delivered twice.
    pub transactional_progress: bool,
    /// One transaction of the source is one transaction of the target: a batch that ends within one
    /// leaves it open ([`Written::Until`]), and an empty batch comes only at a transaction's end.
    pub atomic: bool,
    /// Several lanes may write at the same time.
    pub lanes: bool,
    /// The target keeps the last state of a key rather than every event.
    pub state_target: bool,
    /// The target itself leaves out a change that is older than what it has.
    pub supersedes: bool,
    /// Its readers see no batches, so that only the bytes of a batch bound it.
    pub batches_by_bytes: bool,
    /// What it can deliver of a message.
    pub carries: Carries,
    /// A rule's route says where in the target a message goes.
    pub routes: bool,
    /// Headers that rules give are delivered.
    pub headers: bool,
    /// Others decide later about what it takes: see [`Verdict`]. A retried change that it has taken
    /// stays parked until a verdict ends it.
    pub answers_later: bool,
}

/// A destination. Called from one task; each call may be cancelled at a stop.
///
/// A write that fails as a whole returns an error whose class decides: `Retry` is an outage (the
/// loop waits and writes the same batch again, no attempt is counted), `Config` stops this sink
/// until a person mends it, `Data` is a refusal of the batch (it is split until the bad change
/// stands alone), `Damaged` stops it.
///
/// Order per key: after a change that is refused or unknown, no later change of the batch that
/// shares a key with it may become durable, unless the target [`supersedes`](Capabilities). A sink
/// whose progress is transactional answers [`Written::All`], [`Written::Until`] or an error, never
/// with single outcomes.
#[async_trait]
pub trait Sink: Send {
    /// What it guarantees and allows.
    fn capabilities(&self) -> Capabilities;

    /// When it wants the next batch: a target asked for time, or each write costs the machine more
    /// than its bytes do. The loop waits, and hears a stop meanwhile; `None` is now.
    fn not_before(&self) -> Option<Instant> {
        None
    }

    /// When what it has taken and not made durable is wanted at the target: an empty batch comes
    /// then. `None` is within a second.
    fn flush_at(&self) -> Option<Instant> {
        None
    }

    /// Connects, undoes what an unfinished write left behind, and returns the target's own progress
    /// where it keeps one and has one. Called again after each error of class `Retry`.
    async fn open(&mut self) -> Result<Option<Progress>>;

    /// Delivers the changes in their order; once they are durable the target, where it keeps
    /// progress, holds `progress`, in the same atomic step. The batch may be empty, when only
    /// filtered changes were passed.
    async fn write(&mut self, batch: &Batch, progress: &Progress) -> Result<Written>;

    /// The progress that the target keeps, read without changing anything, for when nobody runs. Of
    /// every sink whose progress is transactional.
    async fn peek(&mut self) -> Result<Option<Progress>> {
        Ok(None)
    }

    /// What the target has beyond its own progress, in the epoch of `progress`.
    async fn beyond(&mut self, progress: &Progress) -> Result<Beyond> {
        let _ = progress;
        Ok(Beyond::default())
    }

    /// Waits until there are verdicts. May be cancelled at any time.
    async fn told(&mut self) {
        std::future::pending::<()>().await;
    }

    /// The verdicts since the last call, by offset. `hold`: what is given up keeps the later
    /// changes of its keys back, so that those are [`Verdict::Behind`].
    async fn verdicts(&mut self, hold: bool) -> Result<Vec<(u64, Verdict)>> {
        let _ = hold;
        Ok(Vec::new())
    }

    /// These verdicts are durable in the parking lot; the target follows. Where this is not
    /// reached, it gives them again after the next `open`.
    async fn settle(&mut self, told: &[(u64, Verdict)]) -> Result<()> {
        let _ = told;
        Ok(())
    }

    /// Flushes and lets go. Nothing is lost when it is never called.
    async fn close(&mut self) -> Result<()>;
}

impl fmt::Debug for dyn Sink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sink")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config::Secret, error::Class};

    #[test]
    fn a_format_that_needs_a_message_of_its_own_is_refused_where_messages_share_one() {
        let context = testing::context();
        let file = SinkKind::File(config::File::to("changes.jsonl"));
        let mut webhook = config::Webhook::to(Secret::new("http://localhost/"));
        let batches = SinkKind::Webhook(webhook.clone());
        webhook.batch = false;
        let singles = SinkKind::Webhook(webhook);
        for format in [Format::Walstream, Format::CloudeventsBinary] {
            for (kind, refused) in [(&file, true), (&batches, true), (&singles, false)] {
                let sink = config::Sink { format, ..config::Sink::of(kind.clone()) };
                let class = open("lake", &sink, &context).err().map(|error| error.class());
                assert_eq!(class, refused.then_some(Class::Config), "{format:?}");
            }
        }
        assert!(open("lake", &config::Sink::of(file), &context).is_ok());
        for text in ["kind = \"http_pull\"", "kind = \"redis_stream\"\nurl = \"redis://localhost\""]
        {
            let text = format!("format = \"cloudevents_binary\"\n{text}");
            let sink: config::Sink = toml::from_str(&text).unwrap();
            let error = open("lake", &sink, &context).err().unwrap();
            assert!(error.to_string().contains("its attributes in headers"), "{error}");
        }
        assert!(fits("cache", Format::Walstream, Carries::Bytes).is_ok());
        assert!(fits("cache", Format::CloudeventsBinary, Carries::Bytes).is_err());
    }

    #[test]
    fn a_rule_that_a_sink_takes_no_notice_of_is_refused() {
        let context = testing::context();
        for (kind, refused) in [
            ("kind = \"http_pull\"", ["route", "message_headers"].as_slice()),
            ("kind = \"redis_list\"\nurl = \"redis://localhost\"", &["message_headers"]),
            ("kind = \"redis_stream\"\nurl = \"redis://localhost\"", &[]),
        ] {
            for (rule, text) in [
                ("route", "route = \"'a'\""),
                ("message_headers", "message_headers = { a = \"op\" }"),
            ] {
                let sink: config::Sink = toml::from_str(&format!("{text}\n{kind}")).unwrap();
                let said = open("lake", &sink, &context).err().map(|error| error.to_string());
                let is_refused = said.as_ref().is_some_and(|said| said.contains(rule));
                assert_eq!(is_refused, refused.contains(&rule), "{kind}: {said:?}");
            }
        }
    }

    #[test]
    fn a_choice_of_types_that_a_sink_takes_no_notice_of_is_refused() {
        let context = testing::context();
        for (text, refused) in [
            ("kind = \"file\"\npath = \"a.jsonl\"", false),
            ("kind = \"webhook\"\nurl = \"http://localhost/\"\nformat = \"cloudevents\"", false),
            ("kind = \"redis_string\"\nurl = \"redis://localhost\"", false),
            ("kind = \"file\"\npath = \"a.jsonl\"\nformat = \"sequin\"", true),
            ("kind = \"file\"\npath = \"a.jsonl\"\nformat = \"debezium\"", true),
            ("kind = \"file\"\npath = \"a.jsonl\"\nformat = \"wal2json\"", true),
            ("kind = \"redis_pubsub\"\nurl = \"redis://localhost\"\npayload = \"strait\"", true),
            ("kind = \"object_store\"\nurl = \"file:///tmp/a\"\nlayout = \"parquet\"", true),
            ("kind = \"object_store\"\nurl = \"file:///tmp/a\"", false),
            ("kind = \"postgres\"\nurl = \"postgres://localhost/a\"", true),
            ("kind = \"queue\"", true),
            ("kind = \"stdout\"\nstyle = \"json\"", false),
            ("kind = \"stdout\"\nstyle = \"pretty\"", true),
        ] {
            let sink: config::Sink =
                toml::from_str(&format!("{text}\n[types]\nint8 = \"string\"")).unwrap();
            let said = open("lake", &sink, &context).err();
            let class = said.as_ref().map(Error::class);
            assert_eq!(class, refused.then_some(Class::Config), "{text}: {said:?}");
            let said = said.map_or(String::new(), |error| error.to_string());
            assert!(!refused || said.contains("no use for its `types`"), "{text}: {said}");
            let sink: config::Sink =
                toml::from_str(&format!("{text}\n[types]\nint8 = \"number\"")).unwrap();
            let said = open("lake", &sink, &context).err().map(|error| error.to_string());
            let blamed = said.as_ref().is_some_and(|said| said.contains("types"));
            assert!(!blamed, "{text} is as by default, yet {said:?}");
        }
    }
}
