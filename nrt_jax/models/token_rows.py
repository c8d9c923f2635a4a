"""Start a token from what the model knows of another: copy embedding and head rows."""

from collections.abc import Mapping

import jax.numpy as jnp

from nrt_jax.errors import InputError


def copy_token_rows(params: dict, rows: Mapping[int, int]) -> dict:
    """New params in which token `target` has the embedding and head row of `source`.

    `rows` maps target ids to source ids; all sources are read before any target is written. The
    given params (those of a Decoder) stay as they are. Raises InputError on an unknown id.
    """
    vocab_size = params["embedding"].shape[0]
    for token in (*rows.keys(), *rows.values()):
        if not 0 <= token < vocab_size:
            raise InputError(f"token id {token}: must be in 0..{vocab_size - 1}, the vocabulary")
    targets, sources = jnp.asarray([*rows.keys()], int), jnp.asarray([*rows.values()], int)
    embedding_VD = jnp.asarray(params["embedding"])
    copied = params | {"embedding": embedding_VD.at[targets].set(embedding_VD[sources])}
    if "head" in params:
        head_DV = jnp.asarray(params["head"])
        copied["head"] = head_DV.at[:, targets].set(head_DV[:, sources])
    return copied
