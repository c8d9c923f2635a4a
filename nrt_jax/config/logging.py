"""The `logging` section: where metrics go."""

from pydantic import Field

from nrt_jax.config.load import Section


class LoggingConfig(Section):
    """Where metrics go, besides metrics.jsonl."""

    every_steps: int = Field(default=1, ge=1)
    """Steps between lines on the terminal; the files get every step."""
    tensorboard: bool = True
    """Write TensorBoard events to the run directory."""
    wandb_project: str | None = None
    """Weights & Biases project to log to; needs the extra `wandb`."""
