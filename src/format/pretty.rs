//! One line a change for people: when, what, where, which row, and what it was before.

use anstyle::{AnsiColor, Style};

use crate::change::{Before, Change, Op, Row, Timestamp, Value};

/// Longer values are cut here, in characters.
const VALUE_CHARACTERS_MAX: usize = 60;
/// Further columns are counted, not shown.
const COLUMNS_MAX: usize = 12;

/// Writes lines for people.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pretty {
    colour: bool,
}

impl Pretty {
    pub(super) fn new(colour: bool) -> Self {
        Self { colour }
    }

    /// Appends one line, without its end.
    pub(super) fn encode(self, change: &Change, out: &mut Vec<u8>) {
        self.styled(out, dim(), &clock(change.transaction.commit_time));
        out.push(b' ');
        self.styled(out, op_style(change.op), &format!("{:<8}", change.op.word()));
        out.push(b' ');
        match (&change.table, &change.message) {
            (Some(table), _) => {
                self.styled(out, Style::new().bold(), &printable(&table.full_name()));
                self.write_key(change, out);
                self.write_columns(change, out);
            }
            (None, Some(message)) => {
                self.styled(out, Style::new().bold(), &printable(&message.prefix));
                out.push(b' ');
                out.extend_from_slice(shorten(&message.content).as_bytes());
            }
            (None, None) => {}
        }
    }

    fn write_key(self, change: &Change, out: &mut Vec<u8>) {
        let (Some(table), Some(row)) = (&change.table, change.key_row()) else { return };
        for index in table.key_columns() {
            let Some(column) = table.columns.get(index) else { continue };
            if change.after.is_none() && matches!(change.before, Before::Key(_)) && !column.identity
            {
                continue;
            }
            self.styled(out, dim(), &format!(" {}=", printable(&column.name)));
            let value = row.value(index).unwrap_or(Value::Unchanged);
            self.styled(out, Style::new().fg_color(Some(AnsiColor::Cyan.into())), &show(value));
        }
    }

    /// For an update the columns that differ, as far as the old row is known; else the row.
    fn write_columns(self, change: &Change, out: &mut Vec<u8>) {
        let Some(table) = &change.table else { return };
        let (row, old) = match (&change.after, &change.before) {
            (Some(row), Before::Full(old)) => (row, Some(old)),
            (Some(row), _) | (None, Before::Full(row)) => (row, None),
            (None, _) => return,
        };
        let key = table.key_columns();
        let mut shown = 0;
        let mut hidden = 0;
        for (index, column) in table.columns.iter().enumerate() {
            let new = row.value(index).unwrap_or(Value::Unchanged);
            let was = old.and_then(|old: &Row| old.value(index));
            let same = new == Value::Unchanged || was == Some(new);
            if same || (was.is_none() && key.contains(&index)) {
                continue;
            }
            if shown == COLUMNS_MAX {
                hidden += 1;
                continue;
            }
            shown += 1;
            self.styled(out, dim(), &format!("  {}: ", printable(&column.name)));
            if let Some(was) = was {
                self.styled(out, Style::new().fg_color(Some(AnsiColor::Red.into())), &show(was));
                self.styled(out, dim(), " -> ");
            }
            let style = match was {
                Some(_) => Style::new().fg_color(Some(AnsiColor::Green.into())),
                None => Style::new(),
            };
            self.styled(out, style, &show(new));
        }
        if hidden > 0 {
            self.styled(out, dim(), &format!("  and {hidden} more"));
        }
    }

    fn styled(self, out: &mut Vec<u8>, style: Style, text: &str) {
        if self.colour {
            out.extend_from_slice(format!("{style}{text}{style:#}").as_bytes());
        } else {
            out.extend_from_slice(text.as_bytes());
        }
    }
}

fn dim() -> Style {
    Style::new().dimmed()
}

fn op_style(op: Op) -> Style {
    let colour = match op {
        Op::Insert => AnsiColor::Green,
        Op::Update => AnsiColor::Yellow,
        Op::Delete | Op::Truncate => AnsiColor::Red,
        Op::Read => AnsiColor::Blue,
        Op::Message => AnsiColor::Magenta,
    };
    Style::new().fg_color(Some(colour.into())).bold()
}

/// `09:14:22.123`, UTC.
fn clock(time: Timestamp) -> String {
    let milliseconds = time.0.div_euclid(1000).rem_euclid(86_400_000);
    let (seconds, rest) = (milliseconds / 1000, milliseconds % 1000);
    format!("{:02}:{:02}:{:02}.{rest:03}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

fn show(value: Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Unchanged => "(unchanged)".into(),
        Value::Text(text) => shorten(text),
    }
}

/// At most `VALUE_CHARACTERS_MAX` characters, on one line, unable to steer the terminal.
fn shorten(text: &[u8]) -> String {
    // Four bytes a character at most, and one character more to see that there is more.
    let head = text.get(..(VALUE_CHARACTERS_MAX + 1) * 4).unwrap_or(text);
    let head = String::from_utf8_lossy(head);
    let mut short = printable(&head.chars().take(VALUE_CHARACTERS_MAX).collect::<String>());
    if head.chars().nth(VALUE_CHARACTERS_MAX).is_some() {
        short.push('…');
    }
    short
}

fn printable(text: &str) -> String {
    let visible = |c: char| match c {
        '\n' => '⏎',
        c if c.is_control() => '·',
        c => c,
    };
    text.chars().map(visible).collect()
}
