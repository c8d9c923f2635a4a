"""The state that one update hands to the next: weights, moments and counters."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from nrt_jax.models.sharding import replicated


class TrainState(NamedTuple):
    """Everything that an update changes."""

    params: Any
    opt_state: Any
    updates: Int[Array, ""]
    """Updates so far, skipped ones included."""
    skipped: Int[Array, ""]
    """Updates skipped because a gradient was not finite."""
    skipped_in_row: Int[Array, ""]


def state_shardings(
    optimizer: optax.GradientTransformation, params: Any, mesh: Mesh, *, offload: bool = False
) -> TrainState:
    """Shard moments like their weights, and replicate counters; `offload` keeps the moments in host
    memory."""
    everywhere = replicated(mesh)
    shardings = jax.tree.map(lambda weight: weight.sharding, params)
    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding.with_memory_kind("pinned_host") if offload else sharding,
        jax.eval_shape(optimizer.init, params),
        shardings,
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(
        params=shardings,
        opt_state=opt_state,
        updates=everywhere,
        skipped=everywhere,
        skipped_in_row=everywhere,
    )


def init_state(
    optimizer: optax.GradientTransformation, params: Any, shardings: TrainState
) -> TrainState:
    """State before the first update."""

    def zero(sharding: Any) -> Int[Array, ""]:
        return jax.device_put(np.zeros((), np.int32), sharding)

    return TrainState(
        params=params,
        opt_state=jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params),
        updates=zero(shardings.updates),
        skipped=zero(shardings.skipped),
        skipped_in_row=zero(shardings.skipped_in_row),
    )


def abstract_state(
    optimizer: optax.GradientTransformation, params: Any, shardings: TrainState
) -> TrainState:
    """Shapes, dtypes and shardings of a state with weights like `params` (abstract or not)."""
    count = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(
        params=params,
        opt_state=jax.eval_shape(optimizer.init, params),
        updates=count,
        skipped=count,
        skipped_in_row=count,
    )
    return jax.tree.map(lambda leaf, s: leaf.update(sharding=s), state, shardings)
