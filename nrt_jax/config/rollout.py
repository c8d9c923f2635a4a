"""Settings of the rollouts."""

from typing import Literal

from pydantic import Field

from nrt_jax.config.load import Section
from nrt_jax.config.mesh import MeshConfig

AttentionKernel = Literal["auto", "xla", "pallas"]


class RolloutConfig(Section):
    """How traces are sampled during training, and where."""

    traces_per_prompt: int = Field(default=8, ge=1)
    """K: traces sampled for each prompt."""
    max_trace_tokens: int = Field(default=2048, ge=1)
    """A trace that reaches this many tokens is cut, and t_end is appended."""
    max_response_tokens: int = Field(default=4096, ge=4)
    """t_start, trace, t_end and answer together; a long answer shortens its traces' limit."""
    temperature: float = Field(default=1.0, gt=0)
    """Logits are divided by this before sampling, and in the trainer's logprobs of z."""
    top_k: int = Field(default=0, ge=0)
    """Sample from this many of the most probable tokens; 0 for all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the smallest set of tokens with at least this probability."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Sample from tokens with at least this share of the highest probability; 0 for all."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Logits of tokens that the prompt or the trace holds are divided by this, negative ones
    multiplied."""
    stop_tokens: tuple[str, ...] = ()
    """Tokens that end a trace besides the special ones, each an entry of the vocabulary."""
    slots: int = Field(default=64, ge=1)
    """Sequences decoded at the same time."""
    decode_steps: int = Field(default=16, ge=1)
    """Tokens of each sequence that are decoded before the host looks at them."""
    prefill_chunk: int | None = Field(default=512, ge=16)
    """Longest part of a prompt that is run between two decodings, in tokens; null for no limit."""
    cache_dtype: Literal["float32", "bfloat16", "int8"] | None = None
    """Dtype of the stored keys and values; null for that of the engine's computation."""
    attention: AttentionKernel = "auto"
    """What attends while decoding: XLA, or the Pallas kernel of the platform (TPU, GPU); auto takes
    the kernel where there is one for the model."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype that the weights are cast to for the engine, and that it computes in; null for
    model.dtype, computed from the training's own weights."""
    mesh: MeshConfig | None = None
    """How the engine's devices are laid out; null for the training's mesh, or with `devices` for
    data=-1."""
    devices: int | None = Field(default=None, ge=1)
    """The last n devices are for rollouts alone, and training has the others; null: all share."""
    staleness: int = Field(default=0, ge=0, le=1)
    """1 samples the traces of the next step while this step's update runs, with the weights from
    before it; 0 waits for the update."""
    drop_zero_std_groups: bool = False
    """Score every group when it is sampled, and leave groups whose rewards are all equal out of the
    update: their weight is 0 in every term of the loss."""
