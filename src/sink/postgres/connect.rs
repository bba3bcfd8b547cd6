//! The connection to the target: its URL, TLS and the settings of the session.

use std::{sync::Arc, time::Duration};

use percent_encoding::percent_decode_str;
use tokio::{task::JoinSet, time::timeout};
use tokio_postgres::{Client, Config, config::SslMode};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::failure;
use crate::{
    config,
    error::{Error, Result},
    tls::{Mode, Options},
};

/// Where and as whom to connect.
pub(super) struct Target {
    config: Config,
    tls: Options,
    /// Host, port and database, for messages.
    pub(super) address: String,
    /// What bounds the connect, each statement and each lock.
    pub(super) limit: Duration,
}

/// A connection; what was not committed in it is undone when it is dropped.
pub(super) struct Connection {
    pub(super) client: Arc<Client>,
    _task: JoinSet<()>,
}

impl Target {
    /// Reads the URL; no error repeats any part that may hold the password.
    pub(super) fn new(options: &config::PostgresTarget) -> Result<Self> {
        let text = options.url.expose();
        if !text.starts_with("postgres://") && !text.starts_with("postgresql://") {
            return Err(malformed("it does not begin with postgres://"));
        }
        let (base, query) = text.split_once('?').unwrap_or((text, ""));
        let mut tls = Options { roots: options.tls_ca.clone(), ..Options::default() };
        let mut kept = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let value = percent_decode_str(value).decode_utf8();
            let value = value.map_err(|_| malformed("an option is not UTF-8"))?;
            if !tls.set(name, &value)? {
                kept.push(pair);
            }
        }
        // The parser's own error may repeat what it could not read, such as half of a password.
        let mut config: Config = format!("{base}?{}", kept.join("&"))
            .parse()
            .map_err(|_| malformed("an option is unknown or has a wrong value"))?;
        config.ssl_mode(negotiation(tls.mode));
        if config.get_user().is_none_or(str::is_empty) {
            return Err(malformed("it names no user"));
        }
        if config.get_application_name().is_none() {
            config.application_name("walrace");
        }
        let limit = Duration::from_millis(options.timeout_ms);
        config.connect_timeout(limit.min(config.get_connect_timeout().copied().unwrap_or(limit)));
        config.keepalives_idle(Duration::from_secs(30));
        Ok(Self { address: address(&config), config, tls, limit })
    }

    /// A new connection, with the settings under which texts are read as the source wrote them. A
    /// machine that dies within a transaction holds its locks no longer than the keepalives last.
    pub(super) async fn connect(&self) -> Result<Connection> {
        let opened = timeout(self.limit, self.try_connect()).await;
        opened.unwrap_or_else(|_| {
            let ms = self.limit.as_millis();
            Err(Error::retry(format!("PostgreSQL at {} does not answer in {ms} ms", self.address)))
        })
    }

    async fn try_connect(&self) -> Result<Connection> {
        let tls = MakeRustlsConnect::new(self.tls.configure()?);
        let failed =
            |error| failure::of(&error).context(format!("while connecting to {}", self.address));
        let (client, connection) = self.config.connect(tls).await.map_err(failed)?;
        let mut task = JoinSet::new();
        task.spawn(async {
            let _ = connection.await; // whoever uses the client hears what went wrong
        });
        let ms = self.limit.as_millis();
        let settings = format!(
            "set lock_timeout = {ms}; set statement_timeout = {ms}; set datestyle = 'ISO, YMD'; \
             set intervalstyle = 'postgres'; set xmloption = 'content'; \
             set standard_conforming_strings = on; \
             set idle_in_transaction_session_timeout = '10min'; set tcp_keepalives_idle = 30; \
             set tcp_keepalives_interval = 10; set tcp_keepalives_count = 3"
        );
        client.batch_execute(&settings).await.map_err(failed)?;
        Ok(Connection { client: Arc::new(client), _task: task })
    }
}

/// The verification is ours.
fn negotiation(mode: Mode) -> SslMode {
    match mode {
        Mode::Disable => SslMode::Disable,
        Mode::Prefer => SslMode::Prefer,
        Mode::Require | Mode::VerifyCa | Mode::VerifyFull => SslMode::Require,
    }
}

fn address(config: &Config) -> String {
    use tokio_postgres::config::Host;
    let host = match config.get_hosts().first() {
        Some(Host::Tcp(name)) => name.clone(),
        Some(Host::Unix(path)) => path.display().to_string(),
        None => "localhost".to_owned(),
    };
    let port = config.get_ports().first().copied().unwrap_or(5432);
    match config.get_dbname() {
        Some(database) => format!("{host}:{port}/{database}"),
        None => format!("{host}:{port}"),
    }
}

fn malformed(what: &str) -> Error {
    Error::config(format!("the url of the postgres sink is malformed: {what}")).remedy(
        "postgres://user:password@host:port/database?sslmode=verify-full; percent-encode the \
         signs :/?#[]@% in a password",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{PostgresTarget, Secret};

    fn read(url: &str) -> Result<Target> {
        Target::new(&PostgresTarget::to(Secret::new(url)))
    }

    #[test]
    fn a_url_gives_its_address_and_the_mode_of_tls() {
        let target =
            read("postgres://a%40b:p%2Fw@db.example:6000/app?sslmode=verify-full").unwrap();
        assert_eq!(target.address, "db.example:6000/app");
        assert_eq!(target.tls.mode, Mode::VerifyFull);
        assert_eq!(target.config.get_user(), Some("a@b"));
        let socket = read("postgres://u@/d?host=/run/pg&port=5433").unwrap();
        assert_eq!(socket.address, "/run/pg:5433/d");
    }

    #[test]
    fn no_error_shows_the_password() {
        for text in [
            "postgres://u:hunter2@h:port/d",
            "postgres://u:hunter2@h/d?sslmode=often",
            "postgres://u:hunter2@h/d?colour=hunter2",
            "mysql://u:hunter2@h/d",
            "postgres://:hunter2@h/d",
        ] {
            let error = read(text).err().expect("a refusal").to_string();
            assert!(!error.contains("hunter2"), "{error}");
        }
    }
}
