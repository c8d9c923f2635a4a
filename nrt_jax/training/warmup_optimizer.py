"""The update rule of the warm-up: the rows of the think tokens are a parameter group of their own.

A tied head is the embedding itself; otherwise a token has a row of the embedding and a column of
the head, and both are in the group.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from nrt_jax.config.optimizer import OptimizerConfig
from nrt_jax.training.optimizer import clipped_adamw

_TOKEN_DIMS = {"embedding": 0, "head": 1}
"""The weights that have a row or a column per token, and which of their dims that is."""


class Rates(NamedTuple):
    """Constant learning rates of the two groups."""

    rows: float
    others: float
    """0: they stay as they are."""


def warmup_optimizer(
    config: OptimizerConfig, rates: Rates, tokens: Sequence[int]
) -> optax.GradientTransformation:
    """AdamW in two groups: the rows of `tokens`, and everything else.

    Each group has its own rate, and its gradient is clipped by its own norm: that of new rows is
    far above that of all other weights, which a common clip would stop. Moments belong to single
    weights, so the state has the structure of `make_optimizer`'s.
    """
    adamw = clipped_adamw(
        config,
        optax.constant_schedule(1.0),
        clip_gradient=lambda norm: clip_apart(norm, tokens),
    )

    def update(gradient: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        changes, state = adamw.update(gradient, state, params)
        return _scale_groups(changes, tokens, rates.rows, rates.others), state

    return optax.GradientTransformation(adamw.init, update)  # pyright: ignore[reportArgumentType]


def clip_apart(norm: float, tokens: Sequence[int]) -> optax.GradientTransformation:
    """Clip the gradient of the rows of `tokens`, and that of the rest, to `norm` each."""

    def update(gradient: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        of_rows = optax.tree.norm(_rows_of(gradient, tokens))
        of_others = optax.tree.norm(_scale_groups(gradient, tokens, 0.0, 1.0))
        factors = (jnp.minimum(1.0, norm / jnp.maximum(n, 1e-30)) for n in (of_rows, of_others))
        return _scale_groups(gradient, tokens, *factors), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def only_rows(params: dict[str, Any]) -> dict[str, Any]:
    """The weights with no gradient but that of embedding and head: the backward pass is shorter."""
    return {
        name: weight if name in _TOKEN_DIMS else jax.lax.stop_gradient(weight)
        for name, weight in params.items()
    }


def _rows_of(tree: dict[str, Any], tokens: Sequence[int]) -> dict[str, Array]:
    at = jnp.asarray(tokens)
    return {
        name: jnp.take(tree[name], at, axis=dim)
        for name, dim in _TOKEN_DIMS.items()
        if name in tree
    }


def _scale_groups(
    tree: dict[str, Any], tokens: Sequence[int], rows: float | Array, others: float | Array
) -> dict[str, Any]:
    """The tree times `rows` at the rows of the tokens, and times `others` elsewhere."""
    at = jnp.asarray(tokens)
    scaled = jax.tree.map(lambda leaf: leaf * others, tree)
    for name, of_tokens in _rows_of(tree, tokens).items():
        where = (slice(None),) * _TOKEN_DIMS[name] + (at,)
        scaled[name] = scaled[name].at[where].set(of_tokens * rows)
    return scaled
