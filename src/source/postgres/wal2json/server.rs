//! What the plugin is asked for, and what it may lack.

use super::{
    super::{
        catalog::quote_text,
        failure::Failure,
        settings::Settings,
        wire::{Client, Frames, Stream},
    },
    Decoder,
};
use crate::{
    change::Lsn,
    error::{Error, Result},
};

/// What every line needs. Types go by oid: the plugin writes the names of some as broken JSON.
const NEEDED: [(&str, &str); 7] = [
    ("format-version", "2"),
    ("include-transaction", "1"),
    ("include-xids", "1"),
    ("include-timestamp", "1"),
    ("include-lsn", "1"),
    ("include-types", "0"),
    ("include-type-oids", "1"),
];
/// What older versions of the plugin do not have, and how a line can be read without it.
const WELCOME: [&str; 3] = ["include-pk", "include-column-positions", NUMBERS_AS_TEXT];
/// Keeps NaN and the infinities; since 2.6.
const NUMBERS_AS_TEXT: &str = "numeric-data-types-as-string";
/// Without it: which columns cannot be null.
const NOT_NULL: &str = "include-not-null";

/// Begins the stream of an existing slot.
pub(in super::super) fn begin(
    mut walsender: Client,
    settings: &Settings,
    start: Lsn,
) -> Result<((Stream, Frames), Decoder)> {
    check_encoding(&mut walsender)?;
    let options = agree(&mut walsender, settings)?;
    let announces = !options.iter().any(|(name, _)| name == NUMBERS_AS_TEXT);
    if announces {
        // The plugin says to debuggers alone which nulls are none.
        walsender.query("set client_min_messages = debug1")?;
    }
    let options: Vec<_> = options
        .iter()
        .map(|(name, value)| format!("\"{name}\" '{}'", value.replace('\'', "''")))
        .collect();
    let connection = walsender.start_copy(&format!(
        "START_REPLICATION SLOT \"{}\" LOGICAL {start} ({})",
        settings.slot.replace('"', "\"\""),
        options.join(", ")
    ))?;
    Ok((connection, Decoder::new(settings, announces)))
}

/// pgoutput converts text to the client's encoding; this plugin sends it as the database has it.
fn check_encoding(walsender: &mut Client) -> Result<()> {
    let encoding = walsender.value("select pg_catalog.current_setting('server_encoding')")?;
    match encoding.as_deref() {
        Some("UTF8" | "SQL_ASCII") => Ok(()),
        other => Err(Error::config(format!(
            "the database has the encoding {}, which the plugin wal2json does not convert",
            other.unwrap_or("unknown")
        ))
        .remedy("use plugin = \"pgoutput\" with a slot of its own for this database")),
    }
}

/// The options that this version of the plugin has, found by asking for a look at the slot.
fn agree(walsender: &mut Client, settings: &Settings) -> Result<Vec<(String, String)>> {
    let own = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
    let mut options: Vec<_> = NEEDED.into_iter().map(own).collect();
    options.extend(WELCOME.map(|name| own((name, "1"))));
    let away = filter_tables(&settings.config.tables);
    if !away.is_empty() {
        options.push(own(("filter-tables", &away)));
    }
    loop {
        let list: Vec<_> = options
            .iter()
            .map(|(name, value)| format!("{}, {}", quote_text(name), quote_text(value)))
            .collect();
        // It ends at the first record of the log behind the slot's beginning.
        let look = format!(
            "select 1 from pg_logical_slot_peek_changes({}, '0/1', 1, {})",
            quote_text(&settings.slot),
            list.join(", ")
        );
        let failure = match walsender.query(&look) {
            Ok(_) => return Ok(options),
            Err(failure) => failure,
        };
        let Some(unknown) = unknown_option(&failure) else { return Err(explain(failure)) };
        if !WELCOME.contains(&unknown.as_str()) && unknown != NOT_NULL {
            return Err(Error::config(format!(
                "the plugin wal2json at the server does not know the option {unknown}"
            ))
            .remedy("install version 2.5 or newer of it, or use plugin = \"pgoutput\""));
        }
        options.retain(|(name, _)| *name != unknown);
        if unknown == NUMBERS_AS_TEXT {
            options.push(own((NOT_NULL, "1")));
        }
    }
}

/// The option that the plugin refuses: `option "include-pk" = "1" is unknown`.
fn unknown_option(failure: &Failure) -> Option<String> {
    let Failure::Server(error) = failure else { return None };
    let rest = error.message.strip_prefix("option \"")?;
    let (name, rest) = rest.split_once('"')?;
    rest.ends_with("is unknown").then(|| name.to_owned())
}

fn explain(failure: Failure) -> Error {
    match &failure {
        Failure::Server(error) if lacks_library(failure.code(), &error.message) => {
            missing().caused_by(Error::from(failure))
        }
        _ => Error::from(failure).context("while looking at the slot with the plugin wal2json"),
    }
}

fn lacks_library(code: &str, message: &str) -> bool {
    // undefined_file, and the name: a missing piece of the log has that code too
    code == "58P01" && message.contains("wal2json")
}

/// That the plugin's library is not at the server.
pub(in super::super) fn missing() -> Error {
    Error::config("the plugin wal2json is not installed at the server").remedy(
        "install the package of the server's major version there: postgresql-<version>-wal2json \
         on Debian and Ubuntu, wal2json_<version> from PostgreSQL's yum repository; the server \
         needs no restart. Or use plugin = \"pgoutput\", which is built in",
    )
}

/// Whether the server has the library; `None` where it does not say. Changes nothing: where the
/// role may not load it, a slot is made that ends with the session.
pub(in super::super) fn is_installed(client: &mut Client) -> Option<bool> {
    let verdict = |failure: &Failure| match failure {
        Failure::Server(error) if lacks_library(failure.code(), &error.message) => Some(false),
        _ => None,
    };
    match client.query("load 'wal2json'") {
        Ok(_) => return Some(true),
        Err(failure) if failure.code() == "42501" => {}
        Err(failure) => return verdict(&failure),
    }
    let name = format!("walrace_check_{}", fastrand::u32(..));
    let sql = format!("select pg_create_logical_replication_slot('{name}', 'wal2json', true)");
    client.query("set statement_timeout = '5s'").ok()?;
    let outcome = client.query(&sql);
    let _ = client.query("set statement_timeout = 0");
    let _ = client.query(&format!("select pg_drop_replication_slot('{name}')"));
    match outcome {
        Ok(_) => Some(true),
        // It waits for open transactions only once it has loaded the plugin.
        Err(failure) if failure.code() == "57014" => Some(true),
        Err(failure) => verdict(&failure),
    }
}

/// The `!` globs that name one schema and one table, or all of either, as the plugin has them. They
/// are left out at the server; every other glob is applied to what arrives. What chooses tables is
/// never asked of the server: it knows a partition by its own name only.
fn filter_tables(globs: &[String]) -> String {
    let plain = |part: &str| part == "*" || !part.contains(['*', '?']);
    let tables = globs.iter().filter_map(|glob| {
        let (schema, table) = glob.strip_prefix('!')?.split_once('.')?;
        // With a second dot it is not told where the schema ends.
        let clear = !schema.is_empty() && !table.is_empty() && !table.contains('.');
        (clear && plain(schema) && plain(table))
            .then(|| format!("{}.{}", escape(schema), escape(table)))
    });
    tables.collect::<Vec<_>>().join(",")
}

/// Each character that may mean something to the plugin gets a backslash.
fn escape(name: &str) -> String {
    if name == "*" {
        return name.to_owned();
    }
    let mut out = String::with_capacity(name.len());
    for character in name.chars() {
        if character.is_ascii() && !character.is_ascii_alphanumeric() && character != '_' {
            out.push('\\');
        }
        out.push(character);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_taken_away_by_plain_names_is_left_to_the_server() {
        let globs = [
            "public.*",
            "!audit.*",
            "!*.log",
            "!public.part_?",
            "!public.a*",
            "!a.b.c",
            "!nodot",
            "!We ird.T\\a,b'l*",
            "!We ird.Tá,b'l",
        ];
        let globs = globs.map(String::from);
        assert_eq!(filter_tables(&globs), r"audit.*,*.log,We\ ird.Tá\,b\'l");
        assert_eq!(filter_tables(&[]), "");
    }
}
