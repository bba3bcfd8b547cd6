//! `walrace transform`: what the rules of a sink make of changes that the journal holds.

use std::{
    collections::BTreeMap,
    io::{self, BufWriter, Write},
    path::PathBuf,
    process::ExitCode,
};

use clap::Subcommand;

use super::Global;
use crate::{
    change::Change,
    config::{Config, Rules, Sink},
    error::{Class, Classify, Error, Result},
    format::Encoder,
    journal::Inspection,
    runtime::{journal_options, names_of},
    transform::{Filter, Shape, Transform},
};

/// The commands of `walrace transform`.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Try the rules of a sink on changes of the journal; nothing is delivered
    Test(Test),
}

/// The arguments of `walrace transform test`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Each change is one line: passed, with its message as the sink would get it on the next line; left \
out, and by which rule; or failed, and why: delivered, it would become a dead letter. The journal \
is only read, so this works while Walrace runs, and while it does not. Exit code 3 when a change \
failed.

Examples:
  walrace transform test --sink search
  walrace transform test --sink search --from 4000 --count 20 --rules new-rules.toml")]
pub struct Test {
    /// The sink whose filter, rules and format are tried
    #[arg(long)]
    pub sink: String,
    /// This many of the newest changes
    #[arg(long, default_value_t = 100, conflicts_with = "from")]
    pub last: u64,
    /// From this offset on instead
    #[arg(long, value_name = "OFFSET")]
    pub from: Option<u64>,
    /// At most this many changes
    #[arg(long, default_value_t = 100, requires = "from")]
    pub count: u64,
    /// Rules in place of the sink's own: a TOML file with `where`, `[[transform]]`, `route` and the
    /// like at its top
    #[arg(long, value_name = "FILE")]
    pub rules: Option<PathBuf>,
}

/// Runs one of them.
pub async fn run(command: Command, global: &Global) -> Result<ExitCode> {
    let Command::Test(args) = command;
    let config = global.load()?;
    let work = move || test(&config, &args);
    tokio::task::spawn_blocking(work).await.class(Class::Bug, || "reading a journal panicked")?
}

fn test(config: &Config, args: &Test) -> Result<ExitCode> {
    let mut trial = Trial::new(config, args)?;
    let source = config.source_of(&trial.sink);
    let journal = Inspection::open(journal_options(config, source))?;
    let (from, count) = match args.from {
        Some(from) => (from, args.count),
        None => (journal.info().end.saturating_sub(args.last), args.last),
    };
    let mut out = BufWriter::new(io::stdout().lock());
    for change in journal.dump(from).take(usize::try_from(count).unwrap_or(usize::MAX)) {
        let text = trial.take(change?);
        match out.write_all(&text) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => break,
            written => written.class(Class::Config, || "cannot write to standard output")?,
        }
    }
    let _ = out.flush(); // a reader that has left, as `head` does, is no failure
    anstream::eprintln!("{}", trial.tally.summary());
    for unmatched in trial.transform.unmatched().iter().filter(|it| !it.tables.is_empty()) {
        anstream::eprintln!("warning: {unmatched}");
    }
    Ok(if trial.tally.failed == 0 { ExitCode::SUCCESS } else { ExitCode::from(3) })
}

/// The rules that are tried, and what came of them so far.
struct Trial {
    sink: Sink,
    filter: Filter,
    transform: Transform,
    encoder: Encoder,
    tally: Tally,
}

#[derive(Default)]
struct Tally {
    changes: u64,
    passed: u64,
    messages: u64,
    left_out: BTreeMap<String, u64>,
    failed: u64,
}

impl Trial {
    fn new(config: &Config, args: &Test) -> Result<Self> {
        let sink = config.sink.get(&args.sink).cloned();
        let mut sink = sink.ok_or_else(|| {
            let known = config.sink.keys().cloned().collect::<Vec<_>>().join(", ");
            Error::config(format!("there is no sink {}", args.sink))
                .remedy(format!("one of: {known}"))
        })?;
        if let Some(path) = &args.rules {
            sink.rules = Rules::load(path)?;
        }
        let names = names_of(config, config.source_of(&sink), &args.sink);
        Ok(Self {
            filter: Filter::new(&sink).reads(sink.reads),
            transform: Transform::new(&args.sink, &sink)?,
            encoder: Encoder::with_types(sink.format, &names, sink.types),
            tally: Tally::default(),
            sink,
        })
    }

    /// What is printed of one change.
    fn take(&mut self, change: Change) -> Vec<u8> {
        self.tally.changes += 1;
        let table = change.table.as_ref().map(|table| table.full_name());
        let of = table.or_else(|| change.message.as_ref().map(|message| message.prefix.clone()));
        let what = format!("{} {} {}", change.offset, change.op.word(), of.unwrap_or_default());
        if let Some(rule) = self.filter.reason(&change) {
            return self.leave_out(&what, rule);
        }
        let parts = match self.transform.explain(change) {
            Ok(Shape::Passed(parts)) => parts,
            Ok(Shape::LeftOut(rule)) => return self.leave_out(&what, &rule),
            Err(error) => return self.fail(&what, &error),
        };
        let mut text = Vec::new();
        let mut messages = 0;
        for part in &parts {
            let mut body = Vec::new();
            match self.encoder.encode(part, &mut body) {
                Err(error) => return self.fail(&what, &error),
                Ok(false) => {}
                Ok(true) => {
                    messages += 1;
                    let target = target(part);
                    text.extend_from_slice(format!("passed    {what}{target}\n  ").as_bytes());
                    text.extend_from_slice(String::from_utf8_lossy(&body).as_bytes());
                    text.push(b'\n');
                }
            }
        }
        if messages == 0 {
            return self.leave_out(&what, "format");
        }
        self.tally.passed += 1;
        self.tally.messages += messages;
        text
    }

    fn leave_out(&mut self, what: &str, rule: &str) -> Vec<u8> {
        *self.tally.left_out.entry(rule.to_owned()).or_default() += 1;
        format!("left out  {what} by {rule}\n").into_bytes()
    }

    fn fail(&mut self, what: &str, error: &Error) -> Vec<u8> {
        self.tally.failed += 1;
        format!("failed    {what}: {error}\n").into_bytes()
    }
}

impl Tally {
    fn summary(&self) -> String {
        let Self { changes, passed, messages, failed, .. } = self;
        let mut text = format!("{changes} changes: {passed} passed");
        if messages != passed {
            text.push_str(&format!(" as {messages} messages"));
        }
        let out: u64 = self.left_out.values().sum();
        text.push_str(&format!(", {out} left out"));
        let rules = self.left_out.iter().map(|(rule, count)| format!("{count} by {rule}"));
        let rules: Vec<String> = rules.collect();
        if !rules.is_empty() {
            text.push_str(&format!(" ({})", rules.join(", ")));
        }
        format!("{text}, {failed} failed")
    }
}

/// Where a message goes, as far as the rules decide it.
fn target(part: &Change) -> String {
    let mut text = String::new();
    let key = part.shaped.as_ref().and_then(|shaped| shaped.key.as_deref());
    for (name, value) in [("route", part.route()), ("key", key)] {
        if let Some(value) = value {
            text.push_str(&format!("  {name} {value}"));
        }
    }
    for (name, value) in part.headers() {
        text.push_str(&format!("  {name}: {value}"));
    }
    text
}
