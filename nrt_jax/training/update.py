"""One update: gradients of micro-batches added up, AdamW, and a skip where they are not finite."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from nrt_jax.checkpoints.train_state import TrainState
from nrt_jax.models.sharding import on_device


class Metrics(NamedTuple):
    """Measurements that add up over micro-batches."""

    sums: dict[str, Any]
    means: dict[str, Any]
    """Pairs (sum, count)."""
    maxima: dict[str, Any]


LossFn = Callable[[Any, Any], tuple[Float[Array, ""], Metrics]]


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


class Total(NamedTuple):
    """Sums over the micro-batches of an update so far."""

    gradient: Any
    """Float32, of the sum of their losses."""
    metrics: Metrics


def nothing(loss_fn: LossFn, params: Any, batch: Any) -> Total:
    """The sums over no micro-batch; `batch` says what metrics there are."""
    shapes = jax.eval_shape(jax.grad(loss_fn, has_aux=True), params, batch)
    return Total(*jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes))


def add_micro_batch(loss_fn: LossFn, params: Any, total: Total, batch: Any) -> Total:
    """`total` with the gradient and the metrics of one more micro-batch."""
    gradient, metrics = jax.grad(loss_fn, has_aux=True)(params, batch)
    return Total(jax.tree.map(jnp.add, total.gradient, gradient), combine(total.metrics, metrics))


def apply_update(
    state: TrainState, total: Total, *, optimizer: optax.GradientTransformation, moments: Any
) -> tuple[TrainState, dict[str, Array]]:
    """New state and metrics; a gradient that is not finite leaves weights and moments alone.

    `moments` is where the optimizer's state is computed with, if it is kept elsewhere.
    """
    norm = optax.tree.norm(total.gradient)
    finite = jnp.isfinite(norm)
    kept = state.opt_state if moments is None else jax.device_put(state.opt_state, moments)
    changes, opt_state = optimizer.update(total.gradient, kept, state.params)
    proposed = (optax.apply_updates(state.params, changes), opt_state)
    current = (state.params, kept)
    params, opt_state = jax.tree.map(partial(jnp.where, finite), proposed, current)
    skipped = (~finite).astype(jnp.int32)
    new_state = TrainState(
        params,
        opt_state,
        state.updates + 1,
        state.skipped + skipped,
        (state.skipped_in_row + 1) * skipped,
    )
    summary = summarise(total.metrics)
    summary["loss/total"] = sum(total.metrics.sums.values(), start=jnp.zeros(()))
    summary["update/gradient_norm"] = norm
    summary["update/skipped"] = new_state.skipped
    summary["update/skipped_in_row"] = new_state.skipped_in_row
    return new_state, summary


def _on_devices(shardings: TrainState) -> Any | None:
    """Shardings of an optimizer's state that is kept in the hosts' memory, on the devices."""
    if all(map(on_device, jax.tree.leaves(shardings.opt_state))):
        return None
    return jax.tree.map(lambda s: s.with_memory_kind("device"), shardings.opt_state)


class Update:
    """An update over micro-batches, whose sizes may differ.

    A program a size adds a gradient to those before, and one more applies their sum. Calls return
    before the devices are done. `compiled` is told of each program before it runs.
    """

    def __init__(
        self,
        loss_fn: LossFn,
        optimizer: optax.GradientTransformation,
        shardings: TrainState,
        compiled: Callable[[str, jax.stages.Compiled], None] | None = None,
    ):
        sums = Total(shardings.params, None)
        apply = partial(apply_update, optimizer=optimizer, moments=_on_devices(shardings))
        self._nothing = jax.jit(partial(nothing, loss_fn), out_shardings=sums)
        self.add = jax.jit(partial(add_micro_batch, loss_fn), donate_argnums=1, out_shardings=sums)
        self.apply = jax.jit(apply, donate_argnums=0, out_shardings=(shardings, None))
        self._compiled = compiled
        self._programs: dict[Any, jax.stages.Compiled] = {}

    def __call__(
        self, state: TrainState, batches: Sequence[Any]
    ) -> tuple[TrainState, dict[str, Array]]:
        """The state after an update with the sum of the micro-batches' gradients, and metrics; the
        state passed in is consumed."""
        total = self._nothing(state.params, batches[0])
        for batch in batches:
            total = self._run(self.add, "a micro-batch", batch, state.params, total, batch)
        return self._run(self.apply, "the update", None, state, total)

    def _run(self, function: Any, name: str, batch: Any, *args: Any) -> Any:
        """The function's program for batches of these shapes, compiled where there is none yet."""
        shapes = tuple(np.shape(leaf) for leaf in jax.tree.leaves(batch))
        key = (name, shapes)
        if key not in self._programs:
            self._programs[key] = function.lower(*args).compile()
            if self._compiled is not None:
                self._compiled(f"{name}, program {len(self._programs)}", self._programs[key])
        return self._programs[key](*args)
