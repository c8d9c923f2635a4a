"""Tokens by name, and rows of the embedding and the head made from those of other tokens.

Letters: V vocabulary.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nrt_jax.config.model import ModelConfig
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.errors import InputError

log = logging.getLogger(__name__)

TEXT, MEAN_ROW = "text:", "mean:vocabulary"
"""`text:TEXT` is the mean row of the tokens of a text, `mean:vocabulary` that of all tokens."""
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


class RowNames(NamedTuple):
    """Where the rows of the two think tokens come from: names of tokens, or of mean rows."""

    think_start: str
    think_end: str


def row_names(config: ModelConfig, tokenizer: Tokenizer) -> RowNames:
    """The names in the config; `auto` stays `auto`."""
    eos = tokenizer.token(tokenizer.eos_id)
    start = eos if config.new_rows_from is None else config.new_rows_from
    return RowNames(start, config.new_end_row_from or start)


def with_new_rows(params: dict, tokenizer: Tokenizer, names: RowNames) -> dict:
    """New params in which the think tokens that are new to the checkpoint have the named rows.

    A mean row is the mean of the rows, with the mean of their norms: the mean of many rows is
    short, and its logit would be near 0 everywhere. Raises InputError for a name that the tokenizer
    lacks.
    """
    sources = {
        new: row_sources(tokenizer, name) for new, name in _names_of_new(tokenizer, names).items()
    }
    params = copy_token_rows(params, {t: ids[0] for t, ids in sources.items() if len(ids) == 1})
    for target, ids in sources.items():
        if len(ids) > 1:
            params = _with_mean_row(params, target, ids)
    return params


def tell_new_rows(tokenizer: Tokenizer, names: RowNames) -> None:
    """Log where each new row comes from; InputError for a name without rows, used or not."""
    for name in names:
        row_sources(tokenizer, name)
    for new, name in _names_of_new(tokenizer, names).items():
        kind = "a copy" if len(row_sources(tokenizer, name)) == 1 else "the mean row"
        log.info("%s (id %d) starts as %s of %s", tokenizer.token(new), new, kind, name)


def _names_of_new(tokenizer: Tokenizer, names: RowNames) -> dict[int, str]:
    ids = tokenizer.think_start_id, tokenizer.think_end_id
    return {i: name for i, name in zip(ids, names, strict=True) if i in tokenizer.new_ids}


def row_sources(tokenizer: Tokenizer, name: str) -> list[int]:
    """Ids of the tokens whose mean row `name` stands for; InputError for a name without any."""
    where = "model.new_rows_from"
    if name == MEAN_ROW:
        return [i for i in range(tokenizer.vocab_size) if i not in tokenizer.new_ids]
    if not name.startswith(TEXT):
        return [token_id(tokenizer, name, where)]
    text = name.removeprefix(TEXT)
    ids = tokenizer.encode(text)
    if not ids or tokenizer.unk_id in ids or tokenizer.decode(ids).strip() != text.strip():
        raise InputError(
            f"{where}: {name!r} is a text that {tokenizer.directory} cannot spell; use another "
            "text, or an entry of its vocabulary"
        )
    return ids


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
    targets, sources = (np.asarray([*ids], np.int32) for ids in (rows.keys(), rows.values()))
    copied = params | {"embedding": _copy(params["embedding"], targets, sources, 0)}
    if "head" in params:
        copied["head"] = _copy(params["head"], targets, sources, 1)
    return copied


def _copy(
    weight: Float[Array, "..."],
    targets: Int[np.ndarray, "tokens"],
    sources: Int[np.ndarray, "tokens"],
    dim: int,
) -> Array:
    return _program(_copy_rows, weight.sharding)(weight, targets, sources, dim)


def _copy_rows(weight: Array, targets: Array, sources: Array, dim: int) -> Array:
    rows = jnp.take(weight, sources, axis=dim)
    return weight.at[(slice(None),) * dim + (targets,)].set(rows)


@cache
def _program(function: Callable[..., Array], sharding: Any) -> Callable[..., Array]:
    """The function of a weight, other arrays and a dim, compiled once per sharding and shapes."""
    return jax.jit(function, static_argnums=3, out_shardings=sharding)


def _with_mean_row(params: dict, target: int, sources: Sequence[int]) -> dict:
    """New params in which `target` has the mean row of the sources, with the mean norm."""
    vocab_size = params["embedding"].shape[0]
    share_V = np.bincount(sources, minlength=vocab_size).astype(np.float32) / len(sources)
    changed = params | {"embedding": _set_mean(params["embedding"], share_V, target, 0)}
    if "head" in params:
        changed["head"] = _set_mean(params["head"], share_V, target, 1)
    return changed


def _set_mean(
    weight: Float[Array, "..."], share_V: Float[np.ndarray, "V"], target: int, dim: int
) -> Array:
    return _program(_set_mean_row, weight.sharding)(weight, share_V, np.int32(target), dim)


def _set_mean_row(weight: Array, share_V: Array, target: Array, dim: int) -> Array:
    # Contractions over the vocabulary, so that rows stay on the devices that hold them.
    row = jnp.tensordot(share_V, weight, (0, dim))
    norm = jnp.linalg.norm(weight, axis=1 - dim) @ share_V
    row *= norm / jnp.linalg.norm(row)
    return weight.at[(slice(None),) * dim + (target,)].set(row)
