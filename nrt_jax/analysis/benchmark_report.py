"""Evaluations beside each other: intervals of each score, and differences between two models."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nrt_jax.analysis.benchmark_tables import NONE, Table, tables
from nrt_jax.analysis.bootstrap import RESAMPLES, Comparison, Interval, compare, interval
from nrt_jax.errors import InputError
from nrt_jax.evaluation.results import (
    DocumentScore,
    SuiteResult,
    read_results,
    read_scores,
)

_HOW = (
    f"Intervals hold the middle 95 % of {RESAMPLES:,} resamples of the documents (within each "
    "group where the score is a mean over groups)."
)


@dataclass(frozen=True)
class Evaluation:
    """One folder that `nrt-jax evaluate` wrote."""

    path: Path
    suite: SuiteResult
    """Its model is named so that no other compared evaluation has the name."""
    scores: dict[str, list[DocumentScore]]
    """By task."""
    intervals: dict[str, Interval]
    """By task."""


@dataclass(frozen=True)
class Difference:
    """A model against the first of the compared ones."""

    first: str
    second: str
    rows: list[Comparison]
    same_settings: bool


def read_evaluations(folders: Sequence[Path]) -> list[Evaluation]:
    """The evaluations in the order given; InputError for one that is named twice or damaged."""
    for folder, count in Counter(folder.resolve() for folder in folders).items():
        if count > 1:
            raise InputError(f"{folder}: named {count} times; name each evaluation once")
    suites = [read_results(folder) for folder in folders]
    models = Counter(suite.model for suite in suites)
    return [
        _evaluation(folder, suite, unique=models[suite.model] == 1)
        for folder, suite in zip(folders, suites, strict=True)
    ]


def _evaluation(folder: Path, suite: SuiteResult, *, unique: bool) -> Evaluation:
    by_task: dict[str, list[DocumentScore]] = {}
    for score in read_scores(folder):
        by_task.setdefault(score.task, []).append(score)
    rows = {row.task: row for row in suite.tasks}
    if {task: len(scores) for task, scores in by_task.items()} != {
        task: row.n for task, row in rows.items()
    }:
        raise InputError(
            f"{folder}: results.json and scores.parquet are of different evaluations; run the same "
            "nrt-jax evaluate again"
        )
    return Evaluation(
        path=folder,
        suite=suite if unique else replace(suite, model=f"{suite.model} ({folder})"),
        scores=by_task,
        intervals={task: interval(row, by_task[task]) for task, row in rows.items()},
    )


def differences(evaluations: Sequence[Evaluation]) -> list[Difference]:
    """Each model against the first, on the documents of both."""
    if not evaluations:
        return []
    first, *others = evaluations
    return [
        Difference(
            first=first.suite.model,
            second=other.suite.model,
            rows=compare(first.suite.tasks, _all(first), _all(other)),
            same_settings=first.suite.settings == other.suite.settings,
        )
        for other in others
    ]


def _all(evaluation: Evaluation) -> list[DocumentScore]:
    return [score for scores in evaluation.scores.values() for score in scores]


def report_tables(evaluations: Sequence[Evaluation], against: Sequence[Difference]) -> list[Table]:
    """The tables of `nrt-jax evaluate`, the intervals, and the differences."""
    suites = [evaluation.suite for evaluation in evaluations]
    return [*tables(suites), _interval_table(evaluations), *map(_difference_table, against)]


def _interval_table(evaluations: Sequence[Evaluation]) -> Table:
    titles = {row.task: row.title for ev in evaluations for row in ev.suite.tasks}
    rows = [
        (title, *(_shown(evaluation.intervals.get(task)) for evaluation in evaluations))
        for task, title in titles.items()
    ]
    head = ("benchmark", *(evaluation.suite.model for evaluation in evaluations))
    return Table("Scores with 95 % intervals", head, rows, [_HOW])


def _difference_table(difference: Difference) -> Table:
    rows = [
        (row.title, f"{row.n:,}", _shown(row.difference, sign="+"), _verdict(row.difference))
        for row in difference.rows
    ]
    notes = [
        "Points of percent, on the documents that both have answered. "
        f"{_HOW} Both scores of a resample come from the same documents."
    ]
    if not difference.same_settings:
        notes.append("The two evaluations had different settings.")
    title = f"{difference.second} less {difference.first}"
    return Table(title, ("benchmark", "documents", "difference", "0 in the interval"), rows, notes)


def _shown(found: Interval | None, sign: str = "") -> str:
    if found is None:
        return NONE
    value, low, high = (f"{100 * number:{sign}.1f}" for number in found)
    return f"{value} [{low}, {high}]"


def _verdict(found: Interval) -> str:
    return "yes" if found.low <= 0 <= found.high else "no"


def summarise_evaluations(
    evaluations: Sequence[Evaluation], against: Sequence[Difference]
) -> dict[str, Any]:
    """The part `benchmarks` of summary.json; scores and differences are from 0 to 1.

    `evaluations`  per folder: `path`, `model`, `settings`, `limit`, `overall`, and `tasks` with
                   `task`, `score`, its 95 % interval `low` and `high`, `stderr`, `n`, `answers`,
                   `unclosed` and `truncated`
    `differences`  per model after the first: `first`, `second`, `same_settings`, and `tasks` with
                   `task`, `n`, `difference`, `low` and `high`; the last task may be `overall`
    """
    return {
        "evaluations": [
            {
                "path": str(evaluation.path),
                "model": evaluation.suite.model,
                "settings": evaluation.suite.settings,
                "limit": evaluation.suite.limit,
                "overall": evaluation.suite.overall,
                "tasks": [
                    {
                        "task": row.task,
                        "score": row.value,
                        "low": evaluation.intervals[row.task].low,
                        "high": evaluation.intervals[row.task].high,
                        **{name: getattr(row, name) for name in _COUNTED},
                    }
                    for row in evaluation.suite.tasks
                ],
            }
            for evaluation in evaluations
        ],
        "differences": [
            {
                "first": difference.first,
                "second": difference.second,
                "same_settings": difference.same_settings,
                "tasks": [
                    {
                        "task": row.task,
                        "n": row.n,
                        "difference": row.difference.value,
                        "low": row.difference.low,
                        "high": row.difference.high,
                    }
                    for row in difference.rows
                ],
            }
            for difference in against
        ],
    }


_COUNTED = ("stderr", "n", "answers", "unclosed", "truncated")
