//! The start of a session: settings and authentication
//! (<https://www.postgresql.org/docs/current/protocol-flow.html#PROTOCOL-FLOW-START-UP>).

use bytes::BytesMut;
use postgres_protocol::{
    authentication::{
        md5_hash,
        sasl::{ChannelBinding, SCRAM_SHA_256, SCRAM_SHA_256_PLUS, ScramSha256},
    },
    message::frontend,
};

use super::{
    failure::{Failure, ServerError},
    tls,
    url::Target,
    wire::{Client, Purpose, unexpected},
};
use crate::error::Error;

/// What makes PostgreSQL's text of a value the same on every server: none of it may depend on the
/// settings of the database or the role.
const SETTINGS: [(&str, &str); 8] = [
    ("client_encoding", "UTF8"),
    ("DateStyle", "ISO"),
    ("IntervalStyle", "postgres"),
    ("TimeZone", "UTC"),
    ("extra_float_digits", "3"),
    ("bytea_output", "hex"),
    ("search_path", "pg_catalog"),
    ("statement_timeout", "0"),
];

/// Sends the startup message, authenticates, and waits until the server is ready.
pub(super) fn start(client: &mut Client, target: &Target, purpose: Purpose) -> Result<(), Failure> {
    let mut parameters = vec![
        ("user", target.user.as_str()),
        ("database", target.database.as_str()),
        ("application_name", target.application_name.as_str()),
    ];
    parameters.extend(SETTINGS);
    if purpose == Purpose::Replication {
        parameters.push(("replication", "database"));
    }
    let mut out = BytesMut::new();
    frontend::startup_message(parameters, &mut out)?;
    client.send(&out)?;
    loop {
        let (tag, body) = client.receive()?;
        match tag {
            b'R' => authenticate(client, target, &body)?,
            b'K' | b'v' => {}
            b'Z' => return Ok(()),
            b'E' => return Err(Failure::Server(ServerError::parse(&body))),
            other => return Err(unexpected(other).into()),
        }
    }
}

fn authenticate(client: &mut Client, target: &Target, body: &[u8]) -> Result<(), Failure> {
    let (code, rest) = body.split_first_chunk::<4>().ok_or_else(|| unexpected(b'R'))?;
    match u32::from_be_bytes(*code) {
        0 => Ok(()),
        3 => answer(client, password(target)?.as_bytes()),
        5 => {
            let salt = *rest.first_chunk::<4>().ok_or_else(|| unexpected(b'R'))?;
            let hash = md5_hash(target.user.as_bytes(), password(target)?.as_bytes(), salt);
            answer(client, hash.as_bytes())
        }
        10 => scram(client, target, rest),
        other => Err(Error::config(format!(
            "the server asks for authentication method {other}, which Walrace does not have"
        ))
        .remedy("use scram-sha-256, md5, password, cert or trust for this user in pg_hba.conf")
        .into()),
    }
}

fn password(target: &Target) -> Result<&str, Failure> {
    target.password.as_ref().map(|secret| secret.expose()).ok_or_else(|| {
        Error::config(format!("the server asks for the password of `{}`", target.user))
            .remedy("write it into the source's url, or set PGPASSWORD")
            .into()
    })
}

fn answer(client: &mut Client, secret: &[u8]) -> Result<(), Failure> {
    let mut out = BytesMut::new();
    frontend::password_message(secret, &mut out)?;
    Ok(client.send(&out)?)
}

/// SCRAM-SHA-256, bound to the TLS channel where the server offers it (RFC 5802, RFC 7677).
fn scram(client: &mut Client, target: &Target, offered: &[u8]) -> Result<(), Failure> {
    let offers = |name: &str| offered.split(|byte| *byte == 0).any(|o| o == name.as_bytes());
    let bound = match client.server_certificate() {
        Some(certificate) if offers(SCRAM_SHA_256_PLUS) => tls::end_point(&certificate),
        _ => None,
    };
    let (mechanism, binding) = match bound {
        Some(hash) => (SCRAM_SHA_256_PLUS, ChannelBinding::tls_server_end_point(hash)),
        None if offers(SCRAM_SHA_256) && client.is_encrypted() && !offers(SCRAM_SHA_256_PLUS) => {
            (SCRAM_SHA_256, ChannelBinding::unrequested())
        }
        None if offers(SCRAM_SHA_256) => (SCRAM_SHA_256, ChannelBinding::unsupported()),
        None => return Err(Error::config("the server offers no SCRAM-SHA-256").into()),
    };
    let mut exchange = ScramSha256::new(password(target)?.as_bytes(), binding);
    let mut out = BytesMut::new();
    frontend::sasl_initial_response(mechanism, exchange.message(), &mut out)?;
    client.send(&out)?;
    exchange.update(&challenge(client, 11)?)?;
    out.clear();
    frontend::sasl_response(exchange.message(), &mut out)?;
    client.send(&out)?;
    let proof = challenge(client, 12)?;
    exchange.finish(&proof).map_err(|error| {
        Error::config("the server does not know the password that it asked for").caused_by(error)
    })?;
    Ok(())
}

fn challenge(client: &mut Client, expected: u32) -> Result<Vec<u8>, Failure> {
    match client.receive()? {
        (b'R', body) => match body.split_first_chunk::<4>() {
            Some((code, rest)) if u32::from_be_bytes(*code) == expected => Ok(rest.to_vec()),
            _ => Err(unexpected(b'R').into()),
        },
        (b'E', body) => Err(Failure::Server(ServerError::parse(&body))),
        (other, _) => Err(unexpected(other).into()),
    }
}
