"""Metrics over the steps of all runs: one PNG, and one SVG per panel for light and dark themes."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from nrt_jax.analysis.run_records import EXACT_MATCH, RunRecord, labels

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

# Okabe and Ito's hues, darkened for contrast with white or lightened for contrast with black. Lines
# differ by their markers as well.
LIGHT = ("#0072b2", "#c24a00", "#00785a", "#9c3f80", "#6b6b6b", "#8a6100", "#000000")
DARK = ("#5cb8ee", "#ff9455", "#35c9a0", "#e79fca", "#a6a6a6", "#e3b505", "#ffffff")
MARKERS = "os^DvpX"
GLYPHS = "●■▲◆▼⬟✖"
"""The markers as text."""


@dataclass(frozen=True)
class _Ink:
    text: str
    grid: str
    runs: Sequence[str]


_PRINT = _Ink("#222222", "#d9d9d9", LIGHT)
# Placeholders of CSS variables, whose values the page sets for each theme.
_VARIABLES = _Ink("#fd0001", "#fd0002", [f"#fe{i:02x}01" for i in range(len(LIGHT))])

_STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
}


def write_png(records: Sequence[RunRecord], path: Path) -> None:
    """All panels in one picture on white, legible at a width of 800 pixels."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10, 6.8), dpi=160, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        figure.get_layout_engine().set(hspace=0.08, wspace=0.06)  # type: ignore[union-attr]
        for axes, panel in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
            _draw(axes, panel, records, _PRINT)
        handles = [
            Line2D([], [], color=cycle(_PRINT.runs, i), marker=cycle(MARKERS, i), linewidth=2)
            for i in range(len(records))
        ]
        legend = figure.legend(
            handles, labels(records), loc="outside upper center", ncols=3, frameon=False
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
        figure.savefig(path, format="png")


def panel_svg(panel: Panel, records: Sequence[RunRecord]) -> str:
    """One panel as an SVG element whose colours are --ink, --grid and --run-0, --run-1, ..."""
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": panel.title}):
        figure = Figure(figsize=(5.2, 3.3), layout="constrained")
        figure.patch.set_visible(False)
        _draw(figure.subplots(), panel, records, _VARIABLES)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    variables = {_VARIABLES.text: "ink", _VARIABLES.grid: "grid"}
    variables |= {colour: f"run-{i}" for i, colour in enumerate(_VARIABLES.runs)}
    for colour, name in variables.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{panel.title} over steps" ', 1)


def series(record: RunRecord, metric: str) -> tuple[list[float], list[float]]:
    """Steps and values of a metric, as means over windows if there are more than MAX_POINTS."""
    rows = record.evaluations if metric.startswith("eval/") else record.training
    rows = [row for row in rows if metric in row]
    width = -(-len(rows) // MAX_POINTS) if rows else 1
    windows = [rows[start : start + width] for start in range(0, len(rows), width)]
    steps = [sum(row["step"] for row in window) / len(window) for window in windows]
    return steps, [sum(row[metric] for row in window) / len(window) for window in windows]


def cycle(values: Sequence[str], index: int) -> str:
    """The value of the run at an index; values repeat when runs outnumber them."""
    return values[index % len(values)]


def _draw(axes: Axes, panel: Panel, records: Sequence[RunRecord], ink: _Ink) -> None:
    lines = 0
    for index, record in enumerate(records):
        for metric, style in ((panel.metric, "-"), (panel.dashed, (0, (4, 2)))):
            steps, values = series(record, metric) if metric else ([], [])
            if not steps:
                continue
            lines += 1
            axes.plot(
                steps,
                [panel.factor * value for value in values],
                color=cycle(ink.runs, index),
                linestyle=style,
                linewidth=1.9 if style == "-" else 1.5,
                marker=cycle(MARKERS, index) if style == "-" else None,
                markevery=-(-len(steps) // MARKS),
                markersize=5,
            )
    if not lines:
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
    axes.grid(color=ink.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.patch.set_visible(False)
    axes.tick_params(colors=ink.text, length=0)
    axes.spines[["left", "bottom"]].set_color(ink.grid)
