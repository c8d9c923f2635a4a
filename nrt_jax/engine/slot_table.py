"""Which sequence is in which slot, and which slots continue the prompt of each prompt slot.

The host's side of `kv_cache.SlotMap`. Slots and prompt slots are numbered shard after shard. A slot
continues a prompt of its own shard, as one of the rows of its prompt slot:

    slot            0      1      2      3
    sequence        (7,0)  (7,1)  -      (8,0)       (ticket, sample)
    prompt slot 0   ticket 7, rows [0 1]
    prompt slot 1   ticket 8, rows [3 -]

Letters: B slots, P prompt slots, K rows of a prompt slot.
"""

from bisect import insort
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from nrt_jax.engine.decode_state import SlotMoves


class SequenceId(NamedTuple):
    """Sample `sample` of the request with this ticket."""

    ticket: int
    sample: int


class Placement(NamedTuple):
    """Where samples of one request can start: the i-th in `slots[i]`, as row `rows[i]`."""

    prompt_slot: int
    rows: list[int]
    slots: list[int]


class _PromptSlot(NamedTuple):
    """A prompt slot in use: whose prompt it holds, and the slot of each row."""

    ticket: int
    rows: list[int | None]


class SlotTable:
    """Finds slots for sequences, and tracks the sequences until they are freed."""

    def __init__(self, slots: int, prompt_slots: int, *, shards: int, num_samples: int):
        self._shards, self._num_samples, self._prompts = shards, num_samples, prompt_slots
        self._sequences: list[SequenceId | None] = [None] * slots
        self._slot_of: dict[SequenceId, int] = {}
        # Prompt slots that no slot continues have no entry.
        self._prompt_slots: dict[int, _PromptSlot] = {}
        self._prompt_of: dict[int, int] = {}
        self._list_free()

    def _list_free(self) -> None:
        """Free slots of each shard, in order."""
        starts = range(0, len(self), self.per_shard)
        self._free = [
            [slot for slot in range(start, start + self.per_shard) if not self._sequences[slot]]
            for start in starts
        ]

    def __len__(self) -> int:
        """B, slots in use and free ones."""
        return len(self._sequences)

    @property
    def sequences(self) -> list[SequenceId | None]:
        """A copy of the sequences of all slots."""
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
        """Sequences in the fullest shard."""
        return self.per_shard - min(map(len, self._free))

    def with_free_slots(self) -> list[int]:
        """Shards that have free slots, those with most of them first."""
        shards = [shard for shard in range(self._shards) if self._free[shard]]
        return sorted(shards, key=lambda shard: -len(self._free[shard]))

    def slot_of(self, sequence: SequenceId) -> int | None:
        """The slot of a sequence; None when it has none."""
        return self._slot_of.get(sequence)

    # Starting and freeing sequences

    def find(
        self, ticket: int, wanted: int, shards: Sequence[int] | None = None
    ) -> Placement | None:
        """A placement for as many of `wanted` samples as fit one prompt slot; None when none fits.

        The prompt slot, of one of `shards`, holds the request's prompt already, or is free.
        """
        best: Placement | None = None
        for shard in range(self._shards) if shards is None else shards:
            slots = self._free[shard]
            for number in self._candidates(ticket, shard):
                used = self._prompt_slots.get(number)
                rows = [None] * self._num_samples if used is None else used.rows
                free_rows = [row for row, slot in enumerate(rows) if slot is None]
                count = min(wanted, len(slots), len(free_rows))
                if count and (best is None or count > len(best.slots)):
                    best = Placement(number, free_rows[:count], slots[:count])
        return best

    def _candidates(self, ticket: int, shard: int) -> list[int]:
        """The shard's prompt slots that hold this request's prompt, and one that is free."""
        per_shard = self._prompts // self._shards
        numbers = range(shard * per_shard, (shard + 1) * per_shard)
        used = self._prompt_slots
        own = [n for n in numbers if n in used and used[n].ticket == ticket]
        return own + [n for n in numbers if n not in used][:1]

    def occupy(self, placement: Placement, sequences: list[SequenceId]) -> None:
        """Put sequences of one request where `find` said."""
        new = _PromptSlot(sequences[0].ticket, [None] * self._num_samples)
        rows = self._prompt_slots.setdefault(placement.prompt_slot, new).rows
        for row, slot, sequence in zip(placement.rows, placement.slots, sequences, strict=True):
            rows[row] = slot
            self._sequences[slot] = sequence
            self._slot_of[sequence] = slot
            self._prompt_of[slot] = placement.prompt_slot
            self._free[slot // self.per_shard].remove(slot)

    def free(self, slot: int) -> SequenceId:
        """Free a slot and its row, and its prompt slot when no other slot continues the prompt.

        Returns the sequence that was in the slot.
        """
        sequence, self._sequences[slot] = self._sequences[slot], None
        assert sequence is not None
        del self._slot_of[sequence]
        insort(self._free[slot // self.per_shard], slot)
        number = self._prompt_of.pop(slot)
        rows = self._prompt_slots[number].rows
        rows[rows.index(slot)] = None
        if all(row is None for row in rows):
            del self._prompt_slots[number]
        return sequence

    # Changing the number of slots

    def grow_prompt_slots(self, count: int) -> None:
        """Increase the prompt slots to `count`; each shard's new ones follow its old ones."""
        before, after = self._prompts // self._shards, count // self._shards
        self._prompt_slots = {
            n // before * after + n % before: used for n, used in self._prompt_slots.items()
        }
        self._prompts = count
        self._list_prompts()

    def _list_prompts(self) -> None:
        self._prompt_of = {
            slot: number
            for number, used in self._prompt_slots.items()
            for slot in used.rows
            if slot is not None
        }

    def move(self, per_shard: int, prompts_per_shard: int) -> SlotMoves:
        """Have other numbers of slots and prompt slots; the first of each shard are in use."""
        new: list[SequenceId | None] = [None] * (self._shards * per_shard)
        from_B, prompt_row_B = np.zeros((2, len(new)), np.int32)
        new_slot: dict[int, int] = {}
        next_slot = list(range(0, len(new), per_shard))
        for slot, sequence in enumerate(self._sequences):
            if sequence is None:
                continue
            shard, old = divmod(slot, self.per_shard)
            target = next_slot[shard]
            next_slot[shard] += 1
            new[target], from_B[target], new_slot[slot] = sequence, old, target
        from_P = self._move_prompts(prompts_per_shard)
        slots_PK = np.zeros((self._prompts, self._num_samples), np.int32)
        for number, used in self._prompt_slots.items():
            for row, slot in enumerate(used.rows):
                if slot is not None:
                    used.rows[row] = target = new_slot[slot]
                    slots_PK[number, row] = target % per_shard
                    prompt_row_B[target] = number % prompts_per_shard * self._num_samples + row
        self._sequences = new
        self._slot_of = {s: slot for slot, s in enumerate(new) if s is not None}
        self._list_free()
        self._list_prompts()
        free_B = np.asarray([sequence is None for sequence in new])
        return SlotMoves(from_B, free_B, from_P, slots_PK, prompt_row_B)

    def _move_prompts(self, per_shard: int) -> Int[np.ndarray, "P"]:
        """Number the prompt slots in use from each shard's first; the old number of each new."""
        before, self._prompts = self._prompts // self._shards, self._shards * per_shard
        from_P = np.zeros(self._prompts, np.int32)
        next_prompt = list(range(0, self._prompts, per_shard))
        moved: dict[int, _PromptSlot] = {}
        for number in sorted(self._prompt_slots):
            shard, old = divmod(number, before)
            target = next_prompt[shard]
            next_prompt[shard] += 1
            moved[target], from_P[target] = self._prompt_slots[number], old
        self._prompt_slots = moved
        return from_P
