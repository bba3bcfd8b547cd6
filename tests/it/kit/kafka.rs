//! A real Apache Kafka: one broker in KRaft mode, in a folder of its own.

use std::{
    fs::{self, File},
    net::TcpStream,
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use rdkafka::{
    ClientConfig, Message, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewPartitions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer},
    error::KafkaError,
    message::Headers,
};
use serde_json::Value as Json;

use super::{
    cluster::{cache_dir, free_port},
    proxy::Proxy,
    scratch::Scratch,
    wait::tail,
};

const VERSION: &str = "4.1.0";
const START_LIMIT: Duration = Duration::from_secs(90);
const READ_LIMIT: Duration = Duration::from_secs(30);

/// Of every user.
pub(crate) const PASSWORD: &str = "s3cret-pass";

/// What a reader sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Isolation {
    Committed,
    Uncommitted,
}

/// A record as it was read.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Record {
    pub(crate) topic: String,
    pub(crate) partition: i32,
    pub(crate) key: Option<String>,
    pub(crate) value: Option<Vec<u8>>,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) timestamp_ms: Option<i64>,
}

impl Record {
    pub(crate) fn json(&self) -> Json {
        serde_json::from_slice(self.value.as_ref().expect("a value")).expect("JSON")
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

/// A running broker that dies with the test, however the test ends. Its listeners: plain, by login
/// (`walrace` may do everything, `guest` nothing), by TLS, by both, and plain behind a [`Proxy`].
#[derive(Debug)]
pub(crate) struct Kafka {
    plain: u16,
    login: u16,
    tls: u16,
    secure: u16,
    proxy: Proxy,
    child: Option<Child>,
    scratch: Scratch,
    _locks: Vec<File>,
}

impl Kafka {
    /// A broker with topics of three partitions.
    pub(crate) async fn start() -> Self {
        let (ports, locks): (Vec<u16>, Vec<File>) = (0..6).map(|_| free_port()).unzip();
        let [plain, controller, login, tls, secure, proxied] = ports[..] else { unreachable!() };
        let proxy = Proxy::to(proxied).await;
        let scratch = Scratch::new("kafka");
        let mut kafka =
            Self { plain, login, tls, secure, proxy, child: None, scratch, _locks: locks };
        kafka.make_certificate();
        kafka.configure(controller, proxied);
        kafka.format();
        kafka.up().await;
        kafka
    }

    /// The address for everybody.
    pub(crate) fn brokers(&self) -> String {
        format!("127.0.0.1:{}", self.plain)
    }

    /// The address for those who log in.
    pub(crate) fn login_brokers(&self) -> String {
        format!("127.0.0.1:{}", self.login)
    }

    /// The address for TLS.
    pub(crate) fn tls_brokers(&self) -> String {
        format!("127.0.0.1:{}", self.tls)
    }

    /// The address for those who log in, by TLS.
    pub(crate) fn secure_brokers(&self) -> String {
        format!("127.0.0.1:{}", self.secure)
    }

    /// The address behind the proxy.
    pub(crate) fn proxied_brokers(&self) -> String {
        format!("127.0.0.1:{}", self.proxy.port())
    }

    pub(crate) fn proxy(&self) -> &Proxy {
        &self.proxy
    }

    /// The certificate that TLS clients trust.
    pub(crate) fn certificate(&self) -> PathBuf {
        self.scratch.path().join("cert.pem")
    }

    /// `kill -9`.
    pub(crate) fn down(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
            self.scratch.forget("kafka");
        }
    }

    /// Starts it, at the same ports, and waits until it answers.
    pub(crate) async fn up(&mut self) {
        assert!(self.child.is_none(), "the broker runs already");
        let log = self.scratch.path().join("kafka.log");
        let log = File::options().create(true).append(true).open(log).expect("a log");
        let child = self
            .java("kafka.Kafka")
            .arg("server.properties")
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a second handle"))
            .stderr(log)
            .process_group(0)
            .spawn()
            .expect("java, which Debian's package default-jre-headless has");
        self.scratch.note("kafka", child.id());
        self.child = Some(child);
        self.wait_ready().await;
    }

    /// Not by `wait_for`: its probe cannot be part of a future that is `Send`, as `Target`'s are.
    async fn wait_ready(&mut self) {
        let log = self.scratch.path().join("kafka.log");
        let log = || tail(&fs::read_to_string(&log).unwrap_or_default(), 30);
        let begin = Instant::now();
        for port in [self.plain, self.login, self.tls, self.secure] {
            while TcpStream::connect(("127.0.0.1", port)).is_err() {
                let child = self.child.as_mut().expect("it was just started");
                if let Some(code) = child.try_wait().expect("its state") {
                    panic!("kafka ended with {code}:\n{}", log());
                }
                assert!(begin.elapsed() < START_LIMIT, "kafka is not ready:\n{}", log());
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }

    /// Everything in the topics of changes, in the order within each partition.
    pub(crate) async fn records(&self, isolation: Isolation) -> Vec<Record> {
        let brokers = self.brokers();
        tokio::task::spawn_blocking(move || read(&brokers, isolation)).await.expect("records")
    }

    pub(crate) async fn create_topic(&self, name: &str, partitions: i32, config: &[(&str, &str)]) {
        let mut topic = NewTopic::new(name, partitions, TopicReplication::Fixed(1));
        for (key, value) in config {
            topic = topic.set(key, value);
        }
        let made = self.admin().create_topics([&topic], &AdminOptions::new()).await;
        made.expect("a topic").pop().expect("its result").expect("a topic");
    }

    pub(crate) async fn grow_topic(&self, name: &str, partitions: usize) {
        let new = NewPartitions::new(name, partitions);
        let made = self.admin().create_partitions([&new], &AdminOptions::new()).await;
        made.expect("partitions").pop().expect("its result").expect("partitions");
    }

    /// One of Kafka's own command-line tools, by its class.
    pub(crate) async fn tool(&self, class: &str, arguments: &[&str]) -> Output {
        let mut command = self.java(class);
        command.args(arguments).stdin(Stdio::null());
        tokio::task::spawn_blocking(move || command.output().expect("java")).await.expect("a tool")
    }

    fn admin(&self) -> AdminClient<DefaultClientContext> {
        ClientConfig::new()
            .set("bootstrap.servers", self.brokers())
            .create()
            .expect("an admin client")
    }

    fn java(&self, class: &str) -> Command {
        let jars = cache_dir().join(format!("kafka-{VERSION}"));
        assert!(jars.is_dir(), "no {}: run scripts/install.sh test", jars.display());
        let mut command = Command::new("java");
        command
            .args(["-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"])
            .arg("-Dlog4j2.configurationFile=log4j2.properties")
            .arg("-cp")
            .arg(jars.join("*"))
            .arg(class)
            .current_dir(self.scratch.path());
        command
    }

    fn configure(&self, controller: u16, proxied: u16) {
        let at = |port: u16| format!("127.0.0.1:{port}");
        let open = format!(
            "PLAIN://{},LOGIN://{},TLS://{},SECURE://{},PROXIED://",
            at(self.plain),
            at(self.login),
            at(self.tls),
            at(self.secure),
        );
        let listeners = format!(
            "listeners={open}{},CONTROLLER://{}\n\
             advertised.listeners={open}{}\n\
             controller.quorum.bootstrap.servers={}\n",
            at(proxied),
            at(controller),
            at(self.proxy.port()),
            at(controller),
        );
        let text = format!("{listeners}{SETTINGS}").replace("PASSWORD", PASSWORD);
        let write = |name: &str, text: &str| {
            fs::write(self.scratch.path().join(name), text).expect("a file");
        };
        write("server.properties", &text);
        write("log4j2.properties", LOGGING);
    }

    fn format(&self) {
        let user = |mechanism, name| format!("{mechanism}=[name={name},password={PASSWORD}]");
        let mut command = self.java("kafka.tools.StorageTool");
        command.args(["format", "--standalone", "-c", "server.properties"]);
        command.args(["-t", "MkU3OEVBNTcwNTJENDM2Qg"]);
        for mechanism in ["SCRAM-SHA-256", "SCRAM-SHA-512"] {
            for name in ["walrace", "guest"] {
                command.args(["--add-scram", &user(mechanism, name)]);
            }
        }
        let output = command.output().expect("java");
        assert!(output.status.success(), "{output:?}");
    }

    fn make_certificate(&self) {
        let output = Command::new("openssl")
            .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"])
            .args(["-nodes", "-days", "2", "-subj", "/CN=kafka"])
            .args(["-addext", "subjectAltName=IP:127.0.0.1"])
            .args(["-keyout", "key.pem", "-out", "cert.pem"])
            .current_dir(self.scratch.path())
            .output()
            .expect("openssl");
        assert!(output.status.success(), "{output:?}");
        let read = |name: &str| fs::read(self.scratch.path().join(name)).expect("a file");
        let both = [read("key.pem"), read("cert.pem")].concat();
        fs::write(self.scratch.path().join("both.pem"), both).expect("a file");
    }
}

impl Drop for Kafka {
    fn drop(&mut self) {
        self.down();
    }
}

const SETTINGS: &str = r#"
process.roles=broker,controller
node.id=1
listener.security.protocol.map=PLAIN:PLAINTEXT,PROXIED:PLAINTEXT,LOGIN:SASL_PLAINTEXT,TLS:SSL,SECURE:SASL_SSL,CONTROLLER:PLAINTEXT
controller.listener.names=CONTROLLER
inter.broker.listener.name=PLAIN
log.dirs=data
num.partitions=3
log.retention.ms=-1
auto.create.topics.enable=false
offsets.topic.replication.factor=1
offsets.topic.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
share.coordinator.state.topic.num.partitions=1
group.initial.rebalance.delay.ms=0
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
super.users=User:ANONYMOUS;User:walrace
sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256,SCRAM-SHA-512
listener.name.login.plain.sasl.jaas.config=org.apache.kafka.common.security.plain.PlainLoginModule required user_walrace="PASSWORD" user_guest="PASSWORD";
listener.name.login.scram-sha-256.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;
listener.name.login.scram-sha-512.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;
listener.name.tls.ssl.keystore.type=PEM
listener.name.tls.ssl.keystore.location=both.pem
listener.name.secure.ssl.keystore.type=PEM
listener.name.secure.ssl.keystore.location=both.pem
listener.name.secure.sasl.enabled.mechanisms=SCRAM-SHA-512
listener.name.secure.scram-sha-512.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;
"#;

const LOGGING: &str = "
rootLogger.level=warn
rootLogger.appenderRef.stdout.ref=STDOUT
appender.console.type=Console
appender.console.name=STDOUT
appender.console.layout.type=PatternLayout
appender.console.layout.pattern=%d %p %c: %m%n
";

fn read(brokers: &str, isolation: Isolation) -> Vec<Record> {
    let isolation = match isolation {
        Isolation::Committed => "read_committed",
        Isolation::Uncommitted => "read_uncommitted",
    };
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", "kit")
        .set("isolation.level", isolation)
        .set("enable.auto.commit", "false")
        .set("enable.partition.eof", "true")
        .create()
        .expect("a consumer");
    let mut list = TopicPartitionList::new();
    let metadata = consumer.fetch_metadata(None, READ_LIMIT).expect("metadata");
    let own = |name: &str| !name.starts_with("__") && !name.starts_with("walrace.progress");
    for topic in metadata.topics().iter().filter(|topic| own(topic.name())) {
        for partition in topic.partitions() {
            list.add_partition_offset(topic.name(), partition.id(), Offset::Beginning)
                .expect("a partition");
        }
    }
    let mut left = list.count();
    consumer.assign(&list).expect("an assignment");
    let mut records = Vec::new();
    while left > 0 {
        match consumer.poll(READ_LIMIT).expect("a record within the limit") {
            Ok(message) => records.push(record(&message)),
            Err(KafkaError::PartitionEOF(_)) => left -= 1,
            Err(error) => eprintln!("the reader of the kit: {error}"),
        }
    }
    records.sort_by(|a, b| (&a.topic, a.partition).cmp(&(&b.topic, b.partition)));
    records
}

fn record(message: &impl Message) -> Record {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let headers = message.headers().map_or_else(Vec::new, |headers| {
        let pair = |h: rdkafka::message::Header<&[u8]>| {
            (h.key.to_owned(), text(h.value.unwrap_or_default()))
        };
        headers.iter().map(pair).collect()
    });
    Record {
        topic: message.topic().to_owned(),
        partition: message.partition(),
        key: message.key().map(text),
        value: message.payload().map(<[u8]>::to_vec),
        headers,
        timestamp_ms: message.timestamp().to_millis(),
    }
}
