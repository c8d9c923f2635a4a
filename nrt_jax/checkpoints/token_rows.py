"""Tokens by name, and copies of their embedding and head rows."""

import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.errors import InputError

_ESCAPES = {r"\n": "\n", r"\r": "\r", r"\t": "\t", r"\\": "\\"}


def token_id(tokenizer: Tokenizer, name: str, where: str) -> int:
    """The entry of that name, or the one token that spells the text; InputError without one.

    Escapes such as \\n are read; `where` names the setting in the message.
    """
    text = re.sub(r"\\[nrt\\]", lambda escape: _ESCAPES[escape[0]], name)
    found = tokenizer.find(text)
    if found is not None:
        return found
    ids = tokenizer.encode(text)
    if len(ids) == 1 and ids[0] != tokenizer.unk_id:
        return ids[0]
    raise InputError(
        f"{where}: {name!r} is no token of {tokenizer.directory}; use an entry of its vocabulary"
    )


def row_pairs(tokenizer: Tokenizer, pairs: Sequence[str]) -> dict[int, int]:
    """Target and source ids of `--copy-row TOKEN=FROM` arguments."""
    rows = {}
    for pair in pairs:
        where = f"--copy-row {pair}"
        target, equals, source = pair.partition("=")
        if not equals:
            raise InputError(f"{where}: must look like TOKEN=FROM")
        rows[token_id(tokenizer, target, where)] = token_id(tokenizer, source, where)
    return rows


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
    weight: Float[Array, "..."],
    targets: Int[Array, "tokens"],
    sources: Int[Array, "tokens"],
    dim: int,
) -> Array:
    def copy(weight: Array) -> Array:
        rows = jnp.take(weight, sources, axis=dim)
        return weight.at[(slice(None),) * dim + (targets,)].set(rows)

    return jax.jit(copy, out_shardings=weight.sharding)(weight)
