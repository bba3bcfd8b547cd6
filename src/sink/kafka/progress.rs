//! The progress record: the sink's name is its key, and the last committed one counts.

use std::{collections::BTreeMap, thread, time::Duration};

use rdkafka::{
    Message, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer},
    error::{KafkaError, KafkaResult, RDKafkaErrorCode},
};
use serde::{Deserialize, Serialize};

use super::client::{Call, Cluster, Events};
use crate::{
    error::{Class, Classify, Error, Result},
    sink::Progress,
};

/// Records that are looked at first, from the end; then many more, where other sinks wrote these.
const RECORDS: i64 = 1_000;
const MORE: i64 = 64;

/// A reader looks again this often whether a transaction of another sink has ended.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// The value of a progress record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Stored {
    /// The version of this layout: 1.
    version: u32,
    #[serde(flatten)]
    pub(super) progress: Progress,
    /// How many partitions each topic had.
    pub(super) partitions: BTreeMap<String, i32>,
}

impl Stored {
    pub(super) fn new(progress: Progress, partitions: BTreeMap<String, i32>) -> Self {
        Self { version: 1, progress, partitions }
    }

    pub(super) fn to_json(&self) -> Result<Vec<u8>> {
        serde_json::to_vec(self).class(Class::Bug, || "cannot write the progress as JSON")
    }

    fn from_json(bytes: &[u8], place: &str) -> Result<Self> {
        let stored: Self = serde_json::from_slice(bytes)
            .class(Class::Damaged, || format!("cannot read the progress in {place}"))?;
        if stored.version != 1 {
            return Err(Error::config(format!(
                "the progress in {place} has version {}, which this Walrace does not know",
                stored.version
            ))
            .remedy("use the Walrace that wrote it, or a newer one"));
        }
        Ok(stored)
    }
}

/// How long a reader waits for transactions that others have open: what they wrote, and what comes
/// after it, cannot be read before they end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pending {
    /// As long as the call may last: nothing that is committed may be overlooked.
    Wait,
    /// A moment: who only looks may see what was there before.
    Glance,
}

/// The last committed record of `sink` in `topic`.
pub(super) fn read(
    cluster: &Cluster,
    (topic, sink): (&str, &str),
    pending: Pending,
    call: &Call,
) -> Result<Option<Stored>> {
    let end = {
        let consumer = cluster.consumer("read_uncommitted")?;
        range(&consumer, topic, call)?.1
    };
    let consumer = cluster.consumer("read_committed")?;
    let (mut low, mut stable) = range(&consumer, topic, call)?;
    let glance = Call::within(Duration::from_secs(1), call);
    while stable < end {
        match pending {
            Pending::Wait => call.check("end a transaction that another sink has open")?,
            Pending::Glance if glance.check("").is_err() => break,
            Pending::Glance => {}
        }
        thread::sleep(LOOK_AGAIN);
        (low, stable) = range(&consumer, topic, call)?;
    }
    let (mut from, mut span) = (stable, RECORDS);
    while from > low {
        from = low.max(stable - span);
        let found = last(&consumer, (topic, sink), (from, stable), call)?;
        if found.is_some() {
            return Ok(found);
        }
        span = span.saturating_mul(MORE);
    }
    Ok(None)
}

/// The first offset, and the one after the last that this consumer may read.
fn range(consumer: &BaseConsumer<Events>, topic: &str, call: &Call) -> Result<(i64, i64)> {
    call.ask(&format!("tell the offsets of topic {topic}"), consumer.context(), |slice| {
        consumer.poll(Duration::ZERO);
        consumer.fetch_watermarks(topic, 0, slice)
    })
}

/// The last record of `sink` within the offsets.
fn last(
    consumer: &BaseConsumer<Events>,
    (topic, sink): (&str, &str),
    (from, to): (i64, i64),
    call: &Call,
) -> Result<Option<Stored>> {
    let doing = format!("send the records of topic {topic}");
    let place = format!("topic {topic} for sink {sink}");
    let failed = |error: KafkaError| call.failed(&doing, &error, consumer.context());
    assign(consumer, topic, from).map_err(failed)?;
    let mut found = None;
    loop {
        call.check_with(&doing, consumer.context())?;
        match consumer.poll(call.slice()) {
            None => {}
            Some(Err(KafkaError::PartitionEOF(_))) => return Ok(found),
            // It is about the group, which is needed by name only, or about a connection.
            Some(Err(error)) if !is_final(&error) => {}
            Some(Err(error)) => return Err(failed(error)),
            Some(Ok(record)) => {
                if record.key() == Some(sink.as_bytes()) {
                    let json = record.payload();
                    found = json.map(|json| Stored::from_json(json, &place)).transpose()?;
                }
                if record.offset() + 1 >= to {
                    return Ok(found);
                }
            }
        }
    }
}

fn assign(consumer: &BaseConsumer<Events>, topic: &str, from: i64) -> KafkaResult<()> {
    let mut list = TopicPartitionList::with_capacity(1);
    list.add_partition_offset(topic, 0, Offset::Offset(from))?;
    consumer.assign(&list)
}

fn is_final(error: &KafkaError) -> bool {
    use RDKafkaErrorCode as Code;
    matches!(
        error.rdkafka_error_code(),
        Some(Code::TopicAuthorizationFailed | Code::UnknownTopicOrPartition | Code::UnknownTopic)
    )
}
