"""Rows of tokens, and those of a pack side by side, so that one product serves them all.

Letters: B rows, T tokens of a row, N tokens of a pack's rows together.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int


class TokenRows(NamedTuple):
    """Rows of tokens, pack by pack."""

    tokens_BT: Int[Array, "B T"]
    positions_BT: Int[Array, "B T"]
    segment_ids_BT: Int[Array, "B T"]
    """A token sees the earlier tokens of its own segment; 0 is padding."""
    continued_BT: Int[Array, "B T"] | None = None
    """Segment of the prompt that a token continues; None for rows that continue none."""


class SideBySide(NamedTuple):
    """Several arrays [packs * rows, T, ...] as one, [packs, N, ...].

    With the tokens of a row over the devices of `context`, those of a device stay together, and no
    token leaves its device. Two rows of four tokens beside one of two, over two devices:

        a1 a2 a3 a4
        b1 b2 b3 b4     and  c1 c2     are     a1 a2 b1 b2 c1  a3 a4 b3 b4 c2
    """

    packs: int
    shards: int
    """Devices of the context axis."""
    shapes: tuple[tuple[int, int], ...]
    """Rows of a pack and tokens of a row, of each array."""

    @classmethod
    def of(cls, arrays: Sequence[Array], packs: int, shards: int) -> "SideBySide":
        """The layout of arrays whose rows belong to so many packs."""
        return cls(packs, shards, tuple((len(x) // packs, x.shape[1]) for x in arrays))

    def join(self, arrays: Sequence[Array]) -> Array:
        """The arrays side by side."""
        if len(arrays) == 1:
            return arrays[0]
        rest = arrays[0].shape[2:]
        parts = []
        for x, (rows, tokens) in zip(arrays, self.shapes, strict=True):
            cut = x.reshape(self.packs, rows, self.shards, tokens // self.shards, *rest)
            parts.append(jnp.moveaxis(cut, 2, 1).reshape(self.packs, self.shards, -1, *rest))
        return jnp.concatenate(parts, axis=2).reshape(self.packs, -1, *rest)

    def split(self, joined: Array) -> list[Array]:
        """The inverse of `join`."""
        if len(self.shapes) == 1:
            return [joined]
        rest = joined.shape[2:]
        ends = np.cumsum([rows * tokens // self.shards for rows, tokens in self.shapes])
        parts = joined.reshape(self.packs, self.shards, -1, *rest)
        arrays = []
        for part, (rows, tokens) in zip(
            jnp.split(parts, ends[:-1], axis=2), self.shapes, strict=True
        ):
            cut = part.reshape(self.packs, self.shards, rows, tokens // self.shards, *rest)
            arrays.append(jnp.moveaxis(cut, 1, 2).reshape(self.packs * rows, tokens, *rest))
        return arrays
