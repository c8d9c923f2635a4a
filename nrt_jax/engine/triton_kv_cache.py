"""The slots' own keys and values, for the decode attention kernel of GPUs.

The queries of a prompt's slots share its keys, so that part stays XLA's matrix product, which reads
them once. The kernel attends from one query to its slot's own keys, and reads only the filled part
of them.
Letters: those of kv_cache.py.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float

from nrt_jax.engine.kv_cache import KVCache, LayerCache, Masks, Partial
from nrt_jax.engine.triton_attention import attend_to_filled
from nrt_jax.models.sharding import partition_spec


class TritonCache(KVCache):
    """The cache for GPUs; `interpret` runs the kernel on any platform."""

    k_tokens_last = False

    def __init__(
        self, mesh: Mesh | AbstractMesh, window: int | None = None, *, interpret: bool = False
    ):
        super().__init__(mesh, window)
        self._interpret = interpret

    def _attend_own(
        self, layer: LayerCache, q_BHGd: Float[Array, "B H G d"], step: Masks
    ) -> Partial:
        rows, slots = partition_spec(("batch", "kv_heads")), partition_spec(("batch",))
        attend = jax.shard_map(
            self._attend_in_shard,
            mesh=self._mesh,
            in_specs=(rows, rows, rows, slots),
            out_specs=rows,
            check_vma=False,
        )
        k_BHTd, v_BHTd = layer.own_k.values, layer.own_v_BHTd.values
        return attend(q_BHGd.astype(k_BHTd.dtype), k_BHTd, v_BHTd, step.slot_map.own_length_B)

    def _attend_in_shard(self, q_BHGd: Any, k_BHTd: Any, v_BHTd: Any, length_B: Any) -> Partial:
        # A finished slot may have written more tokens than are left after the cache shrank.
        end_B = jnp.minimum(length_B + 1, k_BHTd.shape[2])
        window = end_B if self._window is None else self._window
        start_B = jnp.maximum(end_B - window, 0)
        found = attend_to_filled(q_BHGd, k_BHTd, v_BHTd, start_B, end_B, interpret=self._interpret)
        return Partial(*found)
