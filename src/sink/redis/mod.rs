//! Redis and its kin (Valkey, KeyDB): the server that its sinks write to, each in its own way.

use std::{path::PathBuf, time::Duration};

use ::redis::{
    AsyncConnectionConfig, Client, Cmd, ConnectionAddr, ConnectionInfo, ErrorKind, FromRedisValue,
    IntoConnectionInfo, Pipeline, RedisConnectionInfo, RedisResult, Script, ServerErrorKind,
    TlsCertificates, aio::MultiplexedConnection, cmd,
};

use crate::{
    config::Secret,
    error::{Class, Classify, Error, Result},
};

mod append;
mod entry;
mod once;
mod pubsub;
mod reply;
mod strings;
#[cfg(test)]
mod tests;

pub(super) use self::{append::*, pubsub::Pubsub, strings::Strings};

/// Redis takes no longer value (`proto-max-bulk-len`, as it is by default).
const VALUE_BYTES_MAX: usize = 512 << 20;

/// Where a sink's Redis is, and the connection to it.
struct Server {
    address: ConnectionInfo,
    login: Login,
    tls_ca: Option<PathBuf>,
    timeout: Duration,
    /// What errors show of the address.
    name: String,
    /// Taken out for each request: after one that failed or was cancelled nobody knows what will
    /// still be answered.
    connection: Option<MultiplexedConnection>,
    /// The last connection, as the server names it.
    last: Option<Peer>,
}

/// What is said first on each connection.
struct Login {
    user: Option<String>,
    password: Option<Secret>,
    db: i64,
}

/// A connection from the server's side.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Peer {
    id: String,
    address: String,
}

impl Server {
    /// Checks the address; connects to nothing.
    fn new(url: &Secret, tls_ca: Option<&PathBuf>, timeout_ms: u64) -> Result<Self> {
        // Fails where a provider is installed already, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        // Neither the text nor the cause is shown: both may hold a password.
        let info = url.expose().into_connection_info().map_err(|_| not_an_address())?;
        let (host, port, tls) = match info.addr() {
            ConnectionAddr::Tcp(host, port) => (host, port, false),
            ConnectionAddr::TcpTls { host, port, insecure: false, .. } => (host, port, true),
            _ => return Err(not_an_address()),
        };
        if tls_ca.is_some() && !tls {
            return Err(Error::config("`tls_ca` is set, and `url` is not one of TLS")
                .remedy("begin `url` with rediss://"));
        }
        let settings = info.redis_settings();
        let login = Login {
            user: settings.username().map(str::to_owned),
            password: settings.password().map(Secret::new),
            db: settings.db(),
        };
        let bare = RedisConnectionInfo::default().set_skip_set_lib_name();
        Ok(Self {
            name: format!("redis at {host}:{port}"),
            login,
            address: info.clone().set_redis_settings(bare),
            tls_ca: tls_ca.cloned(),
            timeout: Duration::from_millis(timeout_ms),
            connection: None,
            last: None,
        })
    }

    /// Host and port.
    fn name(&self) -> &str {
        &self.name
    }

    /// Connects, and has the server forget the connection before: what it has not executed of that
    /// must not come after what follows.
    async fn open(&mut self) -> Result<()> {
        self.connection = None;
        let mut connection = self.connect().await?;
        let peer = self.within(async {
            if let Some(Peer { id, address }) = &self.last {
                let mut kill = cmd("CLIENT");
                kill.arg("KILL").arg("ID").arg(id).arg("ADDR").arg(address);
                // It is gone already, or this user may not; then order stands on TCP alone.
                let _: RedisResult<i64> = kill.query_async(&mut connection).await;
            }
            let known: RedisResult<String> =
                cmd("CLIENT").arg("INFO").query_async(&mut connection).await;
            Ok(known.ok().as_deref().and_then(Peer::parse))
        });
        self.last = peer.await?.or(self.last.take());
        self.connection = Some(connection);
        Ok(())
    }

    /// A further connection, which the caller keeps.
    async fn connect(&self) -> Result<MultiplexedConnection> {
        let client = self.client()?;
        let limits =
            AsyncConnectionConfig::new().set_connection_timeout(None).set_response_timeout(None);
        self.within(async {
            let mut connection =
                client.get_multiplexed_async_connection_with_config(&limits).await?;
            self.log_in(&mut connection).await?;
            Ok(connection)
        })
        .await
    }

    fn client(&self) -> Result<Client> {
        let Some(path) = &self.tls_ca else {
            return Client::open(self.address.clone()).map_err(|error| self.error(error));
        };
        let unusable = || format!("`tls_ca` {} cannot be used", path.display());
        let root = std::fs::read(path).class(Class::Config, unusable)?;
        let certificates = TlsCertificates { client_tls: None, root_cert: Some(root) };
        Client::build_with_tls(self.address.clone(), certificates).class(Class::Config, unusable)
    }

    async fn log_in(&self, connection: &mut MultiplexedConnection) -> RedisResult<()> {
        let Login { user, password, db } = &self.login;
        if let Some(password) = password {
            let mut auth = cmd("AUTH");
            auth.arg(user.as_deref()).arg(password.expose());
            auth.exec_async(connection).await?;
        }
        if *db != 0 {
            cmd("SELECT").arg(*db).exec_async(connection).await?;
        }
        Ok(())
    }

    /// One request and its answer.
    async fn ask<T: FromRedisValue>(&mut self, command: &Cmd) -> Result<T> {
        let mut connection = self.taken()?;
        let answer = self.within(command.query_async(&mut connection)).await?;
        self.connection = Some(connection);
        Ok(answer)
    }

    /// Several requests at once, answered in their order; an error of any of them is one of all.
    async fn ask_all(&mut self, commands: &Pipeline) -> Result<()> {
        if commands.is_empty() {
            return Ok(());
        }
        let mut connection = self.taken()?;
        self.within(commands.exec_async(&mut connection)).await?;
        self.connection = Some(connection);
        Ok(())
    }

    /// An EVALSHA of `script`, which the server may have forgotten.
    async fn evaluate<T: FromRedisValue>(&mut self, script: &Script, command: &Cmd) -> Result<T> {
        let mut connection = self.taken()?;
        let forgotten = ErrorKind::Server(ServerErrorKind::NoScript);
        let answer = self.within(async {
            match command.query_async(&mut connection).await {
                Err(error) if error.kind() == forgotten => {
                    script.load_async(&mut connection).await?;
                    command.query_async(&mut connection).await
                }
                answer => answer,
            }
        });
        let answer = answer.await?;
        self.connection = Some(connection);
        Ok(answer)
    }

    fn close(&mut self) {
        self.connection = None;
    }

    fn taken(&mut self) -> Result<MultiplexedConnection> {
        let missing = || Error::retry(format!("the connection to {} is gone", self.name));
        self.connection.take().ok_or_else(missing)
    }

    async fn within<T>(&self, work: impl Future<Output = RedisResult<T>>) -> Result<T> {
        match tokio::time::timeout(self.timeout, work).await {
            Ok(outcome) => outcome.map_err(|error| self.error(error)),
            Err(_) => {
                let (name, timeout_ms) = (&self.name, self.timeout.as_millis());
                Err(Error::retry(format!("{name} did not answer within {timeout_ms} ms")))
            }
        }
    }

    fn error(&self, cause: ::redis::RedisError) -> Error {
        reply::error(&self.name, cause)
    }
}

impl Peer {
    /// Out of a line of CLIENT INFO: `id=7 addr=127.0.0.1:40312 laddr=… …`.
    fn parse(line: &str) -> Option<Self> {
        let field = |name| line.split_whitespace().find_map(|word| word.strip_prefix(name));
        Some(Self { id: field("id=")?.to_owned(), address: field("addr=")?.to_owned() })
    }
}

fn not_an_address() -> Error {
    Error::config("`url` is not an address of the form redis://user:password@host:6379/0")
        .remedy("write it with its scheme, redis or rediss (TLS); escape marks such as @ as %40")
}

/// Refuses what the server could not take.
fn check_size(what: &str, bytes: usize, bytes_max: usize) -> Result<()> {
    if bytes <= bytes_max {
        return Ok(());
    }
    Err(Error::data(format!("{what} of {bytes} bytes is larger than {bytes_max}")))
}
