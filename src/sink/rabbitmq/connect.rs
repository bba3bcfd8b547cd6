//! One connection to a RabbitMQ with one channel in confirm mode, and what the errors of the two
//! mean.

use std::{path::PathBuf, time::Duration};

use futures_util::{StreamExt, future::BoxFuture, stream::FuturesUnordered};
use lapin::{
    Channel, ConnectionProperties, ErrorKind, ExchangeKind,
    options::{ConfirmSelectOptions, ExchangeDeclareOptions},
    tcp::OwnedTLSConfig,
    types::{FieldTable, ShortString},
    uri::AMQPUri,
};

use super::super::certificate;
use crate::{
    config,
    error::{Class, Classify, Error, Result},
};

/// Attempts that wait for a server at most. The client gives up none by itself, and each has a
/// thread of its own.
const ATTEMPTS_MAX: usize = 4;
/// A server that says nothing for so long is gone, in seconds.
const HEARTBEAT: u16 = 20;
/// Exchanges of the server, which nobody may declare.
const PREDECLARED: &str = "amq.";

// Reply codes (<https://www.rabbitmq.com/docs/amqp-0-9-1-reference#constants>).
const ACCESS_REFUSED: u16 = 403;
const NOT_FOUND: u16 = 404;
const PRECONDITION_FAILED: u16 = 406;
const NOT_ALLOWED: u16 = 530;

type Attempt = BoxFuture<'static, lapin::Result<lapin::Connection>>;

/// How to connect.
pub(super) struct Dial {
    server: Server,
    attempts: FuturesUnordered<Attempt>,
    /// One that the server does not read from. It cannot be closed before that ends, so no other
    /// is made meanwhile.
    blocked: Option<Connection>,
}

/// Where to connect to, and what must be there.
struct Server {
    uri: AMQPUri,
    name: String,
    exchange: ShortString,
    exchange_type: String,
    declare: bool,
    tls_ca: Option<PathBuf>,
    timeout: Duration,
}

/// An open connection.
pub(super) struct Connection {
    pub(super) channel: Channel,
    pub(super) exchange: ShortString,
    pub(super) timeout: Duration,
    connection: lapin::Connection,
    name: String,
}

impl Dial {
    pub(super) fn new(options: &config::Rabbitmq) -> Result<Self> {
        let _ = rustls::crypto::ring::default_provider().install_default();
        // Neither the text nor the cause is shown: both may hold a password.
        let mut uri: AMQPUri = options.url.expose().parse().map_err(|_| {
            Error::config("`url` is not an address of the form amqp://user:password@host:port")
                .remedy("write it with its scheme, amqp or amqps")
        })?;
        if uri.vhost.is_empty() {
            uri.vhost = "/".into();
        }
        uri.query.heartbeat.get_or_insert(HEARTBEAT);
        let exchange = ShortString::try_new(options.exchange.as_str())
            .class(Class::Config, || "`exchange` is too long for a name")?;
        let name = format!("{}:{}", uri.authority.host, uri.authority.port);
        let server = Server {
            uri,
            name,
            exchange,
            exchange_type: options.exchange_type.clone(),
            declare: options.declare,
            tls_ca: options.tls_ca.clone(),
            timeout: Duration::from_millis(options.timeout_ms),
        };
        Ok(Self { server, attempts: FuturesUnordered::new(), blocked: None })
    }

    /// Connects, and declares the exchange or looks whether it is there.
    pub(super) async fn connect(&mut self) -> Result<Connection> {
        if let Some(connection) = self.blocked.take_if(|connection| !connection.is_blocked()) {
            connection.close().await;
        }
        if let Some(connection) = &self.blocked {
            return Err(connection.silent());
        }
        let timeout = self.server.timeout;
        match tokio::time::timeout(timeout, self.connect_at_last()).await {
            Ok(connected) => connected,
            Err(_) => Err(silent(&self.server.name, timeout)),
        }
    }

    /// Keeps a connection that cannot be closed now.
    pub(super) fn keep_blocked(&mut self, connection: Connection) {
        if connection.is_blocked() {
            self.blocked = Some(connection);
        }
    }

    async fn connect_at_last(&mut self) -> Result<Connection> {
        let Self { server, attempts, .. } = self;
        if attempts.len() < ATTEMPTS_MAX {
            let (uri, tls) = (server.uri.clone(), server.tls().await?);
            attempts.push(Box::pin(async move {
                let runtime = lapin::runtime::default_runtime()?;
                let properties =
                    ConnectionProperties::default().with_connection_name("walrace".into());
                lapin::Connection::connect_uri_with_config(uri, properties, tls, runtime).await
            }));
        }
        let Some(connected) = attempts.next().await else {
            return Err(Error::bug("no attempt to connect was made"));
        };
        let connection = connected.map_err(|cause| server.refused(cause))?;
        attempts.clear();
        server.channel(connection).await
    }
}

impl Server {
    async fn channel(&self, connection: lapin::Connection) -> Result<Connection> {
        let channel = connection.create_channel().await.map_err(|cause| self.refused(cause))?;
        self.look_at_exchange(&channel).await?;
        let confirm = channel.confirm_select(ConfirmSelectOptions::default());
        confirm.await.map_err(|cause| self.refused(cause))?;
        let (name, exchange) = (self.name.clone(), self.exchange.clone());
        Ok(Connection { channel, exchange, timeout: self.timeout, connection, name })
    }

    async fn tls(&self) -> Result<OwnedTLSConfig> {
        let cert_chain = match &self.tls_ca {
            None => None,
            Some(path) => {
                Some(tokio::fs::read_to_string(path).await.class(Class::Config, || {
                    format!("cannot read the certificates in {}", path.display())
                })?)
            }
        };
        Ok(OwnedTLSConfig { identity: None, cert_chain })
    }

    async fn look_at_exchange(&self, channel: &Channel) -> Result<()> {
        let exchange = self.exchange.as_str();
        if exchange.is_empty() {
            return Ok(());
        }
        let passive = !self.declare || exchange.starts_with(PREDECLARED);
        let options =
            ExchangeDeclareOptions { passive, durable: true, ..ExchangeDeclareOptions::default() };
        let kind = match self.exchange_type.as_str() {
            "topic" => ExchangeKind::Topic,
            "direct" => ExchangeKind::Direct,
            "fanout" => ExchangeKind::Fanout,
            "headers" => ExchangeKind::Headers,
            other => ExchangeKind::Custom(other.to_owned()),
        };
        let name = self.exchange.clone();
        let declared = channel.exchange_declare(name, kind, options, FieldTable::default()).await;
        declared.map_err(|cause| exchange_failure(&self.name, exchange, cause))
    }

    fn refused(&self, cause: lapin::Error) -> Error {
        let name = &self.name;
        let (user, vhost) = (&self.uri.authority.userinfo.username, &self.uri.vhost);
        let io = matches!(cause.kind(), ErrorKind::IOError(_));
        match code_of(&cause) {
            Some(ACCESS_REFUSED) => Error::config(format!("{name} refuses the login of {user}"))
                .caused_by(cause)
                .remedy(format!(
                    "check user and password in `url`: rabbitmqctl authenticate_user {user}"
                )),
            Some(NOT_ALLOWED) => {
                let text = format!("{user} may not use the virtual host {vhost} of {name}");
                Error::config(text).caused_by(cause).remedy(format!(
                    "rabbitmqctl add_vhost {vhost}; rabbitmqctl set_permissions -p {vhost} {user} \
                     '.*' '.*' '.*'"
                ))
            }
            None if io && certificate::is_refused(&cause) => {
                Error::config(format!("no TLS with {name}")).caused_by(cause).remedy(
                    "set `tls_ca` to the certificate that signed the server's, and use its host \
                     name",
                )
            }
            _ => Error::retry(format!("cannot reach {name}")).caused_by(cause),
        }
    }
}

impl Connection {
    pub(super) fn is_blocked(&self) -> bool {
        self.connection.status().connected() && self.connection.status().blocked()
    }

    pub(super) fn silent(&self) -> Error {
        if self.is_blocked() {
            return Error::retry(format!("{} takes no messages: an alarm is raised", self.name))
                .remedy("free memory or disk of the server: rabbitmq-diagnostics alarms");
        }
        silent(&self.name, self.timeout)
    }

    /// What it means that the channel or the connection failed under a batch.
    pub(super) fn failure(&self, cause: lapin::Error) -> Error {
        let (name, exchange) = (&self.name, self.exchange.as_str());
        if code_of(&cause) == Some(PRECONDITION_FAILED) && is_too_large(&cause) {
            return Error::data(format!("{name} refuses a message: {}", text_of(&cause)));
        }
        if code_of(&cause).is_some() {
            return exchange_failure(name, exchange, cause);
        }
        Error::retry(format!("the connection to {name} is lost")).caused_by(cause)
    }

    pub(super) fn unroutable(&self, key: &str) -> Error {
        let (name, exchange) = (&self.name, self.exchange.as_str());
        let (text, remedy) = if exchange.is_empty() {
            (
                format!("{name} has no queue {key}, and a message for it was returned"),
                format!("rabbitmqadmin declare queue name={key} durable=true"),
            )
        } else {
            (
                format!("no queue of {name} is bound to {exchange} for the routing key {key}"),
                format!(
                    "rabbitmqadmin declare binding source={exchange} destination=QUEUE \
                     routing_key={key}"
                ),
            )
        };
        Error::config(text).remedy(format!("{remedy}, or unroutable = \"drop\""))
    }

    pub(super) fn rejected(&self, key: &str) -> Error {
        Error::retry(format!("{} did not store a message for {key}", self.name))
            .remedy("look at the limits of the queue: rabbitmqctl list_queues name arguments")
    }

    pub(super) async fn close(self) {
        let close = self.connection.close(200, "OK".into());
        let _ = tokio::time::timeout(Duration::from_secs(1), close).await;
    }
}

fn silent(name: &str, timeout: Duration) -> Error {
    Error::retry(format!("{name} did not answer within {} ms", timeout.as_millis()))
}

fn exchange_failure(name: &str, exchange: &str, cause: lapin::Error) -> Error {
    let (class, remedy) = match code_of(&cause) {
        Some(NOT_FOUND) => {
            let declare = format!("rabbitmqadmin declare exchange name={exchange} type=topic");
            (Class::Config, format!("{declare}, or declare = true"))
        }
        Some(ACCESS_REFUSED) => (
            Class::Config,
            "permit it with rabbitmqctl set_permissions; declaring needs `configure`, else set \
             declare = false"
                .to_owned(),
        ),
        Some(PRECONDITION_FAILED) => (
            Class::Config,
            "set `exchange_type` to the type that it has, or declare = false".to_owned(),
        ),
        _ => {
            return Error::retry(format!("the channel to {name} is lost")).caused_by(cause);
        }
    };
    let text = format!("{name} refuses to work with the exchange {exchange:?}");
    Error::new(class, text).caused_by(cause).remedy(remedy)
}

fn code_of(error: &lapin::Error) -> Option<u16> {
    match error.kind() {
        ErrorKind::ProtocolError(error) => Some(error.get_id()),
        _ => None,
    }
}

fn text_of(error: &lapin::Error) -> String {
    match error.kind() {
        ErrorKind::ProtocolError(error) => error.get_message().as_str().to_owned(),
        _ => String::new(),
    }
}

/// RabbitMQ has one code for several reasons.
fn is_too_large(error: &lapin::Error) -> bool {
    let text = text_of(error);
    text.contains("message size") && last_number(&text).is_some()
}

/// The number at the end of "message size 20 is larger than configured max size 10".
pub(super) fn last_number(text: &str) -> Option<usize> {
    let digits = text.trim_end().rsplit(|c: char| !c.is_ascii_digit()).next()?;
    digits.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Secret;

    #[test]
    fn the_limit_is_read_from_the_refusal() {
        let text = "PRECONDITION_FAILED - message size 20 is larger than configured max size 16";
        assert_eq!(last_number(text), Some(16));
        assert_eq!(last_number("unknown delivery tag"), None);
        assert_eq!(last_number(""), None);
    }

    #[test]
    fn an_address_that_is_refused_is_not_shown() {
        for url in ["http://u:hunter2@host", "hunter2", "amqp://[hunter2"] {
            let options = config::Rabbitmq { url: Secret::new(url), ..options() };
            let error = Dial::new(&options).err().unwrap();
            assert_eq!(error.class(), Class::Config);
            assert!(!error.to_string().contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn no_path_and_an_empty_one_are_the_default_virtual_host() {
        for (url, vhost) in
            [("amqp://h", "/"), ("amqp://h/", "/"), ("amqp://h/%2f", "/"), ("amqp://h/a", "a")]
        {
            let options = config::Rabbitmq { url: Secret::new(url), ..options() };
            assert_eq!(Dial::new(&options).unwrap().server.uri.vhost, vhost, "{url}");
        }
    }

    fn options() -> config::Rabbitmq {
        serde_json::from_value(serde_json::json!({"url": "amqp://localhost"})).unwrap()
    }
}
