"""Which sequence sits in which slot, and which slots continue the prompt of each room.

The host's picture of `decode_state.Places`: slots and rooms are numbered shard after shard, and a
slot continues a prompt of its own shard, by one of the rows that the prompt's room has:

    slot          0      1      2      3
    sequence      (7,0)  (7,1)  -      (8,0)       (ticket, copy)
    room 0        ticket 7, rows [0 1]
    room 1        ticket 8, rows [3 -]

Letters: B slots, N rooms, K rows of a room.
"""

from typing import NamedTuple

import numpy as np

from nrt_jax.engine.decode_state import Moves


class SequenceId(NamedTuple):
    """Copy `copy` of the request with this ticket."""

    ticket: int
    copy: int


class Place(NamedTuple):
    """Where some copies of one request can start: copy i in `slots[i]`, by row `rows[i]`."""

    room: int
    rows: list[int]
    slots: list[int]


class _Room(NamedTuple):
    """A prompt that is continued: whose it is, and the slot of each row."""

    ticket: int
    rows: list[int | None]


class SlotTable:
    """Finds places for sequences, and knows them until they are freed."""

    def __init__(self, slots: int, rooms: int, *, shards: int, copies: int):
        self._shards, self._copies, self._room_count = shards, copies, rooms
        self._sequences: list[SequenceId | None] = [None] * slots
        self._slot_of: dict[SequenceId, int] = {}
        # Rooms whose prompt no slot continues have no entry.
        self._rooms: dict[int, _Room] = {}

    def __len__(self) -> int:
        """B, with a sequence or without."""
        return len(self._sequences)

    @property
    def sequences(self) -> list[SequenceId | None]:
        """Those of all slots at this moment."""
        return list(self._sequences)

    @property
    def running(self) -> list[SequenceId]:
        """The sequences, in the order of their slots."""
        return [sequence for sequence in self._sequences if sequence is not None]

    @property
    def in_use(self) -> int:
        """Slots with a sequence."""
        return len(self._slot_of)

    @property
    def per_shard(self) -> int:
        """Slots of one shard."""
        return len(self) // self._shards

    @property
    def most_in_a_shard(self) -> int:
        """Sequences of the shard that has most."""
        shards = [slot // self.per_shard for slot in self._slot_of.values()]
        return max(map(shards.count, range(self._shards)))

    def slot_of(self, sequence: SequenceId) -> int | None:
        """Where a sequence is; None when it is nowhere."""
        return self._slot_of.get(sequence)

    # Places

    def find(self, ticket: int, wanted: int) -> Place | None:
        """A place for as many of `wanted` copies as can start in one room; None when no room is.

        It is in a room that holds the request's prompt, or in one that is free.
        """
        free: list[list[int]] = [[] for _ in range(self._shards)]
        for slot, sequence in enumerate(self._sequences):
            if sequence is None:
                free[slot // self.per_shard].append(slot)
        best: Place | None = None
        for shard, slots in enumerate(free):
            for room in self._rooms_for(ticket, shard):
                rows = self._rooms[room].rows if room in self._rooms else [None] * self._copies
                free_rows = [row for row, slot in enumerate(rows) if slot is None]
                count = min(wanted, len(slots), len(free_rows))
                if count and (best is None or count > len(best.slots)):
                    best = Place(room, free_rows[:count], slots[:count])
        return best

    def _rooms_for(self, ticket: int, shard: int) -> list[int]:
        """The shard's rooms that hold this request's prompt, and one that is free."""
        per_shard = self._room_count // self._shards
        rooms = range(shard * per_shard, (shard + 1) * per_shard)
        own = [n for n in rooms if n in self._rooms and self._rooms[n].ticket == ticket]
        return own + [n for n in rooms if n not in self._rooms][:1]

    def occupy(self, place: Place, sequences: list[SequenceId]) -> None:
        """Put sequences of one request where `find` said."""
        new = _Room(sequences[0].ticket, [None] * self._copies)
        rows = self._rooms.setdefault(place.room, new).rows
        for row, slot, sequence in zip(place.rows, place.slots, sequences, strict=True):
            rows[row] = slot
            self._sequences[slot] = sequence
            self._slot_of[sequence] = slot

    def free(self, slot: int) -> SequenceId:
        """Empty a slot, its row, and the room of a prompt that no other slot continues.

        Returns the sequence that was in it.
        """
        sequence, self._sequences[slot] = self._sequences[slot], None
        assert sequence is not None
        del self._slot_of[sequence]
        for number, room in list(self._rooms.items()):
            if slot in room.rows:
                room.rows[room.rows.index(slot)] = None
                if all(row is None for row in room.rows):
                    del self._rooms[number]
        return sequence

    # Sizes

    def grow_rooms(self, rooms: int) -> None:
        """Have `rooms` rooms, which is more than before; each shard's come after those it has."""
        before, after = self._room_count // self._shards, rooms // self._shards
        self._rooms = {n // before * after + n % before: room for n, room in self._rooms.items()}
        self._room_count = rooms

    def move(self, per_shard: int) -> Moves:
        """Put the sequences of each shard into the first of `per_shard` slots."""
        new: list[SequenceId | None] = [None] * (self._shards * per_shard)
        from_B, place_B = np.zeros((2, len(new)), np.int32)
        now: dict[int, int] = {}
        for slot, sequence in enumerate(self._sequences):
            if sequence is None:
                continue
            shard, old = divmod(slot, self.per_shard)
            target = shard * per_shard + sum(s // per_shard == shard for s in now.values())
            new[target], from_B[target], now[slot] = sequence, old, target
        slots_NK = np.zeros((self._room_count, self._copies), np.int32)
        rooms_per_shard = self._room_count // self._shards
        for number, room in self._rooms.items():
            for row, slot in enumerate(room.rows):
                if slot is not None:
                    room.rows[row] = now[slot]
                    slots_NK[number, row] = now[slot] % per_shard
                    place_B[now[slot]] = number % rooms_per_shard * self._copies + row
        self._sequences = new
        self._slot_of = {s: slot for slot, s in enumerate(new) if s is not None}
        free_B = np.asarray([sequence is None for sequence in new])
        return Moves(from_B, free_B, slots_NK, place_B)
