"""Colours and style of every picture, and pictures as SVG for light and dark themes."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's hues, darkened for contrast with white or lightened for contrast with black. Lines
# differ by their markers as well.
LIGHT = ("#0072b2", "#c24a00", "#00785a", "#9c3f80", "#6b6b6b", "#8a6100", "#000000", "#5b7300")
DARK = ("#5cb8ee", "#ff9455", "#35c9a0", "#e79fca", "#a6a6a6", "#e3b505", "#ffffff", "#b4cf3a")
MARKERS = "os^DvpXP"
GLYPHS = "●■▲◆▼⬟✖✚○□△◇▽⬠✕✛"
"""The markers as text, filled and hollow."""


@dataclass(frozen=True)
class Ink:
    """Colours of a picture; one of `runs` for each thing that is compared."""

    text: str
    grid: str
    runs: Sequence[str]


PRINT = Ink("#222222", "#d9d9d9", LIGHT)
"""On white."""
VARIABLES = Ink("#fd0001", "#fd0002", [f"#fe{i:02x}01" for i in range(len(LIGHT))])
"""Placeholders of CSS variables, whose values the page sets for each theme."""

STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
}


def cycle(values: Sequence[str], index: int) -> str:
    """The value of the run at an index; values repeat when runs outnumber them."""
    return values[index % len(values)]


def marker(place: int) -> dict[str, Any]:
    """Settings of the marker at a place; hollow where all markers have been used once."""
    hollow = place // len(MARKERS) % 2
    return {"marker": cycle(MARKERS, place), "fillstyle": "none" if hollow else "full"}


def print_figure(width: float, height: float) -> Figure:
    """A figure for a PNG, in inches, legible at a width of 800 pixels."""
    figure = Figure(figsize=(width, height), dpi=160, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(hspace=0.08, wspace=0.06)  # type: ignore[union-attr]
    return figure


def style_axes(axes: Axes, ink: Ink) -> None:
    """Grid, ticks and spines of a panel."""
    axes.grid(color=ink.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.patch.set_visible(False)
    axes.tick_params(colors=ink.text, length=0)
    axes.spines[["left", "bottom"]].set_color(ink.grid)


def as_svg(figure: Figure, label: str) -> str:
    """The figure as an SVG element with the colours --ink, --grid and --run-0, --run-1, ..."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    variables = {VARIABLES.text: "ink", VARIABLES.grid: "grid"}
    variables |= {colour: f"run-{i}" for i, colour in enumerate(VARIABLES.runs)}
    for colour, name in variables.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
