//! Every metric's name and labels in one place.

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::{Registry, Unit},
};

use crate::{
    catalog::BackfillState,
    runtime::{BackfillStatus, SinkStatus, SourceStatus, Status},
    sink::Totals,
};

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct SourceLabels {
    source: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct SinkLabels {
    sink: String,
    source: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct BackfillLabels {
    backfill: u64,
    source: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Build {
    version: String,
}

type SourceGauge = (&'static str, &'static str, Option<Unit>, fn(&SourceStatus) -> Option<u64>);
type SinkGauge = (&'static str, &'static str, Option<Unit>, fn(&SinkStatus) -> Option<u64>);

const SOURCE_GAUGES: [SourceGauge; 12] = [
    ("source_up", "1 while the source is captured", None, |s| Some(s.state.is_running().into())),
    (
        "source_behind",
        "WAL that the server has written and we have not confirmed",
        Some(Unit::Bytes),
        |s| s.behind_bytes,
    ),
    ("source_retained_wal", "WAL that the server keeps for our slot", Some(Unit::Bytes), |s| {
        s.retained_wal_bytes
    }),
    ("source_spool", "Disk that transactions take that are still open", Some(Unit::Bytes), |s| {
        Some(s.spool_bytes)
    }),
    ("source_confirmed_lsn", "The LSN that the slot may forget up to", None, |s| {
        s.confirmed.map(|lsn| lsn.0)
    }),
    ("journal", "Disk that the journal takes", Some(Unit::Bytes), |s| Some(s.journal.bytes)),
    ("journal_bytes_max", "The limit of the journal; 0 is none", None, |s| {
        Some(s.journal_bytes_max)
    }),
    ("journal_reserve", "What stays free on the journal's volume", Some(Unit::Bytes), |s| {
        Some(s.journal_reserve_bytes)
    }),
    ("journal_free", "What is free on the journal's volume", Some(Unit::Bytes), |s| {
        s.journal_free_bytes
    }),
    ("journal_start_offset", "The oldest offset in the journal", None, |s| Some(s.journal.start)),
    ("journal_end_offset", "The offset after the last durable commit", None, |s| {
        Some(s.journal.end)
    }),
    ("journal_segments", "Segments on disk", None, |s| Some(s.journal.segments as u64)),
];

const SINK_GAUGES: [SinkGauge; 11] = [
    ("sink_up", "1 while the sink is delivering", None, |s| Some(s.state.is_running().into())),
    ("sink_cursor", "The offset after the last change that the sink has", None, |s| Some(s.cursor)),
    ("sink_lost_changes", "Offsets that the sink will never get, for want of disk", None, |s| {
        Some(s.lost_changes)
    }),
    (
        "sink_parked_changes",
        "Changes that were refused, and those that wait behind them",
        None,
        |s| Some(s.parked_changes),
    ),
    (
        "sink_parked_changes_max",
        "The limit of the parked changes; at it the sink waits",
        None,
        |s| Some(s.parked_changes_max),
    ),
    ("sink_parked", "Bytes of rows of the parked changes", Some(Unit::Bytes), |s| {
        Some(s.parked_bytes)
    }),
    ("sink_dead_letters", "Parked changes that are not tried by themselves any more", None, |s| {
        Some(s.dead_letters)
    }),
    (
        "sink_unmatched_columns",
        "Columns that a mask or drop names in full and that no table had since the start",
        None,
        |s| Some(s.unmatched_columns),
    ),
    ("sink_behind_changes", "Changes in the journal that the sink does not have", None, |s| {
        Some(s.behind_changes)
    }),
    ("sink_behind", "Journal bytes that the sink has not passed", Some(Unit::Bytes), |s| {
        Some(s.behind_bytes)
    }),
    (
        "sink_behind",
        "Age of the oldest change that the sink does not have",
        Some(Unit::Seconds),
        |s| Some(s.behind_ms / 1000),
    ),
];

type BackfillGauge = (&'static str, &'static str, Option<Unit>, fn(&BackfillStatus) -> u64);
/// Of those that have not ended.
const BACKFILL_GAUGES: [BackfillGauge; 6] = [
    ("backfill_running", "1 while the backfill is read or waits for its turn", None, |b| {
        matches!(b.state, BackfillState::Queued | BackfillState::Running).into()
    }),
    ("backfill_blocks", "Blocks of the tables that are read", None, |b| b.blocks),
    ("backfill_blocks_done", "Blocks whose rows are in the journal", None, |b| b.blocks_done),
    ("backfill_rows", "Rows that were read", None, |b| b.rows),
    ("backfill_read", "Bytes of the rows that were read", Some(Unit::Bytes), |b| b.bytes),
    ("backfill_chunks_again", "Chunks that had to be read again, since the start", None, |b| {
        b.chunks_again
    }),
];

type Sum = (&'static str, &'static str, fn(&Totals) -> u64);
const SUMS: [Sum; 5] = [
    ("sink_delivered_changes", "Changes delivered since the start", |t| t.changes),
    ("sink_delivered_bytes", "Bytes of rows delivered since the start", |t| t.bytes),
    ("sink_batches", "Batches delivered since the start", |t| t.batches),
    ("sink_refused_changes", "Changes that the target or a rule refused, since the start", |t| {
        t.refused
    }),
    ("sink_failures", "Attempts that failed since the start", |t| t.failures),
];

const CAPTURED: &str = "source_changes";

/// The content type of what [`render`] gives.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The Prometheus exposition of a status, in the text format that every scraper reads.
pub fn render(status: &Status) -> String {
    let mut registry = Registry::with_prefix("walrace");
    let build = Family::<Build, Gauge>::default();
    registry.register("build_info", "The version that runs", build.clone());
    build.get_or_create(&Build { version: status.version.clone() }).set(1);
    for (name, help, unit, value) in SOURCE_GAUGES {
        let family = Family::<SourceLabels, Gauge>::default();
        register(&mut registry, (name, help, unit), family.clone());
        for source in &status.sources {
            let labels = SourceLabels { source: source.name.clone() };
            if let Some(value) = value(source) {
                family.get_or_create(&labels).set(i64::try_from(value).unwrap_or(i64::MAX));
            }
        }
    }
    for (name, help, unit, value) in SINK_GAUGES {
        let family = Family::<SinkLabels, Gauge>::default();
        register(&mut registry, (name, help, unit), family.clone());
        for sink in &status.sinks {
            if let Some(value) = value(sink) {
                let value = i64::try_from(value).unwrap_or(i64::MAX);
                family.get_or_create(&labels(sink)).set(value);
            }
        }
    }
    for (name, help, unit, value) in BACKFILL_GAUGES {
        let family = Family::<BackfillLabels, Gauge>::default();
        register(&mut registry, (name, help, unit), family.clone());
        for one in status.backfills.iter().filter(|one| !one.state.has_ended()) {
            let labels = BackfillLabels { backfill: one.id, source: one.asked.source.clone() };
            let value = i64::try_from(value(one)).unwrap_or(i64::MAX);
            family.get_or_create(&labels).set(value);
        }
    }
    render_counters(&mut registry, status);
    let mut text = String::new();
    match encode(&mut text, &registry) {
        Ok(()) => text.lines().map(plain_text).collect(),
        Err(error) => format!("# cannot encode the metrics: {error}\n"),
    }
}

/// OpenMetrics names a counter without the suffix of its samples; the plain text format with it.
fn plain_text(line: &str) -> String {
    let mut words = line.splitn(4, ' ');
    let counters = SUMS.map(|(name, ..)| name);
    match (words.next(), words.next(), words.next(), words.next()) {
        (Some("#"), Some("EOF" | "UNIT"), ..) => String::new(),
        (Some("#"), Some(kind), Some(name), Some(rest)) => {
            let own = name.trim_start_matches("walrace_");
            let counter = own == CAPTURED || counters.contains(&own);
            let suffix = if counter { "_total" } else { "" };
            format!("# {kind} {name}{suffix} {rest}\n")
        }
        _ => format!("{line}\n"),
    }
}

fn render_counters(registry: &mut Registry, status: &Status) {
    let captured = Family::<SourceLabels, Counter>::default();
    registry.register(CAPTURED, "Changes captured since the start", captured.clone());
    for source in &status.sources {
        let labels = SourceLabels { source: source.name.clone() };
        captured.get_or_create(&labels).inc_by(source.captured_changes);
    }
    for (name, help, value) in SUMS {
        let family = Family::<SinkLabels, Counter>::default();
        registry.register(name, help, family.clone());
        for sink in &status.sinks {
            family.get_or_create(&labels(sink)).inc_by(value(&sink.totals));
        }
    }
}

fn labels(sink: &SinkStatus) -> SinkLabels {
    SinkLabels { sink: sink.name.clone(), source: sink.source.clone() }
}

fn register(
    registry: &mut Registry,
    (name, help, unit): (&'static str, &'static str, Option<Unit>),
    metric: impl prometheus_client::registry::Metric,
) {
    match unit {
        Some(unit) => registry.register_with_unit(name, help, unit, metric),
        None => registry.register(name, help, metric),
    }
}
