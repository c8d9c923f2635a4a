"""A Pallas kernel for GPUs: attention from one query per slot to the filled part of its keys.

A program of the kernel has one slot, one key/value head and one split of the tokens. It walks over
the blocks of its split that the slot sees, with the online softmax of FlashAttention-2
(arXiv 2307.08691); the splits are merged outside, as in Flash-Decoding. Blocks past a slot's length
are not read.

Pallas lowers it through Triton, which runs on every NVIDIA GPU since Ampere. jax 0.11 deprecates
that backend, without a date, for Mosaic GPU, whose interface differs between the supported versions
of jax. Where a jax has no Triton, `attention_kernels` takes XLA's attention.
Letters: B slots, H key/value heads, R query rows, d head dim, T tokens of a slot's cache, N tokens
of a block, J splits.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

SMALLEST_TILE = 16
"""Rows and columns that a product of the tensor cores has at least."""
MOST_BLOCK_TOKENS = 128
MOST_SPLITS = 16
"""Splits of one slot's tokens that are computed in parallel."""

_LOWEST = float(jnp.finfo(jnp.float32).min) / 2


def attend_to_filled(
    q_BHGd: Float[Array, "B H G d"],
    k_BHTd: Float[Array, "B H T d"],
    v_BHTd: Float[Array, "B H T d"],
    start_B: Int[Array, "B"],
    end_B: Int[Array, "B"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B H G d"], Float[Array, "B H G"], Float[Array, "B H G"]]:
    """exp(q k / sqrt(d) - highest) v over the tokens start to end - 1, the weights' sum, highest.

    All three are float32. The head dim is a power of two, 16 or more; T is a multiple of 16.
    """
    # Not every jax has this backend.
    from jax.experimental.pallas import triton

    (B, H, G, d), T = q_BHGd.shape, k_BHTd.shape[2]
    R = max(SMALLEST_TILE, 1 << (G - 1).bit_length())
    # The largest power of two that divides T.
    block = min(MOST_BLOCK_TOKENS, T & -T)
    assert block >= SMALLEST_TILE, f"{T} tokens do not split into blocks"
    splits = min(MOST_SPLITS, T // block)
    q_BHRd = jnp.pad(q_BHGd, ((0, 0), (0, 0), (0, R - G), (0, 0)))
    row = lambda b, h, j: (b, h, 0, 0)  # noqa: E731
    slot = pl.BlockSpec((None,), lambda b, h, j: (b,))
    keys = pl.BlockSpec((None, None, T, d), row)
    per_row = pl.BlockSpec((None, None, None, R), lambda b, h, j: (j, b, h, 0))
    out, total, highest = pl.pallas_call(
        partial(_kernel, scale=d**-0.5, block=block, splits=splits),
        grid=(B, H, splits),
        in_specs=[slot, slot, pl.BlockSpec((None, None, R, d), row), keys, keys],
        out_specs=[
            pl.BlockSpec((None, None, None, R, d), lambda b, h, j: (j, b, h, 0, 0)),
            per_row,
            per_row,
        ],
        out_shape=[
            jax.ShapeDtypeStruct(shape, jnp.float32)
            for shape in ((splits, B, H, R, d), (splits, B, H, R), (splits, B, H, R))
        ],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="attend_to_filled",
    )(start_B, end_B, q_BHRd, k_BHTd, v_BHTd)
    out_BHRd, sum_BHR, highest_BHR = _merge_splits(out, total, highest)
    return out_BHRd[:, :, :G], sum_BHR[:, :, :G], highest_BHR[:, :, :G]


def _kernel(
    start_ref: Any,
    end_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    out_ref: Any,
    sum_ref: Any,
    highest_ref: Any,
    *,
    scale: float,
    block: int,
    splits: int,
) -> None:
    """One split of one slot and head: q_ref [R, d], k_ref and v_ref [T, d]."""
    blocks = -(-(k_ref.shape[0] // block) // splits)
    first = pl.program_id(2) * blocks
    start, end = start_ref[...], end_ref[...]
    q_Rd = q_ref[...]
    # Float32 caches get float32 products, not those of the tensor cores' TF32.
    precision = jax.lax.Precision.HIGHEST if q_Rd.dtype == jnp.float32 else None
    product = partial(jax.lax.dot_general, precision=precision, preferred_element_type=jnp.float32)

    def add_block(i: Any, carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        out_Rd, sum_R, highest_R = carry
        tokens = pl.ds(i * block, block)
        scores_RN = product(q_Rd, k_ref[tokens, :], (((1,), (1,)), ((), ()))) * scale
        token_N = i * block + jnp.arange(block)
        seen_1N = ((token_N >= start) & (token_N < end))[None, :]
        scores_RN = jnp.where(seen_1N, scores_RN, _LOWEST)
        new_R = jnp.maximum(highest_R, jnp.max(scores_RN, axis=1))
        weights_RN = jnp.where(seen_1N, jnp.exp(scores_RN - new_R[:, None]), 0.0)
        shrink_R = jnp.exp(highest_R - new_R)
        v_Nd = v_ref[tokens, :]
        more_Rd = product(weights_RN.astype(v_Nd.dtype), v_Nd, (((1,), (0,)), ((), ())))
        out_Rd = out_Rd * shrink_R[:, None] + more_Rd
        return out_Rd, sum_R * shrink_R + jnp.sum(weights_RN, axis=1), new_R

    nothing = jnp.zeros(q_Rd.shape, jnp.float32), jnp.zeros(len(q_Rd)), jnp.full(len(q_Rd), _LOWEST)
    seen_blocks = (
        jnp.maximum(first, start // block),
        jnp.minimum(first + blocks, pl.cdiv(end, block)),
    )
    out_ref[...], sum_ref[...], highest_ref[...] = jax.lax.fori_loop(
        *seen_blocks, add_block, nothing
    )


def _merge_splits(
    out_JBHRd: Array, sum_JBHR: Array, highest_JBHR: Array
) -> tuple[Array, Array, Array]:
    highest_BHR = jnp.max(highest_JBHR, axis=0)
    share_JBHR = jnp.exp(highest_JBHR - highest_BHR[None])
    out_BHRd = jnp.sum(out_JBHRd * share_JBHR[..., None], axis=0)
    return out_BHRd, jnp.sum(sum_JBHR * share_JBHR, axis=0), highest_BHR
