"""The whole config of a run, and the rules between its sections."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from nrt_jax.config.checkpoint import CheckpointConfig
from nrt_jax.config.compilation import CompilationConfig
from nrt_jax.config.data import DataConfig
from nrt_jax.config.evaluation import EVALUATION_METRICS, EvaluationConfig
from nrt_jax.config.load import LocalPath, Section, load_config
from nrt_jax.config.logging import LoggingConfig
from nrt_jax.config.mesh import MeshConfig
from nrt_jax.config.model import ModelConfig
from nrt_jax.config.objective import ObjectiveConfig
from nrt_jax.config.optimizer import OptimizerConfig
from nrt_jax.config.profile import ProfileConfig
from nrt_jax.config.rollout import RolloutConfig
from nrt_jax.config.train import TrainConfig
from nrt_jax.config.warmup import WarmupConfig
from nrt_jax.errors import InputError

CONFIG_FILE = "config.yaml"
"""The resolved config in a run's directory."""
NO_CHECKPOINT = (
    "model.path is null, and model.shape is only the shape of a checkpoint; name the directory of "
    "its weights, model.path=DIR"
)


class RunConfig(Section):
    """One run: `nrt-jax train CONFIG`."""

    method: Literal["nrt", "sft"] = "nrt"
    """nrt samples traces and learns from them; sft is cross-entropy of the answer after x."""
    run_dir: LocalPath = Path("runs/default")
    """Directory of everything that the run writes; an existing run in it is continued."""
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
    warmup: WarmupConfig = WarmupConfig()
    """Updates before step 1 that teach a model to write traces; off by default."""
    mesh: MeshConfig = MeshConfig()
    """How devices are laid out."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saves."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Held-out exact match, and benchmarks."""
    logging: LoggingConfig = LoggingConfig()
    """Metrics."""
    compilation: CompilationConfig = CompilationConfig()
    """Compiled programs."""
    profile: ProfileConfig = ProfileConfig()
    """Traces of steps."""

    @property
    def tokenizer_directory(self) -> Path:
        """Where the tokenizer is: `data.tokenizer`, or the model's own directory.

        Raises InputError for a config that names a shape and not yet the checkpoint.
        """
        directory = self.data.tokenizer or self.model.path
        if directory is None:
            raise InputError(NO_CHECKPOINT)
        return directory

    @model_validator(mode="after")
    def _traced_steps_exist(self) -> "RunConfig":
        last = max(self.profile.steps, default=0)
        if last > self.train.steps:
            raise ValueError(
                f"profile.steps names step {last} of train.steps {self.train.steps}; name steps of "
                "the run"
            )
        return self

    @model_validator(mode="after")
    def _a_tokenizer_is_named(self) -> "RunConfig":
        if self.data.tokenizer is None and self.model.path is None and self.model.shape is None:
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
        if name is None:
            return self
        if not name.startswith("eval/"):
            raise ValueError(
                f"checkpoint.best_metric {name}: the metrics of a step are those of the weights "
                "before its update, and the checkpoint has those after it; use a metric of the "
                f"evaluation: {', '.join(EVALUATION_METRICS)}"
            )
        if not evaluation.examples and not evaluation.suite:
            raise ValueError(
                f"checkpoint.best_metric {name} with evaluation.examples 0 and no "
                "evaluation.suite: nothing measures it; set one of them, or another metric"
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
        if self.rollout.max_response_tokens - self.data.max_answer_tokens < 3:
            raise ValueError(
                f"rollout.max_response_tokens {self.rollout.max_response_tokens} holds no trace "
                f"beside an answer of data.max_answer_tokens {self.data.max_answer_tokens}; "
                "raise the first, or lower the second, until they differ by 3"
            )
        truncation = self._truncation
        if truncation is not None and self.objective.old_logprobs == "sampler":
            raise ValueError(
                f"{truncation} with objective.old_logprobs sampler: the trainer's logprobs are "
                "those of the plain softmax; set objective.old_logprobs=recompute"
            )
        if self.rollout.staleness and self.objective.importance_cap is None:
            raise ValueError(
                f"rollout.staleness {self.rollout.staleness} without an importance ratio: the "
                "traces are of older weights; set objective.old_logprobs=recompute and "
                "objective.importance_cap=2"
            )
        compares = self.objective.estimator != "clip01"
        one_trace = self.rollout.traces_per_prompt == 1
        if self.rollout.drop_zero_std_groups and one_trace and compares:
            raise ValueError(
                "rollout.drop_zero_std_groups with rollout.traces_per_prompt 1: the "
                "rewards of one trace have no standard deviation, so nothing is left to train on; "
                "sample 2 or more"
            )
        if self.rollout.drop_zero_std_groups and self.rollout.driver == "jetstream":
            raise ValueError(
                "rollout.drop_zero_std_groups with rollout.driver jetstream: its interface "
                "scores no answers on the traces' keys and values; set rollout.driver=loop"
            )
        stale_reward = self.rollout.staleness and self.objective.reward_policy == "sampling"
        if stale_reward and self.rollout.driver == "jetstream":
            raise ValueError(
                "rollout.driver jetstream with rollout.staleness 1 and objective.reward_policy "
                "sampling: its interface scores no answers on the traces' keys and values; set "
                "rollout.driver=loop"
            )
        if self.rollout.temperature != 1 and self.objective.trace_covers == "z_and_end":
            raise ValueError(
                f"rollout.temperature {self.rollout.temperature} with objective.trace_covers "
                "z_and_end: t_end is scored at temperature 1; set objective.trace_covers=z"
            )
        if self.rollout.stop_tokens == "think_end" and self.objective.trace_covers == "z_and_end":
            raise ValueError(
                "rollout.stop_tokens think_end with objective.trace_covers z_and_end: t_end is "
                "scored among all tokens; set objective.trace_covers=z"
            )
        return self

    @model_validator(mode="after")
    def _warmup_fits_the_run(self) -> "RunConfig":
        warmup = self.warmup
        if warmup.train is None:
            return self
        if self.method == "sft":
            raise ValueError(
                f"warmup.train {warmup.train} with method sft, which writes no traces; set "
                "warmup.train=null"
            )
        if warmup.updates > self.train.updates:
            raise ValueError(
                f"warmup: its {warmup.updates} updates are more than the {self.train.updates} of "
                "the run (train.steps); lower warmup.rows.updates and warmup.all.updates, or raise "
                "train.steps"
            )
        if warmup.max_tokens > self.rollout.max_trace_tokens:
            raise ValueError(
                f"warmup.max_tokens {warmup.max_tokens} exceeds rollout.max_trace_tokens "
                f"{self.rollout.max_trace_tokens}, the longest trace; lower the first"
            )
        if self.objective.kl_coefficient:
            raise ValueError(
                f"objective.kl_coefficient {self.objective.kl_coefficient} with warmup.train "
                f"{warmup.train}: the reference would be the model before the warm-up, which "
                "writes no traces; set objective.kl_coefficient=0"
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


def load_run(directory: Path) -> RunConfig:
    """The resolved config of an existing run. Raises InputError where there is none to be read."""
    path = directory / CONFIG_FILE
    if not path.exists():
        raise InputError(f"{directory}: no {CONFIG_FILE} in it; name the directory of a run")
    try:
        return load_config(RunConfig, [path], [f"run_dir={directory}"])
    except InputError as error:
        raise InputError(
            f"{error}; if another version of nrt_jax saved this run, use that version or mend the "
            "file"
        ) from None
