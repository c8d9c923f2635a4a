"""The `optimizer` section: AdamW, its schedule, and the clip of the gradient."""

from typing import Literal

from pydantic import Field

from nrt_jax.config.load import Section


class OptimizerConfig(Section):
    """AdamW with a schedule and a clip of the gradient's global norm."""

    learning_rate: float = Field(default=1e-5, gt=0)
    """Highest learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What follows the warm-up: a constant rate, or a decay to zero at the last update."""
    warmup_ratio: float = Field(default=0.0, ge=0, le=1)
    """Share of the updates in which the rate rises linearly from zero."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of Adam's first moment."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of Adam's second moment."""
    epsilon: float = Field(default=1e-8, gt=0)
    """Added to the root of Adam's second moment."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled decay of every weight except those of norms."""
    clip_norm: float | None = Field(default=1.0, gt=0)
    """Largest global norm of the gradient; null for no clip."""
    offload: bool = False
    """Keep the moments in host memory between updates. It saves 8 bytes per weight on the devices
    and transfers as many in both directions at each update."""
