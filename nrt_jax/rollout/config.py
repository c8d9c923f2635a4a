"""Settings of the rollouts."""

from pydantic import Field

from nrt_jax.config import Section


class RolloutConfig(Section):
    """How traces are sampled during training."""

    traces_per_prompt: int = Field(default=8, ge=1)
    """K: traces sampled for each prompt."""
    max_trace_tokens: int = Field(default=2048, ge=1)
    """A trace that reaches this many tokens is cut, and t_end is appended."""
    max_response_tokens: int = Field(default=4096, ge=4)
    """t_start, trace, t_end and answer together; a long answer shortens its traces' limit."""
    temperature: float = Field(default=1.0, gt=0)
    """Logits are divided by this before sampling, and in the trainer's log-probs of z."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the smallest set of tokens with at least this probability."""
    slots: int = Field(default=64, ge=1)
    """Sequences decoded at the same time."""
