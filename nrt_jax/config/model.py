"""Which model to train, and how to compute it."""

from typing import Literal

from pydantic import Field, model_validator

from nrt_jax.config.architecture import Architecture
from nrt_jax.config.load import ConfigPath, Section

AttentionChoice = Literal["auto", "xla", "splash", "cudnn"]


class ModelConfig(Section):
    """A Hugging Face directory to start from, or an architecture to draw at random."""

    path: ConfigPath | None = None
    """Hugging Face directory (config.json and *.safetensors), or one that `nrt-jax import` made;
    null to start from random weights."""
    architecture: Architecture | None = None
    """Shape of the model when there is no path."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the computation; the weights and the optimizer stay float32."""
    remat: Literal["none", "full", "dots", "offload"] = "none"
    """What the backward pass recomputes in a layer: the attention scores and the gated activations
    only; all; all but the products with weights; the same with these in the host's memory."""
    attention: AttentionChoice = "auto"
    """What computes the attention in training: xla, with every score in memory; splash, the Pallas
    kernels of TPUs; cudnn, those of NVIDIA GPUs, in bfloat16; auto, the platform's kernels where
    they take the model, and xla elsewhere."""
    logprob_chunk_tokens: int = Field(default=512, ge=1)
    """Positions whose vocabulary-sized logits exist at the same time on a device."""

    vocab_multiple: int = Field(default=128, ge=1)
    """The vocabulary is padded to a multiple of this, so that it divides over the mesh; the padding
    is never sampled and in no softmax."""
    new_rows_from: str | None = None
    """Token whose embedding and head rows think tokens that are new to the checkpoint start with;
    null for the end-of-sequence token."""

    @model_validator(mode="after")
    def _one_source(self) -> "ModelConfig":
        if (self.path is None) == (self.architecture is None):
            raise ValueError("set one of path (a checkpoint) and architecture (random weights)")
        return self
