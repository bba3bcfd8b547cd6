//! What a failure of the target means, by its SQLSTATE
//! (<https://www.postgresql.org/docs/current/errcodes-appendix.html>).

use tokio_postgres::error::DbError;

use crate::error::{Class, Error};

/// The failure as an error whose class decides; `Data` is a refusal of what was written.
pub(super) fn of(error: &tokio_postgres::Error) -> Error {
    match error.as_db_error() {
        Some(reply) => of_reply(reply),
        None => of_connection(error),
    }
}

fn of_reply(reply: &DbError) -> Error {
    let code = reply.code().code();
    let mut message = format!("PostgreSQL says {}: {}", code, reply.message());
    // The detail of a check prints the whole row, which is nobody's business in a log.
    if let Some(detail) = reply.detail().filter(|detail| !detail.starts_with("Failing row")) {
        message.push_str(&format!(": {detail}"));
    }
    let error = Error::new(class_of(code), message);
    match remedy(code) {
        Some(remedy) => error.remedy(remedy),
        None => error,
    }
}

fn class_of(code: &str) -> Class {
    match code {
        // The value's type has no cast to the column's.
        "42804" => Class::Data,
        "25P02" => Class::Bug,
        _ => match code.get(..2).unwrap_or_default() {
            // A value, an integrity rule, a statement that meets a row twice, a view's check, a
            // trigger's own refusal, a value larger than an index takes.
            "22" | "23" | "21" | "44" | "P0" | "54" => Class::Data,
            "28" | "42" | "3D" | "3F" | "0A" | "0L" | "0P" => Class::Config,
            _ => Class::Retry,
        },
    }
}

fn remedy(code: &str) -> Option<&'static str> {
    Some(match code {
        "42501" => {
            "grant the sink's user insert, update, delete, truncate and select on the target's \
             tables, and create on its database for the progress table"
        }
        "0A000" => {
            "of a truncate: drop the foreign keys of tables that are not truncated too, or set \
             on_truncate = \"ignore\""
        }
        "3D000" => "create the database, or name another in the sink's url",
        "42P01" => "create the table, or set missing_table = \"create\"",
        "42703" => "add the column, or set missing_columns",
        "53100" => "free space on the target's disk",
        "53300" => "raise max_connections of the target, or close sessions",
        "25006" => "the target is a standby or set to read only: name its primary in the url",
        _ if code.starts_with("28") => "correct user and password in the sink's url",
        _ => return None,
    })
}

fn of_connection(error: &tokio_postgres::Error) -> Error {
    use std::error::Error as _;
    let mut message = error.to_string();
    let mut cause = error.source();
    let mut untrusted = false;
    while let Some(inner) = cause {
        let text = inner.to_string();
        untrusted |= text.contains("invalid peer certificate");
        if !message.contains(&text) {
            message.push_str(&format!(": {text}"));
        }
        cause = inner.source();
    }
    if untrusted {
        return Error::config(message)
            .remedy("set `tls_ca` to the authority of the target's certificate");
    }
    // The client finds these before it asks: there is no password to send, no TLS to be had.
    let is_ours = ["invalid configuration", "authentication error", "server does not support TLS"];
    if is_ours.iter().any(|text| message.contains(text)) {
        return Error::config(message).remedy("correct the sink's url");
    }
    Error::retry(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_class_of_a_failure_follows_its_sqlstate() {
        for (codes, class) in [
            (&["22001", "22P02", "23505", "23514", "21000", "42804", "54000"][..], Class::Data),
            (&["28P01", "28000", "42501", "3D000", "42P01", "0A000"], Class::Config),
            (&["08006", "57P01", "57014", "53100", "40P01", "55P03", "25006"], Class::Retry),
        ] {
            for code in codes {
                assert_eq!(class_of(code), class, "{code}");
            }
        }
    }
}
