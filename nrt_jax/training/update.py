"""One update: sum the gradients of micro-batches, apply AdamW, skip what is not finite."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from nrt_jax.checkpoints.train_state import TrainState
from nrt_jax.compilation import WATCH
from nrt_jax.models.sharding import on_device


class Metrics(NamedTuple):
    """Metrics that add up over micro-batches."""

    sums: dict[str, Any]
    means: dict[str, Any]
    """Pairs of a sum and a count."""
    maxima: dict[str, Any]


LossFn = Callable[[Any, Any], tuple[Float[Array, ""], Metrics]]


def add_metrics(first: Metrics, second: Metrics) -> Metrics:
    """Metrics of two micro-batches together."""
    return Metrics(
        jax.tree.map(jnp.add, first.sums, second.sums),
        jax.tree.map(jnp.add, first.means, second.means),
        jax.tree.map(jnp.maximum, first.maxima, second.maxima),
    )


def summarise(metrics: Metrics) -> dict[str, Array]:
    """One number per name; a mean over nothing is 0."""
    means = {k: total / jnp.maximum(count, 1) for k, (total, count) in metrics.means.items()}
    return metrics.sums | means | metrics.maxima


class Total(NamedTuple):
    """Sums over the micro-batches of an update so far."""

    gradient: Any
    """Of the sum of their losses, in float32."""
    metrics: Metrics


def zero_total(loss_fn: LossFn, params: Any, batch: Any) -> Total:
    """Zeros for gradient and metrics, in the shapes that a micro-batch like `batch` gives."""
    shapes = jax.eval_shape(jax.grad(loss_fn, has_aux=True), params, batch)
    return Total(*jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes))


def add_micro_batch(loss_fn: LossFn, params: Any, total: Total, batch: Any) -> Total:
    """`total` with the gradient and the metrics of one more micro-batch."""
    gradient, metrics = jax.grad(loss_fn, has_aux=True)(params, batch)
    return Total(
        jax.tree.map(jnp.add, total.gradient, gradient), add_metrics(total.metrics, metrics)
    )


def apply_update(
    state: TrainState, total: Total, *, optimizer: optax.GradientTransformation, moments: Any
) -> tuple[TrainState, dict[str, Array]]:
    """New state and metrics; a gradient that is not finite changes neither weights nor moments.

    `moments` are the shardings that the optimizer's state is used in, if it is stored in others.
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
    """Device shardings of an optimizer's state that is stored in host memory; None if it is not."""
    if all(map(on_device, jax.tree.leaves(shardings.opt_state))):
        return None
    return jax.tree.map(lambda s: s.with_memory_kind("device"), shardings.opt_state)


class Update:
    """An update from one or several micro-batches, whose shapes may differ.

    One program per shape adds a micro-batch's gradient to the sum, and another applies the sum.
    Calls return before the devices are done. `on_compiled` is called with each program before it
    runs.
    """

    def __init__(
        self,
        loss_fn: LossFn,
        optimizer: optax.GradientTransformation,
        shardings: TrainState,
        on_compiled: Callable[[str, jax.stages.Compiled], None] | None = None,
    ):
        sums = Total(shardings.params, None)
        apply = partial(apply_update, optimizer=optimizer, moments=_on_devices(shardings))
        self._zero = jax.jit(partial(zero_total, loss_fn), out_shardings=sums)
        self.add = jax.jit(partial(add_micro_batch, loss_fn), donate_argnums=1, out_shardings=sums)
        self.apply = jax.jit(apply, donate_argnums=0, out_shardings=(shardings, None))
        self._norm = jax.jit(optax.tree.norm)
        self._on_compiled = on_compiled
        self._programs: dict[Any, jax.stages.Compiled] = {}

    def __call__(
        self, state: TrainState, batches: Sequence[Any]
    ) -> tuple[TrainState, dict[str, Array]]:
        """The state after an update with the summed gradients of the micro-batches, and metrics.

        The update consumes `state`: its buffers are reused.
        """
        keys = {("a micro-batch", _shapes(batch)) for batch in batches} | {("the update", ())}
        WATCH.to_come = len(keys - self._programs.keys())
        total = self._zero(state.params, batches[0])
        for batch in batches:
            total = self._run(self.add, "a micro-batch", batch, state.params, total, batch)
        return self._run(self.apply, "the update", None, state, total)

    def gradient_norm(self, params: Any, batch: Any) -> Float[Array, ""]:
        """Norm of one micro-batch's gradient, by the program that adds it to an update's sum."""
        zero = self._zero(params, batch)
        return self._norm(self._run(self.add, "a micro-batch", batch, params, zero, batch).gradient)

    def _run(self, function: Any, name: str, batch: Any, *args: Any) -> Any:
        """Run the function's program for these shapes, which the first call compiles."""
        key = (name, _shapes(batch))
        if key not in self._programs:
            WATCH.to_come -= 1
            self._programs[key] = function.lower(*args).compile()
            if self._on_compiled is not None:
                self._on_compiled(f"{name}, program {len(self._programs)}", self._programs[key])
        return self._programs[key](*args)


def _shapes(batch: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(np.shape(leaf) for leaf in jax.tree.leaves(batch))
