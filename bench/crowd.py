#!/usr/bin/env python3
"""Nine healthy sinks beside one that hangs, one that refuses a tenth of the keys, and one that is
down: how far are the nine behind, what does it cost, and where is what was refused?

    python3 bench/crowd.py [--rate 5000] [--seconds 60] [--keys 20000] [--folder /var/tmp]

Starts every server itself, ends them, and ends with 0 where everything holds, else with 1.
"""

import argparse
import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import measure
from latency import percentile
from postgres import Cluster, free_port
from measure import find_binary
from targets import Kafka, Nats, Postgres, RabbitMq, Redis

TABLE = "create table item (id bigint primary key, version bigint not null, note text)"
# Ten rows a transaction, one of them with an id that ends in 7.
CHANGES = 10
REFUSED = "7"
INSERT = ("insert into item select id, 1, md5(id::text) from generate_series({first}, {first} + 9) id "
          "on conflict (id) do update set version = item.version + 1;\n")
SAMPLE_S = 0.1
DRAIN_S = 120


def main():
    options = parse_arguments()
    # Ended from outside, it takes its servers along.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with ExitStack() as stack:
        crowd = Crowd(stack, options)
        seen = crowd.load()
        problems = crowd.judge(seen)
    for problem in problems:
        print(f"crowd: {problem}", file=sys.stderr)
    sys.exit(1 if problems else 0)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", type=int, default=5000, help="changes a second (default 5000)")
    parser.add_argument("--seconds", type=int, default=60, help="of the load (default 60)")
    parser.add_argument("--keys", type=int, default=20_000, help="rows (default 20000)")
    parser.add_argument("--lag-ms-max", type=int, default=1000,
                        help="how far a healthy sink may be behind (default 1000)")
    parser.add_argument("--memory-mib-max", type=int, default=400,
                        help="what walrace may take (default 400)")
    parser.add_argument("--folder", default="/var/tmp",
                        help="where servers and journal lie: a real disk (default /var/tmp)")
    parser.add_argument("--only", default="", metavar="KINDS",
                        help="these healthy sinks alone, such as kafka,nats (and the file)")
    parser.add_argument("--binary", type=Path, help="instead of the release binary")
    return parser.parse_args()


class Silence(threading.Thread):
    """Takes connections, and answers nothing."""

    def __init__(self):
        super().__init__(daemon=True)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.start()

    def run(self):
        held = []
        while True:
            held.append(self.listener.accept()[0])


class Receiver:
    """receiver.py as a process of its own; use it in a `with`."""

    def __init__(self, *refused):
        program = str(Path(__file__).parent / "receiver.py")
        self.child = subprocess.Popen([sys.executable, program, *refused], text=True,
                                      stdout=subprocess.PIPE, start_new_session=True)
        self.url = f"http://127.0.0.1:{int(self.child.stdout.readline())}/"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.child.kill()
        self.child.wait()

    def sink(self):
        return f'kind = "webhook"\nurl = "{self.url}"\n'

    def report(self):
        """Changes, those that came after a later version of their row, rows, sum of versions."""
        text = urllib.request.urlopen(self.url, timeout=10).read()
        return tuple(int(number) for number in text.split())


class Walrace:
    """`walrace run`; use it in a `with`, which stops it and removes its folder."""

    def __init__(self, binary, folder, url, sinks):
        self.folder = Path(tempfile.mkdtemp(prefix="walrace-bench-data-", dir=folder))
        self.file = self.folder / "lake.jsonl"
        self.log = self.folder / "walrace.log"
        sinks = {"lake": f'kind = "file"\npath = "{self.file}"\n', **sinks}
        text = "".join(f"[sink.{name}]\n{sink}" for name, sink in sinks.items())
        config = self.folder / "walrace.toml"
        config.write_text(f'data_dir = "{self.folder}/data"\n[source.app]\nkind = "postgres"\n'
                          f'url = "{url}"\ntables = ["public.item"]\n{text}'
                          '[http]\nlisten = "127.0.0.1:0"\n')
        with open(self.log, "w") as log:
            self.child = subprocess.Popen([str(binary), "-c", str(config), "run"], stdout=log,
                                          stderr=log, start_new_session=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.child.send_signal(signal.SIGTERM)
        try:
            self.child.wait(30)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def get(self, path):
        """The JSON that `path` answers; None while nobody does."""
        try:
            address = (self.folder / "data" / "http.addr").read_text().splitlines()[0]
            return json.load(urllib.request.urlopen(f"http://{address}{path}", timeout=10))
        except (OSError, IndexError):
            return None

    def status(self):
        """The journal's end and the sinks by name."""
        if self.child.poll() is not None:
            raise SystemExit("walrace ended:\n" + self.log.read_text()[-4000:])
        status = self.get("/status")
        if status is None:
            return 0, {}
        return status["sources"][0]["journal"]["end"], {s["name"]: s for s in status["sinks"]}

    def wait(self, what, condition, seconds=DRAIN_S):
        """Waits until the status is as it should be; whether it became so."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if condition(*self.status()):
                return True
            time.sleep(SAMPLE_S)
        print(f"crowd: waited {seconds} s for {what}", file=sys.stderr, flush=True)
        return False


class Seen:
    """What was seen of walrace while it ran: milliseconds behind by sink, CPU, memory."""

    def __init__(self):
        self.lags = {}
        self.cpu_seconds = 0.0
        self.busy_seconds = 0.0
        self.seconds = 0.0
        self.peak_mib = 0.0
        self.sinks = {}
        self.end = 0

    def take(self, walrace):
        self.end, self.sinks = walrace.status()
        for name, sink in self.sinks.items():
            self.lags.setdefault(name, []).append(sink["behind_ms"])


class Crowd:
    """The servers, walrace with its twelve sinks, and what is asked of them."""

    def __init__(self, stack, options):
        self.options = options
        note("starting the servers")
        self.source = stack.enter_context(Cluster(options.folder))
        self.source.sql(TABLE)
        self.hook, self.picky = (stack.enter_context(Receiver(*refused))
                                 for refused in ((), (REFUSED,)))
        redis = begin(stack, Redis(options.folder))
        url = f'url = "redis://127.0.0.1:{redis.port}"\n'
        healthy = {
            "redis_stream": redis.sink(),
            "redis_list": f'kind = "redis_list"\n{url}',
            "redis_string": f'kind = "redis_string"\n{url}',
            "redis_pubsub": f'kind = "redis_pubsub"\n{url}',
            "webhook": self.hook.sink(),
        }
        servers = {"kafka": Kafka, "nats": Nats, "rabbitmq": RabbitMq, "postgres": Postgres}
        # RabbitMQ beside the others is more than two cores carry.
        only = options.only.split(",") if options.only else [*healthy, "kafka", "nats", "postgres"]
        for name in filter(only.__contains__, servers):
            healthy[name] = begin(stack, servers[name](options.folder)).sink()
        healthy = {name: sink for name, sink in healthy.items() if name in only}
        self.healthy = ["lake", *healthy]
        bad = {
            "hangs": f'kind = "webhook"\nurl = "http://127.0.0.1:{Silence().port}/"\n'
                     "timeout_ms = 5000\n",
            "picky": self.picky.sink(),
            "down": f'kind = "redis_stream"\nurl = "redis://127.0.0.1:{free_port()}"\n'
                    'stream = "changes"\n',
        }
        url = self.source.url("unix", "postgres")
        binary = options.binary or find_binary()
        self.walrace = stack.enter_context(
            Walrace(binary, options.folder, url, {**healthy, **bad}))
        if not self.walrace.wait("the sinks to run", self.is_up):
            raise SystemExit(self.walrace.log.read_text()[-4000:])
        # The first write makes topics, streams and tables, which is not what is measured.
        self.source.sql(INSERT.format(first=0))
        if not self.walrace.wait("the first changes", self.is_warm):
            raise SystemExit(self.walrace.log.read_text()[-4000:])

    def is_warm(self, end, sinks):
        return end >= CHANGES and all(self.has(sinks, name, end) for name in self.healthy)

    def is_up(self, _end, sinks):
        names = [*self.healthy, "picky"]
        return all(sinks.get(name, {}).get("state") == "running" for name in names)

    def load(self):
        """Writes at an even pace, and samples walrace all the while."""
        options, seen, pid = self.options, Seen(), self.walrace.child.pid
        script = self.source.folder / "item.sql"
        script.write_text(f"\\set first 10 * random(0, {options.keys // CHANGES - 1})\n"
                          + INSERT.format(first=":first"))
        words = self.source.client("pgbench", "-n", "-c", 4, "-j", 1, "-R",
                                   options.rate // CHANGES, "-T", options.seconds, "-f", script)
        note(f"{options.rate} changes a second for {options.seconds} s")
        cpu, busy, began = measure.cpu_seconds(pid), busy_seconds(), time.monotonic()
        self.writer = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                       text=True, start_new_session=True)
        try:
            while self.writer.poll() is None:
                seen.take(self.walrace)
                self.show(seen, time.monotonic() - began)
                time.sleep(SAMPLE_S)
        finally:
            if self.writer.poll() is None:
                self.writer.kill()
        seen.seconds = time.monotonic() - began
        seen.cpu_seconds = measure.cpu_seconds(pid) - cpu
        seen.busy_seconds = busy_seconds() - busy
        # The last changes count too: until the healthy ones have them.
        self.walrace.wait("the healthy sinks", lambda end, sinks: self.follow(seen, end, sinks))
        seen.picky_late = time.monotonic()
        self.walrace.wait("the one that refuses", lambda end, sinks: self.has(sinks, "picky", end))
        seen.picky_late = time.monotonic() - seen.picky_late
        seen.end, seen.sinks = self.walrace.status()
        seen.peak_mib = measure.peak_mib(pid)
        return seen

    def follow(self, seen, end, sinks):
        for name, sink in sinks.items():
            seen.lags[name].append(sink["behind_ms"])
        return all(self.has(sinks, name, end) for name in self.healthy)

    def has(self, sinks, name, end):
        return name in sinks and sinks[name]["cursor"] >= end

    def show(self, seen, seconds):
        """A line each second, for who watches."""
        if len(seen.lags["lake"]) % round(5 / SAMPLE_S):
            return
        behind = max(seen.lags[name][-1] for name in self.healthy)
        picky = seen.sinks["picky"]
        note(f"{seconds:3.0f} s: {seen.end:,} changes, the healthy {behind} ms behind at most; "
             f"picky {picky['behind_ms']} ms, {picky['parked_changes']:,} parked; "
             f"{measure.peak_mib(self.walrace.child.pid):.0f} MiB")

    def judge(self, seen):
        """Prints the figures; gives what does not hold."""
        options, problems = self.options, []
        changes = seen.end
        print(f"{measure.machine()}\n\n{changes:,} changes in {seen.seconds:.0f} s ({changes / seen.seconds:,.0f}/s), "
              f"peak {seen.peak_mib:.0f} MiB, {seen.cpu_seconds / seen.seconds:.2f} cores; the "
              f"whole machine {seen.busy_seconds / seen.seconds:.2f} cores\n")
        print("| sink | max behind, ms | p99, ms | state at the end |\n|---|--:|--:|---|")
        for name in [*self.healthy, "picky", "hangs", "down"]:
            lags, sink = seen.lags[name], seen.sinks[name]
            print(f"| {name} | {max(lags):,} | {percentile(lags, 0.99):,} | {sink['state']} "
                  f"{sink.get('reason', '')[:90]} |")
            if name in self.healthy and max(lags) > options.lag_ms_max:
                problems.append(f"{name} was {max(lags)} ms behind")
            if name in self.healthy and not self.has(seen.sinks, name, seen.end):
                problems.append(f"{name} did not get everything")
        if changes < options.rate * options.seconds * 0.95:
            problems.append(f"only {changes:,} changes were written: the load was too slow")
        if seen.peak_mib > options.memory_mib_max:
            problems.append(f"{seen.peak_mib:.0f} MiB of memory")
        for name in ("hangs", "down"):
            if seen.sinks[name]["state"] != "waiting" or not seen.sinks[name].get("reason"):
                problems.append(f"{name} does not say why it waits: {seen.sinks[name]}")
        return problems + self.judge_parked(seen) + self.judge_delivered()

    def read_file(self):
        """Offset, row and version of each change, in the order of the file."""
        with open(self.walrace.file) as lines:
            for line in lines:
                change = json.loads(line)
                yield change["offset"], change["after"]["id"], change["after"]["version"]

    def judge_parked(self, seen):
        """What is parked is every change of the refused rows, in the order of each."""
        problems, expected, versions = [], [], {}
        for offset, row, version in self.read_file():
            if version <= versions.get(row, 0):
                problems.append(f"row {row}: version {version} is out of order in the file")
            versions[row] = version
            if str(row).endswith(REFUSED):
                expected.append(offset)
        letters = self.walrace.get("/dead-letters?sink=picky&limit=10000000") or []
        parked = [letter["offset"] for letter in letters]
        dead = seen.sinks["picky"]["dead_letters"]
        print(f"\nparked: {len(parked):,} of {len(expected):,} changes of refused rows, "
              f"{dead:,} of them dead letters; the last was {seen.picky_late:.1f} s late")
        if parked != expected:
            lacking = len(set(expected) - set(parked))
            problems.append(f"{lacking} refused changes are not parked, or out of order")
        return problems

    def judge_delivered(self):
        """The receivers have every change of the other rows, in the order of each."""
        problems = []
        for name, receiver, refused in (("webhook", self.hook, None),
                                        ("picky", self.picky, REFUSED)):
            if name not in [*self.healthy, "picky"]:
                continue
            count, late, last = 0, 0, {}
            for _, row, version in self.read_file():
                if refused is None or not str(row).endswith(refused):
                    count += 1
                    last[row] = version
            told, late, rows, versions = receiver.report()
            print(f"{name}: {told:,} of {count:,} changes of {rows:,} rows came, {late} out of order")
            if (told, late, rows, versions) != (count, 0, len(last), sum(last.values())):
                problems.append(f"{name} got something else than was written")
        return problems


def begin(stack, server):
    """Starts a server that is ended even where its start is cut short."""
    stack.push(server)
    return server.__enter__()


def busy_seconds():
    """Seconds for which the cores of the machine were busy since its start."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _idle, _wait, *others = map(int, fields)
    return (user + nice + system + sum(others[:3])) / measure.TICKS


def note(text):
    print(f"bench: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
