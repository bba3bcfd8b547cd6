//! The connection URL of a PostgreSQL source
//! (<https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNSTRING-URIS>).

use std::{path::PathBuf, time::Duration};

use percent_encoding::percent_decode_str;

use crate::{
    config::Secret,
    error::{Error, Result},
    tls,
};

/// Where and as whom to connect.
#[derive(Clone, Debug)]
pub(super) struct Target {
    pub(super) host: Host,
    pub(super) port: u16,
    pub(super) user: String,
    pub(super) password: Option<Secret>,
    pub(super) database: String,
    pub(super) tls: tls::Options,
    pub(super) application_name: String,
    pub(super) connect_timeout: Duration,
}

/// A name or address on the network, or the directory of a unix socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Host {
    Tcp(String),
    Unix(PathBuf),
}

const PORT: u16 = 5432;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

impl Target {
    /// Parses a URL; no error repeats any part that may hold the password.
    pub(super) fn parse(url: &Secret) -> Result<Self> {
        let text = url.expose();
        let rest = text
            .strip_prefix("postgres://")
            .or_else(|| text.strip_prefix("postgresql://"))
            .ok_or_else(|| malformed("it does not begin with postgres://"))?;
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, database) = rest.split_once('/').unwrap_or((rest, ""));
        let (login, address) = authority.rsplit_once('@').unwrap_or(("", authority));
        let (user, password) = match login.split_once(':') {
            Some((user, password)) => (decode(user)?, Some(Secret::new(decode(password)?))),
            None => (decode(login)?, None),
        };
        let (host, port) = parse_address(address)?;
        let mut target = Self {
            host: Host::Tcp(if host.is_empty() { "localhost".into() } else { host }),
            port,
            user,
            password,
            database: decode(database)?,
            tls: tls::Options::default(),
            application_name: "walrace".into(),
            connect_timeout: CONNECT_TIMEOUT,
        };
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            target.set(name, decode(value)?)?;
        }
        target.finish()
    }

    fn set(&mut self, name: &str, value: String) -> Result<()> {
        if self.tls.set(name, &value)? {
            return Ok(());
        }
        match name {
            "host" => self.host = host(value),
            "port" => self.port = parse_port(&value)?,
            "user" => self.user = value,
            "password" => self.password = Some(Secret::new(value)),
            "dbname" => self.database = value,
            "application_name" => self.application_name = value,
            "connect_timeout" => {
                let seconds = value.parse::<u64>().map_err(|_| malformed("connect_timeout"))?;
                self.connect_timeout = match seconds {
                    0 => CONNECT_TIMEOUT,
                    _ => Duration::from_secs(seconds),
                };
            }
            other => {
                let message = format!("the source's url has the unknown option `{other}`");
                return Err(Error::config(message).remedy(
                    "known are host, port, user, password, dbname, sslmode, sslrootcert, sslcert, \
                     sslkey, application_name and connect_timeout",
                ));
            }
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Self> {
        if let Host::Tcp(name) = &self.host
            && name.starts_with('/')
        {
            self.host = Host::Unix(name.into());
        }
        if self.user.is_empty() {
            return Err(malformed("it names no user"));
        }
        if self.database.is_empty() {
            self.database.clone_from(&self.user);
        }
        if self.password.is_none() {
            self.password = std::env::var("PGPASSWORD").ok().map(Secret::new);
        }
        if self.tls.certificate.is_some() != self.tls.key.is_some() {
            return Err(malformed("sslcert and sslkey go together"));
        }
        Ok(self)
    }

    /// Where it leads, without the login: for messages.
    pub(super) fn address(&self) -> String {
        match &self.host {
            Host::Tcp(host) => format!("{host}:{}", self.port),
            Host::Unix(directory) => {
                directory.join(format!(".s.PGSQL.{}", self.port)).display().to_string()
            }
        }
    }
}

fn host(value: String) -> Host {
    if value.starts_with('/') { Host::Unix(value.into()) } else { Host::Tcp(value) }
}

fn parse_address(address: &str) -> Result<(String, u16)> {
    if address.contains(',') {
        return Err(malformed("it names several hosts; name one"));
    }
    if let Some(rest) = address.strip_prefix('[') {
        let (host, rest) = rest.split_once(']').ok_or_else(|| malformed("an address lacks `]`"))?;
        let port = rest.strip_prefix(':').map_or(Ok(PORT), parse_port)?;
        return Ok((host.to_owned(), port));
    }
    match address.rsplit_once(':') {
        Some((host, "")) => Ok((decode(host)?, PORT)),
        Some((host, port)) => Ok((decode(host)?, parse_port(port)?)),
        None => Ok((decode(address)?, PORT)),
    }
}

fn parse_port(text: &str) -> Result<u16> {
    text.parse().map_err(|_| malformed("its port is not a number below 65536"))
}

fn decode(text: &str) -> Result<String> {
    let decoded = percent_decode_str(text).decode_utf8();
    decoded.map(Into::into).map_err(|_| malformed("a part of it is not UTF-8"))
}

fn malformed(what: &str) -> Error {
    Error::config(format!("the source's url is malformed: {what}")).remedy(
        "postgres://user:password@host:port/database?sslmode=verify-full; percent-encode the \
         signs :/?#[]@% in a password",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Target> {
        Target::parse(&Secret::new(text))
    }

    #[test]
    fn a_url_is_taken_apart_and_its_escapes_decoded() {
        let target =
            parse("postgres://a%40b:p%2Fw%3A@db.example:6000/my%20db?sslmode=verify-full").unwrap();
        assert_eq!(target.user, "a@b");
        assert_eq!(target.password.as_ref().unwrap().expose(), "p/w:");
        assert_eq!(target.host, Host::Tcp("db.example".into()));
        assert_eq!((target.port, target.database.as_str()), (6000, "my db"));
        assert_eq!(target.tls.mode, tls::Mode::VerifyFull);
    }

    #[test]
    fn a_directory_as_host_is_a_unix_socket() {
        let target = parse("postgresql://u@/d?host=/run/pg&port=5433").unwrap();
        assert_eq!(target.host, Host::Unix("/run/pg".into()));
        assert_eq!(target.address(), "/run/pg/.s.PGSQL.5433");
        assert_eq!(parse("postgres://u@%2Frun%2Fpg/d").unwrap().host, Host::Unix("/run/pg".into()));
    }

    #[test]
    fn an_address_of_version_6_keeps_its_colons() {
        let target = parse("postgres://u@[::1]:6000/d").unwrap();
        assert_eq!((target.host, target.port), (Host::Tcp("::1".into()), 6000));
    }

    #[test]
    fn no_error_shows_the_password() {
        for text in [
            "postgres://u:hunter2@h:port/d",
            "postgres://u:hunter2@h/d?sslmode=often",
            "postgres://u:hunter2@h/d?colour=red",
            "mysql://u:hunter2@h/d",
            "postgres://:hunter2@h/d",
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(!error.contains("hunter2"), "{error}");
        }
        assert!(!format!("{:?}", parse("postgres://u:hunter2@h/d").unwrap()).contains("hunter2"));
    }
}
