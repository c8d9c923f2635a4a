"""The public way in: a checkpoint on disk becomes a decoder to call.

decoder = load_pretrained("path/to/Llama-3.2-3B")
logits_BTV = decoder(tokens_BT)
"""

import os
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from nrt_jax.checkpoints.hf_config import StoredDtype, read_architecture
from nrt_jax.checkpoints.import_format import read_params
from nrt_jax.config.mesh import MESH_AXES, MeshConfig
from nrt_jax.errors import InputError
from nrt_jax.models.decoder import Decoder, abstract_decoder
from nrt_jax.models.sharding import abstract_params, make_mesh


def load_pretrained(
    path: str | os.PathLike, *, mesh: Mesh | None = None, dtype: DTypeLike | None = None
) -> Decoder:
    """The decoder of a Hugging Face or an imported directory, its weights read and laid out.

    `decoder(tokens_BT, positions=None, segment_ids=None)` gives float32 `logits_BTV`. Weights and
    computation have `dtype`, float32 by default. `mesh` is one of
    `nrt_jax.models.sharding.make_mesh`; without one everything is on the first device. Raises
    InputError for a directory that cannot be read or asks for what the decoder does not do.
    """
    path = Path(path)
    mesh = mesh if mesh is not None else _first_device()
    if mesh.axis_names != MESH_AXES:
        raise InputError(f"mesh: axes {mesh.axis_names}; they must be {MESH_AXES}")
    dtype = jnp.dtype(_dtype(dtype))
    decoder = abstract_decoder(
        read_architecture(path), dtype=dtype, vocab_multiple=mesh.shape["tensor"]
    )
    definition, _ = nnx.split(decoder)
    return nnx.merge(definition, read_params(path, abstract_params(mesh, decoder, dtype)))


def _dtype(dtype: DTypeLike | None) -> DTypeLike:
    allowed = {jnp.dtype(name): name for name in get_args(StoredDtype)}
    try:
        if dtype is None or jnp.dtype(dtype) in allowed:
            return jnp.float32 if dtype is None else dtype
    except TypeError:
        pass
    raise InputError(f"dtype {dtype}: must be one of {', '.join(allowed.values())}")


def _first_device() -> Mesh:
    return make_mesh(MeshConfig(data=1), jax.local_devices()[:1])
