"""Processes meet, or say why they cannot; and they end together."""

import json
import logging
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from nrt_jax import peers
from nrt_jax.errors import InputError
from nrt_jax.local import _free_port as free_port

HOST = socket.gethostname()


def meet_all(*told: tuple[int, int], timeout_s: float = 20.0) -> list[object]:
    """What `meet` gives, or raises, for each (process, processes), at the same time."""
    address = f"localhost:{free_port()}"

    def attempt(one: tuple[int, int]) -> object:
        try:
            return peers.meet(address, *one, timeout_s)
        except InputError as error:
            return str(error).replace(address, "HOST:PORT")

    with ThreadPoolExecutor(len(told)) as pool:
        return list(pool.map(attempt, told))


def test_all_that_come_meet():
    found = meet_all((2, 3), (0, 3), (1, 3))
    assert [peer.process for peer in found] == [2, 0, 1]
    for peer in found:
        peer.leave()


def test_nobody_answers():
    (said,) = meet_all((1, 2), timeout_s=0.5)
    assert said == (
        "coordinator HOST:PORT: nobody answered process 1 within 0.5 s; start process 0 on that "
        "host, open the port, or name another --coordinator or a longer --timeout"
    )


def test_a_stranger_answers():
    """A server that speaks of something else is not process 0."""
    with socket.create_server(("localhost", 0)) as server, ThreadPoolExecutor(1) as pool:
        address = f"localhost:{server.getsockname()[1]}"
        waiting = pool.submit(peers.meet, address, 1, 2, 1.0)
        server.accept()[0].sendall(b"220 mail.example.org\r\n")
        with pytest.raises(InputError, match="nobody answered process 1 within 1 s"):
            waiting.result()


def test_one_is_missing():
    said = meet_all((0, 4), (2, 4), timeout_s=1.0)
    assert said == 2 * [
        "coordinator HOST:PORT: of 4 processes those with the ids 1, 3 have not come within 1 s; "
        "start them, or give a longer --timeout"
    ]


def test_two_have_one_id():
    said = meet_all((0, 3), (1, 3), (1, 3))
    assert said == 3 * [
        f"two processes have the id 1, on {HOST} and on {HOST}; give each its own --process-id, "
        "from 0 to 2"
    ]


def test_two_have_the_first_id():
    said = sorted(str(x) for x in meet_all((0, 2), (0, 2), timeout_s=1.0))
    assert said[0].startswith("coordinator HOST:PORT: of 2 processes those with the ids 1 have not")
    assert "process 0 cannot listen on port" in said[1]
    assert "Address already in use; end what uses it, give every process its own" in said[1]


def test_another_number_of_processes():
    said = meet_all((0, 2), (1, 3))
    assert said == 2 * [
        f"process 1 on {HOST} was started as one of 3 processes, and process 0 on {HOST} as one of "
        "2; give all of them the same --processes"
    ]


def test_clocks_that_differ_are_told(caplog):
    address = f"localhost:{free_port()}"
    with caplog.at_level(logging.WARNING), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(peers.meet, address, 0, 2, 20.0)
        hello = peers.Hello(1, 2, "far", time.time() - 90)
        while True:
            try:
                other = socket.create_connection(("localhost", int(address.split(":")[1])))
                break
            except OSError:
                time.sleep(0.05)
        other.sendall(json.dumps(hello).encode() + b"\n")
        waiting.result().leave()
        other.sendall(b'{"left": true}\n')
    (record,) = caplog.records
    assert record.message.startswith("the clock of process 1 on far is 90 s behind that of process")


PROGRAM = """
import sys, time, os, signal
from nrt_jax import peers
peers.GRACE_S = 1.0
address, process, doing = sys.argv[1], int(sys.argv[2]), sys.argv[3]
met = peers.meet(address, process, 3, 20.0)
print("met", flush=True)
if doing == "wait":
    time.sleep(60)
if doing == "fail":
    print("nrt-jax: error: broken", file=sys.stderr, flush=True)
    met.end_all("broken", 2)
if doing == "stop":
    met.end_all("stopped", 0)
met.leave()
sys.stdin.read()
"""


def end_of(*doing: str, kill: int | None = None) -> list[tuple[int, str]]:
    """Status and last words of three processes that do this, one of them killed after they met."""
    address = f"localhost:{free_port()}"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, address, str(process), what],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process, what in enumerate(doing)
    ]
    try:
        for process in started:
            assert process.stdout is not None
            assert process.stdout.readline() == "met\n"
        if kill is not None:
            started[kill].send_signal(signal.SIGKILL)
        ended = [process.communicate(timeout=60)[1] for process in started]
        return [(p.returncode, text) for p, text in zip(started, ended, strict=True)]
    finally:
        for process in started:
            process.kill()


@pytest.mark.parametrize("failing", [0, 2])
def test_an_error_ends_all_with_its_line(failing):
    ended = end_of(*("fail" if process == failing else "wait" for process in range(3)))
    line = f"nrt-jax: error: process {failing}: broken\n"
    alone = "nrt-jax: error: broken\n"
    assert ended == [(2, alone if process == failing else line) for process in range(3)]


def test_an_error_of_all_is_told_once_by_each():
    assert end_of("fail", "fail", "fail") == 3 * [(2, "nrt-jax: error: broken\n")]


def test_a_stop_ends_all_without_an_error():
    assert [status for status, _ in end_of("wait", "stop", "wait")] == [0, 0, 0]


@pytest.mark.parametrize("killed", [0, 1])
def test_a_kill_ends_all(killed):
    ended = end_of("wait", "wait", "wait", kill=killed)
    line = f"nrt-jax: error: process {killed} on {HOST} ended without a word; see its log\n"
    for process, (status, told) in enumerate(ended):
        assert status == (-signal.SIGKILL if process == killed else 1)
        assert told == ("" if process == killed else line)


def test_who_is_done_waits_for_nobody():
    assert end_of("leave", "leave", "leave") == 3 * [(0, "")]
