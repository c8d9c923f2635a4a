"""Open whatever holds a model: a run, one of its checkpoints, an import, a Hugging Face directory.

open_model(path) gives a model to ask: weights, tokenizer, and how its prompts are built.
load_pretrained(path) gives a decoder to call.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from nrt_jax.checkpoints import run_dir
from nrt_jax.checkpoints.abstract_model import (
    Model,
    abstract_model,
    answering_mesh,
    init_params,
    load_tokenizer,
)
from nrt_jax.checkpoints.directory_config import directory_config
from nrt_jax.checkpoints.hf_config import (
    CONFIG_FILE,
    StoredDtype,
    directory_name,
    read_architecture,
)
from nrt_jax.checkpoints.import_format import PARAMS, is_imported, read_params
from nrt_jax.checkpoints.other_weights import other_weights
from nrt_jax.checkpoints.store import Checkpoints
from nrt_jax.compilation import use_cache
from nrt_jax.config.architecture import Architecture
from nrt_jax.config.load import load_config
from nrt_jax.config.mesh import MESH_AXES, MeshConfig
from nrt_jax.config.run import CONFIG_FILE as RUN_FILE
from nrt_jax.config.run import RunConfig
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.errors import InputError
from nrt_jax.models.decoder import Decoder, abstract_decoder
from nrt_jax.models.sharding import abstract_params, make_mesh

MeshOf = Callable[[RunConfig, Architecture], Mesh]
"""Gives the mesh of a model's weights."""
_FIXED = ("model.path", "model.architecture", "run_dir")
"""What the path itself says; no override may say otherwise."""


class Found(NamedTuple):
    """What a path leads to."""

    kind: Literal["run", "import", "Hugging Face directory"]
    directory: Path
    step: int | None = None
    """The checkpoint that the path names; None for a run's newest, and where there are no steps."""


@dataclass(frozen=True)
class OpenModel:
    """A model to ask."""

    name: str
    """That of its directory, or of its repository in a Hugging Face cache."""
    found: Found
    """With the step of the weights, where they are a run's."""
    config: RunConfig
    """Of a directory: its own settings and what was concluded from its files."""
    tokenizer: Tokenizer
    model: Model
    params: Any

    @property
    def reasons(self) -> bool:
        """Whether a trace comes before an answer."""
        return self.config.method == "nrt"

    @property
    def step(self) -> int | None:
        """The step of a run's weights; None for other models."""
        return self.found.step

    @property
    def description(self) -> str:
        """Which weights they are, such as "step 300" or "import"."""
        return self.found.kind if self.step is None else f"step {self.step}"

    @property
    def vocab_size(self) -> int:
        """The token ids that a prompt may hold are below this: they have a name and a row."""
        return min(self.tokenizer.vocab_size, self.model.architecture.vocab_size)


def find_model(path: Path) -> Found:
    """Tell what a path holds; InputError, with what was looked for, when it holds no model."""
    of_run = path.parent.parent
    names_step = path.name.isdigit() and path.parent.name == run_dir.CHECKPOINTS
    if names_step and (of_run / RUN_FILE).is_file():
        return Found("run", of_run, int(path.name))
    of_directory = (path / CONFIG_FILE).is_file()
    has_checkpoints = (path / run_dir.CHECKPOINTS).is_dir()
    if (path / RUN_FILE).is_file() and (has_checkpoints or not of_directory):
        return Found("run", path)
    if of_directory:
        return Found("import" if is_imported(path) else "Hugging Face directory", path)
    told = other_weights(path)
    if told is not None:
        raise InputError(told)
    if not path.is_dir():
        raise InputError(
            f"{path}: no such directory; name a run, RUN/{run_dir.CHECKPOINTS}/STEP, an import, or "
            "a Hugging Face directory"
        )
    raise InputError(
        f"{path}: holds no model: no {RUN_FILE} (a run), and no {CONFIG_FILE} beside "
        f"*.safetensors (a Hugging Face directory) or {PARAMS}/ (an import); name one of these, or "
        f"RUN/{run_dir.CHECKPOINTS}/STEP"
    )


def open_model(
    path: Path, overrides: Sequence[str] = (), *, mesh_of: MeshOf = answering_mesh
) -> OpenModel:
    """Open any of the four kinds of model, its weights on all devices as decoding wants them.

    `overrides` are `section.field=value`, for a run on top of its own config. `mesh_of` gives
    another mesh. Reads only, so a run may still be training. Raises InputError.
    """
    found = find_model(path)
    for override in overrides:
        if override.partition("=")[0].startswith(_FIXED):
            raise InputError(f"override {override}: the model is that of {path}; leave it out")
    if found.kind == "run":
        return _open_run(path, found, overrides, mesh_of)
    return _open_directory(found, overrides, mesh_of)


def _open_run(path: Path, found: Found, overrides: Sequence[str], mesh_of: MeshOf) -> OpenModel:
    """The newest checkpoint that can be read, or the one that the path names."""
    directory, step = found.directory, found.step
    config = load_config(RunConfig, [directory / RUN_FILE], [f"run_dir={directory}", *overrides])
    use_cache(config.compilation)
    checkpoints = Checkpoints(directory / run_dir.CHECKPOINTS, config.checkpoint, writable=False)
    if not checkpoints.steps:
        raise InputError(f"{directory}: has no checkpoint yet; train it first")
    if step is not None and step not in checkpoints.steps:
        raise InputError(f"{path}: no such checkpoint; there are {checkpoints.steps}")
    tokenizer = load_tokenizer(config)
    model = abstract_model(config, tokenizer, partial(mesh_of, config))
    target = {"params": model.target}
    if step is None:
        restored = checkpoints.restore_newest(target)
        assert restored is not None
    else:
        restored = checkpoints.restore(step, target)
    checkpoints.close()
    return OpenModel(
        name=directory.resolve().name,
        found=found._replace(step=restored.step),
        config=config,
        tokenizer=tokenizer,
        model=model,
        params=restored.state["params"],
    )


def _open_directory(found: Found, overrides: Sequence[str], mesh_of: MeshOf) -> OpenModel:
    directory = found.directory
    config, tokenizer = directory_config(directory, overrides)
    use_cache(config.compilation)
    reasons = config.method == "nrt"
    # A model that answers directly must not draw think tokens that nobody trained.
    model = abstract_model(config, tokenizer, partial(mesh_of, config), add_think_rows=reasons)
    return OpenModel(
        name=directory_name(directory),
        found=found,
        config=config,
        tokenizer=tokenizer,
        model=model,
        params=init_params(config, model, tokenizer)
        if reasons
        else read_params(directory, model.target),
    )


def load_pretrained(
    path: str | os.PathLike, *, mesh: Mesh | None = None, dtype: DTypeLike | None = None
) -> Decoder:
    """The decoder of a Hugging Face or an imported directory, its weights read and laid out.

    `decoder(tokens_BT, positions=None, segment_ids=None)` gives float32 `logits_BTV`. Weights and
    computation have `dtype`, float32 by default. `mesh` is one of
    `nrt_jax.models.sharding.make_mesh`; without one everything is on the first device. Raises
    InputError for a directory that cannot be read or that needs what the decoder does not have.
    """
    path = Path(path)
    mesh = mesh if mesh is not None else make_mesh(MeshConfig(data=1), jax.local_devices()[:1])
    if mesh.axis_names != MESH_AXES:
        raise InputError(f"mesh: axes {mesh.axis_names}; they must be {MESH_AXES}")
    dtype = jnp.dtype(_dtype(dtype))
    decoder = abstract_decoder(
        read_architecture(path), dtype=dtype, vocab_multiple=mesh.shape["tensor"]
    )
    definition, _ = nnx.split(decoder)
    return nnx.merge(definition, read_params(path, abstract_params(mesh, decoder, dtype)))


def _dtype(dtype: DTypeLike | None) -> DTypeLike:
    allowed = {jnp.dtype(name): name for name in get_args(StoredDtype)}
    try:
        if dtype is None or jnp.dtype(dtype) in allowed:
            return jnp.float32 if dtype is None else dtype
    except TypeError:
        pass
    raise InputError(f"dtype {dtype}: must be one of {', '.join(allowed.values())}")
