"""The shape of the paper's Table 3: methods x tasks or benchmarks, with intervals over seeds.

Scores are those of the last evaluation of each run: exact match on its held-out questions, and the
benchmarks of `evaluation.suite` or of evaluations in RUN/evaluations/.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from matplotlib.axes import Axes

from nrt_jax.analysis.drawing import Cell, Drawing, Panel
from nrt_jax.analysis.ink import Ink
from nrt_jax.analysis.run_records import EXACT_MATCH, RunRecord
from nrt_jax.analysis.seeds import SeedGroup, facets
from nrt_jax.evaluation.estimates import Estimate, mean_over_questions
from nrt_jax.evaluation.results import mean
from nrt_jax.evaluation.tasks import BENCHMARKS

OVERALL = "Overall"
Mark = Literal["best", "second", ""]
_NAME_INCHES, _CELL_INCHES, _ROW_INCHES = 2.6, 1.25, 0.42


@dataclass(frozen=True)
class Score:
    """A cell: percent, over the seeds of a group."""

    estimate: Estimate
    seeds: int
    mark: Mark = ""

    @property
    def value(self) -> str:
        """The mean, to read."""
        return f"{self.estimate.value:.1f}"

    @property
    def interval(self) -> str:
        """The 95 % interval, to read; empty for one seed."""
        if self.estimate.low is None or self.estimate.high is None:
            return ""
        return f"{self.estimate.low:.1f} to {self.estimate.high:.1f}"


@dataclass(frozen=True)
class Block:
    """The methods on one base model."""

    model: str
    rows: list[tuple[str, list[Score | None]]]
    """Label and cells of each method."""


@dataclass(frozen=True)
class ScoreTable:
    """All blocks, with common columns."""

    columns: list[str]
    blocks: list[Block]


def score_table(groups: Sequence[SeedGroup]) -> ScoreTable:
    """The table of the groups; Overall is the mean of several columns, where a row has them all."""
    by_model: dict[str, dict[str, dict[str, list[float]]]] = {}
    for lines in facets(groups).values():
        for line in lines:
            rows = by_model.setdefault(line.group.records[0].model_name, {})
            rows.setdefault(line.label, {}).update(_scores(line.group))
    every = (name for rows in by_model.values() for row in rows.values() for name in row)
    columns = list(dict.fromkeys(every))
    if len(columns) > 1:
        for rows in by_model.values():
            for row in rows.values():
                row |= _overall(row, columns)
        columns.append(OVERALL)
    blocks = [_block(model, rows, columns) for model, rows in by_model.items()]
    return ScoreTable(columns, blocks)


def _scores(group: SeedGroup) -> dict[str, list[float]]:
    """Percent by column, one per seed; columns that a seed lacks are left out."""
    of_seeds = [_scores_of_run(record) for record in group.records]
    return {
        name: [of_seed[name] for of_seed in of_seeds]
        for name in of_seeds[0]
        if all(name in of_seed for of_seed in of_seeds)
    }


def _scores_of_run(record: RunRecord) -> dict[str, float]:
    last = record.evaluations[-1]
    found = {f"{record.data_name}, held out": 100 * last[EXACT_MATCH]}
    for name, benchmark in BENCHMARKS.items():
        if f"eval/{name}" in last:
            found[benchmark.title] = 100 * last[f"eval/{name}"]
    for suite in record.benchmarks:
        found |= {row.title: 100 * row.value for row in suite.tasks if row.headline}
    return found


def _overall(row: dict[str, list[float]], columns: Sequence[str]) -> dict[str, list[float]]:
    if any(name not in row for name in columns) or len({len(row[name]) for name in columns}) > 1:
        return {}
    return {OVERALL: [mean(seeds) for seeds in zip(*(row[n] for n in columns), strict=True)]}


def _block(model: str, rows: dict[str, dict[str, list[float]]], columns: Sequence[str]) -> Block:
    found = {label: dict[str, Score]() for label in rows}
    for name in columns:
        shown = {label: round(mean(row[name]), 1) for label, row in rows.items() if name in row}
        ranked = sorted(set(shown.values()), reverse=True)
        for label, value in shown.items():
            place = ranked.index(value)
            mark: Mark = ("best", "second", "")[min(place, 2)] if len(ranked) > 1 else ""
            seeds = rows[label][name]
            found[label][name] = Score(mean_over_questions(seeds), len(seeds), mark)
    return Block(
        model, [(label, [row.get(name) for name in columns]) for label, row in found.items()]
    )


# --- drawing -------------------------------------------------------------------------------------


def score_drawing(table: ScoreTable) -> Drawing:
    """The table as a picture and as rows of numbers."""
    lines = sum(len(block.rows) + 1 for block in table.blocks) + 1
    panel = Panel(
        title="Scores",
        draw=lambda axes, ink: _draw(axes, ink, table),
        width=_NAME_INCHES + _CELL_INCHES * len(table.columns),
        height=_ROW_INCHES * (lines + 1),
    )
    return Drawing(name="scores", panels=(panel,), rows=_csv_rows(table), columns=1)


def _csv_rows(table: ScoreTable) -> list[list[Cell]]:
    head: list[Cell] = ["model", "method", "column", "mean", "low", "high", "seeds", "mark"]
    return [
        head,
        *(
            [block.model, label, name, *score.estimate, score.seeds, score.mark]
            for block in table.blocks
            for label, cells in block.rows
            for name, score in zip(table.columns, cells, strict=True)
            if score is not None
        ),
    ]


def _draw(axes: Axes, ink: Ink, table: ScoreTable) -> None:
    lines = sum(len(block.rows) + 1 for block in table.blocks) + 1
    width = _NAME_INCHES + _CELL_INCHES * len(table.columns)
    axes.set(xlim=(0, width), ylim=(lines + 0.4, -0.6))
    axes.set_axis_off()
    ends = [_NAME_INCHES + _CELL_INCHES * (i + 1) for i in range(len(table.columns))]

    def text(x: float, y: float, said: str, **look) -> None:
        look = {"va": "center", "color": ink.text, "parse_math": False} | look
        axes.text(x, y, said, **look)

    for end, name in zip(ends, table.columns, strict=True):
        text(end, 0.0, _wrapped(name), ha="right", fontsize=9, weight="bold")
    y = 0.0
    for block in table.blocks:
        y += 1
        axes.axhline(y - 0.5, color=ink.text, linewidth=0.9)
        text(0.0, y, block.model, style="italic", fontsize=10)
        for label, cells in block.rows:
            y += 1
            text(0.12, y, label)
            for end, score in zip(ends, cells, strict=True):
                _draw_cell(axes, ink, (end, y), score)
    axes.axhline(y + 0.5, color=ink.text, linewidth=0.9)


def _draw_cell(axes: Axes, ink: Ink, at: tuple[float, float], score: Score | None) -> None:
    x, y = at
    if score is None:
        axes.text(x, y, "–", ha="right", va="center", color=ink.text)
        return
    above = -0.13 if score.interval else 0.0
    weight = "bold" if score.mark == "best" else "normal"
    look = {"ha": "right", "va": "center", "color": ink.text}
    axes.text(x, y + above, score.value, weight=weight, **look)
    if score.interval:
        axes.text(x, y + 0.25, score.interval, fontsize=7.5, **look)
    if score.mark == "second":
        left = x - 0.085 * len(score.value)
        axes.plot([left, x], [y + above + 0.2] * 2, color=ink.text, linewidth=0.9)


def _wrapped(name: str) -> str:
    """A long name of a column in two lines."""
    first, comma, rest = name.rpartition(", ")
    return f"{first},\n{rest}" if comma else name
