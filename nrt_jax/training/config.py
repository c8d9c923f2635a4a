"""The whole config of a run: the rooms' sections, and the loop's own."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from nrt_jax.config import Section
from nrt_jax.data.config import DataConfig
from nrt_jax.models.config import ModelConfig
from nrt_jax.models.sharding import MeshConfig
from nrt_jax.objective.config import ObjectiveConfig
from nrt_jax.rollout.config import RolloutConfig


class OptimizerConfig(Section):
    """AdamW with a schedule and a clip of the gradient's global norm."""

    learning_rate: float = Field(default=1e-5, gt=0)
    """Highest learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What follows the warm-up: no change, or a fall to zero at the last update."""
    warmup_ratio: float = Field(default=0.0, ge=0, le=1)
    """Share of the updates in which the rate rises linearly from zero."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of Adam's first moment."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of Adam's second moment."""
    epsilon: float = Field(default=1e-8, gt=0)
    """Added to the root of Adam's second moment."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled decay of every weight, norms excepted."""
    clip_norm: float | None = Field(default=1.0, gt=0)
    """Largest global norm of the gradient; null for no clip."""
    offload: bool = False
    """Keep the moments in the memory of the hosts between updates: 8 bytes a weight less on the
    devices, for a transfer of as much in both directions at each update."""


class TrainConfig(Section):
    """Sizes and length of the run."""

    steps: int = Field(default=100, ge=1)
    """Batches to train on; each is one rollout and batch_prompts / mini_batch_prompts updates."""
    batch_prompts: int = Field(default=256, ge=1)
    """Prompts that share one rollout (SFT: rows of one update's batch)."""
    mini_batch_prompts: int = Field(default=64, ge=1)
    """Prompts of one update; divides batch_prompts."""
    micro_batch_prompts: int = Field(default=8, ge=1)
    """Prompts whose activations exist at once; divides mini_batch_prompts, changes no number."""
    packing: bool = True
    """Put short branches, and prompts, into one row; false for a row each. Changes no number."""
    batch_shapes: int = Field(default=16, ge=2)
    """Most shapes of batches, each of which is a compiled program. Shapes are chosen from the
    lengths as they come; the last of them holds whatever the limits of lengths allow."""
    max_skipped_updates: int = Field(default=10, ge=1)
    """The run stops after this many non-finite gradients in a row."""

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
        return self

    @property
    def updates(self) -> int:
        """Optimizer updates of the whole run."""
        return self.steps * (self.batch_prompts // self.mini_batch_prompts)


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


class EvaluationConfig(Section):
    """Exact match on held-out examples while training."""

    every_steps: int = Field(default=100, ge=1)
    """Steps between evaluations; before the first and after the last step there is always one."""
    examples: int = Field(default=512, ge=0)
    """Held-out examples to answer; 0 for no evaluation."""
    max_answer_tokens: int = Field(default=64, ge=1)
    """Longest answer to generate, in tokens."""
    trace_temperature: float = Field(default=0.0, ge=0)
    """Temperature of the traces; 0 is greedy, 1 samples as training does. Answers are greedy."""
    score_references: bool = False
    """Also score the reference answer after each trace (eval/reward and others); not for sft."""
    samples: int = Field(default=10, ge=0)
    """Examples whose trace and answer are written to samples.jsonl."""


class LoggingConfig(Section):
    """Where metrics go, besides metrics.jsonl."""

    every_steps: int = Field(default=1, ge=1)
    """Steps between lines on the terminal; the files get every step."""
    tensorboard: bool = True
    """Write TensorBoard events to the run directory."""
    wandb_project: str | None = None
    """Weights & Biases project to log to; needs `pip install wandb`."""


class RunConfig(Section):
    """One run: `nrt-jax train CONFIG`."""

    method: Literal["nrt", "sft"] = "nrt"
    """nrt samples traces and learns from them; sft is cross-entropy of the answer after x."""
    run_dir: Path = Path("runs/default")
    """Everything the run writes; an existing run in it is continued."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Fixes the initial weights, the order of the data and every sampled token."""
    model: ModelConfig
    """The model to train."""
    data: DataConfig
    """Questions and answers."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """The NRT loss; not read when method is sft."""
    rollout: RolloutConfig = RolloutConfig()
    """How traces are sampled; training by sft samples none."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The update rule."""
    train: TrainConfig = TrainConfig()
    """Sizes and length."""
    mesh: MeshConfig = MeshConfig()
    """How devices are laid out."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saves."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Held-out exact match."""
    logging: LoggingConfig = LoggingConfig()
    """Metrics."""

    @property
    def tokenizer_directory(self) -> Path:
        """Where the tokenizer is: `data.tokenizer`, or the model's own directory."""
        directory = self.data.tokenizer or self.model.path
        assert directory is not None, "_a_tokenizer_is_named holds"
        return directory

    @model_validator(mode="after")
    def _a_tokenizer_is_named(self) -> "RunConfig":
        if self.data.tokenizer is None and self.model.path is None:
            raise ValueError(
                "data.tokenizer is null and model.path too; name a directory with a tokenizer"
            )
        return self

    @model_validator(mode="after")
    def _best_checkpoint_is_evaluated(self) -> "RunConfig":
        name, saves, evaluation = (
            self.checkpoint.best_metric,
            self.checkpoint.every_steps,
            self.evaluation,
        )
        if name is None or not name.startswith("eval/"):
            return self
        if not evaluation.examples:
            raise ValueError(
                f"checkpoint.best_metric {name} with evaluation.examples 0: nothing measures it; "
                "set evaluation.examples, or another metric"
            )
        if saves % evaluation.every_steps:
            raise ValueError(
                f"checkpoint.best_metric {name}: checkpoint.every_steps {saves} must be a multiple "
                f"of evaluation.every_steps {evaluation.every_steps}, to have it for every save"
            )
        return self

    @model_validator(mode="after")
    def _rollouts_fit_the_loss(self) -> "RunConfig":
        if self.method == "sft":
            return self
        room = self.rollout.max_response_tokens - self.data.max_answer_tokens
        if room < 3:
            raise ValueError(
                f"rollout.max_response_tokens {self.rollout.max_response_tokens} holds no trace "
                f"beside an answer of data.max_answer_tokens {self.data.max_answer_tokens}; "
                "raise the first, or lower the second, until they differ by 3"
            )
        truncation = self._truncation
        if truncation is not None and self.objective.old_log_probs == "sampler":
            raise ValueError(
                f"{truncation} with objective.old_log_probs sampler: the trainer's log-probs are "
                "those of the plain softmax; set objective.old_log_probs=recompute"
            )
        if self.rollout.staleness and self.objective.importance_cap is None:
            raise ValueError(
                f"rollout.staleness {self.rollout.staleness} without an importance ratio: the "
                "traces are of older weights; set objective.old_log_probs=recompute and "
                "objective.importance_cap=2"
            )
        if self.rollout.drop_groups_without_spread and self.rollout.traces_per_prompt == 1:
            raise ValueError(
                "rollout.drop_groups_without_spread with rollout.traces_per_prompt 1: a single "
                "trace has no spread, so nothing is left to train on; sample 2 or more"
            )
        if self.rollout.temperature != 1 and self.objective.trace_covers == "z_and_end":
            raise ValueError(
                f"rollout.temperature {self.rollout.temperature} with objective.trace_covers "
                "z_and_end: t_end is scored at temperature 1; set objective.trace_covers=z"
            )
        return self

    @property
    def _truncation(self) -> str | None:
        """The first setting under which traces are not drawn from the whole softmax."""
        rollout = self.rollout
        neutral = {"top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1}
        for name, value in neutral.items():
            if getattr(rollout, name) != value:
                return f"rollout.{name} {getattr(rollout, name)}"
        return None
