"""The healthy range of every figure of a diagnosis, and what to set where one is outside it."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from nrt_jax.config.run import RunConfig
from nrt_jax.config.schemes import SCHEMES
from nrt_jax.evaluation.estimates import Estimate
from nrt_jax.training.diagnosis import Figures

Level = Literal["stop", "warn"]


class Check(NamedTuple):
    """The healthy range of a figure. A mean with an interval is outside it if all of the interval
    is."""

    figure: str
    title: str
    unit: Literal["share", "tokens", "nats", "nats per token"]
    low: float | None = None
    high: float | None = None
    stop_below: float | None = None
    stop_above: float | None = None
    """A run with less, or more, than these does not start."""
    proves: bool = False
    """Healthy only where the whole interval is inside the range: a claim that needs evidence."""
    remedy: str = ""
    """What the value means and what to set, after "low" or "high" is known."""


_WARM_UP = "warm up without written reasoning (warmup.train=all)"

CHECKS = (
    Check(
        "trace/empty_share",
        "empty traces",
        "share",
        high=0.05,
        stop_above=0.5,
        remedy="the model does not begin to reason after t_start; copy rows that begin a text "
        "(model.new_rows_from=auto), or " + _WARM_UP,
    ),
    Check("trace/empty_other_share", "of them ended by another special token", "share"),
    Check("trace/end_think_end_share", "traces ended by t_end", "share"),
    Check(
        "trace/end_other_share",
        "traces ended by another special token",
        "share",
        high=0.5,
        remedy="most traces end with tokens that mean something else; let t_end alone end them "
        "(rollout.stop_tokens=think_end)",
    ),
    Check(
        "trace/end_length_share",
        "traces cut by the limit",
        "share",
        high=0.9,
        remedy="hardly a trace ends by itself; raise rollout.max_trace_tokens, and do not teach "
        "t_end where the limit cuts (objective.format_where=natural_end)",
    ),
    Check(
        "trace/tokens",
        "tokens per trace",
        "tokens",
        low=2.0,
        remedy="there is little to reinforce; copy rows that begin a text "
        "(model.new_rows_from=auto), or " + _WARM_UP,
    ),
    Check(
        "trace/median_tokens",
        "tokens of the median trace",
        "tokens",
        low=2.0,
        stop_below=2.0,
        remedy="a few long traces hide in the mean that the others end at once; copy rows that "
        "begin a text (model.new_rows_from=auto), or " + _WARM_UP,
    ),
    Check(
        "trace/entropy",
        "entropy of the traces",
        "nats per token",
        low=0.05,
        remedy="the traces of a question are nearly the same; raise rollout.temperature, unless "
        "the run has learned what to write",
    ),
    Check(
        "reward/zero_std_share",
        "groups of equal rewards (zero_std)",
        "share",
        high=0.2,
        stop_above=0.5,
        remedy="these groups teach the traces nothing; sample more traces "
        "(rollout.traces_per_prompt), or rank those below the baseline too "
        "(objective.estimator=grpo_unclipped)",
    ),
    Check(
        "reward/above_baseline_share",
        "traces above the baseline",
        "share",
        low=0.1,
        remedy="few traces beat the empty trace; rank those below it too "
        "(objective.estimator=grpo_unclipped), or " + _WARM_UP,
    ),
    Check("logprob/direct", "log P(y*|x)", "nats per token"),
    Check("logprob/empty", "log P(y*|x, empty trace)", "nats per token"),
    Check("logprob/own", "log P(y*|x, z)", "nats per token"),
    Check("logprob/shuffled", "log P(y*|x, z of another question)", "nats per token"),
    Check(
        "logprob/empty_minus_direct",
        "empty trace - direct",
        "nats per token",
        low=-0.1,
        remedy="the think tokens alone surprise the model; copy other rows "
        "(model.new_rows_from=auto), or " + _WARM_UP + ", which also shows it the empty trace",
    ),
    Check(
        "logprob/own_minus_empty",
        "z - empty trace",
        "nats per token",
        low=-0.2,
        remedy="the traces lead away from the answer; " + _WARM_UP + ", or shorten them "
        "(rollout.max_trace_tokens)",
    ),
    Check("logprob/shuffled_minus_empty", "z of another question - empty trace", "nats per token"),
    Check(
        "logprob/own_minus_shuffled",
        "z - z of another question",
        "nats per token",
        low=0.0,
        proves=True,
        remedy="no evidence yet that a trace says something about its own question, whatever the "
        "reward; usual before training, and to be read again after it (nrt-jax diagnose RUN), "
        "with more held-out rows (--rows) for a narrower interval",
    ),
    Check(
        "weight/format_share",
        "answer tokens weighted for the format",
        "share",
        high=0.1,
        remedy="their weight comes from the think tokens, not from difficulty; "
        + _WARM_UP
        + ", or weigh all tokens alike (objective.scheme=am)",
    ),
    Check(
        "gradient/trace_share",
        "gradient: trace term",
        "share",
        low=0.02,
        remedy="the traces hardly learn; lower the other terms, that of the format by "
        "objective.format_coefficient or objective.format_where=natural_end",
    ),
    Check(
        "gradient/token_share",
        "gradient: token term",
        "share",
        low=0.02,
        remedy="nothing holds the answers in place; do not divide their weights by the length "
        "(objective.ws_normalisation=sum), or use objective.token_signal=fixed",
    ),
    Check(
        "gradient/format_share",
        "gradient: format term",
        "share",
        high=0.8,
        remedy="the think tokens are nearly all that is learned; lower "
        "objective.format_coefficient, leave t_end of cut traces out "
        "(objective.format_where=natural_end), or " + _WARM_UP,
    ),
    Check("gradient/entropy_share", "gradient: entropy term", "share"),
    Check("gradient/kl_share", "gradient: KL term", "share"),
)
"""In the order of the table."""


class Finding(NamedTuple):
    """A figure outside its range."""

    figure: str
    level: Level
    line: str
    """The figure, its value and range, what it means, and what to set."""


class Diagnosis(NamedTuple):
    """The figures of one model on some questions."""

    name: str
    questions: int
    traces_per_prompt: int
    figures: Figures
    findings: list[Finding]
    by_question: Mapping[str, list[float]] = {}
    """logprobs_by_question: from two of these on the same rows comes a paired difference."""

    @property
    def stops(self) -> list[Finding]:
        """The findings with which a run does not start."""
        return [finding for finding in self.findings if finding.level == "stop"]

    def to_json(self) -> str:
        """The figures with intervals and ranges, and the findings."""
        figures = {
            check.figure: {
                **self.figures[check.figure]._asdict(),
                "unit": check.unit,
                "healthy": [check.low, check.high],
            }
            for check in CHECKS
            if check.figure in self.figures
        }
        record = self._asdict() | {
            "figures": figures,
            "findings": [finding._asdict() for finding in self.findings],
        }
        return json.dumps(_without_nan(record), indent=1, ensure_ascii=False) + "\n"


def examine(figures: Figures, config: RunConfig) -> list[Finding]:
    """What is outside its range, in the order of the table.

    Only the weighted schemes have weights that the format can draw. Where a figure is no number,
    the ranges of the others mean nothing, and this is all that is found.
    """
    broken = [c for c in CHECKS if c.figure in figures and not math.isfinite(figures[c.figure][0])]
    if broken:
        line = (
            f"{broken[0].title} is {figures[broken[0].figure].value}: the model gives no finite "
            f"numbers; check the weights of model.path={config.model.path}, or compute in float32 "
            "(model.dtype=float32)"
        )
        return [Finding(broken[0].figure, "stop", line)]
    weighted = SCHEMES[config.objective.scheme].weighted
    findings = []
    for check in CHECKS:
        estimate = figures.get(check.figure)
        if estimate is None or (check.figure == "weight/format_share" and not weighted):
            continue
        if is_outside(check, estimate):
            stop = _stops(check, estimate.value)
            line = (
                f"{check.title} {_shown(check, estimate)} (healthy: {_range(check)}): "
                f"{check.remedy}"
            )
            findings.append(Finding(check.figure, "stop" if stop else "warn", line))
    return findings


def is_outside(check: Check, estimate: Estimate) -> bool:
    """Whether all of the interval is outside the range; of a claim to prove, whether any is."""
    least = estimate.value if estimate.low is None else estimate.low
    most = estimate.value if estimate.high is None else estimate.high
    if check.proves:
        least, most = most, least
    too_low = check.low is not None and most < check.low
    too_high = check.high is not None and least > check.high
    return too_low or too_high


def _stops(check: Check, value: float) -> bool:
    too_low = check.stop_below is not None and value < check.stop_below
    return too_low or (check.stop_above is not None and value > check.stop_above)


def table(diagnosis: Diagnosis) -> list[str]:
    """One line per figure: value, interval, healthy range, and whether it is outside."""
    outside = {finding.figure: finding.level for finding in diagnosis.findings}
    lines = [
        f"{diagnosis.name}: {diagnosis.questions} questions, {diagnosis.traces_per_prompt} traces "
        "each; logprobs in nats per token, with 95 % intervals over questions"
    ]
    for check in CHECKS:
        if check.figure not in diagnosis.figures:
            continue
        shown = _shown(check, diagnosis.figures[check.figure])
        mark = {"stop": "  STOPS", "warn": "  outside"}.get(outside.get(check.figure, ""), "")
        lines.append(f"  {check.title:<40}{shown:<28}{_range(check)}{mark}".rstrip())
    return lines


def _shown(check: Check, estimate: Estimate) -> str:
    text = _number(check, estimate.value)
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} [{_number(check, estimate.low)}, {_number(check, estimate.high)}]"


def _range(check: Check) -> str:
    low, high = check.low, check.high
    if check.proves:
        return "interval above 0"
    parts = [] if low is None else [f"at least {_number(check, low)}"]
    parts += [] if high is None else [f"at most {_number(check, high)}"]
    return ", ".join(parts)


def _number(check: Check, value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    if check.unit == "share":
        return f"{100 * value:.0f} %"
    return f"{value:.1f}" if check.unit == "tokens" else f"{value:.3f}"


def _without_nan(value: Any) -> Any:
    """NaN and infinity as null, which JSON has."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
