"""The tensors of a directory of safetensors files: opened by name, and written in shards.

A file is mapped only while one of its tensors is read, so that the pages of a whole model never
count as this process's memory; and a shard is written tensor by tensor.
"""

import json
import math
import struct
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from nrt_jax.checkpoints.hf_config import StoredDtype
from nrt_jax.checkpoints.json_files import one_line, read_json, write_json
from nrt_jax.checkpoints.other_weights import other_weights
from nrt_jax.errors import InputError
from nrt_jax.file_kinds import read_head, recognise, why_missing
from nrt_jax.strict_json import parse_json

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
MAX_SHARD_BYTES = 5 * 10**9
# Upper bounds on a shard's header without its entries, and on an entry without its name.
_HEADER_BYTES, _ENTRY_BYTES = 64, 100


def main_dtype(arrays: Iterable[Any]) -> StoredDtype:
    """The dtype of most bytes; `arrays` have a shape and one of the stored dtypes."""
    nbytes: Counter[str] = Counter()
    for array in arrays:
        dtype = jnp.dtype(array.dtype)
        nbytes[dtype.name] += math.prod(array.shape) * dtype.itemsize
    names: dict[str, StoredDtype] = {name: name for name in get_args(StoredDtype)}
    return names[nbytes.most_common(1)[0][0]]


# --- reading -------------------------------------------------------------------------------------


class StoredTensor(NamedTuple):
    """A tensor in a file, not read yet."""

    file: Path
    name: str
    shape: tuple[int, ...]
    stored_as: str
    """Name of the dtype in the file, such as BF16."""

    @property
    def dtype(self) -> np.dtype:
        """The dtype that `read` gives."""
        return jnp.dtype(DTYPES[self.stored_as])

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """A copy of one rectangle of the tensor; InputError when the file is damaged or gone."""
        try:
            with safe_open(self.file, framework="np") as file:
                return file.get_slice(self.name)[index]
        except (OSError, SafetensorError) as error:
            raise InputError(f"{self.file}: {self.name}: {one_line(error)}") from None


def open_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of the directory by name; only the headers are read.

    Raises InputError when there are no safetensors (pickled weights are refused), when a file
    cannot be read, when a name is stored twice, and when index and files disagree.
    """
    files, weight_map = _weight_files(directory)
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in _read_header(file):
            if tensor.name in tensors:
                other = tensors[tensor.name].file.name
                raise InputError(f"{file}: {tensor.name}: stored also in {other}")
            tensors[tensor.name] = tensor
    if weight_map is not None:
        _check_index(directory / INDEX_FILE, weight_map, tensors)
    return tensors


def _read_header(file: Path) -> list[StoredTensor]:
    try:
        with safe_open(file, framework="np") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
            tensors = [
                StoredTensor(file, name, tuple(piece.get_shape()), piece.get_dtype())
                for name, piece in slices.items()
            ]
        _check_names(file)
    except FileNotFoundError:
        reason = why_missing(file)
        if not file.is_symlink():
            reason += f", but {INDEX_FILE} names it; copy it too"
        raise InputError(f"{file}: {reason}") from None
    except (OSError, SafetensorError) as error:
        reason = "is a directory, not a file" if file.is_dir() else recognise(read_head(file))
        reason = reason or f"cannot be read as safetensors: {one_line(error)}"
        raise InputError(f"{file}: {reason}") from None
    return tensors


def _check_names(file: Path) -> None:
    """InputError when the header names a tensor twice: the library keeps the last."""
    with file.open("rb") as raw:
        (length,) = struct.unpack("<Q", raw.read(8))
        try:
            parse_json(raw.read(length))
        except ValueError as error:
            raise InputError(f"{file}: header: {one_line(error)}") from None


def _weight_files(directory: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The files that hold the weights, and the weight map of the index if there is one.

    Other files beside an index are another copy of the weights (`consolidated.safetensors`).
    """
    index, single = directory / INDEX_FILE, directory / SINGLE_FILE
    if index.exists() or index.is_symlink():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{index}: weight_map: must map names of weights to files")
        for name, file in weight_map.items():
            if not isinstance(file, str) or not file or Path(file).name != file:
                raise InputError(f"{index}: {name}: {file!r} must be the name of a file beside it")
        names = sorted(set(weight_map.values()))
        if single.exists() and SINGLE_FILE not in names:
            raise InputError(
                f"{directory}: {SINGLE_FILE} and {INDEX_FILE}: two models; remove one of them"
            )
        return [directory / name for name in names], weight_map
    adapter = directory / ADAPTER_FILE
    files = [single] if single.exists() else sorted(directory.glob("*.safetensors"))
    if files and files != [adapter]:
        if adapter.exists():
            raise InputError(f"{adapter}: a LoRA adapter beside a model; merge or remove it")
        return files, None
    raise InputError(
        other_weights(directory)
        or f"{directory}: holds no *.safetensors; give a Hugging Face model directory"
    )


def _check_index(index: Path, weight_map: dict[str, str], tensors: dict[str, StoredTensor]) -> None:
    for name in sorted(weight_map.keys() | tensors.keys()):
        said = weight_map.get(name)
        found = tensors[name].file.name if name in tensors else None
        if said != found:
            raise InputError(
                f"{index}: {name}: the index says {said}, the files say {found}; "
                "index and files are of different models"
            )


# --- writing -------------------------------------------------------------------------------------


class NewTensor(NamedTuple):
    """A tensor to write; `fetch` brings it to the host when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    fetch: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def write_tensors(
    directory: Path | None, tensors: Iterable[NewTensor], *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write shards of at most `max_shard_bytes` (or one tensor), and an index if there are several.

    Each tensor is fetched once, in order, and held alone. Without a directory all tensors are
    fetched and none is written: so a process lends its shards to the process that writes.
    """
    shards = _into_shards(tensors, max_shard_bytes)
    names = [f"model-{n + 1:05}-of-{len(shards):05}.safetensors" for n in range(len(shards))]
    names = [SINGLE_FILE] if len(shards) == 1 else names
    for name, shard in zip(names, shards, strict=True):
        _write_shard(None if directory is None else directory / name, shard)
    if directory is not None and len(shards) > 1:
        pairs = zip(names, shards, strict=True)
        weight_map = {tensor.name: name for name, shard in pairs for tensor in shard}
        total = sum(tensor.nbytes for shard in shards for tensor in shard)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(directory / INDEX_FILE, index)


def _into_shards(tensors: Iterable[NewTensor], max_bytes: int) -> list[list[NewTensor]]:
    shards: list[list[NewTensor]] = [[]]
    size = _HEADER_BYTES
    for tensor in tensors:
        needed = tensor.nbytes + len(json.dumps(tensor.name)) + _ENTRY_BYTES
        if shards[-1] and size + needed > max_bytes:
            shards.append([])
            size = _HEADER_BYTES
        shards[-1].append(tensor)
        size += needed
    return shards


def _write_shard(file: Path | None, tensors: list[NewTensor]) -> None:
    with ExitStack() as opened:
        out = None if file is None else opened.enter_context(file.open("wb"))
        if out is not None:
            out.write(_header(tensors))
        for tensor in tensors:
            array = np.ascontiguousarray(tensor.fetch())
            assert (array.shape, array.dtype) == (tensor.shape, tensor.dtype), tensor.name
            if out is not None:
                out.write(array.view(np.uint8).data)
            # Free it first: the next tensor is fetched before the name is bound again.
            del array


def _header(tensors: list[NewTensor]) -> bytes:
    """Length in 8 bytes, then JSON with each tensor's offsets, padded to a multiple of 8 bytes."""
    stored_as = {name: code for code, name in DTYPES.items()}
    entries: dict = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        end = start + tensor.nbytes
        entries[tensor.name] = {
            "dtype": stored_as[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
