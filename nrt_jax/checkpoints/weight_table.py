"""The table from names in Hugging Face files to the params of the decoder.

Letters: V vocabulary, D model dim, F feed-forward, H key/value heads, d head dim.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Shaped

from nrt_jax.config.architecture import Architecture

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Weight(NamedTuple):
    """One row of the table: a weight's name in the files, and its path and shape in the params.

    A matrix is [out, in] in the files and [*in dims, *out dims] in the params. `in_dims` is the
    number of input dims in `shape`; 0 for a weight that is the same in both. A name with {} stands
    for one weight per layer, stacked in the params.
    """

    name: str
    path: tuple[str, ...]
    shape: tuple[int, ...]
    in_dims: int

    @property
    def stacked(self) -> bool:
        """Whether the params hold the weights of all layers in one array."""
        return "{}" in self.name

    def names(self, layers: int) -> list[str]:
        """The names in the files, layer by layer."""
        return [self.name.format(n) for n in range(layers)] if self.stacked else [self.name]

    def file_shape(self) -> tuple[int, ...]:
        """Shape of the tensor in the files."""
        if not self.in_dims:
            return self.shape
        return math.prod(self.shape[self.in_dims :]), math.prod(self.shape[: self.in_dims])

    def file_spec(self, spec: PartitionSpec) -> PartitionSpec:
        """How a tensor in the files' layout is split when the param is split by `spec`.

        Of the dims that the files merge only the first is ever split, and so the merged dim is.
        """
        axes = tuple(spec)[self.stacked :]
        axes += (None,) * (len(self.shape) - len(axes))
        if not self.in_dims:
            return PartitionSpec(*axes)
        (first_in, *rest_in), (first_out, *rest_out) = axes[: self.in_dims], axes[self.in_dims :]
        assert not any((*rest_in, *rest_out)), f"{self.name}: an inner dim is split by {spec}"
        return PartitionSpec(first_out, first_in)

    def from_file(self, tensor: Shaped[Array | np.ndarray, "..."], shape: tuple[int, ...]) -> Any:
        """A tensor of the files in the layout of the params, with shape `shape` there."""
        return (tensor.T if self.in_dims else tensor).reshape(shape)

    def to_file(self, weight: Shaped[Array, "..."]) -> Array:
        """The inverse of `from_file`; padding of the vocabulary is cut off."""
        if not self.in_dims:
            return weight[: self.shape[0]]
        out, features = self.file_shape()
        return weight.reshape(features, -1).T[:out]


def weight_table(a: Architecture) -> list[Weight]:
    """Every weight of a Llama or Mistral of this architecture, each once."""
    V, D, F = a.vocab_size, a.hidden_size, a.intermediate_size
    heads, H, d = a.num_attention_heads, a.num_key_value_heads, a.head_dim
    layer = "model.layers.{}."
    rows = [
        (EMBEDDING, "embedding", (V, D), 0),
        (layer + "input_layernorm.weight", "layers.attention_norm.scale", (D,), 0),
        (layer + "self_attn.q_proj.weight", "layers.attention.query", (D, heads, d), 1),
        (layer + "self_attn.k_proj.weight", "layers.attention.key", (D, H, d), 1),
        (layer + "self_attn.v_proj.weight", "layers.attention.value", (D, H, d), 1),
        (layer + "self_attn.o_proj.weight", "layers.attention.output", (heads, d, D), 2),
        (layer + "post_attention_layernorm.weight", "layers.mlp_norm.scale", (D,), 0),
        (layer + "mlp.gate_proj.weight", "layers.mlp.gate", (D, F), 1),
        (layer + "mlp.up_proj.weight", "layers.mlp.up", (D, F), 1),
        (layer + "mlp.down_proj.weight", "layers.mlp.down", (F, D), 1),
        ("model.norm.weight", "final_norm.scale", (D,), 0),
    ]
    if not a.tie_word_embeddings:
        rows.append((HEAD, "head", (D, V), 1))
    return [Weight(name, tuple(path.split(".")), *rest) for name, path, *rest in rows]
