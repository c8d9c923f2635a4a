"""Two units of packed rows, with every case that a mask must tell apart, and attention over them.

Letters: those of nrt_jax/models/attention.py.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from nrt_jax.models.attention import KVPrefix, attend, own_mask, prefix_mask

P, R, S, H, G = 2, 2, 200, 2, 2
B = P * R


class PackedRows:
    """Segments of rows of T tokens: (row, first token, end, segment, prompt that it continues)."""

    def __init__(self, T: int, d: int, dtype: DTypeLike = jnp.float32):
        branches = [
            (0, 0, 100, 1, 1),
            (0, 100, T - 50, 2, 2),  # and padding after it
            (1, 5, T, 1, 2),  # and padding before it
            (2, 0, T, 1, 1),
            (3, 0, 40, 1, 1),
            (3, 40, 41, 2, 1),
            (3, 41, T, 3, 1),
        ]
        prompts = [(0, 0, 90, 1), (0, 90, 180, 2), (1, 20, S, 1)]
        segments_BT, continued_BT = np.zeros((2, B, T), np.int32)
        for row, start, end, segment, prompt in branches:
            segments_BT[row, start:end], continued_BT[row, start:end] = segment, prompt
        prompt_PS = np.zeros((P, S), np.int32)
        for row, start, end, segment in prompts:
            prompt_PS[row, start:end] = segment
        self.segments_BT, self.continued_BT, self.prompt_PS = map(
            jnp.asarray, (segments_BT, continued_BT, prompt_PS)
        )
        self.is_token_BT = self.segments_BT != 0
        shapes = [(B, T, H, G, d), *[(B, T, H, d)] * 2, *[(P, S, H, d)] * 2]
        keys = jax.random.split(jax.random.key(0), len(shapes) + 1)
        draws = [jax.random.normal(*x) for x in zip(keys, [*shapes, shapes[0]], strict=True)]
        self.arrays = tuple(x.astype(dtype) for x in draws[:-1])
        """q, k, v, and the prefix's k and v."""
        self._weight_BTHGd = draws[-1] * self.is_token_BT[:, :, None, None, None]

    def reference(self, q, k, v, prefix_k, prefix_v) -> jax.Array:
        """XLA's attention, which test_attention.py holds against loops."""
        prefix = self.prefix(prefix_k, prefix_v)
        return attend(q, k, v, self.own_mask(), prefix, self.prefix_mask(prefix))

    def prefix(self, k: jax.Array, v: jax.Array) -> KVPrefix:
        return KVPrefix(k, v, jnp.zeros((P, S), jnp.int32), self.prompt_PS)

    def own_mask(self) -> jax.Array:
        return own_mask(jnp.zeros_like(self.segments_BT), self.segments_BT, None)

    def prefix_mask(self, prefix: KVPrefix) -> jax.Array:
        return prefix_mask(jnp.zeros_like(self.segments_BT), self.continued_BT, *prefix[2:], None)

    def outputs_and_gradients(self, attention: Callable[..., jax.Array], arrays: Any) -> Any:
        """Outputs at tokens, and gradients of a weighted sum of them."""

        @jax.jit
        @partial(jax.value_and_grad, argnums=tuple(range(len(arrays))), has_aux=True)
        def run(*arrays):
            out = attention(*arrays).astype(jnp.float32)
            return jnp.sum(out * self._weight_BTHGd), out

        (_, out), gradients = run(*arrays)
        return out[self.is_token_BT], gradients
