"""Which rows are trained on and which evaluate: no question is in both."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from nrt_jax.config.data import DataConfig
from nrt_jax.config.rows import location
from nrt_jax.errors import InputError

IN_EVALUATION = "question of the evaluation"
"""Why a training row is left out that asks a question of the evaluation."""


class Permuted(NamedTuple):
    """Training rows of which data.permutation_seed chooses."""

    ranks: Int64[np.ndarray, "rows"]
    """The place of each in the permuted order of all rows of the source."""
    sources: Sequence[str]
    """What each names as its source."""


class Selection(NamedTuple):
    """Rows by their places."""

    train: Int64[np.ndarray, "kept"]
    """Of the training rows those that stay, in their order or the permuted one."""
    evaluation: list[int]
    """Of the evaluation files' rows, or without these of the training rows, in the order of the
    evaluation."""
    overlap: int
    """Training rows that are left out for their question; those held out are not among them."""


def select(
    config: DataConfig,
    questions: Sequence[Hashable],
    in_files: Sequence[Hashable] | None,
    permuted: Permuted | None = None,
) -> Selection:
    """Draw the evaluation, and leave its questions out of the training.

    `questions` has the question of each training row, or a key of it; `in_files` those of the
    evaluation files, None without any; `permuted` is given where data.permutation_seed is set.
    Raises InputError when nothing is left to train on, or less than the config asks for.
    """
    if in_files is not None:
        drawn = np.random.default_rng(config.seed).permutation(len(in_files))
        evaluation = drawn[: config.eval_rows].tolist()
    elif permuted is not None:
        evaluation = _first(config, permuted)
    else:
        evaluation = _hold_out(config, questions)
    asked = {(questions if in_files is None else in_files)[i] for i in evaluation}
    count = len(questions)
    kept = np.fromiter((questions[i] not in asked for i in range(count)), bool, count)
    if permuted is None:
        train = np.flatnonzero(kept)
    else:
        order = np.argsort(permuted.ranks)
        train = order[kept[order]]
    # An overlap with an evaluation file is reported; rows held out of the training file are none.
    overlap = count - len(train) - (len(evaluation) if in_files is None else 0)
    if not len(train):
        raise InputError(f"{config.location}: {_why_none(config)}")
    return Selection(_taken(config, train, permuted), evaluation, overlap)


def _why_none(config: DataConfig) -> str:
    if config.eval_path is None:
        return f"data.eval_rows={config.eval_rows} leaves no row to train on; lower it"
    return (
        f"every row asks a question of data.eval_path={location(config.eval_path)}; give different "
        "questions to train on"
    )


def _first(config: DataConfig, permuted: Permuted) -> list[int]:
    """The first data.eval_rows of the permuted order; fewer where some cannot be used."""
    order = np.argsort(permuted.ranks)
    return order[permuted.ranks[order] < config.eval_rows].tolist()


def _taken(
    config: DataConfig, train: Int64[np.ndarray, "kept"], permuted: Permuted | None
) -> Int64[np.ndarray, "taken"]:
    """Of rows in the permuted order the first ones: of all, or of each source, as many as set."""
    wanted = config.rows_in_all
    if permuted is None or wanted is None:
        return train
    left = config.rows_by_source
    if left is None:
        missing, what = wanted - len(train), f"data.train_rows={wanted}"
        taken = train[:wanted]
    else:
        left, kept = dict(left), []
        for row in train:
            name = permuted.sources[row]
            if left.get(name):
                left[name] -= 1
                kept.append(row)
        name = max(left, key=lambda name: left[name])
        missing, what = left[name], f"data.source_rows of {name}"
        taken = np.array(kept, np.int64)
    if missing > 0:
        raise InputError(
            f"{config.location}: {missing} rows are missing to {what} after those that cannot be "
            f"used are left out; raise data.max_bad_share={config.max_bad_share:g}, so that more "
            "spare rows are read, or lower the number"
        )
    return taken


def _hold_out(config: DataConfig, questions: Sequence[Hashable]) -> list[int]:
    """Training rows drawn by seed, one per question."""
    found: dict[Hashable, int] = {}
    for i in np.random.default_rng(config.seed).permutation(len(questions)):
        found.setdefault(questions[i], int(i))
        if len(found) > config.eval_rows:
            return list(found.values())[: config.eval_rows]
    raise InputError(
        f"{config.location}: data.eval_rows={config.eval_rows} leaves none of its "
        f"{len(found)} questions to train on; lower it or set data.eval_path"
    )
