//! Data and progress in one step: one script a batch writes both, or neither, whatever the server
//! falls back to.
//!
//! The script stores progress only in the place of what this sink last saw. Whoever was overtaken
//! (a second Walrace, or a request of ours that was given up and came through all the same) gets
//! an outage, and `open` reads what is there.

use std::{borrow::Cow, collections::HashMap};

use ::redis::{Cmd, Script, cmd};

use super::Server;
use crate::{
    error::{Class, Classify, Error, Result},
    failpoint,
    sink::Progress,
};

/// A script has at most this many arguments, and bytes of them; a batch above it is halved.
const ARGUMENTS_MAX: usize = 1_000_000;
const BATCH_BYTES_MAX: usize = 256 << 20;

/// What every script begins with.
///
/// ```text
/// KEYS  the key of the progress, then each key that is appended to, once
/// ARGV  the progress that the sink saw last ('' for none), the new one, the type of the keys, what
///       the sink's own part wants to know; then for each entry the number of its key among KEYS,
///       the count of its values, and those
/// ```
///
/// It answers {'ok'}, {'stale', the progress that is stored} or {'type', a key, its type}; the
/// sink's own part {'later', what an outage is reported with, what a person can do about it}.
const HEAD: &str = r"
local kind = redis.call('TYPE', KEYS[1]).ok
if kind ~= 'string' and kind ~= 'none' then return {'type', KEYS[1], kind} end
local stored = redis.call('GET', KEYS[1]) or ''
if stored ~= ARGV[1] then return {'stale', stored} end
for i = 2, #KEYS do
    kind = redis.call('TYPE', KEYS[i]).ok
    if kind ~= ARGV[3] and kind ~= 'none' then return {'type', KEYS[i], kind} end
end
";

/// What every script ends with: the sink's own part has appended everything.
const TAIL: &str = r"
redis.call('SET', KEYS[1], ARGV[2])
return {'ok'}
";

/// A server, the progress in it, and the script that moves both.
pub(super) struct Once {
    server: Server,
    progress_key: String,
    /// The type of the keys that are appended to.
    kind: &'static str,
    script: Script,
    /// What the server had when it was last heard of.
    stored: Stored,
}

/// A progress as it is stored.
#[derive(Clone, Debug, Default)]
struct Stored {
    text: Vec<u8>,
    progress: Option<Progress>,
}

/// One value of an entry.
pub(super) type Value = Cow<'static, [u8]>;

/// What one batch appends, in its order.
#[derive(Default)]
pub(super) struct Entries {
    /// Each key once, in the order in which they are first met.
    keys: Vec<String>,
    numbers: HashMap<String, usize>,
    entries: Vec<(usize, Vec<Value>)>,
    arguments: usize,
    bytes: usize,
}

impl Once {
    /// Whose `script` appends to keys of the type `kind`.
    pub(super) fn new(
        server: Server,
        progress_key: String,
        kind: &'static str,
        script: &str,
    ) -> Result<Self> {
        if progress_key.is_empty() {
            return Err(Error::config("`progress_key` is empty"));
        }
        let script = Script::new(&format!("{HEAD}{script}{TAIL}"));
        Ok(Self { server, progress_key, kind, script, stored: Stored::default() })
    }

    /// Whether nothing may be appended to this key.
    pub(super) fn reserves(&self, key: &str) -> bool {
        key.is_empty() || key == self.progress_key
    }

    /// Connects, and reads the progress.
    pub(super) async fn open(&mut self) -> Result<Option<Progress>> {
        self.server.open().await?;
        let text = self.server.ask(&self.get()).await?;
        self.stored = self.parse(text)?;
        Ok(self.stored.progress)
    }

    /// Reads the progress, through a connection of its own.
    pub(super) async fn peek(&self) -> Result<Option<Progress>> {
        let mut connection = self.server.connect().await?;
        let get = self.get();
        let text = self.server.within(get.query_async(&mut connection)).await?;
        Ok(self.parse(text)?.progress)
    }

    /// Appends the entries and stores the progress; the sink's own part of the script gets
    /// `settings`.
    pub(super) async fn append(
        &mut self,
        settings: &[Value],
        entries: &Entries,
        progress: &Progress,
    ) -> Result<()> {
        self.check(progress)?;
        entries.check()?;
        let text = serde_json::to_vec(progress)
            .class(Class::Bug, || "a progress that cannot be written as JSON")?;
        let mut command = self.command(entries);
        command.arg(&self.stored.text).arg(&text).arg(self.kind);
        settings.iter().for_each(|setting| _ = command.arg(&**setting));
        entries.write_to(&mut command);
        failpoint::reach("redis::before_write");
        let reply: Vec<Vec<u8>> = self.server.evaluate(&self.script, &command).await?;
        self.heed(&reply)?;
        failpoint::reach("redis::after_write");
        self.stored = Stored { text, progress: Some(*progress) };
        Ok(())
    }

    pub(super) fn close(&mut self) {
        self.server.close();
    }

    fn command(&self, entries: &Entries) -> Cmd {
        let mut command = Cmd::with_capacity(entries.arguments + 16, entries.bytes + 1024);
        command.arg("EVALSHA").arg(self.script.get_hash()).arg(entries.keys.len() + 1);
        command.arg(&self.progress_key).arg(&entries.keys);
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
            "later" => Err(Error::retry(format!("{name} {}", text(1))).remedy(text(2))),
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
    pub(super) fn push(&mut self, key: String, values: Vec<Value>) {
        self.arguments += 2 + values.len();
        self.bytes += bytes_of(&values);
        let number = match self.numbers.get(&key) {
            Some(number) => *number,
            None => {
                self.keys.push(key.clone());
                let number = self.keys.len() + 1; // the first key is that of the progress
                self.numbers.insert(key, number);
                number
            }
        };
        self.entries.push((number, values));
    }

    /// Refuses what is too much for one script, where it can be halved.
    fn check(&self) -> Result<()> {
        let Self { arguments, bytes, .. } = self;
        let large = *arguments > ARGUMENTS_MAX || *bytes > BATCH_BYTES_MAX;
        if large && self.entries.len() > 1 {
            let text = format!("{arguments} values of {bytes} bytes are too much for one script");
            return Err(Error::data(text));
        }
        Ok(())
    }

    fn write_to(&self, command: &mut Cmd) {
        for (key, values) in &self.entries {
            command.arg(*key).arg(values.len());
            values.iter().for_each(|value| _ = command.arg(&**value));
        }
    }
}

pub(super) fn bytes_of(values: &[Value]) -> usize {
    values.iter().map(|value| value.len()).sum()
}

fn wrong_type(name: &str, key: &str, kind: &str) -> Error {
    Error::config(format!("the key `{key}` of {name} holds a {kind}, which walrace cannot write"))
        .remedy(format!("delete it (DEL {key}), or set another name for it, or `progress_key`"))
}
