"""Endless shuffled batches that resume exactly, read while the step before them runs."""

import threading
from collections.abc import Iterator, Sequence
from typing import SupportsIndex

import grain

from nrt_jax.data.epochs import EpochOrder
from nrt_jax.data.prepared import PreparedExamples
from nrt_jax.errors import InputError
from nrt_jax.types import TokenizedExample

_ENDLESS = 2**62
"""Batches that Grain may ask for."""


class BatchIterator:
    """Endless batches of exactly `batch_size` examples.

    Every epoch has each example once, in its own order when shuffled. A batch may span the end of
    an epoch, so that no batch is short and no example is dropped; it holds no example twice
    (`EpochOrder`). A batch larger than the data would repeat examples, which is an InputError.

    The next `read_threads` batches are read ahead by as many threads of Grain, and with 0 none is.
    A batch is a function of its number alone: neither the threads nor the processes of a run, each
    of which takes whole batches, change it.
    """

    def __init__(
        self,
        examples: Sequence[TokenizedExample],
        batch_size: int,
        shuffle: bool,
        seed: int,
        *,
        read_threads: int = 0,
    ):
        assert batch_size >= 1, batch_size
        if len(examples) < batch_size:
            raise InputError(
                f"a batch of {batch_size} prompts needs as many training rows, and the data has "
                f"{len(examples)}; lower the batch size or add rows"
            )
        self._identity = {
            "rows": len(examples),
            "batch_size": batch_size,
            "shuffle": shuffle,
            "seed": seed,
        }
        order = EpochOrder(len(examples), batch_size, seed if shuffle else None)
        options = grain.ReadOptions(num_threads=read_threads, prefetch_buffer_size=read_threads)
        batches = grain.MapDataset.source(_Batches(examples, order)).to_iter_dataset(options)
        self._batches = iter(batches)
        self._next = 0

    def __iter__(self) -> Iterator[list[TokenizedExample]]:
        return self

    def __next__(self) -> list[TokenizedExample]:
        batch = next(self._batches)
        self._next += 1
        return batch

    def get_state(self) -> dict:
        """The position as JSON; after set_state with it, the next batch is the same."""
        return {**self._identity, "next_batch": self._next}

    def set_state(self, state: dict) -> None:
        """Go to a saved position; InputError when it was saved with other data or batches."""
        for name, value in self._identity.items():
            if state.get(name) != value:
                raise InputError(
                    f"the saved data position has {name}={state.get(name)}, this run has "
                    f"{name}={value}; continue with the data and batch settings of the saved run"
                )
        self._next = state["next_batch"]
        self._batches.set_state({"next_index": self._next})


class _Batches:
    """Batches by their numbers, for Grain; several threads may ask."""

    def __init__(self, examples: Sequence[TokenizedExample], order: EpochOrder):
        self._examples, self._order = examples, order
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, number: SupportsIndex) -> list[TokenizedExample]:
        # The order remembers the epoch that it was asked for last.
        with self._lock:
            rows = self._order.batch(int(number))
        if isinstance(self._examples, PreparedExamples):
            return self._examples.at(rows)
        return [self._examples[row] for row in rows]
