"""Machines by name: TPU slices such as `v5p:4x4x4`, and hosts of GPUs such as `h100x8:2`."""

import math
import re
from collections.abc import Iterator
from difflib import get_close_matches
from typing import NamedTuple

from nrt_jax.chips import BY_NAME, Chip
from nrt_jax.errors import InputError


class Topology(NamedTuple):
    """Hosts of equal chips that are one slice, or that share one network."""

    name: str
    chip: Chip
    hosts: int
    chips_per_host: int
    shape: str = ""
    """Chips along each dim of a TPU slice; empty for GPUs."""

    @property
    def chips(self) -> int:
        """Of all hosts."""
        return self.hosts * self.chips_per_host

    @property
    def devices(self) -> int:
        """Of jax, on all hosts."""
        return self.chips * self.chip.devices


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SMALL_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
_SHAPES = {"v5e": _FLAT, "v6e": _FLAT}
_MOST_CHIPS = {"v4": 4096, "v5p": 6144, "tpu7x": 9216}
"""Chips of the largest slice of a chip whose slices have three dims."""
_TPU_HOST = 4
_ONE_HOST = {"1x1": 1, "2x2": 4, "2x4": 8}
"""Chips per host of the slices of two dims that are one host."""
GPU_HOSTS = {
    "h100x1": ("h100", 1),
    "h100x8": ("h100", 8),
    "h200x8": ("h200", 8),
    "b200x8": ("b200", 8),
    "a100x8": ("a100", 8),
    "l4x1": ("l4", 1),
    "a3-high": ("h100", 8),
    "a3-mega": ("h100", 8),
    "a3-ultra": ("h200", 8),
    "a4": ("b200", 8),
}
"""Chip and chips per host; the last four are names of Google Cloud."""


def parse_topology(text: str) -> Topology:
    """The machines that a name means. Raises InputError with the nearest names for another one.

    A TPU slice is CHIP:SHAPE, `v6e:8x8`; GPUs are HOST or HOST:COUNT, `a3-mega:4`.
    """
    kind, _, rest = text.partition(":")
    if kind in GPU_HOSTS and re.fullmatch(r"|[1-9]\d{0,4}", rest):
        chip, per_host = GPU_HOSTS[kind]
        return Topology(text, BY_NAME[chip], int(rest or 1), per_host)
    if (chip := BY_NAME.get(kind)) is not None and chip.platform == "tpu" and _is_slice(kind, rest):
        chips = math.prod(map(int, rest.split("x")))
        per_host = _ONE_HOST.get(rest, _TPU_HOST)
        return Topology(text, chip, chips // per_host, per_host, rest)
    raise InputError(f"topology {text}: unknown; {_nearest(text)}")


def _is_slice(kind: str, shape: str) -> bool:
    """Slices of three dims are small ones, or cubes of 4 side by side in rising order."""
    if kind in _SHAPES:
        return shape in _SHAPES[kind]
    if not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3}){2}", shape):
        return False
    dims = [int(dim) for dim in shape.split("x")]
    cubes = all(dim % 4 == 0 for dim in dims) and dims == sorted(dims)
    return shape in _SMALL_CUBES or (cubes and math.prod(dims) <= _MOST_CHIPS[kind])


def names() -> Iterator[str]:
    """Names to choose from; of slices of three dims those of up to 1,024 chips."""
    yield from GPU_HOSTS
    cubes = [(a, b, c) for a in (4, 8) for b in (4, 8) for c in (4, 8, 16) if a <= b <= c]
    shapes = (*_SMALL_CUBES, *("x".join(map(str, dims)) for dims in cubes))
    for chip in BY_NAME.values():
        if chip.platform == "tpu":
            yield from (f"{chip.name}:{shape}" for shape in _SHAPES.get(chip.name, shapes))


def _nearest(text: str) -> str:
    known = list(names())
    kind, _, shape = text.lower().partition(":")
    # 16x4x4 is 4x4x16.
    in_order = f"{kind}:{'x'.join(sorted(shape.split('x'), key=lambda dim: (len(dim), dim)))}"
    near = [in_order] if in_order in known else []
    near += get_close_matches(text.lower(), known, n=3, cutoff=0.4)
    # v5p-128 and v5litepod-16 name the same chips, but not in which shape.
    near += [name for name in known if name.startswith(f"{kind.split('-')[0]}:")]
    if not near:
        return "name a TPU slice such as v5p:4x4x4, or hosts of GPUs such as h100x8:2"
    return f"the nearest are {', '.join(list(dict.fromkeys(near))[:3])}"
