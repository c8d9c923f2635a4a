"""One update: sum the gradients of micro-batches, apply AdamW, skip what is not finite."""

from collections.abc import Callable, Sequence
from functools import partial, wraps
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
    """Metrics that add up over micro-batches, and values of one micro-batch."""

    sums: dict[str, Any]
    means: dict[str, Any]
    """Pairs of a sum and a count."""
    maxima: dict[str, Any]
    of_traces: Any = None
    """Values of single traces, which no other micro-batch has; None where there are no traces."""


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
    """Without values of single traces."""


def zero_total(loss_fn: LossFn, params: Any, batch: Any) -> Total:
    """Zeros for gradient and metrics, in the shapes that a micro-batch like `batch` gives."""
    gradient, metrics = jax.eval_shape(jax.grad(loss_fn, has_aux=True), params, batch)
    shapes = Total(gradient, metrics._replace(of_traces=None))
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def add_micro_batch(loss_fn: LossFn, params: Any, total: Total, batch: Any) -> tuple[Total, Any]:
    """`total` with one more micro-batch's gradient and metrics, and the values of its traces."""
    with jax.named_scope("forward"):
        loss, pull_back, metrics = jax.vjp(lambda p: loss_fn(p, batch), params, has_aux=True)
    with jax.named_scope("backward"):
        (gradient,) = pull_back(jnp.ones_like(loss))
    total = Total(
        jax.tree.map(jnp.add, total.gradient, gradient), add_metrics(total.metrics, metrics)
    )
    return total, metrics.of_traces


@jax.named_scope("update")
def apply_update(
    state: TrainState,
    gradient: Any,
    rates: Any = None,
    *,
    optimizer: optax.GradientTransformation,
    moments: Any,
) -> tuple[TrainState, dict[str, Array]]:
    """New state and metrics; a gradient that is not finite changes neither weights nor moments.

    `rates` is an argument of the optimizer, unless it is None. `moments` are the shardings that the
    optimizer's state is used in, if it is stored in others.
    """
    norm = optax.tree.norm(gradient)
    finite = jnp.isfinite(norm)
    kept = state.opt_state if moments is None else jax.device_put(state.opt_state, moments)
    more = {} if rates is None else {"rates": rates}
    changes, opt_state = optimizer.update(gradient, kept, state.params, **more)
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
    return new_state, {
        "update/gradient_norm": norm,
        "update/skipped": new_state.skipped,
        "update/skipped_in_row": new_state.skipped_in_row,
    }


@jax.jit
def _summary(metrics: Metrics) -> dict[str, Array]:
    total = sum(metrics.sums.values(), start=jnp.zeros(()))
    return summarise(metrics) | {"loss/total": total}


class UpdateRule:
    """What applies a summed gradient: one program for all updates of a run, whatever their loss."""

    def __init__(self, optimizer: optax.GradientTransformation, shardings: TrainState):
        apply = wraps(apply_update)(
            partial(apply_update, optimizer=optimizer, moments=_on_devices(shardings))
        )
        self.shardings = shardings
        self.apply = jax.jit(apply, donate_argnums=0, out_shardings=(shardings, None))
        self.programs: dict[Any, jax.stages.Compiled] = {}


def _on_devices(shardings: TrainState) -> Any | None:
    """Device shardings of an optimizer's state that is stored in host memory; None if it is not."""
    if all(map(on_device, jax.tree.leaves(shardings.opt_state))):
        return None
    return jax.tree.map(lambda s: s.with_memory_kind("device"), shardings.opt_state)


class Update:
    """An update from one or several micro-batches, whose shapes may differ.

    One program per shape adds a micro-batch's gradient to the sum, and that of the rule applies the
    sum. Calls return before the devices are done. `on_compiled` is called with each program before
    it runs. `rates` are the optimizer's, where its rates are an argument.
    """

    def __init__(
        self,
        loss_fn: LossFn,
        rule: UpdateRule,
        on_compiled: Callable[[str, jax.stages.Compiled], None] | None = None,
        *,
        rates: Any = None,
    ):
        self._loss_fn, self._rule, self._rates = loss_fn, rule, rates
        self._sums = Total(rule.shardings.params, None)
        add = wraps(add_micro_batch)(partial(add_micro_batch, loss_fn))
        self.add = jax.jit(add, donate_argnums=1, out_shardings=(self._sums, None))
        self._norm = jax.jit(optax.tree.norm)
        self._zeros: Callable[[], Total] | None = None
        self._on_compiled = on_compiled
        self._programs: dict[Any, jax.stages.Compiled] = {}

    def __call__(
        self, state: TrainState, batches: Sequence[Any]
    ) -> tuple[TrainState, dict[str, Array]]:
        """The state after an update with the summed gradients of the micro-batches, and metrics.

        The update consumes `state`: its buffers are reused.
        """
        state, metrics, _ = self.with_traces(state, batches)
        return state, metrics

    def with_traces(
        self, state: TrainState, batches: Sequence[Any]
    ) -> tuple[TrainState, dict[str, Array], list[Any]]:
        """The same, and the values of single traces, micro-batch by micro-batch."""
        keys = {("a micro-batch", _shapes(batch)) for batch in batches}
        WATCH.to_come = len(keys - self._programs.keys()) + (not self._rule.programs)
        total = self._zero(state.params, batches[0])
        of_traces = []
        for batch in batches:
            total, of_batch = self._add(state.params, total, batch)
            of_traces.append(of_batch)
        rule, args = self._rule, (state, total.gradient, self._rates)
        state, metrics = self._run(rule.programs, rule.apply, ("the update", ()), *args)
        return state, _summary(total.metrics) | metrics, of_traces

    def gradient_norm(self, params: Any, batch: Any) -> Float[Array, ""]:
        """Norm of one micro-batch's gradient, by the program that adds it to an update's sum."""
        total, _ = self._add(params, self._zero(params, batch), batch)
        return self._norm(total.gradient)

    def _zero(self, params: Any, batch: Any) -> Total:
        """Sums over no micro-batch, whose shapes do not depend on those of the batch."""
        if self._zeros is None:
            shapes = jax.eval_shape(partial(zero_total, self._loss_fn), params, batch)
            zeros = partial(jax.tree.map, lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            self._zeros = jax.jit(zeros, out_shardings=self._sums)
        return self._zeros()

    def _add(self, params: Any, total: Total, batch: Any) -> tuple[Total, Any]:
        key = ("a micro-batch", _shapes(batch))
        return self._run(self._programs, self.add, key, params, total, batch)

    def _run(self, programs: dict, function: Any, key: tuple[str, Any], *args: Any) -> Any:
        """Run the function's program for this name and shapes, which the first call compiles."""
        if key not in programs:
            WATCH.to_come -= 1
            programs[key] = function.lower(*args).compile()
            if self._on_compiled is not None:
                number = len(self._programs) + len(self._rule.programs)
                self._on_compiled(f"{key[0]}, program {number}", programs[key])
        return programs[key](*args)


def _shapes(batch: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(np.shape(leaf) for leaf in jax.tree.leaves(batch))
