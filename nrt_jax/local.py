"""`nrt-jax local`: several processes on one machine, as on several hosts, started anew when they
die."""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType

from nrt_jax.distributed import COORDINATOR, PROCESS_ID, PROCESSES
from nrt_jax.errors import InputError
from nrt_jax.stop import INTERRUPTED

log = logging.getLogger(__name__)

END_S = 60.0
"""Time for the other processes to end after one has failed; then they are killed."""
_POLL_S = 0.1
_MISTAKE = 2
"""Status of a mistake in the input, which another start would meet again."""
_PARENT = "NRT_JAX_PARENT"
"""Environment variable of a started process: the end of a pipe that closes with `nrt-jax local`."""


def end_with_parent() -> None:
    """In a process that `nrt-jax local` has started: take its death, also by SIGKILL, as a SIGTERM.

    A training then finishes its step and saves. Does nothing in other processes.
    """
    if (number := os.environ.pop(_PARENT, None)) is None:
        return

    def watch(read_end: int) -> None:
        # Nothing is ever written: the read returns when no process holds the other end.
        os.read(read_end, 1)
        log.warning("nrt-jax local has ended: this process stops, as after SIGTERM")
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, args=(int(number),), daemon=True).start()


def run_local(words: Sequence[str], *, processes: int, devices: int, restarts: int) -> int:
    """Run `nrt-jax WORDS` in several processes, of so many devices each; its status.

    After a failure all are started again, up to `restarts` times: a training goes on from its
    newest checkpoint. SIGTERM and Ctrl-C are passed on to process 0, which all others follow; when
    this process is killed, the others stop as after SIGTERM.
    """
    if not words:
        raise InputError("local: no command; write it after --, such as -- train quickstart/nrt")
    for left in reversed(range(restarts + 1)):
        status = _Processes(words, processes, devices).wait()
        if status in (0, _MISTAKE, INTERRUPTED) or not left:
            break
        what = "the processes failed (status %d): starting all again, %d more starts are left"
        log.warning(what, status, left - 1)
    return status


class _Processes:
    """The processes of one start."""

    def __init__(self, words: Sequence[str], count: int, devices: int):
        address = f"localhost:{_free_port()}"
        self._signals = 0
        self._started: list[subprocess.Popen] = []
        # Otherwise a second Ctrl-C would end this process alone.
        self._wakeup = signal.set_wakeup_fd(-1)
        self._before = {
            number: signal.signal(number, self._pass_on)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        # No child inherits the second end: it closes with this process, however that ends.
        read_end, self._alive = os.pipe()
        for process in range(count):
            environment = _environment(address, process, count, devices)
            started = subprocess.Popen(
                [sys.executable, "-m", "nrt_jax", *words],
                env=os.environ | environment | {_PARENT: str(read_end)},
                pass_fds=(read_end,),
                # Ctrl-C in a terminal reaches this process alone, which passes it on once.
                start_new_session=True,
            )
            self._started.append(started)
        os.close(read_end)

    def wait(self) -> int:
        """The status of the first that failed, or 0; the others get a minute to end with it."""
        failed, deadline = 0, float("inf")
        try:
            while running := [p for p in self._started if p.poll() is None]:
                statuses = [p.returncode for p in self._started if p.returncode]
                if statuses and not failed:
                    failed, deadline = statuses[0], time.monotonic() + END_S
                if time.monotonic() > deadline:
                    _kill(running)
                time.sleep(_POLL_S)
        finally:
            _kill([p for p in self._started if p.poll() is None])
            for number, before in self._before.items():
                signal.signal(number, before)
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._alive)
        statuses = [failed, *(p.returncode for p in self._started)]
        status = next((status for status in statuses if status), 0)
        # A signal's number is negative; a shell adds it to 128.
        return 128 - status if status < 0 else status

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """To process 0; a second signal to all, which then leave at once after Ctrl-C."""
        self._signals += 1
        for process in self._started[: 1 if self._signals == 1 else None]:
            process.send_signal(number)


def _kill(processes: Sequence[subprocess.Popen]) -> None:
    for process in processes:
        process.kill()


def _environment(address: str, process: int, processes: int, devices: int) -> dict[str, str]:
    ids = range(process * devices, (process + 1) * devices)
    return {
        COORDINATOR: address,
        PROCESS_ID: str(process),
        PROCESSES: str(processes),
        "JAX_NUM_CPU_DEVICES": str(devices),
        # The GPUs of the machine that are this process's; without GPUs it says nothing.
        "JAX_LOCAL_DEVICE_IDS": ",".join(map(str, ids)),
    }


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]
