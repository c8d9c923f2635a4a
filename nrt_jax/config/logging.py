"""The `logging` section: where metrics go."""

from typing import Literal

from pydantic import Field, model_validator

from nrt_jax.config.load import Section


class LoggingConfig(Section):
    """Where metrics go, besides metrics.jsonl."""

    every_steps: int = Field(default=1, ge=1)
    """Steps between lines on the terminal; the files get every step."""
    tensorboard: bool = True
    """Write TensorBoard events to the run directory."""
    rollouts: bool = False
    """Write every trace that NRT samples to rollouts/ in the run directory, as Parquet: tokens,
    logprobs, reward, baseline, advantage and how it ended."""
    wandb_project: str | None = Field(default=None, min_length=1)
    """Weights & Biases project to log to; needs the extra `wandb`. Null for none."""
    wandb_entity: str | None = Field(default=None, min_length=1)
    """User or team of the project; null for the default of the account."""
    wandb_name: str | None = Field(default=None, min_length=1)
    """What Weights & Biases calls the run; null for the name of run_dir."""
    wandb_id: str | None = Field(default=None, pattern=r"^[\w.-]{1,64}$")
    """Id of the run there; null for one that is drawn at the first start. The run directory keeps
    it, so that a run that continues is one run there too."""
    wandb_group: str | None = Field(default=None, min_length=1)
    """Group of runs that this one belongs to."""
    wandb_tags: tuple[str, ...] = ()
    """Tags of the run, of 1 to 64 characters each."""
    wandb_mode: Literal["online", "offline"] | None = None
    """offline keeps everything in the run directory for `wandb sync`; null for what the environment
    says (WANDB_MODE), else online."""
    mlflow_experiment: str | None = Field(default=None, min_length=1)
    """MLflow experiment to log to; needs the extra `mlflow`. Null for none."""
    mlflow_uri: str | None = Field(default=None, min_length=1)
    """MLflow's tracking server or store; null for what the environment says (MLFLOW_TRACKING_URI),
    else MLflow's default."""
    mlflow_name: str | None = Field(default=None, min_length=1)
    """What MLflow calls the run; null for the name of run_dir."""

    @model_validator(mode="after")
    def _tags_have_a_length(self) -> "LoggingConfig":
        for tag in self.wandb_tags:
            if not 1 <= len(tag) <= 64:
                raise ValueError(f"wandb_tags {tag!r}: must have 1 to 64 characters")
        return self
