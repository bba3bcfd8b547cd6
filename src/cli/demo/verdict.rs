//! What is printed at the end: each claim with the figure that it stands on.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::{
    booking::TABLES,
    proof::{Comparison, Replay},
    screen::{Screen, Tone, duration_text, grouped},
    show::Played,
    tally::per_second,
};
use crate::cli::lag::bytes_text;

/// Everything that was counted and compared.
#[derive(Debug)]
pub(super) struct Verdict {
    pub(super) version: String,
    pub(super) played: Played,
    pub(super) replay: Replay,
    pub(super) comparison: Comparison,
}

impl Verdict {
    /// Committed changes that are not in the file.
    fn lost(&self) -> u64 {
        self.played.counts.committed().saturating_sub(self.replay.once())
    }

    /// Changes in the file that nobody has committed.
    fn invented(&self) -> u64 {
        self.replay.once().saturating_sub(self.played.counts.committed())
    }

    /// Whether everything came once, in order, and equals the tables.
    pub(super) fn holds(&self) -> bool {
        let wrong = [
            self.lost(),
            self.invented(),
            self.replay.twice,
            self.replay.disordered,
            self.replay.undone,
            self.replay.misfits,
            self.comparison.different,
        ];
        wrong.iter().sum::<u64>() == 0
    }

    /// The summary, line by line.
    pub(super) fn lines(&self, screen: &Screen) -> Vec<String> {
        let title = format!(
            "{:.1} s of load on PostgreSQL {}, fsync on",
            self.played.load.as_secs_f64(),
            self.version
        );
        let mut lines = vec![
            String::new(),
            format!("  {}   {title}", screen.paint(Tone::Bold, "The proof")),
            String::new(),
        ];
        let row = |(name, tone, text): (&str, Tone, String)| {
            let name = screen.paint(Tone::Dim, format!("{name:<16}"));
            format!("  {name}{}", screen.paint(tone, text))
        };
        lines.extend(self.counted().into_iter().chain(self.measured()).map(row));
        for example in &self.comparison.examples {
            lines.push(format!("    {}", screen.paint(Tone::Bad, example)));
        }
        lines.push(String::new());
        lines.push(match self.holds() {
            true => {
                screen.paint(Tone::Good, "  Every committed change arrived, once and in order.")
            }
            false => {
                screen.paint(Tone::Bad, "  The proof has failed: the figures above say where.")
            }
        });
        if self.holds() {
            let next = "  Now with yours: walrace init postgres://user:password@host:5432/database";
            lines.push(screen.paint(Tone::Dim, next));
        }
        lines
    }

    fn counted(&self) -> Vec<(&'static str, Tone, String)> {
        let (counts, replay) = (&self.played.counts, &self.replay);
        let count = |counter: &AtomicU64| grouped(counter.load(Relaxed));
        let committed = format!(
            "{} changes in {} transactions",
            grouped(counts.committed()),
            count(&counts.transactions)
        );
        let delivered = match replay.twice + replay.disordered {
            0 => format!("{} changes, each once, in commit order", grouped(replay.delivered)),
            _ => format!(
                "{} changes, {} of them twice, {} out of order",
                grouped(replay.delivered),
                grouped(replay.twice),
                grouped(replay.disordered)
            ),
        };
        let lost = match self.invented() {
            0 => grouped(self.lost()),
            invented => format!("{}, and {} that nobody committed", self.lost(), grouped(invented)),
        };
        let rolled_back = format!(
            "{} transactions and {} savepoints; {} of their changes seen",
            count(&counts.rollbacks),
            count(&counts.savepoints),
            grouped(replay.undone)
        );
        vec![
            ("committed", Tone::Plain, committed),
            ("delivered", tone(replay.twice + replay.disordered), delivered),
            ("lost", good(self.lost() + self.invented()), lost),
            ("rolled back", tone(replay.undone), rolled_back),
            ("replayed", tone(self.differences()), self.replayed()),
        ]
    }

    fn replayed(&self) -> String {
        let equal = grouped(self.comparison.equal);
        match self.differences() {
            0 => format!(
                "{equal} rows in {} tables, equal to PostgreSQL's row for row",
                TABLES.len()
            ),
            _ => format!(
                "{equal} rows equal, {} different, {} changes without their row",
                grouped(self.comparison.different),
                grouped(self.replay.misfits)
            ),
        }
    }

    fn differences(&self) -> u64 {
        self.comparison.different + self.replay.misfits
    }

    fn measured(&self) -> Vec<(&'static str, Tone, String)> {
        let Played { counts, latencies, load, delivery, wal, .. } = &self.played;
        let latency = format!(
            "p50 {}   p99 {}   max {}",
            duration_text(latencies.per_mille(500)),
            duration_text(latencies.per_mille(990)),
            duration_text(latencies.max())
        );
        let of_load = |changes: u64| changes.saturating_sub(counts.filling.load(Relaxed));
        let rate = format!(
            "{} transactions/s; {} changes/s committed, {}/s delivered",
            grouped(per_second(counts.transactions.load(Relaxed), *load)),
            grouped(per_second(of_load(counts.committed()), *load)),
            grouped(per_second(of_load(self.replay.once()), *delivery))
        );
        let wal = format!(
            "{} not confirmed, {} kept by the slot",
            bytes_text(wal.unconfirmed),
            bytes_text(wal.kept)
        );
        vec![
            ("commit to sink", Tone::Plain, latency),
            ("rate", Tone::Plain, rate),
            ("WAL at the end", Tone::Plain, wal),
        ]
    }
}

fn tone(wrong: u64) -> Tone {
    if wrong == 0 { Tone::Plain } else { Tone::Bad }
}

fn good(wrong: u64) -> Tone {
    if wrong == 0 { Tone::Good } else { Tone::Bad }
}
