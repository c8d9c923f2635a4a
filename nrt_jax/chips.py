"""The accelerators that this program knows: peak rates, memory, and what jax calls them.

Peaks are dense bfloat16 rates of the makers' pages, per chip. Where jax shows a chip as two
devices, each has half of it.
"""

from typing import NamedTuple

_GOOGLE = "https://docs.cloud.google.com/tpu/docs/"
_NVIDIA = "https://www.nvidia.com/en-us/data-center/"


class Chip(NamedTuple):
    """One accelerator."""

    name: str
    """As in a topology, `v5p:4x4x4` or `h100x8`."""
    kinds: tuple[str, ...]
    """`device_kind` of its devices in jax, or the beginning of it."""
    flops: float
    """Multiplications and additions per second of bfloat16 matrix products, without sparsity."""
    memory: float
    """Bytes of HBM."""
    bandwidth: float
    """Bytes per second of HBM."""
    source: str
    """Page of the maker with these numbers."""
    platform: str = "tpu"
    """As in `jax.default_backend()`."""
    devices: int = 1
    """Devices of jax per chip."""


CHIPS = (
    Chip("v4", ("TPU v4",), 275e12, 32e9, 1228e9, _GOOGLE + "v4"),
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16e9, 819e9, _GOOGLE + "v5e"),
    Chip("v5p", ("TPU v5p", "TPU v5"), 459e12, 95e9, 2765e9, _GOOGLE + "v5p"),
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 32e9, 1640e9, _GOOGLE + "v6e"),
    Chip("tpu7x", ("TPU7x",), 2307e12, 192e9, 7380e9, _GOOGLE + "tpu7x", devices=2),
    Chip("a100", ("NVIDIA A100",), 312e12, 80e9, 2039e9, _NVIDIA + "a100/", "gpu"),
    Chip("h200", ("NVIDIA H200",), 989e12, 141e9, 4800e9, _NVIDIA + "h200/", "gpu"),
    Chip("h100", ("NVIDIA H100 80GB HBM3",), 989e12, 80e9, 3350e9, _NVIDIA + "h100/", "gpu"),
    Chip("h100-pcie", ("NVIDIA H100 PCIe",), 756e12, 80e9, 2000e9, _NVIDIA + "h100/", "gpu"),
    Chip("b200", ("NVIDIA B200",), 2250e12, 180e9, 8000e9, _NVIDIA + "hgx/", "gpu"),
    Chip("l4", ("NVIDIA L4",), 121e12, 24e9, 300e9, _NVIDIA + "l4/", "gpu"),
)
BY_NAME = {chip.name: chip for chip in CHIPS}


def chip_of(device_kind: str) -> Chip | None:
    """The chip whose devices jax calls `device_kind`; None for one that the table lacks."""
    by_kind = {kind: chip for chip in CHIPS for kind in chip.kinds}
    if device_kind in by_kind:
        return by_kind[device_kind]
    for kind, chip in by_kind.items():
        # NVIDIA's names go on with the form and the memory: NVIDIA A100-SXM4-80GB.
        if chip.platform == "gpu" and device_kind.startswith((f"{kind} ", f"{kind}-")):
            return chip
    return None
