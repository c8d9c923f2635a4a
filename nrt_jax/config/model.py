"""The `model` section: the model to train, and how it is computed."""

from typing import Literal

from pydantic import Field, model_validator

from nrt_jax.config.architecture import Architecture
from nrt_jax.config.load import ConfigPath, Section

AUTO = "auto"
AttentionChoice = Literal["auto", "xla", "splash", "cudnn"]


class ModelConfig(Section):
    """A directory to start from, or an architecture with random weights; how it is computed."""

    path: ConfigPath | None = None
    """Hugging Face directory (config.json and *.safetensors), or one that `nrt-jax import` made;
    null to start from random weights."""
    architecture: Architecture | None = None
    """Shape of the model when there is no path."""
    shape: Architecture | None = None
    """Shape of the checkpoint that path is to hold: `nrt-jax plan` needs no more, and training
    refuses a checkpoint of another shape."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the computation; the weights and the optimizer stay float32."""
    remat: Literal["none", "full", "dots", "offload"] = "none"
    """What the backward pass recomputes per layer. none: attention scores and gated activations;
    full: everything; dots: everything but products with weights; offload: as dots, with these
    products in host memory."""
    attention: AttentionChoice = "auto"
    """Implementation of the attention in training. xla: every score is in memory; splash: Pallas
    kernels for TPUs; cudnn: kernels for NVIDIA GPUs, in bfloat16; auto: the platform's kernels if
    they support the model, else xla."""
    logprob_chunk_tokens: int = Field(default=512, ge=1)
    """Positions whose vocabulary-sized logits exist at the same time, per device."""
    vocab_multiple: int = Field(default=128, ge=1)
    """The vocabulary is padded to a multiple of this, so that it divides over the mesh; no padding
    row is sampled or enters a softmax."""
    new_rows_from: str | None = AUTO
    """Where think tokens that the checkpoint lacks take their embedding and head rows. A token:
    copies of its rows; null: the end-of-sequence token; text:TEXT: the mean of the rows of the
    text's tokens; mean:vocabulary: the mean of all rows. A mean has the mean norm of its rows.
    auto: method nrt tries several before its first step and takes the best; elsewhere as null."""
    new_end_row_from: str | None = None
    """The same for the token that ends a trace, where it is to differ; null for new_rows_from."""

    @model_validator(mode="after")
    def _one_source(self) -> "ModelConfig":
        if self.path is None and self.architecture is None and self.shape is None:
            raise ValueError("set one of path (a checkpoint) and architecture (random weights)")
        if self.path is not None and self.architecture is not None:
            raise ValueError(
                f"path={self.path} (a checkpoint) and architecture (random weights) are both set, "
                "and neither rules; set one of them to null, such as model.architecture=null to "
                "start from the checkpoint"
            )
        if self.shape is not None and self.architecture is not None:
            raise ValueError(
                "shape (of a checkpoint) and architecture (random weights) are both set; set "
                "model.shape=null to draw random weights"
            )
        return self
