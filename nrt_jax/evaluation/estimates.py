"""Means over questions or seeds, with 95 % intervals."""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A figure, with its 95 % interval where it is a mean over questions."""

    value: float
    low: float | None = None
    high: float | None = None


def mean_over_questions(values: Sequence[float]) -> Estimate:
    """The mean, and its 95 % interval mean ± t s / sqrt(n), with s of divisor n - 1.

    A difference has one value per question, so its interval is a paired one. One question has no
    interval. The same holds of seeds in the place of questions.
    """
    n, mean = len(values), float(np.mean(values))
    if n == 1:
        return Estimate(mean)
    half = t_quantile(n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half)


def t_quantile(degrees: int) -> float:
    """97.5 % quantile of Student's t (Abramowitz and Stegun 26.7.5; exact for 1 and 2 degrees)."""
    if degrees == 1:
        return math.tan(math.pi * 0.475)
    if degrees == 2:
        return 0.95 / math.sqrt(2 * 0.975 * 0.025)
    z = NormalDist().inv_cdf(0.975)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, start=1))
