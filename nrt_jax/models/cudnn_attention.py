"""Attention of training rows by cuDNN's fused kernels for NVIDIA GPUs.

Letters: P units, B = P * R rows, T tokens of a row, S prefix tokens, U = S + T keys of a row,
H key/value heads, G query heads a key/value head, d head dim; inside shard_map all are a device's
own.
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
    prefix_mask_PQS: Bool[Array, "P Q S"] | None = None,
    *,
    mesh: Mesh | None = None,
) -> Float[Array, "B T H G d"]:
    """`attention.attend` without its scores in memory: cuDNN takes one row of keys and one mask.

    So the keys of the prefix are copied to the rows that share them. On a mesh every device has the
    queries of its own tokens and the keys of the whole row. Tracing it needs an NVIDIA GPU.
    """
    keys = (k_BTHd, v_BTHd)
    mask_BTU = mask_BTT
    if prefix is not None and prefix_mask_PQS is not None:
        keys += (prefix.k, prefix.v)
        before_BTS = prefix_mask_PQS.reshape(*mask_BTT.shape[:2], -1)
        mask_BTU = jnp.concatenate([before_BTS, mask_BTT], axis=2)
    if mesh is None or mesh.size == 1:
        return _attend_on_device(q_BTHGd, mask_BTU, *keys)
    queries = partition_spec(("batch", "sequence", "kv_heads", None, None))
    whole = partition_spec(("batch", None, "kv_heads", None))
    mask = partition_spec(("batch", "sequence", None))
    # cuDNN's custom calls say nothing of the axes over which their results vary.
    over_mesh = partial(jax.shard_map, mesh=mesh, out_specs=queries, check_vma=False)
    specs = (queries, mask, *[whole] * len(keys))
    return over_mesh(_attend_on_device, in_specs=specs)(q_BTHGd, mask_BTU, *keys)


def _attend_on_device(
    q_BTHGd: Float[Array, "B T H G d"],
    mask_BTU: Bool[Array, "B T U"],
    *keys: Float[Array, "..."],
) -> Float[Array, "B T H G d"]:
    """`keys` are the rows' own keys and values, then those of the units' prefixes."""
    B, T, H, G, d = q_BTHGd.shape
    k_BUHd, v_BUHd = keys[:2]
    if len(keys) > 2:
        k_BUHd, v_BUHd = (
            jnp.concatenate([jnp.repeat(before, B // len(before), axis=0), own], axis=1)
            for before, own in zip(keys[2:], keys[:2], strict=True)
        )
    # Its backward pass takes even numbers of queries and keys alone.
    out_BTNd = jax.nn.dot_product_attention(
        _even(q_BTHGd.reshape(B, T, H * G, d), 1),
        _even(k_BUHd, 1),
        _even(v_BUHd, 1),
        mask=_even(_even(mask_BTU, 1), 2)[:, None],
        implementation="cudnn",
    )
    return out_BTNd[:, :T].reshape(B, T, H, G, d)


def _even(x: Array, dim: int) -> Array:
    """Zeros after an odd dim; as a mask they show nothing."""
    return jnp.pad(x, [(0, n % 2 if i == dim else 0) for i, n in enumerate(x.shape)])
