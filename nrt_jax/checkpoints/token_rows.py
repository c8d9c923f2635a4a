"""Start a token from what the model knows of another: copy embedding and head rows."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nrt_jax.errors import InputError


def copy_token_rows(params: dict, rows: Mapping[int, int]) -> dict:
    """New params in which token `target` has the embedding and head row of `source`.

    `rows` maps target ids to source ids; all sources are read before any target is written. The
    given params (those of a Decoder) stay as they are, and new arrays are laid out like them.
    Raises InputError on an id without a row.
    """
    if not rows:
        return params
    vocab_size = params["embedding"].shape[0]
    for token in (*rows.keys(), *rows.values()):
        if not 0 <= token < vocab_size:
            raise InputError(f"token id {token}: must be in 0..{vocab_size - 1}, the vocabulary")
    targets, sources = jnp.asarray([*rows.keys()], int), jnp.asarray([*rows.values()], int)
    copied = params | {"embedding": _copy(params["embedding"], targets, sources, 0)}
    if "head" in params:
        copied["head"] = _copy(params["head"], targets, sources, 1)
    return copied


def _copy(
    weight: Float[Array, "..."], targets: Int[Array, "N"], sources: Int[Array, "N"], dim: int
) -> Array:
    def copy(weight: Array) -> Array:
        rows = jnp.take(weight, sources, axis=dim)
        return weight.at[(slice(None),) * dim + (targets,)].set(rows)

    return jax.jit(copy, out_shardings=weight.sharding)(weight)
