"""The paper's Table 3, to compare results with."""

from functools import cache
from typing import NamedTuple

import yaml

from nrt_jax.config.presets import DIRECTORY
from nrt_jax.evaluation.results import mean

FILE = DIRECTORY / "evals" / "paper_table3.yaml"
"""Scores in percent."""


class PaperRow(NamedTuple):
    """What the paper reports of one method; scores from 0 to 1."""

    method: str
    scores: dict[str, float]
    """By the name of the benchmark."""
    printed_overall: float

    @property
    def overall(self) -> float:
        """Plain mean of the nine; the paper prints another for its Llama models."""
        return mean(list(self.scores.values()))


@cache
def paper_table() -> dict[str, tuple[PaperRow, ...]]:
    """The rows of each base model, in the order of the paper."""
    content = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return {
        base: tuple(
            PaperRow(
                method=method,
                scores=dict(
                    zip(
                        content["benchmarks"],
                        (round(score / 100, 3) for score in row["scores"]),
                        strict=True,
                    )
                ),
                printed_overall=round(row["overall"] / 100, 3),
            )
            for method, row in rows.items()
        )
        for base, rows in content["bases"].items()
    }


def find_base(*names: str | None) -> str | None:
    """The base model of the paper that the first fitting name holds, in any case, or None."""
    for name in names:
        for base in paper_table():
            if name is not None and base.lower() in name.lower():
                return base
    return None
