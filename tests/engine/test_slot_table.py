"""Places for sequences: whatever comes and goes, slots, rows and rooms name each other."""

import numpy as np
import pytest

from nrt_jax.engine.slot_table import Place, SequenceId, SlotTable


def start(table, ticket, first, wanted):
    """Copies of a request from `first` on, as many as one room takes; where they are."""
    place = table.find(ticket, wanted)
    if place is not None:
        copies = range(first, first + len(place.slots))
        table.occupy(place, [SequenceId(ticket, copy) for copy in copies])
    return place


def test_copies_share_a_room_of_their_shard():
    """Two shards of four slots and two rooms; a room has three rows."""
    table = SlotTable(8, 4, shards=2, copies=3)
    assert start(table, 7, 0, 2) == Place(0, [0, 1], [0, 1])
    assert start(table, 8, 0, 5) == Place(2, [0, 1, 2], [4, 5, 6]), "where most can start"
    assert start(table, 8, 3, 2) == Place(1, [0, 1], [2, 3])
    assert start(table, 9, 0, 1) == Place(3, [0], [7])
    assert table.find(7, 1) is None, "no slot is free"
    assert table.free(5) == SequenceId(8, 1)
    assert table.find(9, 2) == Place(3, [1], [5])
    assert table.find(10, 1) is None, "no room is free"
    assert start(table, 8, 5, 2) == Place(2, [1], [5])
    assert table.slot_of(SequenceId(8, 5)) == 5
    assert table.slot_of(SequenceId(8, 1)) is None
    assert (table.in_use, table.most_in_a_shard) == (8, 4)


def test_a_room_is_free_when_its_last_slot_is():
    table = SlotTable(4, 1, shards=1, copies=2)
    start(table, 0, 0, 2)
    assert table.find(1, 1) is None
    table.free(0)
    assert table.find(1, 1) is None
    table.free(1)
    assert start(table, 1, 0, 1) == Place(0, [0], [0])


def test_rooms_that_are_added_are_those_of_every_shard():
    table = SlotTable(8, 2, shards=2, copies=1)
    assert start(table, 0, 0, 1) == Place(0, [0], [0])
    assert start(table, 1, 0, 1) == Place(1, [0], [4])
    table.grow_rooms(8)
    assert start(table, 2, 0, 1) == Place(1, [0], [1])
    moves = table.move(2)
    # Shard 1 has rooms 4 to 7 of 8, and had room 1 of 2.
    np.testing.assert_array_equal(np.nonzero(~moves.free_B)[0], [0, 1, 2])
    assert moves.place_B[:3].tolist() == [0, 1, 0]
    assert moves.slots_NK[4].tolist() == [0]


@pytest.mark.parametrize("shards", [1, 2])
def test_moved_sequences_keep_their_prompts(shards):
    """`place_B` and `slots_NK` are inverse to each other, as the caches take them."""
    rng, copies, rooms = np.random.default_rng(shards), 3, 8
    for _ in range(50):
        table, prompt_of = SlotTable(16, rooms, shards=shards, copies=copies), {}
        for ticket in range(5):
            place = start(table, ticket, 0, int(rng.integers(1, 4)))
            prompt_of |= {SequenceId(ticket, i): place.room for i in range(len(place.slots))}
        while table.most_in_a_shard > 16 // shards // 4:
            table.free(table.slot_of(table.running[rng.integers(table.in_use)]))
        before = table.sequences
        moves = table.move(16 // shards // 4)
        assert len(table) == 4 == len(moves.from_B)
        for slot, sequence in enumerate(table.sequences):
            assert bool(moves.free_B[slot]) == (sequence is None)
            if sequence is None:
                continue
            shard, own = divmod(slot, table.per_shard)
            assert before[shard * 16 // shards + moves.from_B[slot]] == sequence
            assert table.slot_of(sequence) == slot
            room, row = divmod(int(moves.place_B[slot]), copies)
            assert shard * rooms // shards + room == prompt_of[sequence]
            assert moves.slots_NK[prompt_of[sequence], row] == own
        assert {s for s in before if s} == set(table.running)
