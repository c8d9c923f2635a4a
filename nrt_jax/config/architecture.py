"""The numbers that fix the architecture of a Llama or Mistral decoder."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from nrt_jax.config.load import Section

Count = Annotated[int, Field(ge=1, lt=2**31)]


class Llama3Scaling(Section):
    """The frequency scaling of Llama 3.1 and later (`rope_type: llama3`)."""

    factor: float = Field(default=8.0, gt=0)
    """Low frequencies are divided by this factor."""
    low_freq_factor: float = Field(default=1.0, gt=0)
    """Wavelengths above original_max_position_embeddings / low_freq_factor are scaled in full."""
    high_freq_factor: float = Field(default=4.0, gt=0)
    """Wavelengths below original_max_position_embeddings / high_freq_factor are left alone."""
    original_max_position_embeddings: Count = 8192
    """Context length in tokens that the model was trained with before the scaling."""

    @model_validator(mode="after")
    def _factors_differ(self) -> "Llama3Scaling":
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor {self.high_freq_factor} must be above "
                f"low_freq_factor {self.low_freq_factor}"
            )
        return self


class Architecture(Section):
    """Shape of one decoder; names and meanings are those of Hugging Face's `config.json`."""

    family: Literal["llama", "mistral"] = "llama"
    """`model_type` of the Hugging Face directories that are read and written."""
    vocab_size: Count = 32000
    """Rows of the embedding and of the head."""
    hidden_size: Count = 128
    """Width D of the residual stream."""
    intermediate_size: Count = 384
    """Width F of the SwiGLU feed-forward."""
    num_hidden_layers: Count = 3
    """Number of layers L."""
    num_attention_heads: Count = 4
    """Query heads."""
    num_key_value_heads: Count = 4
    """Key/value heads H; divides the query heads."""
    head_dim: Count = 32
    """Width of one head, even."""
    rms_norm_eps: float = Field(default=1e-5, gt=0)
    """Added to the mean square in RMSNorm."""
    rope_theta: float = Field(default=10000.0, gt=0)
    """Base of the rotary frequencies."""
    rope_scaling: Llama3Scaling | None = None
    """Scaling of the rotary frequencies; null for none."""
    sliding_window: Count | None = None
    """A token attends to itself and to the sliding_window - 1 tokens before it; null for all."""
    tie_word_embeddings: bool = False
    """True when the head is the embedding."""
    initializer_range: float = Field(default=0.02, gt=0)
    """Standard deviation of random initial weights."""
    max_position_embeddings: Count = 4096
    """Longest sequence in tokens that the model is made for; exports name it."""

    @model_validator(mode="after")
    def _heads_divide(self) -> "Architecture":
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads {self.num_key_value_heads} must divide "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even")
        return self

    @model_validator(mode="after")
    def _only_mistral_has_a_window(self) -> "Architecture":
        if self.family == "llama" and self.sliding_window is not None:
            raise ValueError(
                f"sliding_window {self.sliding_window} must be null, or family must be mistral: "
                "a Llama has no sliding window"
            )
        return self
