"""Intervals of benchmark scores by resampling documents, for one model and between two.

A resample draws as many documents of a task as it has, with replacement; where the task's score is
the mean over groups, it does so within each group. Between two models both scores come from the
same draw, so that the difficulty of the drawn documents cancels. An interval holds the middle 95 %
of `RESAMPLES` resamples.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nrt_jax.evaluation.results import DocumentScore, TaskResult

RESAMPLES = 2000
SEED = 0
_AT_ONCE = 2**22
"""Documents drawn at once, which bounds the memory."""


class Interval(NamedTuple):
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


class Comparison(NamedTuple):
    """One row of a model against that of another."""

    task: str
    title: str
    n: int
    """Documents that both have answered."""
    difference: Interval


def interval(row: TaskResult, scores: Sequence[DocumentScore]) -> Interval:
    """The score of one task; `scores` are those of its documents."""
    values, groups = _arrays(scores)
    return _interval(_resampled(row, values[None], groups)[0])


def compare(
    rows: Sequence[TaskResult],
    first: Sequence[DocumentScore],
    second: Sequence[DocumentScore],
) -> list[Comparison]:
    """The second model's score less the first's, for each task on the documents of both.

    `rows` are the first model's; tasks without a common document are left out. With two headline
    tasks or more the last row is Overall, the mean of their differences.
    """
    ours = {(score.task, score.document): score for score in first}
    theirs = {(score.task, score.document): score for score in second}
    found, overall, documents = [], [], 0
    for row in rows:
        pairs = [
            (ours[key], theirs[key])
            for key in sorted(ours.keys() & theirs.keys())
            if key[0] == row.task
        ]
        if not pairs:
            continue
        before, groups = _arrays([score for score, _ in pairs])
        after, _ = _arrays([score for _, score in pairs])
        drawn = _resampled(row, np.stack([before, after]), groups)
        differences = drawn[1] - drawn[0]
        found.append(Comparison(row.task, row.title, len(pairs), _interval(differences)))
        if row.headline:
            overall.append(differences)
            documents += len(pairs)
    if len(overall) > 1:
        mean = np.mean(overall, axis=0)
        found.append(Comparison("overall", "Overall", documents, _interval(mean)))
    return found


def _arrays(scores: Sequence[DocumentScore]) -> tuple[np.ndarray, np.ndarray]:
    """Scores, and the index of each document's group."""
    ordered = sorted(scores, key=lambda score: score.document)
    names = sorted({score.group for score in ordered})
    groups = np.asarray([names.index(score.group) for score in ordered])
    return np.asarray([score.score for score in ordered], np.float64), groups


def _resampled(row: TaskResult, values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The score of each model [models, 1 + resamples]; the first column is that of the data."""
    if row.average == "micro":
        groups = np.zeros_like(groups)
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    # Of its own for each task: equal draws would tie the tasks that Overall averages together.
    rng = np.random.default_rng([SEED, *row.task.encode()])
    means = [_group_means(values[:, index], rng) for index in members]
    return np.mean(means, axis=0)


def _group_means(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    count = values.shape[1]
    rows = max(1, _AT_ONCE // count)
    drawn = [values.mean(axis=1, keepdims=True)]
    for start in range(0, RESAMPLES, rows):
        index = rng.integers(count, size=(min(rows, RESAMPLES - start), count))
        drawn.append(values[:, index].mean(axis=2))
    return np.concatenate(drawn, axis=1)


def _interval(resampled: np.ndarray) -> Interval:
    low, high = np.percentile(resampled[1:], (2.5, 97.5))
    return Interval(float(resampled[0]), float(low), float(high))
