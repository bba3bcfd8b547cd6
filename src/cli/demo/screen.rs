//! What a person sees while the demo runs: a readable part of the changes, and a line of figures.

use std::{
    env,
    io::{self, IsTerminal, Write},
    time::{Duration, Instant},
};

use anstyle::{AnsiColor, Reset, Style};

/// Changes shown a second: what a person can read.
const SHOWN_A_SECOND: f64 = 10.0;

/// Lines shown of one transaction at most.
const SHOWN_OF_TRANSACTION: u32 = 6;

/// Characters of a change where it goes to a file or a pipe; at a terminal its width decides.
const PLAIN_CHARS_MAX: usize = 240;

const DIM: Style = Style::new().dimmed();
const BOLD: Style = Style::new().bold();
const GOOD: Style = AnsiColor::Green.on_default().bold();
const BAD: Style = AnsiColor::Red.on_default().bold();

/// Returns to the first column and erases the line.
const ERASE_LINE: &str = "\r\x1b[2K";
const HIDE_CURSOR: &str = "\x1b[?25l";
const SHOW_CURSOR: &str = "\x1b[?25h";
const NO_WRAP: &str = "\x1b[?7l";
const WRAP: &str = "\x1b[?7h";

/// How a word stands out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tone {
    Plain,
    Dim,
    Bold,
    Good,
    Bad,
}

/// Standard output, as a terminal or as plain lines.
#[derive(Debug)]
pub(super) struct Screen {
    terminal: bool,
    colour: bool,
    columns: usize,
    closed: bool,
    status: String,
    sampler: Sampler,
}

impl Screen {
    pub(super) fn new() -> Self {
        let is_dumb = env::var_os("TERM").is_none_or(|term| term == "dumb" || term.is_empty());
        let terminal = io::stdout().is_terminal() && !is_dumb;
        let no_colour = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let mut screen = Self {
            terminal,
            colour: terminal && !no_colour,
            columns: columns(),
            closed: false,
            status: String::new(),
            sampler: Sampler::new(Instant::now()),
        };
        if terminal {
            screen.write(HIDE_CURSOR);
        }
        screen
    }

    /// Whether lines may have colours.
    pub(super) fn colour(&self) -> bool {
        self.colour
    }

    /// Nobody reads any more: the pipe is closed, or the terminal gone.
    pub(super) fn is_closed(&self) -> bool {
        self.closed
    }

    /// How often the figures are worth a line: on a terminal they replace each other.
    pub(super) fn status_every(&self) -> Duration {
        Duration::from_secs(if self.terminal { 1 } else { 5 })
    }

    /// The text, so that it stands out where there are colours.
    pub(super) fn paint(&self, tone: Tone, text: impl AsRef<str>) -> String {
        let text = text.as_ref();
        let style = match tone {
            Tone::Plain => return text.to_owned(),
            Tone::Dim => DIM,
            Tone::Bold => BOLD,
            Tone::Good => GOOD,
            Tone::Bad => BAD,
        };
        if self.colour { format!("{style}{text}{style:#}") } else { text.to_owned() }
    }

    /// Whether to show this change of transaction `xid`; else it is counted.
    pub(super) fn wants(&mut self, xid: u32) -> bool {
        self.sampler.wants(xid, Instant::now())
    }

    /// Changes that were not shown.
    pub(super) fn not_shown(&self) -> u64 {
        self.sampler.skipped
    }

    /// Prints a line that stays.
    pub(super) fn say(&mut self, line: &str) {
        if self.terminal {
            let status = self.status.clone();
            self.write(&format!("{ERASE_LINE}{line}\n{status}"));
        } else {
            self.write(&format!("{line}\n"));
        }
    }

    /// Prints a change: one line, however long it is.
    pub(super) fn change(&mut self, line: &str) {
        if self.terminal {
            self.say(&format!("{NO_WRAP}{}{WRAP}", clip(line, self.columns)));
        } else {
            self.say(&clip(line, PLAIN_CHARS_MAX));
        }
    }

    /// Replaces the line of figures.
    pub(super) fn status(&mut self, line: &str) {
        if self.terminal {
            self.columns = columns(); // it may be a window that somebody resizes
            self.status = format!("{NO_WRAP}{}{WRAP}", clip(line, self.columns));
            self.write(&format!("{ERASE_LINE}{}", self.status.clone()));
        } else {
            self.write(&format!("{line}\n"));
        }
    }

    /// Says on a terminal what is being done, until the next line.
    pub(super) fn doing(&mut self, what: &str) {
        if self.terminal {
            let what = self.paint(Tone::Dim, what);
            self.status(&format!("  {what}"));
        }
    }

    /// Takes the line of figures away.
    pub(super) fn end_status(&mut self) {
        if self.terminal {
            self.status.clear();
            self.write(ERASE_LINE);
        }
    }

    fn write(&mut self, text: &str) {
        let mut out = io::stdout().lock();
        if out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_err() {
            self.closed = true;
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        if self.terminal {
            self.end_status();
            self.write(SHOW_CURSOR);
        }
    }
}

/// Chooses whole transactions, and no more lines than a person can read.
#[derive(Debug)]
struct Sampler {
    /// Lines that may be shown now; below zero after a long transaction.
    budget: f64,
    refilled: Instant,
    shown_xid: Option<u32>,
    shown_of_transaction: u32,
    skipped: u64,
}

impl Sampler {
    fn new(now: Instant) -> Self {
        Self {
            budget: SHOWN_A_SECOND,
            refilled: now,
            shown_xid: None,
            shown_of_transaction: 0,
            skipped: 0,
        }
    }

    fn wants(&mut self, xid: u32, now: Instant) -> bool {
        let elapsed = now.saturating_duration_since(self.refilled).as_secs_f64();
        self.refilled = now;
        self.budget = (self.budget + elapsed * SHOWN_A_SECOND).min(SHOWN_A_SECOND);
        if self.shown_xid != Some(xid) && self.budget >= 1.0 {
            self.shown_xid = Some(xid);
            self.shown_of_transaction = 0;
        }
        let shown = self.shown_xid == Some(xid) && self.shown_of_transaction < SHOWN_OF_TRANSACTION;
        if shown {
            self.shown_of_transaction += 1;
            self.budget -= 1.0;
        } else {
            self.skipped += 1;
        }
        shown
    }
}

/// The width of the terminal; that of old ones where it does not say.
fn columns() -> usize {
    let size = rustix::termios::tcgetwinsize(io::stdout());
    size.ok().map(|size| size.ws_col.into()).filter(|columns| *columns > 0).unwrap_or(80)
}

/// The head of the line that so many characters show; styles take no room.
fn clip(line: &str, chars_max: usize) -> String {
    let mut shown = 0;
    let mut in_style = false;
    let mut cut = 0;
    for (at, c) in line.char_indices() {
        match c {
            '\x1b' => in_style = true,
            _ if in_style => in_style = !c.is_ascii_alphabetic(),
            _ => {
                shown += 1;
                if shown == chars_max {
                    cut = at;
                }
            }
        }
    }
    if shown <= chars_max {
        return line.to_owned();
    }
    let reset = if line.contains('\x1b') { Reset.to_string() } else { String::new() };
    format!("{}…{reset}", line.get(..cut).unwrap_or_default())
}

/// `1234567` as `1,234,567`.
pub(super) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A latency as people say it: `1.9 ms`, `1.25 s`.
pub(super) fn duration_text(duration: Duration) -> String {
    if duration < Duration::from_secs(1) {
        format!("{:.1} ms", duration.as_secs_f64() * 1e3)
    } else {
        format!("{:.2} s", duration.as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sampled_transaction_is_shown_whole_and_the_rest_is_counted() {
        let now = Instant::now();
        let mut sampler = Sampler::new(now);
        let mut shown = Vec::new();
        for change in 0..300 {
            let xid = change / 3;
            if sampler.wants(xid, now) {
                shown.push(xid);
            }
        }
        // 10 lines are allowed; the transaction that is begun is shown to its end
        assert_eq!(shown, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]);
        assert_eq!(sampler.skipped, 288);
        assert!(!sampler.wants(200, now + Duration::from_millis(200)));
        assert!(sampler.wants(201, now + Duration::from_millis(400)));
    }

    #[test]
    fn of_a_huge_transaction_only_the_head_is_shown() {
        let now = Instant::now();
        let mut sampler = Sampler::new(now);
        let shown = (0..1000).filter(|_| sampler.wants(7, now)).count();
        assert_eq!((shown, sampler.skipped), (6, 994));
    }

    #[test]
    fn numbers_and_times_read_as_people_write_them() {
        assert_eq!([0, 999, 1000, 1_234_567].map(grouped), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!(duration_text(Duration::from_micros(1_940)), "1.9 ms");
        assert_eq!(duration_text(Duration::from_millis(1_250)), "1.25 s");
    }

    #[test]
    fn a_long_line_is_cut_between_characters() {
        assert_eq!(clip("Zoë Núñez", 4), "Zoë…");
        assert_eq!(clip("Zoë", 3), "Zoë");
    }

    #[test]
    fn styles_take_no_room_and_end_where_the_line_is_cut() {
        assert_eq!(clip("\x1b[1mbold\x1b[0m", 4), "\x1b[1mbold\x1b[0m");
        assert_eq!(clip("\x1b[1;31mbold\x1b[0m and on", 3), "\x1b[1;31mbo…\x1b[0m");
    }
}
