"""What a training step carries from one update to the next, and how it is first made."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from nrt_jax.models.sharding import replicated


class TrainState(NamedTuple):
    """Everything that an update changes."""

    params: Any
    opt_state: Any
    updates: Int[Array, ""]
    """Updates asked for, skipped ones included."""
    skipped: Int[Array, ""]
    """Updates skipped because a gradient was not finite."""
    skipped_in_row: Int[Array, ""]


def state_shardings(
    optimizer: optax.GradientTransformation, params: Any, mesh: Mesh, *, offload: bool = False
) -> TrainState:
    """Moments are laid out like the weights they belong to, with `offload` in the memory of the
    hosts; counters are on every device."""
    everywhere = replicated(mesh)
    shardings = jax.tree.map(lambda weight: weight.sharding, params)
    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding.with_memory_kind("pinned_host") if offload else sharding,
        jax.eval_shape(optimizer.init, params),
        shardings,
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(shardings, opt_state, everywhere, everywhere, everywhere)


def init_state(
    optimizer: optax.GradientTransformation, params: Any, shardings: TrainState
) -> TrainState:
    """State before the first update."""
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    zeros = [jax.device_put(jnp.zeros((), jnp.int32), s) for s in shardings[2:]]
    return TrainState(params, opt_state, *zeros)


def abstract_state(
    optimizer: optax.GradientTransformation, params: Any, shardings: TrainState
) -> TrainState:
    """Shapes, dtypes and shardings of a state whose weights are like `params` (abstract or not)."""
    count = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(params, jax.eval_shape(optimizer.init, params), count, count, count)
    return jax.tree.map(lambda leaf, s: leaf.update(sharding=s), state, shardings)
