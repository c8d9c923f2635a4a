"""Benchmarks that a training asks its newest weights."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nrt_jax import distributed
from nrt_jax.checkpoints.abstract_model import Model
from nrt_jax.config.run import RunConfig
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.engine.programs import Programs
from nrt_jax.errors import InputError
from nrt_jax.evaluation.asked_model import AskedModel
from nrt_jax.evaluation.results import TaskResult
from nrt_jax.evaluation.suite import Suite, evaluate_weights, load_tasks, task_names

if TYPE_CHECKING:
    from lm_eval.api.task import Task

BENCHMARKS = "benchmarks"
"""The folder in a run directory that has a folder per evaluated step."""


@dataclass(frozen=True)
class TrainingSuite:
    """The tasks, and the model as the engines hold it."""

    suite: Suite
    tasks: "dict[str, Task]" = field(repr=False)
    config: RunConfig
    model: Model
    tokenizer: Tokenizer
    programs: Programs = field(repr=False)

    def evaluate(self, params: Any, step: int) -> dict[str, float]:
        """Metrics of weights after a step: for each task its score, 0 to 1, as `eval/TASK`.

        Also the share of traces that never closed and the mean tokens of a trace. The answers are
        in the run directory; a step that is evaluated again goes on with those of equal weights.
        """
        out = self.config.run_dir / BENCHMARKS / str(step)
        asked = AskedModel(self.config, self.model, self.tokenizer, params, self.programs)
        name = f"{self.config.run_dir.name}, step {step}"
        result = evaluate_weights(asked, self.tasks, self.suite, out, name=name, replaces=True)
        metrics: dict[str, float] = {}
        for row in () if result is None else result.tasks:
            metrics |= _metrics(row, reasons=asked.reasons)
        return distributed.from_first("metrics of benchmarks", metrics)


def _metrics(row: TaskResult, *, reasons: bool) -> dict[str, float]:
    metrics = {f"eval/{row.task}": row.value}
    if reasons and row.answers:
        metrics[f"eval/{row.task}_unclosed_share"] = row.unclosed / row.answers
        metrics[f"eval/{row.task}_trace_tokens"] = row.mean_trace_tokens or 0.0
    return metrics


def training_suite(
    config: RunConfig, model: Model, tokenizer: Tokenizer, programs: Programs
) -> TrainingSuite | None:
    """The benchmarks of `evaluation.suite`; None without any.

    Raises InputError for an unknown name, missing files, and without the extra `eval`.
    """
    evaluation = config.evaluation
    if not evaluation.suite:
        return None
    try:
        suite = Suite(
            tasks=task_names(evaluation.suite),
            limit=evaluation.suite_limit,
            data=evaluation.suite_data,
            seed=config.seed,
        )
        tasks = load_tasks(suite)
    except InputError as error:
        text = str(error).replace("--data", "evaluation.suite_data")
        raise InputError(f"evaluation.suite: {text}") from None
    return TrainingSuite(suite, tasks, config, model, tokenizer, programs)
