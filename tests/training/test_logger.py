"""The files that measurements go to, across kills, restarts and full disks."""

import contextlib
import errno
import io
import json
import math
import os
import pty
import struct
import termios
from pathlib import Path

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from nrt_jax.atomic_files import write_atomically
from nrt_jax.checkpoints.files import append, open_to_append
from nrt_jax.config.logging import LoggingConfig
from nrt_jax.errors import InputError
from nrt_jax.training.logger import MetricsWriter, PhaseTimer, keep_up_to

TOTAL = 9


def row(step: int, **values) -> bytes:
    return json.dumps({"step": step, **values}, ensure_ascii=False).encode() + b"\n"


def open_writer(directory: Path, step: int = -1, **logging) -> MetricsWriter:
    config = LoggingConfig(**logging)
    return MetricsWriter(directory, config, after=step, total=TOTAL, resolved={})


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        (b"", b""),
        (row(0) + row(1) + row(2), row(0) + row(1)),
        (row(1) + row(1, evaluated=True) + row(2), row(1) + row(1, evaluated=True)),
        (row(1)[:-1], row(1)),
        (row(0) + row(1)[:-4], row(0)),
        (row(0) + b"\xe2\x88", row(0)),
        (row(0) + row(1, answer="half a sign: −")[:-4], row(0)),
        (row(0) + b'{"no step": 1}\n' + row(1), row(0)),
        (row(0) + b"[]\n" + row(1), row(0)),
        (
            row(0, answer="a\u2028b\x85c\x0bd") + row(1),
            row(0, answer="a\u2028b\x85c\x0bd") + row(1),
        ),
    ],
)
def test_keeps_whole_lines_up_to_a_step(tmp_path, content, kept):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    keep_up_to(path, 1)
    assert path.read_bytes() == kept
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_starting_over_keeps_nothing(tmp_path):
    for name in ("metrics.jsonl", "samples.jsonl"):
        (tmp_path / name).write_bytes(row(0) + row(1))
    open_writer(tmp_path, -1).close()
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / name).read_bytes() == b""


def test_lines_are_in_the_file_at_once(tmp_path):
    writer = open_writer(tmp_path)
    writer.write(1, {"loss": 0.1 + 0.2, "count": 3})
    writer.write_samples(1, [{"answer": "−1\u2028"}, {"answer": "b"}])
    written = {"loss": 0.1 + 0.2, "count": 3, "metrics/not_finite": 0}
    assert (tmp_path / "metrics.jsonl").read_bytes() == row(1, **written)
    assert (tmp_path / "samples.jsonl").read_bytes() == row(1, answer="−1\u2028") + row(
        1, answer="b"
    )
    writer.close()


def test_a_continued_run_appends(tmp_path):
    first = open_writer(tmp_path)
    for step in (0, 1, 2):
        first.write(step, {"x": step})
    first.close()
    second = open_writer(tmp_path, 1)
    second.write(2, {"x": 20})
    second.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_bytes().splitlines()]
    assert [(row["step"], row["x"]) for row in rows] == [(0, 0), (1, 1), (2, 20)]


def test_values_that_are_not_finite_are_null_and_counted(tmp_path, capsys):
    writer = open_writer(tmp_path, every_steps=1)
    values = {"loss/total": np.float32("nan"), "a": math.inf, "b": -math.inf, "c": 0.5, "d": 7}
    writer.write(1, values)
    writer.close()

    def no_constant(name):
        raise AssertionError(f"{name} is no JSON")

    line = (tmp_path / "metrics.jsonl").read_text()
    written = json.loads(line, parse_constant=no_constant)
    nulls = dict.fromkeys(("loss/total", "a", "b"))
    assert written == {"step": 1, **nulls, "c": 0.5, "d": 7, "metrics/not_finite": 3}
    assert "loss nan" in capsys.readouterr().out
    keep_up_to(tmp_path / "metrics.jsonl", 1)
    assert (tmp_path / "metrics.jsonl").read_text() == line


# --- TensorBoard ----------------------------------------------------------------------------------


def read_events(path: Path) -> list[Event]:
    content, events = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        events.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    return events


def test_tensorboard_has_every_written_step(tmp_path):
    first = open_writer(tmp_path)
    first.write(1, {"loss/total": 0.5, "x": 2.0})
    # Not closed: the process is killed here.
    (path,) = (tmp_path / "tensorboard").iterdir()
    version, start, event = read_events(path)
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (0, 1)
    assert event.step == 1
    values = {v.tag: v.simple_value for v in event.summary.value}
    assert values == {"loss/total": 0.5, "x": 2.0, "metrics/not_finite": 0}
    open_writer(tmp_path, 7).close()
    (path,) = set((tmp_path / "tensorboard").iterdir()) - {path}
    # What earlier files have from this step on is hidden.
    assert read_events(path)[1].step == 8


def test_tensorboard_itself_reads_the_file(tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
    )
    writer = open_writer(tmp_path)
    writer.write(3, {"loss/total": 0.5})
    writer.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/total")] == [(3, 0.5)]


def test_no_tensorboard(tmp_path):
    writer = open_writer(tmp_path, tensorboard=False)
    writer.write(1, {"x": 1.0})
    writer.close()
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "samples.jsonl", "starts.jsonl"]


def test_wandb_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(InputError, match=r"logging\.wandb_project='p' needs .*'nrt-jax\[wandb\]'"):
        open_writer(tmp_path, wandb_project="p")


# --- the terminal ---------------------------------------------------------------------------------


def test_plain_lines(tmp_path, capsys):
    writer = open_writer(tmp_path, every_steps=2)
    for step in (1, 2, 3):
        writer.write(step, {"loss/total": step / 7})
    writer.write(3, {"eval/exact_match": 0.25})
    writer.write(TOTAL, {"loss/total": 0.0})
    writer.close()
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "step 2/9  loss 0.2857",
        "step 3/9  exact match 0.25",
        "step 9/9  loss 0",
    ]
    assert captured.err == ""


def test_the_terminal_says_what_its_numbers_are(tmp_path, capsys):
    writer = open_writer(tmp_path)
    names = ("loss/total", "loss/trace", "reward/mean", "trace/tokens", "speed/tokens_per_second")
    writer.write(1, {name: float(value) for value, name in enumerate(names)})
    writer.close()
    assert capsys.readouterr().out == (
        "step 1/9  loss 0  reward 2  trace tokens 3  tokens per second 4\n"
    )


def test_a_bar_on_a_terminal(tmp_path, monkeypatch, capsys):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        writer = open_writer(tmp_path, 2)
        writer.write(4, {"loss/total": 0.125})
        writer.close()
    shown = b""
    with contextlib.suppress(OSError):  # how the system says that nothing more comes
        while part := os.read(ours, 1 << 16):
            shown += part
    os.close(ours)
    shown = shown.decode()
    assert "| 4/9 [" in shown
    assert "loss 0.125" in shown
    assert capsys.readouterr().out == ""


# --- full disks -----------------------------------------------------------------------------------


class Full(io.FileIO):
    """A file on a disk that has room for ten bytes."""

    def write(self, data) -> int:
        taken = bytes(data[: 10 - self.tell()])
        if not taken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(taken)


def test_append_writes_all_or_names_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with Full(path, "a") as file:
        append(file, b"12345678")
        with pytest.raises(OSError, match=r"No space left on device: '.*/metrics\.jsonl'"):
            append(file, b"abcd")
    assert path.read_bytes() == b"12345678ab"


def test_closing_after_a_failure_raises_nothing(tmp_path):
    file = open_to_append(Path("/dev/full"))
    with pytest.raises(OSError, match="/dev/full"):
        append(file, b"x")
    file.close()


def test_an_atomic_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match=r"full: .*config\.yaml"):
        write_atomically(path, b"new")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"config.yaml": "old"}


def test_timer_adds_up_and_starts_anew():
    timer = PhaseTimer()
    for phase in ("data", "update", "data"):
        with timer(phase):
            pass
    taken = timer.take()
    assert list(taken) == ["time/data_s", "time/update_s"]
    assert all(0 <= seconds < 5 for seconds in taken.values())
    assert timer.take() == {}
