"""Cells of a sweep as a table: what would be trained, and how far each is."""

import logging
from pathlib import Path

from nrt_jax.analysis.summary import aligned
from nrt_jax.errors import InputError
from nrt_jax.experiments.cells import Cell, Sweep
from nrt_jax.experiments.sweep import CELLS_FILE, CellState, cell_state, read_cells
from nrt_jax.planning.plan import Plan, make_plan
from nrt_jax.topologies import Topology

GIB = 2**30

log = logging.getLogger(__name__)


def plan_table(sweep: Sweep, topology: Topology | None = None) -> str:
    """The cells, the size of each, and its folder.

    With the machines of one run, also the memory per device of its largest phase and its hours, by
    `planning.plan`. Raises InputError for sizes that do not divide over the machines.
    """
    plans = [None if topology is None else make_plan(cell.config, topology) for cell in sweep.cells]
    rows = [
        (
            cell.title,
            f"{cell.config.train.steps:,}",
            f"{_prompts(cell):,}",
            f"{_traces(cell):,}",
            *_planned(plan),
            cell_state(sweep, cell).state,
            str(cell.config.run_dir),
        )
        for cell, plan in zip(sweep.cells, plans, strict=True)
    ]
    planned = () if topology is None else ("memory per device", "hours")
    head = ("cell", "steps", "prompts", "traces", *planned, "state", "folder")
    total = f"{len(rows)} cells, {sum(map(_traces, sweep.cells)):,} traces"
    if topology is not None:
        hours = sum(plan.hours for plan in plans if plan is not None)
        total += f" and {hours:,.3g} hours of {topology.name}"
    return "\n".join([*aligned([head, *rows]), f"{total} in all"])


def _planned(plan: Plan | None) -> tuple[str, ...]:
    if plan is None:
        return ()
    unfit = "" if plan.fits else f", above the {plan.usable / GIB:.1f} GiB of a device"
    return (f"{plan.memory.total / GIB:.1f} GiB{unfit}", f"{plan.hours:,.3g}")


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
    """The run directories of the cells in a sweep's folder, in their order; a warning for cells
    that have none. Raises InputError where no cell has one."""
    cells = read_cells(folder)
    found = [folder / name for name in cells if (folder / name).is_dir()]
    if not found:
        raise InputError(
            f"{folder}: none of its {len(cells)} cells has a run; train them with nrt-jax sweep"
        )
    missing = [name for name in cells if not (folder / name).is_dir()]
    if missing:
        log.warning(
            "%s: left out %d of %d cells without a run, such as %s; nrt-jax sweep trains them",
            *(folder, len(missing), len(cells), missing[0]),
        )
    return found


def is_sweep(folder: Path) -> bool:
    """Whether a folder is that of a sweep."""
    return (folder / CELLS_FILE).is_file()
