"""One update: gradients of micro-batches added up, AdamW, and a skip where they are not finite."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from nrt_jax.training.state import TrainState


class Metrics(NamedTuple):
    """Measurements that add up over micro-batches."""

    sums: dict[str, Any]
    means: dict[str, Any]
    """Pairs (sum, count)."""
    maxima: dict[str, Any]


LossFn = Callable[[Any, Any], tuple[Float[Array, ""], Metrics]]
Wanted = Callable[[Any], Bool[Array, ""]]
"""Whether a micro-batch has any part in the loss."""


def combine(first: Metrics, second: Metrics) -> Metrics:
    """Measurements of two micro-batches together."""
    return Metrics(
        jax.tree.map(jnp.add, first.sums, second.sums),
        jax.tree.map(jnp.add, first.means, second.means),
        jax.tree.map(jnp.maximum, first.maxima, second.maxima),
    )


def summarise(metrics: Metrics) -> dict[str, Array]:
    """One number a name; a mean over nothing is 0."""
    means = {k: total / jnp.maximum(count, 1) for k, (total, count) in metrics.means.items()}
    return metrics.sums | means | metrics.maxima


def micro_batches(tree: Any, count: int) -> Any:
    """[P, ...] to [count, P / count, ...], leaving each device's rows where they are.

    Micro-batch i takes rows i, i + count, ...: neighbouring rows lie on one device, so neighbours
    go to different micro-batches.
    """
    return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), tree)


def run_where(wanted: Wanted | None, function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """`function(params, micro)`, which is not run for a micro-batch that is not wanted: zeros."""
    if wanted is None:
        return function

    def run(params: Any, micro: Any) -> Any:
        shapes = jax.eval_shape(function, params, micro)

        def nothing(*_: Any) -> Any:
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

        return jax.lax.cond(wanted(micro), function, nothing, params, micro)

    return run


def accumulate(
    loss_fn: LossFn, params: Any, batch: Any, micro_count: int, wanted: Wanted | None = None
) -> tuple[Any, Metrics]:
    """Float32 gradient and metrics of the sum of the wanted micro-batches' losses."""
    gradient_of = run_where(wanted, jax.grad(loss_fn, has_aux=True))
    if micro_count == 1:
        return gradient_of(params, batch)
    stacked = micro_batches(batch, micro_count)
    shapes = jax.eval_shape(gradient_of, params, jax.tree.map(lambda x: x[0], stacked))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def add(total, micro):
        gradient, metrics = gradient_of(params, micro)
        return (jax.tree.map(jnp.add, total[0], gradient), combine(total[1], metrics)), None

    return jax.lax.scan(add, zeros, stacked)[0]


def update(
    state: TrainState,
    batch: Any,
    *,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    micro_count: int,
    wanted: Wanted | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """New state and metrics; a gradient that is not finite leaves weights and moments alone."""
    gradient, metrics = accumulate(loss_fn, state.params, batch, micro_count, wanted)
    norm = optax.global_norm(gradient)
    finite = jnp.isfinite(norm)
    changes, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    proposed = (optax.apply_updates(state.params, changes), opt_state)
    current = (state.params, state.opt_state)
    params, opt_state = jax.tree.map(partial(jnp.where, finite), proposed, current)
    skipped = (~finite).astype(jnp.int32)
    new_state = TrainState(
        params,
        opt_state,
        state.updates + 1,
        state.skipped + skipped,
        (state.skipped_in_row + 1) * skipped,
    )
    summary = summarise(metrics)
    summary["loss/total"] = sum(metrics.sums.values(), start=jnp.zeros(()))
    summary["update/gradient_norm"] = norm
    summary["update/skipped"] = new_state.skipped
    summary["update/skipped_in_row"] = new_state.skipped_in_row
    return new_state, summary


def make_update(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    micro_count: int,
    shardings: TrainState,
    wanted: Wanted | None = None,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]]:
    """The jitted update; the state passed in is consumed."""
    step = partial(
        update, loss_fn=loss_fn, optimizer=optimizer, micro_count=micro_count, wanted=wanted
    )
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
