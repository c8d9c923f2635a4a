"""The model of a config before its weights: definition, mesh, and the shape of every weight.

`init_params` then gives the weights before the first update.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from nrt_jax import distributed
from nrt_jax.checkpoints import import_format
from nrt_jax.checkpoints.hf_config import read_architecture
from nrt_jax.checkpoints.token_rows import RowNames, row_names, tell_new_rows, with_new_rows
from nrt_jax.config.architecture import Architecture
from nrt_jax.config.mesh import MeshConfig
from nrt_jax.config.model import AUTO, ModelConfig
from nrt_jax.config.rollout import RolloutConfig
from nrt_jax.config.run import NO_CHECKPOINT, RunConfig
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.errors import InputError
from nrt_jax.models.attention_backend import choose_backend
from nrt_jax.models.decode_mesh import DecodeLoad, decode_mesh
from nrt_jax.models.decoder import Decoder, abstract_decoder
from nrt_jax.models.sharding import abstract_params, make_mesh

_SHAPE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
)
"""What memory and work depend on."""


@dataclass(frozen=True)
class Model:
    """A decoder's definition, and how its weights are laid out."""

    definition: nnx.GraphDef
    architecture: Architecture
    """Its vocabulary holds every token of the run, also tokens that the checkpoint lacks."""
    mesh: Mesh
    target: dict[str, Any]
    """Shape, dtype (float32 in training) and sharding of every weight."""


def load_tokenizer(config: RunConfig) -> Tokenizer:
    """The tokenizer of the data section, or of the model's directory."""
    data = config.data
    return Tokenizer.load(config.tokenizer_directory, data.think_start, data.think_end)


def architecture_of(model: ModelConfig) -> Architecture:
    """The architecture of the config, or of the checkpoint that it names.

    Raises InputError for a checkpoint that cannot be read or is not of `model.shape`, and for a
    shape without a checkpoint.
    """
    if model.path is not None:
        found = read_architecture(model.path)
        _check_shape(model, found)
        return found
    if model.architecture is None:
        raise InputError(NO_CHECKPOINT)
    return model.architecture


def _check_shape(model: ModelConfig, found: Architecture) -> None:
    for name in () if model.shape is None else _SHAPE:
        asked, has = getattr(model.shape, name), getattr(found, name)
        if asked != has:
            raise InputError(
                f"{model.path}: {name} is {has}, and model.shape says {asked}; name the "
                "checkpoint that the config is for, or set model.shape=null"
            )


def abstract_model(
    config: RunConfig,
    tokenizer: Tokenizer,
    engine_mesh: Callable[[Architecture], Mesh] | None = None,
    *,
    add_think_rows: bool = True,
) -> Model:
    """The model without weights; its vocabulary includes the think tokens.

    By default the mesh is the config's, and rows are spread over it as in training. With
    `engine_mesh` the model is for an engine on the mesh that this function returns. Without
    `add_think_rows` the vocabulary stays as the checkpoint has it.

    Raises InputError for a checkpoint that cannot be read, for a tokenizer that is not the model's,
    for a mesh that does not divide the weights, and for a model.attention that cannot run.
    """
    model = config.model
    architecture = architecture_of(model)
    _check_vocabulary(config, tokenizer, architecture)
    if add_think_rows:
        vocab_size = max(architecture.vocab_size, tokenizer.vocab_size)
        architecture = architecture.model_copy(update={"vocab_size": vocab_size})
    if engine_mesh is not None:
        return model_on_mesh(model, architecture, engine_mesh(architecture), jnp.dtype(model.dtype))
    mesh = make_mesh(config.mesh, _devices(config.rollout)[0])
    opened = model_on_mesh(model, architecture, mesh, jnp.dtype(model.dtype))
    return replace(opened, definition=training_definition(config, architecture, mesh))


def engine_model(config: RunConfig, model: Model) -> Model:
    """The training's model as the engines hold it: on the rollouts' mesh, in the rollouts' dtype.

    Its definition takes any number of rows; they need not divide over the mesh. Raises InputError
    for a rollout.mesh that does not cover the rollouts' devices, or does not divide the weights.
    """
    dtype = jnp.dtype(config.rollout.dtype or config.model.dtype)
    try:
        return engine_model_on(config, model.architecture, _engine_mesh(config, model, dtype))
    except InputError as error:
        raise InputError(f"rollout.{error}") from None


def engine_model_on(config: RunConfig, architecture: Architecture, mesh: Mesh) -> Model:
    """The model as the engines hold it, on this mesh."""
    dtype = jnp.dtype(config.rollout.dtype or config.model.dtype)
    engine = model_on_mesh(config.model, architecture, mesh, dtype)

    def cast(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # The scales of the norms are few, and the norms compute in float32.
        return leaf if path[-1].key == "scale" else leaf.update(dtype=dtype)

    return replace(engine, target=jax.tree_util.tree_map_with_path(cast, engine.target))


def _engine_mesh(config: RunConfig, model: Model, dtype: jnp.dtype) -> Mesh:
    """The mesh of the rollouts; that of training itself where the two are equal."""
    rollout = config.rollout
    devices, sizes = _devices(rollout)[1], rollout.mesh
    if sizes is None and rollout.devices is None:
        return model.mesh
    if sizes == "auto":
        free = _bytes_of_a_device()
        if free is not None and rollout.devices is None:
            copies = 1 if config.optimizer.offload else 3  # the weights, and AdamW's two moments
            leaves = jax.tree.leaves(model.target)
            free -= copies * sum(4 * math.prod(w.sharding.shard_shape(w.shape)) for w in leaves)
        load = decode_load(config, model.architecture, model.target, dtype, free)
        sizes = decode_mesh(model.architecture, load, len(devices))
    mesh = make_mesh(sizes or MeshConfig(), devices)
    return model.mesh if mesh == model.mesh else mesh


def answering_mesh(config: RunConfig, architecture: Architecture, slots: int | None = None) -> Mesh:
    """The mesh of all devices that decodes `slots` sequences at once in the least time.

    For using a model on any machine, whatever mesh it was trained on. Weights are held in float32.
    Without `slots` as many sequences as the config's rollouts decode.
    """
    slots = config.rollout.slots if slots is None else slots
    rollout = config.rollout.model_copy(update={"slots": slots})
    decoder = abstract_decoder(architecture, vocab_multiple=config.model.vocab_multiple)
    weights = nnx.to_pure_dict(nnx.state(decoder))
    config = config.model_copy(update={"rollout": rollout})
    load = decode_load(config, architecture, weights, jnp.dtype("float32"), _bytes_of_a_device())
    return make_mesh(decode_mesh(architecture, load, jax.device_count()))


def _bytes_of_a_device() -> int | None:
    """Memory of a device, the same number in all processes; None where it has no limit."""
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return distributed.from_first("memory of a device", memory)


def decode_load(
    config: RunConfig,
    architecture: Architecture,
    weights: dict[str, Any],
    dtype: jnp.dtype,
    free_bytes: int | None,
) -> DecodeLoad:
    """What decoding asks of the devices, with weights of these shapes in this dtype."""
    a, rollout = architecture, config.rollout
    cache_dtype = jnp.dtype(rollout.cache_dtype or rollout.dtype or config.model.dtype)
    tokens = rollout.slots * (config.data.max_prompt_tokens + rollout.max_trace_tokens)
    of_token = 2 * a.num_hidden_layers * a.num_key_value_heads * a.head_dim
    return DecodeLoad(
        slots=rollout.slots,
        weights=sum(weight.size for weight in jax.tree.leaves(weights)),
        vocab_rows=weights["embedding"].shape[0],
        weight_bytes=dtype.itemsize,
        cache_bytes=tokens * of_token * cache_dtype.itemsize,
        free_bytes=free_bytes,
    )


def _devices(rollout: RolloutConfig) -> tuple[list[Any], list[Any]]:
    """The devices of training and those of the rollouts."""
    devices = jax.devices()
    if rollout.devices is None:
        return devices, devices
    if distributed.process_count() > 1:
        raise InputError(
            f"rollout.devices={rollout.devices}: weights do not move between the devices of "
            f"{distributed.process_count()} processes; set it to null, so that training and "
            "rollouts share all devices"
        )
    if rollout.devices >= len(devices):
        raise InputError(
            f"rollout.devices={rollout.devices}: there are {len(devices)} devices, and training "
            "needs one or more of its own; give fewer, or null to share all"
        )
    return devices[: -rollout.devices], devices[-rollout.devices :]


def model_on_mesh(
    config: ModelConfig, architecture: Architecture, mesh: Mesh, dtype: jnp.dtype
) -> Model:
    """The model for engines on a mesh: its definition spreads no rows over it."""
    decoder = abstract_decoder(
        architecture, dtype=dtype, remat=config.remat, vocab_multiple=config.vocab_multiple
    )
    definition, _ = nnx.split(decoder)
    return Model(definition, architecture, mesh, abstract_params(mesh, decoder, jnp.float32))


def training_definition(config: RunConfig, architecture: Architecture, mesh: Mesh) -> nnx.GraphDef:
    """A decoder that spreads its rows over the mesh and uses the attention of training."""
    model, data, rollout = config.model, config.data, config.rollout
    after = data.max_answer_tokens if config.method == "sft" else rollout.max_response_tokens
    longest = data.max_prompt_tokens + after
    platform = mesh.devices.flat[0].platform
    return nnx.graphdef(
        abstract_decoder(
            architecture,
            dtype=jnp.dtype(model.dtype),
            remat=model.remat,
            vocab_multiple=model.vocab_multiple,
            attention=choose_backend(
                model.attention, platform, architecture, jnp.dtype(model.dtype), longest
            ),
            mesh=mesh,
        )
    )


def init_params(config: RunConfig, model: Model, tokenizer: Tokenizer) -> dict[str, Any]:
    """Float32 weights on the mesh: read from the checkpoint, or drawn from the seed.

    Think tokens that are new to the checkpoint's tokenizer start with the rows that
    `model.new_rows_from` names; nothing is measured here, and `auto` is the end-of-sequence token.
    """
    if config.model.path is None:
        return _draw(config, model)
    eos = tokenizer.token(tokenizer.eos_id)
    named = row_names(config.model, tokenizer)
    names = RowNames(*(eos if name == AUTO else name for name in named))
    tell_new_rows(tokenizer, names)
    return with_new_rows(read_params(config, model), tokenizer, names)


def read_params(config: RunConfig, model: Model) -> dict[str, Any]:
    """Float32 weights of the checkpoint on the mesh; rows that it lacks are 0."""
    assert config.model.path is not None, "random weights are drawn, not read"
    return import_format.read_params(config.model.path, model.target)


def _draw(config: RunConfig, model: Model) -> dict[str, Any]:
    def draw() -> dict[str, Any]:
        rngs = nnx.Rngs(jax.random.key(config.seed))
        decoder = Decoder(model.architecture, rngs, vocab_multiple=config.model.vocab_multiple)
        return nnx.to_pure_dict(nnx.split(decoder)[1])

    shardings = jax.tree.map(lambda weight: weight.sharding, model.target)
    return jax.jit(draw, out_shardings=shardings)()


def _check_vocabulary(config: RunConfig, tokenizer: Tokenizer, architecture: Architecture) -> None:
    """InputError when the tokenizer has ids without a row, besides new think tokens."""
    rows = architecture.vocab_size
    appended = sum(new >= rows for new in tokenizer.new_ids)
    if tokenizer.vocab_size - appended > rows:
        raise InputError(
            f"{config.tokenizer_directory}: has {tokenizer.vocab_size - appended} tokens, the "
            f"model's vocab_size is {rows}; use the tokenizer of the model"
        )
