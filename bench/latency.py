"""A quiet stream's latency, and what capture costs the application."""

import json
import os
import re
import signal
import subprocess
import tempfile
import time
from datetime import datetime
from pathlib import Path

from candidates import Instance, stream_command

RATE = 1000
TEXT_TIME = re.compile(rb"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?:\.\d+)?)\+00")


def percentile(values, share):
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)]


def times_in_json(chunk):
    """The `at` of each row of a piece of JSON Lines, as seconds since 1970."""
    for line in chunk.splitlines():
        change = json.loads(line)
        at = (change.get("after") or {}).get("at")
        if change.get("source_table") == "tick" and at:
            yield datetime.fromisoformat(at).timestamp()


def times_in_pgoutput(chunk):
    """The `at` of each row in what pg_recvlogical wrote of a pgoutput stream."""
    for text in TEXT_TIME.findall(chunk):
        yield datetime.fromisoformat(text.decode() + "+00:00").timestamp()


def follow(path, writer, times_in, ends_with_line):
    """Reads a growing file until the writer has ended and all has come: seconds to each row."""
    waits, rest, quiet_since = [], b"", None
    while not path.exists():
        time.sleep(0.01)
    with open(path, "rb", buffering=0) as file:
        while quiet_since is None or time.monotonic() - quiet_since < 2:
            chunk = file.read(1 << 20)
            now = time.time()
            if not chunk:
                if writer.poll() is not None and quiet_since is None:
                    quiet_since = time.monotonic()
                time.sleep(0.0005)
                continue
            quiet_since = None
            chunk = rest + chunk
            cut = chunk.rfind(b"\n") + 1 if ends_with_line else len(chunk)
            chunk, rest = chunk[:cut], chunk[cut:]
            waits.extend(now - at for at in times_in(chunk))
    return waits


def start_writer(cluster, database, seconds,
                 statement="insert into tick (at) values (clock_timestamp());", clients=4):
    """A thousand durable transactions a second; each row carries its own time."""
    script = cluster.folder / "tick.sql"
    script.write_text(statement + "\n")
    words = cluster.client("pgbench", "-n", "-c", clients, "-j", "1", "-R", RATE, "-T", seconds,
                           "-f", script, database=database)
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def prepare(cluster, database, tables):
    cluster.sql(f"create database {database}")
    cluster.sql(tables + "create publication bench for all tables;", database)


def new_slot(cluster, database, slot):
    cluster.sql(f"select pg_create_logical_replication_slot('{slot}', 'pgoutput')", database)


def drop_slot(cluster, slot):
    """A slot whose client has just gone may be held for a moment."""
    for _ in range(100):
        try:
            cluster.sql(f"select pg_drop_replication_slot('{slot}')")
            return
        except RuntimeError:
            time.sleep(0.1)
    raise RuntimeError(f"the slot {slot} stays active")


def wait_for_stream(cluster, check=lambda: None):
    for _ in range(1000):
        if cluster.walsenders():
            return
        check()
        time.sleep(0.02)
    raise RuntimeError("the stream did not begin within 20 s")


def start_reader(cluster, database, slot, file):
    # When it is told to stop, pg_recvlogical calls that an unexpected termination.
    words = stream_command(cluster, database, slot, file)
    return subprocess.Popen(words, stderr=subprocess.DEVNULL)


def end(child):
    child.send_signal(signal.SIGINT)
    child.wait()


def measure_latency(cluster, binary, folder, seconds):
    """Median and 99th percentile from clock_timestamp() in the row to the line in the file, ms."""
    prepare(cluster, "bench_latency", "create table tick (id bigserial primary key, "
            "at timestamptz not null);")
    results = {}
    new_slot(cluster, "bench_latency", "tick_yardstick")
    path = Path(tempfile.mkstemp(prefix="walrace-bench-", dir=folder)[1])
    reader = start_reader(cluster, "bench_latency", "tick_yardstick", str(path))
    try:
        wait_for_stream(cluster)
        writer = start_writer(cluster, "bench_latency", seconds)
        results["pg_recvlogical"] = follow(path, writer, times_in_pgoutput, False)
    finally:
        end(reader)
        path.unlink()
    drop_slot(cluster, "tick_yardstick")
    if binary:
        new_slot(cluster, "bench_latency", "tick_walrace")
        url = cluster.url("unix", "bench_latency")
        with Instance(binary, url, "tick_walrace", True, folder) as instance:
            deadline = time.monotonic() + 60
            wait_for_stream(cluster, lambda: instance.check(deadline))
            writer = start_writer(cluster, "bench_latency", seconds)
            results["walrace, file sink"] = follow(instance.file, writer, times_in_json, True)
        drop_slot(cluster, "tick_walrace")
    cluster.sql("drop database bench_latency with (force)")
    expected = RATE * seconds
    for name, waits in results.items():
        if len(waits) < expected * 0.9:
            raise RuntimeError(f"{name}: only {len(waits)} of about {expected} rows came")
    return {name: (percentile(waits, 0.5) * 1000, percentile(waits, 0.99) * 1000, len(waits))
            for name, waits in results.items()}


def pgbench_rate(cluster, seconds):
    words = cluster.client("pgbench", "-n", "-c", "4", "-j", "2", "-T", seconds,
                           database="bench_load")
    output = subprocess.run(words, check=True, text=True, capture_output=True).stdout
    return float(re.search(r"tps = ([0-9.]+)", output).group(1))


def measure_load(cluster, binary, folder, seconds, rounds):
    """pgbench's rate on the source with pg_recvlogical attached, and with Walrace."""
    cluster.sql("create database bench_load")
    subprocess.run(cluster.client("pgbench", "-i", "-q", "-s", "10", database="bench_load"),
                   check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    cluster.sql("alter table pgbench_history replica identity full;"
                "create publication bench for all tables;", "bench_load")
    pgbench_rate(cluster, 3)  # fills the caches
    rates = {"pg_recvlogical": []}
    for number in range(rounds):
        slot = f"load_yardstick_{number}"
        new_slot(cluster, "bench_load", slot)
        reader = start_reader(cluster, "bench_load", slot, os.devnull)
        try:
            wait_for_stream(cluster)
            rates["pg_recvlogical"].append(pgbench_rate(cluster, seconds))
        finally:
            end(reader)
        drop_slot(cluster, slot)
        if binary:
            slot = f"load_walrace_{number}"
            new_slot(cluster, "bench_load", slot)
            with Instance(binary, cluster.url("unix", "bench_load"), slot, True, folder) as walrace:
                deadline = time.monotonic() + 60
                wait_for_stream(cluster, lambda: walrace.check(deadline))
                rate = pgbench_rate(cluster, seconds)
                rates.setdefault("walrace, file sink", []).append(rate)
            drop_slot(cluster, slot)
    cluster.sql("drop database bench_load with (force)")
    return rates
