"""A figure of the report: panels that the page shows, and the same as PNG, SVG and CSV."""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from nrt_jax.analysis.ink import PRINT, STYLE, VARIABLES, Ink, as_svg, cycle, marker, print_figure

Cell = str | int | float | None
"""Of a CSV file; None is empty."""

LEGEND_LINE, LEGEND_HANDLE, LEGEND_LETTER = 0.25, 0.7, 0.083
"""Inches that a line of a legend is high, that its drawn line takes, and that a letter takes."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One plot; its size is in inches."""

    title: str
    draw: Callable[[Axes, Ink], None]
    width: float = 5.0
    height: float = 3.2


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """Panels with the numbers that they show."""

    name: str
    """Of its files."""
    panels: tuple[Panel, ...]
    rows: Sequence[Sequence[Cell]]
    """Of the CSV file; the first has the names of the columns."""
    legend: Sequence[tuple[str, int]] = ()
    """Names with the places of their colours."""
    legend_title: str = ""
    columns: int = 2

    def files(self) -> list[str]:
        """Names of its files."""
        return [f"{self.name}.{kind}" for kind in ("png", "svg", "csv")]


def write_drawing(drawing: Drawing, folder: Path) -> None:
    """Write NAME.png and NAME.svg, on white, and NAME.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    png, svg, table = (folder / name for name in drawing.files())
    table.write_text(csv_text(drawing.rows), encoding="utf-8", errors="backslashreplace")
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": drawing.name}):
        figure = _whole(drawing)
        figure.savefig(png, format="png")
        # The places of all parts are known now.
        figure.set_layout_engine("none")
        figure.savefig(svg, format="svg", metadata={"Date": None})


def panel_svg(drawing: Drawing, panel: Panel) -> str:
    """One panel as an SVG element whose colours are --ink, --grid and --run-0, --run-1, ..."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": f"{drawing.name} {panel.title}"}):
        figure = Figure(figsize=(panel.width, panel.height), layout="constrained")
        figure.patch.set_visible(False)
        panel.draw(figure.subplots(), VARIABLES)
        return as_svg(figure, panel.title)


def csv_text(rows: Sequence[Sequence[Cell]]) -> str:
    """Rows of a CSV file; floats have six significant digits."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerows([f"{x:.6g}" if isinstance(x, float) else x for x in row] for row in rows)
    return file.getvalue()


def _whole(drawing: Drawing) -> Figure:
    """All panels in one picture."""
    columns = min(drawing.columns, len(drawing.panels))
    lines = [drawing.panels[i : i + columns] for i in range(0, len(drawing.panels), columns)]
    heights = [max(panel.height for panel in line) for line in lines]
    entries = drawing.legend
    width = sum(panel.width for panel in lines[0])
    legend_columns = _legend_columns(entries, width)
    legend_lines = -(-len(entries) // legend_columns) + bool(drawing.legend_title)
    figure = print_figure(width, sum(heights) + LEGEND_LINE * legend_lines)
    grid = figure.subplots(len(lines), columns, squeeze=False, height_ratios=heights)
    for axes, line in zip(grid, lines, strict=True):
        for i, place in enumerate(axes):
            if i < len(line):
                line[i].draw(place, PRINT)
            else:
                place.set_axis_off()
    if entries:
        _draw_legend(figure, entries, drawing.legend_title, legend_columns)
    return figure


def _legend_columns(entries: Sequence[tuple[str, int]], width: float) -> int:
    """Columns of a legend that fit into a width in inches."""
    widest = max((len(name) for name, _ in entries), default=0)
    return max(1, min(len(entries), 4, int(width / (LEGEND_HANDLE + LEGEND_LETTER * widest))))


def _draw_legend(
    figure: Figure, entries: Sequence[tuple[str, int]], title: str, columns: int
) -> None:
    handles = [
        Line2D([], [], color=cycle(PRINT.runs, i), linewidth=2, **marker(i)) for _, i in entries
    ]
    names = [name for name, _ in entries]
    where = {"loc": "outside upper center", "ncols": columns, "frameon": False}
    legend = figure.legend(handles, names, title=title or None, title_fontsize=10, **where)
    for text in legend.get_texts():
        text.set_parse_math(False)
