"""The `checkpoint` section: when state is saved, and what is kept."""

from typing import Literal

from pydantic import Field

from nrt_jax.config.load import Section


class CheckpointConfig(Section):
    """When state is saved, and what is kept."""

    every_steps: int = Field(default=100, ge=1)
    """Steps between saves; the last step is always saved."""
    keep_last: int = Field(default=2, ge=1)
    """How many of the newest checkpoints are kept."""
    best_metric: str | None = None
    """Metric of the evaluation, such as eval/exact_match, whose best checkpoint is kept too; null
    for none. A step's own metrics are of the weights before its update, which no checkpoint has."""
    best_mode: Literal["max", "min"] = "max"
    """Whether the highest or the lowest value is the best."""
