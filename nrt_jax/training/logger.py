"""Write metrics to metrics.jsonl, TensorBoard, the trackers and the terminal, and rollouts."""

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from nrt_jax.atomic_files import write_atomically
from nrt_jax.checkpoints.files import append, open_to_append
from nrt_jax.config.logging import LoggingConfig
from nrt_jax.evaluation.reference_log import (
    REFERENCES,
    ReferenceRow,
    drop_references_after,
    write_references,
)
from nrt_jax.training.life import RunLife
from nrt_jax.training.progress_bar import ProgressBar
from nrt_jax.training.tensorboard import EventFile
from nrt_jax.training.trackers import open_trackers

if TYPE_CHECKING:
    import pyarrow as pa

    from nrt_jax.training.rollout_shards import RolloutShards

NOT_FINITE = "metrics/not_finite"
"""Number of metrics of the line that are NaN or infinite."""
METRICS_FILE, SAMPLES_FILE, ROLLOUTS = "metrics.jsonl", "samples.jsonl", "rollouts"
TIMING_PREFIXES = ("time/", "speed/", "weights/seconds", "goodput/")
"""Metrics that differ between two otherwise equal runs."""

TERMINAL_NAMES = {
    "loss/total": "loss",
    "warmup/loss": "warm-up loss",
    "reward/mean": "reward",
    "trace/tokens": "trace tokens",
    "eval/exact_match": "exact match",
    "speed/tokens_per_second": "tokens per second",
}
"""The metrics that the terminal shows, and what it calls them."""


def keep_up_to(path: Path, step: int) -> None:
    """Drop the lines of later steps and an incomplete last line, in one atomic rename."""
    if not path.exists():
        return
    kept = []
    # Not splitlines: samples may hold the other line separators of Unicode.
    for line in path.read_bytes().split(b"\n"):
        line_step = _step_of(line)
        if line_step is None or line_step > step:
            break
        kept.append(line + b"\n")
    write_atomically(path, b"".join(kept))


def _step_of(line: bytes) -> int | None:
    """The step of a complete line; None for an incomplete one."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return None


class PhaseTimer:
    """Seconds spent in each phase of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        # A traced step shows the phases of the host above what the devices run.
        with jax.profiler.TraceAnnotation(phase):
            yield
        elapsed = time.perf_counter() - start
        self.seconds[phase] = self.seconds.get(phase, 0.0) + elapsed

    def take(self) -> dict[str, float]:
        """The seconds since the last call, as `time/` metrics."""
        taken = {f"time/{phase}_s": seconds for phase, seconds in self.seconds.items()}
        self.seconds = {}
        return taken


class MetricsWriter:
    """Appends metrics to the files of a run, and times the phases of its steps.

    Lines after step `after` are dropped first: a killed process wrote them, and these steps are
    taken again. Writing raises OSError with the name of the file.
    """

    def __init__(
        self, run_dir: Path, config: LoggingConfig, *, after: int, total: int, resolved: dict
    ):
        self.timer = PhaseTimer()
        self._every, self._total = config.every_steps, total
        for name in (METRICS_FILE, SAMPLES_FILE):
            keep_up_to(run_dir / name, after)
        self._references = run_dir / REFERENCES
        drop_references_after(self._references, after)
        self._trackers = open_trackers(config, run_dir, resolved, continues=after >= 0)
        with ExitStack() as opened:
            self._metrics = opened.enter_context(open_to_append(run_dir / METRICS_FILE))
            self._life = RunLife(run_dir, run_dir / METRICS_FILE, after)
            self._samples = opened.enter_context(open_to_append(run_dir / SAMPLES_FILE))
            self._rollouts = _open_rollouts(run_dir / ROLLOUTS, config, after)
            if self._rollouts is not None:
                opened.enter_context(self._rollouts)
            self._events: EventFile | None = None
            if config.tensorboard:
                events = EventFile(run_dir / "tensorboard", after + 1)
                self._events = opened.enter_context(closing(events))
            for tracker in self._trackers:
                opened.push(
                    lambda kind, error, trace, of=tracker: of.finish(failed=error is not None)
                )
            self._bar: ProgressBar | None = None
            if sys.stderr.isatty():
                self._bar = opened.enter_context(ProgressBar(total, max(after, 0)))
            self._opened = opened.pop_all()

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write one line of metrics, numbers with full precision.

        JSON has no NaN and no infinity: there they are null, and NOT_FINITE counts them.
        """
        scalars = {name: _number(value) for name, value in metrics.items()}
        not_finite = [name for name, value in scalars.items() if not math.isfinite(value)]
        scalars[NOT_FINITE] = len(not_finite)
        row = {"step": step} | scalars | dict.fromkeys(not_finite)
        append(self._metrics, json.dumps(row, allow_nan=False).encode() + b"\n")
        if self._events is not None:
            self._events.write(step, scalars)
        for tracker in self._trackers:
            tracker.log(step, scalars)
        self._show(step, scalars)

    def of_life(self, seconds: float) -> dict[str, float]:
        """Metrics of the run's life, with a finished step that took so long without compiling."""
        return self._life.of_step(seconds)

    def write_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Write the traces and answers of one evaluation."""
        lines = [json.dumps({"step": step} | sample, ensure_ascii=False) for sample in samples]
        append(self._samples, "".join(line + "\n" for line in lines).encode())

    def write_references(self, step: int, rows: Sequence[ReferenceRow]) -> None:
        """Write what one evaluation found on the tokens of reference answers, if it was asked."""
        if rows:
            write_references(self._references, step, rows)

    def write_rollouts(self, table: "pa.Table") -> None:
        """Keep the traces of one step until a file of them is full, or until `sync`."""
        assert self._rollouts is not None, "logging.rollouts is false"
        self._rollouts.add(table)

    def _show(self, step: int, row: dict[str, Any]) -> None:
        shown = {TERMINAL_NAMES[name]: row[name] for name in TERMINAL_NAMES if name in row}
        texts = [f"{name} {value:.4g}" for name, value in shown.items()]
        if self._bar is not None:
            self._bar.show(step, texts)
        elif step % self._every == 0 or "eval/exact_match" in row or step == self._total:
            print(f"step {step}/{self._total}  {'  '.join(texts)}", flush=True)

    def sync(self) -> None:
        """Force everything up to now to the disk; called before a checkpoint is saved."""
        for file in (self._metrics, self._samples):
            os.fsync(file.fileno())
        if self._rollouts is not None:
            self._rollouts.sync()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *error: Any) -> None:
        """Close the files, and tell the trackers whether the run failed."""
        self._opened.__exit__(*error)

    def close(self) -> None:
        """Close everything of a run that did not fail."""
        self.__exit__(None, None, None)


class SilentWriter:
    """The writer of a process other than the first: it times the steps, and writes nothing."""

    def __init__(self) -> None:
        self.timer = PhaseTimer()

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Leave the line to process 0."""

    def of_life(self, seconds: float) -> dict[str, float]:
        """Leave the run's life to process 0."""
        return {}

    def write_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Leave the samples to process 0."""

    def write_references(self, step: int, rows: Sequence[ReferenceRow]) -> None:
        """Leave the tokens of reference answers to process 0."""

    def write_rollouts(self, table: "pa.Table") -> None:
        """Leave the traces to process 0."""

    def sync(self) -> None:
        """There is nothing to force to the disk."""


def _open_rollouts(folder: Path, config: LoggingConfig, after: int) -> "RolloutShards | None":
    """The log of rollouts; None where none is kept. An earlier one ends with step `after` too."""
    if not config.rollouts and not folder.is_dir():
        return None
    # pyarrow is imported where there are rollouts.
    from nrt_jax.training.rollout_shards import RolloutShards

    rollouts = RolloutShards(folder, after=after)
    return rollouts if config.rollouts else None


def _number(value: Any) -> float | int:
    return value if isinstance(value, int) else float(value)
