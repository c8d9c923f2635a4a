"""The connections between the processes of one program: they meet before jax starts, and they end
together.

jax ends a process that cannot find the others, or has lost one, with a stack trace and after its
heartbeat. These connections carry the last line of a process that fails to all others at once, and
the operating system closes those of a process that is killed.
"""

import json
import logging
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from io import TextIOWrapper
from typing import Any, NamedTuple, NoReturn

from nrt_jax.errors import InputError

log = logging.getLogger(__name__)

GRACE_S = 10.0
"""Time for a process to come to the same end by itself after another one has told its own."""
CLOCKS_S = 10.0
"""Difference between clocks that is reported."""
_HELLO_S, _RETRY_S = 5.0, 0.2
_LEFT = {"left": True}


class Hello(NamedTuple):
    """What a process says first."""

    process: int
    processes: int
    host: str
    clock: float
    """Seconds since 1970."""


class Ending(NamedTuple):
    """Why a process ends."""

    line: str
    """Says which process it was."""
    status: int


@dataclass
class Connection:
    """One end of the connection to another process."""

    process: int
    host: str
    socket: socket.socket
    file: TextIOWrapper = field(init=False)

    def __post_init__(self) -> None:
        self.file = self.socket.makefile("r", encoding="utf-8")

    def send(self, message: Any) -> None:
        """Send a message; one that nobody can receive any more is dropped."""
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            log.debug("process %d is gone", self.process)

    def read(self) -> Any:
        """The next message; None when there will be none."""
        try:
            line = self.file.readline()
            return json.loads(line) if line.endswith("\n") else None
        except (OSError, ValueError):
            return None


def meet(address: str, process: int, processes: int, timeout_s: float) -> "Peers":
    """Wait until all processes have come to process 0, which listens at `address`.

    Raises InputError, on every process that has come, when one is missing after the timeout, when
    two have one id, and when they were told different numbers of processes.
    """
    hello = Hello(process, processes, socket.gethostname(), time.time())
    if process:
        return Peers(process, {0: _join(address, hello, timeout_s)})
    return Peers(process, _receive(address, hello, timeout_s))


# --- meeting -------------------------------------------------------------------------------------


def _join(address: str, hello: Hello, timeout_s: float) -> Connection:
    """The connection of another process to process 0."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout_s
    while (left := deadline - time.monotonic()) > 0:
        try:
            opened = socket.create_connection((host.strip("[]"), int(port)), min(left, _HELLO_S))
        except OSError:
            time.sleep(_RETRY_S)
            continue
        connection = Connection(0, host, opened)
        connection.send(hello._replace(clock=time.time()))
        # Process 0 answers when it gives up, too.
        opened.settimeout(left + _HELLO_S)
        answer = connection.read()
        if isinstance(answer, dict) and "host" in answer:
            opened.settimeout(None)
            connection.host = answer["host"]
            return connection
        if isinstance(answer, dict):
            raise InputError(answer["refused"])
        opened.close()
        time.sleep(_RETRY_S)
    raise InputError(
        f"coordinator {address}: nobody answered process {hello.process} within {timeout_s:g} s; "
        "start process 0 on that host, open the port, or name another --coordinator or a longer "
        "--timeout"
    )


def _receive(address: str, own: Hello, timeout_s: float) -> dict[int, Connection]:
    """The connections of process 0 to all others."""
    deadline = time.monotonic() + timeout_s
    found: dict[int, Connection] = {}
    with _listen(address) as listener:
        while missing := [i for i in range(1, own.processes) if i not in found]:
            listener.settimeout(max(deadline - time.monotonic(), 1e-3))
            try:
                opened, _ = listener.accept()
            except TimeoutError:
                names = ", ".join(map(str, missing))
                problem = (
                    f"coordinator {address}: of {own.processes} processes those with the ids "
                    f"{names} have not come within {timeout_s:g} s; start them, or give a longer "
                    "--timeout"
                )
            else:
                opened.settimeout(_HELLO_S)
                connection = Connection(0, "", opened)
                problem = _problem(connection, own, found)
            if problem:
                _refuse(found, problem)
    for connection in found.values():
        connection.socket.settimeout(None)
        connection.send({"host": own.host})
    return found


def _listen(address: str) -> socket.socket:
    port = int(address.rpartition(":")[2])
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=dual)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise InputError(
            f"coordinator {address}: process 0 cannot listen on port {port}: {reason}; end "
            "what uses it, give every process its own --process-id, or name another port"
        ) from error


def _problem(connection: Connection, own: Hello, found: dict[int, Connection]) -> str | None:
    """Enter a process that has come, or say why it cannot be; strangers are left out."""
    try:
        hello = Hello(*connection.read())
    except TypeError:
        connection.socket.close()
        return None
    there = f"process {hello.process} on {hello.host}"
    before = found.get(hello.process)
    connection.process, connection.host = hello.process, hello.host
    if hello.processes != own.processes:
        problem = (
            f"{there} was started as one of {hello.processes} processes, and process 0 on "
            f"{own.host} as one of {own.processes}; give all of them the same --processes"
        )
    elif before is not None:
        problem = (
            f"two processes have the id {hello.process}, on {before.host} and on {hello.host}; "
            f"give each its own --process-id, from 0 to {own.processes - 1}"
        )
    else:
        found[hello.process] = connection
        ahead = hello.clock - time.time()
        if abs(ahead) > CLOCKS_S:
            log.warning(
                "the clock of %s is %.0f s %s that of process 0: times in logs and of files cannot "
                "be compared; set both by NTP",
                there,
                abs(ahead),
                "ahead of" if ahead > 0 else "behind",
            )
        return None
    connection.send({"refused": problem})
    return problem


def _refuse(found: dict[int, Connection], problem: str) -> NoReturn:
    for connection in found.values():
        connection.send({"refused": problem})
    raise InputError(problem)


# --- the end -------------------------------------------------------------------------------------


class Peers:
    """The other processes: of process 0 all of them, of another one process 0, which passes on."""

    def __init__(self, process: int, connections: dict[int, Connection]):
        self.process = process
        self._connections = connections
        self._open = set(connections)
        self._ends_itself = threading.Event()
        self._told = threading.Lock()
        """Taken by the first end that is told, and never given back."""
        for connection in connections.values():
            threading.Thread(target=self._watch, args=(connection,), daemon=True).start()

    def leave(self) -> None:
        """Tell the others that this process has done its part."""
        for connection in self._connections.values():
            connection.send(_LEFT)

    def end_all(self, line: str, status: int) -> NoReturn:
        """End this process and all others; they print the line. The caller has printed it."""
        self._ends_itself.set()
        with self._told:
            self._end(Ending(f"process {self.process}: {line}", status))

    def _watch(self, connection: Connection) -> None:
        """Wait for the end of a process, and end with it unless it had done its part."""
        message = connection.read()
        left = message == _LEFT
        if left:
            message = connection.read()
        if message is None:
            self._open.discard(connection.process)
            if left:
                return
            there = f"process {connection.process} on {connection.host}"
            ending = Ending(f"{there} ended without a word; see its log", 1)
        else:
            ending = Ending(*message)
            if self.process == 0:
                self._tell(ending)
                connection.read()
                self._open.discard(connection.process)
            # What fails alike on all processes is told by each, after it has closed its files.
            self._ends_itself.wait(GRACE_S)
        with self._told:
            prefix = "nrt-jax: error: " if ending.status else "nrt-jax: "
            print(f"{prefix}{ending.line}", file=sys.stderr, flush=True)
            self._end(ending)

    def _tell(self, ending: Ending) -> None:
        for connection in self._connections.values():
            connection.send(ending)

    def _end(self, ending: Ending) -> NoReturn:
        self._tell(ending)
        deadline = time.monotonic() + GRACE_S + _HELLO_S
        # jax ends the others with a stack trace as soon as process 0 is gone.
        while self.process == 0 and self._open and time.monotonic() < deadline:
            time.sleep(0.02)
        if sys.stdout is not None:
            sys.stdout.flush()
        os._exit(ending.status)
