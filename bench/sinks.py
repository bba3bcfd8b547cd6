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
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import arrivals
import measure
import report
from postgres import Cluster
from http_targets import HttpPull, HttpPullGroup, OpenSearch, Webhook, WebhookWritten
from targets import Kafka, Postgres, Redis

TABLE = ("create table item (id bigint primary key, name text, price numeric(12,2), "
         "changed timestamptz, note text)")
ROWS = ("insert into item select i, 'item ' || i, (i % 10000) / 100.0, now(), "
        "md5(i::text) || md5((i + 1)::text) from generate_series({first}, {last}) i")
LIMIT_S = 600
KINDS = (Redis, Kafka, Postgres, Webhook, WebhookWritten, HttpPull, HttpPullGroup,
         OpenSearch)


class Walrace:
    """`walrace run` on one data_dir, started as often as wanted."""

    def __init__(self, binary, folder, url):
        self.binary = binary
        self.folder = Path(tempfile.mkdtemp(prefix="walrace-bench-data-", dir=folder))
        self.source = (f'[source.app]\nkind = "postgres"\nurl = "{url}"\n'
                       'tables = ["public.item", "public.tick"]\n')

    @contextmanager
    def running(self, sinks):
        config = self.folder / "walrace.toml"
        config.write_text(f'data_dir = "{self.folder}/data"\n{self.source}{sinks}'
                          '[http]\nlisten = "127.0.0.1:0"\n')
        log = open(self.folder / "walrace.log", "w")
        self.child = subprocess.Popen([str(self.binary), "-c", str(config), "run"], stdout=log,
                                      stderr=log)
        try:
            yield
        finally:
            self.child.send_signal(signal.SIGTERM)
            self.child.wait(30)

    def run(self, sinks, done):
        """Runs with these sinks until `done` gives something of the metrics, and gives that."""
        with self.running(sinks):
            return self.wait(done)

    def wait(self, done):
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline and self.child.poll() is None:
            result = done(self.metrics())
            if result is not None:
                return result
            time.sleep(0.02)
        raise SystemExit((self.folder / "walrace.log").read_text()[-4000:])

    def address(self):
        return (self.folder / "data" / "http.addr").read_text().splitlines()[0]

    def metrics(self):
        try:
            url = f"http://{self.address()}/metrics"
            text = urllib.request.urlopen(url, timeout=5).read().decode()
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


class Bench:
    """A source whose changes the journal holds."""

    def __init__(self, source, folder, rows):
        self.source, self.rows = source, rows
        source.sql(f"{TABLE}; {arrivals.TABLE}")
        self.walrace = Walrace(measure.find_binary(), folder, source.url("unix", "postgres"))
        self.walrace.run("", lambda metrics: journal_end(metrics) is not None or None)
        for first in range(1, rows + 1, 1_000):
            source.sql(ROWS.format(first=first, last=min(first + 999, rows)))
        self.walrace.run("", lambda metrics: journal_end(metrics) == rows or None)

    def end(self):
        """The end of the journal, while nothing is written at the source."""
        return int(self.walrace.run("", journal_end))

    def wait_for_rows(self, name):
        """Until the sink has all that the journal has, and that is more than before."""
        first = self.rows

        def done(metrics):
            end = journal_end(metrics)
            return True if end and end > first and cursor(metrics, name) == end else None

        self.walrace.wait(done)

    def sink_text(self, name, first, batch, text):
        return f'[sink.{name}]\nfrom = "{first}"\nbatch_changes_max = {batch}\n{text}'

    def is_open(self, metrics, name):
        return cursor(metrics, name) is not None

    def rate(self, target, name, first):
        """Changes a second from the first that is seen to be delivered to the last."""
        if hasattr(target, "deliver"):
            return target.deliver(self, name, first)
        began = None

        def done(metrics):
            nonlocal began
            now, at = time.monotonic(), cursor(metrics, name)
            if at and at > first and began is None:
                began = (now, at)
            if at == self.rows and began is not None:
                return (self.rows - began[1]) / (now - began[0])
            return None

        batch = getattr(target, "batch", 10_000)
        return self.walrace.run(self.sink_text(name, first, batch, target.sink()), done)

    def compare(self, kind, number, folder):
        """The rates of the loader and of the sink."""
        rows = min(self.rows, getattr(kind, "rows_max", self.rows))
        name = f"{kind.name}_{number}"
        with kind(folder) as target:
            loaded = target.load(rows, self)
            rates = (loaded, self.rate(target, name, self.rows - rows))
        print(f"bench: {name}: loader {rates[0]:,.0f}/s, sink {rates[1]:,.0f}/s",
              file=sys.stderr, flush=True)
        return rates


def measure_all(options):
    """Rates round by round, then latencies; prints the tables and writes them down."""
    chosen = [kind for kind in KINDS if not options.only or kind.name in options.only]
    rates = {kind: [] for kind in chosen}
    with Cluster(options.folder) as source:
        bench = Bench(source, options.folder, options.rows)
        for number in range(options.rounds):
            for kind in chosen:
                rates[kind].append(bench.compare(kind, number, options.folder))
        waits = {kind: arrivals.measure(bench, kind, options.seconds, options.folder)
                 for kind in chosen if options.seconds and hasattr(kind, "consumer")}
        bench.walrace.remove()
    parts = [report.heading(measure.machine(), "a release build", options.rounds)]
    parts += [report.sink_table(rates)] if options.rounds else []
    parts += [report.arrival_table(waits, options.seconds)] if waits else []
    print("\n\n".join(parts))
    if options.write and not options.only and options.rounds and options.seconds:
        report.write_into("sinks", parts)


def parse_arguments(words=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=400_000,
                        help="changes in the journal (default 400000)")
    parser.add_argument("--rounds", type=int, default=3,
                        help="of loader and sink; 0: latency alone (default 3)")
    parser.add_argument("--seconds", type=int, default=30,
                        help="of each latency; 0: none (default 30)")
    parser.add_argument("--only", action="append", choices=[kind.name for kind in KINDS],
                        help="this sink alone; may be repeated; leaves bench/README.md as it is")
    parser.add_argument("--folder", default="/var/tmp",
                        help="where servers and journals lie: a real disk (default /var/tmp)")
    parser.add_argument("--no-write", dest="write", action="store_false",
                        help="leave bench/README.md as it is")
    return parser.parse_args(words)


if __name__ == "__main__":
    measure_all(parse_arguments())
