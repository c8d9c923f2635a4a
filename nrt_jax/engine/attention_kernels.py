"""The attention of decoding: XLA's own, or the Pallas kernel of the platform."""

from importlib.util import find_spec

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from nrt_jax.config.architecture import Architecture
from nrt_jax.config.rollout import AttentionKernel
from nrt_jax.engine.kv_cache import KVCache
from nrt_jax.engine.paged_kv_cache import PagedCache
from nrt_jax.engine.triton_kv_cache import TritonCache
from nrt_jax.errors import InputError

TPU_LANES = 128
GPU_SMALLEST_HEAD = 16
GPU_BACKEND = "jax.experimental.pallas.triton"
"""Deprecated in jax 0.11."""


def kv_cache(
    attention: AttentionKernel,
    platform: str,
    mesh: Mesh,
    architecture: Architecture,
    dtype: DTypeLike,
) -> KVCache | PagedCache:
    """The cache for a platform; auto falls back to XLA's where the kernel does not apply.

    Raises InputError when `attention` is pallas and no kernel supports the platform, the model's
    heads or the cache's dtype.
    """
    reason = _why_not(platform, mesh.shape["tensor"], architecture, jnp.dtype(dtype))
    if attention == "pallas" and reason is not None:
        raise InputError(f"rollout.attention: pallas: {reason}; set it to xla or auto")
    if attention == "xla" or reason is not None:
        return KVCache(mesh, architecture.sliding_window)
    form = PagedCache if platform == "tpu" else TritonCache
    return form(mesh, architecture.sliding_window)


def kernel_applies(
    platform: str, tensor: int, architecture: Architecture, dtype: DTypeLike
) -> bool:
    """Whether a platform has a kernel for this model, its heads over `tensor` devices."""
    return _why_not(platform, tensor, architecture, jnp.dtype(dtype)) is None


def _why_not(
    platform: str, tensor: int, architecture: Architecture, dtype: jnp.dtype
) -> str | None:
    """Why the platform's kernel does not apply; None when it does."""
    if platform not in ("tpu", "gpu"):
        return f"there is no kernel for the {platform}"
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"the kernels take float32 and bfloat16, not rollout.cache_dtype {dtype}"
    d = architecture.head_dim
    if platform == "gpu":
        if find_spec(GPU_BACKEND) is None:
            return f"this jax has no {GPU_BACKEND}"
        fits = d >= GPU_SMALLEST_HEAD and d & (d - 1) == 0
        return None if fits else f"head_dim {d} is no power of two of {GPU_SMALLEST_HEAD} or more"
    if d % TPU_LANES:
        return f"head_dim {d} is no multiple of {TPU_LANES}"
    heads = architecture.num_key_value_heads // tensor
    # A page's keys and values of one token fill 32-bit rows, of which a tile has 1, 2, 4 or 8.
    rows, rest = divmod(2 * heads * dtype.itemsize, 4)
    if rest or not (rows in (1, 2, 4) or rows % 8 == 0):
        return f"{heads} key/value heads a device do not fill the tiles of its memory"
    return None
