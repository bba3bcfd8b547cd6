"""A private PostgreSQL for the benchmark: fsync on, WAL kept by slots, nothing else running."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

SETTINGS = """
listen_addresses = '127.0.0.1'
fsync = on
wal_level = logical
shared_buffers = {shared_buffers}MB
logical_decoding_work_mem = 64MB
max_replication_slots = 60
max_wal_senders = 60
max_connections = 100
max_wal_size = 64GB
checkpoint_timeout = 1h
wal_compression = off
autovacuum = off
timezone = 'UTC'
log_min_messages = warning
"""


def find_bin():
    """The folder with PostgreSQL's programs: WALRACE_PG_BIN, else Debian's 15, else the newest."""
    if os.environ.get("WALRACE_PG_BIN"):
        return Path(os.environ["WALRACE_PG_BIN"])
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda p: int(p.parts[-3]))
    if not found:
        raise SystemExit("PostgreSQL is missing: run scripts/install.sh bench")
    debian = [path for path in found if path.parts[-3] == "15"]
    return (debian or found)[-1].parent


class Cluster:
    """A running server; use it in a `with`, which removes it at the end."""

    def __init__(self, folder):
        self.bin = find_bin()
        self.folder = Path(tempfile.mkdtemp(prefix="walrace-bench-", dir=folder))
        self.data = self.folder / "data"
        self.port = free_port()
        self.postmaster = None

    def __enter__(self):
        if os.getuid() == 0:
            user = pwd.getpwnam("postgres")
            os.chown(self.folder, user.pw_uid, user.pw_gid)
        self.as_postgres("initdb", "-D", self.data, "-U", "postgres", "--auth=trust",
                         "--encoding=UTF8", "--locale=C")
        memory_mb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
        with open(self.data / "postgresql.conf", "a") as conf:
            conf.write(SETTINGS.format(shared_buffers=min(2048, memory_mb // 4)))
            conf.write(f"port = {self.port}\nunix_socket_directories = '{self.folder}'\n")
        log = open(self.folder / "postgres.log", "w")
        self.postmaster = subprocess.Popen(
            self.command("postgres", "-D", self.data), stdout=log, stderr=log,
            start_new_session=True, cwd="/")
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if (self.data / "postmaster.pid").exists():
                lines = (self.data / "postmaster.pid").read_text().splitlines()
                if len(lines) > 7 and lines[7].strip() == "ready":
                    return self
            time.sleep(0.02)
        raise SystemExit((self.folder / "postgres.log").read_text())

    def __exit__(self, *_):
        if self.postmaster:
            self.postmaster.send_signal(signal.SIGQUIT)
            self.postmaster.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def command(self, program, *arguments):
        """A command line that runs as a user that PostgreSQL accepts."""
        words = [str(self.bin / program), *map(str, arguments)]
        if os.getuid() == 0:
            words = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", *words]
        return words

    def as_postgres(self, program, *arguments):
        subprocess.run(self.command(program, *arguments), check=True, cwd="/",
                       stdout=subprocess.DEVNULL)

    def client(self, program, *arguments, database="postgres"):
        """The command line of a client program, over the unix socket."""
        return [str(self.bin / program), "-h", str(self.folder), "-p", str(self.port),
                "-U", "postgres", *(["-d", database] if program != "pgbench" else []),
                *map(str, arguments), *([database] if program == "pgbench" else [])]

    def sql(self, text, database="postgres", settings="", variables=None):
        """Runs statements and gives what they print, without alignment."""
        environment = dict(os.environ, PGOPTIONS=settings)
        words = self.client("psql", "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1",
                            database=database)
        done = subprocess.run(words, input=text, env=environment, text=True, capture_output=True)
        if done.returncode:
            raise RuntimeError(f"{done.stderr}\nin: {text[:500]}")
        return done.stdout.strip()

    def url(self, transport, database):
        if transport == "tcp":
            return f"postgres://postgres@127.0.0.1:{self.port}/{database}"
        return f"postgres://postgres@/{database}?host={self.folder}&port={self.port}"

    def walsenders(self):
        """Process ids of the walsenders that stream now, read from the titles of the processes."""
        children = Path(f"/proc/{self.postmaster.pid}/task/{self.postmaster.pid}/children")
        found = []
        for pid in children.read_text().split():
            try:
                title = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue
            if b"walsender" in title and b"START_REPLICATION" in title:
                found.append(int(pid))
        return found


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
