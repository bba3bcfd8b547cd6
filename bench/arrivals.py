"""From a change at the source to a consumer of the target, at 5,000 changes a second.

    python3 bench/arrivals.py PORT STREAM

is the consumer of Redis that it starts: it prints when each row of `tick` was written, and when it
had it, in microseconds since 1970.
"""

import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import latency

HERE = Path(__file__).parent
# Rows of one statement; pgbench commits latency.RATE of them a second.
ROWS = 5
WARM_UP_S = 5
TABLE = "create table tick (id bigserial primary key, at bigint not null)"
TICK = ("insert into tick (at) select extract(epoch from clock_timestamp()) * 1000000 "
        f"from generate_series(1, {ROWS});")


def measure(bench, kind, seconds, folder):
    """Milliseconds to each change that was written after the warm-up."""
    name, before = f"{kind.name}_arrivals", count(bench)
    with kind(folder) as target:
        text = bench.sink_text(name, bench.end(), 1_000, target.sink())
        with bench.walrace.running(text):
            bench.source.sql(TICK)
            bench.wait_for_rows(name)
            log = target.folder / "arrivals"
            with open(log, "wb") as file:
                reader = subprocess.Popen(target.consumer("changes"), stdout=file)
            try:
                start_writer(bench.source, WARM_UP_S).wait()
                since = time.time()
                start_writer(bench.source, seconds).wait()
                return waits(bench, log, before, since)
            finally:
                reader.kill()
                reader.wait()


def count(bench):
    return int(bench.source.sql("select count(*) from tick"))


def start_writer(source, seconds):
    return latency.start_writer(source, "postgres", seconds, TICK, clients=8)


def waits(bench, log, before, since):
    """Once every row has arrived."""
    written = count(bench) - before
    deadline = time.monotonic() + 60
    while (arrived := log.read_bytes().count(b"\n")) < written:
        if time.monotonic() > deadline:
            raise SystemExit(f"only {arrived} of {written} rows arrived")
        time.sleep(0.1)
    pairs = (map(int, line.split()) for line in log.read_text().splitlines())
    return [(arrived - at) / 1000 for at, arrived in pairs if at >= since * 1_000_000]


def reply(stream):
    """One reply of Redis: a text, or a list of replies."""
    head = stream.readline()
    kind, rest = head[:1], head[1:-2]
    if kind == b"$":
        return stream.read(int(rest) + 2)[:-2]
    if kind == b"*":
        return [reply(stream) for _ in range(max(int(rest), 0))]
    raise SystemExit(f"Redis answered {head!r}")


def main():
    port, name = sys.argv[1:]
    connection = socket.create_connection(("127.0.0.1", int(port)))
    stream = connection.makefile("rb", buffering=1 << 20)
    last = b"0"
    at = re.compile(rb'"at":(\d+)')
    while True:
        connection.sendall(b"XREAD COUNT 10000 BLOCK 0 STREAMS %s %s\r\n" % (name.encode(), last))
        entries = reply(stream)[0][1]
        arrived = int(time.time() * 1_000_000)
        last = entries[-1][0]
        lines = [b"%s %d\n" % (at.search(b" ".join(fields))[1], arrived) for _, fields in entries]
        sys.stdout.buffer.write(b"".join(lines))
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
