"""A reference answer under every model, each token marked by c_base, c and its weight."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle

from nrt_jax.analysis.case_study import CHARACTER, LINE, Asked, Case, shown_text, wrap
from nrt_jax.analysis.drawing import Cell, Drawing, Panel
from nrt_jax.analysis.ink import Ink, cycle
from nrt_jax.evaluation.reference_log import ReferenceRow

MOST_TOKENS = 160
"""Tokens of an answer that pictures and pages show; the CSV file has all."""
MOST_MODELS = 7
"""Models of a picture; the page and the CSV file have all."""
STRONGEST = 0.62
"""Share of the colour behind the most marked token, so that the text stays legible."""


@dataclass(frozen=True)
class TokenLine:
    """The tokens of y*, marked by one quantity."""

    name: str
    place: int
    """Of its colour."""
    texts: list[str]
    values: list[float]
    strengths: list[float]
    """0 to STRONGEST: how much of the colour is behind each token."""


def token_lines(row: ReferenceRow) -> list[TokenLine]:
    """c_base, c and weight of the first tokens of y*: unlikely and heavy tokens are marked most."""
    texts = [text or "␣" for text in row.texts[:MOST_TOKENS]]

    def of_probabilities(name: str, logprobs: Float[np.ndarray, "A"]) -> TokenLine:
        p = np.exp(logprobs[:MOST_TOKENS])
        return TokenLine(name, 1, texts, p.tolist(), (STRONGEST * (1 - p)).clip(0).tolist())

    if row.empty_logprobs is None:
        return [of_probabilities("c", row.logprobs)]
    lines = [of_probabilities("c_base", row.empty_logprobs), of_probabilities("c", row.logprobs)]
    if row.weights is not None:
        w = row.weights[:MOST_TOKENS]
        share = w / max(float(w.max()), 1e-12)
        lines.append(TokenLine("weight", 0, texts, w.tolist(), (STRONGEST * share).tolist()))
    return lines


_TOKEN_COLUMNS, _LABEL = 96, 9
"""Characters of a line of the picture, and of the name in front of it."""


def tokens_drawing(case: Case) -> Drawing:
    """The answer under every model as a picture, and every token as a row."""
    rows: list[list[Cell]] = [
        [
            *("model", "place", "token", "c_base", "c", "after another question's trace"),
            *("directly", "entropy", "weight"),
        ]
    ]
    for asked in case.asked:
        row = asked.row
        contexts = (row.empty_logprobs, row.logprobs, row.shuffled_logprobs, row.direct_logprobs)
        for i, text in enumerate(row.texts):
            p: list[Cell] = [None if x is None else math.exp(float(x[i])) for x in contexts]
            weight = None if row.weights is None else float(row.weights[i])
            rows.append([asked.label, i, text, *p, float(row.entropies[i]), weight])
    shown = case.asked[:MOST_MODELS]
    height = sum(map(_block_height, shown))
    panel = Panel(
        title="The answer token by token",
        draw=partial(_draw_tokens, shown=shown, height=height),
        width=CHARACTER * (_TOKEN_COLUMNS + _LABEL) + 0.3,
        height=1.35 * LINE * height + 0.2,
    )
    return Drawing(name="tokens", panels=(panel,), rows=rows, columns=1)


def _trace_lines(row: ReferenceRow) -> list[str]:
    if row.trace is None:
        return []
    return wrap(f"z  {row.trace or '(empty)'}", _TOKEN_COLUMNS + _LABEL)[:4]


def _broken(texts: Sequence[str]) -> list[tuple[int, int]]:
    """Line and column of each token."""
    places, line, column = [], 0, 0
    for text in texts:
        width = max(1, len(shown_text(text)))
        if column and column + width > _TOKEN_COLUMNS:
            line, column = line + 1, 0
        places.append((line, column))
        column += width
    return places


def _block_height(asked: Asked) -> float:
    lines = token_lines(asked.row)
    of_tokens = _broken(lines[0].texts)[-1][0] + 1
    return 2 + len(_trace_lines(asked.row)) + len(lines) * (of_tokens + 0.25)


def _draw_tokens(axes: Axes, ink: Ink, *, shown: Sequence[Asked], height: float) -> None:
    axes.set(xlim=(0, _TOKEN_COLUMNS + _LABEL), ylim=(height, 0))
    axes.set_axis_off()
    look = {"family": "DejaVu Sans Mono", "fontsize": 8, "color": ink.text, "parse_math": False}
    y = 0.5
    for asked in shown:
        axes.text(0, y, asked.label, va="center", weight="bold", **look)
        y += 1
        for said in _trace_lines(asked.row):
            axes.text(0, y, said, va="center", **look)
            y += 1
        for line in token_lines(asked.row):
            axes.text(0, y, line.name, va="center", **look)
            y = _draw_line(axes, ink, line, y, look)
        y += 0.75


def _draw_line(axes: Axes, ink: Ink, line: TokenLine, y: float, look: dict) -> float:
    """The tokens from y on; where the next line begins."""
    texts, places = [shown_text(text) for text in line.texts], _broken(line.texts)
    boxes = [
        Rectangle((_LABEL + column, y + below - 0.45), max(1, len(text)) - 0.06, 0.9)
        for text, (below, column) in zip(texts, places, strict=True)
    ]
    colours = [to_rgba(cycle(ink.runs, line.place), strength) for strength in line.strengths]
    axes.add_artist(PatchCollection(boxes, facecolors=colours, linewidths=0))
    # Token by token: the font of a browser may have characters of another width.
    for text, (below, column) in zip(texts, places, strict=True):
        axes.text(_LABEL + column, y + below, text, va="center", **look)
    return y + places[-1][0] + 1.25
