"""The life of a run over all of its starts, and how much of it finished steps took."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from nrt_jax.checkpoints.files import append, open_to_append

STARTS_FILE = "starts.jsonl"
"""A line per start: seconds since 1970, and the step after which it went on."""
_USEFUL = "goodput/useful_s"


class RunLife:
    """Counts the seconds of finished steps against those since the first start.

    What is lost are starting up, compiling, evaluating, saving, steps that are taken again after a
    kill, and the time between two starts.
    """

    def __init__(
        self, run_dir: Path, metrics: Path, after: int, clock: Callable[[], float] = time.time
    ):
        """A new start after step `after`, when `metrics` has the lines up to it and no other."""
        self._clock = clock
        starts_file = run_dir / STARTS_FILE
        line = json.dumps({"time": clock(), "step": after}).encode() + b"\n"
        if starts_file.exists() and not starts_file.read_bytes().endswith(b"\n"):
            # A full disk has cut the last line short.
            line = b"\n" + line
        with open_to_append(starts_file) as file:
            append(file, line)
        starts = list(_rows(starts_file))
        self._first, self._starts = float(starts[0]["time"]), len(starts)
        self._useful = max((row.get(_USEFUL) or 0.0 for row in _rows(metrics)), default=0.0)

    def of_step(self, seconds: float) -> dict[str, float]:
        """Metrics after a finished step, which took `seconds` without compiling."""
        self._useful += max(seconds, 0.0)
        # Another host's clock may be behind.
        life = max(self._clock() - self._first, self._useful)
        return {
            _USEFUL: self._useful,
            "goodput/life_s": life,
            "goodput/share": self._useful / life if life else 1.0,
            "goodput/starts": float(self._starts),
        }


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file without those that a killed process has cut short."""
    for line in path.read_bytes().splitlines():
        with suppress(ValueError):
            yield json.loads(line)
