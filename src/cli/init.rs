//! `walrace init`: the first `walrace.toml`, from what was found in a database.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
};

use super::print;
use crate::{
    config::{Secret, escape},
    error::{Class, Classify, Error, Result},
    source::postgres::{InspectedTable, inspect},
};

/// More tables than this are counted, not listed.
const LISTED_MAX: usize = 50;
/// The variable that the file takes the password from.
const PASSWORD: &str = "PGPASSWORD";

/// The arguments of `walrace init`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Example:
  walrace init postgres://walrace:secret@localhost:5432/app

The password is not written: the file takes it from the environment variable PGPASSWORD.")]
pub struct Args {
    /// postgres://user:password@host:port/database
    pub url: String,
    /// The file to write
    #[arg(short, long, value_name = "FILE", default_value = "walrace.toml")]
    pub output: PathBuf,
    /// Replace the file where it exists
    #[arg(long)]
    pub force: bool,
}

/// A table that was found in the database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Its schema, as it is named.
    pub schema: String,
    /// Its name, without the schema.
    pub name: String,
    /// Whether updates and deletes can name the row: it has a replica identity.
    pub has_identity: bool,
}

/// Looks at the database, writes the file and says what to do next.
pub async fn run(args: Args) -> Result<ExitCode> {
    let inspection = inspect(&Secret::new(args.url.as_str())).await?;
    let found = |table: InspectedTable| Found {
        schema: table.schema,
        name: table.name,
        has_identity: table.has_identity,
    };
    let tables: Vec<Found> = inspection.tables.into_iter().map(found).collect();
    print(&write(&args, &tables)?)?;
    Ok(ExitCode::SUCCESS)
}

/// Writes the file, durably, and returns what to do next.
pub fn write(args: &Args, tables: &[Found]) -> Result<String> {
    let text = render(&args.url, tables)?;
    save(&args.output, &text, args.force)?;
    Ok(next_step(args, tables))
}

/// The text of the file.
pub fn render(url: &str, tables: &[Found]) -> Result<String> {
    let address = Address::parse(url)?;
    let schemas: BTreeSet<&str> = tables.iter().map(|table| table.schema.as_str()).collect();
    let globs = schemas.iter().map(|schema| quoted(&format!("{}.*", escape(schema))));
    let globs: Vec<String> = globs.collect();
    let globs = if globs.is_empty() { "\"public.*\"".to_owned() } else { globs.join(", ") };
    Ok(format!(
        r##"# Walrace: every committed change of this database, to any number of sinks.
# `walrace config reference` explains every key.

# Journals, progress and catalog: one directory to back up or delete.
data_dir = "walrace-data"

[source.{name}]
kind = "postgres"
url = {url}
# Globs over schema.table; a leading `!` takes away: "!public.audit_*".
{listed}tables = [{globs}]

# Each change as a line of JSON.
[sink.changes]
kind = "file"
path = "changes.jsonl"

# Further sinks read the same journal, each at its own speed:
#
# [sink.hook]
# kind = "webhook"
# url = "https://example.org/hook"
# signing_secret = "${{WEBHOOK_SECRET}}"
"##,
        name = address.source_name(),
        url = quoted(&address.without_password),
        listed = listed(tables),
    ))
}

/// Comment lines that name what was found.
fn listed(tables: &[Found]) -> String {
    let mut lines = String::new();
    if tables.is_empty() {
        return lines;
    }
    let _ = writeln!(lines, "# Found when this was written:");
    for table in tables.iter().take(LISTED_MAX) {
        let note = if table.has_identity { "" } else { " (no replica identity: inserts only)" };
        // a name may hold a line break
        let name = format!("{}.{}", table.schema, table.name);
        let _ = writeln!(lines, "#   {}{note}", name.escape_debug());
    }
    if let Some(more) = tables.len().checked_sub(LISTED_MAX).filter(|more| *more > 0) {
        let _ = writeln!(lines, "#   and {more} more");
    }
    lines
}

fn next_step(args: &Args, tables: &[Found]) -> String {
    let file = args.output.display();
    let option = if args.output == Path::new("walrace.toml") {
        String::new()
    } else {
        format!("-c {file} ")
    };
    let mut text = format!("wrote {file}: {} tables\n\nNext:\n", tables.len());
    if Address::parse(&args.url).is_ok_and(|address| address.has_password) {
        let _ = writeln!(text, "  export {PASSWORD}='...'    # the password is not in the file");
    }
    let _ = writeln!(text, "  walrace {option}check    # proves the set-up, and says what to mend");
    let _ = writeln!(text, "  walrace {option}run");
    text
}

/// A URL of PostgreSQL whose password is replaced by a reference.
struct Address {
    without_password: String,
    has_password: bool,
}

impl Address {
    fn parse(url: &str) -> Result<Self> {
        let rest = url.strip_prefix("postgres://").or_else(|| url.strip_prefix("postgresql://"));
        let Some(rest) = rest.filter(|rest| !rest.is_empty()) else {
            return Err(Error::config("the URL does not begin with postgres://")
                .remedy("walrace init postgres://user:password@host:port/database"));
        };
        if rest.contains("?password=") || rest.contains("&password=") {
            return Err(Error::config("the URL has its password among the parameters")
                .remedy("write postgres://user:password@host:port/database"));
        }
        let (login, address) = match rest.rsplit_once('@') {
            Some((login, address)) => (Some(login), address),
            None => (None, rest),
        };
        let (user, password) = match login.map(|login| login.split_once(':').unwrap_or((login, "")))
        {
            Some((user, password)) => (Some(user), password),
            None => (None, ""),
        };
        let address = escape(address);
        let has_password = !password.is_empty();
        let without_password = match user.map(escape) {
            None => format!("postgres://{address}"),
            Some(user) if has_password => format!("postgres://{user}:${{{PASSWORD}}}@{address}"),
            Some(user) => format!("postgres://{user}@{address}"),
        };
        Ok(Self { without_password, has_password })
    }

    /// A name for the source: the database's, as far as it is one.
    fn source_name(&self) -> String {
        let path = self.without_password.split('?').next().unwrap_or_default();
        let after_scheme = path.split_once("://").map_or("", |(_, rest)| rest);
        let database = after_scheme.rsplit_once('/').map_or("", |(_, database)| database);
        let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '_' };
        let name: String = database.chars().map(plain).take(40).collect();
        if name.is_empty() { "app".into() } else { name }
    }
}

fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

fn save(path: &Path, text: &str, force: bool) -> Result<()> {
    let mut options = fs::OpenOptions::new();
    options.write(true);
    if force {
        options.create(true).truncate(true);
    } else {
        options.create_new(true);
    }
    let file = options.open(path).map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => Error::config(format!("{} exists", path.display()))
            .remedy("`--force` replaces it, `--output FILE` names another"),
        _ => Error::config(format!("cannot create {}", path.display())).caused_by(error),
    });
    let mut file = file?;
    file.write_all(text.as_bytes())
        .and_then(|()| file.sync_all())
        .class(Class::Config, || format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Environment, Source};

    fn found(schema: &str, name: &str, has_identity: bool) -> Found {
        Found { schema: schema.into(), name: name.into(), has_identity }
    }

    /// The URL and the globs of the source that the written file describes.
    fn loaded(url: &str, tables: &[Found]) -> (String, String, Vec<String>) {
        let text = render(url, tables).unwrap();
        let environment = Environment::of([(PASSWORD, "s/cret")]);
        let config = Config::parse_in(&text, "walrace.toml", &environment).unwrap();
        let (name, Source::Postgres(postgres)) = config.source.into_iter().next().unwrap();
        (name, postgres.url.expose().to_owned(), postgres.tables)
    }

    #[test]
    fn what_is_written_reads_as_shown() {
        let tables = [
            found("public", "bookings", true),
            found("public", "log", false),
            found("billing", "payments", true),
        ];
        let text = render("postgres://walrace:secret@localhost:5432/app", &tables).unwrap();
        assert!(!text.contains("secret@"), "the password stays out of the file");
        insta::assert_snapshot!(text);
    }

    #[test]
    fn what_is_written_loads_with_the_password_from_the_environment() {
        let (name, url, tables) = loaded("postgresql://w:s@h:1/My-App?sslmode=require", &[]);
        assert_eq!(name, "my_app");
        assert_eq!(url, "postgres://w:s%2Fcret@h:1/My-App?sslmode=require");
        assert_eq!(tables, ["public.*"]);
        assert_eq!(loaded("postgres://h", &[]).1, "postgres://h");
        assert_eq!(loaded("postgres://w@/?host=/run/postgresql", &[]).0, "app");
    }

    #[test]
    fn hostile_names_stay_inside_their_place() {
        let tables = [found("a\"b${X}", "t", true), found("x", "y\n[sink.evil]", true)];
        let (_, _, globs) = loaded("postgres://h/d", &tables);
        assert_eq!(globs, ["a\"b${X}.*", "x.*"]);
    }

    #[test]
    fn a_file_that_exists_is_kept_unless_forced() {
        let directory = tempfile::tempdir().unwrap();
        let output = directory.path().join("w.toml");
        let args = Args { url: "postgres://u:p@h/d".into(), output: output.clone(), force: false };
        let next = write(&args, &[]).unwrap();
        assert!(next.contains("w.toml check") && next.contains("export PGPASSWORD"), "{next}");
        fs::write(&output, "mine").unwrap();
        let error = write(&args, &[]).unwrap_err();
        assert!(error.to_string().contains("--force"), "{error}");
        assert_eq!(fs::read_to_string(&output).unwrap(), "mine");
        write(&Args { force: true, ..args }, &[]).unwrap();
        assert!(fs::read_to_string(&output).unwrap().contains("[source.d]"));
    }

    #[test]
    fn what_is_no_url_is_refused_without_being_shown() {
        for url in ["mysql://u:hunter2@h/d", "postgres://", "postgres://h/d?password=hunter2"] {
            let error = render(url, &[]).unwrap_err().to_string();
            assert!(!error.contains("hunter2"), "{error}");
        }
    }
}
