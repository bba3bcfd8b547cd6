"""The targets of the sink benchmark: each with its server, its sink, and its own fastest loader."""

import base64
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from postgres import Cluster, free_port

HERE = Path(__file__).parent
# Where scripts/install.sh puts what it installs.
CACHE = Path(os.environ.get("WALRACE_CACHE") or (
    "/var/cache/walrace" if os.getuid() == 0 else Path.home() / ".cache" / "walrace"))

# A change of the workload is about this large in the native format.
MESSAGE_BYTES = 420
KAFKA_VERSION = "4.1.0"


def program_of(name):
    """Where a program is: what was installed for Walrace, or where Debian keeps servers, too."""
    places = [str(CACHE / "tools/bin"), os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]
    found = shutil.which(name, path=":".join(places))
    if not found:
        raise SystemExit(f"{name} is missing: run scripts/install.sh bench")
    return found


class Server:
    """A child in a folder of its own; use it in a `with`, which removes both."""

    def __init__(self, folder):
        self.folder = Path(tempfile.mkdtemp(prefix="walrace-bench-target-", dir=folder))
        self.port = free_port()
        self.child = None

    def start(self, words, ready, environment=None):
        log = open(self.folder / "server.log", "w")
        self.child = subprocess.Popen(words, stdout=log, stderr=log, cwd=self.folder,
                                      env=environment, start_new_session=True)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if ready():
                return
            if self.child.poll() is not None:
                break
            time.sleep(0.1)
        raise SystemExit(f"{words[0]} did not start:\n" + (self.folder / "server.log").read_text())

    def answers(self):
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
            return True
        except OSError:
            return False

    def __exit__(self, *_):
        if self.child:
            os.killpg(self.child.pid, signal.SIGKILL)
            self.child.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


class RedisServer(Server):
    """Nothing is kept on disk."""

    def __enter__(self):
        words = [program_of("redis-server"), "--port", self.port, "--save", "", "--appendonly",
                 "no", "--bind", "127.0.0.1"]
        self.start([str(word) for word in words], lambda: self.ask("PING").startswith("PONG"))
        return self

    def ask(self, *words):
        done = subprocess.run([program_of("redis-cli"), "-p", str(self.port), *words], text=True,
                              capture_output=True)
        return done.stdout


class Redis(RedisServer):
    """XADD with MAXLEN ~ 100,000, pipelined; nothing is kept on disk, for both."""

    name, loader_name = "redis_stream", "redis-benchmark, XADD, -P 100"

    def sink(self):
        return (f'kind = "redis_stream"\nurl = "redis://127.0.0.1:{self.port}"\n'
                'stream = "changes"\n')

    def consumer(self, stream):
        return [sys.executable, str(HERE / "arrivals.py"), str(self.port), stream]

    def load(self, count, _bench):
        words = [program_of("redis-benchmark"), "-p", self.port, "-n", count, "-P", 100, "-c", 1,
                 "--csv", "XADD", "loader", "MAXLEN", "~", 100000, "*", "payload",
                 "x" * MESSAGE_BYTES]
        done = subprocess.run([str(word) for word in words], check=True, text=True,
                              capture_output=True)
        return float(re.findall(r'"([0-9.]+)"', done.stdout.splitlines()[-1])[0])


class Kafka(Server):
    """One partition, acks = all, zstd; the sink writes in transactions with its progress."""

    name, loader_name = "kafka", "kafka-producer-perf-test, acks=all, zstd"

    def __enter__(self):
        controller, folder = free_port(), self.folder
        (folder / "server.properties").write_text(
            "process.roles=broker,controller\nnode.id=1\n"
            f"listeners=PLAINTEXT://127.0.0.1:{self.port},CONTROLLER://127.0.0.1:{controller}\n"
            f"advertised.listeners=PLAINTEXT://127.0.0.1:{self.port}\n"
            "listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT\n"
            "controller.listener.names=CONTROLLER\ninter.broker.listener.name=PLAINTEXT\n"
            f"controller.quorum.bootstrap.servers=127.0.0.1:{controller}\n"
            f"log.dirs={folder}/data\nlog.retention.ms=-1\nnum.partitions=1\n"
            "offsets.topic.replication.factor=1\ntransaction.state.log.replication.factor=1\n"
            "transaction.state.log.min.isr=1\nshare.coordinator.state.topic.replication.factor=1\n"
            "share.coordinator.state.topic.min.isr=1\ngroup.initial.rebalance.delay.ms=0\n")
        subprocess.run(self.java("kafka.tools.StorageTool", "format", "--standalone", "-t",
                                 "MkU3OEVBNTcwNTJENDM2Qg", "-c", "server.properties"),
                       check=True, cwd=folder, capture_output=True)
        self.start(self.java("kafka.Kafka", "server.properties"), self.answers)
        return self

    def java(self, program, *arguments):
        jars = CACHE / f"kafka-{KAFKA_VERSION}" / "*"
        return [program_of("java"), "-Xmx1g", "-cp", str(jars), program, *arguments]

    def sink(self):
        return (f'kind = "kafka"\nbrokers = "127.0.0.1:{self.port}"\ntopic = "changes"\n'
                'compression = "zstd"\n')

    def consumer(self, topic):
        return self.java(str(HERE / "Arrivals.java"), f"127.0.0.1:{self.port}", topic)

    def load(self, count, _bench):
        words = self.java("org.apache.kafka.tools.ProducerPerformance", "--topic", "loader",
                          "--num-records", str(count), "--record-size", str(MESSAGE_BYTES),
                          "--throughput", "-1", "--producer-props",
                          f"bootstrap.servers=127.0.0.1:{self.port}", "acks=all",
                          "compression.type=zstd", "linger.ms=5", "batch.size=131072")
        done = subprocess.run(words, check=True, text=True, capture_output=True)
        return float(re.findall(r"([0-9.]+) records/sec", done.stdout)[-1])


class Postgres:
    """Rows into a table with a primary key; fsync on."""

    name, loader_name = "postgres", "psql, COPY FROM"

    def __init__(self, folder):
        self.cluster = Cluster(folder)

    def __enter__(self):
        self.cluster.__enter__()
        return self

    def __exit__(self, *error):
        self.cluster.__exit__(*error)

    def sink(self):
        return (f'kind = "postgres"\nurl = "postgres://postgres@127.0.0.1:{self.cluster.port}'
                '/postgres"\nmissing_table = "create"\n')

    def load(self, count, bench):
        """The rows of the source's own table, into one of the same shape."""
        file = self.cluster.folder / "rows.copy"
        rows = subprocess.run(bench.source.client("psql", "-X", "-q", "-c", "copy item to stdout"),
                              check=True, capture_output=True)
        file.write_bytes(rows.stdout)
        self.cluster.sql("create table loader (id bigint primary key, name text, "
                         "price numeric(12,2), changed timestamptz, note text)")
        began = time.monotonic()
        with open(file, "rb") as rows:
            subprocess.run(self.cluster.client("psql", "-X", "-q", "-c", "copy loader from stdin"),
                           check=True, stdin=rows)
        return count / (time.monotonic() - began)


class Nats(Server):
    """JetStream on disk; the sink creates the stream."""

    def __enter__(self):
        (self.folder / "nats.conf").write_text(
            f'listen: "127.0.0.1:{self.port}"\nserver_name: bench\n'
            'jetstream { store_dir: "store" }\n')
        log = self.folder / "server.log"
        self.start(["nats-server", "-c", "nats.conf"], lambda: "is ready" in log.read_text())
        return self

    def sink(self):
        return (f'kind = "nats"\nurl = "nats://127.0.0.1:{self.port}"\nstream = "CHANGES"\n'
                'create_stream = true\n')


class RabbitMq(Server):
    """A quorum queue behind a topic exchange, with the last 100,000 messages.

    A classic one of 3.10 took about 150 ms to confirm what is on disk, and a change waits until the
    one before it of its key is confirmed: 1,900 changes a second.
    """

    program = "/usr/lib/rabbitmq/bin/rabbitmq-server"

    def __init__(self, folder):
        super().__init__(folder)
        self.mapper = None

    def __enter__(self):
        (self.folder / "home").mkdir()
        (self.folder / "plugins").write_text("[].")
        (self.folder / "definitions.json").write_text(json.dumps(self.definitions()))
        (self.folder / "rabbitmq.conf").write_text(
            f"load_definitions = {self.folder}/definitions.json\n"
            "log.console = true\nlog.file = false\n")
        mapper_port = free_port()
        # Erlang would start one that outlives everything.
        self.mapper = subprocess.Popen(["epmd", "-port", str(mapper_port), "-address", "127.0.0.1"],
                                       cwd="/", stdout=subprocess.DEVNULL,
                                       stderr=subprocess.DEVNULL, start_new_session=True)
        folder, log = self.folder, self.folder / "server.log"
        environment = {
            "PATH": os.environ["PATH"], "HOME": f"{folder}/home",
            "RABBITMQ_NODENAME": f"walrace-{self.port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1", "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(free_port()), "ERL_EPMD_PORT": str(mapper_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1", "RABBITMQ_MNESIA_BASE": f"{folder}/data",
            "RABBITMQ_LOG_BASE": f"{folder}/log", "RABBITMQ_CONFIG_FILE": f"{folder}/rabbitmq",
            "RABBITMQ_CONF_ENV_FILE": f"{folder}/no-environment",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{folder}/plugins",
            "RABBITMQ_PID_FILE": f"{folder}/node",
            # As under systemd: the script becomes the node, whose process id is then the child's.
            "NOTIFY_SOCKET": f"{folder}/nobody",
        }
        self.start([self.program], lambda: "Server startup complete" in log.read_text(),
                   environment)
        return self

    def definitions(self):
        """A user, the exchange, and the queue that gets everything."""
        salt = os.urandom(4)
        digest = hashlib.sha256(salt + b"bench").digest()
        own = {"vhost": "/", "durable": True, "auto_delete": False}
        return {
            "users": [{"name": "bench", "tags": "administrator",
                       "hashing_algorithm": "rabbit_password_hashing_sha256",
                       "password_hash": base64.b64encode(salt + digest).decode()}],
            "vhosts": [{"name": "/"}],
            "permissions": [{"user": "bench", "vhost": "/", "configure": ".*", "write": ".*",
                             "read": ".*"}],
            "exchanges": [{**own, "name": "changes", "type": "topic", "internal": False,
                           "arguments": {}}],
            "queues": [{**own, "name": "all", "arguments": {"x-queue-type": "quorum",
                                                           "x-max-length": 100000}}],
            "bindings": [{"source": "changes", "vhost": "/", "destination": "all",
                          "destination_type": "queue", "routing_key": "#", "arguments": {}}],
        }

    def sink(self):
        return (f'kind = "rabbitmq"\nurl = "amqp://bench:bench@127.0.0.1:{self.port}"\n'
                'exchange = "changes"\n')

    def __exit__(self, *error):
        super().__exit__(*error)
        if self.mapper:
            self.mapper.kill()
            self.mapper.wait()
