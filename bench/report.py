"""The tables of a run, as Markdown, and their place in bench/README.md."""

from datetime import datetime, timezone
from pathlib import Path
from statistics import median

README = Path(__file__).parent / "README.md"


def drain_table(name, backlog, runs):
    """One workload: runs of each candidate by name; the first is the yardstick.

    A ratio is the median of the ratios to the yardstick's run of the same round.
    """
    yardstick = next(iter(runs.values()))
    changes = backlog.workload.changes
    lines = [f"**{name}**: {changes:,} {backlog.workload.about}, {backlog.wal_bytes / 1e6:.0f} MB "
             "of WAL", "",
             "| candidate | changes/s | ratio (min to max) | CPU us/change: walsender | client "
             "| peak MiB |", "|---|--:|--:|--:|--:|--:|"]
    for candidate, of_rounds in runs.items():
        ratios = [base.seconds / run.seconds for base, run in zip(yardstick, of_rounds)]
        rate = median(changes / run.seconds for run in of_rounds)
        sender = median(run.walsender_cpu for run in of_rounds) / changes * 1e6
        client = median(run.client_cpu for run in of_rounds) / changes * 1e6
        peak = max(run.peak_mib for run in of_rounds)
        lines.append(f"| {candidate} | {rate:,.0f} | **{median(ratios):.2f}** ({min(ratios):.2f} to "
                     f"{max(ratios):.2f}) | {sender:.1f} | {client:.1f} | {peak:.0f} |")
    return "\n".join(lines)


def latency_table(results):
    lines = ["**latency** at 1,000 durable commits a second, from `clock_timestamp()` in the row to "
             "the line in the file", "", "| reader | p50 ms | p99 ms | rows |", "|---|--:|--:|--:|"]
    lines += [f"| {name} | {p50:.1f} | {p99:.1f} | {rows:,} |"
              for name, (p50, p99, rows) in results.items()]
    return "\n".join(lines)


def load_table(rates):
    base = median(rates["pg_recvlogical"])
    lines = ["**pgbench on the source** with a reader attached", "",
             "| reader | transactions/s | ratio |", "|---|--:|--:|"]
    lines += [f"| {name} | {median(of_rounds):,.0f} | {median(of_rounds) / base:.2f} |"
              for name, of_rounds in rates.items()]
    return "\n".join(lines)


def sink_table(rates):
    """By kind, the rates of loader and sink of each round."""
    lines = ["| sink | loader | loader, /s | sink, changes/s | ratio (min to max) |",
             "|---|---|--:|--:|--:|"]
    for kind, of_rounds in rates.items():
        ratios = [sink / loader for loader, sink in of_rounds]
        loaders, sinks = zip(*of_rounds)
        name = kind.name.removesuffix("_written").removesuffix("_group")
        lines.append(f"| `{name}` | {kind.loader_name} | {median(loaders):,.0f} | "
                     f"{median(sinks):,.0f} | **{median(ratios):.2f}** ({min(ratios):.2f} to "
                     f"{max(ratios):.2f}) |")
    return "\n".join(lines)


def arrival_table(waits, seconds):
    """By kind, the milliseconds to each change that was written in that time."""
    lines = ["**latency** at 5,000 changes a second, from `clock_timestamp()` in the row to a "
             "consumer of the target", "",
             "| sink | p50 ms | p95 ms | p99 ms | max ms | changes/s |", "|---|--:|--:|--:|--:|--:|"]
    for kind, of_rows in waits.items():
        ordered = sorted(of_rows)
        at = [ordered[int((len(ordered) - 1) * share)] for share in (0.5, 0.95, 0.99, 1)]
        lines.append(f"| `{kind.name}` | " + " | ".join(f"{ms:.1f}" for ms in at)
                     + f" | {len(ordered) / seconds:,.0f} |")
    return "\n".join(lines)


def heading(machine, server, rounds):
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    return (f"{now}, {machine}, {server}; medians of {rounds} interleaved rounds, fsync on, WAL in "
            "the page cache.")


def write_into(name, parts):
    """Replaces what stands between the markers of this name in bench/README.md."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = README.read_text().split(begin, 1)
    after = rest.split(end, 1)[1]
    README.write_text(before + begin + "\n" + "\n\n".join(parts) + "\n" + end + after)
