"""`nrt-jax sweep`: train all cells, as many at a time as the machine is divided for.

A cell is a run directory. One that is finished is skipped, one that was stopped goes on, and one
that failed is left until it is asked for again.
"""

import json
import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from nrt_jax.atomic_files import write_atomically
from nrt_jax.config.load import dump_config
from nrt_jax.devices import GPU_FILES, TPU_FILES, device_files
from nrt_jax.errors import InputError
from nrt_jax.experiments.cells import Cell, Sweep
from nrt_jax.stop import INTERRUPTED, StopRequest

log = logging.getLogger(__name__)

CONFIGS, LOGS = "configs", "logs"
"""Folders of a sweep: the resolved config and the output of each cell."""
CELLS_FILE = "sweep.json"
"""The options of each cell by the name of its folder."""
_POLL_S = 0.2
_TAIL_BYTES = 65536

State = Literal["finished", "failed", "begun", "waiting"]


class CellState(NamedTuple):
    """How far a cell is, as its files tell."""

    state: State
    step: int
    """The last that is in metrics.jsonl."""
    line: str = ""
    """The last line of a run that failed."""
    age_s: float | None = None
    """Seconds since the run wrote metrics."""


def cell_state(sweep: Sweep, cell: Cell) -> CellState:
    """Read the state of a cell from its folder."""
    failed = _failure_file(sweep, cell)
    metrics = cell.config.run_dir / "metrics.jsonl"
    step, evaluated, age_s = 0, -1, None
    with suppress(OSError):
        age_s = time.time() - metrics.stat().st_mtime
        for row in _rows(metrics):
            step = max(step, row.get("step", 0) if "loss/total" in row else 0)
            evaluated = row["step"] if "eval/exact_match" in row else evaluated
    last = cell.config.train.steps
    if step >= last and (evaluated >= last or not cell.config.evaluation.examples):
        return CellState("finished", step, age_s=age_s)
    if failed.exists():
        return CellState("failed", step, failed.read_text("utf-8").strip(), age_s)
    return CellState("begun" if cell.config.run_dir.exists() else "waiting", step, age_s=age_s)


def _rows(path: Path) -> Iterator[dict]:
    """The rows of metrics.jsonl; the last may be half written."""
    for line in path.read_text("utf-8", "replace").splitlines():
        with suppress(json.JSONDecodeError):
            row = json.loads(line)
            if isinstance(row, dict):
                yield row


def run_sweep(
    sweep: Sweep, *, jobs: int = 1, retry: bool = False, chosen: Sequence[Cell] | None = None
) -> int:
    """Train the cells that are not finished; 0 when all of them are, 1 where one has failed.

    `jobs` run at a time, each with its share of the CPU's cores or of the GPUs. `retry` trains
    those again that have failed. SIGTERM and Ctrl-C let each run save its step; the same command
    goes on.
    """
    shares = _shares(jobs)
    cells = sweep.cells if chosen is None else chosen
    write_configs(sweep)
    states = {cell.name: cell_state(sweep, cell) for cell in cells}
    waiting = [
        cell
        for cell in cells
        if states[cell.name].state != "finished" and (retry or states[cell.name].state != "failed")
    ]
    _log_start(sweep, cells, states, waiting)
    with StopRequest() as stop:
        stop.wait_for_the_step()
        _run_all(sweep, waiting, shares, stop)
    if stop.requested:
        log.info("stopped; the same command goes on")
        return INTERRUPTED if stop.interrupted else 0
    failed = [(cell, cell_state(sweep, cell)) for cell in cells]
    failed = [(cell, state) for cell, state in failed if state.state != "finished"]
    for cell, state in failed:
        log.error("%s: %s", cell.name, state.line or f"stopped at step {state.step}")
    if failed:
        log.error("%d of %d cells failed; mend the cause and add --retry", len(failed), len(cells))
    return 1 if failed else 0


def _log_start(
    sweep: Sweep, cells: Sequence[Cell], states: dict[str, CellState], waiting: Sequence[Cell]
) -> None:
    count = dict.fromkeys(("finished", "failed"), 0)
    for state in states.values():
        if state.state in count:
            count[state.state] += 1
    log.info(
        "%s: %d cells in %s, %d finished, %d failed, %d to train",
        *(sweep.file, len(cells), sweep.folder, count["finished"], count["failed"], len(waiting)),
    )


def write_configs(sweep: Sweep) -> None:
    """The resolved config of every cell, and what the folders of the cells mean."""
    try:
        (sweep.folder / CONFIGS).mkdir(parents=True, exist_ok=True)
        (sweep.folder / LOGS).mkdir(exist_ok=True)
        for cell in sweep.cells:
            _write(config_file(sweep, cell), dump_config(cell.config))
        known = read_cells(sweep.folder) if (sweep.folder / CELLS_FILE).exists() else {}
        known |= {cell.name: dict(cell.options) for cell in sweep.cells}
        _write(sweep.folder / CELLS_FILE, json.dumps(known, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise InputError(
            f"{sweep.folder}: cannot be written ({error.strerror}); name another folder by --out"
        ) from error


def _write(path: Path, text: str) -> None:
    """Every task of a job array writes these files, and reads what another has written."""
    write_atomically(path, text.encode(), shared=True)


def read_cells(folder: Path) -> dict[str, dict[str, str]]:
    """The options of the cells in a folder of a sweep, by the names of their folders."""
    path = folder / CELLS_FILE
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); start the sweep again") from error


def config_file(sweep: Sweep, cell: Cell) -> Path:
    """Where the resolved config of a cell is."""
    return sweep.folder / CONFIGS / f"{cell.name}.yaml"


# --- processes -----------------------------------------------------------------------------------


@dataclass
class _Started:
    cell: Cell
    process: subprocess.Popen
    share: dict[str, str]


def _run_all(
    sweep: Sweep, waiting: Sequence[Cell], shares: Sequence[dict[str, str]], stop: StopRequest
) -> None:
    left, free = list(waiting), list(shares)
    running: list[_Started] = []
    signalled = False
    try:
        while running or (left and not stop.requested):
            while left and free and not stop.requested:
                running.append(_start(sweep, left.pop(0), free.pop()))
            if stop.requested and not signalled:
                signalled = True
                for started in running:
                    started.process.terminate()
            for started in [s for s in running if s.process.poll() is not None]:
                running.remove(started)
                free.append(started.share)
                _end(sweep, started, stopped=signalled)
            time.sleep(_POLL_S)
    finally:
        for started in running:
            started.process.kill()


def _start(sweep: Sweep, cell: Cell, share: dict[str, str]) -> _Started:
    _failure_file(sweep, cell).unlink(missing_ok=True)
    words = ["train", str(config_file(sweep, cell))]
    log.info("%s: nrt-jax %s", cell.title, shlex.join(words))
    with _log_file(sweep, cell).open("ab") as output, _on_cores(share):
        process = subprocess.Popen(
            [sys.executable, "-m", "nrt_jax", *words],
            env=os.environ | {name: value for name, value in share.items() if name != _CORES},
            stdout=output,
            stderr=subprocess.STDOUT,
            # Ctrl-C in a terminal reaches this process alone, which asks every run to save.
            start_new_session=True,
        )
    return _Started(cell, process, share)


def _end(sweep: Sweep, started: _Started, *, stopped: bool) -> None:
    """Keep the last line of a run that failed."""
    status = started.process.returncode
    if status == 0 or stopped:
        log.info("%s: %s", started.cell.title, "stopped" if stopped else "finished")
        return
    line = _last_line(_log_file(sweep, started.cell)) or f"ended with status {status}"
    _failure_file(sweep, started.cell).write_text(line + "\n", encoding="utf-8")
    log.error("%s: failed: %s", started.cell.title, line)


def _last_line(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        lines = [line for line in file.read().decode("utf-8", "replace").splitlines() if line]
    return lines[-1] if lines else ""


def _failure_file(sweep: Sweep, cell: Cell) -> Path:
    return sweep.folder / LOGS / f"{cell.name}.failed"


def _log_file(sweep: Sweep, cell: Cell) -> Path:
    return sweep.folder / LOGS / f"{cell.name}.log"


# --- shares of the machine -----------------------------------------------------------------------

_CORES = "cores"


def _shares(jobs: int) -> list[dict[str, str]]:
    """For each job the GPUs that it sees, or the cores of the CPU that it runs on."""
    if jobs == 1:
        return [{}]
    if device_files(TPU_FILES):
        raise InputError(
            f"--jobs {jobs}: the TPU chips of a host belong to one process; use --jobs 1"
        )
    gpus = _gpus()
    units = gpus or [str(core) for core in sorted(os.sched_getaffinity(0))]
    if len(units) < jobs:
        kind = "GPUs" if gpus else "cores"
        raise InputError(f"--jobs {jobs}: this machine has {len(units)} {kind}; use fewer jobs")
    size = len(units) // jobs
    groups = [",".join(units[job * size : (job + 1) * size]) for job in range(jobs)]
    return [{"CUDA_VISIBLE_DEVICES" if gpus else _CORES: group} for group in groups]


def _gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip()]
    return [Path(path).name.removeprefix("nvidia") for path in device_files(GPU_FILES)]


@contextmanager
def _on_cores(share: dict[str, str]) -> Iterator[None]:
    """What starts meanwhile runs on these cores alone: XLA takes a thread per core it may use."""
    if _CORES not in share:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, map(int, share[_CORES].split(",")))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
