//! One connection to a NATS server that is never mended behind our back.
//!
//! The client would connect again by itself and then send what it still holds: a message that was
//! lost on the way would be overtaken by later ones. So it is given, for every connection after the
//! first, an address that nobody answers at, and one attempt: it ends, and with it everything that
//! it holds. The next [`Dial::connect`] makes a new one.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_nats::{
    Client, ConnectErrorKind, ConnectOptions, Event, ReconnectToServer, RequestErrorKind,
    ServerAddr, ServerError,
    jetstream::{
        self, ContextBuilder, ErrorCode,
        context::{GetStreamByNameErrorKind, GetStreamErrorKind, PublishError},
        stream,
    },
};
use percent_encoding::percent_decode_str;
use tokio::sync::watch;
use url::Url;

use super::{super::certificate, IN_FLIGHT_MAX, class_of, is_without_stream, subject};
use crate::{
    config::{self, Secret},
    error::{Class, Classify, Error, Result},
    format::{Names, Template},
};

/// Nobody can listen at port 0.
const NOWHERE: &str = "nats://127.0.0.1:0";

/// How to connect.
pub(super) struct Dial {
    servers: Vec<Server>,
    options: config::Nats,
    stream_subjects: Vec<String>,
    timeout: Duration,
}

struct Server {
    address: ServerAddr,
    /// Host and port, for errors.
    name: String,
    user: Option<String>,
    password: Option<Secret>,
}

/// A connection, and what its server and its stream allow.
pub(super) struct Connection {
    pub(super) client: Client,
    /// `None` for core NATS.
    pub(super) stream: Option<jetstream::Context>,
    pub(super) message_bytes_max: usize,
    name: String,
    timeout: Duration,
    denied: watch::Receiver<Option<String>>,
}

impl Dial {
    pub(super) fn new(options: &config::Nats, subject: &Template, names: &Names) -> Result<Self> {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let servers: Result<Vec<Server>> =
            options.url.expose().split(',').map(|url| Server::new(url.trim())).collect();
        let of_file = usize::from(options.credentials.is_some());
        let ways = [options.token.is_some(), options.nkey_seed.is_some()];
        let ways = ways.into_iter().filter(|given| *given).count() + of_file;
        if ways + usize::from(options.username.is_some()) > 1 {
            let text = "several of `username`, `token`, `credentials` and `nkey_seed` are set";
            return Err(Error::config(text).remedy("keep the one that the server knows"));
        }
        let mut stream_subjects = options.stream_subjects.clone();
        if stream_subjects.is_empty() {
            stream_subjects.push(subject::of_stream(subject, names));
        }
        let timeout = Duration::from_millis(options.timeout_ms);
        Ok(Self { servers: servers?, options: options.clone(), stream_subjects, timeout })
    }

    /// Connects to the first server that answers, and looks at the stream where one is named.
    pub(super) async fn connect(&self) -> Result<Connection> {
        let mut last = Error::config("`url` names no server");
        for server in &self.servers {
            match self.connect_to(server).await {
                Ok(connection) => return Ok(connection),
                Err(error) if error.class() == Class::Retry => last = error,
                Err(error) => return Err(error),
            }
        }
        Err(last)
    }

    async fn connect_to(&self, server: &Server) -> Result<Connection> {
        let (tell, denied) = watch::channel(None);
        let options = self.with_login(ConnectOptions::new(), server).await?;
        let options = without_return(options, &server.address)?
            .name("walrace")
            .connection_timeout(self.timeout)
            .request_timeout(Some(self.timeout))
            .event_callback(move |event| {
                if let Event::ServerError(ServerError::Other(text)) = event
                    && text.to_lowercase().contains("permissions violation")
                {
                    tell.send_replace(Some(text));
                }
                std::future::ready(())
            });
        let nowhere: ServerAddr = NOWHERE.parse().class(Class::Bug, || "an address of ours")?;
        let connect = options.connect(vec![server.address.clone(), nowhere]);
        let client = match tokio::time::timeout(self.timeout, connect).await {
            Ok(Ok(client)) => client,
            Ok(Err(cause)) => return Err(refused_connection(&server.name, cause)),
            Err(_) => return Err(silent(&server.name, self.timeout)),
        };
        let stream = self.options.jetstream.then(|| {
            let builder = ContextBuilder::new().timeout(self.timeout);
            builder.max_ack_inflight(IN_FLIGHT_MAX).build(client.clone())
        });
        let message_bytes_max = client.max_payload();
        let (name, timeout) = (server.name.clone(), self.timeout);
        let mut connection =
            Connection { client, stream, message_bytes_max, name, timeout, denied };
        self.look_at_stream(&mut connection).await?;
        Ok(connection)
    }

    async fn with_login(&self, options: ConnectOptions, to: &Server) -> Result<ConnectOptions> {
        let mut options = options;
        if let Some(path) = &self.options.tls_ca {
            options = options.add_root_certificates(path.clone());
        }
        if let Some(token) = &self.options.token {
            return Ok(options.token(token.expose().to_owned()));
        }
        if let Some(seed) = &self.options.nkey_seed {
            return Ok(options.nkey(seed.expose().to_owned()));
        }
        if let Some(path) = &self.options.credentials {
            return options.credentials_file(path).await.class(Class::Config, || {
                format!("cannot read the credentials in {}", path.display())
            });
        }
        let user = to.user.as_ref().or(self.options.username.as_ref());
        let password = to.password.as_ref().or(self.options.password.as_ref());
        let password = password.map(|password| password.expose().to_owned());
        Ok(match (user, password) {
            (Some(user), Some(password)) => options.user_and_password(user.clone(), password),
            // An address with a user alone has a token there.
            (Some(token), None) => options.token(token.clone()),
            (None, _) => options,
        })
    }

    async fn look_at_stream(&self, connection: &mut Connection) -> Result<()> {
        let (Some(context), Some(name)) = (&connection.stream, &self.options.stream) else {
            return Ok(());
        };
        let found = tokio::select! {
            found = context.get_stream(name) => found,
            denied = connection.denied() => return Err(denied),
        };
        let config = match found {
            Ok(stream) => stream.cached_info().config.clone(),
            Err(cause) => match cause.kind() {
                GetStreamErrorKind::JetStream(error)
                    if error.error_code() == ErrorCode::STREAM_NOT_FOUND =>
                {
                    self.create_stream(connection, context, name).await?
                }
                GetStreamErrorKind::JetStream(error) => {
                    return Err(connection.answer(&format!("of the stream {name}"), error));
                }
                GetStreamErrorKind::Request => {
                    let text = format!("{} does not answer for JetStream", connection.name);
                    let error = Error::retry(text).caused_by(cause);
                    return Err(error.remedy("start nats-server with -js if it never does"));
                }
                _ => return Err(Error::config(format!("{name:?} is no name of a stream"))),
            },
        };
        if config.no_ack {
            return Err(Error::config(format!("the stream {name} acknowledges nothing (no_ack)"))
                .remedy(format!("nats stream edit {name} --ack")));
        }
        if let Ok(max @ 1..) = usize::try_from(config.max_message_size) {
            connection.message_bytes_max = connection.message_bytes_max.min(max);
        }
        Ok(())
    }

    async fn create_stream(
        &self,
        connection: &Connection,
        context: &jetstream::Context,
        name: &str,
    ) -> Result<stream::Config> {
        let subjects = self.stream_subjects.join(",");
        if !self.options.create_stream {
            return Err(Error::config(format!("{} has no stream {name}", connection.name)).remedy(
                format!("nats stream add {name} --subjects '{subjects}' or create_stream = true"),
            ));
        }
        let config = stream::Config {
            name: name.to_owned(),
            subjects: self.stream_subjects.clone(),
            num_replicas: 1,
            ..stream::Config::default()
        };
        let created = tokio::select! {
            created = context.create_stream(config) => created,
            denied = connection.denied() => return Err(denied),
        };
        match created {
            Ok(stream) => Ok(stream.cached_info().config.clone()),
            Err(cause) => {
                use async_nats::jetstream::context::CreateStreamErrorKind as Kind;
                let class = match cause.kind() {
                    Kind::TimedOut | Kind::Response | Kind::JetStreamUnavailable => Class::Retry,
                    _ => Class::Config,
                };
                let text = format!("cannot create the stream {name} with {subjects}");
                Err(Error::new(class, text).caused_by(cause))
            }
        }
    }
}

impl Server {
    fn new(text: &str) -> Result<Self> {
        // Neither the text nor the cause is shown: both may hold a password.
        let wrong = || {
            Error::config("`url` is not an address of the form nats://host:port")
                .remedy("write it with its scheme, nats or tls; several separated by commas")
        };
        let url = Url::parse(text).map_err(|_| wrong())?;
        let host = url.host_str().filter(|host| !host.is_empty()).ok_or_else(wrong)?;
        if !matches!(url.scheme(), "nats" | "tls") {
            return Err(wrong());
        }
        let decoded = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
        let user = Some(decoded(url.username())).filter(|user| !user.is_empty());
        let password = url.password().map(|password| Secret::new(decoded(password)));
        let name = format!("{host}:{}", url.port().unwrap_or(4222));
        let address = format!("{}://{name}", url.scheme()).parse().map_err(|_| wrong())?;
        Ok(Self { address, name, user, password })
    }
}

/// After the first connection there is no other.
fn without_return(options: ConnectOptions, server: &ServerAddr) -> Result<ConnectOptions> {
    let server = server.clone();
    let nowhere: ServerAddr = NOWHERE.parse().class(Class::Bug, || "an address of ours")?;
    let connected = Arc::new(AtomicBool::new(false));
    let choose = move |_, _| {
        let again = connected.swap(true, Ordering::Relaxed);
        let addr = if again { nowhere.clone() } else { server.clone() };
        std::future::ready(Some(ReconnectToServer { addr, delay: Some(Duration::ZERO) }))
    };
    Ok(options.max_reconnects(1).ignore_discovered_servers().reconnect_to_server_callback(choose))
}

fn silent(name: &str, timeout: Duration) -> Error {
    Error::retry(format!("{name} did not answer within {} ms", timeout.as_millis()))
}

fn refused_connection(name: &str, cause: async_nats::ConnectError) -> Error {
    let login = matches!(
        cause.kind(),
        ConnectErrorKind::AuthorizationViolation | ConnectErrorKind::Authentication
    );
    if login {
        return Error::config(format!("{name} refuses the login"))
            .caused_by(cause)
            .remedy("check the user and password, token, credentials or seed of this sink");
    }
    if cause.kind() == ConnectErrorKind::Tls || certificate::is_refused(&cause) {
        return Error::config(format!("no TLS with {name}")).caused_by(cause).remedy(
            "set `tls_ca` to the certificate that signed the server's, and use its host name",
        );
    }
    Error::retry(format!("cannot reach {name}")).caused_by(cause)
}

impl Connection {
    pub(super) fn timeout(&self) -> Duration {
        self.timeout
    }

    pub(super) fn silent(&self, timeout: Duration) -> Error {
        silent(&self.name, timeout)
    }

    pub(super) fn lost(&self, what: &str) -> Error {
        Error::retry(format!("the connection to {} is lost: {what}", self.name))
    }

    /// Waits until the server says that something is not permitted; it answers nothing else then.
    pub(super) async fn denied(&self) -> Error {
        let mut denied = self.denied.clone();
        let text = denied.wait_for(Option::is_some).await.ok().and_then(|text| text.clone());
        // Without a text the client has ended, and whoever waits for its answer hears of that.
        let Some(text) = text else { return std::future::pending().await };
        Error::config(format!("{} does not permit this login: {text}", self.name)).remedy(
            "permit it to publish on the subjects of this sink, and to subscribe to _INBOX.>",
        )
    }

    /// Comes back once the server has read what was sent before: it answers that nobody listens.
    pub(super) async fn round_trip(&self) -> Result<()> {
        let nobody = self.client.new_inbox();
        let answer = tokio::select! {
            answer = self.client.request(nobody, bytes::Bytes::new()) => answer,
            denied = self.denied() => return Err(denied),
        };
        match answer {
            Ok(_) => Ok(()),
            Err(cause) if cause.kind() == RequestErrorKind::NoResponders => Ok(()),
            Err(cause) => Err(self.lost("no answer after a batch").caused_by(cause)),
        }
    }

    /// What it means that a stream did not take a message.
    pub(super) async fn refusal(&self, subject: &str, cause: PublishError) -> Error {
        if is_without_stream(cause.kind()) {
            return self.without_stream(subject).await;
        }
        let source = std::error::Error::source(&cause);
        match source.and_then(|source| source.downcast_ref::<jetstream::Error>()) {
            Some(error) => self.answer(&format!("on {subject}"), error.clone()),
            None => Error::retry(format!("{} did not acknowledge a message", self.name))
                .caused_by(cause),
        }
    }

    /// Nobody answered on the subject: it has no stream, or its stream has no leader now.
    async fn without_stream(&self, subject: &str) -> Error {
        let Some(context) = &self.stream else { return Error::bug("core NATS has no streams") };
        let found = tokio::select! {
            found = context.stream_by_subject(subject) => found,
            denied = self.denied() => return denied,
        };
        let cause = match found {
            Ok(name) => {
                let text = format!("the stream {name} of {} does not answer now", self.name);
                return Error::retry(text);
            }
            Err(cause) => cause,
        };
        if cause.kind() == GetStreamByNameErrorKind::NotFound {
            return Error::config(format!(
                "{} has no stream with the subject {subject}",
                self.name
            ))
            .remedy(format!(
                "nats stream add NAME --subjects '{subject}', or set `stream` and \
                     `create_stream`, or `jetstream = false`"
            ));
        }
        Error::retry(format!("{} does not answer for JetStream", self.name))
            .caused_by(cause)
            .remedy("start nats-server with -js if it never does")
    }

    fn answer(&self, what: &str, error: jetstream::Error) -> Error {
        let class = class_of(error.error_code());
        let text = format!("JetStream of {} refuses, {what}", self.name);
        let error = Error::new(class, text).caused_by(error);
        match class {
            Class::Retry => error.remedy("look at the limits of the stream: nats stream info"),
            _ => error,
        }
    }
}
