//! What a server answers when it refuses, and what the runtime does about it.

use std::{fmt, io};

use crate::error::{Class, Error};

/// An `ErrorResponse` (<https://www.postgresql.org/docs/current/protocol-error-fields.html>).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ServerError {
    pub(super) code: String,
    pub(super) message: String,
    pub(super) detail: Option<String>,
    pub(super) hint: Option<String>,
    /// The function of the server that said it: the same in every language.
    pub(super) routine: String,
}

impl ServerError {
    /// Reads the fields of an `ErrorResponse`.
    pub(super) fn parse(mut body: &[u8]) -> Self {
        let mut error = Self::default();
        while let Some((kind, rest)) = body.split_first() {
            let end = memchr::memchr(0, rest).unwrap_or(rest.len());
            let (text, rest) = rest.split_at(end);
            let text = String::from_utf8_lossy(text).into_owned();
            match kind {
                b'C' => error.code = text,
                b'M' => error.message = text,
                b'D' => error.detail = Some(text),
                b'H' => error.hint = Some(text),
                b'R' => error.routine = text,
                _ => {}
            }
            body = rest.get(1..).unwrap_or_default();
        }
        error
    }

    fn class(&self) -> Class {
        match self.code.as_str() {
            // too many connections, disk full, out of memory: these pass
            "53300" | "53100" | "53200" | "53000" => Class::Retry,
            // all slots in use
            "53400" => Class::Config,
            // a name is in use by a process that may end; the object is being shut down
            "55006" | "55P03" => Class::Retry,
            // a WAL file that was removed does not come back
            "58P01" => Class::Config,
            code => match code.get(..2).unwrap_or_default() {
                "28" | "42" | "3D" | "3F" | "0A" | "22" | "55" => Class::Config,
                _ => Class::Retry,
            },
        }
    }

    fn remedy(&self) -> Option<&'static str> {
        Some(match self.code.as_str() {
            "28P01" => "correct the user or the password in the source's url",
            "28000" => {
                "let pg_hba.conf admit this user to this database, and give the role LOGIN and \
                 REPLICATION: ALTER ROLE <user> LOGIN REPLICATION"
            }
            "42501" => {
                "the role needs REPLICATION (ALTER ROLE <user> REPLICATION), CREATE on the \
                 database and to own the published tables; or let their owner create the \
                 publication; `walrace check` prints the SQL"
            }
            "3D000" => "correct the database in the source's url, or create it",
            "53400" => {
                "raise max_replication_slots (ALTER SYSTEM SET max_replication_slots = 20; then \
                 restart the server), or drop a slot that nobody uses"
            }
            "42704" => {
                "a publication that is named was not there yet when this part of the log was \
                 written, or was dropped; `walrace source create <name> --accept-gap` goes on and \
                 records the gap"
            }
            "55000" if self.message.contains("wal_level") => {
                "ALTER SYSTEM SET wal_level = logical; then restart the server"
            }
            "55000" | "58P01" => {
                "the server no longer has the log that the slot needs; \
                 `walrace source create <name> --accept-gap` goes on from now and records the gap"
            }
            _ => return None,
        })
    }
}

impl fmt::Display for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} [{}]", self.message, self.code)?;
        if let Some(detail) = &self.detail {
            write!(f, ": {detail}")?;
        }
        match &self.hint {
            Some(hint) => write!(f, "; {hint}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for ServerError {}

/// Why a statement did not succeed: the server refused it, or something else went wrong.
#[derive(Debug)]
pub(super) enum Failure {
    Server(ServerError),
    /// The TLS handshake.
    Tls(io::Error),
    Other(Error),
}

impl Failure {
    /// The SQLSTATE, where the server answered.
    pub(super) fn code(&self) -> &str {
        match self {
            Failure::Server(error) => &error.code,
            Failure::Tls(_) | Failure::Other(_) => "",
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Other(error)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Failure::Other(broken(error))
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Other(error) => error,
            Failure::Tls(error) => broken(error).context("while agreeing on TLS"),
            Failure::Server(server) => {
                let error = Error::new(server.class(), format!("PostgreSQL says: {server}"));
                match server.remedy() {
                    Some(remedy) => error.remedy(remedy),
                    None => error,
                }
            }
        }
    }
}

/// What the server says beside the stream. From version 18 on it warns, and sends nothing of a
/// publication that is not there, where older ones refuse to go on.
pub(super) fn notice(body: &[u8]) -> Result<(), Error> {
    let notice = ServerError::parse(body);
    if notice.routine != "LoadPublications" {
        tracing::debug!("PostgreSQL says: {notice}");
        return Ok(());
    }
    Err(Error::config(format!("PostgreSQL does not send what is committed: {notice}")).remedy(
        "the publication was dropped, or was not there yet when this part of the log was written; \
         `walrace source create <name> --accept-gap` goes on and records the gap",
    ))
}

/// A connection that broke.
pub(super) fn broken(error: io::Error) -> Error {
    let message = match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => "the server did not answer in time",
        io::ErrorKind::UnexpectedEof => "the server closed the connection",
        _ => "the connection to the server broke",
    };
    // A certificate that is not accepted does not heal with time.
    let foreign = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match foreign {
        Some(rustls::Error::InvalidCertificate(_)) => {
            Error::config("the server's certificate is not accepted").caused_by(error).remedy(
                "set sslrootcert to the authority that signed it, use a host name that it is \
                 for, or choose a weaker sslmode",
            )
        }
        _ => Error::retry(message).caused_by(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn class(code: &str) -> Class {
        let body = format!("SERROR\0C{code}\0Mno\0Dbecause\0Htry\0\0");
        let error = ServerError::parse(body.as_bytes());
        assert_eq!(error.to_string(), format!("no [{code}]: because; try"));
        Error::from(Failure::Server(error)).class()
    }

    #[test]
    fn what_a_person_must_mend_is_config_and_what_passes_is_retry() {
        for code in ["28P01", "28000", "42501", "3D000", "53400", "42704", "55000", "58P01"] {
            assert_eq!(class(code), Class::Config, "{code}");
        }
        for code in ["57P01", "57P03", "53300", "55006", "40001", "08006", "XX000", "53100"] {
            assert_eq!(class(code), Class::Retry, "{code}");
        }
    }
}
