"""A config on machines by name: its model's shape, its meshes, and whether they divide."""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

from nrt_jax.checkpoints.hf_config import read_architecture
from nrt_jax.config.architecture import Architecture
from nrt_jax.config.mesh import MeshConfig
from nrt_jax.config.run import NO_CHECKPOINT, RunConfig
from nrt_jax.engine.attention_kernels import kernel_applies
from nrt_jax.errors import InputError
from nrt_jax.models.attention_backend import Backend, choose_backend
from nrt_jax.models.decode_mesh import DecodeLoad, decode_mesh
from nrt_jax.models.sharding import mesh_sizes
from nrt_jax.planning.links import Link, links
from nrt_jax.topologies import Topology
from nrt_jax.training.packing import Shape, largest_shape
from nrt_jax.training.setup import layout_on

Sizes = Mapping[str, int]
"""Devices along each mesh axis."""
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


class Weights(NamedTuple):
    """How many weights the parts of a model have, padding of the vocabulary included."""

    embedding: int
    layer: int
    """Of one layer, those of its norms left out."""
    head: int
    """0 where the head is the embedding."""
    norms: int

    def total(self, layers: int) -> int:
        """Of a model of so many layers."""
        return self.embedding + layers * self.layer + self.head + self.norms


def weights_of(a: Architecture, vocab_multiple: int) -> Weights:
    """The weights of an architecture, counted."""
    rows = a.vocab_size + -a.vocab_size % vocab_multiple
    D, heads = a.hidden_size, 2 * (a.num_attention_heads + a.num_key_value_heads)
    table = rows * D
    return Weights(
        embedding=table,
        layer=D * a.head_dim * heads + 3 * D * a.intermediate_size,
        head=0 if a.tie_word_embeddings else table,
        norms=(2 * a.num_hidden_layers + 1) * D,
    )


class Setting(NamedTuple):
    """A run on machines."""

    config: RunConfig
    architecture: Architecture
    topology: Topology
    mesh: Sizes
    """Of training."""
    rollout_mesh: Sizes
    shape: Shape
    """Of the largest micro-batch that the limits of the config allow."""

    @property
    def weights(self) -> Weights:
        """Of the model, counted."""
        return weights_of(self.architecture, self.config.model.vocab_multiple)

    @property
    def count(self) -> int:
        """Weights of the whole model."""
        return self.weights.total(self.architecture.num_hidden_layers)

    @property
    def activation_bytes(self) -> int:
        """Of one number of the computation in training."""
        return BYTES[self.config.model.dtype]

    @property
    def rollout_bytes(self) -> int:
        """Of one weight of the rollouts."""
        return BYTES[self.config.rollout.dtype or self.config.model.dtype]

    @property
    def cache_bytes(self) -> int:
        """Of one stored number of keys and values."""
        rollout = self.config.rollout
        return BYTES[rollout.cache_dtype or rollout.dtype or self.config.model.dtype]

    @property
    def shares_weights(self) -> bool:
        """Whether rollouts use the arrays of training: no copy, no transfer."""
        same = dict(self.mesh) == dict(self.rollout_mesh) and self.rollout_bytes == 4
        return same and not self.config.rollout.staleness

    @property
    def attention(self) -> Backend:
        """The attention of training on these chips."""
        model, rollout, data = self.config.model, self.config.rollout, self.config.data
        after = rollout.max_response_tokens
        longest = data.max_prompt_tokens + (
            data.max_answer_tokens if self.config.method == "sft" else after
        )
        platform = self.topology.chip.platform
        return choose_backend(model.attention, platform, self.architecture, model.dtype, longest)

    @property
    def decoding(self) -> Literal["paged", "own", "xla"]:
        """What decodes: the TPU's kernel over pages, the GPU's over a slot's own tokens, or XLA."""
        stored = {4: "float32", 2: "bfloat16", 1: "int8"}[self.cache_bytes]
        platform, tensor = self.topology.chip.platform, self.rollout_mesh["tensor"]
        asked = self.config.rollout.attention
        if asked == "xla" or not kernel_applies(platform, tensor, self.architecture, stored):
            return "xla"
        return "paged" if platform == "tpu" else "own"

    @property
    def device_memory(self) -> float:
        """Bytes of one device."""
        return self.topology.chip.memory / self.topology.chip.devices

    @property
    def device_flops(self) -> float:
        """Peak of one device, operations per second."""
        return self.topology.chip.flops / self.topology.chip.devices

    @property
    def device_bandwidth(self) -> float:
        """Bytes per second that one device reads of its memory."""
        return self.topology.chip.bandwidth / self.topology.chip.devices

    def links(self) -> dict[str, Link]:
        """Of the axes of training."""
        return links(self.topology, self.mesh)

    def rollout_links(self) -> dict[str, Link]:
        """Of the axes of the rollouts."""
        return links(self.topology, self.rollout_mesh)


def resolve(config: RunConfig, topology: Topology) -> Setting:
    """The run on these machines. Raises InputError for sizes that do not divide over a mesh."""
    if config.rollout.devices is not None:
        raise InputError(
            f"rollout.devices={config.rollout.devices}: a plan is of runs whose rollouts share all "
            "devices; set it to null"
        )
    architecture = planned_architecture(config)
    sizes = mesh_sizes(config.mesh, topology.devices)
    rollout_sizes = _rollout_sizes(config, architecture, topology, sizes)
    train, rollout = config.train, config.rollout
    _check("", architecture, config.model.vocab_multiple, sizes)
    _check("rollout.", architecture, config.model.vocab_multiple, rollout_sizes)
    _check_batch("train.micro_batch_prompts", train.micro_batch_prompts, sizes)
    if config.method != "sft":
        _check_batch("rollout.slots", rollout.slots, rollout_sizes)
    shape = largest_shape(layout_on(config, architecture, sizes))
    return Setting(config, architecture, topology, sizes, rollout_sizes, shape)


def planned_architecture(config: RunConfig) -> Architecture:
    """`model.architecture`, `model.shape`, or that of the checkpoint `model.path`."""
    model = config.model
    if model.architecture is not None or model.shape is not None:
        return model.architecture or model.shape  # pyright: ignore[reportReturnType]
    if model.path is None:
        raise InputError(NO_CHECKPOINT)
    return read_architecture(model.path)


def _rollout_sizes(
    config: RunConfig, architecture: Architecture, topology: Topology, sizes: Sizes
) -> Sizes:
    """Of `rollout.mesh`: auto by the rule of a run, with the memory of the chip."""
    asked, rollout = config.rollout.mesh, config.rollout
    if asked is None:
        return sizes
    if asked != "auto":
        try:
            return mesh_sizes(asked, topology.devices)
        except InputError as error:
            raise InputError(f"rollout.{error}") from None
    a, weights = architecture, weights_of(architecture, config.model.vocab_multiple)
    count = weights.total(a.num_hidden_layers)
    copies = 1 if config.optimizer.offload else 3
    kept = copies * 4 * count / (sizes["fsdp"] * sizes["tensor"])
    tokens = rollout.slots * (config.data.max_prompt_tokens + rollout.max_trace_tokens)
    of_token = 2 * a.num_hidden_layers * a.num_key_value_heads * a.head_dim
    dtype = rollout.dtype or config.model.dtype
    load = DecodeLoad(
        slots=rollout.slots,
        weights=count,
        vocab_rows=weights.embedding // a.hidden_size,
        weight_bytes=BYTES[dtype],
        cache_bytes=tokens * of_token * BYTES[rollout.cache_dtype or dtype],
        free_bytes=max(0, int(topology.chip.memory / topology.chip.devices - kept)),
    )
    return mesh_sizes(decode_mesh(a, load, topology.devices), topology.devices)


def _check(section: str, a: Architecture, vocab_multiple: int, sizes: Sizes) -> None:
    """InputError where a dim of the weights does not divide over the mesh."""
    rows = a.vocab_size + -a.vocab_size % vocab_multiple
    dims = {
        "fsdp": {"hidden_size": a.hidden_size},
        "tensor": {
            "num_key_value_heads": a.num_key_value_heads,
            "intermediate_size": a.intermediate_size,
            "vocab_size, padded": rows,
        },
    }
    for axis, of_axis in dims.items():
        for name, size in of_axis.items():
            if size % sizes[axis]:
                raise InputError(
                    f"{section}mesh.{axis}={sizes[axis]} does not divide {name} {size}; use a "
                    f"divisor of {math.gcd(*of_axis.values())}"
                )


def _check_batch(name: str, size: int, sizes: Sizes) -> None:
    shards = sizes["data"] * sizes["fsdp"]
    if size % shards:
        raise InputError(
            f"{name}={size} does not divide over mesh data*fsdp={shards}; use a multiple of "
            f"{shards}"
        )


def mesh_text(sizes: Sizes) -> str:
    """Axes of more than one device, `fsdp=16,tensor=4`."""
    return ",".join(f"{axis}={n}" for axis, n in sizes.items() if n > 1) or "data=1"


def mesh_config(sizes: Sizes) -> MeshConfig:
    """The section of a config with these sizes."""
    return MeshConfig(**dict(sizes))
