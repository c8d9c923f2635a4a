"""The bar fits the terminal, says what is compiled, and log lines stand above it."""

import contextlib
import logging
import os
import pty
import sys
import termios
from collections.abc import Callable

import pytest

from nrt_jax.compilation import WATCH
from nrt_jax.training.progress_bar import ProgressBar

LONG = [
    "loss -0.0001234",
    "reward 0.0001234",
    "trace tokens 1234",
    "exact match 0.9876",
    "tokens per second 1.234e+05",
]


def read_to_the_end(terminal: int) -> str:
    """All that was shown on a terminal that is closed on the other side, which EIO tells."""
    shown = b""
    with contextlib.suppress(OSError), os.fdopen(terminal, "rb", buffering=0) as reader:
        while piece := reader.read(1 << 16):
            shown += piece
    return shown.decode()


@pytest.fixture
def lines(monkeypatch) -> Callable[..., list[str]]:
    """What a terminal of some columns shows of a bar, one line for each refresh."""

    def show(columns: int, use: Callable[[ProgressBar], None], total: int = 100_000) -> list[str]:
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24 if columns else 0, columns))
        with os.fdopen(theirs, "w") as terminal:
            monkeypatch.setattr(sys, "stderr", terminal)
            with ProgressBar(total, 0) as bar:
                use(bar)
        return read_to_the_end(ours).replace("\r", "\n").split("\n")

    return show


@pytest.mark.parametrize("columns", [0, 20, 40, 80, 200])
def test_no_line_is_longer_than_the_terminal(columns, lines):
    shown = lines(columns, lambda bar: bar.show(99_999, LONG))
    assert max(map(len, shown)) <= (columns or 80)
    assert any(line.startswith("  0%|") for line in shown)


def test_metrics_that_have_no_room_are_left_out_whole(lines):
    shown = "\n".join(lines(80, lambda bar: bar.show(99_999, LONG)))
    assert ", loss -0.0001234  reward 0.0001234]" in shown
    assert "trace" not in shown


def test_says_what_is_compiled_and_how_much_is_known_to_come(lines, monkeypatch):
    monkeypatch.setattr(WATCH, "programs", 11)

    def compile(bar: ProgressBar) -> None:
        bar.show(3, ["loss 0.1"])
        for to_come in (2, 0):
            WATCH.to_come = to_come
            WATCH._change(compiling=True)
        WATCH._change(compiling=False)

    shown = lines(80, compile, total=9)
    *_, first, second, third = [line for line in shown if "loss" in line]
    assert "compiling program 12, 2 to come  loss 0.1]" in "\n".join(shown)
    assert "compiling program 12  loss 0.1]" in "\n".join(shown)
    assert "compiling" not in third, (first, second)
    assert WATCH.on_change is None


def test_log_lines_stand_above_the_bar(monkeypatch):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])

    def log(bar: ProgressBar) -> None:
        bar.show(3, ["loss 0.1"])
        logging.getLogger("nrt_jax").warning("checkpoint 3 cannot be read")

    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        # As the command line does before the bar is shown.
        root.addHandler(logging.StreamHandler(terminal))
        with ProgressBar(9, 0) as bar:
            log(bar)
    shown = read_to_the_end(ours)
    # The bar's line is wiped before, and drawn again after.
    wiped, _, redrawn = shown.partition("checkpoint 3 cannot be read\r\n")
    assert wiped.rpartition("loss 0.1]")[2].strip() == ""
    assert "loss 0.1]" in redrawn
