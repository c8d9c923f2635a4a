"""How fast chips exchange data: the links of a TPU's torus, NVLink, and the network between hosts.

TPU: Google's pages give the links of a chip in both directions together, 2,400 Gbit/s (v4), 400
(v5e), 1,200 (v5p), 800 (v6e) and 1,200 GB/s (7x), over 6 links, or 4 of the chips whose slices have
two dims. NVIDIA's pages give NVLink in both directions together: 900 GB/s (H100, H200), 600 (A100),
1,800 (B200); an H100 PCIe and an L4 have PCIe alone. Network: 400 Gbit/s per GPU of a DGX H100,
H200 and B200 and of A3 Ultra and A4, 200 of DGX A100 and A3 Mega, 100 of A3 High.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from nrt_jax.topologies import Topology

TPU_LINK = {"v4": 50e9, "v5e": 50e9, "v5p": 100e9, "v6e": 100e9, "tpu7x": 100e9}
"""Bytes per second of one link in one direction."""
GPU_LINKS = {
    "a100": 300e9,
    "h100": 450e9,
    "h200": 450e9,
    "b200": 900e9,
    "h100-pcie": 64e9,
    "l4": 32e9,
}
"""Bytes per second that a GPU sends to the others of its host."""
NETWORK = {"a100": 25e9, "h100": 50e9, "h200": 50e9, "b200": 50e9, "l4": 1.5e9}
"""Bytes per second that a GPU sends to other hosts."""
CLOUD_NETWORK = {"a3-high": 12.5e9, "a3-mega": 25e9, "a3-ultra": 50e9, "a4": 50e9}
"""The same on hosts of Google Cloud, by their names."""
INNERMOST = ("context", "tensor", "fsdp", "data")
"""Mesh axes from the one whose devices are nearest to each other."""
_WHOLE_RING = 16
"""Chips along a dim of a slice of two dims from which its ends are linked."""


class Link(NamedTuple):
    """What a mesh axis runs over."""

    bytes_per_s: float
    """That a device sends along the axis in a ring."""
    name: str


def links(topology: Topology, sizes: Mapping[str, int]) -> dict[str, Link]:
    """The link of each mesh axis of more than one device."""
    if topology.chip.platform == "tpu":
        return _torus(topology, sizes)
    inside, found = topology.chips_per_host, {}
    for axis in INNERMOST:
        size = sizes[axis]
        if size == 1:
            continue
        within = math.gcd(size, inside)
        inside //= within
        found[axis] = _nvlink(topology) if within == size else _network(topology, within)
    return found


def _nvlink(topology: Topology) -> Link:
    return Link(GPU_LINKS[topology.chip.name], "the links of a host")


def _network(topology: Topology, within: int) -> Link:
    """Between hosts: those of a host on this axis share their adapters' work."""
    kind = topology.name.partition(":")[0]
    rate = CLOUD_NETWORK.get(kind, NETWORK.get(topology.chip.name, 1.5e9))
    return Link(min(rate * within, GPU_LINKS[topology.chip.name]), "the network between hosts")


def _torus(topology: Topology, sizes: Mapping[str, int]) -> dict[str, Link]:
    """Mesh axes laid along the dims of a slice, the innermost first, as `make_mesh` does."""
    link = TPU_LINK[topology.chip.name] / topology.chip.devices
    left = [int(dim) for dim in topology.shape.split("x")]
    flat = len(left) == 2
    rings = [dim >= _WHOLE_RING if flat else dim >= 4 for dim in left]
    left[-1] *= topology.chip.devices
    found = {}
    for axis in INNERMOST:
        size, rate = sizes[axis], 0.0
        if size == 1:
            continue
        # Whole dims first, then parts of them: a part is a line, whose ends are not linked.
        for i in sorted(range(len(left)), key=lambda i: (size % left[i] != 0, left[i])):
            part = math.gcd(size, left[i])
            if part == 1:
                continue
            whole = part == left[i]
            rate += link * (2 if whole and rings[i] else 1)
            rings[i] &= not whole
            size //= part
            left[i] //= part
        found[axis] = Link(rate or link, "the links of the slice")
    return found
