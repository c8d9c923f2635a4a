"""Tables 9 and 10: one held-out question under every model."""

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes

from nrt_jax.analysis.drawing import Cell, Drawing, Panel
from nrt_jax.analysis.ink import Ink
from nrt_jax.analysis.seeds import SeedGroup
from nrt_jax.errors import InputError
from nrt_jax.evaluation.reference_log import ReferenceRow

MOST_CHARACTERS = 700
"""Characters of a text in a picture."""


@dataclass(frozen=True)
class Asked:
    """What one model made of the question."""

    label: str
    row: ReferenceRow

    @property
    def probability(self) -> float:
        """P(y*|x, z), or P(y*|x) without a trace."""
        return math.exp(float(np.sum(self.row.logprobs)))

    @property
    def per_token(self) -> float:
        """The geometric mean over the tokens of y*."""
        return math.exp(float(np.mean(self.row.logprobs)))

    def gain(self, other: Float[np.ndarray, "A"] | None) -> float | None:
        """log P(y*|x, z) less that after another context, in nats per token."""
        return None if other is None else float(np.mean(self.row.logprobs - other))


@dataclass(frozen=True)
class Case:
    """The question and every model that was asked it."""

    asked: list[Asked]
    chosen: str
    """How it was chosen, to read."""

    @property
    def question(self) -> str:
        """x, as people read it."""
        return self.asked[0].row.question

    @property
    def reference(self) -> str:
        """y*, without eos."""
        return self.asked[0].row.reference


def choose_case(groups: Sequence[SeedGroup], question: str | None = None) -> Case | None:
    """The question that `question` names, by its row or a part of its text; otherwise the one on
    which the models differ most. Of several seeds the first one answers.

    None where no run kept its references. Raises InputError for a question that no run was asked.
    """
    by_label = {group.label: _rows(group) for group in groups}
    every = [row for rows in by_label.values() for row in rows.values()]
    if question is not None:
        key = _find(every, question).key
        chosen = f"Chosen by --question {question}."
    elif every:
        key = _most_different(list(filter(None, by_label.values())))
        chosen = (
            "Of the questions that all models were asked, the one on which their probabilities "
            "differ most; --question chooses another."
        )
    else:
        return None
    # Models with other tokenizers have other tokens of the same question.
    same = key[:2], next(row for row in every if row.key == key).question
    asked = [
        Asked(label, row)
        for label, rows in by_label.items()
        for row in [rows.get(key) or _of_question(rows, *same)]
        if row is not None
    ]
    return Case(asked, chosen)


Rows = dict[tuple, ReferenceRow]


def _rows(group: SeedGroup) -> Rows:
    found: Rows = {}
    for record in group.records:
        for row in record.references:
            found.setdefault(row.key, row)
    return found


def _of_question(rows: Rows, place: tuple, question: str) -> ReferenceRow | None:
    alike = (row for row in rows.values() if row.key[:2] == place and row.question == question)
    return next(alike, None)


def _find(rows: Sequence[ReferenceRow], question: str) -> ReferenceRow:
    if not rows:
        raise InputError(
            f"--question {question}: no run has references/ of its last step; train again with "
            "evaluation.reference_rows above 0"
        )
    by_number = (row for row in rows if question == str(row.row))
    by_text = (row for row in rows if question in row.question)
    found = next(by_number, None) or next(by_text, None)
    if found is None:
        texts = {row.question: row.row for row in rows}
        near = get_close_matches(question, list(texts), n=1, cutoff=0.0)[0]
        shown = near if len(near) <= 60 else f"{near[:57]}..."
        raise InputError(
            f"--question {question}: no run was asked it; name one of the first rows of the "
            f"evaluation, by its number or a part of its text, such as {texts[near]} for {shown!r}"
        )
    return found


def _most_different(by_model: Sequence[Rows]) -> tuple:
    """The key with the largest range of the probability per token."""
    common = [key for key in by_model[0] if all(key in rows for rows in by_model)]
    keys = common or list(by_model[0])

    def spread(key: tuple) -> float:
        values = [float(np.exp(rows[key].logprobs.mean())) for rows in by_model if key in rows]
        return max(values) - min(values)

    return max(keys, key=spread)


# --- one question under every model ---------------------------------------------------------------

_COLUMNS = (("model", 17), ("trace z", 62), ("P(y*|x, z)", 12), ("answer", 34))
"""Heads, and characters of each column of the picture."""
CHARACTER, LINE = 0.079, 0.142
"""Inches of a character and of a line."""


def probability_text(value: float) -> str:
    """A probability with three digits that count."""
    return f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"


def case_drawing(case: Case) -> Drawing:
    """The table as a picture and as rows."""
    rows: list[list[Cell]] = [
        [
            *("model", "question", "reference", "trace", "trace end", "P(y*|x, z)"),
            *("P per token", "gain over the empty trace", "gain over another question's trace"),
            *("answer", "correct"),
        ]
    ]
    for asked in case.asked:
        row, gains = asked.row, [asked.row.empty_logprobs, asked.row.shuffled_logprobs]
        rows.append(
            [
                *(asked.label, row.question, row.reference, row.trace, row.trace_end),
                *(asked.probability, asked.per_token, *map(asked.gain, gains)),
                *(row.answer, str(row.correct)),
            ]
        )
    lines = list(_lines(case))
    height = LINE * (sum(len(max(cells, key=len)) + 1 for cells in lines) + 2)
    panel = Panel(
        title="One question under every model",
        draw=partial(_draw_case, lines=lines),
        width=CHARACTER * sum(width for _, width in _COLUMNS) + 0.4,
        height=height + 0.3,
    )
    return Drawing(name="question", panels=(panel,), rows=rows, columns=1)


def _lines(case: Case) -> Iterator[list[list[str]]]:
    """The lines of each cell, row by row; the question and the reference come first."""
    whole = sum(width for _, width in _COLUMNS)
    yield [wrap(f"x   {case.question}", whole)]
    yield [wrap(f"y*  {case.reference}", whole)]
    yield [[name] for name, _ in _COLUMNS]
    for asked in case.asked:
        row = asked.row
        trace = "(answers directly)" if row.trace is None else row.trace or "(empty)"
        right = "✓" if row.correct else "✗"
        cells = (asked.label, trace, probability_text(asked.probability), f"{right} {row.answer}")
        yield [wrap(text, width - 2) for text, (_, width) in zip(cells, _COLUMNS, strict=True)]


def wrap(text: str, width: int) -> list[str]:
    shown = shown_text(text[:MOST_CHARACTERS]) + ("…" if len(text) > MOST_CHARACTERS else "")
    return textwrap.wrap(shown, width) or [""]


def shown_text(text: str) -> str:
    """On one line, with marked line ends."""
    return text.replace("\n", "↵ ").replace("\t", " ")


def _draw_case(axes: Axes, ink: Ink, *, lines: Sequence[list[list[str]]]) -> None:
    heights = [len(max(cells, key=len)) for cells in lines]
    axes.set(xlim=(0, sum(width for _, width in _COLUMNS)), ylim=(sum(heights) + len(lines) + 1, 0))
    axes.set_axis_off()
    y = 0.5
    for i, (cells, height) in enumerate(zip(lines, heights, strict=True)):
        if i >= 2:
            axes.axhline(y - 0.35, color=ink.grid if i > 3 else ink.text, linewidth=0.8)
        x = 0
        for cell, (_, width) in zip(cells, _COLUMNS, strict=False):
            look = {"family": "DejaVu Sans Mono", "fontsize": 8, "va": "top", "color": ink.text}
            weight = "bold" if i == 2 or (i > 2 and x == 0) else "normal"
            axes.text(x, y, "\n".join(cell), weight=weight, parse_math=False, **look)
            x += width
        y += height + 1
