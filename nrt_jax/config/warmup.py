"""The `warmup` section: a model without think tokens learns to open, write and close a trace."""

from typing import Literal

from pydantic import Field, model_validator

from nrt_jax.config.load import Section


class RowsStage(Section):
    """First stage: the rows of the two think tokens train alone."""

    updates: int = Field(default=16, ge=0)
    """Updates of this stage."""
    learning_rate: float = Field(default=5e-3, gt=0)
    """Constant rate of the two rows."""
    trace_weight: float = Field(default=1.0, ge=0)
    """Weight of the tokens of z in the loss; those of y* have 1."""


class AllStage(Section):
    """Second stage, with train all: all weights train, the two rows in a group of their own."""

    updates: int = Field(default=36, ge=0)
    """Updates of this stage."""
    learning_rate: float = Field(default=2e-5, gt=0)
    """Constant rate of all weights but the two rows."""
    rows_learning_rate: float = Field(default=1e-3, gt=0)
    """Constant rate of the two rows."""
    trace_weight: float = Field(default=0.3, ge=0)
    """Weight of the tokens of z in the loss; those of y* have 1."""
    first_token_weight: float = Field(default=0.5, ge=0)
    """Weight of the first token of z, where the model decides against an empty trace."""


class WarmupConfig(Section):
    """Updates before step 1 on `x t_start z t_end y*`, where z is the model's own text."""

    train: Literal["new_rows", "all"] | None = None
    """What trains: new_rows, the embedding and head rows of the two think tokens in the stage
    `rows`; all, also every weight in the stage `all` after it; null for no warm-up."""
    batch_prompts: int = Field(default=8, ge=1)
    """Sequences of one update."""
    instruction: str | None = None
    """System turn under which the model writes z; training leaves it out. null: a built-in text
    where the template has a system turn; '': the model continues x freely (base models)."""
    max_tokens: int = Field(default=64, ge=1)
    """A text that reaches this many tokens is cut, and its t_end is left out of the loss."""
    min_tokens: int = Field(default=4, ge=1)
    """A shorter text is left out, and with it its row."""
    texts_per_prompt: int = Field(default=1, ge=1)
    """Texts sampled per prompt; the first that ends before max_tokens is taken, or else the
    first."""
    temperature: float = Field(default=1.0, gt=0)
    """Of the sampled texts."""
    empty_share: float = Field(default=0.2, ge=0, lt=1)
    """Share of rows with an empty trace, whose t_end is left out of the loss too: the model learns
    to answer after `t_start t_end`."""
    start_weight: float = Field(default=1.0, ge=0)
    """Weight of t_start in the loss."""
    end_weight: float = Field(default=1.0, ge=0)
    """Weight of the t_end of texts that ended by themselves."""
    rows: RowsStage = RowsStage()
    """The rows alone."""
    all: AllStage = AllStage()
    """All weights."""

    @property
    def stages(self) -> tuple[RowsStage | AllStage, ...]:
        """The stages in order; none without a warm-up."""
        stages = {None: (), "new_rows": (self.rows,), "all": (self.rows, self.all)}[self.train]
        return tuple(stage for stage in stages if stage.updates)

    @property
    def updates(self) -> int:
        """Updates of the whole warm-up; 0 without one."""
        return sum(stage.updates for stage in self.stages)

    @model_validator(mode="after")
    def _makes_updates(self) -> "WarmupConfig":
        if self.train is not None and not self.updates:
            raise ValueError(
                f"warmup.train {self.train} with no updates; set warmup.rows.updates or "
                "warmup.all.updates above 0, or warmup.train to null"
            )
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"warmup.min_tokens {self.min_tokens} exceeds warmup.max_tokens "
                f"{self.max_tokens}, so no text is left; lower the first"
            )
        return self
