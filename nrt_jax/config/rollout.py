"""The `rollout` section: how traces are sampled."""

from typing import Literal

from pydantic import Field

from nrt_jax.config.load import MOST_SLOTS, MOST_TOKENS, Section
from nrt_jax.config.mesh import MeshConfig

AttentionKernel = Literal["auto", "xla", "pallas"]
Driver = Literal["loop", "jetstream"]


class RolloutConfig(Section):
    """How traces are sampled during training, and where."""

    traces_per_prompt: int = Field(default=8, ge=1, le=MOST_SLOTS)
    """K: traces sampled for each prompt."""
    max_trace_tokens: int = Field(default=2048, ge=1, le=MOST_TOKENS)
    """A trace that reaches this many tokens is cut, and t_end is appended."""
    max_response_tokens: int = Field(default=4096, ge=4, le=MOST_TOKENS)
    """Limit of t_start, trace, t_end and answer together; a long answer shortens its traces."""
    temperature: float = Field(default=1.0, gt=0)
    """Logits are divided by this before sampling, and in the trainer's logprobs of z."""
    top_k: int = Field(default=0, ge=0)
    """Sample from this many of the most probable tokens; 0 for all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the smallest set of tokens with at least this probability."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Sample from tokens with at least this share of the highest probability; 0 for all."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Positive logits of tokens in the prompt or the trace are divided by this, negative ones
    multiplied."""
    stop_tokens: Literal["special", "think_end"] | tuple[str, ...] = "special"
    """special: any special token ends a trace; a list: these entries of the vocabulary do too;
    think_end: t_end alone does, and the other special tokens are never sampled in a trace, nor part
    of the softmax that its logprobs are of."""
    driver: Driver = "loop"
    """What drives the engine: our own loop, or JetStream's orchestrator, on one host. Both draw the
    same traces; jetstream needs the package (pip install 'nrt-jax[jetstream]')."""
    slots: int = Field(default=64, ge=1, le=MOST_SLOTS)
    """Sequences decoded at the same time."""
    decode_steps: int = Field(default=16, ge=1, le=1024)
    """Tokens decoded per sequence between two checks of the host."""
    prefill_chunk: int | None = Field(default=512, ge=16, le=MOST_TOKENS)
    """Most tokens of a prompt that are run between two decodings; null for no limit."""
    cache_dtype: Literal["float32", "bfloat16", "int8"] | None = None
    """Dtype of the stored keys and values; null for that of the engine's computation."""
    attention: AttentionKernel = "auto"
    """Implementation of the attention in the engine. xla; pallas: the platform's kernel (TPU or
    GPU); auto: that kernel if it supports the model, else xla."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of the engine's weights and computation; null for model.dtype. Weights in another dtype
    than those of training are cast once per update."""
    mesh: MeshConfig | Literal["auto"] | None = "auto"
    """Mesh of the engine's devices. auto: groups of devices that shard the weights by `tensor`,
    replicated over the rest, of the size that decodes `slots` sequences fastest and fits the
    memory; null: that of training or, with `devices`, data=-1."""
    devices: int | None = Field(default=None, ge=1)
    """Number of devices, the last ones, for rollouts alone; null to share all with training."""
    staleness: int = Field(default=0, ge=0, le=1)
    """1 samples the next step's traces during this step's update, with the weights from before it;
    0 waits for the update."""
    drop_zero_std_groups: bool = False
    """Score every group when it is sampled, and leave groups without a trace term (rewards all
    equal; with estimator clip01, all gains 0) out of the update, with their token and format
    terms."""
