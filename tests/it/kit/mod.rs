//! What the tests stand on: real servers, a real binary, and things that break on purpose.
//!
//! - [`Cluster`]: a real PostgreSQL of a given version, in a folder of its own.
//! - `Kafka`: a real Apache Kafka.
//! - [`Server`]: the real `walrace` binary as a child.
//! - [`Recorder`]: an HTTP target that remembers what arrived and fails as a test asks.
//! - [`FileRecorder`]: what the file sink wrote.
//! - [`Moto`]: a store that speaks S3's protocol.
//! - [`OpenSearch`]: a real OpenSearch.
//! - [`Proxy`]: a TCP connection that slows, stalls and breaks.
//! - [`Ledger`]: a random workload whose outcome can be checked, row for row.
//! - [`Redis`]: a real Redis, with a login or TLS.
//! - [`Nats`]: a real NATS server with JetStream.
//! - [`RabbitMq`]: a real RabbitMQ, a node of its own.
//! - [`SmallDisk`]: a file system of a few MiB.
//! - [`Scratch`]: a folder that takes the processes started in it along when it goes.
#![allow(dead_code, unused_imports, reason = "not every test takes every tool")]

mod cluster;
#[cfg(feature = "kafka")]
mod kafka;
mod ledger;
mod moto;
mod nats;
mod opensearch;
pub(crate) mod power_cut;
mod proxy;
mod rabbitmq;
mod recorder;
mod redis;
mod replay;
mod scratch;
mod server;
mod small_disk;
mod tls;
mod twins;
mod wait;

mod ledger_test;
mod self_test;

pub(crate) use cluster::{Cluster, Session, Setup, Snapshot, Stop};
#[cfg(feature = "kafka")]
pub(crate) use kafka::{Isolation, Kafka, PASSWORD as KAFKA_PASSWORD, Record};
pub(crate) use ledger::{Ledger, Load, Pace};
pub(crate) use moto::Moto;
pub(crate) use nats::Nats;
pub(crate) use opensearch::OpenSearch;
pub(crate) use proxy::Proxy;
pub(crate) use rabbitmq::RabbitMq;
pub(crate) use recorder::{Answer, FileRecorder, Recorder, Request};
pub(crate) use redis::Redis;
pub(crate) use replay::{Delivery, Report, State, check};
pub(crate) use scratch::Scratch;
pub(crate) use server::{Server, http_client, source_toml};
pub(crate) use small_disk::SmallDisk;
pub(crate) use tls::certificates;
pub(crate) use wait::wait_for;
