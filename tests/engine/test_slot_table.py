"""Slots for sequences: whatever comes and goes, slots, rows and prompt slots name each other."""

import numpy as np
import pytest

from nrt_jax.engine.slot_table import Placement, SequenceId, SlotTable


def start(table, ticket, first, wanted):
    """Copies of a request from `first` on, as many as one prompt takes; where they are."""
    placement = table.find(ticket, wanted)
    if placement is not None:
        samples = range(first, first + len(placement.slots))
        table.occupy(placement, [SequenceId(ticket, sample) for sample in samples])
    return placement


def test_samples_share_a_prompt_slot_of_their_shard():
    """Two shards of four slots and two prompt slots, which have three rows each."""
    table = SlotTable(8, 4, shards=2, num_samples=3)
    assert start(table, 7, 0, 2) == Placement(0, [0, 1], [0, 1])
    assert start(table, 8, 0, 5) == Placement(2, [0, 1, 2], [4, 5, 6]), "where most can start"
    assert start(table, 8, 3, 2) == Placement(1, [0, 1], [2, 3])
    assert start(table, 9, 0, 1) == Placement(3, [0], [7])
    assert table.find(7, 1) is None, "no slot is free"
    assert table.free(5) == SequenceId(8, 1)
    assert table.find(9, 2) == Placement(3, [1], [5])
    assert table.find(10, 1) is None, "no prompt is free"
    assert start(table, 8, 5, 2) == Placement(2, [1], [5])
    assert table.slot_of(SequenceId(8, 5)) == 5
    assert table.slot_of(SequenceId(8, 1)) is None
    assert (table.in_use, table.most_in_a_shard) == (8, 4)


def test_a_prompt_slot_is_free_when_its_last_slot_is():
    table = SlotTable(4, 1, shards=1, num_samples=2)
    start(table, 0, 0, 2)
    assert table.find(1, 1) is None
    table.free(0)
    assert table.find(1, 1) is None
    table.free(1)
    assert start(table, 1, 0, 1) == Placement(0, [0], [0])


def test_prompt_slots_that_are_added_are_those_of_every_shard():
    table = SlotTable(8, 2, shards=2, num_samples=1)
    assert start(table, 0, 0, 1) == Placement(0, [0], [0])
    assert start(table, 1, 0, 1) == Placement(1, [0], [4])
    table.grow_prompt_slots(8)
    assert start(table, 2, 0, 1) == Placement(1, [0], [1])
    moves = table.move(2, 4)
    # Shard 1 has prompt slots 4 to 7 of 8, and had prompt slot 1 of 2.
    np.testing.assert_array_equal(np.nonzero(~moves.free_B)[0], [0, 1, 2])
    assert moves.prompt_row_B[:3].tolist() == [0, 1, 0]
    assert moves.slots_PK[4].tolist() == [0]


@pytest.mark.parametrize("shards", [1, 2])
def test_moved_sequences_keep_their_prompts(shards):
    """`prompt_row_B` and `slots_PK` are inverse to each other, as the caches take them."""
    rng, samples, prompts = np.random.default_rng(shards), 3, 8
    for _ in range(50):
        table, prompt_of = SlotTable(16, prompts, shards=shards, num_samples=samples), {}
        for ticket in range(5):
            placement = start(table, ticket, 0, int(rng.integers(1, 4)))
            prompt_of |= {
                SequenceId(ticket, i): placement.prompt_slot for i in range(len(placement.slots))
            }
        while table.most_in_a_shard > 16 // shards // 4:
            table.free(table.slot_of(table.running[rng.integers(table.in_use)]))
        before = table.sequences
        left, old_prompts = 4 // shards, prompts // shards
        moves = table.move(16 // shards // 4, left)
        assert len(table) == 4 == len(moves.from_B)
        for slot, sequence in enumerate(table.sequences):
            assert bool(moves.free_B[slot]) == (sequence is None)
            if sequence is None:
                continue
            shard, own = divmod(slot, table.per_shard)
            assert before[shard * 16 // shards + moves.from_B[slot]] == sequence
            assert table.slot_of(sequence) == slot
            prompt, row = divmod(int(moves.prompt_row_B[slot]), samples)
            new = shard * left + prompt
            assert shard * old_prompts + moves.from_P[new] == prompt_of[sequence]
            assert moves.slots_PK[new, row] == own
        assert {s for s in before if s} == set(table.running)
