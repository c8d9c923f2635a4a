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


class Selection(NamedTuple):
    """Rows by their places."""

    train: Int64[np.ndarray, "kept"]
    """Of the training rows those that stay, in their order."""
    evaluation: list[int]
    """Of the evaluation files' rows, or without these of the training rows, in the order of the
    evaluation."""
    overlap: int
    """Training rows that are left out for their question; those held out are not among them."""


def select(
    config: DataConfig, questions: Sequence[Hashable], in_files: Sequence[Hashable] | None
) -> Selection:
    """Draw the evaluation by data.seed, and leave its questions out of the training.

    `questions` has the question of each training row, or a key of it; `in_files` those of the
    evaluation files, None without any. Raises InputError when nothing is left to train on.
    """
    if in_files is None:
        evaluation = _hold_out(config, questions)
        asked = {questions[i] for i in evaluation}
    else:
        order = np.random.default_rng(config.seed).permutation(len(in_files))
        evaluation = order[: config.eval_rows].tolist()
        asked = {in_files[i] for i in evaluation}
    kept = (i for i, question in enumerate(questions) if question not in asked)
    train = np.fromiter(kept, np.int64)
    # An overlap with an evaluation file is reported; rows held out of the training file are none.
    overlap = len(questions) - len(train) - (len(evaluation) if in_files is None else 0)
    if not len(train):
        assert config.eval_path is not None, "held-out rows leave some to train on"
        raise InputError(
            f"{config.location}: every row asks a question of data.eval_path="
            f"{location(config.eval_path)}; give different questions to train on"
        )
    return Selection(train, evaluation, overlap)


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
