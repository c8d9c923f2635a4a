"""The update rule of the warm-up: the rows of the think tokens are a parameter group of their own.

A tied head is the embedding itself; otherwise a token has a row of the embedding and a column of
the head, and both are in the group.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array

from nrt_jax.config.optimizer import OptimizerConfig
from nrt_jax.training.optimizer import clipped_adamw

_TOKEN_DIMS = {"embedding": 0, "head": 1}
"""The weights that have a row or a column per token, and which of their dims that is."""


class Rates(NamedTuple):
    """Learning rates of the two groups in the warm-up, and what replaces them after it."""

    rows: ArrayLike
    others: ArrayLike
    """0: they stay as they are."""
    scheduled: ArrayLike = False
    """True after the warm-up: the rates are factors of the schedule's, and one norm clips all."""

    def as_arrays(self) -> "Rates":
        """As arguments of a compiled program, whatever the values."""
        return Rates(
            np.float32(self.rows), np.float32(self.others), np.asarray(self.scheduled, np.bool_)
        )


SCHEDULED = Rates(1.0, 1.0, scheduled=True).as_arrays()
"""The rates after the warm-up: those of the schedule, as `make_optimizer` has them."""


def warmup_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule, tokens: Sequence[int]
) -> optax.GradientTransformationExtraArgs:
    """AdamW in two groups: the rows of `tokens`, and everything else. `update` takes `rates`.

    In the warm-up each group has its own rate, and its gradient is clipped by its own norm: that of
    new rows is far above that of all other weights, which a common clip would stop. After it the
    update is `make_optimizer`'s with this schedule. The rates are arguments, so that one compiled
    program serves the whole run. Moments belong to single weights, so the state has the structure
    of `make_optimizer`'s.
    """

    def adamw(rates: Rates) -> optax.GradientTransformation:
        return clipped_adamw(
            config,
            lambda count: jnp.where(rates.scheduled, schedule(count), 1.0),
            clip_gradient=lambda norm: _clip(norm, tokens, rates.scheduled),
        )

    def update(
        gradient: Any, state: Any, params: Any = None, *, rates: Rates, **_: Any
    ) -> tuple[Any, Any]:
        changes, state = adamw(rates).update(gradient, state, params)
        return _scale_groups(changes, tokens, rates.rows, rates.others), state

    init = adamw(SCHEDULED).init
    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _clip(norm: float, tokens: Sequence[int], together: Any) -> optax.GradientTransformation:
    """Clip the whole gradient where `together`; else as `clip_apart`."""
    of_all, apart = optax.clip_by_global_norm(norm), clip_apart(norm, tokens)

    def update(gradient: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        clipped = (rule.update(gradient, state, params)[0] for rule in (of_all, apart))
        return jax.tree.map(partial(jnp.where, together), *clipped), state

    return optax.GradientTransformation(of_all.init, update)


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
    tree: dict[str, Any], tokens: Sequence[int], rows: ArrayLike, others: ArrayLike
) -> dict[str, Any]:
    """The tree times `rows` at the rows of the tokens, and times `others` elsewhere."""
    at = jnp.asarray(tokens)
    scaled = jax.tree.map(lambda leaf: leaf * others, tree)
    for name, of_tokens in _rows_of(tree, tokens).items():
        where = (slice(None),) * _TOKEN_DIMS[name] + (at,)
        scaled[name] = scaled[name].at[where].set(of_tokens * rows)
    return scaled
