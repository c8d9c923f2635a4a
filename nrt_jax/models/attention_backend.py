"""The attention of training: XLA's own, or the fused kernels of the platform."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from nrt_jax.config.architecture import Architecture
from nrt_jax.config.model import AttentionChoice
from nrt_jax.errors import InputError
from nrt_jax.models.attention import KVPrefix, attend, own_mask, prefix_mask
from nrt_jax.models.cudnn_attention import cudnn_attend
from nrt_jax.models.rows import TokenRows
from nrt_jax.models.sharding import constrain
from nrt_jax.models.splash_attention import splash_attend

Backend = Literal["xla", "splash", "cudnn"]
RowAttention = Callable[..., Float[Array, "B T H G d"]]
"""From q [B, T, H, G, d], k and v [B, T, H, d], and the prefix's k and v of one layer, or None, to
the output."""

FUSED: dict[str, Backend] = {"tpu": "splash", "gpu": "cudnn"}
SPLASH_HEAD = 64
CUDNN_HEAD = 8
CUDNN_LARGEST_HEAD = 128


def choose_backend(
    asked: AttentionChoice,
    platform: str,
    architecture: Architecture,
    dtype: DTypeLike,
    longest: int,
) -> Backend:
    """The platform's backend for contexts of up to `longest` tokens, or XLA's where it cannot run.

    Raises InputError when the backend was named and cannot run.
    """
    named: Backend | None = None if asked == "auto" else asked
    backend: Backend = named or FUSED.get(platform, "xla")
    reason = _why_not(backend, platform, architecture, jnp.dtype(dtype), longest)
    if reason is not None and named is not None:
        raise InputError(f"model.attention: {named}: {reason}; set it to xla or auto")
    return "xla" if reason is not None else backend


def _why_not(
    backend: Backend, platform: str, architecture: Architecture, dtype: jnp.dtype, longest: int
) -> str | None:
    """Why the backend cannot run this model here; None when it can."""
    d, window = architecture.head_dim, architecture.sliding_window
    if backend == "xla":
        return None
    if FUSED.get(platform) != backend:
        return f"it does not run on a {platform}"
    if backend == "splash":
        if d % SPLASH_HEAD:
            return f"head_dim {d} is no multiple of {SPLASH_HEAD}"
        # Its masks compare places in a row, not positions, so a window cannot reach the prefix.
        if window is not None and longest > window:
            return f"a sliding_window of {window} tokens hides some of up to {longest} before"
        return None
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 and float16, not model.dtype {dtype}"
    if d % CUDNN_HEAD or d > CUDNN_LARGEST_HEAD:
        return f"head_dim {d} is no multiple of {CUDNN_HEAD} up to {CUDNN_LARGEST_HEAD}"
    return None


def row_attention(
    backend: Backend,
    mesh: Mesh | None,
    window: int | None,
    rows: TokenRows,
    before: tuple[Int[Array, "P S"], Int[Array, "P S"]] | None,
) -> RowAttention:
    """Attention for the layers to call in turn; the masks are made once for all layers.

    `before` are the positions and the segments of the prefix that the rows continue.
    """
    continued_BT = None if before is None else rows.continued_BT

    def prefix_of(kv: tuple[Array, Array] | None) -> KVPrefix | None:
        return None if kv is None or before is None else KVPrefix(*kv, *before)

    if backend == "splash":

        def splash(q_BTHGd, k_BTHd, v_BTHd, kv):
            here = prefix_of(kv)
            return splash_attend(
                q_BTHGd, k_BTHd, v_BTHd, rows.segment_ids_BT, here, continued_BT, mesh=mesh
            )

        return splash
    mask_BTT = own_mask(rows.positions_BT, rows.segment_ids_BT, window)
    mask_P_queries_S = None
    if before is not None:
        assert continued_BT is not None
        mask_P_queries_S = prefix_mask(rows.positions_BT, continued_BT, *before, window)
    # Recomputing the scores of all pairs is cheaper than keeping them for every layer.
    attend_anew = jax.checkpoint(attend)
    fused = partial(cudnn_attend, mesh=mesh) if backend == "cudnn" else attend_anew

    def with_masks(q_BTHGd, k_BTHd, v_BTHd, kv):
        whole = ("batch", None, "kv_heads", None)
        k_BTHd, v_BTHd = (constrain(x, mesh, whole) for x in (k_BTHd, v_BTHd))
        if kv is not None:
            kv = tuple(constrain(x, mesh, whole) for x in kv)
        return fused(q_BTHGd, k_BTHd, v_BTHd, mask_BTT, prefix_of(kv), mask_P_queries_S)

    return with_masks
