"""Lengths of prompts and answers, by source: one PNG, and SVGs for light and dark themes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

from nrt_jax.analysis.ink import (
    LIGHT,
    PRINT,
    STYLE,
    VARIABLES,
    Ink,
    as_svg,
    print_figure,
    style_axes,
)
from nrt_jax.data.stats import SourceLengths, together

OTHERS = 4
"""Place of grey among the colours: the sources that have no colour of their own."""
_COLOURED = [i for i in range(len(LIGHT)) if i != OTHERS][:6]
MOST_SPANS = 30
"""Sources with a line of their own, those with the most rows."""


class Side(NamedTuple):
    """Prompts or answers."""

    name: str
    lengths: Callable[[SourceLengths], np.ndarray]
    limit: int
    """Most tokens that a row may have."""


def sides(max_prompt_tokens: int, max_answer_tokens: int) -> tuple[Side, Side]:
    """Prompts and answers, with their limits."""
    return (
        Side("Prompt", lambda source: source.prompt_tokens, max_prompt_tokens),
        Side("Answer", lambda source: source.answer_tokens, max_answer_tokens),
    )


def colour_places(sources: Sequence[SourceLengths]) -> list[int]:
    """Place of each source's colour; those with the most rows have their own."""
    by_rows = sorted(range(len(sources)), key=lambda i: -len(sources[i].prompt_tokens))
    places = [OTHERS] * len(sources)
    for place, i in zip(_COLOURED, by_rows, strict=False):
        places[i] = place
    return places


def legend(sources: Sequence[SourceLengths]) -> list[tuple[str, int]]:
    """Names and places of colours, those that share grey as one."""
    named = list(zip(sources, colour_places(sources), strict=True))
    entries = [(source.name, place) for source, place in named if place != OTHERS]
    others = sum(place == OTHERS for _, place in named)
    return [*entries, (f"{others} others", OTHERS)] if others else entries


def write_png(sources: Sequence[SourceLengths], both: Sequence[Side], path: Path) -> None:
    """All panels in one picture on white, legible at a width of 800 pixels."""
    rows = 2 if len(sources) > 1 else 1
    lines = min(len(sources), MOST_SPANS)
    heights = [3.2, 1.1 + 0.26 * lines][:rows]
    with matplotlib.rc_context(STYLE):
        figure = print_figure(10.0, 0.4 + sum(heights))
        axes = figure.subplots(rows, 2, squeeze=False, height_ratios=heights)
        for column, side in enumerate(both):
            _draw_shares(axes[0][column], sources, side, PRINT)
            if rows == 2:
                _draw_spans(axes[1][column], sources, side, PRINT, named=column == 0)
        if rows == 2:
            entries = legend(sources)
            handles = [Line2D([], [], color=PRINT.runs[place], linewidth=7) for _, place in entries]
            names = [name for name, _ in entries]
            drawn = figure.legend(
                handles, names, loc="outside upper center", ncols=4, frameon=False, handlelength=1
            )
            for text in drawn.get_texts():
                text.set_parse_math(False)
        figure.savefig(path, format="png")


def panel_svgs(sources: Sequence[SourceLengths], both: Sequence[Side]) -> list[str]:
    """The panels as SVG elements whose colours are --ink, --grid and --run-0, --run-1, ..."""
    draws = [_draw_shares] if len(sources) == 1 else [_draw_shares, _draw_spans]
    lines = min(len(sources), MOST_SPANS)
    panels = []
    for draw in draws:
        height = 3.1 if draw is _draw_shares else 1.2 + 0.26 * lines
        for side in both:
            label = f"{side.name} lengths{' by source' if draw is _draw_spans else ''}"
            with matplotlib.rc_context(STYLE | {"svg.hashsalt": label}):
                figure = Figure(figsize=(5.2, height), layout="constrained")
                figure.patch.set_visible(False)
                draw(figure.subplots(), sources, side, VARIABLES)
                panels.append(as_svg(figure, label))
    return panels


def edges(longest: int) -> np.ndarray:
    """Bounds of bins for whole lengths from 1 on: one bin per length, then four per octave."""
    octaves = 4 * int(np.ceil(np.log2(longest + 1))) + 1
    firsts = np.unique(np.round(2.0 ** (np.arange(octaves + 1) / 4)))
    return firsts[: np.searchsorted(firsts, longest, side="right") + 1] - 0.5


def _draw_shares(axes: Axes, sources: Sequence[SourceLengths], side: Side, ink: Ink) -> None:
    """Share of the rows in each bin, the sources on top of each other."""
    every = side.lengths(together(sources))
    bounds = edges(int(every.max()))
    below = np.zeros(len(bounds) - 1)
    for source, place in zip(sources, colour_places(sources), strict=True):
        share = np.histogram(side.lengths(source), bounds)[0] / len(every)
        look = {"align": "edge", "color": ink.runs[place], "linewidth": 0}
        axes.bar(bounds[:-1], share, np.diff(bounds), below, **look)
        below += share
    axes.set_ylim(0, 1.08 * below.max())
    axes.set_title(f"{side.name} lengths", color=ink.text)
    axes.set_ylabel("share of rows", color=ink.text)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g} %"))
    _finish(axes, side, ink, every)


def _draw_spans(
    axes: Axes, sources: Sequence[SourceLengths], side: Side, ink: Ink, *, named: bool = True
) -> None:
    """Of each source the median, in a thick line over 80 % of its rows and a thin one over 98 %."""
    places = dict(zip((source.name for source in sources), colour_places(sources), strict=True))
    kept = [source for source in sources if len(source.prompt_tokens)]
    kept = sorted(kept, key=lambda source: -len(source.prompt_tokens))[:MOST_SPANS]
    for y, source in enumerate(kept):
        p = np.percentile(side.lengths(source), [1, 10, 50, 90, 99], method="inverted_cdf")
        colour = ink.runs[places[source.name]]
        axes.plot(p[[0, 4]], [y, y], color=colour, linewidth=1.2, solid_capstyle="butt")
        axes.plot(p[[1, 3]], [y, y], color=colour, linewidth=6, solid_capstyle="butt")
        axes.plot(p[2], y, "o", color=ink.grid, markeredgecolor=ink.text, markersize=5.5)
    axes.set_yticks(range(len(kept)), [source.name if named else "" for source in kept])
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    axes.set_ylim(len(kept) - 0.5, -0.5)
    axes.set_title(f"{side.name} lengths by source", color=ink.text)
    _finish(axes, side, ink, side.lengths(together(sources)))


def _finish(axes: Axes, side: Side, ink: Ink, lengths: np.ndarray) -> None:
    """The axis of tokens, with the limit where it is near."""
    longest = int(lengths.max())
    last = longest * 1.15
    if side.limit <= 4 * longest:
        last = side.limit * 1.15
        axes.axvline(side.limit + 0.5, color=ink.text, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xscale("log", base=2)
    axes.set_xlim(max(0.5, float(lengths.min()) * 0.8), max(last, 2))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    limit = f", dashed: the limit of {side.limit:,}" if side.limit <= 4 * longest else ""
    axes.set_xlabel(f"tokens{limit}", color=ink.text)
    style_axes(axes, ink)
