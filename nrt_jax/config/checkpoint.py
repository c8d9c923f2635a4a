"""The `checkpoint` section: when state is saved, and what is kept."""

from typing import Literal

from pydantic import Field

from nrt_jax.config.load import Section


class CheckpointConfig(Section):
    """When state is saved, and what is kept."""

    every_steps: int = Field(default=100, ge=1)
    """Steps between saves; the last step is always saved."""
    keep_last: int = Field(default=2, ge=1)
    """Newest checkpoints that are kept."""
    best_metric: str | None = None
    """Metric whose best checkpoint is kept too, such as eval/exact_match; null for none."""
    best_mode: Literal["max", "min"] = "max"
    """Whether the best is the highest or the lowest."""
