"""Weights of Hugging Face directories of Llama and Mistral, read onto a mesh and written from it.

Both directions handle one tensor at a time, so that no host ever holds a model.
Letters: V vocabulary, L layers.
"""

import math
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jaxtyping import Array

from nrt_jax.checkpoints.hf_config import (
    CONFIG_FILE,
    GENERATION_FILE,
    StoredDtype,
    config_json,
)
from nrt_jax.checkpoints.json_files import write_json
from nrt_jax.checkpoints.new_directory import new_directory
from nrt_jax.checkpoints.other_weights import other_name
from nrt_jax.checkpoints.safetensors_files import (
    DTYPES,
    MAX_SHARD_BYTES,
    NewTensor,
    StoredTensor,
    main_dtype,
    open_tensors,
    write_tensors,
)
from nrt_jax.checkpoints.weight_table import EMBEDDING, HEAD, Weight, weight_table
from nrt_jax.config.architecture import Architecture
from nrt_jax.errors import InputError

# Constants of the architecture that old Llama exports store beside the weights.
_CONSTANT = ".rotary_emb.inv_freq"
_ROWS_AT_ONCE = 8192
_WHOLE_BYTES = 2**28
"""A weight of at most so many bytes, all layers together, is put together on the host where there
is one device: then nothing is compiled."""


# --- reading -------------------------------------------------------------------------------------


def read_weights(directory: Path, architecture: Architecture, target: dict) -> dict:
    """The params of the files' `Decoder(architecture)`, laid out and cast as `target` says.

    `target` holds a ShapeDtypeStruct with a sharding for each weight. Its vocabulary dim may be
    larger than the files'; the rest is zero. Reads float32, bfloat16 and float16
    safetensors, tensor by tensor, and only the shards of this process's devices: beside the params
    the host holds the local shards of one tensor. Raises InputError on pickled weights, on a
    name that is missing, unknown or stored twice, and on a shape or dtype that does not fit.
    """
    table, tensors = _checked_tensors(Path(directory), architecture)
    if architecture.tie_word_embeddings and HEAD in tensors:
        _check_tied(tensors)
    wanted, params = flatten_dict(target), {}
    for row in table:
        of_layers = [tensors[name] for name in row.names(architecture.num_hidden_layers)]
        params[row.path] = _read_leaf(row, of_layers, wanted[row.path])
    return unflatten_dict(params)


def stored_dtypes(directory: Path, architecture: Architecture) -> dict:
    """The dtype of each weight in the files, as a tree like the params.

    If the layers of one weight differ, it is the smallest dtype that holds all of them.
    """
    table, tensors = _checked_tensors(Path(directory), architecture)
    dtypes = {}
    for row in table:
        names = row.names(architecture.num_hidden_layers)
        dtypes[row.path] = jnp.result_type(*{tensors[name].dtype for name in names})
    return unflatten_dict(dtypes)


def _read_leaf(row: Weight, of_layers: list[StoredTensor], want: jax.ShapeDtypeStruct) -> Array:
    """One array of the params; a stacked one is filled in place, layer by layer."""
    assert isinstance(want.sharding, NamedSharding), "the target says where each weight goes"
    shape = want.shape[1:] if row.stacked else want.shape
    in_file = row._replace(shape=shape).file_shape()
    nbytes = math.prod(want.shape) * want.dtype.itemsize
    if want.sharding.mesh.size == 1 and nbytes <= _WHOLE_BYTES:
        return jax.device_put(_read_on_host(row, of_layers, want), want.sharding)
    sharding = NamedSharding(want.sharding.mesh, row.file_spec(want.sharding.spec))

    def convert(tensor: Array) -> Array:
        return row.from_file(tensor, shape).astype(want.dtype)

    def load(tensor: StoredTensor) -> Array:
        array = _load(tensor, in_file, sharding)
        if want.dtype == jnp.float16 and tensor.dtype != jnp.float16:
            _check_range(tensor.name, float(jnp.max(jnp.abs(array))))
        return array

    if not row.stacked:
        tensor = load(of_layers[0])
        if not row.in_dims and tensor.dtype == want.dtype:
            return tensor
        return jax.jit(convert, out_shardings=want.sharding)(tensor)
    put = jax.jit(
        # `at[n].set` would compute a whole bfloat16 stack in float32 on the CPU.
        lambda stack, tensor, n: lax.dynamic_update_index_in_dim(stack, convert(tensor), n, 0),
        donate_argnums=0,
        out_shardings=want.sharding,
    )
    zeros = jax.jit(partial(jnp.zeros, want.shape, want.dtype), out_shardings=want.sharding)
    stack = zeros()
    for n, tensor in enumerate(of_layers):
        # Wait: otherwise tensors on their way to the device would pile up on the host.
        stack = put(stack, load(tensor), n).block_until_ready()
    return stack


def _read_on_host(
    row: Weight, of_layers: list[StoredTensor], want: jax.ShapeDtypeStruct
) -> np.ndarray:
    """One array of the params, filled tensor by tensor."""
    weight = np.empty(want.shape, want.dtype)
    shape = want.shape[1:] if row.stacked else want.shape
    in_file = row._replace(shape=shape).file_shape()
    for n, tensor in enumerate(of_layers):
        values = _read_padded(tensor, in_file, (slice(None),) * len(in_file))
        if want.dtype == jnp.float16 and tensor.dtype != jnp.float16:
            _check_range(tensor.name, float(np.max(np.abs(values.astype(np.float32)))))
        weight[n if row.stacked else ...] = row.from_file(values, shape)
    return weight


def _load(tensor: StoredTensor, shape: tuple[int, ...], sharding: NamedSharding) -> Array:
    """The tensor in the files' layout, on the mesh, with zeros where `shape` is larger."""
    pieces: dict[str, np.ndarray] = {}

    def piece(index: tuple[slice, ...]) -> np.ndarray:
        # Devices with the same piece share one copy of it on the host.
        key = str(index)
        if key not in pieces:
            pieces[key] = _read_padded(tensor, shape, index)
        return pieces[key]

    return jax.make_array_from_callback(shape, sharding, piece, dtype=tensor.dtype)


def _read_padded(
    tensor: StoredTensor, shape: tuple[int, ...], index: tuple[slice, ...]
) -> np.ndarray:
    bounds = [piece.indices(size)[:2] for piece, size in zip(index, shape, strict=True)]
    inside = tuple(
        slice(min(start, stored), min(stop, stored))
        for (start, stop), stored in zip(bounds, tensor.shape, strict=True)
    )
    wanted = tuple(stop - start for start, stop in bounds)
    found = tuple(piece.stop - piece.start for piece in inside)
    if 0 in found:
        return np.zeros(wanted, tensor.dtype)
    values = tensor.read(inside)
    if found == wanted:
        return values
    return np.pad(values, [(0, all_ - some) for all_, some in zip(wanted, found, strict=True)])


def _checked_tensors(
    directory: Path, a: Architecture
) -> tuple[list[Weight], dict[str, StoredTensor]]:
    """The table and the tensors; InputError unless they are the same weights, shapes and dtypes."""
    tensors, table = open_tensors(directory), weight_table(a)
    expected = {name: row for row in table for name in row.names(a.num_hidden_layers)}
    if a.tie_word_embeddings and HEAD in tensors:
        expected[HEAD] = expected[EMBEDDING]
    missing = [name for name in expected if name not in tensors]
    if missing:
        _explain(tensors, expected)
        hint = "; or tie_word_embeddings must be true" if missing[0] == HEAD else ""
        raise InputError(
            f"{directory}: {missing[0]}: missing ({len(missing)} of {len(expected)} weights are); "
            f"complete the copy{hint}"
        )
    for name, tensor in tensors.items():
        if name.endswith(_CONSTANT):
            continue
        if name not in expected:
            told = other_name(name, expected) or f"no weight of a {a.family} of this config"
            raise InputError(f"{tensor.file}: {name}: {told}")
        shape = expected[name].file_shape()
        if tensor.shape != shape:
            raise InputError(
                f"{tensor.file}: {name}: shape {tensor.shape}, but {CONFIG_FILE} makes it {shape}"
            )
        if tensor.stored_as not in DTYPES:
            raise InputError(
                f"{tensor.file}: {name}: dtype {tensor.stored_as}; store F32, BF16 or F16"
            )
    return table, tensors


def _explain(tensors: dict[str, StoredTensor], expected: Collection[str]) -> None:
    """InputError for the first tensor that stands under another name than its weight's."""
    for name, tensor in tensors.items():
        told = None if name in expected else other_name(name, expected)
        if told is not None:
            raise InputError(f"{tensor.file}: {name}: {told}")


def _check_tied(tensors: dict[str, StoredTensor]) -> None:
    """InputError when a stored head differs from the embedding it is tied to."""
    head, embedding = tensors[HEAD], tensors[EMBEDDING]
    ends = [*range(_ROWS_AT_ONCE, head.shape[0], _ROWS_AT_ONCE), head.shape[0]]
    blocks = (slice(end - min(end, _ROWS_AT_ONCE), end) for end in ends)
    if not all(np.array_equal(head.read((rows,)), embedding.read((rows,))) for rows in blocks):
        raise InputError(
            f"{head.file}: {HEAD}: differs from {EMBEDDING}, but {CONFIG_FILE} says "
            "tie_word_embeddings=true; set it to false"
        )


def _check_range(name: str, largest: float) -> None:
    """InputError when a finite weight would become infinite in float16."""
    if float(jnp.finfo(jnp.float16).max) < largest < np.inf:
        raise InputError(
            f"{name}: holds values too large for float16 ({largest:g}); use bfloat16 or float32"
        )


# --- writing -------------------------------------------------------------------------------------


def write_directory(
    directory: Path,
    architecture: Architecture,
    params: dict,
    *,
    dtype: StoredDtype | None = None,
    generation: dict[str, Any] | None = None,
    token_ids: dict[str, Any] | None = None,
    add_files: Callable[[Path], object] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a directory that transformers loads: configs, and the weights in `dtype`.

    Without a dtype each weight keeps its own. `generation` is the content of
    `generation_config.json`; `token_ids`, by default those in it, are the ids of `config.json`.
    `add_files(folder)` may add files, such as a tokenizer. The params
    stay on their mesh; each tensor comes to the host when the first process writes it. The files go
    to a new folder that is renamed at the end, so that `directory` is complete or does not exist.
    Raises InputError when it exists and is not empty, when it cannot be written,
    and on params that do not fit.
    """
    tensors = _to_tensors(architecture, params, dtype)
    generation = generation or {}
    stored_as = dtype or main_dtype(tensors)
    token_ids = generation | (token_ids or {})
    with new_directory(directory) as folder:
        if folder is not None:
            write_json(folder / CONFIG_FILE, config_json(architecture, stored_as, token_ids))
            write_json(folder / GENERATION_FILE, generation)
            if add_files is not None:
                add_files(folder)
        write_tensors(folder, tensors, max_shard_bytes=max_shard_bytes)


def _to_tensors(a: Architecture, params: dict, dtype: StoredDtype | None) -> list[NewTensor]:
    """The tensors of the files in the order of the layers, not fetched yet."""
    found = flatten_dict(params)
    table = weight_table(a)
    for path in sorted(found.keys() ^ {row.path for row in table}):
        state = "no weight" if path in found else "missing, though a weight"
        raise InputError(f"params: {'.'.join(path)}: {state} of a {a.family} of this architecture")
    tensors: dict[str, NewTensor] = {}
    for row in table:
        _check_fits(row, a.num_hidden_layers, found[row.path])
        tensors |= _tensors_of_row(row, a.num_hidden_layers, found[row.path], dtype)
    of_layers = sorted((name for name in tensors if ".layers." in name), key=_layer)
    others = [name for name in tensors if ".layers." not in name]
    return [tensors[name] for name in (*others[:1], *of_layers, *others[1:])]


def _layer(name: str) -> int:
    return int(name.split(".layers.")[1].split(".")[0])


def _check_fits(row: Weight, layers: int, weight: Array) -> None:
    """InputError on another shape, unless only the vocabulary dim is padded."""
    shape = (layers, *row.shape) if row.stacked else row.shape
    padded = {EMBEDDING: 0, HEAD: 1}.get(row.name)
    fits = [
        have == want or (dim == padded and have > want)
        for dim, (have, want) in enumerate(zip(weight.shape, shape, strict=False))
    ]
    if len(weight.shape) != len(shape) or not all(fits):
        name = ".".join(row.path)
        raise InputError(f"params: {name}: shape {weight.shape}; the architecture: {shape}")


def _tensors_of_row(
    row: Weight, layers: int, weight: Array, dtype: StoredDtype | None
) -> dict[str, NewTensor]:
    """The row's tensors by name; all layers share one compiled conversion."""
    stored = jnp.dtype(dtype or weight.dtype)

    @jax.jit
    def convert(weight: Array, n: Array) -> Array:
        return row.to_file(weight[n] if row.stacked else weight).astype(stored)

    @jax.jit
    def largest(weight: Array, n: Array) -> Array:
        return jnp.max(jnp.abs(weight[n] if row.stacked else weight))

    def fetch(name: str, n: int) -> np.ndarray:
        arguments = jnp.asarray(weight), jnp.asarray(n)
        if stored == jnp.float16 and weight.dtype != jnp.float16:
            _check_range(name, float(largest(*arguments)))
        cast = convert(*arguments)
        if cast.is_fully_addressable:
            return np.asarray(cast)
        return np.asarray(multihost_utils.process_allgather(cast, tiled=True))

    shape = row.file_shape()
    return {
        name: NewTensor(name, shape, stored, partial(fetch, name, n))
        for n, name in enumerate(row.names(layers))
    }
