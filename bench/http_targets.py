"""The HTTP targets of the sink benchmark: who receives webhooks, who pulls, and OpenSearch."""

import http.client
import http.server
import json
import os
import pwd
import re
import shutil
import subprocess
import threading
import time
import urllib.request
from pathlib import Path

from targets import CACHE, RedisServer, Server, program_of

HERE = Path(__file__).parent
WRK_SECONDS = 4
OPENSEARCH_VERSION = "2.19.4"

NGINX = """
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log; {user}
events {{ }}
http {{
    access_log off; client_max_body_size 0; sendfile on; tcp_nopush on;
    default_type application/json;
    keepalive_requests 1000000000; keepalive_timeout 1h; client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port}; root {folder};
        location = /hook {{ return 200; }}
        location ~ /receive$ {{ try_files /receive.json =404; }}
        location ~ /ack$ {{ return 200 '{{"success":true}}'; }}
    }}
}}
"""


class Nginx(Server):
    """One worker, which reads what is posted and throws it away."""

    def __enter__(self):
        user = "user root;" if os.getuid() == 0 else ""
        file = self.folder / "nginx.conf"
        file.write_text(NGINX.format(folder=self.folder, port=self.port, user=user))
        words = [program_of("nginx"), "-e", self.folder / "error.log", "-p", self.folder]
        words += ["-c", file]
        self.start([str(word) for word in words], self.answers)
        return self


class Webhook(Nginx):
    """Batches of 1,000 to a receiver that keeps nothing; the loader posts the sink's own bytes."""

    name, loader_name = "webhook", "wrk, 1 connection, a ready body of 1,000"
    batch, script = 1_000, "post.lua"

    def sink(self):
        return f'kind = "webhook"\nurl = "http://127.0.0.1:{self.port}/hook"\n'

    def load(self, count, bench):
        body = self.folder / "batch"
        body.write_bytes(first_request(bench, self.batch))
        self.prepare(body)
        done = subprocess.run(
            [program_of("wrk"), "-t1", "-c1", f"-d{WRK_SECONDS}s", "-s", str(HERE / self.script),
             f"http://127.0.0.1:{self.port}/hook"],
            check=True, text=True, capture_output=True, env=dict(os.environ, BODY=str(body)))
        if re.search(r"Non-2xx|Socket errors", done.stdout):
            raise SystemExit(done.stdout)
        return self.batch * float(re.search(r"Requests/sec:\s+([0-9.]+)", done.stdout)[1])


    def prepare(self, body):
        """`post.lua` needs nothing more."""


class WebhookWritten(Webhook):
    """The same beside a loader that writes its messages, as the sink has to."""

    name, loader_name = "webhook_written", "wrk, 1 connection, which writes each message in Lua"
    script = "write.lua"

    def prepare(self, body):
        """What differs between the messages, and a format with what does not."""
        messages = messages_of(body.read_text())
        if '{"data":[' + ",".join(messages) + "]}" != body.read_text():
            raise SystemExit("the body of a webhook has another form")
        words = [re.findall(r"[\w.]+|[^\w.]+", message) for message in messages]
        differ = [len(set(column)) > 1 for column in zip(*words, strict=True)]
        fixed = [word.replace("%", "%%") for word in words[0]]
        body.with_suffix(".format").write_text(
            "".join("%s" if differs else word for word, differs in zip(fixed, differ)))
        rows = ("\t".join(word for word, differs in zip(row, differ) if differs) for row in words)
        body.with_suffix(".rows").write_text("\n".join(rows) + "\n")


def messages_of(body):
    """The texts of the messages of a batch."""
    decoder, at, messages = json.JSONDecoder(), len('{"data":['), []
    while body[at - 1] != "]":
        end = decoder.raw_decode(body, at)[1]
        messages.append(body[at:end])
        at = end + 1
    return messages


def first_request(bench, batch):
    """What the sink POSTs as its first batch."""
    bodies = []

    class Receiver(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Receiver) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/hook"
        first = bench.rows - batch
        bench.walrace.run(bench.sink_text(f"sample_{server.server_port}", first, batch,
                                          f'kind = "webhook"\nurl = "{url}"\n'),
                          lambda _: bool(bodies) or None)
        server.shutdown()
    return bodies[0]


class Consumed:
    """Batches of 1,000, fetched and acknowledged over four connections."""

    batch, connections = 1_000, 4

    def __enter__(self):
        super().__enter__()
        self.program = self.folder / "consume"
        subprocess.run(["rustc", "--edition=2024", "-O", "-o", str(self.program),
                        str(HERE / "consume.rs")], check=True)
        return self

    def sink(self):
        return 'kind = "http_pull"\n'

    def consume(self, protocol, address, path, count):
        words = [self.program, protocol, address, path, self.batch, count, self.connections]
        return subprocess.Popen([str(word) for word in words], stdout=subprocess.PIPE, text=True)

    def deliver(self, bench, name, first):
        """From the first reply to the last acknowledgement, as the consumers see it."""
        consumers = None

        def done(metrics):
            nonlocal consumers
            if consumers is None and bench.is_open(metrics, name):
                path = f"/api/http_pull_consumers/{name}"
                consumers = self.consume("http", bench.walrace.address(), path, bench.rows - first)
            if consumers is None or consumers.poll() is None:
                return None
            if consumers.returncode:
                raise SystemExit("a consumer failed")
            return float(consumers.stdout.read())

        text = bench.sink_text(name, first, 10_000, self.sink())
        return bench.walrace.run(text, done)


class HttpPull(Consumed, Nginx):
    """The bare server answers with an equal reply."""

    name, loader_name = "http_pull", "the same consumers, nginx, an equal reply from a file"

    def load(self, count, bench):
        (self.folder / "receive.json").write_bytes(first_reply(bench, self.batch))
        consumers = self.consume("http", f"127.0.0.1:{self.port}", "/any", 5 * count)
        return float(consumers.communicate()[0])


class HttpPullGroup(Consumed, RedisServer):
    """A server that knows who has what, as the sink has to, and keeps it in memory."""

    name = "http_pull_group"
    loader_name = "the same consumers, Redis, XREADGROUP and XACK of 1,000"

    def load(self, count, bench):
        size = len(first_reply(bench, self.batch)) // self.batch
        self.ask("DEL", "group")
        subprocess.run([program_of("redis-benchmark"), "-p", str(self.port), "-n", str(count), "-P",
                        "100", "-c", "1", "-q", "XADD", "group", "*", "payload", "x" * size],
                       check=True, capture_output=True)
        self.ask("XGROUP", "CREATE", "group", "bench", "0")
        consumers = self.consume("redis", f"127.0.0.1:{self.port}", "group", count)
        return float(consumers.communicate()[0])


def first_reply(bench, batch):
    """What the sink answers when a whole batch is fetched."""
    name = f"sample_{time.monotonic_ns()}"
    path = f"/api/http_pull_consumers/{name}/receive?batch_size={batch}&wait_for=500"

    def done(metrics):
        if not bench.is_open(metrics, name):
            return None
        with urllib.request.urlopen(f"http://{bench.walrace.address()}{path}") as reply:
            body = reply.read()
        return body if body.count(b'"ack_id":') == batch else None

    text = bench.sink_text(name, bench.rows - batch, batch, 'kind = "http_pull"\n')
    return bench.walrace.run(text, done)


class OpenSearch(Server):
    """The rows as documents, 1,000 a `_bulk` request, over one connection, for both."""

    name, loader_name = "opensearch", "_bulk of ready bodies of 1,000, 1 connection"
    batch, rows_max = 1_000, 100_000

    def __enter__(self):
        home, folder = CACHE / f"opensearch-{OPENSEARCH_VERSION}", self.folder
        if not home.exists():
            raise SystemExit(f"no OpenSearch in {home}: run scripts/install.sh bench")
        for name in ("config", "data", "logs", "tmp"):
            (folder / name).mkdir()
        shutil.copy(home / "config/log4j2.properties", folder / "config")
        # Its own options would log the garbage collector into a folder of the installation.
        options = (home / "config/jvm.options").read_text().splitlines()
        kept = [line for line in options if "logs/" not in line]
        (folder / "config/jvm.options").write_text("\n".join(kept))
        (folder / "config/opensearch.yml").write_text(
            f"cluster.name: bench\nnode.name: one\nnetwork.host: 127.0.0.1\n"
            f"http.port: {self.port}\ntransport.port: 0\ndiscovery.type: single-node\n"
            f"path.data: {folder}/data\npath.logs: {folder}/logs\n"
            "cluster.routing.allocation.disk.threshold_enabled: false\n")
        java = Path(os.path.realpath(program_of("java"))).parent.parent
        settings = [f"OPENSEARCH_PATH_CONF={folder}/config", f"OPENSEARCH_JAVA_HOME={java}",
                    "OPENSEARCH_JAVA_OPTS=-Xms2g -Xmx2g", f"OPENSEARCH_TMPDIR={folder}/tmp",
                    f"HOME={folder}"]
        self.start([*self.as_another(), "env", *settings, str(home / "bin/opensearch")], self.ready)
        return self

    def as_another(self):
        """It does not run as root."""
        if os.getuid():
            return []
        user = pwd.getpwnam("postgres")
        for path in [self.folder, *self.folder.rglob("*")]:
            os.chown(path, user.pw_uid, user.pw_gid)
        return ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]

    def ready(self):
        health = f"http://127.0.0.1:{self.port}/_cluster/health?wait_for_status=yellow&timeout=1s"
        try:
            return urllib.request.urlopen(health, timeout=5).status == 200
        except OSError:
            return False

    def sink(self):
        return f'kind = "opensearch"\nurl = "http://127.0.0.1:{self.port}"\n'

    def load(self, count, bench):
        """Once to warm the server up, which the sink would gain from, then into another index."""
        lines = bench.source.sql(
            "select json_build_object('index', json_build_object('_index', 'public.loader', '_id', "
            "id::text))::text || e'\\n' || to_json(item)::text from item "
            f"where id > {bench.rows - count} order by id").splitlines()
        bodies = ["\n".join(lines[at:at + 2 * self.batch] + [""]).encode()
                  for at in range(0, len(lines), 2 * self.batch)]
        self.post_all([body.replace(b"public.loader", b"public.warmup") for body in bodies])
        began = time.monotonic()
        self.post_all(bodies)
        return count / (time.monotonic() - began)

    def post_all(self, bodies):
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        for body in bodies:
            connection.request("POST", "/_bulk?filter_path=errors", body,
                               {"content-type": "application/x-ndjson"})
            reply = connection.getresponse()
            if reply.status != 200 or reply.read() != b'{"errors":false}':
                raise SystemExit(f"OpenSearch refused a batch of the loader: {reply.status}")
        connection.close()
