"""CPU, memory and time of processes, read from /proc."""

import json
import os
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")

# One core for the walsender, the others for who reads from it; the same for every candidate. Where
# a scheduler puts a dozen short-lived wake-ups is otherwise worth 15 % on two cores.
CORES = sorted(os.sched_getaffinity(0))
WALSENDER_CORES, CLIENT_CORES = (CORES[:1], CORES[1:]) if len(CORES) > 1 else (CORES, CORES)
PINNED = True


def pin(pid, cores):
    """Keeps every thread of a process on some cores; a process that is gone is no error."""
    if not PINNED:
        return
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            os.sched_setaffinity(int(thread), cores)
    except (FileNotFoundError, ProcessLookupError):
        pass


def pin_child():
    """For `preexec_fn`: the program that is started inherits it."""
    pin(os.getpid(), CLIENT_CORES)


@dataclass
class Run:
    """What one candidate took to drain one backlog."""

    seconds: float
    client_cpu: float
    walsender_cpu: float
    peak_mib: float


def cpu_seconds(pid):
    """User and system time of a process, or None once it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat[stat.rindex(")") + 2:].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def peak_mib(pid):
    """The largest resident size of a living process so far."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return 0.0


class WalsenderWatch(threading.Thread):
    """Notes when the stream begins, and the CPU of its walsender until that is gone."""

    def __init__(self, cluster):
        super().__init__(daemon=True)
        self.cluster = cluster
        self.began = None
        self.cpu = 0.0
        self.done = threading.Event()
        self.start()

    def run(self):
        pid = None
        while not self.done.is_set():
            if pid is None:
                pid = next(iter(self.cluster.walsenders()), None)
                if pid is not None:
                    pin(pid, WALSENDER_CORES)
                    self.began = time.monotonic()
            else:
                self.cpu = cpu_seconds(pid) or self.cpu
            self.done.wait(0.005 if pid is None else 0.02)

    def stop(self):
        """Ends the watch and gives the moment at which the stream began."""
        self.done.set()
        self.join()
        if self.began is None:
            raise RuntimeError("no walsender was seen: the stream never began")
        return self.began


def find_binary():
    """The release binary, in whatever target folder Cargo uses here."""
    words = ["cargo", "metadata", "--format-version", "1", "--no-deps", "--offline"]
    output = subprocess.run(words, check=True, capture_output=True, text=True,
                            cwd=Path(__file__).parent).stdout
    binary = Path(json.loads(output)["target_directory"]) / "release" / "walrace"
    if not binary.exists():
        raise SystemExit(f"{binary} is missing: run `make bench`, which builds it")
    return binary


def machine():
    """One line about the machine, for the report."""
    model = "unknown CPU"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    return f"{os.cpu_count()} x {model}, {memory:.0f} GiB, Linux {os.uname().release}"
