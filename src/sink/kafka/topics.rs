//! The topics that are written: created where missing, and watched for a change of their
//! partitions, which would tear the changes of a key apart.

use std::collections::{BTreeMap, HashMap};

use rdkafka::{
    admin::{AdminOptions, NewTopic, TopicReplication},
    error::{KafkaError, RDKafkaErrorCode as Code},
    metadata::MetadataTopic,
    producer::Producer as _,
};
use tokio::runtime::Handle;
use tracing::{info, warn};

use super::client::{Call, Cluster, Producer, class_of};
use crate::{
    config,
    error::{Class, Error, Result},
};

/// How topics are made and judged.
pub(super) struct Rules {
    create: bool,
    partitions: Option<u16>,
    replication_factor: Option<u16>,
    allow_change: bool,
}

impl Rules {
    pub(super) fn new(options: &config::Kafka) -> Self {
        Self {
            create: options.create_topics,
            partitions: options.partitions,
            replication_factor: options.replication_factor,
            allow_change: options.allow_partition_change,
        }
    }
}

/// What a topic is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    Changes,
    /// Compacted, of one partition.
    Progress,
}

/// The counts of partitions of the topics, as they are now.
#[derive(Default)]
pub(super) struct Topics(HashMap<String, i32>);

impl Topics {
    /// All that the cluster shows.
    pub(super) fn fetch(producer: &Producer, call: &Call) -> Result<Self> {
        let events = producer.context();
        let metadata = call.ask("tell its topics", events, |slice| {
            let answer = producer.client().fetch_metadata(None, slice);
            super::writer::serve(producer);
            answer
        })?;
        let healthy = metadata.topics().iter().filter(|topic| topic.error().is_none());
        Ok(Self(healthy.filter_map(|t| Some((t.name().to_owned(), count(t)?))).collect()))
    }

    pub(super) fn has(&self, topic: &str) -> bool {
        self.0.contains_key(topic)
    }

    /// Compares with the counts that were seen before.
    pub(super) fn compare(&self, seen: &mut BTreeMap<String, i32>, rules: &Rules) -> Result<()> {
        for (topic, before) in seen {
            let Some(now) = self.0.get(topic).copied().filter(|now| now != before) else {
                continue;
            };
            if !rules.allow_change {
                return Err(Error::config(format!(
                    "topic {topic} had {before} partitions and has {now}: later changes of a key \
                     could lie in another partition than earlier ones"
                ))
                .remedy("set `allow_partition_change = true` if its readers can take that"));
            }
            warn!("topic {topic} had {before} partitions and has {now}: keys may change theirs");
            *before = now;
        }
        Ok(())
    }

    /// The count of partitions of `topic`, which is created where it is missing and may be.
    pub(super) fn ensure(
        &mut self,
        (topic, purpose): (&str, Purpose),
        (cluster, rules, producer): (&Cluster, &Rules, &Producer),
        call: &Call,
    ) -> Result<Ensured> {
        if let Some(partitions) = self.0.get(topic) {
            return Ok(Ensured { partitions: *partitions, created: false });
        }
        let mut created = false;
        loop {
            match look(producer, topic, call)? {
                Look::Partitions(partitions) => {
                    self.0.insert(topic.to_owned(), partitions);
                    return Ok(Ensured { partitions, created });
                }
                Look::NotYet => call.check_with("give the topic a leader", producer.context())?,
                Look::Missing if created => {
                    call.check_with("show the topic it created", producer.context())?;
                }
                Look::Missing => {
                    create((topic, purpose), (cluster, rules), call)?;
                    created = true;
                }
            }
            std::thread::sleep(call.slice() / 4);
        }
    }
}

/// A topic that is there.
pub(super) struct Ensured {
    pub(super) partitions: i32,
    /// Just now, by us.
    pub(super) created: bool,
}

enum Look {
    Partitions(i32),
    NotYet,
    Missing,
}

fn look(producer: &Producer, topic: &str, call: &Call) -> Result<Look> {
    let doing = format!("tell about topic {topic}");
    let metadata = call.ask(&doing, producer.context(), |slice| {
        let answer = producer.client().fetch_metadata(Some(topic), slice);
        super::writer::serve(producer);
        answer
    });
    let metadata = metadata?;
    let Some(found) = metadata.topics().first() else { return Ok(Look::Missing) };
    let Some(error) = found.error().map(Code::from) else {
        return Ok(count(found).map_or(Look::NotYet, Look::Partitions));
    };
    match error {
        Code::UnknownTopicOrPartition | Code::UnknownTopic => Ok(Look::Missing),
        Code::LeaderNotAvailable => Ok(Look::NotYet),
        Code::TopicAuthorizationFailed => {
            Err(Error::config(format!("the user may not write to topic {topic}"))
                .remedy(format!("allow it: kafka-acls --add --producer --topic {topic} ...")))
        }
        error => Err(call.failed(&doing, &KafkaError::MetadataFetch(error), producer.context())),
    }
}

fn count(topic: &MetadataTopic) -> Option<i32> {
    let led = topic.partitions().iter().all(|partition| partition.leader() >= 0);
    i32::try_from(topic.partitions().len()).ok().filter(|count| led && *count > 0)
}

fn create(
    (topic, purpose): (&str, Purpose),
    (cluster, rules): (&Cluster, &Rules),
    call: &Call,
) -> Result<()> {
    let progress = purpose == Purpose::Progress;
    if !rules.create {
        let more = if progress { " --partitions 1 --config cleanup.policy=compact" } else { "" };
        return Err(Error::config(format!("{} has no topic {topic}", cluster.name())).remedy(
            format!(
                "set `create_topics = true`, or run: kafka-topics --create --topic {topic}{more} \
                 --bootstrap-server ..."
            ),
        ));
    }
    let partitions = if progress { 1 } else { rules.partitions.map_or(-1, i32::from) };
    let copies = TopicReplication::Fixed(rules.replication_factor.map_or(-1, i32::from));
    let mut new = NewTopic::new(topic, partitions, copies);
    if progress {
        // Small segments: only closed ones are compacted, and the topic is read at each start.
        new = new.set("cleanup.policy", "compact").set("segment.bytes", "16777216");
    }
    let admin = cluster.admin()?;
    let left = Some(call.left());
    let options = AdminOptions::new().request_timeout(left).operation_timeout(left);
    let results = Handle::current().block_on(admin.create_topics([&new], &options));
    let code = match results.map(|mut results| results.pop()) {
        Ok(Some(Err((_, code)))) | Err(KafkaError::AdminOp(code)) => code,
        Ok(_) => Code::NoError,
        Err(_) => Code::Fail,
    };
    match code {
        Code::NoError => {
            info!("created topic {topic}");
            Ok(())
        }
        Code::TopicAlreadyExists => Ok(()),
        code => {
            let error = Error::new(
                class_of(code),
                format!("{} did not create topic {topic}: {code}", cluster.name()),
            );
            Err(match class_of(code) {
                Class::Config => error.remedy("allow it, or create the topic by hand"),
                _ => error,
            })
        }
    }
}
