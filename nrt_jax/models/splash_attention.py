"""Attention of training rows by the splash kernels of TPUs: no array of T x S scores anywhere.

A row's tokens see the row (causal) and its unit's prefix. Each of the two is one kernel, and the
softmax over both together is merged from theirs: with o_i the output over keys i and l_i the log of
the sum of their exp(scores),

    l = logaddexp(l_1, l_2),    o = sum_i exp(l_i - l) o_i

Backward, a kernel recomputes p = exp(scores - l) and ds = p * (do v - sum(o do)), which hold for
its own keys alone when l and o are those of all keys.

Letters: P units, B = P * R rows, T tokens of a row, Q = R * T, S prefix tokens, N = H * G query
heads, H key/value heads, d head dim; inside shard_map all are a device's own.
"""

from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as library
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from nrt_jax.models.attention import KVPrefix
from nrt_jax.models.sharding import partition_spec

LANES = 128
LARGEST_BLOCK = 512

# The public call gives no backward pass for a part of the keys: its output is that part's, and it
# refuses to differentiate the log-sum-exp. This function takes both from outside.
_backward_of_part = library._splash_attention_bwd


class _Part(NamedTuple):
    """Keys that all queries of a row or of a unit share, and who may see them."""

    k_BHSd: Float[Array, "B H S d"]
    v_BHSd: Float[Array, "B H S d"]
    query_segments_BT: Int[Array, "B T"]
    key_segments_BS: Int[Array, "B S"]


def splash_attend(
    q_BTHGd: Float[Array, "B T H G d"],
    k_BTHd: Float[Array, "B T H d"],
    v_BTHd: Float[Array, "B T H d"],
    segment_ids_BT: Int[Array, "B T"],
    prefix: KVPrefix | None = None,
    prefix_segment_ids_BT: Int[Array, "B T"] | None = None,
    *,
    mesh: Mesh | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H G d"]:
    """`attention.attend` without a window: softmax(q k / sqrt(d)) v over [prefix ; own tokens].

    On a mesh every device has the queries of its own tokens and the keys of the whole row; rows and
    tokens must divide over it. What a query of padding (segment 0) gets means nothing, and is
    finite. `interpret` runs the kernels on any platform, slowly.
    """
    _, T, H, G, d = q_BTHGd.shape
    shards = 1 if mesh is None else mesh.shape["context"]
    q_BTHGd = (q_BTHGd.astype(jnp.float32) * d**-0.5).astype(q_BTHGd.dtype)
    q_BTHGd, segments_BT = (_pad(x, LANES * shards) for x in (q_BTHGd, segment_ids_BT))
    keys = [(*(_pad(x, LANES * shards) for x in (k_BTHd, v_BTHd)), segments_BT, segments_BT)]
    if prefix is not None and prefix_segment_ids_BT is not None:
        k_PSHd, v_PSHd, segments_PS = (
            _pad(x, LANES) for x in (prefix.k, prefix.v, prefix.segment_ids_PS)
        )
        continued_BT = _pad(prefix_segment_ids_BT, LANES * shards)
        keys.append((k_PSHd, v_PSHd, continued_BT, segments_PS))
    heads = H * G if mesh is None else H * G // mesh.shape["tensor"]
    kernel = _causal_kernel(heads, q_BTHGd.shape[1], shards, interpret)
    if mesh is None or mesh.size == 1:
        out_BTHGd = _attend_on_device(kernel, q_BTHGd, keys)
    else:
        out_BTHGd = _over_mesh(mesh, kernel, len(keys))(kernel, q_BTHGd, keys)
    return out_BTHGd[:, :T]


def _pad(x: Array, multiple: int) -> Array:
    """Zeros after dim 1, up to a multiple; as segment ids they are padding."""
    return jnp.pad(x, [(0, -x.shape[1] % multiple if i == 1 else 0) for i in range(x.ndim)])


def _over_mesh(mesh: Mesh, kernel: library.SplashAttentionKernel, parts: int) -> Any:
    """`_attend_on_device` on every device of a mesh."""
    queries = partition_spec(("batch", "sequence", "kv_heads", None, None))
    tokens, whole = partition_spec(("batch", "sequence")), partition_spec(("batch", None))
    keys = partition_spec(("batch", None, "kv_heads", None))
    by_tokens = NamedSharding(mesh, PartitionSpec(None, *partition_spec(("sequence",))))
    return jax.shard_map(
        _attend_on_device,
        mesh=mesh,
        in_specs=(
            kernel.manual_sharding_spec(by_tokens),
            queries,
            [(keys, keys, tokens, whole)] * parts,
        ),
        out_specs=queries,
        # The library's kernels do not say over which axes their results vary.
        check_vma=False,
    )


def _attend_on_device(
    kernel: library.SplashAttentionKernel,
    q_BTHGd: Float[Array, "B T H G d"],
    keys: list[tuple[Array, Array, Array, Array]],
) -> Float[Array, "B T H G d"]:
    """The kernels want heads before tokens, and the rows of a unit as one row of queries."""
    B, T, H, G, d = q_BTHGd.shape
    q_BNTd = q_BTHGd.reshape(B, T, H * G, d).swapaxes(1, 2)
    parts = [
        _Part(k.swapaxes(1, 2), v.swapaxes(1, 2), ids.reshape(len(k), -1), key_ids)
        for k, v, ids, key_ids in keys
    ]
    kernels = (kernel, *(_full_kernel(q_BNTd, part, kernel) for part in parts[1:]))
    return _merged(kernels, q_BNTd, parts).swapaxes(1, 2).reshape(B, T, H, G, d)


def _block(tokens: int) -> int:
    return max(n for n in range(LANES, LARGEST_BLOCK + 1, LANES) if tokens % n == 0)


def _block_sizes(queries: int, keys: int) -> library.BlockSizes:
    q, kv = _block(queries), _block(keys)
    return library.BlockSizes(
        block_q=q,
        block_kv=kv,
        block_q_dkv=q,
        block_kv_dkv=kv,
        block_q_dq=q,
        block_kv_dq=kv,
    )


@cache
def _causal_kernel(
    heads: int, tokens: int, shards: int, interpret: bool
) -> library.SplashAttentionKernel:
    """For rows whose queries lie on `shards` devices; NumPy arrays, so that it outlives a trace."""
    mask = masks.CausalMask((tokens, tokens), shard_count=shards)
    with jax.ensure_compile_time_eval():
        kernel = library.make_splash_mha(
            masks.MultiHeadMask([mask] * heads),
            block_sizes=_block_sizes(tokens // shards, tokens),
            save_residuals=True,
            head_shards=1,
            q_seq_shards=shards,
            interpret=interpret,
        )
        return jax.tree.map(np.asarray, kernel)


def _full_kernel(
    q_BNTd: Array, part: _Part, like: library.SplashAttentionKernel
) -> library.SplashAttentionKernel:
    """Every query of a unit against every key; the segments alone decide."""
    queries, tokens = part.query_segments_BT.shape[1], part.key_segments_BS.shape[1]
    return library.make_splash_mha(
        masks.MultiHeadMask([masks.FullMask((queries, tokens))] * q_BNTd.shape[1]),
        block_sizes=_block_sizes(queries, tokens),
        save_residuals=True,
        head_shards=1,
        q_seq_shards=1,
        interpret=like.kwargs["interpret"],
    )


@jax.custom_vjp
def _merged(
    kernels: tuple[library.SplashAttentionKernel, ...],
    q_BNTd: Float[Array, "B N T d"],
    parts: list[_Part],
) -> Float[Array, "B N T d"]:
    """Attention over all parts together; the first one's rows are the queries' rows."""
    return _merge_forward(kernels, q_BNTd, parts)[0]


def _merge_forward(kernels, q_BNTd, parts):
    T = q_BNTd.shape[2]
    outs, log_sums = [], []
    for kernel, part in zip(kernels, parts, strict=True):
        q = _by_unit(q_BNTd, len(part.k_BHSd))
        ids = library.SegmentIds(part.query_segments_BT, part.key_segments_BS)
        out, (log_sum,) = jax.vmap(kernel)(q, part.k_BHSd, part.v_BHSd, ids)
        outs.append(_by_row(out, T).astype(jnp.float32))
        log_sums.append(_by_row(log_sum, T))
    # A part that shows a query nothing has a log-sum-exp of some -1e38, and so no weight; its own
    # tokens always show it itself.
    log_sum_BNT = jax.nn.logsumexp(jnp.stack(log_sums), axis=0)
    weights = [jnp.exp(log_sum - log_sum_BNT)[..., None] for log_sum in log_sums]
    out_BNTd = sum(weight * out for weight, out in zip(weights, outs, strict=True))
    out_BNTd = jnp.asarray(out_BNTd, q_BNTd.dtype)
    return out_BNTd, (kernels, q_BNTd, parts, out_BNTd, log_sum_BNT)


def _merge_backward(residuals, d_out_BNTd):
    kernels, q_BNTd, parts, out_BNTd, log_sum_BNT = residuals
    dq_BNTd, d_parts = jnp.zeros(q_BNTd.shape, jnp.float32), []
    for kernel, part in zip(kernels, parts, strict=True):
        units = len(part.k_BHSd)
        q, out, log_sum, d_out = (
            _by_unit(x, units) for x in (q_BNTd, out_BNTd, log_sum_BNT, d_out_BNTd)
        )
        ids = library.SegmentIds(part.query_segments_BT, part.key_segments_BS)
        backward = jax.vmap(partial(_part_gradients, kernel))
        dq, dk, dv = backward(q, part.k_BHSd, part.v_BHSd, ids, out, log_sum, d_out)
        dq_BNTd += _by_row(dq, q_BNTd.shape[2]).astype(jnp.float32)
        d_parts.append(_Part(dk, dv, None, None))
    return None, dq_BNTd.astype(q_BNTd.dtype), d_parts


def _part_gradients(kernel, q, k, v, ids, out, log_sum, d_out):
    """Gradients of one part's keys, and its share of the queries'."""
    residuals = (q, k, v, ids, None, out, log_sum, kernel.dq_mask_info, kernel.dkv_mask_info)
    _, _, _, dq, dk, dv, _, _ = _backward_of_part(**kernel.kwargs, res=residuals, do=d_out)
    return dq, dk, dv


_merged.defvjp(_merge_forward, _merge_backward)


def _by_unit(x: Array, units: int) -> Array:
    """[P * R, N, T, ...] to [P, N, R * T, ...]."""
    B, N, T, *rest = x.shape
    R = B // units
    return x.reshape(units, R, N, T, *rest).swapaxes(1, 2).reshape(units, N, R * T, *rest)


def _by_row(x: Array, tokens: int) -> Array:
    """[P, N, R * T, ...] to [P * R, N, T, ...]."""
    P, N, Q, *rest = x.shape
    R = Q // tokens
    return x.reshape(P, N, R, tokens, *rest).swapaxes(1, 2).reshape(P * R, N, tokens, *rest)
