"""The mesh that a model decodes on: tensor-parallel groups, replicated over the other devices.

A decode step reads every weight once, so it is faster the fewer of them a device holds. Weights
sharded by `tensor` stay where they are, and activations are summed over the group after each
attention and each feed-forward. Weights sharded by `fsdp` move in every step, so `fsdp` is used
only where a device cannot hold its part otherwise.
"""

import math
from typing import NamedTuple

from nrt_jax.config.architecture import Architecture
from nrt_jax.config.mesh import MeshConfig

READ_PER_SENT = 20
"""Bandwidth of a device's memory over that of one link to its neighbour: 31 on TPU v5p, 16 on v5e,
18 on v6e, 7 on H100, by their data sheets."""
READ_PER_SUM = 10e6
"""Bytes that a device reads while a sum over a group starts: about 5 microseconds at 2 TB/s."""
MEMORY_SHARE = 0.8
"""Share of the free memory that weights and cache may take; programs need the rest."""


class DecodeLoad(NamedTuple):
    """What the devices hold and compute together."""

    slots: int
    weights: int
    """Weights of the model, counted."""
    vocab_rows: int
    """Rows of the embedding, padding included."""
    weight_bytes: int
    """Bytes of one weight, and of one activation."""
    cache_bytes: int
    """Bytes of the keys and values of all slots."""
    free_bytes: int | None
    """Memory of one device for weights and cache; None for no limit."""


def decode_mesh(architecture: Architecture, load: DecodeLoad, devices: int) -> MeshConfig:
    """The sizes of the mesh on which a decode step takes the least time, by memory and links.

    `tensor` divides the key/value heads, the feed-forward and the vocabulary, and the slots divide
    over the other axes where possible. `fsdp` is the smallest with which the weights fit.
    """
    a = architecture
    most = math.gcd(a.num_key_value_heads, a.intermediate_size, load.vocab_rows, devices)
    tensors = [size for size in _divisors(most) if load.slots % (devices // size) == 0] or [most]
    meshes = [
        MeshConfig(data=devices // (tensor * fsdp), fsdp=fsdp, tensor=tensor)
        for tensor in tensors
        for fsdp in _divisors(math.gcd(a.hidden_size, devices // tensor))
    ]
    most_shards = max(mesh.fsdp * mesh.tensor for mesh in meshes)
    fitting = [mesh for mesh in meshes if _fits(mesh, load)] or [
        mesh for mesh in meshes if mesh.fsdp * mesh.tensor == most_shards
    ]
    return min(fitting, key=lambda mesh: (mesh.fsdp, _step_bytes(mesh, a, load)))


def _fits(mesh: MeshConfig, load: DecodeLoad) -> bool:
    if load.free_bytes is None:
        return mesh.fsdp == 1
    weights = load.weights * load.weight_bytes / (mesh.fsdp * mesh.tensor)
    cache = load.cache_bytes / (mesh.data * mesh.fsdp * mesh.tensor)
    return weights + cache <= MEMORY_SHARE * load.free_bytes


def _step_bytes(mesh: MeshConfig, architecture: Architecture, load: DecodeLoad) -> float:
    """Time of a decode step, in bytes read from memory; the cache takes the same on any mesh."""
    read = load.weights * load.weight_bytes / mesh.tensor
    if mesh.tensor == 1:
        return read
    rows = load.slots / (mesh.data * mesh.fsdp)
    summed = rows * architecture.hidden_size * load.weight_bytes
    sent = 2 * summed * (mesh.tensor - 1) / mesh.tensor
    sums = 2 * architecture.num_hidden_layers
    return read + sums * (READ_PER_SUM + READ_PER_SENT * sent)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
