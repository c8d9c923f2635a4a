"""Where measurements go: metrics.jsonl, TensorBoard, Weights & Biases, the terminal."""

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tensorboardX
from tqdm import tqdm

from nrt_jax.errors import InputError
from nrt_jax.training.config import LoggingConfig

METRICS_FILE, SAMPLES_FILE = "metrics.jsonl", "samples.jsonl"
TIMING_PREFIXES = ("time/", "speed/")
"""Metrics that differ between two otherwise equal runs."""

SHOWN = ("loss/total", "reward/mean", "trace/tokens", "eval/exact_match", "speed/tokens_per_second")


def keep_up_to(path: Path, step: int) -> None:
    """Drop the lines of later steps, and a last line that was cut short, in one atomic rename."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if row["step"] > step:
            break
        kept.append(line + "\n")
    part = path.with_suffix(".part")
    part.write_text("".join(kept), encoding="utf-8")
    os.replace(part, path)


class PhaseTimer:
    """Seconds spent in each phase of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        elapsed = time.perf_counter() - start
        self.seconds[phase] = self.seconds.get(phase, 0.0) + elapsed

    def take(self) -> dict[str, float]:
        """The seconds since the last call, as `time/` metrics."""
        taken = {f"time/{phase}_s": seconds for phase, seconds in self.seconds.items()}
        self.seconds = {}
        return taken


class MetricsWriter:
    """Appends to a run's files from `step` on; later lines of an earlier try are dropped first."""

    def __init__(self, run_dir: Path, config: LoggingConfig, step: int, total: int, resolved: dict):
        for name in (METRICS_FILE, SAMPLES_FILE):
            keep_up_to(run_dir / name, step)
        self._every, self._total = config.every_steps, total
        self._metrics = (run_dir / METRICS_FILE).open("a", encoding="utf-8")
        self._samples = (run_dir / SAMPLES_FILE).open("a", encoding="utf-8")
        self._tensorboard = (
            tensorboardX.SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)
            if config.tensorboard
            else None
        )
        self._wandb = _open_wandb(config.wandb_project, run_dir, resolved)
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=step, unit="step") if terminal else None

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One line of metrics; numbers are written with full precision."""
        row = {"step": step} | {name: _number(value) for name, value in metrics.items()}
        self._metrics.write(json.dumps(row) + "\n")
        self._metrics.flush()
        if self._tensorboard is not None:
            for name, value in row.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(row, step=step)
        self._show(step, row)

    def write_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Traces and answers of one evaluation."""
        for sample in samples:
            self._samples.write(json.dumps({"step": step} | sample, ensure_ascii=False) + "\n")
        self._samples.flush()

    def _show(self, step: int, row: dict[str, Any]) -> None:
        shown = {name: row[name] for name in SHOWN if name in row}
        text = "  ".join(f"{name.split('/')[1]} {value:.4g}" for name, value in shown.items())
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(text)
        elif step % self._every == 0 or "eval/exact_match" in row or step == self._total:
            print(f"step {step}/{self._total}  {text}", flush=True)

    def sync(self) -> None:
        """Force what was written to the disk; called before a checkpoint is saved."""
        for file in (self._metrics, self._samples):
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Close the files."""
        self._metrics.close()
        self._samples.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._bar is not None:
            self._bar.close()


def _number(value: Any) -> float | int:
    return value if isinstance(value, int) else float(value)


def _open_wandb(project: str | None, run_dir: Path, resolved: dict) -> Any:
    if project is None:
        return None
    try:
        import wandb
    except ImportError as error:
        raise InputError(
            f"logging.wandb_project={project!r} needs the wandb package; "
            "pip install wandb, or set it to null"
        ) from error
    return wandb.init(project=project, dir=str(run_dir), config=resolved, resume="allow")
