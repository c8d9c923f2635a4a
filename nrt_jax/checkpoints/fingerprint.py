"""Checksums that tell whether an array is bit for bit the one that was saved."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, UInt32

from nrt_jax.models.sharding import on_device


def fingerprints(state: Any) -> dict[str, int]:
    """One 32-bit number for each array of a state, or of a part of one, by its dotted path.

    The number is the same on any mesh. Arrays in host memory are copied to the devices one by one.
    """
    leaves = by_path(state)
    on_hosts = {name for name, leaf in leaves.items() if _on_host(leaf)}
    sums = _of_each({name: leaf for name, leaf in leaves.items() if name not in on_hosts})
    for name in on_hosts:
        on_device = leaves[name].sharding.with_memory_kind("device")
        sums |= _of_each({name: jax.device_put(leaves[name], on_device)})
    return {name: int(value) for name, value in jax.device_get(sums).items()}


def _on_host(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not on_device(leaf.sharding)


def by_path(tree: Any) -> dict[str, Any]:
    """Leaves by their dotted path, which is the same for a named tuple and for a dictionary."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {jax.tree_util.keystr(p, simple=True, separator="."): leaf for p, leaf in leaves}


@jax.jit
def _of_each(leaves: dict[str, Any]) -> dict[str, UInt32[Array, ""]]:
    return {name: _fingerprint(leaf) for name, leaf in leaves.items()}


def _fingerprint(leaf: Array) -> UInt32[Array, ""]:
    """sum_i (2 i + 1) bits_i mod 2^32 over the elements.

    Odd factors are invertible mod 2^32, so a change of one element always changes the sum. Integer
    addition does not depend on the order, so no sharding changes the sum.
    """
    unsigned = {2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    bits = lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    index, stride = jnp.zeros(leaf.shape, jnp.uint32), 1
    for dim in reversed(range(leaf.ndim)):
        index += lax.broadcasted_iota(jnp.uint32, leaf.shape, dim) * jnp.uint32(stride % 2**32)
        stride *= leaf.shape[dim]
    return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)
