"""Backfill beside `COPY table TO STDOUT`, and one transaction of many gigabytes beside
pg_recvlogical."""

import json
import subprocess
import sys
import time
import urllib.request
from statistics import median

import latency
from candidates import Instance
from measure import peak_mib

LIMIT_S = 3600


def measure_backfill(cluster, binary, folder, rows, rounds):
    """Rows a second of COPY to nowhere, and of a backfill with one and with two workers."""
    cluster.sql("create database fill")
    cluster.sql(
        "create table item (id bigint primary key, owner uuid, price numeric(12, 2), at timestamptz,"
        " note text);"
        f"insert into item select n, md5(n::text)::uuid, n / 100.0, now(), repeat(md5(n::text), 2)"
        f" from generate_series(1, {rows}) n;"
        "create publication bench for table item", "fill")
    cluster.sql("vacuum (analyze, freeze) item; checkpoint", "fill")
    rates = {"COPY": [], "1 worker": [], "2 workers": []}
    copy(cluster)  # the first reader finds caches cold
    for number in range(rounds):
        rates["COPY"].append(rows / copy(cluster))
        for workers in (1, 2):
            name = f"{workers} worker{'s' if workers > 1 else ''}"
            rates[name].append(rows / backfill(cluster, binary, folder, workers, rows))
        print(f"bench: backfill, round {number + 1}: "
              + ", ".join(f"{name} {values[-1]:,.0f} rows/s" for name, values in rates.items()),
              file=sys.stderr, flush=True)
    cluster.sql("drop database fill with (force)")
    return {name: median(values) for name, values in rates.items()}


def copy(cluster):
    words = cluster.client("psql", "-X", "-q", "-c", "copy item to stdout", database="fill")
    began = time.monotonic()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def backfill(cluster, binary, folder, workers, rows):
    """Seconds from the request until all rows are durable in the journal."""
    slot = "fill"
    cluster.sql(f"select pg_create_logical_replication_slot('{slot}', 'pgoutput')", "fill")
    url = cluster.url("unix", "fill")
    more = f"[source.app.backfill]\nworkers = {workers}\n"
    with Instance(binary, url, slot, False, folder, more=more) as instance:
        deadline = time.monotonic() + LIMIT_S
        while not instance.metrics().get("walrace_source_up"):
            instance.check(deadline)
            time.sleep(0.05)
        began = time.monotonic()
        ask(instance, "/backfills", {"tables": []})
        while True:
            status = ask(instance, "/backfills")[0]
            if status["state"] == "done":
                break
            instance.check(deadline)
            time.sleep(0.02)
        taken = time.monotonic() - began
        if status["rows"] != rows:
            raise RuntimeError(f"{status['rows']} rows were read of {rows}")
    latency.drop_slot(cluster, slot)
    return taken


def ask(instance, path, body=None):
    address = (instance.folder / "data" / "http.addr").read_text().splitlines()[0]
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(f"http://{address}{path}", data,
                                     {"content-type": "application/json"})
    return json.loads(urllib.request.urlopen(request, timeout=30).read())


def measure_transaction(cluster, binary, folder, gigabytes):
    """Seconds and peak memory of one transaction of so many gigabytes of rows, against
    pg_recvlogical on the same transaction."""
    cluster.sql("create database large")
    cluster.sql("create table blob (id bigint primary key, pad text);"
                "alter table blob alter pad set storage plain;"
                "create publication bench for table blob", "large")
    slots = ("base_large", "recv", "drain")
    for slot in slots:
        cluster.sql(f"select pg_create_logical_replication_slot('{slot}', 'pgoutput')", "large")
    rows = int(gigabytes * (1 << 30) / 3860)
    cluster.sql(f"insert into blob select n, repeat(md5(n::text), 120) from generate_series(1, {rows}) n",
                "large")
    end = cluster.sql("select pg_current_wal_lsn()", "large")
    cluster.sql("select pg_logical_emit_message(true, 'end', '')", "large")
    began = time.monotonic()
    words = cluster.client("pg_recvlogical", "--slot", "recv", "--start", "--no-loop", "-o",
                           "proto_version=1", "-o", "publication_names=bench", "--endpos", end,
                           "-f", "/dev/null", database="large")
    subprocess.run(words, check=True)
    recv = time.monotonic() - began
    with Instance(binary, cluster.url("unix", "large"), "drain", True, folder) as instance:
        began, deadline = time.monotonic(), time.monotonic() + LIMIT_S
        while instance.changes_done() < rows:
            instance.check(deadline)
            time.sleep(0.1)
        ours, peak = time.monotonic() - began, peak_mib(instance.pid)
    for slot in slots:
        latency.drop_slot(cluster, slot)
    cluster.sql("drop database large with (force)")
    return {"gigabytes": gigabytes, "recv": recv, "ours": ours, "peak_mib": peak}


def tables(rates, large):
    """The report's part."""
    base = rates["COPY"]
    lines = ["### Backfill", "",
             "Rows of about 130 bytes, from the request until the last row is durable in the journal.", "",
             "| | rows/s | of COPY |", "|---|---|---|"]
    lines += [f"| {name} | {rate:,.0f} | {rate / base:.2f} |" for name, rate in rates.items()]
    if large:
        lines += ["", "### One large transaction", "",
                  f"{large['gigabytes']:g} GB of rows in one transaction, journal and file sink.", "",
                  "| | seconds | peak memory |", "|---|---|---|",
                  f"| pg_recvlogical to /dev/null | {large['recv']:.0f} | |",
                  f"| walrace journal + file | {large['ours']:.0f} ({large['ours'] / large['recv']:.2f}) "
                  f"| {large['peak_mib']:.0f} MiB |"]
    return "\n".join(lines)
