"""The `train` section: sizes and length of a run."""

from pydantic import Field, model_validator

from nrt_jax.config.load import Section


class TrainConfig(Section):
    """Sizes and length of the run."""

    steps: int = Field(default=100, ge=1)
    """Steps of training; each is one rollout and batch_prompts / mini_batch_prompts updates."""
    batch_prompts: int = Field(default=256, ge=1)
    """Prompts that share one rollout (SFT: rows of one update's batch)."""
    mini_batch_prompts: int = Field(default=64, ge=1)
    """Prompts of one update; divides batch_prompts."""
    micro_batch_prompts: int = Field(default=8, ge=1)
    """Prompts whose activations exist at once; divides mini_batch_prompts, changes no result."""
    packing: bool = True
    """Pack several short completions, and prompts, into one row; false for a row each. Changes no
    result."""
    batch_shapes: int = Field(default=16, ge=1)
    """Most shapes of micro-batches, each of which is a compiled program. Shapes are chosen from the
    lengths of the batches; the last of them holds the longest groups that the limits allow. 1 pads
    most, which costs less than compiling in a short run."""
    max_skipped_updates: int = Field(default=10, ge=1)
    """The run stops after this many non-finite gradients in a row."""
    diagnosis_prompts: int = Field(default=64, ge=0)
    """Prompts of the first batch whose answers the diagnosis of a new NRT run scores; 0 for no
    diagnosis."""
    allow_cold_start: bool = False
    """Train also where the diagnosis says that the first batch teaches nothing."""
    stop_on_collapse: bool = False
    """Save and end the run when its traces collapse, that is when their length or entropy falls
    below a tenth of its start; false for a warning."""
    gradient_shares_every: int = Field(default=50, ge=0)
    """Steps between two measurements of each term's share of the gradient, each of which is a pass
    per term over one micro-batch; 0 for none but that of the diagnosis."""

    @model_validator(mode="after")
    def _sizes_divide(self) -> "TrainConfig":
        if self.batch_prompts % self.mini_batch_prompts:
            raise ValueError(
                f"mini_batch_prompts {self.mini_batch_prompts} must divide "
                f"batch_prompts {self.batch_prompts}"
            )
        if self.mini_batch_prompts % self.micro_batch_prompts:
            raise ValueError(
                f"micro_batch_prompts {self.micro_batch_prompts} must divide "
                f"mini_batch_prompts {self.mini_batch_prompts}"
            )
        if self.updates >= 2**31:
            raise ValueError(
                f"steps {self.steps} of batch_prompts {self.batch_prompts} / mini_batch_prompts "
                f"{self.mini_batch_prompts} updates are {self.updates}; the optimizer counts to "
                f"{2**31 - 1}"
            )
        return self

    @property
    def updates(self) -> int:
        """Optimizer updates of the whole run."""
        return self.steps * (self.batch_prompts // self.mini_batch_prompts)
