"""Prompts to keys and values: a prompt as a whole, or part by part.

Letters: L layers, S prompt tokens or room for them, C tokens of one part, H key/value heads, d head
dim, V vocabulary.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from nrt_jax.config.architecture import Architecture
from nrt_jax.models.attention import KVPrefix
from nrt_jax.models.decoder import Decoder


class Prefix(NamedTuple):
    """A prompt after prefill, or its first part: keys and values, and the logits of what follows.

    Entries from `length` on are room for a later part.
    """

    k_LSHd: Float[Array, "L S H d"]
    v_LSHd: Float[Array, "L S H d"]
    logits_V: Float[Array, "V"]
    seen_V: Bool[Array, "V"]
    """Tokens of the prompt, for the repetition penalty."""
    length: Int[Array, ""]


def empty_prefix(architecture: Architecture, room: int, dtype: DTypeLike) -> Prefix:
    """A prefix of no tokens, with room for some."""
    a = architecture
    shape = (a.num_hidden_layers, room, a.num_key_value_heads, a.head_dim)
    return Prefix(
        jnp.zeros(shape, dtype),
        jnp.zeros(shape, dtype),
        jnp.zeros(a.vocab_size, jnp.float32),
        jnp.zeros(a.vocab_size, bool),
        jnp.int32(0),
    )


def run_prompt(decoder: Decoder, tokens_S: Int[Array, "S"], length: Int[Array, ""]) -> Prefix:
    """Run a prompt of `length` tokens; what follows them is padding."""
    positions_1S = jnp.arange(tokens_S.shape[0])[None]
    valid_1S = positions_1S < length
    hidden_1SD, kv = decoder.hidden(tokens_S[None], positions_1S, valid_1S.astype(jnp.int32))
    return Prefix(
        kv.k[:, 0],
        kv.v[:, 0],
        decoder.logits(hidden_1SD[0, length - 1]),
        _seen(decoder, tokens_S, valid_1S[0]),
        jnp.asarray(length, jnp.int32),
    )


def run_next_part(
    decoder: Decoder, prefix: Prefix, tokens_C: Int[Array, "C"], length: Int[Array, ""]
) -> Prefix:
    """Run the next `length` tokens of the prompt that the prefix is the first part of."""
    order_1C = jnp.arange(tokens_C.shape[0])[None]
    room_1S = jnp.arange(prefix.k_LSHd.shape[1])[None]
    valid_1C = order_1C < length
    written_1S = (room_1S < prefix.length).astype(jnp.int32)
    before = KVPrefix(prefix.k_LSHd[:, None], prefix.v_LSHd[:, None], room_1S, written_1S)
    hidden_1CD, new = decoder.hidden(
        tokens_C[None], prefix.length + order_1C, valid_1C.astype(jnp.int32), before
    )
    # What is padding lies beyond the room or is written over by the next part.
    at_C = prefix.length + order_1C[0]
    return Prefix(
        prefix.k_LSHd.at[:, at_C].set(new.k[:, 0], mode="drop"),
        prefix.v_LSHd.at[:, at_C].set(new.v[:, 0], mode="drop"),
        decoder.logits(hidden_1CD[0, length - 1]),
        prefix.seen_V | _seen(decoder, tokens_C, valid_1C[0]),
        jnp.asarray(prefix.length + length, jnp.int32),
    )


def _seen(
    decoder: Decoder, tokens_S: Int[Array, "S"], valid_S: Bool[Array, "S"]
) -> Bool[Array, "V"]:
    V = decoder.architecture.vocab_size
    return jnp.zeros(V, bool).at[jnp.where(valid_S, tokens_S, V)].set(True, mode="drop")
