"""The order of rows: every epoch each row once, no batch one twice, from the position alone."""

from itertools import chain

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from nrt_jax.data.batches import BatchIterator
from nrt_jax.data.epochs import EpochOrder
from tests.data.test_pipeline import numbered

SIZES = [(5, 3), (7, 7), (8, 1), (11, 10), (20, 10), (21, 10)]


def batches(order: EpochOrder, count: int) -> list[list[int]]:
    return [order.batch(number) for number in range(count)]


@pytest.mark.parametrize(("rows", "batch_size"), SIZES)
@pytest.mark.parametrize("seed", [None, 0])
def test_every_epoch_has_each_row_once_and_no_batch_one_twice(rows, batch_size, seed):
    count = 4 * rows // batch_size + 1
    taken = batches(EpochOrder(rows, batch_size, seed), count)
    assert all(len(set(batch)) == batch_size for batch in taken)
    flat = list(chain.from_iterable(taken))
    for start in range(0, 3 * rows + 1, rows):
        assert sorted(flat[start : start + rows]) == list(range(rows))


def test_rows_that_a_batch_holds_are_exchanged_and_no_other():
    """Only what a batch would hold twice moves, and within the length of a batch."""
    rows, batch_size, moved = 40, 16, 0
    ordered = EpochOrder(rows, batch_size, 3)
    # In batches of one row an order has nothing to exchange.
    shuffled = chain.from_iterable(batches(EpochOrder(rows, 1, 3), 8 * rows))
    flat = list(chain.from_iterable(batches(ordered, 20)))
    for position, (row, other) in enumerate(zip(flat, shuffled, strict=True)):
        if row != other:
            moved += 1
            assert position >= rows
            assert position % rows < batch_size
    assert 0 < moved < 8 * batch_size


@settings(max_examples=5)
@given(
    size=st.sampled_from(SIZES),
    seed=st.integers(0, 2**32 - 1),
    numbers=st.lists(st.integers(0, 8), min_size=1, max_size=3),
)
def test_a_batch_depends_on_its_number_alone(size, seed, numbers):
    """Whatever was read before it, in whatever order."""
    order = EpochOrder(*size, seed)
    for number in numbers:
        assert order.batch(number) == EpochOrder(*size, seed).batch(number)


def test_large_data_costs_no_more_than_a_batch():
    rows, batch_size = 10**8, 64
    order = EpochOrder(rows, batch_size, 0)
    asked = []
    row = order._row_of_epoch
    order._shuffled_row = lambda epoch, i: asked.append(i) or row(epoch, i)
    assert len(set(order.batch(3 * rows // batch_size))) == batch_size
    assert len(asked) <= 4 * batch_size


def test_an_epoch_s_last_batch_repeats_no_row():
    """300 rows in batches of 256, of which 51 of 60 would hold a row twice."""
    iterator = BatchIterator(numbered(300), 256, True, 0)
    for _ in range(8):
        rows = [example.example.index for example in next(iterator)]
        assert len(set(rows)) == 256
