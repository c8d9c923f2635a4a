"""How far the sequence of each slot is, by slot: the host's numbers for all slots at once.

Letters: B slots.
"""

import numpy as np
from jaxtyping import Int

from nrt_jax.engine.decode_state import SlotMoves


class SlotProgress:
    """Tokens that the host has read of each slot's sequence, and its limit; 0 in a free slot."""

    def __init__(self, slots: int):
        self.length_B, self.limit_B = np.zeros((2, slots), np.int32)

    def start(self, slots: list[int], limits: Int[np.ndarray, "K"]) -> None:
        """Begin sequences with these limits."""
        self.length_B[slots], self.limit_B[slots] = 0, limits

    def free(self, slot: int) -> None:
        """Forget the slot's sequence."""
        self.length_B[slot] = self.limit_B[slot] = 0

    def longest(self, more: int) -> int:
        """Tokens of the longest sequence after `more` of them in each."""
        return int(np.minimum(self.limit_B, self.length_B + more).max())

    @property
    def tokens_left(self) -> int:
        """Most tokens that any sequence may still get."""
        return int((self.limit_B - self.length_B).max())

    def move(self, moves: SlotMoves, shards: int) -> Int[np.ndarray, "B"]:
        """Follow a move of the slots; returns the new slot of each old one, -1 for a free one."""
        old, new = len(self.limit_B), len(moves.from_B)
        shard_B = np.arange(new) // (new // shards)
        from_B = shard_B * (old // shards) + np.asarray(moves.from_B)
        kept_B = ~np.asarray(moves.free_B)
        self.length_B = np.where(kept_B, self.length_B[from_B], 0)
        self.limit_B = np.where(kept_B, self.limit_B[from_B], 0)
        to_B = np.full(old, -1)
        to_B[from_B[kept_B]] = np.nonzero(kept_B)[0]
        return to_B
