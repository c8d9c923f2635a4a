"""Model directories of arbitrary bits, and the bits of a directory.

Written and read by safetensors' own functions for torch.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.models.references import make_model

INDEX = "model.safetensors.index.json"

# Per dtype: the integer of its size, and what a computation could lose: zero, the least and the
# largest denormal, the least normal and the largest finite number; all are taken with either sign.
_PATTERNS = {
    torch.float32: (np.uint32, [0, 1, 0x7FFFFF, 0x800000, 0x7F7FFFFF]),
    torch.bfloat16: (np.uint16, [0, 1, 0x7F, 0x80, 0x7F7F]),
    torch.float16: (np.uint16, [0, 1, 0x3FF, 0x400, 0x7BFF]),
}


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, rng: np.random.Generator) -> Any:
    """A tensor whose bits are drawn, all finite, with the special patterns in it."""
    integer, specials = _PATTERNS[dtype]
    sign = integer(1 << (np.iinfo(integer).bits - 1))
    bits = rng.integers(0, np.iinfo(integer).max, shape, dtype=integer, endpoint=True)
    largest = integer(specials[-1])
    # Infinities and NaNs, whose exponent is all ones, lose its highest bit.
    bits = np.where(bits & ~sign > largest, bits & ~(sign >> 1), bits)
    special = np.asarray(specials, integer)
    bits.ravel()[: 2 * len(special)] = np.concatenate([special, special | sign])
    tensor = torch.from_numpy(bits.copy()).view(dtype)
    assert torch.isfinite(tensor).all()
    return tensor


def write_bits(
    directory: Path, config: Any, dtype: str, *, norms: str | None = None, shards: int = 1
) -> Path:
    """The directory of a model with drawn bits for weights, in one file or with an index."""
    model, rng = make_model(config), np.random.default_rng(0)
    model.save_pretrained(directory)
    tensors = {
        name: random_bits(
            tuple(weight.shape), getattr(torch, norms if norms and "norm" in name else dtype), rng
        )
        for name, weight in model.named_parameters()
    }
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": dtype}))
    (directory / "model.safetensors").unlink()
    names = list(tensors)
    weight_map = {name: f"part-{n % shards}.safetensors" for n, name in enumerate(names)}
    for shard in sorted(set(weight_map.values())):
        save_file({n: tensors[n] for n in names if weight_map[n] == shard}, directory / shard)
    if shards == 1:
        (directory / "part-0.safetensors").rename(directory / "model.safetensors")
    else:
        (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def bits_of(directory: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of every tensor of a directory."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            assert name not in found, f"{name} is stored twice"
            raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            found[name] = (tensor.dtype, tuple(tensor.shape), raw)
    return found


def assert_same_bits(one: Path, other: Path) -> None:
    """Same names, dtypes, shapes and bits, in whatever files."""
    a, b = bits_of(one), bits_of(other)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name][:2] == b[name][:2], name
        if a[name][2] != b[name][2]:
            pairs = [np.frombuffer(x[name][2], np.uint8) for x in (a, b)]
            assert a[name][2] == b[name][2], f"{name}: {np.sum(pairs[0] != pairs[1])} bytes differ"
