//! change -> message: topic, key, value, headers, and the number that decides the partition.

use std::{collections::HashMap, sync::Arc};

use percent_encoding::percent_decode_str;
use rdkafka::message::{Header, OwnedHeaders};

use crate::{
    change::{Batch, Change},
    config,
    error::{Error, Result},
    format::{Encoder, Names, Template},
    sink::With,
};

/// What a message takes beside its key, value and headers, at most.
const OVERHEAD_BYTES: usize = 100;
const TOPIC_CHARS_MAX: usize = 249;

/// One message.
pub(super) struct Message {
    /// Its topic, as an index of [`Messages::topics`].
    pub(super) topic: usize,
    /// Modulo the count of partitions it is the partition.
    pub(super) hash: u32,
    pub(super) key: Option<Vec<u8>>,
    /// `None` is a tombstone.
    pub(super) value: Option<Vec<u8>>,
    pub(super) headers: OwnedHeaders,
    pub(super) timestamp_ms: i64,
}

/// The messages of a batch, in its order.
#[derive(Default)]
pub(super) struct Messages {
    pub(super) list: Vec<Message>,
    pub(super) topics: Vec<Arc<str>>,
    /// Changes for which the format has no message.
    pub(super) filtered: u64,
}

/// Makes messages.
pub(super) struct Maker {
    encoder: Encoder,
    topic: Template,
    names: Names,
    message_bytes_max: usize,
}

impl Maker {
    pub(super) fn new(options: &config::Kafka, with: With) -> Result<Self> {
        let names = with.context.names.clone();
        Ok(Self {
            encoder: with.encoder(with.format)?,
            topic: options.topic.parse()?,
            names,
            message_bytes_max: options.message_bytes_max,
        })
    }

    /// All messages. A change that cannot be one refuses the batch as a whole, so that it is split
    /// until the change stands alone.
    pub(super) fn make(&mut self, batch: &Batch) -> Result<Messages> {
        let mut messages = Messages::default();
        let mut topics = HashMap::new();
        for change in &batch.changes {
            let mut value = Vec::new();
            if !self.encoder.encode(change, &mut value)? {
                messages.filtered += 1;
                continue;
            }
            let topic = self.topic(change)?;
            let next = messages.topics.len();
            let topic = *topics.entry(topic).or_insert_with_key(|topic| {
                messages.topics.push(Arc::from(topic.as_str()));
                next
            });
            let message = self.message(change, topic, value)?;
            let name = messages.topics.get(topic).map_or("", |name| name);
            self.check_size(&message, name)?;
            let tombstone = self.encoder.tombstone(change).then(|| message.tombstone());
            messages.list.push(message);
            messages.list.extend(tombstone);
        }
        Ok(messages)
    }

    fn message(&mut self, change: &Change, topic: usize, value: Vec<u8>) -> Result<Message> {
        let mut key = Vec::new();
        let key = self.encoder.encode_key(change, &mut key)?.then_some(key);
        let mut headers = OwnedHeaders::new_with_capacity(2);
        let (id, offset) = (change.idempotency_key(), change.offset.to_string());
        let own = [("idempotency-key", id.as_str()), ("walrace-offset", offset.as_str())];
        for (name, value) in self.format_headers(change)? {
            headers = headers.insert(Header { key: &name, value: Some(&value) });
        }
        for (name, value) in change.headers().chain(own) {
            headers = headers.insert(Header { key: name, value: Some(value) });
        }
        let hash = match &key {
            Some(key) => murmur2(key),
            // What has no key of its own keeps its order as a whole, in one partition.
            None => murmur2(room(change).as_bytes()),
        };
        let timestamp_ms = change.transaction.commit_time.0.div_euclid(1_000);
        Ok(Message { topic, hash, key, value: Some(value), headers, timestamp_ms })
    }

    /// The attributes that the format puts into headers, as CloudEvents' binding for Kafka names
    /// and writes them: `ce_id`, not `ce-id`, and nothing percent-encoded.
    fn format_headers(&mut self, change: &Change) -> Result<Vec<(String, String)>> {
        let headers = self.encoder.headers(change)?;
        if headers.is_empty() {
            return Ok(Vec::new());
        }
        let decoded = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
        let mut named: Vec<_> = headers
            .iter()
            .map(|(name, value)| (name.replacen("ce-", "ce_", 1), decoded(value)))
            .collect();
        named.push(("content-type".to_owned(), self.encoder.content_type().to_owned()));
        Ok(named)
    }

    fn topic(&self, change: &Change) -> Result<String> {
        let topic = match change.route() {
            Some(route) => route.to_owned(),
            None => self.topic.render(change, &self.names)?,
        };
        let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if topic.is_empty()
            || topic.len() > TOPIC_CHARS_MAX
            || !topic.chars().all(good)
            || matches!(topic.as_str(), "." | "..")
        {
            return Err(Error::data(format!("`{topic}` cannot be the name of a Kafka topic"))
                .remedy(format!(
                    "choose one by `topic` or a rule: at most {TOPIC_CHARS_MAX} of a-z, A-Z, \
                     0-9, '.', '_' and '-'"
                )));
        }
        Ok(topic)
    }

    fn check_size(&self, message: &Message, topic: &str) -> Result<()> {
        let bytes = message.bytes();
        if bytes <= self.message_bytes_max {
            return Ok(());
        }
        let max = self.message_bytes_max;
        Err(Error::data(format!(
            "a message of {bytes} bytes for topic {topic} is larger than `message_bytes_max` = \
             {max}"
        ))
        .remedy("raise `message_bytes_max` and the topic's `max.message.bytes`"))
    }
}

impl Message {
    fn bytes(&self) -> usize {
        use rdkafka::message::Headers;
        let headers = self.headers.as_borrowed();
        let header = |h: Header<&[u8]>| h.key.len() + h.value.map_or(0, <[u8]>::len) + 10;
        let headers: usize = headers.iter().map(header).sum();
        let [key, value] = [&self.key, &self.value].map(|part| part.as_ref().map_or(0, Vec::len));
        key + value + headers + OVERHEAD_BYTES
    }

    /// The same key without a value: a compacted topic forgets the row.
    fn tombstone(&self) -> Self {
        Self { key: self.key.clone(), value: None, headers: self.headers.clone(), ..*self }
    }
}

/// What a change without a key belongs to.
fn room(change: &Change) -> String {
    match (&change.table, &change.message) {
        (Some(table), _) => table.full_name(),
        (None, Some(message)) => message.prefix.clone(),
        (None, None) => String::new(),
    }
}

/// The hash by which Java's default partitioner and librdkafka's `murmur2` place a key: 32 bits of
/// MurmurHash2 with Kafka's seed, made positive.
fn murmur2(data: &[u8]) -> u32 {
    const M: u32 = 0x5bd1_e995;
    const SEED: u32 = 0x9747_b28c;
    let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
    let mut hash = SEED ^ length;
    let mut words = data.chunks_exact(4);
    for word in words.by_ref() {
        let word = word.first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
        let mixed = word.wrapping_mul(M);
        let mixed = (mixed ^ (mixed >> 24)).wrapping_mul(M);
        hash = hash.wrapping_mul(M) ^ mixed;
    }
    let rest = words.remainder();
    for (shift, byte) in rest.iter().enumerate().rev() {
        hash ^= u32::from(*byte) << (8 * shift);
    }
    if !rest.is_empty() {
        hash = hash.wrapping_mul(M);
    }
    hash = (hash ^ (hash >> 13)).wrapping_mul(M);
    (hash ^ (hash >> 15)) & 0x7fff_ffff
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The values of Kafka's own test (`UtilsTest.testMurmur2`), made positive.
    #[test]
    fn keys_are_hashed_as_java_hashes_them() {
        let cases: [(&[u8], i32); 6] = [
            (b"21", -973_932_308),
            (b"foobar", -790_332_482),
            (b"a-little-bit-long-string", -985_981_536),
            (b"a-little-bit-longer-string", -1_486_304_829),
            (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58_897_971),
            (b"abc", 479_470_107),
        ];
        for (key, expected) in cases {
            assert_eq!(murmur2(key), expected.cast_unsigned() & 0x7fff_ffff, "{key:?}");
        }
    }
}
