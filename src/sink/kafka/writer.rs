//! Opens, writes and commits. All calls block.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use rdkafka::{
    error::{KafkaError, RDKafkaErrorCode as Code},
    producer::{BaseRecord, Producer as _},
};
use tracing::debug;

use super::{
    client::{Call, Cluster, Events, Producer, class_of, code_of, is_fenced},
    message::Message,
    present::fenced,
    progress::{self, Pending, Stored},
    topics::{Purpose, Rules, Topics},
};
use crate::{
    change::Timestamp,
    config,
    error::{Class, Error, Result},
    failpoint,
    sink::Progress,
};

/// How long one look for deliveries waits: it is part of every write.
const POLL: Duration = Duration::from_millis(1);

/// After a commit the brokers still end the transaction in each partition. One that begins
/// meanwhile is refused, and librdkafka asks again only after 20 ms.
const ENDING: Duration = Duration::from_millis(5);

/// The counts of partitions are compared this often.
const COMPARE_EVERY: Duration = Duration::from_secs(60);

/// What a blocking task works on.
pub(super) struct Writer {
    cluster: Cluster,
    rules: Rules,
    /// The key of the progress record.
    sink: String,
    progress_topic: String,
    /// `None`: without transactions.
    transactional_id: Option<String>,
    /// The counts of partitions that changes were written by.
    seen: BTreeMap<String, i32>,
    /// `None` until opened, and after a failure that leaves unknown what the cluster holds.
    open: Option<Open>,
}

struct Open {
    producer: Producer,
    topics: Topics,
    compared_at: Instant,
    committed_at: Option<Instant>,
    stored: Option<Progress>,
}

/// Lets librdkafka tell what has happened.
pub(super) fn serve(producer: &Producer) {
    producer.poll(Duration::ZERO);
}

impl Writer {
    pub(super) fn new(cluster: Cluster, options: &config::Kafka, sink: &str, id: String) -> Self {
        Self {
            cluster,
            rules: Rules::new(options),
            sink: sink.to_owned(),
            progress_topic: options.progress_topic.clone(),
            transactional_id: options.transactional.then_some(id),
            seen: BTreeMap::new(),
            open: None,
        }
    }

    /// Connects anew. With transactions: ends what was left open, shuts out other writers, and
    /// only then reads the progress, which nobody else can move any more.
    pub(super) fn open(&mut self, call: &Call) -> Result<Option<Progress>> {
        self.open = None;
        let producer = self.cluster.producer(self.transactional_id.as_deref())?;
        let mut topics = Topics::fetch(&producer, call)?;
        let mut stored = None;
        if let Some(id) = &self.transactional_id {
            let around = (&self.cluster, &self.rules, &producer);
            topics.ensure((&self.progress_topic, Purpose::Progress), around, call)?;
            let doing = format!("begin to take transactions of `{id}`");
            call.ask(&doing, producer.context(), |slice| {
                let answer = producer.init_transactions(slice);
                serve(&producer);
                answer
            })?;
            let place = (self.progress_topic.as_str(), self.sink.as_str());
            stored = progress::read(&self.cluster, place, Pending::Wait, call)?;
        }
        let progress = stored.as_ref().map(|stored| stored.progress);
        self.seen.extend(stored.map(|stored| stored.partitions).unwrap_or_default());
        topics.compare(&mut self.seen, &self.rules)?;
        let compared_at = Instant::now();
        self.open =
            Some(Open { producer, topics, compared_at, committed_at: None, stored: progress });
        Ok(progress)
    }

    /// Reads the progress, and changes nothing.
    pub(super) fn peek(&self, call: &Call) -> Result<Option<Progress>> {
        let producer = self.cluster.producer(None)?;
        if !Topics::fetch(&producer, call)?.has(&self.progress_topic) {
            return Ok(None);
        }
        drop(producer);
        let place = (self.progress_topic.as_str(), self.sink.as_str());
        let stored = progress::read(&self.cluster, place, Pending::Glance, call)?;
        Ok(stored.map(|stored| stored.progress))
    }

    pub(super) fn close(&mut self) {
        self.open = None;
    }

    /// Makes the messages and the progress durable. After a failure it has to be opened anew, so
    /// that it goes on from what the cluster holds; a refusal leaves it open.
    pub(super) fn write(
        &mut self,
        (list, topics): (Vec<Message>, &[Arc<str>]),
        progress: Progress,
        call: &Call,
    ) -> Result<()> {
        let Some(mut open) = self.open.take() else {
            return Err(Error::retry(format!("{} is not open", self.cluster.name())));
        };
        // What progress says is there is there: a write that was cancelled late was done after all.
        if open.stored == Some(progress) {
            self.open = Some(open);
            return Ok(());
        }
        match self.write_to(&mut open, (list, topics), progress, call) {
            Ok(()) => {
                open.stored = self.transactional_id.as_ref().map(|_| progress);
                self.open = Some(open);
                Ok(())
            }
            Err(error) if error.class() == Class::Data => {
                self.begin_again(open, call)?;
                Err(error)
            }
            Err(error) => Err(error),
        }
    }

    fn write_to(
        &mut self,
        open: &mut Open,
        (list, topics): (Vec<Message>, &[Arc<str>]),
        progress: Progress,
        call: &Call,
    ) -> Result<()> {
        let counts = self.counts(open, topics, call)?;
        let messages = Outgoing { list, topics, counts: &counts };
        if self.transactional_id.is_none() {
            return self.deliver(&open.producer, messages, call);
        }
        self.check_forward(open.stored.as_ref(), &progress)?;
        self.commit(open, messages, progress, call)
    }

    /// After a refusal: a producer one of whose messages was refused by a broker is short of a
    /// sequence number, and its next messages fail of that. A new one ends the transaction.
    fn begin_again(&mut self, open: Open, call: &Call) -> Result<()> {
        let known = open.stored;
        drop(open);
        if self.open(call)? == known {
            return Ok(());
        }
        self.open = None;
        let (sink, topic) = (&self.sink, &self.progress_topic);
        Err(Error::retry(format!("another walrace writes sink {sink}: topic {topic} has moved")))
    }

    /// The count of partitions of each topic.
    fn counts(&mut self, open: &mut Open, topics: &[Arc<str>], call: &Call) -> Result<Vec<i32>> {
        if open.compared_at.elapsed() >= COMPARE_EVERY {
            open.topics = Topics::fetch(&open.producer, call)?;
            open.topics.compare(&mut self.seen, &self.rules)?;
            open.compared_at = Instant::now();
        }
        let mut counts = Vec::with_capacity(topics.len());
        for topic in topics {
            let around = (&self.cluster, &self.rules, &open.producer);
            let ensured = open.topics.ensure((topic, Purpose::Changes), around, call)?;
            if ensured.created || !self.seen.contains_key(&**topic) {
                self.seen.insert(topic.to_string(), ensured.partitions);
            }
            counts.push(ensured.partitions);
        }
        open.topics.compare(&mut self.seen, &self.rules)?;
        Ok(counts)
    }

    /// Only a newer epoch may go back.
    fn check_forward(&self, held: Option<&Progress>, progress: &Progress) -> Result<()> {
        let Some(held) = held else { return Ok(()) };
        let (sink, topic) = (&self.sink, &self.progress_topic);
        if held.lineage != progress.lineage {
            return Err(Error::config(format!(
                "topic {topic} holds the progress of a sink {sink} of another history"
            ))
            .remedy("give this sink another name or another `progress_topic`"));
        }
        let forward = progress.epoch > held.epoch
            || (progress.epoch == held.epoch
                && progress.cursor >= held.cursor
                && progress.retry_seq >= held.retry_seq);
        if forward {
            return Ok(());
        }
        Err(Error::retry(format!(
            "another walrace writes sink {sink}: topic {topic} has epoch {} offset {}, and epoch \
             {} offset {} was to be written",
            held.epoch, held.cursor, progress.epoch, progress.cursor
        )))
    }

    /// One transaction with the messages and the progress.
    fn commit(
        &self,
        open: &mut Open,
        messages: Outgoing,
        progress: Progress,
        call: &Call,
    ) -> Result<()> {
        let ending = open.committed_at.map(|at| ENDING.saturating_sub(at.elapsed()));
        if let Some(left) = ending.filter(|left| !left.is_zero()) {
            open.producer.poll(left);
        }
        self.commit_now(open, messages, progress, call)?;
        open.committed_at = Some(Instant::now());
        Ok(())
    }

    fn commit_now(
        &self,
        open: &Open,
        messages: Outgoing,
        progress: Progress,
        call: &Call,
    ) -> Result<()> {
        let producer = &open.producer;
        let begun = producer.begin_transaction();
        begun.map_err(|error| self.failed("begin a transaction", &error, open, call))?;
        let record = Stored::new(progress, self.seen.clone()).to_json()?;
        let sent = self.send(producer, messages, Some(&record), call)?;
        failpoint::reach("kafka::after_produce");
        self.await_deliveries(producer, sent, call)?;
        failpoint::reach("kafka::before_commit");
        let events = producer.context();
        let committed = call.ask("commit a transaction", events, |slice| {
            let answer = producer.commit_transaction(slice);
            serve(producer);
            answer
        });
        committed.map_err(|error| self.explain(error, producer))?;
        failpoint::reach("kafka::after_commit");
        Ok(())
    }

    /// Without a transaction: all of them, acknowledged by all replicas.
    fn deliver(&self, producer: &Producer, messages: Outgoing, call: &Call) -> Result<()> {
        let delivered = self
            .send(producer, messages, None, call)
            .and_then(|sent| self.await_deliveries(producer, sent, call));
        if delivered.as_ref().is_err_and(|error| error.class() == Class::Data) {
            settle(producer, call)?;
        }
        delivered
    }

    /// Hands all messages to librdkafka, and tells how many.
    fn send(
        &self,
        producer: &Producer,
        messages: Outgoing,
        progress: Option<&[u8]>,
        call: &Call,
    ) -> Result<u64> {
        let write = producer.context().begin();
        let mut sent = 0;
        let Outgoing { list, topics, counts } = messages;
        for message in list {
            let count = counts.get(message.topic).copied().unwrap_or(1).max(1);
            let partition = i64::from(message.hash) % i64::from(count);
            let topic = topics.get(message.topic).map_or("", |topic| topic);
            let mut record = BaseRecord::<[u8], [u8], usize>::with_opaque_to(topic, write)
                .partition(i32::try_from(partition).unwrap_or_default())
                .timestamp(message.timestamp_ms)
                .headers(message.headers);
            record.key = message.key.as_deref();
            record.payload = message.value.as_deref();
            self.enqueue(producer, record, call)?;
            sent += 1;
        }
        if let Some(json) = progress {
            let record =
                BaseRecord::<[u8], [u8], usize>::with_opaque_to(&self.progress_topic, write)
                    .partition(0)
                    .timestamp(Timestamp::now().0.div_euclid(1_000))
                    .key(self.sink.as_bytes())
                    .payload(json);
            self.enqueue(producer, record, call)?;
            sent += 1;
        }
        Ok(sent)
    }

    /// Waits for room in librdkafka's queue.
    fn enqueue(
        &self,
        producer: &Producer,
        mut record: BaseRecord<'_, [u8], [u8], usize>,
        call: &Call,
    ) -> Result<()> {
        loop {
            match producer.send(record) {
                Ok(()) => return Ok(()),
                Err((error, again)) if code_of(&error) == Some(Code::QueueFull) => {
                    record = again;
                    producer.poll(POLL);
                    self.check_failure(producer)?;
                    call.check_with("take more messages", producer.context())?;
                }
                Err((error, record)) => {
                    let doing = format!("take a message for topic {}", record.topic);
                    let error = call.failed(&doing, &error, producer.context());
                    return Err(self.explain(error, producer));
                }
            }
        }
    }

    fn await_deliveries(&self, producer: &Producer, sent: u64, call: &Call) -> Result<()> {
        while producer.context().done() < sent {
            producer.poll(POLL);
            self.check_failure(producer)?;
            call.check_with("acknowledge messages", producer.context())?;
        }
        self.check_failure(producer)
    }

    fn check_failure(&self, producer: &Producer) -> Result<()> {
        let Some((code, topic)) = producer.context().failure() else { return Ok(()) };
        let cluster = self.cluster.name();
        let text = format!("{cluster} did not take a message for topic {topic}: {code}");
        let error = match class_of(code) {
            Class::Config => Error::config(text)
                .remedy(format!("let the user write to topic {topic}, and see its settings")),
            class => Error::new(class, text),
        };
        Err(if is_fenced(code) { self.fenced() } else { self.explain(error, producer) })
    }

    /// An error that ends the producer says more than what came of it.
    fn explain(&self, error: Error, producer: &Producer) -> Error {
        match producer.client().fatal_error() {
            Some((code, _)) if is_fenced(code) => self.fenced(),
            Some((code, text)) if class_of(code) != Class::Config => {
                debug!("librdkafka ended the producer: {code}: {text}");
                Error::retry(format!("{}: {text}", self.cluster.name()))
            }
            _ => error,
        }
    }

    fn failed(&self, doing: &str, error: &KafkaError, open: &Open, call: &Call) -> Error {
        let events: &Events = open.producer.context();
        if code_of(error).is_some_and(is_fenced) {
            return self.fenced();
        }
        self.explain(call.failed(doing, error, events), &open.producer)
    }

    fn fenced(&self) -> Error {
        fenced(self.transactional_id.as_deref().unwrap_or(&self.sink))
    }
}

/// Messages on their way, with the topics that they name.
struct Outgoing<'a> {
    list: Vec<Message>,
    topics: &'a [Arc<str>],
    counts: &'a [i32],
}

/// Waits until it is known of each message what became of it.
fn settle(producer: &Producer, call: &Call) -> Result<()> {
    while producer.in_flight_count() > 0 {
        producer.poll(POLL);
        call.check_with("acknowledge messages", producer.context())?;
    }
    Ok(())
}
