"""The order of the rows over the epochs, as a function of the position alone.

Epoch e is positions e * rows to (e + 1) * rows - 1, and batch n positions n * batch_size to
(n + 1) * batch_size - 1, so that a batch may span the end of an epoch. When both are shuffled, a
row may be among the last of one epoch and the first of the next. The later epoch then exchanges it
with its next row that the batch does not hold. With 5 rows in batches of 3:

    epoch 0     2 0 4 1 3          batches  2 0 4 | 1 3 ...
    epoch 1     3 1 0 2 4          3 is in the batch; 1 is too; 0 is not
    exchanged   0 1 3 2 4          batches  2 0 4 | 1 3 0 | 1 3 2 | 4 ...
"""

import math
from functools import lru_cache

import grain
import numpy as np


class EpochOrder:
    """Which row stands at which position: each epoch has every row once, no batch has one twice.

    A batch must not be larger than the data. Finding a batch takes time for one batch, or for two
    at the end of an epoch; out of order, and in data of less than two batches, for at most
    `batch_size` epochs.
    """

    def __init__(self, rows: int, batch_size: int, seed: int | None):
        """`seed` gives every epoch an order of its own; None keeps that of the source."""
        assert 1 <= batch_size <= rows, (batch_size, rows)
        self._rows, self._batch_size = rows, batch_size
        self._shuffled: grain.MapDataset | None = None
        if seed is not None:
            # Grain shuffles epoch e by seed + e, so that nearby seeds would share epochs.
            spread_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
            self._shuffled = grain.MapDataset.range(rows).shuffle(seed=spread_seed)
        self._epoch, self._exchanged = 0, {}
        # Where there are few rows, Grain takes up to a millisecond for each.
        self._shuffled_row = lru_cache(maxsize=4 * batch_size)(self._row_of_epoch)

    def batch(self, number: int) -> list[int]:
        """The rows of a batch, which are counted from 0."""
        first = number * self._batch_size
        return [self._row(position) for position in range(first, first + self._batch_size)]

    def _row(self, position: int) -> int:
        epoch, i = divmod(position, self._rows)
        if epoch != self._epoch:
            self._exchanged, self._epoch = self._exchanges(epoch), epoch
        return self._exchanged_row(epoch, i, self._exchanged)

    def _exchanged_row(self, epoch: int, i: int, exchanged: dict[int, int]) -> int:
        return self._shuffled_row(epoch, exchanged.get(i, i))

    def _row_of_epoch(self, epoch: int, i: int) -> int:
        return i if self._shuffled is None else int(self._shuffled[epoch * self._rows + i])

    def _exchanges(self, epoch: int) -> dict[int, int]:
        """Which positions of an epoch, counted from its start, are exchanged with which."""
        if self._shuffled is None:
            return {}  # the first rows and the last are others
        if self._rows >= 2 * self._batch_size:
            # Exchanges stay within the length of a batch: the end of the epoch before has none.
            return self._exchanges_after(epoch, {})
        # An epoch that begins with a batch has none, so they are found from the last such on.
        aligned = self._batch_size // math.gcd(self._rows, self._batch_size)
        known, exchanged = epoch - epoch % aligned, {}
        if known <= self._epoch < epoch:
            known, exchanged = self._epoch, self._exchanged
        for later in range(known + 1, epoch + 1):
            exchanged = self._exchanges_after(later, exchanged)
        return exchanged

    def _exchanges_after(self, epoch: int, before: dict[int, int]) -> dict[int, int]:
        """The exchanges of an epoch, from those of the epoch before it."""
        head = epoch * self._rows % self._batch_size  # rows of the batch in the epoch before
        if not head:
            return {}
        tail, exchanged = self._batch_size - head, {}
        held = {
            self._exchanged_row(epoch - 1, i, before) for i in range(self._rows - head, self._rows)
        }
        others = (i for i in range(tail, self._rows) if self._shuffled_row(epoch, i) not in held)
        for i in range(tail):
            if self._shuffled_row(epoch, i) in held:
                other = next(others)
                exchanged |= {i: other, other: i}
        return exchanged
