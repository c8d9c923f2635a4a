"""Attention of training rows by cuDNN's fused kernels for NVIDIA GPUs.

Letters: P packs, B = P * K rows, T tokens of a row, S prefix tokens, H key/value heads, G query
heads per key/value head, d head dim; `keys` are the S + T keys of a row. Inside shard_map all are
those of one device.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from nrt_jax.models.attention import KVPrefix
from nrt_jax.models.sharding import partition_spec


def cudnn_attend(
    q_BTHGd: Float[Array, "B T H G d"],
    k_BTHd: Float[Array, "B T H d"],
    v_BTHd: Float[Array, "B T H d"],
    mask_BTT: Bool[Array, "B T T"],
    prefix: KVPrefix | None = None,
    mask_P_queries_S: Bool[Array, "P queries S"] | None = None,
    *,
    mesh: Mesh | None = None,
) -> Float[Array, "B T H G d"]:
    """`attention.attend` without its scores in memory.

    cuDNN takes one row of keys and one mask, so the keys of the prefix are copied to the rows that
    share them. On a mesh every device has the queries of its own tokens and the keys of the whole
    row. Tracing it needs an NVIDIA GPU.
    """
    keys = (k_BTHd, v_BTHd)
    mask_BT_keys = mask_BTT
    if prefix is not None and mask_P_queries_S is not None:
        keys += (prefix.k, prefix.v)
        before_BTS = mask_P_queries_S.reshape(*mask_BTT.shape[:2], -1)
        mask_BT_keys = jnp.concatenate([before_BTS, mask_BTT], axis=2)
    if mesh is None or mesh.size == 1:
        return _attend_on_device(q_BTHGd, mask_BT_keys, *keys)
    queries = partition_spec(("batch", "sequence", "kv_heads", None, None))
    whole = partition_spec(("batch", None, "kv_heads", None))
    mask = partition_spec(("batch", "sequence", None))
    # cuDNN's custom calls do not declare the axes over which their results vary.
    over_mesh = partial(jax.shard_map, mesh=mesh, out_specs=queries, check_vma=False)
    specs = (queries, mask, *[whole] * len(keys))
    return over_mesh(_attend_on_device, in_specs=specs)(q_BTHGd, mask_BT_keys, *keys)


def _attend_on_device(
    q_BTHGd: Float[Array, "B T H G d"],
    mask_BT_keys: Bool[Array, "B T keys"],
    *keys: Float[Array, "..."],
) -> Float[Array, "B T H G d"]:
    """`keys` are the rows' own keys and values, then those of the packs' prefixes."""
    B, T, H, G, d = q_BTHGd.shape
    k, v = keys[:2]
    if len(keys) > 2:
        k, v = (
            jnp.concatenate([jnp.repeat(before, B // len(before), axis=0), own], axis=1)
            for before, own in zip(keys[2:], keys[:2], strict=True)
        )
    # Its backward pass takes only even numbers of queries and keys.
    out = jax.nn.dot_product_attention(
        _even(q_BTHGd.reshape(B, T, H * G, d), 1),
        _even(k, 1),
        _even(v, 1),
        mask=_even(_even(mask_BT_keys, 1), 2)[:, None],
        implementation="cudnn",
    )
    return out[:, :T].reshape(B, T, H, G, d)


def _even(x: Array, dim: int) -> Array:
    """Pad an odd dim by one zero, which hides the key where `x` is a mask."""
    return jnp.pad(x, [(0, n % 2 if i == dim else 0) for i, n in enumerate(x.shape)])
