"""How fast sinks deliver, each beside the fastest public loader of its own target, in one run.

    python3 bench/sinks.py [--rows 400000] [--rounds 3] [--only redis_stream,kafka,postgres]

The changes are captured before: what is timed is journal -> sink alone.
"""

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from statistics import median

import measure
import report
from postgres import Cluster
from run import find_binary
from targets import Kafka, Postgres, Redis

TABLE = ("create table item (id bigint primary key, name text, price numeric(12,2), "
         "changed timestamptz, note text)")
ROWS = ("insert into item select i, 'item ' || i, (i % 10000) / 100.0, now(), "
        "md5(i::text) || md5((i + 1)::text) from generate_series({first}, {last}) i")
LIMIT_S = 600


class Walrace:
    """`walrace run` on one data_dir, started as often as wanted."""

    def __init__(self, binary, folder, url):
        self.binary = binary
        self.folder = Path(tempfile.mkdtemp(prefix="walrace-bench-data-", dir=folder))
        self.source = f'[source.app]\nkind = "postgres"\nurl = "{url}"\ntables = ["public.item"]\n'

    def run(self, sinks, done):
        """Runs with these sinks until `done` gives something of the metrics, and gives that."""
        config = self.folder / "walrace.toml"
        config.write_text(f'data_dir = "{self.folder}/data"\n{self.source}{sinks}'
                          '[http]\nlisten = "127.0.0.1:0"\n')
        log = open(self.folder / "walrace.log", "w")
        child = subprocess.Popen([str(self.binary), "-c", str(config), "run"], stdout=log,
                                 stderr=log)
        deadline = time.monotonic() + LIMIT_S
        try:
            while time.monotonic() < deadline and child.poll() is None:
                result = done(self.metrics())
                if result is not None:
                    return result
                time.sleep(0.02)
            raise SystemExit((self.folder / "walrace.log").read_text()[-4000:])
        finally:
            child.send_signal(signal.SIGTERM)
            child.wait(30)

    def metrics(self):
        try:
            address = (self.folder / "data" / "http.addr").read_text().splitlines()[0]
            text = urllib.request.urlopen(f"http://{address}/metrics", timeout=5).read().decode()
        except (OSError, IndexError):
            return {}
        lines = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in lines}

    def remove(self):
        shutil.rmtree(self.folder, ignore_errors=True)


def journal_end(metrics):
    return metrics.get('walrace_journal_end_offset{source="app"}')


def cursor(metrics, sink):
    return metrics.get(f'walrace_sink_cursor{{sink="{sink}",source="app"}}')


def rate(walrace, target, name, rows):
    """Changes a second from the first that is seen to be delivered to the last."""
    first = None

    def done(metrics):
        nonlocal first
        now, at = time.monotonic(), cursor(metrics, name)
        if at and first is None:
            first = (now, at)
        if at == rows and first is not None:
            return (rows - first[1]) / (now - first[0])
        return None

    return walrace.run(f'[sink.{name}]\nbatch_changes_max = 10000\n{target.sink()}', done)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="redis_stream,kafka,postgres")
    parser.add_argument("--folder", default="/tmp")
    options = parser.parse_args()
    chosen = [kind for kind in (Redis, Kafka, Postgres) if kind.name in options.only.split(",")]
    lines = ["| sink | loader | loader, /s | sink, changes/s | ratio (min to max) |",
             "|---|---|--:|--:|--:|"]
    with Cluster(options.folder) as source:
        source.sql(TABLE)
        walrace = Walrace(find_binary(), options.folder, source.url("unix", "postgres"))
        walrace.run("", lambda metrics: journal_end(metrics) is not None or None)
        for first in range(1, options.rows + 1, 1_000):
            last = min(first + 999, options.rows)
            source.sql(ROWS.format(first=first, last=last))
        walrace.run("", lambda metrics: journal_end(metrics) == options.rows or None)
        for kind in chosen:
            rates = []
            for number in range(options.rounds):
                with kind(options.folder) as target:
                    loaded = target.load(options.rows, (source, "postgres", "item"))
                    name = f"{kind.name}_{number}"
                    rates.append((loaded, rate(walrace, target, name, options.rows)))
                    print(f"bench: {name}: loader {loaded:,.0f}/s, sink {rates[-1][1]:,.0f}/s",
                          file=sys.stderr, flush=True)
            ratios = [sink / loader for loader, sink in rates]
            lines.append(f"| `{kind.name}` | {kind.loader_name} | "
                         f"{median(loader for loader, _ in rates):,.0f} | "
                         f"{median(sink for _, sink in rates):,.0f} | **{median(ratios):.2f}** "
                         f"({min(ratios):.2f} to {max(ratios):.2f}) |")
        walrace.remove()
    print(report.heading(measure.machine(), "a release build", options.rounds))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
