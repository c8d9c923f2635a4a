"""Ctrl-C: the first ends what has nothing to save, the second ends everything at once."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nrt_jax import cli, verbs
from nrt_jax.stop import INTERRUPTED, Interrupts, StopRequest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def handlers():
    """Give back what a program that ends may leave."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    signal.set_wakeup_fd(-1)


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def test_ends_at_once_while_there_is_nothing_to_save():
    with pytest.raises(KeyboardInterrupt), Interrupts() as interrupts, StopRequest() as stop:
        press()
    assert interrupts.seen
    assert stop.interrupted


def test_waits_for_the_step():
    with Interrupts() as interrupts, StopRequest() as stop:
        assert stop.plan() is None
        stop.wait_for_the_step()
        assert stop.plan() == "Ctrl-C: finishing the step and saving; Ctrl-C again leaves at once"
        press()
        assert (stop.requested, stop.interrupted) == (True, True)
    # An error while the run saves is no interruption.
    assert not interrupts.seen


def test_sigterm_is_no_interruption():
    with StopRequest() as stop:
        stop.wait_for_the_step()
        signal.raise_signal(signal.SIGTERM)
    assert (stop.requested, stop.interrupted) == (True, False)


def test_the_handler_is_given_back():
    before = signal.getsignal(signal.SIGINT)
    with Interrupts(), StopRequest():
        pass
    assert signal.getsignal(signal.SIGINT) == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_background_job_ignores_it():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Interrupts(), StopRequest():
        press()
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ImportError("numpy failed"), OSError(5)])
def test_what_a_library_makes_of_it_is_one_line(error, monkeypatch, capsys):
    """Some turn KeyboardInterrupt into an error of their own."""

    def verb(_):
        try:
            press()
        except KeyboardInterrupt:
            raise error from None

    monkeypatch.setattr(verbs, "config_show", verb)
    assert cli.main(["config", "show", "x.yaml"]) == INTERRUPTED == 130
    assert capsys.readouterr().err == "nrt-jax: error: interrupted\n"


BLOCKED = """
import ctypes, sys, threading
from nrt_jax.stop import Interrupts, StopRequest
with Interrupts() as interrupts, StopRequest() as stop:
    interrupts.at_first = lambda: print("first", flush=True)
    interrupts.at_leaving = lambda: "the same command continues the run from step 4"
    stop.wait_for_the_step()
    print("ready", flush=True)
    while True:
        # A library that computes: Python runs no handler meanwhile.
        ctypes.CDLL(None).sleep(100)
"""


def test_a_second_one_leaves_while_a_library_computes():
    process = subprocess.Popen(
        [sys.executable, "-c", BLOCKED],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "first\n"
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err == (
        "\nnrt-jax: error: interrupted; the same command continues the run from step 4\n"
    )


IN_COLLECTION = """
import signal, time
from nrt_jax.stop import StopRequest
class Collected:
    def __del__(self):
        signal.raise_signal(signal.{name})
        for _ in range(100):
            pass
with StopRequest():
    collected = Collected()
    del collected
    for _ in range(600):
        time.sleep(0.05)
"""


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 0), ("SIGINT", -signal.SIGINT)])
def test_a_signal_while_garbage_is_collected_stops_all_the_same(name, status):
    result = subprocess.run(
        [sys.executable, "-c", IN_COLLECTION.format(name=name)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=20,
    )
    assert result.returncode == status, result.stderr
    assert "ignored" not in result.stderr


SLOW_IMPORT = """
import signal, sys
class Importing:
    def find_spec(self, name, *_):
        if name == "{module}":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Importing())
from nrt_jax.cli import main
sys.exit(main(sys.argv[1:]))
"""

VERBS = {
    "generate": ("generate", "configs/quickstart/base_model", "--prompt", "1+2"),
    "serve": ("serve", "configs/quickstart/base_model", "port=0", "grpc_port=null"),
    "import": ("import", "configs/quickstart/base_model", "{out}"),
    "export": ("export", "configs/quickstart/base_model", "{out}"),
    "train": ("train", "quickstart/nrt", "run_dir={out}"),
    "data show": ("data", "show", "quickstart/nrt"),
    "report": ("report", "runs/no", "--out", "{out}"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_while_a_verb_imports_its_libraries(verb, tmp_path):
    module = "matplotlib" if verb == "report" else "jax"
    words = [word.format(out=tmp_path / "out") for word in VERBS[verb]]
    result = subprocess.run(
        [sys.executable, "-c", SLOW_IMPORT.format(module=module), *words],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=os.environ,
    )
    assert result.returncode == 130, result.stderr
    assert result.stderr.splitlines()[-1].startswith("nrt-jax: error: interrupted")
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
