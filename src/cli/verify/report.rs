//! What was found, for people and as JSON, and the line that shows how far it is.

use std::io::{self, IsTerminal, Write};

use anstyle::{AnsiColor, Style};
use serde::{Serialize, Serializer};
use serde_json::{Map, Value as Json};

use crate::{change::Lsn, error::Error};

const GOOD: Style = AnsiColor::Green.on_default().bold();
const BAD: Style = AnsiColor::Red.on_default().bold();
const DOUBT: Style = AnsiColor::Yellow.on_default().bold();
const ERASE_LINE: &str = "\r\x1b[2K";

/// The outcome.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) sink: String,
    pub(super) source: String,
    /// Host, port and database of the target.
    pub(super) target: String,
    /// The source's log when it began: every difference that was there then is found.
    #[serde(serialize_with = "as_text")]
    pub(super) from: Lsn,
    /// The source's log when it ended.
    #[serde(serialize_with = "as_text")]
    pub(super) to: Lsn,
    pub(super) verdict: Outcome,
    pub(super) tables: Vec<Compared>,
}

fn as_text<S: Serializer>(lsn: &Lsn, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(lsn)
}

/// What is said by the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Outcome {
    Equal,
    Unverified,
    Different,
}

/// One table.
#[derive(Debug, Default, Serialize)]
pub(super) struct Compared {
    pub(super) table: String,
    /// The target's table, quoted.
    pub(super) target: Option<String>,
    /// Rows of the source that were compared.
    pub(super) rows: u64,
    /// Rows of either side of which more than a part of a sum came over the wire.
    pub(super) rows_listed: u64,
    /// Columns of the source that were not compared.
    pub(super) columns_left_out: Vec<String>,
    pub(super) differences: Vec<Difference>,
    pub(super) unsettled: Vec<Unsettled>,
    /// The limit was met: there may be more.
    pub(super) is_cut: bool,
    /// Why it was not compared, or not to its end.
    pub(super) error: Option<String>,
    pub(super) remedy: Option<String>,
    /// Why not all that differed was repaired.
    pub(super) not_repaired: Option<String>,
}

/// A row that differs.
#[derive(Debug, Serialize)]
pub(super) struct Difference {
    pub(super) key: Map<String, Json>,
    pub(super) kind: Kind,
    /// The columns that differ, of a row that both sides have.
    pub(super) columns: Vec<String>,
    pub(super) is_repaired: bool,
}

/// How a row differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Kind {
    /// The source has it, and the target does not.
    Missing,
    /// The target has it, and the source does not.
    Extra,
    /// Both have it, with other values.
    Changed,
}

/// A row of which it could not be told.
#[derive(Debug, Serialize)]
pub(super) struct Unsettled {
    pub(super) key: Map<String, Json>,
    pub(super) reason: String,
}

impl Kind {
    fn word(self) -> &'static str {
        match self {
            Kind::Missing => "missing",
            Kind::Extra => "extra",
            Kind::Changed => "changed",
        }
    }
}

impl Compared {
    pub(super) fn failed(&mut self, error: &Error) {
        self.error = Some(error.summary());
        self.remedy = error.remedy_text().map(str::to_owned);
    }

    pub(super) fn outcome(&self) -> Outcome {
        let remain = self.differences.iter().any(|difference| !difference.is_repaired);
        match (remain, self.unsettled.is_empty() && self.error.is_none() && !self.is_cut) {
            (true, _) => Outcome::Different,
            (false, true) => Outcome::Equal,
            (false, false) => Outcome::Unverified,
        }
    }
}

impl Report {
    /// Sums the tables up.
    pub(super) fn conclude(&mut self) {
        let worst = self.tables.iter().map(Compared::outcome).max();
        self.verdict = worst.unwrap_or(Outcome::Unverified);
    }

    pub(super) fn render(&self) -> String {
        let mut text = String::new();
        for table in &self.tables {
            text.push_str(&table.render());
        }
        let (style, word) = match self.verdict {
            Outcome::Equal => (GOOD, "equal"),
            Outcome::Unverified => (DOUBT, "not verified"),
            Outcome::Different => (BAD, "different"),
        };
        let Self { source, sink, target, from, to, .. } = self;
        text.push_str(&format!(
            "{style}{word}{style:#}: source {source} and sink {sink} at {target}, \
             from log position {from} to {to}\n"
        ));
        text
    }
}

impl Compared {
    fn render(&self) -> String {
        let Self { table, rows, differences, unsettled, .. } = self;
        let mut text = match self.outcome() {
            Outcome::Equal if differences.is_empty() => {
                format!("{GOOD}ok{GOOD:#}        {table}: {rows} rows\n")
            }
            Outcome::Equal => {
                let count = differences.len();
                format!("{GOOD}repaired{GOOD:#}  {table}: {rows} rows, {count} were different\n")
            }
            Outcome::Different => {
                let count = differences.iter().filter(|d| !d.is_repaired).count();
                let more = if self.is_cut { " or more" } else { "" };
                format!("{BAD}different{BAD:#} {table}: {rows} rows, {count}{more} different\n")
            }
            Outcome::Unverified => {
                let count = unsettled.len();
                format!("{DOUBT}unsettled{DOUBT:#} {table}: {rows} rows, {count} not settled\n")
            }
        };
        for Difference { key, kind, columns, is_repaired } in differences {
            let columns = match columns.is_empty() {
                true => String::new(),
                false => format!(": {}", columns.join(", ")),
            };
            let repaired = if *is_repaired { " (repaired)" } else { "" };
            let word = kind.word();
            text.push_str(&format!("  {word:<8} {}{columns}{repaired}\n", shown(key)));
        }
        for Unsettled { key, reason } in unsettled {
            text.push_str(&format!("  unsettled {}: {reason}\n", shown(key)));
        }
        if !self.columns_left_out.is_empty() {
            let names = self.columns_left_out.join(", ");
            text.push_str(&format!("  not compared, masked or not in the target: {names}\n"));
        }
        let failures = [(&self.error, &self.remedy), (&self.not_repaired, &None)];
        for (error, remedy) in failures {
            let Some(error) = error else { continue };
            text.push_str(&format!("  {error}\n"));
            if let Some(remedy) = remedy {
                text.push_str(&format!("  help: {remedy}\n"));
            }
        }
        text
    }
}

fn shown(key: &Map<String, Json>) -> String {
    let pair =
        |(name, value): (&String, &Json)| format!("{name}={}", value.as_str().unwrap_or_default());
    key.iter().map(pair).collect::<Vec<_>>().join(", ")
}

/// A line that is written over; only at a terminal.
#[derive(Debug)]
pub(super) struct Line {
    terminal: bool,
}

impl Line {
    pub(super) fn new() -> Self {
        Self { terminal: io::stderr().is_terminal() }
    }

    pub(super) fn show(&self, table: &Compared, estimate: u64) {
        let percent = (table.rows.saturating_mul(100) / estimate.max(1)).min(99);
        let filled = usize::try_from(percent / 5).unwrap_or_default();
        let bar = format!("{}{}", "#".repeat(filled), "-".repeat(20 - filled));
        let (name, rows, found) = (&table.table, table.rows, table.differences.len());
        self.write(&format!("[{bar}] {percent:>2}% {name}: {rows} rows, {found} different"));
    }

    pub(super) fn clear(&self) {
        self.write("");
    }

    fn write(&self, text: &str) {
        if self.terminal {
            let mut out = io::stderr().lock();
            // where stderr is gone, nobody looks
            let _ = write!(out, "{ERASE_LINE}{text}").and_then(|()| out.flush());
        }
    }
}
