#!/usr/bin/env python3
"""Prints each change of an `http_pull` sink as a line of JSON, then acknowledges it.

Three variables configure it, as they do Sequin's consumers: SEQUIN_BASE_URL (such as
http://localhost:7376), SEQUIN_CONSUMER_NAME (the sink) and SEQUIN_API_TOKEN. It needs Python 3 and
nothing else. A message that cannot be printed is given back, and comes again.
"""

import json
import os
import sys
import time
import urllib.error
import urllib.request

VARIABLES = ("SEQUIN_BASE_URL", "SEQUIN_CONSUMER_NAME", "SEQUIN_API_TOKEN")
BATCH_SIZE = 200
WAIT_MS = 5000
PAUSE_SECONDS = 1


class Consumer:
    def __init__(self, environment):
        missing = [name for name in VARIABLES if not environment.get(name)]
        if missing:
            sys.exit("missing in the environment: " + ", ".join(missing))
        base, name, self.token = (environment[variable] for variable in VARIABLES)
        self.url = f"{base.rstrip('/')}/api/http_pull_consumers/{name}/"

    def post(self, action, body):
        headers = {"authorization": f"Bearer {self.token}", "content-type": "application/json"}
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url + action, data, headers)
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)

    def poll(self):
        messages = self.post("receive", {"batch_size": BATCH_SIZE, "wait_for": WAIT_MS})["data"]
        done, refused = [], []
        for message in messages:
            try:
                print(json.dumps(message["data"]), flush=True)
                done.append(message["ack_id"])
            except ValueError:
                refused.append(message["ack_id"])
        if done:
            self.post("ack", {"ack_ids": done})
        if refused:
            self.post("nack", {"ack_ids": refused})


def main():
    consumer = Consumer(os.environ)
    while True:
        try:
            consumer.poll()
        except urllib.error.HTTPError as error:
            if error.code in (401, 404):
                sys.exit(f"{error.code}: {error.read().decode(errors='replace')}")
            time.sleep(PAUSE_SECONDS)
        except OSError:
            time.sleep(PAUSE_SECONDS)  # the server is down: what was not acknowledged comes again


if __name__ == "__main__":
    main()
