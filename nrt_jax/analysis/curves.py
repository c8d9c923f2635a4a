"""Metrics over the steps of all runs, a line per method, seeds as bands."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from nrt_jax.analysis.drawing import Cell, Drawing
from nrt_jax.analysis.drawing import Panel as DrawnPanel
from nrt_jax.analysis.drawing import panel_svg as drawn_svg
from nrt_jax.analysis.ink import Ink, cycle, marker, style_axes
from nrt_jax.analysis.run_records import EXACT_MATCH, QUALITY, RunRecord
from nrt_jax.analysis.seeds import Line, SeedGroup, facets, legend

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
    of_traces: bool = False
    """Whether runs without traces have no part in it."""


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

DYNAMICS = (
    Panel("Entropy of the traces", "nats per token", "policy/entropy", of_traces=True),
    Panel("Length of the traces", "tokens per trace", "trace/tokens", of_traces=True),
    Panel("Judged quality of the traces", "mean score, 0 to 1", QUALITY, of_traces=True),
)
"""Fig. 2."""

GAINS = (
    Panel(
        "Gain of the own trace, control dashed",
        "log P gained, nats per token",
        "eval/trace_gain",
        "eval/shuffled_gain",
        of_traces=True,
    ),
)


def curves_drawing(groups: Sequence[SeedGroup]) -> Drawing:
    """What every run has."""
    return _drawing("curves", PANELS, groups)


def learning_drawing(groups: Sequence[SeedGroup]) -> Drawing:
    """The panels of curves.png that no other figure has."""
    return _drawing("curves", PANELS[:2], groups)


def further_drawings(groups: Sequence[SeedGroup]) -> list[Drawing]:
    """Fig. 2, what traces add to log P of the answer, and the warm-up; those that runs measured."""
    found = {"dynamics": DYNAMICS, "gains": GAINS, "warmup": (WARMUP,)}
    measured = {
        name: [panel for panel in panels if _is_measured(panel, groups)]
        for name, panels in found.items()
    }
    return [
        _drawing(name, panels, groups, columns=len(panels))
        for name, panels in measured.items()
        if panels
    ]


def _is_measured(panel: Panel, groups: Sequence[SeedGroup]) -> bool:
    shown = [group for group in groups if group.reasons or not panel.of_traces]
    return any(series(record, panel.metric)[0] for group in shown for record in group.records)


def panel_svg(panel: Panel, groups: Sequence[SeedGroup]) -> str:
    """One panel as an SVG element whose colours are --ink, --grid and --run-0, --run-1, ..."""
    drawing = _drawing("curves", [panel], groups)
    return drawn_svg(drawing, drawing.panels[0])


def series(record: RunRecord, metric: str) -> tuple[list[float], list[float]]:
    """Steps and values of a metric, as means over windows if there are more than MAX_POINTS."""
    by_prefix = {"eval": record.evaluations, "warmup": record.warmup, "judge": record.judged}
    rows = by_prefix.get(metric.split("/")[0], record.training)
    rows = [row for row in rows if metric in row]
    width = -(-len(rows) // MAX_POINTS) if rows else 1
    windows = [rows[start : start + width] for start in range(0, len(rows), width)]
    steps = [sum(row["step"] for row in window) / len(window) for window in windows]
    return steps, [sum(row[metric] for row in window) / len(window) for window in windows]


def band(group: SeedGroup, metric: str) -> tuple[list[float], list[list[float]]]:
    """Steps at which every seed of a group that has the metric has it, and their values there."""
    runs = [dict(zip(*series(record, metric), strict=True)) for record in group.records]
    runs = [run for run in runs if run] or [{}]
    steps = [step for step in runs[0] if all(step in run for run in runs)]
    return steps, [[run[step] for run in runs] for step in steps]


def _drawing(
    name: str, panels: Sequence[Panel], groups: Sequence[SeedGroup], *, columns: int = 2
) -> Drawing:
    """The panels of each facet, and what they show as numbers."""
    by_facet = facets(groups)
    drawn = [
        DrawnPanel(
            title=f"{panel.title}, {facet}" if facet else panel.title,
            draw=partial(_draw, panel=panel, lines=lines, facet=facet),
        )
        for facet, lines in by_facet.items()
        for panel in panels
    ]
    rows: list[list[Cell]] = [
        ["models and data", "method", "metric", "step", "mean", "lowest", "highest", "seeds"]
    ]
    for facet, lines in by_facet.items():
        for panel in panels:
            for line in _shown(panel, lines):
                rows += _csv_rows(facet, line, panel)
    shown = {line.label for lines in by_facet.values() for p in panels for line in _shown(p, lines)}
    seeds = max(len(group.records) for group in groups)
    return Drawing(
        name=name,
        panels=tuple(drawn),
        rows=rows,
        legend=[entry for entry in legend(by_facet) if entry[0] in shown],
        legend_title="" if seeds == 1 else f"means, and ranges of up to {seeds} seeds",
        columns=columns,
    )


def _csv_rows(facet: str, line: Line, panel: Panel) -> list[list[Cell]]:
    return [
        [facet, line.label, metric, step, sum(v) / len(v), min(v), max(v), len(v)]
        for metric in (panel.metric, panel.dashed)
        if metric
        for step, v in zip(*band(line.group, metric), strict=True)
    ]


def _shown(panel: Panel, lines: Sequence[Line]) -> list[Line]:
    return [line for line in lines if line.group.reasons or not panel.of_traces]


def _draw(axes: Axes, ink: Ink, *, panel: Panel, lines: Sequence[Line], facet: str) -> None:
    drawn = [
        _draw_line(axes, panel, line, metric, ink)
        for line in _shown(panel, lines)
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
    elif panel.metric == QUALITY:
        axes.set_ylim(0, 1)
    elif panel in GAINS:
        axes.axhline(0, color=ink.text, linewidth=0.8)
    title = f"{panel.title}\n{facet}" if facet else panel.title
    axes.set_title(title, color=ink.text, parse_math=False)
    axes.set_xlabel("training step", color=ink.text)
    axes.set_ylabel(panel.unit, color=ink.text)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    style_axes(axes, ink)


def _draw_line(axes: Axes, panel: Panel, line: Line, metric: str, ink: Ink) -> bool:
    """One metric of a group: the mean over its seeds, in a band from the lowest to the highest."""
    steps, values = band(line.group, metric)
    if not steps:
        return False
    colour, solid = cycle(ink.runs, line.place), metric == panel.metric
    scaled = [[panel.factor * value for value in seeds] for seeds in values]
    axes.plot(
        steps,
        [sum(seeds) / len(seeds) for seeds in scaled],
        color=colour,
        linestyle="-" if solid else (0, (4, 2)),
        linewidth=1.9 if solid else 1.5,
        **(marker(line.place) if solid else {}),
        markevery=-(-len(steps) // MARKS),
        markersize=5,
    )
    if len(scaled[0]) > 1:
        low, high = [min(seeds) for seeds in scaled], [max(seeds) for seeds in scaled]
        axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    return True
