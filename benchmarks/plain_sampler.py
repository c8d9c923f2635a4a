"""What the engine is compared with: a batch at a time, each in one compiled while_loop.

A batch's prompts are run together, its caches have room for the longest sequence that may come, and
it is done when its last sequence is. No slot is refilled, and every copy holds its prompt. The
model, the sampler and the products of the attention are those of the engine.

Letters: B sequences of a batch, S prompt tokens, T = S + new tokens, H key/value heads, d head dim.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int, Key

from nrt_jax.config.architecture import Architecture
from nrt_jax.engine.decode_state import slot_sampling
from nrt_jax.engine.sampling import Sampling, sample


class PlainSampler:
    """Samples `limit_B[b]` tokens after each of B prompts of one length."""

    def __init__(self, definition: nnx.GraphDef, architecture: Architecture, new_tokens: int):
        self._definition, self._architecture = definition, architecture
        self._new_tokens = new_tokens
        self._run = jax.jit(self._sample)

    def __call__(
        self, params: Any, tokens_BS: np.ndarray, limit_B: np.ndarray, key: Key[Array, ""]
    ) -> Int[Array, "B T"]:
        """The sampled tokens, 0 after a sequence's limit."""
        return self._run(params, tokens_BS, limit_B, jax.random.split(key, len(tokens_BS)))

    def _sample(self, params, tokens_BS, limit_B, key_B):
        decoder = nnx.merge(self._definition, params)
        layers = decoder.split_layers()
        B, S = tokens_BS.shape
        positions_BS = jnp.broadcast_to(jnp.arange(S)[None], (B, S))
        ones_BS = jnp.ones_like(positions_BS)
        hidden_BSD, kv = decoder.hidden(tokens_BS, positions_BS, ones_BS)
        room = ((0, 0), (0, self._new_tokens), (0, 0), (0, 0))
        caches = tuple(
            (jnp.pad(k, room).transpose(0, 2, 3, 1), jnp.pad(v, room).swapaxes(1, 2))
            for k, v in zip(kv.k, kv.v, strict=True)
        )
        settings = jax.tree.map(jnp.asarray, slot_sampling([Sampling()] * B))
        unseen_BV = jnp.zeros((B, self._architecture.vocab_size), bool)

        def step(carry):
            i, logits_BV, caches, out_BT = carry
            keys_B = jax.vmap(jax.random.fold_in, (0, None))(key_B, i)
            token_B, _ = sample(logits_BV, unseen_BV, keys_B, settings)
            out_BT = out_BT.at[:, i].set(jnp.where(i < limit_B, token_B, 0))
            hidden_BD, caches = decoder.next_hidden(
                token_B, jnp.full(B, S + i), layers, caches, _attend_at(S + i)
            )
            return i + 1, decoder.logits(hidden_BD), caches, out_BT

        out_BT = jnp.zeros((B, self._new_tokens), jnp.int32)
        start = (jnp.int32(0), decoder.logits(hidden_BSD[:, -1]), caches, out_BT)
        return jax.lax.while_loop(lambda carry: carry[0] < jnp.max(limit_B), step, start)[-1]


def _attend_at(at: Int[Array, ""]):
    """Append at one place for all sequences, and attend to everything up to it."""

    def attend(cache, q_B1HGd, k_B1Hd, v_B1Hd):
        k_BHdT, v_BHTd = cache
        k_BHdT = jax.lax.dynamic_update_slice(k_BHdT, k_B1Hd[:, 0, :, :, None], (0, 0, 0, at))
        v_BHTd = jax.lax.dynamic_update_slice(v_BHTd, v_B1Hd[:, 0, :, None], (0, 0, at, 0))
        scores = jnp.einsum(
            "bhgd,bhdt->bhgt", q_B1HGd[:, 0], k_BHdT, preferred_element_type=jnp.float32
        )
        seen_T = jnp.arange(k_BHdT.shape[3])[None, None, None] <= at
        scores = jnp.where(seen_T, scores * q_B1HGd.shape[-1] ** -0.5, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(v_BHTd.dtype)
        out_BHGd = jnp.einsum("bhgt,bhtd->bhgd", weights, v_BHTd)
        return out_BHGd[:, None], (k_BHdT, v_BHTd)

    return attend
