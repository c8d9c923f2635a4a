"""Generation without sampling: the logits of a sequence, token by token after a prompt."""

import jax
import jax.numpy as jnp
from flax import nnx

from nrt_jax.models.attention import KVPrefix
from nrt_jax.models.decoder import Decoder


def prefill_and_decode(model: Decoder, ids_BT: jax.Array, prompt: int) -> jax.Array:
    """Logits [B, T, V]: the first `prompt` tokens at once, each other one with the cache."""
    T = ids_BT.shape[1]
    cache, logits = prefill(model, ids_BT[:, :prompt])
    outputs = [logits]
    # Slots that are not written yet hold garbage of segment 9, which no query may see.
    cache = KVPrefix(
        *(_grow(x, T - prompt, dim) for x, dim in zip(cache, (2, 2, 1, 1), strict=True))
    )
    for t in range(prompt, T):
        logits, cache = decode(model, ids_BT[:, t : t + 1], jnp.asarray(t), cache)
        outputs.append(logits)
    return jnp.concatenate(outputs, axis=1)


@nnx.jit
def prefill(model: Decoder, ids: jax.Array) -> tuple[KVPrefix, jax.Array]:
    """The cache of a prompt, and its logits."""
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1])[None], ids.shape)
    states, cache = model.hidden(ids, positions, jnp.ones(ids.shape, jnp.int32))
    return cache, model.logits(states)


@nnx.jit
def decode(
    model: Decoder, ids: jax.Array, t: jax.Array, cache: KVPrefix
) -> tuple[jax.Array, KVPrefix]:
    """Logits after one more token, and the cache with its keys and values in slot t."""
    segments = jnp.ones(ids.shape, jnp.int32)
    states, new = model.hidden(ids, jnp.full(ids.shape, t), segments, cache)
    return model.logits(states), KVPrefix(
        cache.k.at[:, :, t].set(new.k[:, :, 0]),
        cache.v.at[:, :, t].set(new.v[:, :, 0]),
        cache.positions_PS.at[:, t].set(t),
        cache.segment_ids_PS.at[:, t].set(1),
    )


def _grow(x: jax.Array, slots: int, dim: int) -> jax.Array:
    padding = [(0, 0)] * x.ndim
    padding[dim] = (0, slots)
    return jnp.pad(x, padding, constant_values=9)
