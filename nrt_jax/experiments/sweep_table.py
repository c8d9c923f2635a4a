"""Cells of a sweep as a table: what would be trained, and how far each is."""

from pathlib import Path

from nrt_jax.analysis.summary import aligned
from nrt_jax.experiments.cells import Cell, Sweep
from nrt_jax.experiments.sweep import CELLS_FILE, CellState, cell_state, read_cells


def plan_table(sweep: Sweep) -> str:
    """The cells, the size of each, and its folder."""
    rows = [
        (
            cell.title,
            f"{cell.config.train.steps:,}",
            f"{_prompts(cell):,}",
            f"{_traces(cell):,}",
            cell_state(sweep, cell).state,
            str(cell.config.run_dir),
        )
        for cell in sweep.cells
    ]
    traces = sum(map(_traces, sweep.cells))
    head = ("cell", "steps", "prompts", "traces", "state", "folder")
    return "\n".join([*aligned([head, *rows]), f"{len(rows)} cells, {traces:,} traces in all"])


def _prompts(cell: Cell) -> int:
    return cell.config.train.steps * cell.config.train.batch_prompts


def _traces(cell: Cell) -> int:
    reasons = cell.config.method == "nrt"
    return _prompts(cell) * cell.config.rollout.traces_per_prompt if reasons else 0


def status_table(sweep: Sweep) -> str:
    """The cells, their states and steps, and of those that failed the last line."""
    states = [cell_state(sweep, cell) for cell in sweep.cells]
    rows = [
        (cell.title, state.state, f"{state.step}/{cell.config.train.steps}", _note(state))
        for cell, state in zip(sweep.cells, states, strict=True)
    ]
    counts = dict.fromkeys(("finished", "failed", "begun", "waiting"), 0)
    for state in states:
        counts[state.state] += 1
    summary = ", ".join(f"{count} {name}" for name, count in counts.items())
    return "\n".join([*aligned([("cell", "state", "step", ""), *rows]), summary])


def _note(state: CellState) -> str:
    if state.state == "failed":
        return state.line
    if state.state == "begun" and state.age_s is not None:
        return f"wrote metrics {state.age_s:.0f} s ago"
    return ""


def run_dirs(folder: Path) -> list[Path]:
    """The run directories of the cells in a sweep's folder that still exist, in their order."""
    return [folder / name for name in read_cells(folder) if (folder / name).is_dir()]


def is_sweep(folder: Path) -> bool:
    """Whether a folder is that of a sweep."""
    return (folder / CELLS_FILE).is_file()
