"""An HTTP target for crowd.py: takes batches of changes of the table `item`, or refuses some.

    python3 bench/receiver.py [REFUSED]

Prints its port. With REFUSED it answers 422 to each request that has a change of a row whose id
ends in that digit. `GET` says how many changes came, how many of a row came after a later version
of it, and a digest of the last versions.
"""

import re
import socketserver
import sys
from http.server import BaseHTTPRequestHandler

ROW = re.compile(rb'"after":\{"id":(\d+),"version":(\d+)')


class State:
    refused = None
    count, late = 0, 0
    last = {}


class Requests(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self):
        rows = ROW.findall(self.rfile.read(int(self.headers["content-length"])))
        if State.refused and any(row.endswith(State.refused) for row, _ in rows):
            return self.answer(422, b"this row is not wanted")
        State.count += len(rows)
        for row, version in rows:
            version = int(version)
            State.late += version <= State.last.get(row, 0)
            State.last[row] = version
        return self.answer(200, b"{}")

    def do_GET(self):
        versions = sum(State.last.values())
        self.answer(200, b"%d %d %d %d" % (State.count, State.late, len(State.last), versions))

    def answer(self, status, body):
        self.send_response_only(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True


def main():
    State.refused = sys.argv[1].encode() if len(sys.argv) > 1 else None
    with Server(("127.0.0.1", 0), Requests) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever(poll_interval=0.2)


if __name__ == "__main__":
    main()
