"""Rows of a pack that run through the layers side by side.

Letters: P rows of prompts, S tokens of one, B rows, T tokens of a row, N tokens of a pack's rows
together, D model dim, H key/value heads, G query heads for each, d head dim.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from nrt_jax.models.attention_backend import Backend, RowAttention, row_attention
from nrt_jax.models.rows import SideBySide, TokenRows
from nrt_jax.models.sharding import check_rows, constrain

STREAM = ("batch", "sequence", None)
"""Logical axes of the hidden states between layers."""
_HEADS = ("batch", "sequence", "kv_heads", None)

Places = tuple[Int[Array, "P S"], Int[Array, "P S"]]
"""Positions and segments of the tokens of a prefix."""
OfPrefix = tuple[Float[Array, "P S H d"], Float[Array, "P S H d"]]
OfFirst = tuple[Float[Array, "B T H d"], Float[Array, "B T H d"]]
"""Keys and values of a layer."""


class JoinedRows(NamedTuple):
    """Rows side by side, each of which attends by itself."""

    tokens_BN: Int[Array, "B N"]
    positions_BN: Int[Array, "B N"]
    layout: SideBySide
    attends: tuple[RowAttention, ...]
    mesh: Mesh | None

    @classmethod
    def of(
        cls,
        rows: Sequence[TokenRows],
        before: Sequence[Places | None],
        *,
        packs: int,
        backend: Backend,
        window: int | None,
        mesh: Mesh | None,
    ) -> "JoinedRows":
        """Join the rows of so many packs; `before` is the prefix that each of them continues.

        Raises InputError when packs or tokens do not divide over the mesh.
        """
        for part in rows:
            check_rows(mesh, packs, part.tokens_BT.shape[1])
        shards = 1 if mesh is None else mesh.shape["context"]
        layout = SideBySide.of([part.tokens_BT for part in rows], packs, shards)
        return cls(
            tokens_BN=layout.join([part.tokens_BT for part in rows]),
            positions_BN=layout.join([part.positions_BT for part in rows]),
            layout=layout,
            attends=tuple(
                row_attention(backend, mesh, window, part, places)
                for part, places in zip(rows, before, strict=True)
            ),
            mesh=mesh,
        )

    def run(
        self,
        layer: Callable[..., tuple[Array, OfFirst]],
        h_BND: Float[Array, "B N D"],
        prefix: OfPrefix | None,
    ) -> tuple[Float[Array, "B N D"], OfFirst]:
        """A layer's output, and the keys and values of the first rows.

        The first rows continue `prefix`, the others continue the first.
        """

        def attend_apart(q_BNHGd, k_BNHd, v_BNHd):
            outs, kv, before = [], None, prefix
            cut = zip(*(self.layout.split(x) for x in (q_BNHGd, k_BNHd, v_BNHd)), strict=True)
            for attend, (q_BTHGd, k_BTHd, v_BTHd) in zip(self.attends, cut, strict=True):
                q_BTHGd = constrain(q_BTHGd, self.mesh, (*_HEADS, None))
                k_BTHd, v_BTHd = (constrain(x, self.mesh, _HEADS) for x in (k_BTHd, v_BTHd))
                outs.append(attend(q_BTHGd, k_BTHd, v_BTHd, before))
                kv = before = kv or (k_BTHd, v_BTHd)
            return self.layout.join(outs), kv

        h_BND, kv = layer(h_BND, self.positions_BN, attend_apart, self.mesh)
        return constrain(h_BND, self.mesh, STREAM), kv
