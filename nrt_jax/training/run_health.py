"""The health of a run: the diagnosis before its first update, and the watch for a collapse."""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nrt_jax import distributed
from nrt_jax.atomic_files import write_atomically
from nrt_jax.config.run import RunConfig
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.errors import RunFailed
from nrt_jax.evaluation.estimates import Estimate
from nrt_jax.training.answer_logprobs import AnswerLogprobs
from nrt_jax.training.diagnosis import (
    ScoreAnswers,
    answer_figures,
    logprobs_by_question,
    score_groups,
    trace_figures,
)
from nrt_jax.training.forward import loss_settings
from nrt_jax.training.health import Diagnosis, examine, table
from nrt_jax.training.logger import METRICS_FILE
from nrt_jax.training.setup import Run
from nrt_jax.training.steps import save_run
from nrt_jax.types import Group

log = logging.getLogger(__name__)

DIAGNOSIS_FILE = "diagnosis.json"
COLLAPSED = 0.1
"""Share of its first value below which a watched metric has collapsed."""


def check_health(
    run: Run,
    step: int,
    groups: Sequence[Group],
    gradient_shares: Callable[[], dict[str, float]],
) -> dict[str, float]:
    """Diagnose the first batch of a run, and measure the terms' gradients at the steps where that
    is due.

    Both are of the weights before the update. Returns the shares, empty where none are due. Raises
    RunFailed where the run would learn nothing, unless `train.allow_cold_start`.
    """
    train, every = run.config.train, run.config.train.gradient_shares_every
    first = step == 1 and train.diagnosis_prompts > 0
    if not first and not (every and step % every == 0):
        return {}
    with run.logger.timer("diagnosis"):
        shares = gradient_shares()
        if first:
            policy = run.policy
            settings = loss_settings(run.config, policy.model, policy.tokenizer)
            score = AnswerLogprobs(settings, policy.model.mesh, train.micro_batch_prompts)
            name, params = str(run.config.run_dir), run.progress.state.params
            _tell_start(
                diagnose(name, groups, run.config, policy.tokenizer, score, params, shares),
                run.config,
            )
    return shares


def diagnose(
    name: str,
    groups: Sequence[Group],
    config: RunConfig,
    tokenizer: Tokenizer,
    score: ScoreAnswers,
    params: Any,
    gradient_shares: Mapping[str, float] | None = None,
) -> Diagnosis:
    """The figures of these groups under the weights that drew them, and what is outside its range.

    The answers of the first `train.diagnosis_prompts` groups are scored.
    """
    scored_groups = groups[: config.train.diagnosis_prompts]
    scored = score_groups(score, params, scored_groups, tokenizer, config.seed)
    figures = trace_figures(groups, tokenizer) | answer_figures(scored, config.objective)
    figures |= {name: Estimate(share) for name, share in (gradient_shares or {}).items()}
    findings = examine(figures, config)
    return Diagnosis(
        name=name,
        questions=len(scored),
        traces_per_prompt=len(groups[0].traces),
        figures=figures,
        findings=findings,
        by_question=logprobs_by_question(scored),
    )


def _tell_start(diagnosis: Diagnosis, config: RunConfig) -> None:
    """Log the diagnosis of a run's first batch, keep it in the run directory, and judge it."""
    if distributed.is_first():
        write_atomically(config.run_dir / DIAGNOSIS_FILE, diagnosis.to_json().encode())
    for line in table(diagnosis):
        log.info("%s", line)
    for finding in diagnosis.findings:
        level = logging.ERROR if finding.level == "stop" else logging.WARNING
        log.log(level, "%s", finding.line)
    if diagnosis.stops and not config.train.allow_cold_start:
        raise RunFailed(does_not_start(diagnosis))


def does_not_start(diagnosis: Diagnosis) -> str:
    """Why a run does not start, in one line."""
    figures = ", ".join(finding.figure for finding in diagnosis.stops)
    return (
        f"{diagnosis.name}: from here the run would learn nothing ({figures}); set what the lines "
        "above name, or train.allow_cold_start=true to train all the same"
    )


# --- collapse ------------------------------------------------------------------------------------


@dataclass
class CollapseWatch:
    """Compares length and entropy of the traces with those of the first step, and warns once."""

    first: Mapping[str, float] | None = None
    """Metrics of the first step; None before it."""
    _told: set[str] = field(default_factory=set)

    @classmethod
    def of_run(cls, run_dir: Path) -> "CollapseWatch":
        """A watch that knows the first step of a run which continues."""
        path = run_dir / METRICS_FILE
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        rows = (json.loads(line) for line in lines)
        first = next((row for row in rows if row["step"] > 0 and "trace/tokens" in row), None)
        first = distributed.from_first("the metrics of the first step", first)
        if first is None:
            return cls()
        # The file has null where a value is no number.
        return cls({name: math.nan if x is None else float(x) for name, x in first.items()})

    def check(self, metrics: Mapping[str, float]) -> str | None:
        """One line when a metric has collapsed for the first time; None otherwise.

        A falling entropy is no collapse where the reward's lead over the empty trace has grown and
        most traces have it: then the model has become certain of traces that help.
        """
        if self.first is None:
            self.first = dict(metrics)
        gain, first_gain = _gain(metrics), _gain(self.first)
        succeeds = gain > first_gain and metrics["reward/above_baseline_share"] > 0.5
        rewards = f"the reward's lead over the empty trace went from {first_gain:.3g} to {gain:.3g}"
        for name, causes in _CAUSES.items():
            fallen = metrics[name] < COLLAPSED * self.first[name]
            if not fallen or name in self._told or (name == "policy/entropy" and succeeds):
                continue
            self._told.add(name)
            return (
                f"collapse: {name} is {metrics[name]:.3g}, below a tenth of the "
                f"{self.first[name]:.3g} at the start, and {rewards}; {causes}"
            )
        return None


_CAUSES = {
    "trace/tokens": "likely causes: the format term teaches t_end everywhere "
    "(objective.format_where=natural_end, a lower objective.format_coefficient), or the answers "
    "lost their support (objective.token_signal=fixed)",
    "policy/entropy": "likely causes: one text wins in all questions (a lower "
    "optimizer.learning_rate, objective.entropy_coefficient or objective.kl_coefficient above 0), "
    "or the traces became trivial",
}


def look_for_collapse(run: Run, watch: CollapseWatch, metrics: Mapping[str, float]) -> None:
    """Warn of a collapse; with `train.stop_on_collapse`, save and raise RunFailed."""
    collapse = watch.check(metrics)
    if collapse is None:
        return
    if run.config.train.stop_on_collapse:
        save_run(run)
        raise RunFailed(
            f"step {run.progress.step}: {collapse}; saved; to go on, run the same command with "
            "train.stop_on_collapse=false"
        )
    log.warning("step %d: %s", run.progress.step, collapse)


def _gain(metrics: Mapping[str, float]) -> float:
    return metrics["reward/mean"] - metrics["reward/baseline"]
