"""Prompts to keys and values: a prompt as a whole, or part by part.

Letters: L layers, S capacity in prompt tokens, T tokens of one part, H key/value heads, d head dim,
V vocabulary.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from nrt_jax.config.architecture import Architecture
from nrt_jax.models.attention import KVPrefix
from nrt_jax.models.decoder import Decoder


class Prefix(NamedTuple):
    """Keys and values of a prompt or its first part, and the logits of the next token.

    Entries from `length` on are free for a later part.
    """

    k_LSHd: Float[Array, "L S H d"]
    v_LSHd: Float[Array, "L S H d"]
    logits_V: Float[Array, "V"]
    seen_V: Bool[Array, "V"]
    """Tokens of the prompt, for the repetition penalty."""
    length: Int[Array, ""]


def empty_prefix(architecture: Architecture, capacity: int, dtype: DTypeLike) -> Prefix:
    """A prefix of no tokens, for up to `capacity` of them."""
    a = architecture
    shape = (a.num_hidden_layers, capacity, a.num_key_value_heads, a.head_dim)
    return Prefix(
        k_LSHd=jnp.zeros(shape, dtype),
        v_LSHd=jnp.zeros(shape, dtype),
        logits_V=jnp.zeros(a.vocab_size, jnp.float32),
        seen_V=jnp.zeros(a.vocab_size, bool),
        length=jnp.int32(0),
    )


def run_prompt(decoder: Decoder, tokens_S: Int[Array, "S"], length: Int[Array, ""]) -> Prefix:
    """Run a prompt of `length` tokens, which padding follows."""
    positions_1S = jnp.arange(tokens_S.shape[0])[None]
    valid_1S = positions_1S < length
    hidden_1SD, kv = decoder.hidden(tokens_S[None], positions_1S, valid_1S.astype(jnp.int32))
    return Prefix(
        k_LSHd=kv.k[:, 0],
        v_LSHd=kv.v[:, 0],
        logits_V=decoder.logits(hidden_1SD[0, length - 1]),
        seen_V=_seen(decoder, tokens_S, valid_1S[0]),
        length=jnp.asarray(length, jnp.int32),
    )


def run_next_part(
    decoder: Decoder, prefix: Prefix, tokens_T: Int[Array, "T"], length: Int[Array, ""]
) -> Prefix:
    """Run the next `length` tokens of a prompt whose first tokens are in `prefix`."""
    order_1T = jnp.arange(tokens_T.shape[0])[None]
    entry_1S = jnp.arange(prefix.k_LSHd.shape[1])[None]
    valid_1T = order_1T < length
    written_1S = (entry_1S < prefix.length).astype(jnp.int32)
    before = KVPrefix(prefix.k_LSHd[:, None], prefix.v_LSHd[:, None], entry_1S, written_1S)
    hidden_1TD, new = decoder.hidden(
        tokens_T[None], prefix.length + order_1T, valid_1T.astype(jnp.int32), before
    )
    # Keys of padding lie beyond the capacity, or the next part overwrites them.
    at_T = prefix.length + order_1T[0]
    return Prefix(
        k_LSHd=prefix.k_LSHd.at[:, at_T].set(new.k[:, 0], mode="drop"),
        v_LSHd=prefix.v_LSHd.at[:, at_T].set(new.v[:, 0], mode="drop"),
        logits_V=decoder.logits(hidden_1TD[0, length - 1]),
        seen_V=prefix.seen_V | _seen(decoder, tokens_T, valid_1T[0]),
        length=jnp.asarray(prefix.length + length, jnp.int32),
    )


def _seen(
    decoder: Decoder, tokens_S: Int[Array, "S"], valid_S: Bool[Array, "S"]
) -> Bool[Array, "V"]:
    """Whether each token of the vocabulary is among the valid tokens."""
    V = decoder.architecture.vocab_size
    return jnp.zeros(V, bool).at[jnp.where(valid_S, tokens_S, V)].set(True, mode="drop")
