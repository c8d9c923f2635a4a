"""Small decoders with large random weights, so that a wrong computation shows."""

import math
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from nrt_jax.checkpoints.hf_weights import read_weights
from nrt_jax.config.architecture import Architecture, Llama3Scaling
from nrt_jax.config.mesh import MESH_AXES, MeshConfig
from nrt_jax.models.decoder import Decoder, abstract_decoder
from nrt_jax.models.sharding import abstract_params, make_mesh

SCALING = Llama3Scaling(factor=8.0, original_max_position_embeddings=16)
LLAMA = {"rope_theta": 500000.0, "rope_scaling": SCALING}
WINDOW = {"family": "mistral", "sliding_window": 5, "rope_theta": 1e4}


def architecture(**changes: Any) -> Architecture:
    sizes = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "initializer_range": 0.15,
    }
    return Architecture.model_validate(sizes | changes)


@cache
def decoder(a: Architecture, **options: Any) -> Decoder:
    """A decoder with drawn weights, norms included; shared by all tests, so not to be changed."""
    model = Decoder(a, nnx.Rngs(0), **options)
    norms = [model.final_norm, model.layers.attention_norm, model.layers.mlp_norm]
    for n, norm in enumerate(norms):
        noise = jax.random.normal(jax.random.key(n), norm.scale[...].shape)
        norm.scale[...] = 1 + 0.3 * noise
    return model


def mesh(**sizes: int) -> Mesh:
    """A mesh of as many devices as the sizes multiply to; one device without any."""
    shape = {axis: sizes.get(axis, 1) for axis in MESH_AXES}
    devices = jax.devices()[: math.prod(shape.values())]
    return make_mesh(MeshConfig(**shape), devices)


def read(
    directory: Path, a: Architecture, on: Mesh | None = None, vocab_multiple: int = 1
) -> dict[str, Any]:
    """The params of a Hugging Face directory in float32, on one device unless a mesh is given."""
    decoder = abstract_decoder(a, vocab_multiple=vocab_multiple)
    return read_weights(directory, a, abstract_params(on or mesh(), decoder))


def tokens(shape: tuple[int, ...], vocab_size: int = 61, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, vocab_size, shape), jnp.int32)


def close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Every leaf agrees to `tolerance` times the largest value of that leaf."""
    for (path, a), e in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        error, scale = np.abs(a - e).max(), np.abs(e).max()
        assert error <= tolerance * scale, f"{jax.tree_util.keystr(path)}: {error} of {scale}"
