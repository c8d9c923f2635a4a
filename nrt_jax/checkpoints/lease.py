"""A lock by a file that its holder keeps changing, for folders without locks of the system.

Object stores that are mounted as folders, and some network file systems, have no `flock`. Only the
holder's changes count, never a time, so the clocks of the hosts may differ.
"""

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nrt_jax import distributed
from nrt_jax.atomic_files import write_atomically
from nrt_jax.errors import InputError

RENEW_S, EXPIRE_S = 5.0, 20.0
"""A lease is changed so often, and is free when it was not for so long."""


@contextmanager
def leased(path: Path, name: str) -> Iterator[None]:
    """Hold the lease while entered; `name` says in errors what it is of.

    Waits EXPIRE_S where a lease was left by a process that was killed. Raises InputError when
    another process holds it. A process whose lease was taken, because it was suspended for longer,
    ends at once.
    """
    _wait_until_free(path, name)
    own = uuid.uuid4().hex
    _write(path, own, 0)
    # Of two that came at once both have written by now, and the last one has it.
    time.sleep(RENEW_S / 5)
    if _read(path).get("owner") != own:
        raise _held(path, name)
    ended = threading.Event()
    threading.Thread(target=_renew, args=(path, name, own, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        path.unlink(missing_ok=True)


def _wait_until_free(path: Path, name: str) -> None:
    first = _read(path)
    deadline = time.monotonic() + EXPIRE_S
    while (now := _read(path)) and time.monotonic() < deadline:
        if now != first:
            raise _held(path, name)
        time.sleep(RENEW_S / 5)


def _renew(path: Path, name: str, own: str, ended: threading.Event) -> None:
    changes = 0
    while not ended.wait(RENEW_S):
        holder = _read(path)
        if holder and holder["owner"] != own:
            line = f"{name}: its lease was taken by {holder['host']} while this process stood still"
            print(f"nrt-jax: error: {line}", file=sys.stderr, flush=True)
            distributed.end_all(line, 1)
            os._exit(1)
        changes += 1
        _write(path, own, changes)


def _read(path: Path) -> dict:
    """The lease; empty for none."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}


def _write(path: Path, owner: str, changes: int) -> None:
    lease = {"owner": owner, "host": socket.gethostname(), "changes": changes}
    write_atomically(path, json.dumps(lease).encode() + b"\n")


def _held(path: Path, name: str) -> InputError:
    return InputError(
        f"{name}: another process trains in it, on {_read(path).get('host', 'another host')}; wait "
        "until it ends, or choose another run_dir"
    )
