"""Mixtures: which rows of each source a run trains on."""

import logging
from collections.abc import Sequence

import numpy as np

from nrt_jax.config.data import DataConfig
from nrt_jax.config.rows import MixturePart
from nrt_jax.errors import InputError

log = logging.getLogger(__name__)


def draw_mixture(config: DataConfig, available: Sequence[int]) -> list[np.ndarray]:
    """Which usable rows of each source are in the mixture, by data.seed; each in its own order.

    `available` are the numbers of usable rows. Without a mixture all rows of the one source are
    taken. Raises InputError when a source has fewer than its `rows`.
    """
    if not config.mixture:
        return [np.arange(count) for count in available]
    counts = mixture_counts(config.parts, available)
    drawn = []
    for i, (rows, count) in enumerate(zip(available, counts, strict=True)):
        order = np.random.default_rng((config.seed, i)).permutation(rows)
        drawn.append(np.sort(order[:count]))
        log.info("data: %d of %d rows of %s", count, rows, config.parts[i].name)
    return drawn


def mixture_counts(parts: Sequence[MixturePart], available: Sequence[int]) -> list[int]:
    """How many rows are drawn of each source.

    With weights w and n usable rows, the largest mixture without repeats: floor(w_i m) rows of
    source i, at least one, in which m = min(n_i / w_i):

        n = 100, 900    w = 1, 3    m = 100    100 and 300 rows
    """
    weights = [part.weight for part in parts if part.weight is not None]
    if weights:
        unit = min(n / weight for n, weight in zip(available, weights, strict=True))
        # A product of rounded numbers may fall short of the whole number that it stands for.
        return [max(1, int(weight * unit + 1e-6)) for weight in weights]
    for part, rows in zip(parts, available, strict=True):
        if part.rows is not None and part.rows > rows:
            raise InputError(
                f"data.mixture: the source {part.name} has {rows} usable rows, fewer than rows="
                f"{part.rows}; lower it"
            )
    return [n if part.rows is None else part.rows for part, n in zip(parts, available, strict=True)]
