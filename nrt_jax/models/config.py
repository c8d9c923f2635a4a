"""Which model to train, and how to compute it."""

from typing import Literal

import jax.numpy as jnp
from pydantic import Field, model_validator

from nrt_jax.config import ConfigPath, Section
from nrt_jax.models.variants import Architecture


class ModelConfig(Section):
    """A Hugging Face directory to start from, or an architecture to draw at random."""

    path: ConfigPath | None = None
    """Directory with config.json and *.safetensors; null to start from random weights."""
    architecture: Architecture | None = None
    """Shape of the model when there is no path."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the computation; the weights and the optimizer stay float32."""
    remat: Literal["none", "full", "dots"] = "none"
    """What the backward pass recomputes in a layer: nothing, all, or all but matrix products."""
    log_prob_chunk_tokens: int = Field(default=2048, ge=1)
    """Positions whose vocabulary-sized logits exist at the same time."""

    @model_validator(mode="after")
    def _one_source(self) -> "ModelConfig":
        if (self.path is None) == (self.architecture is None):
            raise ValueError("set one of path (a checkpoint) and architecture (random weights)")
        return self

    @property
    def jax_dtype(self) -> jnp.dtype:
        """`dtype` as jax names it."""
        return jnp.dtype(self.dtype)
