//! `[cdc]`: one emitter in five keys, a shorthand for a sink named `cdc`.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Config, Custom, File, Queue, Secret, Sink, SinkKind, Webhook, document::Places};
use crate::error::Result;

/// The name of the sink that `[cdc]` makes.
const NAME: &str = "cdc";

/// `[cdc]`: one emitter in five keys, a shorthand for a sink named `cdc`. After loading it is part
/// of `sink`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Cdc {
    /// Where the changes go.
    pub emitter: Emitter,
    /// Changes that wait in memory at most; then delivery blocks, never capture (`queue`).
    #[schemars(range(min = 1))]
    pub queue_capacity: usize,
    /// The directory of dead letters; created if absent.
    pub dlq_path: PathBuf,
    /// Which schemas, by exact name. Empty: all.
    pub schemas: Vec<String>,
    /// A batch has at most this many changes.
    #[schemars(range(min = 1))]
    pub batch_size: usize,
    /// Where `webhook` POSTs; needed by it.
    #[schemars(example = "https://example.org/hook")]
    pub webhook_url: Option<Secret>,
    /// What `file` writes; by default `cdc.jsonl` in `data_dir`.
    #[schemars(example = "/var/lib/walrace/cdc.jsonl")]
    pub file_path: Option<PathBuf>,
    /// Where `custom` POSTs; needed by it.
    #[schemars(example = "http://localhost:8080/changes")]
    pub custom_url: Option<Secret>,
}

/// Where `[cdc]` sends changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Emitter {
    /// A bounded queue inside a Rust program that embeds Walrace.
    #[default]
    Queue,
    /// An HTTP endpoint.
    Webhook,
    /// JSON Lines in a file.
    File,
    /// A user's HTTP program that answers for each change.
    Custom,
}

impl Default for Cdc {
    fn default() -> Self {
        Self {
            emitter: Emitter::Queue,
            queue_capacity: 65_536,
            dlq_path: PathBuf::from("/var/lib/weftkit/cdc-dlq"),
            schemas: vec!["public".into()],
            batch_size: 100,
            webhook_url: None,
            file_path: None,
            custom_url: None,
        }
    }
}

/// Replaces `config.cdc` by the sink that it stands for.
pub(super) fn expand(config: &mut Config, places: &Places) -> Result<()> {
    let Some(cdc) = config.cdc.take() else { return Ok(()) };
    if config.sink.contains_key(NAME) {
        return Err(places
            .error("sink.cdc", "`[sink.cdc]` and `[cdc]` both make a sink named `cdc`")
            .remedy("rename the sink, or remove one of the two"));
    }
    if config.dlq_path.is_some() && places.has("dlq_path") && places.has("cdc.dlq_path") {
        return Err(places
            .error("dlq_path", "`dlq_path` and `cdc.dlq_path` both say where dead letters go")
            .remedy("remove one of the two"));
    }
    let kind = match cdc.emitter {
        Emitter::Queue => SinkKind::Queue(Queue { capacity: cdc.queue_capacity }),
        Emitter::Webhook => {
            SinkKind::Webhook(Webhook::to(needed(cdc.webhook_url.as_ref(), "webhook", places)?))
        }
        Emitter::Custom => {
            SinkKind::Custom(Custom::to(needed(cdc.custom_url.as_ref(), "custom", places)?))
        }
        Emitter::File => SinkKind::File(File::to(
            cdc.file_path.clone().unwrap_or_else(|| config.data_dir.join("cdc.jsonl")),
        )),
    };
    config.dlq_path.get_or_insert(cdc.dlq_path);
    let sink = Sink { schemas: cdc.schemas, batch_changes_max: cdc.batch_size, ..Sink::of(kind) };
    config.sink.insert(NAME.into(), sink);
    Ok(())
}

fn needed(url: Option<&Secret>, emitter: &str, places: &Places) -> Result<Secret> {
    url.cloned().ok_or_else(|| {
        let what = format!("`cdc.emitter = \"{emitter}\"` needs `cdc.{emitter}_url`");
        let remedy = format!("add {emitter}_url = \"https://...\" to [cdc]");
        places.error("cdc.emitter", &what).remedy(remedy)
    })
}
