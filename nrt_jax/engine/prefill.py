"""Prompts to keys and values: whole prompts, or part by part.

A program runs one row per shard of the slots, so each device runs the prompt of its own shard.
Letters: L layers, R rows, S capacity in prompt tokens, T tokens of one part, H key/value heads,
d head dim, V sampled vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from nrt_jax.config.architecture import Architecture
from nrt_jax.engine.sampling import fit_vocab, sampled_vocab
from nrt_jax.models.attention import KVPrefix
from nrt_jax.models.decoder import Decoder
from nrt_jax.models.sharding import constrain, partition_spec


class Prefix(NamedTuple):
    """Keys and values of prompts or their first parts, and the logits of the next tokens.

    Entries from a row's length on are free for a later part.
    """

    k_LRHSd: Float[Array, "L R H S d"]
    v_LRHSd: Float[Array, "L R H S d"]
    logits_RV: Float[Array, "R V"]
    seen_RV: Bool[Array, "R V"]
    """Tokens of the prompt, for the repetition penalty."""
    length_R: Int[Array, "R"]

    @property
    def capacity(self) -> int:
        """S."""
        return self.k_LRHSd.shape[3]


def prefix_shardings(mesh: Mesh) -> Prefix:
    """Rows, heads and vocabulary as in the decode state, so that an insert moves nothing."""
    heads = NamedSharding(mesh, partition_spec((None, "batch", "kv_heads")))
    vocab = NamedSharding(mesh, partition_spec(("batch", "vocab")))
    rows = NamedSharding(mesh, partition_spec(("batch",)))
    return Prefix(k_LRHSd=heads, v_LRHSd=heads, logits_RV=vocab, seen_RV=vocab, length_R=rows)


def empty_prefix(
    architecture: Architecture, rows: int, capacity: int, dtype: DTypeLike, mesh: Mesh
) -> Prefix:
    """Prefixes of no tokens, for up to `capacity` of them."""
    a, V = architecture, sampled_vocab(architecture.vocab_size, mesh)
    shape = (a.num_hidden_layers, rows, a.num_key_value_heads, capacity, a.head_dim)
    return Prefix(
        k_LRHSd=jnp.zeros(shape, dtype),
        v_LRHSd=jnp.zeros(shape, dtype),
        logits_RV=jnp.zeros((rows, V), jnp.float32),
        seen_RV=jnp.zeros((rows, V), bool),
        length_R=jnp.zeros(rows, jnp.int32),
    )


@jax.named_scope("prefill")
def run_prompts(
    decoder: Decoder, tokens_RS: Int[Array, "R S"], length_R: Int[Array, "R"], mesh: Mesh
) -> Prefix:
    """Run prompts of `length_R` tokens, which padding follows."""
    tokens_RS = _spread(decoder, tokens_RS, mesh)
    positions_RS = jnp.broadcast_to(jnp.arange(tokens_RS.shape[1])[None], tokens_RS.shape)
    valid_RS = positions_RS < length_R[:, None]
    hidden_RSD, kv = decoder.hidden(tokens_RS, positions_RS, valid_RS.astype(jnp.int32))
    return Prefix(
        k_LRHSd=kv.k.swapaxes(2, 3),
        v_LRHSd=kv.v.swapaxes(2, 3),
        logits_RV=_last_logits(decoder, hidden_RSD, length_R, mesh),
        seen_RV=_seen(decoder, tokens_RS, valid_RS, mesh),
        length_R=jnp.asarray(length_R, jnp.int32),
    )


@jax.named_scope("prefill")
def run_next_parts(
    decoder: Decoder,
    prefix: Prefix,
    tokens_RT: Int[Array, "R T"],
    length_R: Int[Array, "R"],
    mesh: Mesh,
) -> Prefix:
    """Run the next `length_R` tokens of prompts whose first tokens are in `prefix`."""
    tokens_RT = _spread(decoder, tokens_RT, mesh)
    (R, T), S = tokens_RT.shape, prefix.capacity
    order_RT = jnp.broadcast_to(jnp.arange(T)[None], (R, T))
    entry_RS = jnp.broadcast_to(jnp.arange(S)[None], (R, S))
    valid_RT = order_RT < length_R[:, None]
    before_R1 = prefix.length_R[:, None]
    k_LRSHd, v_LRSHd = prefix.k_LRHSd.swapaxes(2, 3), prefix.v_LRHSd.swapaxes(2, 3)
    before = KVPrefix(k_LRSHd, v_LRSHd, entry_RS, (entry_RS < before_R1).astype(jnp.int32))
    at_RT = before_R1 + order_RT
    hidden_RTD, new = decoder.hidden(tokens_RT, at_RT, valid_RT.astype(jnp.int32), before)

    def write(old_LHSd: Array, new_LTHd: Array, at_T: Array) -> Array:
        # Keys of padding lie beyond the capacity, or the next part overwrites them.
        return old_LHSd.at[:, :, at_T].set(new_LTHd.swapaxes(1, 2), mode="drop")

    write_rows = jax.vmap(write, in_axes=(1, 1, 0), out_axes=1)
    return Prefix(
        k_LRHSd=write_rows(prefix.k_LRHSd, new.k, at_RT),
        v_LRHSd=write_rows(prefix.v_LRHSd, new.v, at_RT),
        logits_RV=_last_logits(decoder, hidden_RTD, length_R, mesh),
        seen_RV=prefix.seen_RV | _seen(decoder, tokens_RT, valid_RT, mesh),
        length_R=jnp.asarray(prefix.length_R + length_R, jnp.int32),
    )


def _spread(decoder: Decoder, tokens_RT: Int[Array, "R T"], mesh: Mesh) -> Int[Array, "R T"]:
    """The rows spread over the mesh, and the decoder's activations with them."""
    # The tokens of a row are not spread, as the keys of the cache are not.
    decoder.mesh = mesh if mesh.size > 1 and mesh.shape["context"] == 1 else None
    return constrain(jnp.asarray(tokens_RT), mesh, ("batch", None))


def _last_logits(
    decoder: Decoder, hidden_RTD: Float[Array, "R T D"], length_R: Int[Array, "R"], mesh: Mesh
) -> Float[Array, "R V"]:
    last_R11 = (length_R - 1)[:, None, None]
    last_RD = jnp.take_along_axis(hidden_RTD, last_R11, axis=1)[:, 0]
    V = sampled_vocab(decoder.architecture.vocab_size, mesh)
    return fit_vocab(decoder.logits(last_RD), V)


def _seen(
    decoder: Decoder, tokens_RT: Int[Array, "R T"], valid_RT: Bool[Array, "R T"], mesh: Mesh
) -> Bool[Array, "R V"]:
    """Whether each token of the vocabulary is among a row's valid tokens."""
    V = sampled_vocab(decoder.architecture.vocab_size, mesh)

    def of_row(tokens_T: Array, valid_T: Array) -> Array:
        return jnp.zeros(V, bool).at[jnp.where(valid_T, tokens_T, V)].set(True, mode="drop")

    return jax.vmap(of_row)(tokens_RT, valid_RT)
