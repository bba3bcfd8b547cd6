"""Those that drain a backlog: the yardstick, Walrace in its variants, and Debezium."""

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from measure import Run, WalsenderWatch, cpu_seconds, peak_mib, pin_child

DRAIN_LIMIT_S = 600


class Yardstick:
    """`pg_recvlogical` to /dev/null: what PostgreSQL's own client reaches."""

    def __init__(self, transport):
        self.name = f"pg_recvlogical, {transport}"
        self.transport = transport

    def drain(self, cluster, backlog, slot):
        watch = WalsenderWatch(cluster)
        words = stream_command(cluster, backlog.database, slot, "/dev/null", self.transport)
        child = subprocess.Popen(words + ["-E", backlog.end_lsn], preexec_fn=pin_child)
        return timed(child, watch)


class Discard:
    """A reader that keeps nothing, compiled from discard.rs: the ceiling of this machine."""

    PERIOD_US = {"unix": 150, "tcp": 500}

    def __init__(self, transport, folder):
        self.name = f"discard everything, {transport}"
        self.transport = transport
        self.binary = Path(folder) / "walrace-bench-discard"
        if not self.binary.exists():
            subprocess.run(["rustc", "--edition=2024", "-O", "-o", str(self.binary),
                            str(Path(__file__).parent / "discard.rs")], check=True)

    def drain(self, cluster, backlog, slot):
        watch = WalsenderWatch(cluster)
        words = [str(self.binary), host_of(cluster, self.transport), str(cluster.port),
                 backlog.database, slot, backlog.end_lsn, str(self.PERIOD_US[self.transport])]
        return timed(subprocess.Popen(words, preexec_fn=pin_child), watch)


def timed(child, watch):
    """Waits for a reader that ends by itself."""
    _, status, usage = os.wait4(child.pid, 0)
    ended = time.monotonic()
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"{child.args[0]} ended with {child.returncode}")
    began = watch.stop()
    cpu = usage.ru_utime + usage.ru_stime
    return Run(ended - began, cpu, watch.cpu, usage.ru_maxrss / 1024)


def host_of(cluster, transport):
    return "127.0.0.1" if transport == "tcp" else str(cluster.folder)


def stream_command(cluster, database, slot, file, transport="unix"):
    """The command line of pg_recvlogical for a slot of the publication `bench`."""
    host = host_of(cluster, transport)
    return [str(cluster.bin / "pg_recvlogical"), "-h", host, "-p", str(cluster.port), "-U",
            "postgres", "-d", database, "-S", slot, "--start", "--no-loop", "-f", file,
            "-s", "1", "-o", "proto_version=1", "-o", "publication_names=bench"]


class Walrace:
    """The release binary: its journal alone, or with the file sink beside it."""

    def __init__(self, binary, transport, sinks, folder):
        what = "journal + file" if sinks else "journal"
        self.name = f"walrace {what}, {transport}"
        self.binary, self.transport, self.sinks, self.folder = binary, transport, sinks, folder

    def drain(self, cluster, backlog, slot):
        watch = WalsenderWatch(cluster)
        url = cluster.url(self.transport, backlog.database)
        with Instance(self.binary, url, slot, self.sinks, self.folder, pinned=True) as instance:
            expected = backlog.workload.changes + 1
            deadline = time.monotonic() + DRAIN_LIMIT_S
            while instance.changes_done() < expected:
                instance.check(deadline)
                time.sleep(0.02)
            ended = time.monotonic()
            client = cpu_seconds(instance.pid)
            peak = peak_mib(instance.pid)
            began = watch.stop()
            return Run(ended - began, client, watch.cpu, peak)


class Instance:
    """A running `walrace run`; use it in a `with`, which stops it and removes its folder."""

    def __init__(self, binary, url, slot, sinks, folder, pinned=False, more=""):
        self.folder = Path(tempfile.mkdtemp(prefix="walrace-bench-data-", dir=folder))
        self.file = self.folder / "changes.jsonl"
        self.sinks = sinks
        sink = f'[sink.lake]\nkind = "file"\npath = "{self.file}"\n' if sinks else ""
        (self.folder / "walrace.toml").write_text(
            f'data_dir = "{self.folder}/data"\n[source.app]\nkind = "postgres"\nurl = "{url}"\n'
            f'slot = "{slot}"\npublication = "bench"\n{more}{sink}[http]\nlisten = "127.0.0.1:0"\n')
        self.log = self.folder / "walrace.log"
        log = open(self.log, "w")
        self.child = subprocess.Popen(
            [str(binary), "-c", str(self.folder / "walrace.toml"), "run"], stdout=log, stderr=log,
            preexec_fn=pin_child if pinned else None)
        self.pid = self.child.pid

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.child.poll() is None:
            self.child.send_signal(signal.SIGTERM)
            try:
                self.child.wait(30)
            except subprocess.TimeoutExpired:
                self.child.kill()
                self.child.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def check(self, deadline):
        """Fails, with the log, where it has ended or takes too long."""
        ended = self.child.poll()
        if ended is not None or time.monotonic() > deadline:
            why = "takes too long" if ended is None else f"ended with {ended}"
            raise RuntimeError(f"walrace {why}:\n" + self.log.read_text()[-4000:])

    def metrics(self):
        """The samples of /metrics by name, summed over labels; empty while it does not answer."""
        address = self.folder / "data" / "http.addr"
        try:
            url = f"http://{address.read_text().splitlines()[0]}/metrics"
            text = urllib.request.urlopen(url, timeout=5).read().decode()
        except (OSError, IndexError, urllib.error.URLError):
            return {}
        samples = {}
        for name, value in re.findall(r"^([a-z_]+)(?:\{[^}]*\})? ([0-9.eE+-]+)", text, re.M):
            samples[name] = samples.get(name, 0.0) + float(value)
        return samples

    def changes_done(self):
        """How many changes the journal has durably, and the sink too where there is one.

        Offsets are dense, so their differences count changes. This is the only place that knows
        the names of Walrace's metrics.
        """
        samples = self.metrics()
        start = samples.get("walrace_journal_start_offset")
        end = samples.get("walrace_journal_end_offset")
        if start is None or end is None:
            return 0
        done = end - start
        if self.sinks:
            done = min(done, samples.get("walrace_sink_cursor", start) - start)
        return done
