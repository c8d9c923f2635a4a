"""Attention of training rows by the splash kernels of TPUs, without an array of T x S scores.

A row's tokens see the row (causally) and the prefix of its pack. One kernel computes each of the
two, and the softmax over both is merged from them: with o_i the output over keys i and l_i the log
of the sum of their exp(scores),

    l = logaddexp(l_1, l_2),    o = sum_i exp(l_i - l) o_i

In the backward pass a kernel recomputes p = exp(scores - l) and ds = p * (do v - sum(o do)), which
are right for its own keys when l and o are those of all keys.

Letters: P packs, B = P * K rows, T tokens of a row, S prefix tokens, H key/value heads, G query
heads per key/value head, d head dim; `heads` are the H * G query heads. Inside shard_map all are
those of one device.
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

# The public call has no backward pass for a part of the keys: it uses that part's output, and
# refuses to differentiate the log-sum-exp. This function takes both as arguments.
_backward_of_part = library._splash_attention_bwd


class _Part(NamedTuple):
    """Keys that all queries of a row or a pack share, and the segments that mask them."""

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
    tokens must divide over it. The output of a padding query (segment 0) is finite and meaningless.
    `interpret` runs the kernels on any platform, slowly.
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
    """Append zeros to dim 1 up to a multiple; as segment ids they are padding."""
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
        # The library's kernels do not declare the axes over which their results vary.
        check_vma=False,
    )


def _attend_on_device(
    kernel: library.SplashAttentionKernel,
    q_BTHGd: Float[Array, "B T H G d"],
    keys: list[tuple[Array, Array, Array, Array]],
) -> Float[Array, "B T H G d"]:
    """The kernels take heads before tokens, and the rows of a pack as one row of queries."""
    B, T, H, G, d = q_BTHGd.shape
    queries = q_BTHGd.reshape(B, T, H * G, d).swapaxes(1, 2)
    parts = [
        _Part(k.swapaxes(1, 2), v.swapaxes(1, 2), ids.reshape(len(k), -1), key_ids)
        for k, v, ids, key_ids in keys
    ]
    kernels = (kernel, *(_full_kernel(H * G, part, kernel) for part in parts[1:]))
    return _merged(kernels, queries, parts).swapaxes(1, 2).reshape(B, T, H, G, d)


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
    """For rows whose queries are on `shards` devices; it holds NumPy arrays, to outlive a trace."""
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
    heads: int, part: _Part, like: library.SplashAttentionKernel
) -> library.SplashAttentionKernel:
    """Every query of a pack against every key; only the segments mask."""
    queries, tokens = part.query_segments_BT.shape[1], part.key_segments_BS.shape[1]
    return library.make_splash_mha(
        masks.MultiHeadMask([masks.FullMask((queries, tokens))] * heads),
        block_sizes=_block_sizes(queries, tokens),
        save_residuals=True,
        head_shards=1,
        q_seq_shards=1,
        interpret=like.kwargs["interpret"],
    )


@jax.custom_vjp
def _merged(
    kernels: tuple[library.SplashAttentionKernel, ...],
    queries: Float[Array, "B heads T d"],
    parts: list[_Part],
) -> Float[Array, "B heads T d"]:
    """Attention over all parts together; the rows of the first part are those of the queries."""
    return _merge_forward(kernels, queries, parts)[0]


def _merge_forward(kernels, queries, parts):
    T = queries.shape[2]
    outs, log_sums = [], []
    for kernel, part in zip(kernels, parts, strict=True):
        q = _by_pack(queries, len(part.k_BHSd))
        ids = library.SegmentIds(part.query_segments_BT, part.key_segments_BS)
        out, (log_sum,) = jax.vmap(kernel)(q, part.k_BHSd, part.v_BHSd, ids)
        outs.append(_by_row(out, T).astype(jnp.float32))
        log_sums.append(_by_row(log_sum, T))
    # A part that hides all keys from a query has a log-sum-exp near -1e38, so its weight is 0; a
    # query always sees itself among its own tokens.
    merged_log_sum = jax.nn.logsumexp(jnp.stack(log_sums), axis=0)
    weights = [jnp.exp(log_sum - merged_log_sum)[..., None] for log_sum in log_sums]
    merged = sum(weight * out for weight, out in zip(weights, outs, strict=True))
    merged = jnp.asarray(merged, queries.dtype)
    return merged, (kernels, queries, parts, merged, merged_log_sum)


def _merge_backward(residuals, d_merged):
    kernels, queries, parts, merged, merged_log_sum = residuals
    d_queries, d_parts = jnp.zeros(queries.shape, jnp.float32), []
    for kernel, part in zip(kernels, parts, strict=True):
        packs = len(part.k_BHSd)
        q, out, log_sum, d_out = (
            _by_pack(x, packs) for x in (queries, merged, merged_log_sum, d_merged)
        )
        ids = library.SegmentIds(part.query_segments_BT, part.key_segments_BS)
        backward = jax.vmap(partial(_part_gradients, kernel))
        dq, dk, dv = backward(q, part.k_BHSd, part.v_BHSd, ids, out, log_sum, d_out)
        d_queries += _by_row(dq, queries.shape[2]).astype(jnp.float32)
        d_parts.append(_Part(dk, dv, None, None))
    return None, d_queries.astype(queries.dtype), d_parts


def _part_gradients(kernel, q, k, v, ids, out, log_sum, d_out):
    """Gradients of one part's keys and values, and its share of the queries' gradient."""
    residuals = (q, k, v, ids, None, out, log_sum, kernel.dq_mask_info, kernel.dkv_mask_info)
    _, _, _, dq, dk, dv, _, _ = _backward_of_part(**kernel.kwargs, res=residuals, do=d_out)
    return dq, dk, dv


_merged.defvjp(_merge_forward, _merge_backward)


def _by_pack(x: Array, packs: int) -> Array:
    """[P * K, heads, T, ...] to [P, heads, K * T, ...]."""
    B, heads, T, *rest = x.shape
    K = B // packs
    return x.reshape(packs, K, heads, T, *rest).swapaxes(1, 2).reshape(packs, heads, K * T, *rest)


def _by_row(x: Array, tokens: int) -> Array:
    """[P, heads, K * T, ...] to [P * K, heads, T, ...]."""
    P, heads, queries, *rest = x.shape
    K = queries // tokens
    return x.reshape(P, heads, K, tokens, *rest).swapaxes(1, 2).reshape(P * K, heads, tokens, *rest)
