"""What a training step carries from one update to the next, and how it is first made."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int

from nrt_jax.models import huggingface
from nrt_jax.models.config import ModelConfig
from nrt_jax.models.decoder import Decoder
from nrt_jax.models.sharding import param_shardings, replicated
from nrt_jax.models.variants import Architecture


@dataclass(frozen=True)
class Model:
    """A decoder's definition, and where its weights live."""

    definition: nnx.GraphDef
    architecture: Architecture
    mesh: Mesh


class TrainState(NamedTuple):
    """Everything that an update changes."""

    params: Any
    opt_state: Any
    updates: Int[Array, ""]
    """Updates asked for, skipped ones included."""
    skipped: Int[Array, ""]
    """Updates skipped because a gradient was not finite."""
    skipped_in_row: Int[Array, ""]


def read_architecture(config: ModelConfig) -> Architecture:
    """The architecture of the checkpoint, or the one given in the config."""
    if config.path is not None:
        return huggingface.read_architecture(config.path)
    assert config.architecture is not None
    return config.architecture


def abstract_decoder(config: ModelConfig, architecture: Architecture) -> Decoder:
    """The decoder with shapes in place of weights."""

    def make() -> Decoder:
        return Decoder(architecture, nnx.Rngs(0), dtype=config.jax_dtype, remat=config.remat)

    return nnx.eval_shape(make)


def init_params(
    config: ModelConfig, architecture: Architecture, mesh: Mesh, seed: int
) -> dict[str, Any]:
    """Float32 weights on the mesh: read from the checkpoint, or drawn from the seed."""
    shardings = param_shardings(mesh, nnx.split(abstract_decoder(config, architecture))[1])
    if config.path is not None:
        return jax.device_put(huggingface.read_weights(config.path, architecture), shardings)

    def draw() -> dict[str, Any]:
        rngs = nnx.Rngs(jax.random.key(seed))
        return nnx.to_pure_dict(nnx.split(Decoder(architecture, rngs))[1])

    return jax.jit(draw, out_shardings=shardings)()


def state_shardings(optimizer: optax.GradientTransformation, params: Any, mesh: Mesh) -> TrainState:
    """Moments are laid out like the weights they belong to; counters are on every device."""
    everywhere = replicated(mesh)
    shardings = jax.tree.map(lambda weight: weight.sharding, params)
    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
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
