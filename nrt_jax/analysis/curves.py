"""Metrics over the steps of all runs: one PNG, and one SVG per panel for light and dark themes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from nrt_jax.analysis.ink import (
    MARKERS,
    PRINT,
    STYLE,
    VARIABLES,
    Ink,
    as_svg,
    cycle,
    print_figure,
    style_axes,
)
from nrt_jax.analysis.run_records import EXACT_MATCH, RunRecord
from nrt_jax.analysis.seeds import SeedGroup

MAX_POINTS = 250
"""Longer series are drawn as means over windows of equal length."""

MARKS = 8
"""Markers on each line."""


@dataclass(frozen=True)
class Panel:
    """A plot of one metric, or of two that are compared."""

    title: str
    unit: str
    metric: str
    dashed: str | None = None
    """Metric of the dashed line."""
    factor: float = 1.0


PANELS = (
    Panel("Exact match", "problems answered right (%)", EXACT_MATCH, factor=100.0),
    Panel("Reward of traces, baseline dashed", "mean reward", "reward/mean", "reward/baseline"),
    Panel("Trace length", "tokens per trace", "trace/tokens"),
    Panel("Entropy of the trace (SFT: of the answer)", "nats per token", "policy/entropy"),
)

WARMUP = Panel(
    "Warm-up: log P of the answer, of t_start dashed",
    "nats per token",
    "warmup/answer_logprob",
    "warmup/start_logprob",
)
"""Over the steps up to 0, of runs that begin with a warm-up."""


def write_png(groups: Sequence[SeedGroup], path: Path) -> None:
    """All panels in one picture on white, legible at a width of 800 pixels."""
    with matplotlib.rc_context(STYLE):
        figure = print_figure(10.0, 6.8)
        for axes, panel in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
            _draw(axes, panel, groups, PRINT)
        handles = [
            Line2D([], [], color=cycle(PRINT.runs, i), marker=cycle(MARKERS, i), linewidth=2)
            for i in range(len(groups))
        ]
        names = [_legend(group) for group in groups]
        legend = figure.legend(handles, names, loc="outside upper center", ncols=3, frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
        figure.savefig(path, format="png")


def panel_svg(panel: Panel, groups: Sequence[SeedGroup]) -> str:
    """One panel as an SVG element whose colours are --ink, --grid and --run-0, --run-1, ..."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": panel.title}):
        figure = Figure(figsize=(5.2, 3.3), layout="constrained")
        figure.patch.set_visible(False)
        _draw(figure.subplots(), panel, groups, VARIABLES)
        return as_svg(figure, f"{panel.title} over steps")


def series(record: RunRecord, metric: str) -> tuple[list[float], list[float]]:
    """Steps and values of a metric, as means over windows if there are more than MAX_POINTS."""
    by_prefix = {"eval": record.evaluations, "warmup": record.warmup}
    rows = by_prefix.get(metric.split("/")[0], record.training)
    rows = [row for row in rows if metric in row]
    width = -(-len(rows) // MAX_POINTS) if rows else 1
    windows = [rows[start : start + width] for start in range(0, len(rows), width)]
    steps = [sum(row["step"] for row in window) / len(window) for window in windows]
    return steps, [sum(row[metric] for row in window) / len(window) for window in windows]


def band(group: SeedGroup, metric: str) -> tuple[list[float], list[list[float]]]:
    """Steps at which every seed of a group has the metric, and the values of the seeds there."""
    runs = [dict(zip(*series(record, metric), strict=True)) for record in group.records]
    steps = [step for step in runs[0] if all(step in run for run in runs)]
    return steps, [[run[step] for run in runs] for step in steps]


def _legend(group: SeedGroup) -> str:
    seeds = len(group.records)
    return group.label if seeds == 1 else f"{group.label}, mean and range of {seeds} seeds"


def _draw(axes: Axes, panel: Panel, groups: Sequence[SeedGroup], ink: Ink) -> None:
    drawn = [
        _draw_line(axes, panel, group, metric, ink, index)
        for index, group in enumerate(groups)
        for metric in (panel.metric, panel.dashed)
        if metric
    ]
    if not any(drawn):
        where = {"transform": axes.transAxes, "ha": "center"}
        axes.text(0.5, 0.5, "no traces in these runs", color=ink.text, **where)
    if panel.metric == EXACT_MATCH:
        axes.set_ylim(-3, 103)
    elif panel.metric in ("trace/tokens", "policy/entropy"):
        axes.set_ylim(bottom=0)
    axes.set_title(panel.title, color=ink.text)
    axes.set_xlabel("training step", color=ink.text)
    axes.set_ylabel(panel.unit, color=ink.text)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    style_axes(axes, ink)


def _draw_line(
    axes: Axes, panel: Panel, group: SeedGroup, metric: str, ink: Ink, index: int
) -> bool:
    """One metric of a group: the mean over its seeds, in a band from the lowest to the highest."""
    steps, values = band(group, metric)
    if not steps:
        return False
    colour, solid = cycle(ink.runs, index), metric == panel.metric
    scaled = [[panel.factor * value for value in seeds] for seeds in values]
    axes.plot(
        steps,
        [sum(seeds) / len(seeds) for seeds in scaled],
        color=colour,
        linestyle="-" if solid else (0, (4, 2)),
        linewidth=1.9 if solid else 1.5,
        marker=cycle(MARKERS, index) if solid else None,
        markevery=-(-len(steps) // MARKS),
        markersize=5,
    )
    if len(group.records) > 1:
        low, high = [min(seeds) for seeds in scaled], [max(seeds) for seeds in scaled]
        axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    return True
