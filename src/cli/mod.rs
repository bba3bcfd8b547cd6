//! The command line: one file for each command, one `match` that runs them.

use std::{
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

use anstyle::{AnsiColor, Style};
use clap::{ArgAction, Args, Parser, Subcommand, builder::Styles};

use crate::{
    config::{Config, LogFormat},
    error::{Class, Classify, Error, Result},
};

pub mod backfill;
pub mod check;
pub mod completions;
pub mod config;
pub mod demo;
pub mod dlq;
pub mod init;
pub mod instance;
pub mod journal;
pub mod lag;
pub mod log;
pub mod man;
pub mod missing;
mod offline;
pub mod run;
pub mod schema;
pub mod schema_check;
pub mod sink;
pub mod source;
pub mod tail;
pub mod transform;
pub mod verify;

const ERROR: Style = AnsiColor::Red.on_default().bold();
const HELP: Style = AnsiColor::Cyan.on_default().bold();

const STYLES: Styles = Styles::styled()
    .header(AnsiColor::Green.on_default().bold())
    .usage(AnsiColor::Green.on_default().bold())
    .literal(AnsiColor::Cyan.on_default().bold())
    .placeholder(AnsiColor::Cyan.on_default());

/// Keeps every committed change of a PostgreSQL database in a durable journal, and delivers it to
/// any number of sinks.
///
/// Each sink reads the journal at its own speed and as far back as it asks; one that is down for a
/// day costs disk here and nothing on the primary.
#[derive(Debug, Parser)]
#[command(
    name = "walrace",
    version,
    styles = STYLES,
    arg_required_else_help = true,
    propagate_version = false,
    disable_help_subcommand = true
)]
pub struct Cli {
    /// What every command takes.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What every command takes.
#[derive(Clone, Debug, Default, Args)]
pub struct Global {
    /// The configuration [default: walrace.toml]
    #[arg(short, long, global = true, value_name = "FILE", env = "WALRACE_CONFIG")]
    #[arg(hide_env_values = true, help_heading = "Global options")]
    pub config: Option<PathBuf>,
    /// How log lines are written, whatever the configuration says
    #[arg(long, global = true, value_name = "FORMAT", help_heading = "Global options")]
    pub log_format: Option<LogFormat>,
    /// Log more: -v what Walrace does, -vv its libraries too, -vvv everything
    #[arg(short, long, global = true, action = ArgAction::Count)]
    #[arg(help_heading = "Global options")]
    pub verbose: u8,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Capture and deliver until Ctrl-C or SIGTERM
    Run,
    /// Prove the set-up: each finding with the SQL that mends it
    Check,
    /// Look at a database and write a commented walrace.toml
    Init(init::Args),
    /// Show committed changes as they come
    Tail(tail::Args),
    /// Show how far each source and sink is behind
    Lag(lag::Args),
    /// List the committed changes that a sink does not have yet
    Missing(missing::Args),
    /// Compare a PostgreSQL target with its source, row by row, and repair it
    Verify(verify::Args),
    /// Watch it work on a private PostgreSQL, and see it proved
    Demo(demo::Args),
    /// Show the configuration, its schema and its reference
    #[command(subcommand)]
    Config(config::Command),
    /// Slots and publications of the databases that are captured
    #[command(subcommand)]
    Source(source::Command),
    /// Pause, resume, rewind or skip: what a sink gets next
    #[command(subcommand)]
    Sink(sink::Command),
    /// Read the rows that tables have already, for every sink or for one
    #[command(subcommand)]
    Backfill(backfill::Command),
    /// Changes that a target or a rule refused, and those that wait behind them
    #[command(subcommand)]
    Dlq(dlq::Command),
    /// What a journal holds, and whether a byte of it was altered
    #[command(subcommand)]
    Journal(journal::Command),
    /// Try the rules of a sink on changes that the journal holds
    #[command(subcommand)]
    Transform(transform::Command),
    /// The versions of each captured table, and what they break
    #[command(subcommand)]
    Schema(schema::Command),
    /// Print the completions of a shell
    Completions(completions::Args),
    /// Write the manual pages into a directory
    Man(man::Args),
}

impl Cli {
    /// Runs the command.
    pub async fn run(self) -> Result<ExitCode> {
        match self.command {
            Command::Run => run::run(&self.global).await,
            Command::Check => check::run(&self.global).await,
            Command::Init(args) => init::run(args).await,
            Command::Tail(args) => tail::run(args, &self.global).await,
            Command::Lag(args) => lag::run(args, &self.global).await,
            Command::Missing(args) => missing::run(args, &self.global).await,
            Command::Verify(args) => Box::pin(verify::run(args, &self.global)).await,
            Command::Demo(args) => demo::run(args, &self.global).await,
            Command::Config(command) => config::run(command, &self.global).await,
            Command::Source(command) => source::run(command, &self.global).await,
            Command::Sink(command) => sink::run(command, &self.global).await,
            Command::Backfill(command) => backfill::run(command, &self.global).await,
            Command::Dlq(command) => dlq::run(command, &self.global).await,
            Command::Journal(command) => journal::run(command, &self.global).await,
            Command::Transform(command) => transform::run(command, &self.global).await,
            Command::Schema(command) => schema::run(command, &self.global).await,
            Command::Completions(args) => completions::run(args).await,
            Command::Man(args) => man::run(args).await,
        }
    }
}

impl Global {
    /// Loads the configuration, with the options of the command line applied.
    pub fn load(&self) -> Result<Config> {
        let mut config = Config::load(self.config.as_deref())?;
        if let Some(format) = self.log_format {
            config.log.format = format;
        }
        if let Some(level) = log::level_of(self.verbose) {
            config.log.level = Some(level.to_owned());
        }
        Ok(config)
    }
}

/// Prints an error for a person, the remedy on a line of its own; the code to exit with.
pub fn report(error: &Error) -> ExitCode {
    let mut text = format!("{ERROR}error{ERROR:#}: {}\n", error.summary());
    if let Some(remedy) = error.remedy_text() {
        text.push_str(&format!("  {HELP}help{HELP:#}: {remedy}\n"));
    }
    // where stderr is gone, nobody is left to tell
    let _ = anstream::stderr().lock().write_all(text.as_bytes());
    ExitCode::FAILURE
}

/// Prints to the terminal or pipe; a reader that has left, as `head` does, is no failure.
pub(crate) fn print(text: &str) -> Result<()> {
    let mut out = anstream::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(error).class(Class::Config, || "cannot write to standard output")
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn global_options_may_stand_on_either_side_of_the_command() {
        for line in ["walrace -c x.toml -vv config show", "walrace config show -vv -c x.toml"] {
            let cli = Cli::try_parse_from(line.split(' ')).unwrap();
            assert_eq!(cli.global.config, Some(PathBuf::from("x.toml")));
            assert_eq!(cli.global.verbose, 2);
        }
    }

    #[test]
    fn options_override_the_log_of_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("walrace.toml");
        let source = "[source.app]\nkind = \"postgres\"\nurl = \"postgres://h/d\"\n";
        std::fs::write(&file, format!("{source}[log]\nlevel = \"warn\"\n")).unwrap();
        let global = Global { config: Some(file), ..Global::default() };
        assert_eq!(global.load().unwrap().log.level.as_deref(), Some("warn"));
        let format = Some(LogFormat::Json);
        let log = Global { log_format: format, verbose: 1, ..global }.load().unwrap().log;
        assert_eq!(log.level.as_deref(), log::level_of(1));
        assert_eq!(log.format, LogFormat::Json);
    }

    #[test]
    fn every_command_explains_itself() {
        let mut command = Cli::command().term_width(90);
        let mut help = command.render_long_help().to_string();
        let names = |c: &clap::Command| c.get_name().to_owned();
        for name in command.get_subcommands().map(names).collect::<Vec<_>>() {
            let subcommand = command.find_subcommand_mut(&name).unwrap();
            help.push_str(&format!("\n# {name}\n{}", subcommand.render_help()));
        }
        insta::assert_snapshot!(help);
    }

    /// The pages of the documentation.
    fn pages() -> Vec<PathBuf> {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut found = vec![root.join("README.md")];
        for folder in ["docs", "docs/sinks", "docs/sources"] {
            let entries = std::fs::read_dir(root.join(folder)).unwrap();
            found.extend(entries.map(|entry| entry.unwrap().path()));
        }
        found.retain(|path| path.extension().is_some_and(|extension| extension == "md"));
        found
    }

    /// What stands as code in a page: lines between fences, and what is in backquotes.
    fn code(page: &str) -> Vec<&str> {
        let mut fenced = false;
        let mut found = Vec::new();
        for line in page.lines() {
            if line.starts_with("```") {
                fenced = !fenced;
            } else if fenced {
                found.push(line.strip_prefix("$ ").unwrap_or(line));
            } else {
                found.extend(line.split('`').skip(1).step_by(2));
            }
        }
        found
    }

    /// Follows a command as it is written, up to a comment or a pipe; the word that is not one.
    fn unknown(written: &str) -> Option<String> {
        let mut command = Cli::command();
        command.build(); // so that each has the options of all
        let written = written.replace("\\|", "|");
        for word in written.split_whitespace().take_while(|word| !matches!(*word, "#" | "|")) {
            if let Some(flag) = word.trim_matches(['[', ']']).strip_prefix("--") {
                if !command.get_arguments().any(|argument| argument.get_long() == Some(flag)) {
                    return Some(word.to_owned());
                }
            } else if command.has_subcommands() {
                let mut named = None;
                for name in word.split('|') {
                    named = command.find_subcommand(name).cloned();
                    if named.is_none() {
                        return Some(name.to_owned());
                    }
                }
                command = named?;
            }
        }
        None
    }

    #[test]
    fn every_command_of_the_documentation_exists() {
        let mut seen = 0;
        for path in pages() {
            let page = std::fs::read_to_string(&path).unwrap();
            for code in code(&page) {
                let Some(written) = code.strip_prefix("walrace ") else { continue };
                // A dependency of Cargo, and what `lag` says.
                if written.starts_with("= ") || written.starts_with("is not running") {
                    continue;
                }
                let word = unknown(written);
                assert_eq!(word, None, "{}: `walrace {written}`", path.display());
                seen += 1;
            }
        }
        assert!(seen > 60, "only {seen} commands");
        assert_eq!(unknown("sink list|puase S"), Some("puase".into()));
        assert_eq!(unknown("dlq list --colour"), Some("--colour".into()));
    }
}
