"""Imported checkpoints: weights in Orbax's format, of which each process reads and writes a part.

An imported directory has the config.json, the generation config, the tokenizer and the settings of
its source unchanged, and the weights in `params/` instead of safetensors.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from nrt_jax.checkpoints.generation_config import read_generation
from nrt_jax.checkpoints.hf_config import (
    CONFIG_FILE,
    GENERATION_FILE,
    StoredDtype,
    directory_name,
    read_architecture,
)
from nrt_jax.checkpoints.hf_weights import read_weights, stored_dtypes
from nrt_jax.checkpoints.json_files import one_line, read_json, write_json
from nrt_jax.checkpoints.new_directory import check_new, new_directory
from nrt_jax.checkpoints.orbax_noise import silence_abandoned_io, without_messages
from nrt_jax.checkpoints.safetensors_files import main_dtype, open_tensors
from nrt_jax.errors import InputError
from nrt_jax.models.decoder import abstract_decoder
from nrt_jax.models.sharding import abstract_params

PARAMS, PROVENANCE_FILE = "params", "import.json"
VOCAB_MULTIPLE = 128
"""Rows of an imported vocabulary are padded to a multiple of this, which most meshes divide."""
_CHUNK_BYTES = 2**26
"""Smallest part that is read: another mesh than that of the import needs parts of its shards."""
_TOKENIZER_FILES = (
    "token*",
    "special_tokens_map.json",
    "chat_template*",
    "added_tokens.json",
    "nrt_jax*",
    "additional_chat_templates/*.jinja",
)


def import_directory(source: Path, out: Path, mesh: Mesh, dtype: str | None = None) -> dict:
    """Read a Hugging Face directory onto the mesh and write it to `out`; returns the params.

    Weights keep the dtype they are stored in unless one is given. Raises InputError for a source
    that cannot be read, and when `out` exists and is not empty.
    """
    source = Path(source)
    check_new(out)
    architecture = read_architecture(source)
    read_generation(source)  # refused here, not after a training
    small_files = _small_files(source)
    target = saved_target(source, mesh)
    if dtype is not None:
        target = jax.tree.map(lambda want: want.update(dtype=dtype), target)
    with new_directory(out, every_process=True) as folder:
        assert folder is not None
        params = read_weights(source, architecture, target)
        _save(folder / PARAMS, params)
        if jax.process_index() == 0:
            for name, content in small_files.items():
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(content)
            write_json(folder / PROVENANCE_FILE, {"source": str(source.absolute())})
    return params


def _small_files(source: Path) -> dict[Path, bytes]:
    """The files that an import copies, by their places in it: configs and tokenizer."""
    configs = [source / CONFIG_FILE, source / GENERATION_FILE]
    files = [*filter(Path.is_file, configs), *tokenizer_files(source)]
    try:
        return {file.relative_to(source): file.read_bytes() for file in files}
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read: {one_line(error)}") from None


def _save(folder: Path, params: dict) -> None:
    try:
        save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), params)
        args = ocp.args.PyTreeSave(params, save_args=save_args)
        _checkpointer(params).save(folder.absolute(), args=args)
    except Exception as error:  # on a full disk the writing threads raise many kinds
        raise OSError(one_line(error)[:200]) from error


def read_params(directory: Path, target: dict) -> dict:
    """The params of a Hugging Face or an imported directory, laid out and cast as `target` says.

    Vocabulary rows that `target` has and the directory has not are zero. Raises InputError for a
    directory that cannot be read or is of another architecture.
    """
    directory = Path(directory)
    architecture = read_architecture(directory)
    if not is_imported(directory):
        return read_weights(directory, architecture, target)
    saved = abstract_decoder(architecture, vocab_multiple=VOCAB_MULTIPLE)
    shapes = jax.tree.map(lambda weight: weight.shape, nnx.to_pure_dict(nnx.state(saved)))
    wanted = jax.tree.map(
        lambda want, shape: want.update(shape=shape, sharding=_dividing(want.sharding, shape)),
        target,
        shapes,
        is_leaf=lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct),
    )
    _check_shapes(directory, wanted)
    restore_args = jax.tree.map(
        lambda want: ocp.ArrayRestoreArgs(
            sharding=want.sharding, global_shape=want.shape, dtype=want.dtype
        ),
        wanted,
    )
    args = ocp.args.PyTreeRestore(wanted, restore_args=restore_args)
    with _damage(directory):
        restored = _checkpointer(wanted).restore((directory / PARAMS).absolute(), args=args)
    return jax.tree.map(_fit, restored, target)


def saved_target(directory: Path, mesh: Mesh) -> dict:
    """Shape and dtype of each weight as a Hugging Face or imported directory has it, on a mesh."""
    architecture = read_architecture(directory)
    target = abstract_params(mesh, abstract_decoder(architecture, vocab_multiple=VOCAB_MULTIPLE))
    if not is_imported(directory):
        return _with_dtypes(target, stored_dtypes(directory, architecture))
    saved = _saved_metadata(directory)
    with _damage(directory):
        return _with_dtypes(target, jax.tree.map(lambda array: array.dtype, saved))


def _with_dtypes(target: dict, dtypes: dict) -> dict:
    return jax.tree.map(lambda want, dtype: want.update(dtype=dtype), target, dtypes)


def stored_dtype(directory: Path) -> StoredDtype:
    """The dtype that most bytes of a Hugging Face or an imported directory have."""
    if is_imported(directory):
        return main_dtype(jax.tree.leaves(_saved_metadata(directory)))
    return main_dtype(open_tensors(directory).values())


def source_name(directory: Path) -> str:
    """Name of a checkpoint: that of the directory it was imported from, else its own."""
    file = Path(directory) / PROVENANCE_FILE
    source = read_json(file).get("source") if file.exists() else str(directory)
    if not isinstance(source, str):
        raise InputError(f"{file}: source={source!r}: must be the path of the import's source")
    return directory_name(Path(source))


def tokenizer_files(directory: Path) -> list[Path]:
    """The files of a directory that say how text becomes prompts: tokenizer, template, settings."""
    files = {file for pattern in _TOKENIZER_FILES for file in Path(directory).glob(pattern)}
    return sorted(file for file in files if file.is_file())


def is_imported(directory: Path) -> bool:
    """Whether the weights are in `params/`."""
    return (Path(directory) / PARAMS).is_dir()


def _saved_metadata(directory: Path) -> dict:
    """Shape and dtype of each array in the files."""
    with _damage(directory):
        metadata = _checkpointer().metadata((Path(directory) / PARAMS).absolute()).item_metadata
        if metadata is None:
            raise ValueError("the description of its arrays is missing")
        return metadata.tree


def _check_shapes(directory: Path, wanted: dict) -> None:
    """InputError when the arrays are not those of config.json; Orbax's own message is unclear."""
    saved = _saved_metadata(directory)
    with _damage(directory):
        shapes = jax.tree.map(lambda want, have: (want.shape, tuple(have.shape)), wanted, saved)
        pairs = jax.tree.leaves(shapes, is_leaf=lambda leaf: isinstance(leaf, tuple))
        for want, have in pairs:
            if want != have:
                raise ValueError(f"an array has shape {have}, {CONFIG_FILE} makes it {want}")


@contextmanager
def _damage(directory: Path) -> Iterator[None]:
    """Report any error of a damaged directory in one line, without Orbax's own messages."""
    with without_messages():
        try:
            yield
        except Exception as error:
            raise InputError(
                f"{Path(directory) / PARAMS}: cannot be read ({one_line(error)[:200]}); "
                "import it again"
            ) from error


def _dividing(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding without mesh axes that do not divide their dim, as 3 does not divide 128."""
    axes = [
        axis if axis is not None and size % sharding.mesh.shape[axis] == 0 else None
        for size, axis in zip(shape, sharding.spec, strict=True)
    ]
    return NamedSharding(sharding.mesh, PartitionSpec(*axes))


def _fit(weight: Array, want: jax.ShapeDtypeStruct) -> Array:
    """Cut the padding of the vocabulary, or fill it with zeros, to the wanted size."""
    if weight.shape == want.shape:
        return weight

    def fit(weight: Array) -> Array:
        common = tuple(
            slice(min(have, to)) for have, to in zip(weight.shape, want.shape, strict=True)
        )
        return jnp.zeros(want.shape, want.dtype).at[common].set(weight[common])

    return jax.jit(fit, out_shardings=want.sharding)(weight)


def _checkpointer(params: dict | None = None) -> ocp.Checkpointer:
    """A checkpointer that holds at most the size of the largest shard of `params` at a time.

    By default Orbax would copy the whole model.
    """
    silence_abandoned_io()
    shards = [
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(params)
    ]
    gigabytes = math.ceil(max(shards, default=1) / 1e9)
    handler = ocp.PyTreeCheckpointHandler(
        save_concurrent_gb=gigabytes, restore_concurrent_gb=gigabytes
    )
    return ocp.Checkpointer(handler)
