"""`nrt-jax local` ends, and its processes with it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


def children(number: int) -> list[int]:
    """The processes that a process has started."""
    return [int(n) for n in Path(f"/proc/{number}/task/{number}/children").read_text().split()]


def runs(number: int) -> bool:
    """Whether there is such a process; one that nobody has waited for has ended."""
    try:
        status = Path(f"/proc/{number}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_kill_of_local_ends_its_processes():
    """They wait for a third one that never comes, long before they would give up."""
    words = ["local", "--processes", "2", "--", "train", "quickstart/sft", "--processes", "3"]
    local = subprocess.Popen([sys.executable, "-m", "nrt_jax", *words], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(started := children(local.pid)) < 2 or not all(map(has_met, started)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    local.kill()
    local.wait()
    while time.monotonic() < deadline and any(map(runs, started)):
        time.sleep(0.05)
    left = [number for number in started if runs(number)]
    for number in left:
        os.kill(number, signal.SIGKILL)
    assert not left


def has_met(number: int) -> bool:
    """Whether a process has a socket: it is beyond the first lines of the command line."""
    links = Path(f"/proc/{number}/fd").iterdir()
    return any(os.readlink(link).startswith("socket:") for link in links)
