//! The sinks that append each change once: entries of streams, items of lists.

use std::borrow::Cow;

use async_trait::async_trait;

use super::{
    Server, VALUE_BYTES_MAX, check_size,
    entry::Shape,
    once::{Entries, Once, Value, bytes_of},
};
use crate::{
    change::{Batch, Change},
    config::{self, RedisOnFull},
    error::{Error, Result},
    format::{Encoder, Template},
    sink::{Capabilities, Carries, Context, Progress, Sink, With, Written},
};

/// What a sink has that appends to keys named by a template.
struct Append {
    once: Once,
    encoder: Encoder,
    target: Template,
    context: Context,
}

impl Append {
    /// `option` is what the configuration calls the template.
    fn new(once: Once, target: &str, option: &str, with: With) -> Result<Self> {
        let target: Template = target.parse()?;
        if once.reserves(target.as_str()) {
            return Err(Error::config(format!("`{option}` cannot be `{target}`"))
                .remedy(format!("give the {option} a name, another than the progress has")));
        }
        let encoder = with.encoder(with.format)?;
        Ok(Self { once, encoder, target, context: with.context.clone() })
    }

    /// Where the change goes, and its message; `None` where the format has none.
    fn message(&mut self, change: &Change) -> Result<Option<(String, Vec<u8>)>> {
        let mut message = Vec::new();
        if !self.encoder.encode(change, &mut message)? {
            return Ok(None);
        }
        let target = match change.route() {
            Some(route) => route.to_owned(),
            None => self.target.render(change, &self.context.names)?,
        };
        if self.once.reserves(&target) {
            return Err(Error::data(format!("nothing can be appended to a key `{target}`")));
        }
        Ok(Some((target, message)))
    }
}

fn progress_key(key: Option<&String>, name: &str) -> String {
    key.cloned().unwrap_or_else(|| format!("walrace:progress:{name}"))
}

/// The stream's part of the script: it wants MAXLEN (0 for none), and values that are names and
/// values by turns.
const STREAM: &str = r"
local maxlen, keys, ids, at = ARGV[4], {}, {}, 5
while at <= #ARGV do
    local key, last, id = KEYS[tonumber(ARGV[at])], at + 1 + ARGV[at + 1]
    -- Unpacked in the call: to build a table for each entry takes a fifth more time.
    if maxlen == '0' then
        id = redis.pcall('XADD', key, '*', unpack(ARGV, at + 2, last))
    else
        id = redis.pcall('XADD', key, 'MAXLEN', '~', maxlen, '*', unpack(ARGV, at + 2, last))
    end
    if type(id) == 'table' then
        -- Redis takes nothing back by itself, and nobody has seen these yet.
        for i, one in ipairs(ids) do redis.call('XDEL', keys[i], one) end
        return id
    end
    keys[#keys + 1], ids[#ids + 1] = key, id
    at = last + 1
end
";

/// The `redis_stream` sink.
pub(in crate::sink) struct Stream {
    to: Append,
    shape: Shape,
    maxlen: u64,
    entry_bytes_max: usize,
}

impl Stream {
    pub(in crate::sink) fn new(options: &config::RedisStream, with: With) -> Result<Self> {
        let server = Server::new(&options.url, options.tls_ca.as_ref(), options.timeout_ms)?;
        let progress_key = progress_key(options.progress_key.as_ref(), with.name);
        let once = Once::new(server, progress_key, "stream", STREAM)?;
        let to = Append::new(once, &options.stream, "stream", with)?;
        Ok(Self {
            shape: Shape::of(with.format, to.encoder.content_type()),
            to,
            maxlen: options.maxlen,
            entry_bytes_max: options.entry_bytes_max.min(VALUE_BYTES_MAX),
        })
    }

    fn entry(&mut self, change: &Change) -> Result<Option<(String, Vec<Value>)>> {
        let Some((stream, payload)) = self.to.message(change)? else { return Ok(None) };
        let mut key = Vec::new();
        let key = self.to.encoder.encode_key(change, &mut key)?.then_some(key);
        let fields = self.shape.fields(change, payload, key)?;
        let mut values = Vec::with_capacity(fields.len() * 2);
        for (name, value) in fields {
            values.push(match name {
                Cow::Borrowed(name) => Cow::Borrowed(name.as_bytes()),
                Cow::Owned(name) => Cow::Owned(name.into_bytes()),
            });
            values.push(Cow::Owned(value));
        }
        check_size("an entry", bytes_of(&values), self.entry_bytes_max)?;
        Ok(Some((stream, values)))
    }
}

#[async_trait]
impl Sink for Stream {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            transactional_progress: true,
            carries: Carries::Bytes,
            routes: true,
            headers: true,
            ..Capabilities::default()
        }
    }

    async fn open(&mut self) -> Result<Option<Progress>> {
        self.to.once.open().await
    }

    async fn write(&mut self, batch: &Batch, progress: &Progress) -> Result<Written> {
        let mut entries = Entries::default();
        let mut filtered = 0;
        for change in &batch.changes {
            match self.entry(change)? {
                Some((stream, values)) => entries.push(stream, values),
                None => filtered += 1,
            }
        }
        let maxlen = self.maxlen.to_string().into_bytes();
        self.to.once.append(&[maxlen.into()], &entries, progress).await?;
        self.to.context.count_filtered(filtered);
        Ok(Written::All)
    }

    async fn peek(&mut self) -> Result<Option<Progress>> {
        self.to.once.peek().await
    }

    async fn close(&mut self) -> Result<()> {
        self.to.once.close();
        Ok(())
    }
}

/// The list's part: it wants the bound (0 for none), what a full list does, and one value an entry,
/// the item. Once the first item is pushed nothing refuses another: whether memory is short, and
/// what the user may, is settled with the first write.
const LIST: &str = r"
local length_max, on_full = tonumber(ARGV[4]), ARGV[5]
local function trim()
    if length_max == 0 or on_full ~= 'trim' then return end
    for i = 2, #KEYS do redis.call('LTRIM', KEYS[i], -length_max, -1) end
end
if length_max > 0 and on_full == 'wait' then
    local counts = {}
    for at = 6, #ARGV, 3 do counts[ARGV[at]] = (counts[ARGV[at]] or 0) + 1 end
    for number, count in pairs(counts) do
        local key = KEYS[tonumber(number)]
        local length = redis.call('LLEN', key)
        if length + count > length_max then
            local have = 'has ' .. length .. ' of at most ' .. length_max .. ' items in `' .. key
            return {'later', have .. '`, and no room for ' .. count .. ' more',
                'have consumers take items (LPOP, BLPOP), or raise `length_max`'}
        end
    end
end
trim() -- who may not is told while nothing has changed
for at = 6, #ARGV, 3 do redis.call('RPUSH', KEYS[tonumber(ARGV[at])], ARGV[at + 2]) end
trim()
";

/// The `redis_list` sink.
pub(in crate::sink) struct List {
    to: Append,
    length_max: u64,
    on_full: RedisOnFull,
    item_bytes_max: usize,
}

impl List {
    pub(in crate::sink) fn new(options: &config::RedisList, with: With) -> Result<Self> {
        let server = Server::new(&options.url, options.tls_ca.as_ref(), options.timeout_ms)?;
        let progress_key = progress_key(options.progress_key.as_ref(), with.name);
        let once = Once::new(server, progress_key, "list", LIST)?;
        Ok(Self {
            to: Append::new(once, &options.list, "list", with)?,
            length_max: options.length_max,
            on_full: options.on_full,
            item_bytes_max: options.item_bytes_max.min(VALUE_BYTES_MAX),
        })
    }

    /// Refuses what would not fit into an empty list, where it can be halved.
    fn check_length(&self, changes: usize) -> Result<()> {
        let Self { length_max, on_full, .. } = self;
        let bound = *length_max != 0 && *on_full == RedisOnFull::Wait;
        if !bound || changes <= 1 || changes as u64 <= *length_max {
            return Ok(());
        }
        Err(Error::data(format!("{changes} changes are too many for lists of {length_max} items")))
    }
}

#[async_trait]
impl Sink for List {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            transactional_progress: true,
            carries: Carries::Bytes,
            routes: true,
            ..Capabilities::default()
        }
    }

    async fn open(&mut self) -> Result<Option<Progress>> {
        self.to.once.open().await
    }

    async fn write(&mut self, batch: &Batch, progress: &Progress) -> Result<Written> {
        self.check_length(batch.changes.len())?;
        let mut entries = Entries::default();
        let mut filtered = 0;
        for change in &batch.changes {
            let Some((list, item)) = self.to.message(change)? else {
                filtered += 1;
                continue;
            };
            check_size("an item", item.len(), self.item_bytes_max)?;
            entries.push(list, vec![Cow::Owned(item)]);
        }
        let length_max = self.length_max.to_string().into_bytes();
        let on_full: &[u8] = match self.on_full {
            RedisOnFull::Wait => b"wait",
            RedisOnFull::Trim => b"trim",
        };
        self.to.once.append(&[length_max.into(), on_full.into()], &entries, progress).await?;
        self.to.context.count_filtered(filtered);
        Ok(Written::All)
    }

    async fn peek(&mut self) -> Result<Option<Progress>> {
        self.to.once.peek().await
    }

    async fn close(&mut self) -> Result<()> {
        self.to.once.close();
        Ok(())
    }
}
